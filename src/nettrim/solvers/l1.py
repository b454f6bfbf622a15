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
BALANCE_UNTIL = 400
BETA = 0.3  # weight of the copy of the weights relative to the response's; the inputs' columns have unit norm


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
    duality gap of the weights as stored is at most ``gap``.
    """
    p = program
    weight = (1.0 / p.scale).to(p.A.dtype)[:, None]
    margin = 2e-6 if p.A.dtype == torch.float32 else 1e-9
    goal = math.sqrt(max(0.0, epsilon**2 - p.unreachable)) * (1 - margin)
    radius = goal
    zero = torch.zeros_like(p.U0)
    c = _best_offset(p, zero, p.c0)
    far = float(torch.linalg.vector_norm(_residual(p, zero, c)))
    if far <= goal:
        return _finish(p, zero, c, epsilon, 0, gap, converged=True)
    loop = GramADMM(p, p.U0 if start is None else start)
    # ||Theta|| of the optimal multiplier is about the slope of the l1 norm between the original weights and none at all
    rho = 0.4 * float((p.U0.abs() * weight).sum()) / (goal * far)
    best: L1Result | None = None
    for iteration in range(1, max_iterations + 1):
        threshold = weight / (rho * BETA)
        loop.split_step(lambda V, t=threshold: soft_threshold(V, t), BETA, rho, radius)  # type: ignore[misc]
        if iteration <= BALANCE_UNTIL and iteration % 10 == 0:
            rho = _balance(loop, rho)
        if iteration % CHECK_EVERY == 0 or iteration == max_iterations:
            c = _best_offset(p, loop.D, loop.c)
            reached = float(torch.linalg.vector_norm(_residual(p, loop.D, c)))
            if watch is not None:
                watch(iteration, math.hypot(reached, math.sqrt(p.unreachable)), _density(loop.D))
            if reached > goal:
                # the sparse copy lags behind the response's: ask for a little less until it catches up
                radius = max(radius * max(goal / reached, 0.98), 0.5 * goal)
                if iteration < max_iterations and reached > goal * (1 + 0.1 * gap):
                    continue
            elif reached < goal * (1 - 0.02 * gap):
                radius = min(goal, radius * min(goal / max(reached, 1e-30), 1.02))
            result = _finish(p, loop.D, c, epsilon, iteration, gap)
            if result is not None and (best is None or result.gap < best.gap):
                best = result
                if best.converged:
                    return best
    if best is None:
        best = _finish(p, p.U0 if start is None else start, p.c0, epsilon, max_iterations, gap)
    return best


def _finish(
    p: StandardProgram, U: Tensor, c: Tensor | None, epsilon: float, iterations: int, gap: float, *, converged: bool = False
) -> L1Result:
    """The weights as stored, moved on their own support just far enough to meet ``epsilon`` exactly."""
    W, b = p.restore(U, c)
    distance = p.source.distance(W, b)
    if distance > epsilon:
        inner, inner_c, _ = polish(p, U, c, rounds=3)
        low, high = 0.0, 1.0  # share of the way to the polished weights; the distance is convex along it
        for _ in range(30):
            share = high if high == 1.0 and low == 0.0 else (low + high) / 2
            V = torch.lerp(U, inner, share)
            v = None if c is None or inner_c is None else torch.lerp(c, inner_c, share)
            W, b = p.restore(V, v)
            distance = p.source.distance(W, b)
            if distance > epsilon:
                if share == 1.0:
                    break
                low = share
            else:
                kept = (W, b, distance)
                high, low = (share, low) if share < 1.0 else (1.0 - 1e-12, low)
                if distance > epsilon * (1 - 1e-7):
                    break
            if high - low < 1e-6:
                break
        if distance > epsilon and high < 1.0:
            W, b, distance = kept
    value = dual_gap(p.source, W, b, epsilon=epsilon) if not converged else 0.0
    return L1Result(W, b, distance, value, iterations, distance <= epsilon and value <= gap)


def within_budget(program: StandardProgram, k: int, *, gap: float, max_iterations: int, watch: Watch | None = None) -> L1Result:
    """The penalised program whose penalty leaves as many nonzero weights as fit into ``k``, found by bisection on ``log penalty``.

    The count falls with the penalty, but not strictly: the search ends within 1 % of ``k``, or after 24 halvings.
    """
    p = program
    zero = torch.zeros_like(p.U0)
    correlation = (p.A.T @ _residual(p, zero, _best_offset(p, zero, p.c0))).abs() * p.scale.to(p.A.dtype)[:, None]
    high = float(correlation.max()) if correlation.numel() else 1.0  # at this penalty no weight is left
    low, best, iterations = 0.0, None, 0
    penalty = high / 100
    start: Tensor | None = None
    for _ in range(24):
        result = penalised(p, max(penalty, 1e-300), gap=gap, max_iterations=max_iterations, start=start, watch=watch)
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
    if best is None:
        best = penalised(p, high, gap=gap, max_iterations=max_iterations, watch=watch)
    return L1Result(best.weights, best.bias, best.distance, best.gap, iterations, best.converged)


def penalised(
    program: StandardProgram, penalty: float, *, gap: float, max_iterations: int, start: Tensor | None = None, watch: Watch | None = None
) -> L1Result:
    """``min 1/2 dist(A W + e b^T, [lo, hi])^2 + penalty ||W||_1``, for a ``penalty`` > 0, to the stated duality gap."""
    p = program
    weight = (penalty / p.scale).to(p.A.dtype)[:, None]
    loop = GramADMM(p, p.U0 if start is None else start)
    rho = 0.2
    best: L1Result | None = None
    for iteration in range(1, max_iterations + 1):
        threshold = weight / (rho * BETA)
        loop.split_step(lambda V, t=threshold: soft_threshold(V, t), BETA, rho, None)  # type: ignore[misc]
        if iteration <= BALANCE_UNTIL and iteration % 10 == 0:
            rho = _balance(loop, rho)
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


def _balance(loop: GramADMM, rho: float) -> float:
    """Residual balancing: moves ``rho`` so that the primal and the dual residual shrink together."""
    ratio = loop.primal / max(loop.dual, 1e-30)
    if 1 / 3 < ratio < 3:
        return rho
    factor = min(max(math.sqrt(ratio), 0.5), 2.0)
    loop.rescale_duals(1 / factor, 1 / factor)
    return rho * factor


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
