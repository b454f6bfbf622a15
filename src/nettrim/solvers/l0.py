"""Budgets: least distance with a given number of nonzero weights, and the fewest weights that stay within a tolerance.

These programs are not convex; what is found is good, not proven best. The distance of what is returned is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from ..patterns import UNSTRUCTURED, Pattern
from ..program import StandardProgram
from ..prox import largest_mask
from ..solution import Watch
from .admm import GramADMM
from .polish import polish

CHECK_EVERY = 3  # as in ALPS: the support is compared every three iterations
MOST_PARTS = 8  # an iteration looks at an eighth of the rows at least,
LEAST_ROWS, ROWS_PER_INPUT = 500, 2  # and at so many rows, in all and for each input: fewer are fitted one part after the other
MOST_CURVATURE = 2.0
FALLS, PATIENCE, NEARLY_STILL = 0.9, 5, 0.005  # so many checks without such a fall of a small change: what is left is noise of the parts
POLISH_GAIN = 4e-3  # the loop ends near the polished weights: another round gains a twentieth of a percent
POLISH, POLISH_POINTS, POLISH_QUICK = (6, 6), (1, 10), (2, 2)  # rounds, steps of each; points need no second round
RIDGE, RIDGE_POINTS = 0.01, 0.003  # of the weight step
PATH_START, PATH_GROWTH, PATH_STEPS = 0.05, 1.25, 24  # curves, which solve many budgets roughly: penalty, its factor, iterations
TRY_ALL = 32  # weights up to which the penalised program tries every count


@dataclass(frozen=True)
class Schedule:
    """How the penalty grows from ``start``: ``growth`` pairs a share of the support with a factor, and the first pair whose share is
    exceeded by what has changed since the last check gives the factor. It grows slowest while the support is being sorted out: in the
    end, when next to nothing changes, slow growth gains nothing any more."""

    start: float
    growth: tuple[tuple[float, float], ...]


POINTS = Schedule(0.03, ((0.1, 1.15), (0.005, 1.10), (0.0, 1.2)))  # targets that never move
QUICK = Schedule(0.1, ((0.1, 1.3), (0.005, 1.2), (0.0, 1.3)))  # targets that do not move yet; nearly ALPS's
CAREFUL = Schedule(0.1, ((0.1, 1.13), (0.005, 1.085), (0.0, 1.13)))  # then moving ones, for one budget
BRISK = Schedule(0.1, ((0.1, 1.15), (0.005, 1.10), (0.0, 1.2)))  # or in searches, which solve many
RELAXATION = 1.5  # of the weight step, at most: the same distance in fewer iterations; more of it settles late at low sparsity
STABLE = 1.9  # relaxation times curvature, at most: at 2, errors in the direction that a part sees too large turn over without falling


@dataclass(frozen=True)
class Parts:
    """Into how many parts the rows are split, and the over-relaxation that their curvature allows."""

    count: int = 1
    relaxation: float = RELAXATION


@dataclass(frozen=True)
class L0Result:
    """Weights ``U`` and offset ``c`` in the standard coordinates, the distance, and whether the support had settled."""

    U: Tensor
    c: Tensor | None
    k: int
    distance: float
    iterations: int
    converged: bool


class _Settings(TypedDict):
    ridge: float | None
    max_iterations: int
    schedule: Schedule | None
    pattern: Pattern
    parts: Parts | None
    quick: bool
    watch: Watch | None


def within_budget(
    program: StandardProgram,
    k: int,
    *,
    ridge: float | None = None,
    max_iterations: int = 300,
    polished: bool = True,
    schedule: Schedule | None = None,
    pattern: Pattern = UNSTRUCTURED,
    parts: Parts | None = None,
    quick: bool = False,
    watch: Watch | None = None,
) -> L0Result:
    """``min dist(A W + e b^T, [lo, hi])  subject to  ||W||_0 <= k, W in the pattern`` (design section 3).

    ADMM on the majorised distance, with a penalty that grows as the support settles and a small ``ridge`` towards the original weights
    (in units of the mean diagonal of the Gram matrix, which is 1); in three stages. First the target stays at the points of the boxes
    that are nearest to the original weights' response: these iterations do without the rows. Then, from a low penalty again, it moves
    with the weights, by a part of the rows in each iteration where there are many. Last the polish on the support that was found. Where
    all boxes are points, and with ``quick``, the second stage is left out; with ``quick`` the others are shorter.

    Without the first stage the second would have to begin at a lower penalty, and take longer, to end as well (docs/solver_study.md).
    ``schedule`` is the second stage's, ``CAREFUL`` by default. ``parts``: what :func:`row_parts`
    gives, where that is known already.
    """
    p = program
    k = min(k, pattern.capacity(p.live, p.U0.shape[1]))
    points = bool(torch.equal(p.lo, p.hi))
    if ridge is None:
        ridge = RIDGE_POINTS if points else RIDGE
    loop = GramADMM(p, p.U0, relaxation=RELAXATION)
    loop.refresh()
    mask = pattern.mask(p.U0, k, p.live)
    loop.D = p.U0 * mask
    stage = _Stage(k, ridge, pattern, watch)
    first = POINTS if points and not quick else QUICK
    mask, iterations, settled = stage.run(loop, mask, first, 0, max_iterations, None)
    if not points and not quick:
        parts = parts or row_parts(p)
        loop.V.zero_()
        loop.relaxation = parts.relaxation
        mask, iterations, settled = stage.run(loop, mask, schedule or CAREFUL, iterations, max_iterations, parts)
    rounds, steps = POLISH_QUICK if quick and not points else POLISH_POINTS if points else POLISH
    rounds = rounds if polished else 0
    U, c, distance = polish(p, loop.D, loop.c, support=mask, rounds=rounds, steps=steps, tolerance=POLISH_GAIN)
    return L0Result(U, c, k, distance, iterations, settled)


@dataclass(frozen=True)
class _Stage:
    """What the stages have in common."""

    k: int
    ridge: float
    pattern: Pattern
    watch: Watch | None

    def run(self, loop: GramADMM, mask: Tensor, schedule: Schedule, done: int, most: int, parts: Parts | None) -> tuple[Tensor, int, bool]:
        """Iterates until the support ``mask`` is settled or ``most`` iterations are done, with targets that move by ``parts`` of the
        rows, or stay. Returns the support, the iterations that are done, and whether it settled."""
        p = loop.program
        count = 1 if parts is None else parts.count
        pace = loop.relaxation / RELAXATION  # smaller steps, slower growth
        beta, iteration, settled = schedule.start, done, False

        def keep(V: Tensor) -> Tensor:
            nonlocal mask
            mask = self.pattern.mask(V, self.k, p.live)
            return V * mask

        previous, least, stale, reached = mask, 1.0, 0, 0.0
        while iteration < most and not settled:
            if parts is not None:
                reached = loop.refresh((iteration - done) % count, count)
            iteration += 1
            loop.majorised_step(keep, beta, self.ridge)
            if (iteration - done) % CHECK_EVERY == 0:
                changed = int((mask & ~previous).sum()) / max(self.k, 1)
                previous = mask
                factor = next(growth for share, growth in schedule.growth if changed > share or share == 0.0) ** pace
                stale = 0 if changed < FALLS * least else stale + 1
                least = min(least, changed)
                settled = changed == 0.0 or (count > 1 and stale >= PATIENCE and least < NEARLY_STILL)
                beta *= factor
                loop.V /= factor  # the multiplier itself stays
                if self.watch is not None:
                    now = p.distance(loop.D, loop.c) if parts is None else math.hypot(reached, math.sqrt(p.unreachable))
                    self.watch(iteration, now, self.k / max(p.source.weights.numel(), 1))
        return mask, iteration, settled


def path(program: StandardProgram, budgets: Sequence[int], *, ridge: float = RIDGE) -> list[float]:
    """The distance reached at each of the budgets, which must fall: every solve starts where the last one ended, and ends early.

    For comparing layers and densities; :func:`within_budget` finds less distance.
    """
    p = program
    loop = GramADMM(p, p.U0, relaxation=1.0)  # steps that end early had better not overshoot
    parts = row_parts(p).count
    found, iteration = [], 0
    for k in budgets:
        loop.V.zero_()
        beta, mask = PATH_START, largest_mask(loop.D, k)

        def keep(V: Tensor, k: int = k) -> Tensor:
            nonlocal mask
            mask = largest_mask(V, k)
            return V * mask

        for step in range(1, PATH_STEPS + 1):
            loop.refresh(iteration % parts, parts)
            iteration += 1
            loop.majorised_step(keep, beta, ridge)
            if step % CHECK_EVERY == 0:
                beta *= PATH_GROWTH
                loop.V /= PATH_GROWTH
        U, c, distance = polish(p, loop.D, loop.c, support=mask, rounds=2, steps=POLISH[1], tolerance=POLISH_GAIN)
        loop.D, loop.c = U, c
        found.append(distance)
    return found


def row_parts(program: StandardProgram) -> Parts:
    """Into how many parts the rows are split, of which each iteration looks at one: 1 where their order is not random, or all boxes are
    points, whose target never moves; and the over-relaxation of the steps.

    A part's curvature relative to the Gram matrix, times the relaxation, must stay below 2, beyond which a step overshoots: an input that
    is active in few rows has all of its curvature in one part.
    """
    P, N = program.A.shape
    if not program.shuffled or not N or torch.equal(program.lo, program.hi):
        return Parts()
    count = max(1, min(MOST_PARTS, P // max(LEAST_ROWS, ROWS_PER_INPUT * N)))
    size = 1.0
    while count > 1 and (size := curvature(program, count)) > MOST_CURVATURE:
        count //= 2
    return Parts(count, min(RELAXATION, max(1.0, STABLE / size)) if count > 1 else RELAXATION)


def curvature(program: StandardProgram, parts: int, damping: float = 0.03, steps: int = 15) -> float:
    """The largest eigenvalue of ``(G + damping)^-1/2 (P / |q|) A_q^T A_q (G + damping)^-1/2`` over the parts ``q`` of the rows, by the
    power method, or the first that is found to exceed ``MOST_CURVATURE``."""
    p = program
    P, N = p.A.shape
    root = (p.values + damping).rsqrt()
    start = torch.randn(N, generator=torch.Generator().manual_seed(0), dtype=p.A.dtype).to(p.A.device)
    largest = 0.0
    for part in range(parts):
        A = p.A[part * P // parts : (part + 1) * P // parts]
        x, size = start, 0.0
        for _ in range(steps):
            x = x / torch.linalg.vector_norm(x)
            x = root * (p.vectors.T @ (A.T @ (A @ (p.vectors @ (root * x))))) * (P / len(A))
            size = float(torch.linalg.vector_norm(x))  # never above the eigenvalue
            if size > MOST_CURVATURE:
                return size
            if size == 0.0:  # no row of this part holds anything
                break
        largest = max(largest, size)
    return largest


def within_tolerance(
    program: StandardProgram,
    epsilon: float,
    *,
    ridge: float | None = None,
    max_iterations: int = 300,
    precision: float = 0.005,
    pattern: Pattern = UNSTRUCTURED,
    quick: bool = False,
    watch: Watch | None = None,
) -> L0Result | None:
    """The smallest budget found whose polished weights, as stored, stay within ``epsilon``.

    A bracketing secant search on ``log distance`` against ``log k``; it ends when the bracket is narrower than ``precision`` of ``k``
    or the distance is within ``precision`` below ``epsilon``; budgets of a pattern of whole groups count down to one group. ``None`` when
    even every weight of the pattern leaves a larger distance.
    """
    p = program
    full, unit = pattern.capacity(p.live, p.U0.shape[1]), pattern.unit(*p.source.weights.shape)
    iterations, settings = 0, _of_search(p, ridge, max_iterations, pattern, quick, watch)

    def solve(k: int) -> tuple[L0Result, float]:
        nonlocal iterations
        result = within_budget(p, k, **settings)
        iterations += result.iterations
        # what counts is the distance of the weights as they are stored
        return result, p.source.distance(*p.restore(result.U, result.c))

    none, value = solve(0)
    if value <= epsilon:
        return none
    if not math.isfinite(value):  # the weights that are stored, or their response, left the range of their dtype
        return None
    low, low_value = 0, value
    best: L0Result | None = None
    high, high_value = full + 1, 0.0
    k = max(1, full // 4)
    while high - low > max(1 if best is None else unit, int(precision * high)):
        result, value = solve(k)
        if not math.isfinite(value):
            return best
        if value <= epsilon:
            best, high, high_value = result, k, value
            if value > epsilon * (1 - precision):
                break
        else:
            low, low_value = k, value
            if k == full:
                return None
        k = _next_budget(low, low_value, high, high_value, epsilon, full)
    if best is None:
        return None
    return L0Result(best.U, best.c, best.k, best.distance, iterations, best.converged)


def _of_search(
    p: StandardProgram, ridge: float | None, max_iterations: int, pattern: Pattern, quick: bool, watch: Watch | None
) -> _Settings:
    """How every budget of a search is solved."""
    return {
        "ridge": ridge,
        "max_iterations": max_iterations,
        "schedule": None if quick else BRISK,
        "pattern": pattern,
        "parts": None if quick else row_parts(p),
        "quick": quick,
        "watch": watch,
    }


def _next_budget(low: int, low_value: float, high: int, high_value: float, epsilon: float, full: int) -> int:
    """Interpolates between a budget that misses the tolerance and one that meets it, or extends from the only one known."""
    aim = math.log(epsilon * 0.998)
    if high > full:  # nothing meets it yet: distances fall roughly as k^-1.5
        guess = low * (low_value / epsilon) ** (1 / 1.2) if low else full / 4
        return min(full, max(low + 1, math.ceil(guess)))
    if low == 0 or high_value <= 0.0:
        guess = high * (max(high_value, 1e-3 * epsilon) / epsilon) ** (1 / 1.5)
    else:
        x0, x1, y0, y1 = math.log(low), math.log(high), math.log(low_value), math.log(high_value)
        guess = math.exp(x0 + (x1 - x0) * (y0 - aim) / (y0 - y1)) if y0 > y1 else (low + high) / 2
    margin = max(1, (high - low) // 50)  # stay off the ends, so that the bracket always shrinks
    return min(high - margin, max(low + margin, round(guess)))


def penalised(
    program: StandardProgram,
    penalty: float,
    *,
    ridge: float | None = None,
    max_iterations: int = 300,
    pattern: Pattern = UNSTRUCTURED,
    quick: bool = False,
    watch: Watch | None = None,
) -> L0Result:
    """``min 1/2 dist(A W + e b^T, [lo, hi])^2 + penalty ||W||_0``, as the best budget found by a golden-section search over ``log k``
    (over every ``k`` in tiny layers)."""
    p = program
    full, unit = pattern.capacity(p.live, p.U0.shape[1]), pattern.unit(*p.source.weights.shape)
    solved: dict[int, tuple[float, L0Result]] = {}
    settings = _of_search(p, ridge, max_iterations, pattern, quick, watch)

    def value(k: int) -> float:
        if k not in solved:
            result = within_budget(p, k, **settings)
            nonzeros = int((result.U != 0).sum())
            solved[k] = (result.distance**2 / 2 + penalty * nonzeros, result)
        return solved[k][0]

    value(0)
    if full <= TRY_ALL * unit:  # the search below skips counts, which matters when there are few
        low, high = 0.0, 0.0
        for k in (*range(unit, full, unit), full):
            value(k)
    else:
        low, high = math.log(unit), math.log(full)
    golden = (math.sqrt(5) - 1) / 2
    while high - low > 0.02:
        left, right = high - golden * (high - low), low + golden * (high - low)
        if value(round(math.exp(left))) <= value(round(math.exp(right))):
            high = right
        else:
            low = left
    best = min(solved.values(), key=lambda pair: pair[0])[1]
    iterations = sum(result.iterations for _, result in solved.values())
    return L0Result(best.U, best.c, best.k, best.distance, iterations, best.converged)
