"""Solves one layer by the published program (nettrim.halfspace), for :class:`nettrim.NetTrim`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..halfspace import HalfspaceProgram, published_program
from ..program import LayerProgram, standardise
from ..solution import Solution, Watch
from ..solvers import halfspace_l1, l1
from ..status import Status


@dataclass(frozen=True)
class Settings:
    """When a solve ends, and who watches it."""

    gap: float
    max_iterations: int
    watch: Watch | None


def within_tolerance(program: LayerProgram, epsilon: float | None, factor: float, moved: bool, settings: Settings) -> Solution:
    """Least l1 norm, bias included, within ``epsilon`` on Omega (absolute), or within ``factor`` times the original weights' residual.

    The solution's ``tolerance`` is that of the distance to the preimage, which the program implies (docs/theory.md, (2.5)).
    """
    h = published_program(program, moved=moved)
    radius = factor * h.original_residual if epsilon is None else epsilon
    tolerance = math.hypot(radius, h.slack_norm)
    zero = torch.zeros_like(h.program.weights)
    if h.program.distance(zero, None) <= radius and halfspace_l1.violation(h.program, zero) == 0.0:
        return _solution(program, h, zero, Status.CONVERGED, 0, 0.0, tolerance, tolerance)
    if radius <= 1e-12 * program.reference_norm:
        notes = ("the tolerance is below what the arithmetic can resolve",) if radius > 0 else ()
        reached = max(tolerance, program.original_distance())
        return _solution(program, h, h.program.weights, Status.ORIGINAL_KEPT, 0, None, tolerance, reached, notes)
    # behind batch-norm the weights are rounded once more when they are unfolded
    inner = radius if program.fold is None else radius * (1 - 32 * torch.finfo(program.dtype).eps)
    found, iterations, value, converged = _least_norm(h, inner, settings)
    solution = _solution(program, h, found, Status.CONVERGED, iterations, value, tolerance, tolerance)
    if solution.distance <= tolerance and h.program.distance(found, None) <= inner:
        return solution if converged else _solution(program, h, found, Status.ITERATION_LIMIT, iterations, value, tolerance, tolerance)
    if h.original_residual > radius:  # V admits the original weights, so at their own residual the program has a solution
        wider = h.original_residual * (1 + 1e-3)
        found, more, value, _ = _least_norm(h, wider, settings)
        iterations += more
        note = "no weights were found within the tolerance: the original weights' own residual was used, the least that is certain to do"
    else:
        note = f"the solver did not come within the tolerance in {iterations} iterations: raise max_iterations"
    reached = program.distance(*program.stored(*h.split(found)))
    wide = max(tolerance, reached)
    return _solution(program, h, found, Status.INFEASIBLE, iterations, value, tolerance, wide, (note,))


def penalised(program: LayerProgram, penalty: float, moved: bool, settings: Settings) -> Solution:
    """``min 1/2 ||residual on Omega||^2 + penalty ||U||_1`` subject to ``V``: the first version's program, whose lambda is twice ours."""
    h = published_program(program, moved=moved)
    standard = standardise(h.program, power=0.5)
    gap, max_iterations, watch = settings.gap, settings.max_iterations, settings.watch
    if standard.hard is None:
        linear = l1.penalised(standard, penalty, gap=gap, max_iterations=max_iterations, watch=watch)
        found, iterations, value, converged = linear.weights, linear.iterations, linear.gap, linear.converged
    else:
        result = halfspace_l1.penalised(standard, penalty, gap=gap, max_iterations=max_iterations, watch=watch)
        found, iterations, value, converged = result.weights, result.iterations, result.gap, result.converged
    status = Status.CONVERGED if converged else Status.ITERATION_LIMIT
    return _solution(program, h, found, status, iterations, value, None, None, penalty=penalty)


def _least_norm(h: HalfspaceProgram, radius: float, settings: Settings) -> tuple[torch.Tensor, int, float, bool]:
    """Weights (N + 1, M), iterations, gap, and whether gap and feasibility were reached."""
    goal = math.sqrt(max(0.0, radius**2 - h.program.unreachable))
    if goal <= 1e-12 * h.program.reference_norm:
        return h.program.weights, 0, math.inf, False
    standard = standardise(h.program, power=0.5)
    gap, max_iterations, watch = settings.gap, settings.max_iterations, settings.watch
    if standard.hard is None:  # only points: nothing is a constraint, and the residual itself certifies the gap
        linear = l1.within_tolerance(standard, radius, gap=gap, max_iterations=max_iterations, watch=watch)
        return linear.weights, linear.iterations, linear.gap, linear.converged
    result = halfspace_l1.within_tolerance(standard, goal, gap=gap, max_iterations=max_iterations, slack=h.slack, watch=watch)
    return result.weights, result.iterations, result.gap, result.converged


def _solution(
    program: LayerProgram,
    h: HalfspaceProgram,
    U: torch.Tensor,
    status: Status,
    iterations: int,
    gap: float | None,
    tolerance: float | None,
    used: float | None,
    notes: tuple[str, ...] = (),
    penalty: float | None = None,
) -> Solution:
    W, b = program.stored(*h.split(U))
    U = W if b is None else torch.cat([W, b[None]])
    return Solution(
        W,
        b,
        status,
        program.distance(W, b),
        iterations,
        tolerance=tolerance,
        tolerance_used=used,
        penalty=penalty,
        gap=gap,
        violation=halfspace_l1.violation(h.program, U),
        notes=notes,
        kept=status is Status.ORIGINAL_KEPT,
    )
