"""The published Net-Trim ADMM, written plainly: the slow twin that the faster solvers are measured against.

Source: Aghasi, Abdi, Romberg, "Fast Convex Pruning of Deep Neural Networks", SIAM J. Math. Data Science 2020
(arXiv 1806.06457). The program asks, of the weights ``U`` (bias included) of one ReLU layer with inputs ``X`` and output ``Y``::

    minimise sum |U|   subject to   ||(X U - Y)_Omega||_F <= epsilon,   X U <= V off Omega,   Omega = {Y > 0}

The paper keeps samples in columns; here they are in rows, so that its ``A(W) = W^T X`` reads ``X @ W``. In place of a matrix any linear
map will do (:mod:`nettrim.solvers.operators`), a convolution for one; ``X U`` is then ``A(U)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nettrim.solvers.operators import LinearMap, check_map, checked_tensor, scale_of
from nettrim.status import InvalidInput

OMEGA_THRESHOLD = 1e-6
"""Outputs above this count as positive (the published code's value)."""
CG_STEPS = 10
"""Conjugate-gradient steps of step 5 for an operator (published)."""


@dataclass(frozen=True, eq=False)
class HalfspaceSolution:
    """The sparse iterate of the published ADMM. All numbers are recomputed from it in the data's original units.

    ``weights`` (N, M) and ``bias`` (M,) are float64 on the device of the inputs; ``bias`` is None when none was asked for. For an operator
    both have the shapes that its ``split`` gives.
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
    A: Tensor | LinearMap,
    Y: Tensor,
    epsilon: float,
    *,
    V: Tensor | None = None,
    omega: Tensor | None = None,
    bias: bool | None = None,
    rho: float = 100.0,
    iterations: int = 2000,
    stop: float = 5e-9,
    cg_steps: int = CG_STEPS,
    callback: Callback | None = None,
    callback_every: int = 1,
) -> HalfspaceSolution:
    """Run the published ADMM on one layer, in float64.

    A is (P, N), the layer's inputs with samples in rows; Y is (P, M), the reference ReLU outputs. ``epsilon`` is absolute: a
    Frobenius norm in the units of Y. ``V`` (P, M) bounds the pre-activations off Omega (default 0; its entries on Omega are not
    used); the published cascade passes the original weights' response to the pruned inputs. ``omega`` (P, M), bool, replaces
    ``Y > 1e-6``; all True gives the published program of a linear last layer. With ``bias`` (the default) a column of ones is appended
    to A and its weights are penalised like all others, as published.

    A may also be a :class:`~nettrim.solvers.operators.LinearMap`, which brings its own bias (leave ``bias`` out); Y, V and omega then have
    its ``outputs_shape``. Step 5 is solved by one Cholesky factor for a matrix, and for an operator by ``cg_steps`` conjugate-gradient
    steps from zero. The published 10 leave a residual in every iteration, so the run settles near the optimum rather than at it: judge by
    the solution's recomputed numbers, or take more steps.

    ``rho`` is the ADMM penalty; the run ends after ``iterations`` or once the Frobenius norm of the change of ``W3`` is at most
    ``stop * M * N`` (the number of weights; N counts the bias). ``callback(iteration, solution)`` is called every ``callback_every``
    iterations; making its solution costs one application of A, so a benchmark that takes times should ask for few.

    Raises InvalidInput for arrays that are not matrices of matching shapes, empty or non-finite data, negative outputs off
    Omega, settings out of range, and an operator that is not consistent with itself.
    """
    _check_settings(epsilon, rho, iterations, stop, cg_steps, callback_every)
    form, Y, V, on = _checked(A, Y, V, omega, bias, cg_steps)
    original_Y, original_V = Y, V

    def solution(weights: Tensor, iteration: int, converged: bool) -> HalfspaceSolution:
        return _measure(form, original_Y, original_V, on, weights, iteration, converged)

    # Scaling: A, Y, V and epsilon are divided by c0. The weights are not changed by it.
    c0 = form.c0
    Y, V, eps = Y / c0, V / c0, epsilon / c0

    W3 = Y.new_zeros(form.weights_shape)
    AW3 = torch.zeros_like(Y)
    U1, U2 = torch.zeros_like(Y), torch.zeros_like(W3)
    W2 = W3
    converged = False
    iteration = 0
    while iteration < iterations and not converged:
        iteration += 1
        # Step 1: Z = A(W3) - U1.
        Z = AW3 - U1
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
        # Step 5: (A*A + I) W3 = A*(W1 + U1) + W2 + U2.
        previous = W3
        W3 = form.solve(form.adjoint(W1 + U1) + W2 + U2)
        AW3 = form.apply(W3)
        # Step 6: the scaled duals.
        U1 = U1 + W1 - AW3
        U2 = U2 + W2 - W3
        converged = float(torch.linalg.vector_norm(W3 - previous)) <= stop * W3.numel()
        if callback is not None and iteration % callback_every == 0:
            callback(iteration, solution(W2, iteration, converged))
    return solution(W2, iteration, converged)


class _MatrixForm:
    """``A / c0`` for the matrix A = X (P, N), with one Cholesky factor for step 5."""

    def __init__(self, X: Tensor, columns: int, bias: bool) -> None:
        if bias:
            X = torch.cat([X, X.new_ones(X.shape[0], 1)], dim=1)
        self.original, self.bias = X, bias
        self.weights_shape: tuple[int, ...] = (X.shape[1], columns)
        # Scaling: c0 = 0.3 sqrt(max(X X^T)), the paper's X being ours transposed.
        gram = X.T @ X
        self.c0 = 0.3 * math.sqrt(float(gram.max())) or 1.0  # all inputs are zero and there is no bias: nothing to scale
        self.X = X / self.c0
        # Step 5: one Cholesky factor of X X^T + I.
        self.factor = torch.linalg.cholesky(gram / self.c0**2 + torch.eye(X.shape[1], dtype=X.dtype, device=X.device))

    def respond(self, W: Tensor) -> Tensor:
        """A(W) in the original units."""
        return self.original @ W

    def apply(self, W: Tensor) -> Tensor:
        return self.X @ W

    def adjoint(self, Z: Tensor) -> Tensor:
        return self.X.T @ Z

    def solve(self, right: Tensor) -> Tensor:
        return torch.cholesky_solve(right, self.factor)

    def split(self, W: Tensor) -> tuple[Tensor, Tensor | None]:
        return (W[:-1], W[-1]) if self.bias else (W, None)


class _OperatorForm:
    """``A / c0`` for any linear map, with conjugate gradients for step 5."""

    def __init__(self, A: LinearMap, cg_steps: int) -> None:
        self.A, self.cg_steps = A, cg_steps
        self.weights_shape = tuple(A.weights_shape)
        self.c0 = scale_of(A)  # Scaling: the largest entry of A*A is on its diagonal, which the map states

    def respond(self, W: Tensor) -> Tensor:
        """A(W) in the original units."""
        return self.A.apply(W)

    def apply(self, W: Tensor) -> Tensor:
        return self.A.apply(W) / self.c0

    def adjoint(self, Z: Tensor) -> Tensor:
        return self.A.adjoint(Z) / self.c0

    def solve(self, right: Tensor) -> Tensor:
        """Step 5: ``cg_steps`` conjugate-gradient steps from zero on ``(A*A + I) W = right``; fewer once float64 shows no residual."""
        W = torch.zeros_like(right)
        residual = direction = right
        square = float(residual.square().sum())
        least = torch.finfo(right.dtype).eps ** 2 * square
        for _ in range(self.cg_steps):
            if square <= least:
                break
            image = self.adjoint(self.apply(direction)) + direction
            length = square / float((direction * image).sum())  # the divisor is at least |direction|^2 > 0
            W = W + length * direction
            residual = residual - length * image
            before, square = square, float(residual.square().sum())
            direction = residual + (square / before) * direction
        return W

    def split(self, W: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.A.split(W)


_Form = _MatrixForm | _OperatorForm


def _measure(form: _Form, Y: Tensor, V: Tensor, on: Tensor, W: Tensor, iteration: int, converged: bool) -> HalfspaceSolution:
    """Recompute every stated number from the weights ``W`` (bias included) in the original units."""
    Z = form.respond(W)
    weights, bias = form.split(W)
    residual = torch.where(on, Z - Y, 0.0)
    # The preimage asks for equality wherever Y > 0, also where Y is too small to count as Omega.
    away = torch.where(on | (Y > 0), Z - Y, Z.clamp_min(0.0))
    return HalfspaceSolution(
        weights=weights.clone(),
        bias=None if bias is None else bias.clone(),
        iterations=iteration,
        converged=converged,
        objective=float(W.abs().sum()),
        omega_residual=float(torch.linalg.vector_norm(residual)),
        largest_violation=float(torch.where(on, 0.0, (Z - V).clamp_min(0.0)).max()),
        distance=float(torch.linalg.vector_norm(away)),
    )


def _checked(
    A: Tensor | LinearMap, Y: Tensor, V: Tensor | None, omega: Tensor | None, bias: bool | None, cg_steps: int
) -> tuple[_Form, Tensor, Tensor, Tensor]:
    """Return the map, and outputs, bounds and Omega as checked float64 (bool for Omega) tensors on its device."""
    if isinstance(A, Tensor):
        X = _matrix("A", A)
        Y = _matrix("Y", Y).to(X.device)
        if X.shape[0] != Y.shape[0]:
            raise InvalidInput(f"A has {X.shape[0]} rows and Y has {Y.shape[0]}: both hold one row per sample, so the counts must agree")
        V, on = _bounds(Y, V, omega)
        return _MatrixForm(X, Y.shape[1], True if bias is None else bias), Y, V, on
    if not isinstance(A, LinearMap):
        raise InvalidInput(
            f"A must be a torch tensor or a nettrim.solvers.operators.LinearMap, not {type(A).__name__}: use torch.as_tensor"
        )
    if bias is not None:
        raise InvalidInput(
            f"bias={bias} speaks of a matrix; an operator brings its own bias: state it where the {type(A).__name__} is made"
        )
    shape = tuple(A.outputs_shape)
    Y = checked_tensor("Y", Y, len(shape), f"of the shape of A's outputs, {shape}").to(A.device)
    if tuple(Y.shape) != shape:
        raise InvalidInput(f"Y has shape {tuple(Y.shape)}; it holds the outputs of A and must have their shape {shape}")
    V, on = _bounds(Y, V, omega)
    check_map(A)
    return _OperatorForm(A, cg_steps), Y, V, on


def _bounds(Y: Tensor, V: Tensor | None, omega: Tensor | None) -> tuple[Tensor, Tensor]:
    """V and Omega, checked, for checked outputs ``Y``."""
    if omega is None:
        on = Y > OMEGA_THRESHOLD
    else:
        if not isinstance(omega, Tensor) or omega.dtype != torch.bool or omega.shape != Y.shape:
            raise InvalidInput(f"omega must be a bool tensor of the shape of Y, {tuple(Y.shape)}")
        on = omega.to(Y.device)
    if bool((Y[~on] < 0).any()):
        raise InvalidInput("Y holds negative values off Omega, which no ReLU gives: pass outputs after the activation, or pass omega")
    if V is None:
        return torch.zeros_like(Y), on
    V = checked_tensor("V", V, V.ndim if isinstance(V, Tensor) else 0, "a tensor").to(Y.device)
    if V.shape != Y.shape:
        raise InvalidInput(f"V has shape {tuple(V.shape)}; it bounds every entry of Y and must have its shape {tuple(Y.shape)}")
    return V, on


def _matrix(name: str, value: Tensor) -> Tensor:
    """Return ``value`` as a detached float64 matrix, or refuse it."""
    return checked_tensor(name, value, 2, "a matrix with samples in rows")


def _check_settings(epsilon: float, rho: float, iterations: int, stop: float, cg_steps: int, callback_every: int) -> None:
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise InvalidInput(f"epsilon must be a finite number >= 0 (a Frobenius norm in the units of Y), not {epsilon}")
    if not (math.isfinite(rho) and rho > 0):
        raise InvalidInput(f"rho must be a finite number > 0, not {rho}")
    if not (math.isfinite(stop) and stop >= 0):
        raise InvalidInput(f"stop must be a finite number >= 0, not {stop}")
    if cg_steps < 1:
        raise InvalidInput(f"cg_steps must be at least 1, not {cg_steps}: the published number is {CG_STEPS}")
    if iterations < 1 or callback_every < 1:
        raise InvalidInput(f"iterations and callback_every must be at least 1, not {iterations} and {callback_every}")
