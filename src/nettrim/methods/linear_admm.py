"""ADMM on a layer's linear response with a growing penalty, the method that its authors call ALPS."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..patterns import UNSTRUCTURED
from ..program import LayerProgram
from ..solution import Solution, Watch
from ..status import InvalidInput, Status
from .linear import OneShot, check_whole, finished, gram, live_inputs, own_weights, response_change
from .settings import settings

START = 0.1  # the first penalty, with inputs of unit norm
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # share of the support that changed since the last check, factor on the penalty
SHRINK = 5.0  # a penalty so large that the support stands still from the start is divided by this
SMALLEST, LARGEST = 1e-6, 1e6  # the published code has no smallest penalty
CHECK_EVERY = 3
SETTLED_FROM, SETTLED = 30, 0.0003  # from this step on, a change of the support below this share ends the iteration
CONJUGATE_STEPS = 10


@settings
class LinearADMM(OneShot):
    """``min ||A W - A W0||_F^2 + ridge ||W - W0||_F^2`` within a budget, by ADMM and then conjugate gradients on the support that it found
    (ALPS: Meng, Behdin, Wang, Mazumder, NeurIPS 2024, arXiv 2406.07831). Bias unchanged.

    Inputs are scaled to unit norm (ridge included), in which units weights are compared. Schedule of the penalty and stopping rules are
    those of the authors' code. Weights of inputs that are always zero become zero.

    Args:
        sparsity: the fraction of zeros, in [0, 1).
        pattern: see :mod:`nettrim.patterns`; the projection on it is the proximal step.
        ridge: in units of the mean diagonal of the Gram matrix of the inputs that are not always zero.
        max_iterations: ADMM steps.

    Raises:
        InvalidInput: a setting outside its range.
    """

    ridge: float = 0.01
    max_iterations: int = 300

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.ridge, bool) or not isinstance(self.ridge, (int, float)) or not 0 <= self.ridge < math.inf:
            raise InvalidInput(f"LinearADMM: ridge must be a finite number >= 0, found {self.ridge!r}; leave it out for the default")
        check_whole("LinearADMM", "max_iterations", self.max_iterations, 1)

    def solve(self, program: LayerProgram, target: float, watch: Watch | None = None) -> Solution:
        """Finds the support, then the weights on it."""
        own, live = own_weights(program), live_inputs(program)
        H = gram(program)[live][:, live]
        k = min(self.kept(program, target), self.chosen.capacity(live, own.shape[1]))
        W = torch.zeros_like(own)

        def choose(V: Tensor) -> Tensor:
            return self.chosen.mask(V, k, live)

        first = choose(own[live])
        if not bool(first.any()) or bool(first.all()):  # nothing to choose
            W[live] = own[live] * first
            return finished(program, W)
        H.diagonal().add_(self.ridge * H.diagonal().mean())
        scale = H.diagonal().sqrt()
        H = H / scale[:, None] / scale
        W0 = own[live] * scale[:, None]
        found, iterations, settled = within_budget(H, W0, k, self.max_iterations, own.numel(), watch, choose)
        mask = choose(found)
        W[live] = conjugate_gradients(H, H @ W0, mask, found * mask) / scale[:, None]
        return finished(program, W, iterations, Status.CONVERGED if settled else Status.ITERATION_LIMIT)


def within_budget(
    H: Tensor,
    W0: Tensor,
    k: int,
    max_iterations: int,
    weights: int,
    watch: Watch | None = None,
    choose: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, int, bool]:
    """ADMM for ``min tr((W - W0)^T H (W - W0))`` with ``k`` nonzeros: ``W`` (N, M) before its largest are picked, steps, whether settled.

    ``choose`` gives the mask of the weights that are picked; by default the ``k`` largest.

    With the penalty rho, ``W = (H + rho)^-1 (H W0 - V + rho D)``, ``D`` the ``k`` largest of ``W + V / rho``, ``V += rho (W - D)``. One
    eigendecomposition of ``H``, whose diagonal is 1, serves every rho. ``weights`` is the layer's number, for the density shown.
    """
    choose = choose or (lambda V: UNSTRUCTURED.mask(V, k))
    values, Q = torch.linalg.eigh(H)
    values = values.clamp(min=0)[:, None]
    aim = H @ W0
    first = W0 * choose(W0)
    W, D, V = W0, first, torch.zeros_like(W0)
    rho, grown, before = START, False, first != 0
    for iteration in range(1, max_iterations + 1):
        W = Q @ ((Q.T @ (aim - V + rho * D)) / (values + rho))
        shifted = W + V / rho
        mask = choose(shifted)
        D = shifted * mask
        V = rho * (shifted - D)  # what V + rho (W - D) comes to
        if iteration % CHECK_EVERY:
            continue
        changed = int((mask ^ before).sum())
        before = mask
        if watch is not None:
            watch(iteration, response_change(H, D - W0), k / max(weights, 1))
        if changed / k > GROWTH[1][0]:
            grown = True
        if changed:
            if grown:
                rho = min(LARGEST, rho * next(factor for share, factor in GROWTH if changed / k > share))
            else:  # the support was nearly still from the start: begin again, more freely
                rho = max(SMALLEST, rho / SHRINK)
                D, V = first, torch.zeros_like(W0)
        elif grown:
            return W, iteration, True
        else:
            rho = max(SMALLEST, rho / SHRINK)
        if iteration > SETTLED_FROM and changed / k < SETTLED:
            return W, iteration, True
    return W, max_iterations, False


def conjugate_gradients(H: Tensor, aim: Tensor, mask: Tensor, W: Tensor, steps: int = CONJUGATE_STEPS) -> Tensor:
    """``steps`` steps towards ``(H W - aim) = 0`` on ``mask``, from ``W`` (N, M), every output by itself; zeros stay zeros."""
    R = (aim - H @ W) * mask
    direction, square = R, R.square().sum(0)
    for _ in range(steps):
        image = (H @ direction) * mask
        curvature = (direction * image).sum(0)
        going = curvature > 0  # an output whose residual is zero has arrived
        step = torch.where(going, square / torch.where(going, curvature, 1.0), 0.0)
        W = W + step * direction
        R = R - step * image
        last, square = square, R.square().sum(0)
        direction = R + torch.where(last > 0, square / torch.where(last > 0, last, 1.0), 0.0) * direction
    return W
