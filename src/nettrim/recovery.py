"""Exact recovery of one neuron: is a weight vector the unique l1 minimiser, and how many Gaussian samples make it so.

One neuron with exact responses (eps = 0). Inputs ``A`` (P, N) with samples in rows, responses ``y`` (P,), ``Omega = {i : y_i > 0}``,
bounds ``V`` (P,) off Omega. The program and its form with slacks are

    minimise ||u||_1   subject to   a_i u = y_i on Omega,   a_i u <= V_i off Omega;
    minimise ||u||_1   subject to   Xt (u, s) = (y_Omega, V_off),   s <= 0,      Xt = [A_Omega 0; A_off -I],   s = A_off u - V_off.

Proofs are in docs/recovery.md, whose equations are cited here. Everything is numpy float64; nothing here knows modules of a network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, SupportsFloat

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linprog

from .status import CertificateError, InvalidInput

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Bounds = list[tuple[float | None, float | None]]

_UNIT = float(np.finfo(np.float64).eps) / 2
# The tightest that HiGHS accepts. Its default of 1e-7 would let a candidate with a slightly better neighbour pass as a minimiser.
_OPTIONS = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}


class Verdict(Enum):
    """What is known of a candidate. ``proof`` says what the verdict rests on."""

    UNIQUE = "unique"
    MINIMISER = "minimiser, uniqueness not certified"
    NOT_MINIMISER = "not a minimiser"
    UNDECIDED = "undecided at this tolerance"

    @property
    def proof(self) -> str:
        return _PROOFS[self]


_PROOFS: dict[Verdict, str] = {
    Verdict.UNIQUE: "a strict dual certificate with the rank condition, its rounding errors covered by the margin (docs/recovery.md, 2.3)",
    Verdict.MINIMISER: "a dual certificate that is not strict, or the rank condition fails; where a direction is given, "
    "moving along it reaches another minimiser (docs/recovery.md, 2.4)",
    Verdict.NOT_MINIMISER: "the candidate breaks a constraint, or the given direction keeps them all and lowers the norm",
    Verdict.UNDECIDED: "neither a certificate nor a better direction was found beyond the tolerance: rescale the data or change tolerance",
}


@dataclass(frozen=True, eq=False)
class RecoveryCertificate:
    """The verdict on one candidate, with the numbers that prove it; :meth:`check` recomputes them from the data.

    The statement is about ``weights``: the candidate with its negligible entries set to zero, (N,), or (N + 1,) with the bias last.
    ``feasibility`` is its largest violation, relative to ``||a_i|| ||w|| + |bound_i|``; within the tolerance the right-hand sides are
    taken as the ones it meets exactly. ``omega`` and ``tight`` (P,) mark the rows with a response and the rows at their bound.

    ``multiplier`` (P,) is ``eta``, zero on rows with slack, and ``Lambda = Xt^T eta`` is (weights.size + number of rows off Omega,).
    ``strictness`` is ``min(1 - |Lambda_j| off the support, ||a_i|| Lambda_i on tight rows)``; ``residual`` is the largest
    ``|Lambda - sign(w)|`` on the support, rounding included; ``singular_value`` the smallest singular value of the unit-norm rows of
    ``A`` in Omega and the tight set, restricted to the support (infinite for an empty support; less its own rounding).
    ``margin`` is the strictness that is left after the residual, equation (2.3): every feasible ``u`` has

        ||u||_1 >= ||w||_1 + margin (sum of |u_j| off the support + sum over tight rows of |a_i (u - w)| / ||a_i||).

    ``multiplier``, ``Lambda`` and the numbers are None without a dual certificate. ``direction`` leads to a better point (verdict
    "not a minimiser") or to another minimiser, for every step up to ``step``.
    """

    verdict: Verdict
    reason: str
    weights: Array
    feasibility: float
    omega: Mask
    tight: Mask
    multiplier: Array | None
    Lambda: Array | None
    strictness: float | None
    residual: float | None
    singular_value: float
    margin: float | None
    direction: Array | None
    step: float
    tolerance: float
    problem: _Problem = field(repr=False)

    @property
    def unique(self) -> bool:
        """True when the candidate is proven to be the unique minimiser."""
        return self.verdict is Verdict.UNIQUE

    @property
    def full_rank(self) -> bool:
        """True when ``Xt``, restricted to the supports of the weights and the slacks, has independent columns."""
        return self.singular_value > 0

    def other_point(self) -> Array | None:
        """The better point, or the other minimiser, that ``direction`` leads to; None when there is no direction."""
        return None if self.direction is None else self.weights + self.step * self.direction

    def check(self) -> None:
        """Recompute every number from the data, the weights, the multiplier and the direction; no solver is used.

        Raises CertificateError naming the first number that does not hold.
        """
        problem = _Problem(self.problem.A, self.problem.y, self.weights, self.problem.V, self.problem.bias, self.tolerance)
        # The masks too: a row declared tight that has slack would lend the multiplier freedom it must not have.
        _agree("omega", np.array_equal(problem.omega, self.omega))
        _agree("tight", np.array_equal(problem.tight, self.tight))
        _agree("feasibility", math.isclose(problem.feasibility, self.feasibility, rel_tol=1e-6, abs_tol=1e-13))
        if self.multiplier is not None:
            numbers = problem.evaluate(self.multiplier)
            _agree("Lambda", self.Lambda is not None and np.allclose(numbers.Lambda, self.Lambda, rtol=1e-9, atol=1e-12))
            for name in ("strictness", "residual", "singular_value", "margin"):
                stated = getattr(self, name)
                _agree(name, stated is not None and math.isclose(getattr(numbers, name), stated, rel_tol=1e-6, abs_tol=1e-12))
        if self.direction is not None:
            _agree("direction", problem.keeps_constraints(self.direction) and 0 < self.step <= problem.step(self.direction) * (1 + 1e-9))
        if self.verdict is Verdict.UNIQUE:
            _agree("verdict", problem.feasible and self.margin is not None and self.full_rank and self.margin > self.tolerance)
        elif self.verdict is Verdict.MINIMISER:
            _agree("verdict", problem.feasible and self.multiplier is not None and problem.evaluate(self.multiplier).weak(self.tolerance))
            _agree("direction", self.direction is None or abs(problem.slope(self.direction)) <= self.tolerance)
        elif self.verdict is Verdict.NOT_MINIMISER and problem.feasible:
            _agree("direction", self.direction is not None and problem.slope(self.direction) < -self.tolerance)


def is_unique_minimiser(
    A: ArrayLike, y: ArrayLike, w: ArrayLike, *, V: ArrayLike | None = None, bias: bool = False, tolerance: float = 1e-9
) -> RecoveryCertificate:
    """Decide whether ``w`` is the unique minimiser of ``||u||_1`` subject to ``A u = y`` where ``y > 0`` and ``A u <= V`` elsewhere.

    ``A`` is (P, N), ``y`` (P,) nonnegative, ``w`` (N,), ``V`` (P,), default 0, read only where ``y = 0``. With ``bias=True`` a column of
    ones is appended, ``w`` is (N + 1,) with the bias last, and the bias is not penalised, as everywhere in nettrim; for the published
    program, which penalises it, append the ones to ``A`` and leave ``bias`` False.

    ``tolerance`` is relative: entries of ``w`` at most ``tolerance max|w|`` count as zero, rows within ``tolerance (||a_i|| ||w|| +
    |bound_i|)`` of their bound as tight, and margins and slopes must exceed it to count. A solver's output wants a ``tolerance`` of
    about its accuracy. Costs one linear program with P + 1 variables at most, and a second one unless the verdict is "unique".

    The condition is Proposition 2 of arXiv 1611.05162; that it is also necessary, and by how much rounding may violate it, is shown in
    docs/recovery.md, 2. Raises InvalidInput for shapes that do not fit, NaN, negative responses or a tolerance outside (0, 0.01].
    """
    problem = _Problem(*_data(A, y, w, V, bias, tolerance))
    if not problem.feasible:
        reason = f"it breaks a constraint by {problem.feasibility:.3g} of that row's scale, more than the tolerance {problem.tolerance:g}"
        return _certificate(problem, Verdict.NOT_MINIMISER, reason)
    multiplier = problem.best_multiplier()
    numbers = None if multiplier is None else problem.evaluate(multiplier)
    if numbers is not None and numbers.singular_value > 0 and numbers.margin > problem.tolerance:
        return _certificate(problem, Verdict.UNIQUE, "strict dual certificate and full column rank", numbers)
    if numbers is not None and numbers.weak(problem.tolerance):
        reason = "the supported columns are linearly dependent" if numbers.singular_value == 0 else "no dual certificate is strict"
        return _certificate(problem, Verdict.MINIMISER, reason, numbers, problem.flat_direction())
    direction = problem.steepest_direction()
    if direction is not None and problem.slope(direction) < -problem.tolerance and problem.keeps_constraints(direction):
        return _certificate(problem, Verdict.NOT_MINIMISER, "the norm falls along the given direction", direction=direction)
    return _certificate(problem, Verdict.UNDECIDED, "no certificate and no better direction beyond the tolerance", numbers)


@dataclass(frozen=True, eq=False)
class _Numbers:
    """What a multiplier amounts to; see :class:`RecoveryCertificate`."""

    multiplier: Array
    Lambda: Array
    strictness: float
    residual: float
    singular_value: float
    margin: float

    def weak(self, tolerance: float) -> bool:
        """True when the conditions of a minimiser hold up to the tolerance: equation (2.4)."""
        return self.residual <= tolerance and self.strictness >= -tolerance


class _Problem:
    """A candidate and its program, with all that follows from the data alone; arrays as in the module's docstring.

    ``X`` (P, n) is A with the bias column, ``rows`` the rows that bind (Omega and tight), ``support`` (n,) marks the nonzero weights and
    the bias, ``goal`` (n,) is sign(w), 0 for the bias.
    """

    def __init__(self, A: Array, y: Array, w: Array, V: Array, bias: bool, tolerance: float) -> None:
        self.A, self.y, self.V, self.bias, self.tolerance = A, y, V, bias, tolerance
        self.X = np.hstack([A, np.ones((A.shape[0], 1))]) if bias else A
        penalised = np.ones(self.X.shape[1], dtype=bool)
        penalised[-1:] = not bias
        largest = float(np.abs(w[penalised]).max(initial=0.0))
        self.w = np.where(penalised & (np.abs(w) <= tolerance * largest), 0.0, w)
        self.support = (self.w != 0) | ~penalised
        self.goal = np.where(penalised, np.sign(self.w), 0.0)
        self.omega = y > 0
        bound = np.where(self.omega, y, V)
        excess = self.X @ self.w - bound
        self.norms = np.linalg.norm(self.X, axis=1)
        scale = self.norms * float(np.linalg.norm(self.w)) + np.abs(bound)
        relative = np.divide(excess, scale, out=np.zeros_like(excess), where=scale > 0)
        self.relative = np.where(self.omega, 0.0, relative)
        self.feasibility = float(np.where(self.omega, np.abs(relative), np.maximum(relative, 0.0)).max(initial=0.0))
        self.feasible = self.feasibility <= tolerance
        self.tight = ~self.omega & (relative >= -tolerance)
        self.excess = excess
        self.rows = np.flatnonzero(self.omega | self.tight)
        # A row of zeros can only be tight (0 <= 0) and restrains nothing; 1 keeps the division harmless.
        self.lengths = np.where(self.norms > 0, self.norms, 1.0)[self.rows]
        self.unit = self.X[self.rows] / self.lengths[:, None]
        self.singular_value = self._smallest_singular_value()

    def _smallest_singular_value(self) -> float:
        columns = self.unit[:, self.support]
        if columns.shape[1] == 0:
            return math.inf
        if columns.shape[0] < columns.shape[1]:
            return 0.0
        values = np.linalg.svd(columns, compute_uv=False)
        smallest: float = float(values[-1]) - 2 * _UNIT * int(max(columns.shape)) * float(values[0])
        return max(0.0, smallest)

    def best_multiplier(self) -> Array | None:
        """The multiplier (P,) of the largest strictness: the linear program (2.2); None where the solver finds none.

        Variables: eta_i ||a_i|| on the binding rows, then the strictness t in [0, 1].
        """
        rows, inside = self.rows.size, np.flatnonzero(self.tight[self.rows])
        on, off = self.unit[:, self.support].T, self.unit[:, ~self.support].T
        signs = np.zeros((inside.size, rows))
        signs[np.arange(inside.size), inside] = 1.0
        body = np.vstack([off, -off, signs])
        above = np.hstack([body, np.ones((body.shape[0], 1))])
        limit = np.concatenate([np.ones(2 * off.shape[0]), np.zeros(inside.size)])
        bounds: Bounds = [*[(None, None)] * rows, (0.0, 1.0)]
        for index in inside:
            bounds[index] = (None, 0.0)
        cost = np.zeros(rows + 1)
        cost[-1] = -1.0
        x = _linear_program(cost, above, limit, np.hstack([on, np.zeros((on.shape[0], 1))]), self.goal[self.support], bounds)
        if x is None:
            return None
        scaled = x[:-1]
        scaled[inside] = np.minimum(scaled[inside], 0.0)
        multiplier = np.zeros(self.y.size)
        multiplier[self.rows] = scaled / self.lengths
        return multiplier

    def evaluate(self, multiplier: Array) -> _Numbers:
        """Lambda and the numbers of equation (2.3), each on its safe side of rounding."""
        eta = multiplier[self.rows]
        X = self.X[self.rows]
        weights_part = X.T @ eta
        # Standard bound of a dot product of `rows` terms: rows u / (1 - rows u) times the sum of absolute products.
        share = (self.rows.size + 1) * _UNIT
        rounding = share / (1 - share) * (np.abs(X).T @ np.abs(eta))
        miss = np.abs(weights_part - self.goal) + rounding
        residual = float(miss[self.support].max(initial=0.0))
        inner = 1 - (np.abs(weights_part) + rounding)[~self.support]
        slack = (-eta * self.lengths)[self.tight[self.rows]]
        strictness = min(1.0, float(inner.min(initial=1.0)), float(slack.min(initial=1.0)))
        spread = max(1.0, float(np.linalg.norm(self.unit[:, ~self.support], axis=0).max(initial=0.0)))
        sigma = self.singular_value
        loss = 0.0 if residual == 0 else (residual * math.sqrt(int(self.support.sum())) * spread / sigma if sigma > 0 else math.inf)
        Lambda = np.concatenate([weights_part, -multiplier[~self.omega]])
        return _Numbers(multiplier, Lambda, strictness, residual, sigma, strictness - loss)

    def slope(self, direction: Array) -> float:
        """The derivative of ``||w + t d||_1`` at t = 0+: ``sign(w) d`` on the support plus ``|d|`` off it."""
        return float(self.goal @ direction + np.abs(direction[~self.support]).sum())

    def keeps_constraints(self, direction: Array) -> bool:
        """True when a short way along the direction stays feasible, up to the tolerance relative to ``||a_i|| ||d||``."""
        change = self.unit @ direction / max(float(np.linalg.norm(direction)), np.finfo(np.float64).tiny)
        equal = self.omega[self.rows]
        return bool((np.abs(change[equal]) <= self.tolerance).all() and (change[~equal] <= self.tolerance).all())

    def step(self, direction: Array) -> float:
        """A step along which no weight changes its sign and no slack row passes its bound: there the norm is linear."""
        shrinking = (self.goal * direction < 0) & self.support
        steps = [1.0, *(np.abs(self.w[shrinking] / direction[shrinking]))]
        change = self.X @ direction
        closing = ~self.omega & ~self.tight & (change > 0)
        steps += list(-self.excess[closing] / change[closing])
        return float(min(steps))

    def steepest_direction(self) -> Array | None:
        """The direction in the unit box of the least slope among those that keep the constraints (all zeros when w is a minimiser)."""
        return self._direction(flat=False)

    def flat_direction(self) -> Array | None:
        """A direction to another minimiser, or None: slope 0, constraints kept, as far as possible from the support and the tight rows."""
        tried = [self._null_vector() if self.singular_value == 0 else None, self._direction(flat=True)]
        for direction in tried:
            if direction is None or np.abs(direction).max(initial=0.0) < 1e-3:
                continue
            if abs(self.slope(direction)) <= self.tolerance and self.keeps_constraints(direction):
                return direction
        return None

    def _null_vector(self) -> Array | None:
        columns = np.flatnonzero(self.support)
        right = np.linalg.svd(self.unit[:, columns], full_matrices=True)[2] if self.rows.size else np.eye(columns.size)
        direction = np.zeros(self.w.size)
        direction[columns] = right[-1] / np.abs(right[-1]).max()
        return direction

    def _direction(self, flat: bool) -> Array | None:
        """Solve for d = d_support + (p - q) off it, |d| <= 1 and p, q >= 0, subject to Omega rows d = 0 and tight rows d <= 0."""
        on, off = np.flatnonzero(self.support), np.flatnonzero(~self.support)
        wide = np.hstack([self.unit[:, on], self.unit[:, off], -self.unit[:, off]])
        equal = self.omega[self.rows]
        slope = np.concatenate([self.goal[on], np.ones(2 * off.size)])
        above, limit, cost = wide[~equal], np.zeros(int((~equal).sum())), slope
        if flat:
            cost = wide[~equal].sum(axis=0)
            cost[on.size :] -= 1.0
            above, limit = np.vstack([above, slope]), np.append(limit, 0.0)
        bounds: Bounds = [*[(-1.0, 1.0)] * on.size, *[(0.0, 1.0)] * (2 * off.size)]
        x = _linear_program(cost, above, limit, wide[equal], np.zeros(int(equal.sum())), bounds)
        if x is None:
            return None
        direction = np.zeros(self.w.size)
        direction[on] = x[: on.size]
        direction[off] = x[on.size : on.size + off.size] - x[on.size + off.size :]
        return direction


def _linear_program(cost: Array, above: Array, limit: Array, equal: Array, value: Array, bounds: Bounds) -> Array | None:
    """Minimise ``cost x`` subject to ``above x <= limit``, ``equal x = value`` and bounds; None unless HiGHS reports an optimum."""
    result = linprog(cost, A_ub=above, b_ub=limit, A_eq=equal, b_eq=value, bounds=bounds, method="highs", options=_OPTIONS)
    return np.asarray(result.x, dtype=np.float64) if result.status == 0 else None


def _certificate(
    problem: _Problem, verdict: Verdict, reason: str, numbers: _Numbers | None = None, direction: Array | None = None
) -> RecoveryCertificate:
    return RecoveryCertificate(
        verdict=verdict,
        reason=reason,
        weights=problem.w,
        feasibility=problem.feasibility,
        omega=problem.omega,
        tight=problem.tight,
        multiplier=None if numbers is None else numbers.multiplier,
        Lambda=None if numbers is None else numbers.Lambda,
        strictness=None if numbers is None else numbers.strictness,
        residual=None if numbers is None else numbers.residual,
        singular_value=problem.singular_value,
        margin=None if numbers is None else numbers.margin,
        direction=direction,
        step=0.0 if direction is None else problem.step(direction),
        tolerance=problem.tolerance,
        problem=problem,
    )


def _agree(name: str, holds: bool) -> None:
    if not holds:
        raise CertificateError(f"recovery certificate: {name} does not hold when it is recomputed from the data")


def _data(
    A: ArrayLike, y: ArrayLike, w: ArrayLike, V: ArrayLike | None, bias: bool, tolerance: float
) -> tuple[Array, Array, Array, Array, bool, float]:
    A = _array("A", A, 2, "a matrix (samples, inputs)")
    y, w = _array("y", y, 1, "a vector of one response a sample"), _array("w", w, 1, "a vector of one weight an input")
    P, N = A.shape
    if P == 0 or N == 0:
        raise InvalidInput(f"A must have at least one sample and one input, found shape {A.shape}: pass samples in rows")
    if y.size != P:
        raise InvalidInput(f"y must have one response for each of the {P} rows of A, found {y.size}: pass one neuron, samples in rows")
    expected = N + 1 if bias else N
    if w.size != expected:
        what = f"{expected} entries, one for each input and the bias last," if bias else f"{expected} entries, one for each input,"
        raise InvalidInput(f"w must have {what} found {w.size}: {'append the bias' if bias else 'pass bias=True if the last is a bias'}")
    if (y < 0).any():
        raise InvalidInput(f"y must be nonnegative, found {y.min():g}: pass responses after the ReLU")
    V = np.zeros(P) if V is None else _array("V", V, 1, "a vector of one bound a sample")
    if V.size != P:
        raise InvalidInput(f"V must have one bound for each of the {P} rows of A, found {V.size}: entries where y > 0 are ignored")
    t = finite_number("tolerance", tolerance)
    if not 0 < t <= 0.01:
        raise InvalidInput(f"tolerance must lie in (0, 0.01], found {t}: 1e-9 suits exact candidates, 1e-6 a solver's output")
    return A, y, w, V, bool(bias), t


def _array(name: str, value: ArrayLike, dimensions: int, shape: str) -> Array:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{name} must be {shape} of real numbers, found {type(value).__name__}: convert it to a numpy array") from error
    if array.ndim != dimensions:
        raise InvalidInput(f"{name} must be {shape}, found shape {array.shape}: samples in rows, one neuron at a time")
    if not np.isfinite(array).all():
        raise InvalidInput(f"{name} must be finite, found NaN or infinite entries: remove those samples")
    return array


def finite_number(name: str, value: Any) -> float:
    """``value`` as a float; refuses what is not a finite number, naming it. Raises InvalidInput."""
    if isinstance(value, bool | str) or not isinstance(value, SupportsFloat) or not math.isfinite(float(value)):
        raise InvalidInput(f"{name} must be a finite number, found {value!r}: give a plain number such as 0.99")
    return float(value)
