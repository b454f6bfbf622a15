"""The l1 programs some of whose boxes are constraints, as in the published program: to a stated gap and feasibility.

The loop is the one of the other programs (:mod:`.admm`). What differs: a residual says nothing of the multipliers of constraints, so
the dual point is the loop's own dual variable, and weights count as found only when they meet the constraints as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..duality import DualPoint, relative_gap
from ..preimage import nearest_point
from ..program import LayerProgram, StandardProgram
from ..prox import soft_threshold
from ..solution import Watch
from .admm import GramADMM

CHECK_EVERY = 25
TUNE_EVERY = 50
TUNE_UNTIL = 1000
BETA = 0.5  # as in l1
RHO = 0.3


@dataclass(frozen=True)
class HardResult:
    """Weights (N, M) in the layer's dtype; ``distance`` counts residuals and violations alike, ``violation`` is the largest one.

    ``gap`` is the relative duality gap, from the loop's own multipliers; ``converged`` when gap and feasibility were reached.
    """

    weights: Tensor
    distance: float
    violation: float
    gap: float
    iterations: int
    converged: bool


def violation(program: LayerProgram, W: Tensor) -> float:
    """The most by which the pre-activations of ``W`` (N, M) leave a box that is a constraint, in float64; 0.0 when none does."""
    Z = program.preactivation(W, None)
    off = (Z - nearest_point(Z, program.lo, program.hi)).abs_()
    return float(off.masked_fill_(program.lo == program.hi, 0.0).max()) if program.hard else 0.0


def within_tolerance(
    program: StandardProgram,
    epsilon: float,
    *,
    gap: float,
    max_iterations: int,
    slack: Tensor | None = None,
    watch: Watch | None = None,
) -> HardResult:
    """``min ||W||_1`` subject to points being missed by at most ``epsilon`` > 0 together and every other box holding.

    Constraints are met to ``gap / 20`` of ``epsilon`` together, and what is left of their violation counts as residual: the distance of
    the weights returned is at most ``epsilon`` when they converged. ``slack`` (P, M) is what a constraint itself lies off a box
    of which the distance is to stay within the root of ``epsilon^2 + ||slack||^2``.
    """
    return _solve(program, epsilon, 0.0, gap, max_iterations, slack, watch)


def penalised(program: StandardProgram, penalty: float, *, gap: float, max_iterations: int, watch: Watch | None = None) -> HardResult:
    """``min 1/2 ||residual of points||^2 + penalty ||W||_1`` subject to every other box holding."""
    return _solve(program, None, penalty, gap, max_iterations, None, watch)


def _solve(
    p: StandardProgram, epsilon: float | None, penalty: float, gap: float, max_iterations: int, slack: Tensor | None, watch: Watch | None
) -> HardResult:
    assert p.hard is not None and p.e is None
    weight = ((1.0 if epsilon is not None else penalty) / p.scale).to(p.A.dtype)[:, None]
    inside = None if slack is None else slack.to(p.A.dtype)
    far = float(torch.linalg.vector_norm(p.lo.masked_fill(p.hard, 0.0)))  # what points are missed by without weights
    goal = None if epsilon is None else epsilon * (1 - 1e-6)
    allowed = gap / 20 * (far if goal is None else goal)
    loop = GramADMM(p, p.U0)
    rho = RHO if goal is None else max(0.2 * float((p.U0.abs() * weight).sum()) / max(goal * far, 1e-300), 1e-30)
    radius = goal
    for iteration in range(1, max_iterations + 1):
        threshold = weight / (rho * BETA)
        before = loop.D
        loop.split_step(lambda V, t=threshold: soft_threshold(V, t), BETA, rho, radius)  # type: ignore[misc]
        if (iteration in (10, 20) or iteration % TUNE_EVERY == 0) and iteration <= TUNE_UNTIL:
            rho = _balance(loop, before, rho, radius)
        if iteration % CHECK_EVERY and iteration != max_iterations:
            continue
        residual, beyond, missed = _missed(p, loop.D, inside)
        norm = float((loop.D.abs() * weight).sum())
        value = relative_gap(norm if goal is not None else residual**2 / 2 + norm, _dual(loop, rho, goal, penalty))
        if watch is not None:
            watch(iteration, missed, float((loop.D != 0).sum()) / max(loop.D.numel(), 1))
        met = value <= gap and beyond <= allowed and (goal is None or missed <= goal)
        if met or iteration == max_iterations:
            W, _ = p.restore(loop.D, None)
            return HardResult(W, p.source.distance(W, None), violation(p.source, W), value, iteration, met)
        if goal is not None and radius is not None:  # the sparse copy lags behind the response's: as in l1
            if missed > goal:
                radius = max(radius * max(goal / missed, 0.98), 0.5 * goal)
            elif missed < goal * (1 - gap / 100):
                radius = min(goal, radius * min(goal / max(missed, 1e-300), 1.02))
    raise AssertionError("max_iterations is at least 1")


def _missed(p: StandardProgram, U: Tensor, slack: Tensor | None) -> tuple[float, float, float]:
    """Residual of the points, violation of the constraints, and both together with what the slack adds; Frobenius norms."""
    assert p.hard is not None
    Z = p.response(U, None)
    off = Z.sub_(nearest_point(Z, p.lo, p.hi))
    beyond = off.abs().masked_fill_(~p.hard, 0.0)
    residual = float(torch.linalg.vector_norm(off.masked_fill_(p.hard, 0.0)))
    extra = 0.0 if slack is None else 2 * float((slack * beyond).sum())
    together = float(torch.linalg.vector_norm(beyond))
    return residual, together, math.sqrt(residual**2 + together**2 + extra)


def _dual(loop: GramADMM, rho: float, radius: float | None, penalty: float) -> float:
    """The dual value of the loop's own multipliers, scaled until they are feasible (docs/theory.md, 3.3)."""
    p = loop.program
    T, Y = loop.multiplier()
    point = DualPoint(p.U0.shape[0], p.U0.shape[1], False, p.A.device, scale=p.scale.to(p.A.dtype))
    point.add(p.A, T + Y.mul_(rho), p.lo, p.hi, hard=p.hard)
    return point.constrained(radius) if radius is not None else point.penalised(penalty)


def _balance(loop: GramADMM, before: Tensor, rho: float, radius: float | None) -> float:
    """Residual balancing (Boyd et al. 2011, 3.4.1), in relative terms: more ``rho`` when copies differ, less when they move."""
    p = loop.program
    Y = loop.multiplier()[1]
    assert loop.B is not None
    R = loop.B - Y
    Z = p.response(loop.U, None)
    primal = float(torch.linalg.vector_norm(Z - R)) / max(float(torch.linalg.vector_norm(R)), 1e-300)
    moved = float(torch.linalg.vector_norm(p.A @ (loop.D - before))) / max(float(torch.linalg.vector_norm(Y)), 1e-300)
    if not (primal > 0 and moved > 0):
        return rho
    new = rho * min(max(math.sqrt(primal / moved), 0.2), 5.0)
    loop.rescale(rho, new, radius)
    return new
