"""The convex programs: least l1 norm within a tolerance, and the penalised form, each to a stated duality gap."""

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
from .polish import polish

CHECK_EVERY = 25
TUNE_AT = (10, 20, 40, 60, 100, 200, 400)
BETA = 0.5  # weight of the copy of the weights relative to the response's; the inputs' columns have unit norm on average
RHO = 0.3  # weight of the response's copy, in units of sqrt(distance allowed / distance of no weights at all) / lambda


@dataclass(frozen=True)
class L1Result:
    """Weights and bias in the layer's dtype, their float64 distance and certified gap; ``converged`` when the gap was reached."""

    weights: Tensor
    bias: Tensor | None
    distance: float
    gap: float
    iterations: int
    converged: bool


def dual_gap(program: LayerProgram, W: Tensor, b: Tensor | None, *, epsilon: float | None = None, penalty: float | None = None) -> float:
    """The certified relative gap, in float64, of stored weights for the tolerance ``epsilon`` or the ``penalty``."""
    _, N, M = program.shape
    point = DualPoint(N, M, program.bias_column is not None, W.device)
    Z = program.preactivation(W, b)
    point.add(program.inputs, Z, program.lo, program.hi, program.bias_column)
    norm = float(W.double().abs().sum())
    if epsilon is not None:
        return relative_gap(norm, point.constrained(epsilon, program.unreachable))
    assert penalty is not None
    residual = Z - nearest_point(Z, program.lo, program.hi)
    primal = float(residual.square().sum()) / 2 + penalty * norm
    return relative_gap(primal, point.penalised(penalty))


def within_tolerance(
    program: StandardProgram, epsilon: float, *, gap: float, max_iterations: int, start: Tensor | None = None, watch: Watch | None = None
) -> L1Result:
    """``min ||W||_1  subject to  dist(A W + e b^T, [lo, hi]) <= epsilon`` (design section 2), for a reachable ``epsilon`` > 0.

    The loop works towards a slightly smaller radius, moved until the sparse weights themselves meet ``epsilon``, and stops when the
    duality gap of the weights as stored is at most ``gap``, or when only their rounding keeps it above.
    """
    p = program
    weight = (1.0 / p.scale).to(p.A.dtype)[:, None]
    margin = 2e-6 if p.A.dtype == torch.float32 else 1e-9
    goal = math.sqrt(max(0.0, epsilon**2 - p.unreachable)) * (1 - margin)
    zero = torch.zeros_like(p.U0)
    c = _best_offset(p, zero, p.c0)
    far = float(torch.linalg.vector_norm(_residual(p, zero, c)))
    if far <= goal:
        return _result(p, zero, c, epsilon, 0, gap)
    goal = max(goal, 1e-9 * far)  # where epsilon is no more than what cannot be reached, work towards the least distance
    loop = GramADMM(p, p.U0 if start is None else start)
    # ||Theta|| of the optimal multiplier is about the slope of the l1 norm between the original weights and none at all
    rho = max(0.2 * float((p.U0.abs() * weight).sum()) / (goal * far), 1e-30)
    radius = goal
    best: L1Result | None = None
    check, before = CHECK_EVERY, (0, math.inf)
    for iteration in range(1, max_iterations + 1):
        threshold = weight / (rho * BETA)
        loop.split_step(lambda V, t=threshold: soft_threshold(V, t), BETA, rho, radius)  # type: ignore[misc]
        if iteration in TUNE_AT:
            rho = _tune(loop, weight, rho, radius, RHO * math.sqrt(goal / far))
        if iteration in (check, max_iterations):
            c = _best_offset(p, loop.D, loop.c)
            reached, estimate = _estimate(p, loop.D, c, weight, goal)
            check, before = iteration + _steps_to(gap, before, (iteration, estimate)), (iteration, estimate)
            if watch is not None:
                watch(iteration, math.hypot(reached, math.sqrt(p.unreachable)), _density(loop.D))
            last = iteration == max_iterations
            if last or (estimate <= gap and reached <= goal * (1 + gap / 10)):
                result = _finish(p, loop.D, c, epsilon, iteration, gap)
                if best is None or (result.distance <= epsilon, -result.gap) > (best.distance <= epsilon, -best.gap):
                    best = result
                # nothing but rounding to the stored dtype can keep the gap above what is estimated here: more iterations do not help
                if best.converged or (reached <= goal and estimate <= gap / 10):
                    return best
            if reached > goal:  # the sparse copy lags behind the response's: ask for a little less until it catches up
                radius = max(radius * max(goal / reached, 0.98), 0.5 * goal)
            elif reached < goal * (1 - gap / 50):
                radius = min(goal, radius * min(goal / max(reached, 1e-30), 1.02))
    assert best is not None
    return best


