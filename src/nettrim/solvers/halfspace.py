"""The published Net-Trim ADMM, written plainly: the slow twin that the faster solvers are measured against.

Source: Aghasi, Abdi, Romberg, "Fast Convex Pruning of Deep Neural Networks", SIAM J. Math. Data Science 2020
(arXiv 1806.06457). The program asks, of the weights ``U`` (bias included) of one ReLU layer with inputs ``X`` and output ``Y``::

    minimise sum |U|   subject to   ||(X U - Y)_Omega||_F <= epsilon,   X U <= V off Omega,   Omega = {Y > 0}

The paper keeps samples in columns; here they are in rows, so that its ``A(W) = W^T X`` reads ``X @ W``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nettrim.status import InvalidInput

OMEGA_THRESHOLD = 1e-6
"""Outputs above this count as positive (the published code's value)."""


@dataclass(frozen=True, eq=False)
class HalfspaceSolution:
    """The sparse iterate of the published ADMM. All numbers are recomputed from it in the data's original units.

    ``weights`` (N, M) and ``bias`` (M,) are float64 on the device of the inputs; ``bias`` is None when none was asked for.
    ``converged`` says that the published stopping rule was met, nothing about feasibility: read ``omega_residual``, which the
    program bounds by epsilon, and ``largest_violation``, which it wants to be zero.
    """

    weights: Tensor
    bias: Tensor | None
    iterations: int
    converged: bool
    objective: float
    """Sum of the absolute weights, bias included: what the published program minimises."""
    omega_residual: float
    """Frobenius norm of ``(A W + 1 b^T - Y)`` on Omega."""
    largest_violation: float
    """Largest amount by which an entry off Omega exceeds its ``V``; 0.0 when none does."""
    distance: float
    """Distance of ``A W + 1 b^T`` to the ReLU preimage of ``Y`` (docs/theory.md (1.2)): exactly Y where Y > 0, at most 0 elsewhere."""


Callback = Callable[[int, HalfspaceSolution], None]


def published_admm(
    A: Tensor,
    Y: Tensor,
    epsilon: float,
    *,
    V: Tensor | None = None,
    omega: Tensor | None = None,
    bias: bool = True,
    rho: float = 100.0,
    iterations: int = 2000,
    stop: float = 5e-9,
    callback: Callback | None = None,
    callback_every: int = 1,
) -> HalfspaceSolution:
    """Run the published ADMM on one layer, in float64.

    A is (P, N), the layer's inputs with samples in rows; Y is (P, M), the reference ReLU outputs. ``epsilon`` is absolute: a
    Frobenius norm in the units of Y. ``V`` (P, M) bounds the pre-activations off Omega (default 0; its entries on Omega are not
    used); the published cascade passes the original weights' response to the pruned inputs. ``omega`` (P, M), bool, replaces
    ``Y > 1e-6``; all True gives the published program of a linear last layer. With ``bias`` a column of ones is appended to A
    and its weights are penalised like all others, as published.

    ``rho`` is the ADMM penalty; the run ends after ``iterations`` or once the Frobenius norm of the change of ``W3`` is at most
    ``stop * M * N`` (N counts the bias). ``callback(iteration, solution)`` is called every ``callback_every`` iterations; making its
    solution costs one product of size (P, N) x (N, M), so a benchmark that takes times should ask for few.

    Raises InvalidInput for arrays that are not matrices of matching shapes, empty or non-finite data, negative outputs off
    Omega and settings out of range.
    """
    X, Y, V, on = _checked(A, Y, V, omega)
    _check_settings(epsilon, rho, iterations, stop, callback_every)
    original_X, original_Y, original_V = X, Y, V
    if bias:
        original_X = X = torch.cat([X, X.new_ones(X.shape[0], 1)], dim=1)

    def solution(weights: Tensor, iteration: int, converged: bool) -> HalfspaceSolution:
        return _measure(original_X, original_Y, original_V, on, weights, bias, iteration, converged)

    # Scaling: c0 = 0.3 sqrt(max(X X^T)), the paper's X being ours transposed. The weights are not changed by it.
    gram = X.T @ X
    c0 = 0.3 * math.sqrt(float(gram.max()))
    if c0 == 0.0:  # all inputs are zero and there is no bias: nothing to scale
        c0 = 1.0
    X, Y, V, eps = X / c0, Y / c0, V / c0, epsilon / c0

    factor = torch.linalg.cholesky(gram / c0**2 + torch.eye(X.shape[1], dtype=X.dtype, device=X.device))
    W3 = X.new_zeros(X.shape[1], Y.shape[1])
    XW3 = torch.zeros_like(Y)
    U1, U2 = torch.zeros_like(Y), torch.zeros_like(W3)
    W2 = W3
    converged = False
    iteration = 0
    while iteration < iterations and not converged:
        iteration += 1
        # Step 1: Z = A(W3) - U1.
        Z = XW3 - U1
        # Step 2: on Omega, the projection of Z on the ball of radius eps around Y.
        residual = torch.where(on, Z - Y, 0.0)
        norm = float(torch.linalg.vector_norm(residual))
        W1_on = Y + (min(1.0, eps / norm) if norm > 0 else 1.0) * residual
        # Step 3: off Omega, the projection of Z on the half-spaces Z <= V.
        W1_off = Z - (Z - V).clamp_min(0.0)
        W1 = torch.where(on, W1_on, W1_off)
        # Step 4: the soft threshold of W3 - U2 at 1 / rho.
        shifted = W3 - U2
        W2 = torch.sign(shifted) * (shifted.abs() - 1.0 / rho).clamp_min(0.0)
        # Step 5: (A*A + I) W3 = A*(W1 + U1) + W2 + U2, with the Cholesky factor made once.
        previous = W3
        W3 = torch.cholesky_solve(X.T @ (W1 + U1) + W2 + U2, factor)
        XW3 = X @ W3
        # Step 6: the scaled duals.
        U1 = U1 + W1 - XW3
        U2 = U2 + W2 - W3
        converged = float(torch.linalg.vector_norm(W3 - previous)) <= stop * W3.numel()
        if callback is not None and iteration % callback_every == 0:
            callback(iteration, solution(W2, iteration, converged))
    return solution(W2, iteration, converged)


def _measure(X: Tensor, Y: Tensor, V: Tensor, on: Tensor, W: Tensor, bias: bool, iteration: int, converged: bool) -> HalfspaceSolution:
    """Recompute every stated number from the weights ``W`` (bias in the last row) in the original units."""
    Z = X @ W
    residual = torch.where(on, Z - Y, 0.0)
    # The preimage asks for equality wherever Y > 0, also where Y is too small to count as Omega.
    away = torch.where(on | (Y > 0), Z - Y, Z.clamp_min(0.0))
    return HalfspaceSolution(
        weights=W[:-1].clone() if bias else W.clone(),
        bias=W[-1].clone() if bias else None,
        iterations=iteration,
        converged=converged,
        objective=float(W.abs().sum()),
        omega_residual=float(torch.linalg.vector_norm(residual)),
        largest_violation=float(torch.where(on, 0.0, (Z - V).clamp_min(0.0)).max()),
        distance=float(torch.linalg.vector_norm(away)),
    )


def _checked(A: Tensor, Y: Tensor, V: Tensor | None, omega: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return inputs, outputs, bounds and Omega as checked float64 (bool for Omega) matrices on the device of A."""
    A = _matrix("A", A)
    Y = _matrix("Y", Y).to(A.device)
    if A.shape[0] != Y.shape[0]:
        raise InvalidInput(f"A has {A.shape[0]} rows and Y has {Y.shape[0]}: both hold one row per sample, so the counts must agree")
    if omega is None:
        on = Y > OMEGA_THRESHOLD
    else:
        if not isinstance(omega, Tensor) or omega.dtype != torch.bool or omega.shape != Y.shape:
            raise InvalidInput(f"omega must be a bool tensor of the shape of Y, {tuple(Y.shape)}")
        on = omega.to(A.device)
    if bool((Y[~on] < 0).any()):
        raise InvalidInput("Y holds negative values off Omega, which no ReLU gives: pass outputs after the activation, or pass omega")
    if V is None:
        return A, Y, torch.zeros_like(Y), on
    V = _matrix("V", V).to(A.device)
    if V.shape != Y.shape:
        raise InvalidInput(f"V has shape {tuple(V.shape)}; it bounds every entry of Y and must have its shape {tuple(Y.shape)}")
    return A, Y, V, on


def _matrix(name: str, value: Tensor) -> Tensor:
    """Return ``value`` as a detached float64 matrix, or refuse it."""
    if not isinstance(value, Tensor):
        raise InvalidInput(f"{name} must be a torch tensor, not {type(value).__name__}: use torch.as_tensor")
    if value.ndim != 2:
        raise InvalidInput(f"{name} must be a matrix with samples in rows; its shape is {tuple(value.shape)}")
    if value.numel() == 0:
        raise InvalidInput(f"{name} is empty (shape {tuple(value.shape)}): at least one sample and one column are required")
    if value.is_complex():
        raise InvalidInput(f"{name} is complex: real values are required")
    value = value.detach().to(torch.float64)
    if not bool(torch.isfinite(value).all()):
        raise InvalidInput(f"{name} holds NaN or infinite values: only finite values are accepted")
    return value


def _check_settings(epsilon: float, rho: float, iterations: int, stop: float, callback_every: int) -> None:
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise InvalidInput(f"epsilon must be a finite number >= 0 (a Frobenius norm in the units of Y), not {epsilon}")
    if not (math.isfinite(rho) and rho > 0):
        raise InvalidInput(f"rho must be a finite number > 0, not {rho}")
    if not (math.isfinite(stop) and stop >= 0):
        raise InvalidInput(f"stop must be a finite number >= 0, not {stop}")
    if iterations < 1 or callback_every < 1:
        raise InvalidInput(f"iterations and callback_every must be at least 1, not {iterations} and {callback_every}")