def _steps_to(gap: float, before: tuple[int, float], now: tuple[int, float]) -> int:
    """Iterations until the next check: where the gap will be reached if it goes on falling as between the last two checks."""
    (i, old), (j, new) = before, now
    if not 0 < new < old < 1:
        return CHECK_EVERY
    steps = 1.05 * (j - i) * math.log(new / gap) / math.log(old / new)
    return min(max(math.ceil(steps), CHECK_EVERY // 5), CHECK_EVERY)


def _tune(loop: GramADMM, weight: Tensor, rho: float, radius: float, aim: float) -> float:
    """Sets ``rho`` to ``aim / lambda``, by the present estimate of lambda.

    At the optimum ``|A^T residual| = lambda * weight`` on the support. Why ``aim`` falls with the tolerance: the scaled dual
    ``Y = residual / aim`` should be of the size of the response's own errors, which depend on it less than proportionally. The
    constant was chosen on a trained layer over tolerances from 0.5 % to 20 %.
    """
    p = loop.program
    on = loop.D != 0
    if not bool(on.any()):
        return rho
    multiplier = float(((p.A.T @ _residual(p, loop.U, loop.c)).abs() / weight)[on].median())
    if not multiplier > 0 or not math.isfinite(multiplier):
        return rho
    new = min(max(aim / multiplier, rho / 100), rho * 100)
    loop.rescale(rho, new, radius)
    return new


def _estimate(p: StandardProgram, U: Tensor, c: Tensor | None, weight: Tensor, radius: float) -> tuple[float, float]:
    """Distance (without the unreachable part) and relative duality gap of ``U``, in the working dtype."""
    Z = p.response(U, c)
    reached = float(torch.linalg.vector_norm(Z - nearest_point(Z, p.lo, p.hi)))
    point = DualPoint(U.shape[0], U.shape[1], p.e is not None, U.device, scale=p.scale.to(U.dtype))
    point.add(p.A, Z, p.lo, p.hi, p.e)
    return reached, relative_gap(float((U.abs() * weight).sum()), point.constrained(radius))


def _finish(p: StandardProgram, U: Tensor, c: Tensor | None, epsilon: float, iterations: int, gap: float) -> L1Result:
    """The weights as stored, moved on their own support just far enough to meet ``epsilon`` exactly."""
    result = _result(p, U, c, epsilon, iterations, gap)
    if result.distance <= epsilon:
        return result
    for rounds, steps in ((1, 6), (6, 15)):
        inner, inner_c, reached = polish(p, U, c, rounds=rounds, steps=steps)
        if reached < epsilon:
            break
    share = _share_needed(p, U, c, inner, inner_c, epsilon)
    for _ in range(6):  # rounding to the stored dtype can ask for a little more
        V = torch.lerp(U, inner, share)
        v = None if c is None or inner_c is None else torch.lerp(c, inner_c, share)
        result = _result(p, V, v, epsilon, iterations, gap)
        if result.distance <= epsilon or share == 1.0:
            break
        share = min(1.0, 1.5 * share + 1e-4)
    return result


def _share_needed(p: StandardProgram, U: Tensor, c: Tensor | None, inner: Tensor, inner_c: Tensor | None, epsilon: float) -> float:
    """How far to go from ``(U, c)`` towards ``(inner, inner_c)`` until the distance, convex along the way, is just below ``epsilon``."""
    Z = p.response(U, c).double()
    step = p.response(inner, inner_c).double() - Z
    lo, hi = p.lo.double(), p.hi.double()
    goal = math.sqrt(max(0.0, epsilon**2 - p.unreachable)) * (1 - 1e-6)
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        T = torch.add(Z, step, alpha=middle)
        if float(torch.linalg.vector_norm(T - nearest_point(T, lo, hi))) <= goal:
            high = middle
        else:
            low = middle
    return high


def _result(p: StandardProgram, U: Tensor, c: Tensor | None, epsilon: float, iterations: int, gap: float) -> L1Result:
    W, b = p.restore(U, c)
    distance = p.source.distance(W, b)
    value = dual_gap(p.source, W, b, epsilon=epsilon) if distance <= epsilon else math.inf
    return L1Result(W, b, distance, value, iterations, value <= gap)


def no_weights(program: StandardProgram) -> L1Result:
    """All weights zero and the bias of least distance: the optimum wherever the tolerance allows it."""
    zero = torch.zeros_like(program.U0)
    W, b = program.restore(zero, _best_offset(program, zero, program.c0))
    return L1Result(W, b, program.source.distance(W, b), 0.0, 0, True)


def within_budget(program: StandardProgram, k: int, *, gap: float, max_iterations: int, watch: Watch | None = None) -> L1Result:
    """The penalised program whose penalty leaves as many nonzero weights as fit into ``k``, found by bisection on ``log penalty``.

    The count falls with the penalty, but not strictly: the search ends within 1 % of ``k``, or after 24 halvings.
    """
    p = program
    zero = torch.zeros_like(p.U0)
    correlation = (p.A.T @ _residual(p, zero, _best_offset(p, zero, p.c0))).abs() * p.scale.to(p.A.dtype)[:, None]
    high = float(correlation.max()) if correlation.numel() else 0.0  # at this penalty no weight is left
    best = no_weights(p)
    if k <= 0 or high <= 0.0:
        return best
    low, iterations, penalty = 0.0, 0, high / 100
    start: Tensor | None = None
    for _ in range(24):
        result = penalised(p, penalty, gap=gap, max_iterations=max_iterations, start=start, watch=watch)
        iterations += result.iterations
        count = int((result.weights != 0).sum())
        start = p.enter(result.weights, result.bias)[0]
        if count <= k:
            best, high = result, penalty
            if count >= 0.99 * k:
                break
        else:
            low = penalty
        penalty = math.sqrt(low * high) if low > 0 else high / 10
    return L1Result(best.weights, best.bias, best.distance, best.gap, iterations, best.converged)


def penalised(
    program: StandardProgram, penalty: float, *, gap: float, max_iterations: int, start: Tensor | None = None, watch: Watch | None = None
) -> L1Result:
    """``min 1/2 dist(A W + e b^T, [lo, hi])^2 + penalty ||W||_1``, for a ``penalty`` > 0, to the stated duality gap."""
    p = program
    weight = (penalty / p.scale).to(p.A.dtype)[:, None]
    zero = torch.zeros_like(p.U0)
    far = float(torch.linalg.vector_norm(_residual(p, zero, _best_offset(p, zero, p.c0))))
    loop = GramADMM(p, p.U0 if start is None else start)
    rho = 0.1
    best: L1Result | None = None
    for iteration in range(1, max_iterations + 1):
        threshold = weight / (rho * BETA)
        loop.split_step(lambda V, t=threshold: soft_threshold(V, t), BETA, rho, None)  # type: ignore[misc]
        if iteration in TUNE_AT and far > 0:
            share = float(torch.linalg.vector_norm(_residual(p, loop.U, loop.c))) / far
            new = RHO * math.sqrt(min(max(share, 1e-4), 1.0))
            loop.rescale(rho, new, None)
            rho = new
        if iteration % CHECK_EVERY == 0 or iteration == max_iterations:
            W, b = p.restore(loop.D, _best_offset(p, loop.D, loop.c))
            value = dual_gap(p.source, W, b, penalty=penalty)
            distance = p.source.distance(W, b)
            if watch is not None:
                watch(iteration, distance, _density(loop.D))
            if best is None or value < best.gap:
                best = L1Result(W, b, distance, value, iteration, value <= gap)
                if best.converged:
                    return best
    assert best is not None
    return best


def _residual(p: StandardProgram, U: Tensor, c: Tensor | None) -> Tensor:
    Z = p.response(U, c)
    return Z - nearest_point(Z, p.lo, p.hi)


def _best_offset(p: StandardProgram, U: Tensor, c: Tensor | None, rounds: int = 20) -> Tensor | None:
    """The offset of least distance for given weights: Newton's method on a convex function of one variable a column."""
    if c is None or p.e is None:
        return None
    Z0 = p.A @ U
    e = p.e[:, None]
    for _ in range(rounds):
        Z = Z0 + e * c
        D = Z - nearest_point(Z, p.lo, p.hi)
        slope = (e * D).sum(0)
        curvature = (e.square() * ((D != 0) | (p.lo == p.hi))).sum(0)
        step = torch.where(curvature > 0, slope / curvature.clamp(min=1e-30), 0.0)
        c = c - step
        if float(step.abs().max()) <= 1e-7 * max(1.0, float(c.abs().max())):
            break
    return c


def _density(D: Tensor) -> float:
    return float((D != 0).sum()) / D.numel() if D.numel() else 0.0
