"""The layer programs written down word for word in CVXPY: slow, accurate twins that tests compare the solvers with.

CVXPY and Clarabel are optional (``pip install "nettrim[reference]"``) and imported on first use. Shapes: inputs A (P, N), bounds and
outputs (P, M), weights W (N, M), bias b (M,); samples in rows; numpy float64 in and out. Meant for small problems.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nettrim.status import InvalidInput, NetTrimError

Array = NDArray[np.float64]

# Clarabel's defaults are 1e-8. On 36 random layers of up to 150 x 20 x 8 every program was solved to 1e-9; at 1e-10 one in twenty was not.
_TOLERANCES = {"tol_gap_abs": 1e-9, "tol_gap_rel": 1e-9, "tol_feas": 1e-9, "max_iter": 500}


class MissingExtra(NetTrimError, ImportError):
    """An optional dependency is not installed. The message names the extra that brings it."""


class SolverFailed(NetTrimError):
    """The reference solver ended in another status than optimal: the program is infeasible or numerically too hard."""


@dataclass(frozen=True, eq=False)
class ReferenceSolution:
    """An optimal point of one of the programs below, and its numbers recomputed from that point in the data's units.

    ``weights`` is (N, M); ``bias`` is (M,), or None when none was asked for. ``objective`` is what the program minimises.
    ``distance`` is the Frobenius distance of ``A W + 1 b^T`` to the box. ``status`` is the solver's word, always "optimal".
    """

    weights: Array
    bias: Array | None
    objective: float
    distance: float
    status: str


def preimage_l1(A: Array, lo: Array, hi: Array, epsilon: float, *, bias: bool = True) -> ReferenceSolution:
    """Minimise ``||W||_1`` (sum of absolute values) subject to ``dist(A W + 1 b^T, [lo, hi]) <= epsilon``.

    ``lo`` and ``hi`` are (P, M), ``lo <= hi``, with -inf and +inf for sides that do not bind. The bias is not penalised.
    Raises InvalidInput for unusable data, SolverFailed when no weights reach epsilon, MissingExtra without CVXPY.
    """
    problem = _Problem(A, lo, hi, bias)
    constraints = problem.within(_tolerance(epsilon))
    return problem.solve(problem.cp.norm1(problem.W), constraints, lambda l1, distance: l1)


def preimage_penalty(A: Array, lo: Array, hi: Array, penalty: float, *, bias: bool = True) -> ReferenceSolution:
    """Minimise ``1/2 dist(A W + 1 b^T, [lo, hi])^2 + penalty ||W||_1``. Arguments and errors as in :func:`preimage_l1`."""
    if not (math.isfinite(penalty) and penalty >= 0):
        raise InvalidInput(f"penalty must be a finite number >= 0, not {penalty}")
    problem = _Problem(A, lo, hi, bias)
    cp, (gap, constraints) = problem.cp, problem.gap()
    # Dividing inputs by s and targets by t turns the penalty into penalty / (s t), the whole being t^2 times smaller.
    scaled = penalty / (problem.input_scale * problem.target_scale)
    objective = scaled * cp.norm1(problem.W) + (0.5 * cp.sum_squares(gap) if gap is not None else 0.0)
    return problem.solve(objective, constraints, lambda l1, distance: 0.5 * distance**2 + penalty * l1)


def halfspace_l1(
    A: Array, Y: Array, epsilon: float, *, V: Array | None = None, bias: bool = True, penalise_bias: bool = True
) -> ReferenceSolution:
    """The published Net-Trim program: minimise ``sum |W|`` (``+ sum |b|`` when ``penalise_bias``) subject to
    ``||(A W + 1 b^T - Y)_Omega||_F <= epsilon`` and ``A W + 1 b^T <= V`` off Omega, where ``Omega = {Y > 1e-6}``.

    Y is (P, M), nonnegative; V is (P, M), default 0. ``distance`` is to the ReLU preimage of Y. Errors as in :func:`preimage_l1`.
    Source: arXiv 1611.05162 and 1806.06457.
    """
    epsilon = _tolerance(epsilon)
    Y = _array("Y", Y)
    if (Y < 0).any():
        raise InvalidInput("Y holds negative values, which no ReLU gives: pass outputs after the activation")
    V = np.zeros_like(Y) if V is None else _array("V", V)
    if V.shape != Y.shape:
        raise InvalidInput(f"V has shape {V.shape}; it bounds every entry of Y and must have its shape {Y.shape}")
    on = Y > 1e-6
    problem = _Problem(A, np.where(Y > 0, Y, -np.inf), Y, bias, extra_scale=V)
    cp = problem.cp
    inside, outside = np.flatnonzero(on), np.flatnonzero(~on)
    constraints: list[Any] = []
    if inside.size:
        residual = problem.Z[inside] - Y.ravel()[inside] / problem.target_scale
        constraints += problem.bounded(residual, epsilon)
    if outside.size:
        constraints.append(problem.Z[outside] <= V.ravel()[outside] / problem.target_scale)
    objective = cp.norm1(problem.W)
    if bias and penalise_bias:  # the bias is not divided by the input scale, so its share of the norm is
        objective = objective + problem.input_scale * cp.norm1(problem.b)
    solution = problem.solve(objective, constraints, lambda l1, distance: l1)
    if solution.bias is None or not penalise_bias:
        return solution
    total = solution.objective + float(np.abs(solution.bias).sum())
    return ReferenceSolution(solution.weights, solution.bias, total, solution.distance, solution.status)


def nearest(A: Array, lo: Array, hi: Array, bias: bool = True) -> ReferenceSolution:
    """Minimise ``dist(A W + 1 b^T, [lo, hi])``: the smallest tolerance any weights can meet. Arguments as in :func:`preimage_l1`."""
    problem = _Problem(A, lo, hi, bias)
    gap, constraints = problem.gap()
    objective = problem.cp.norm(gap, 2) if gap is not None else problem.cp.Constant(0.0)
    return problem.solve(objective, constraints, lambda l1, distance: distance)


class _Problem:
    """Variables of one program in scaled units: inputs divided by ``input_scale``, pre-activations by ``target_scale``.

    Scaling brings the data to order one, where the solver's absolute tolerances mean something. ``W`` and ``b`` are the scaled
    variables: the original weights are ``W target_scale / input_scale`` and the original bias is ``b target_scale``.
    ``Z`` is the scaled ``A W + 1 b^T``, flattened row by row.
    """

    def __init__(self, A: Array, lo: Array, hi: Array, bias: bool, extra_scale: Array | None = None) -> None:
        self.A = _array("A", A)
        self.lo, self.hi = _box(lo, hi)
        if self.A.shape[0] != self.lo.shape[0]:
            raise InvalidInput(f"A has {self.A.shape[0]} rows and the box has {self.lo.shape[0]}: both hold one row per sample")
        self.cp: Any = _cvxpy()
        self.input_scale = float(np.abs(self.A).max()) or 1.0
        sides = [np.abs(side[np.isfinite(side)]) for side in (self.lo, self.hi)]
        sides += [np.abs(extra_scale).ravel()] if extra_scale is not None else []
        self.target_scale = float(max((side.max() for side in sides if side.size), default=1.0)) or 1.0
        inputs, outputs = self.A.shape[1], self.lo.shape[1]
        self.W = self.cp.Variable((inputs, outputs))
        self.b = self.cp.Variable((1, outputs)) if bias else None
        Z = (self.A / self.input_scale) @ self.W
        if self.b is not None:
            Z = Z + np.ones((self.A.shape[0], 1)) @ self.b
        self.Z = self.cp.vec(Z, order="C")

    def _sides(self) -> tuple[Array, Array, NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
        """Return the scaled, flattened bounds, and where the box is a point, has a finite lower and a finite upper side."""
        lo, hi = self.lo.ravel() / self.target_scale, self.hi.ravel() / self.target_scale
        point = lo == hi
        return lo, hi, np.flatnonzero(point), np.flatnonzero(np.isfinite(lo) & ~point), np.flatnonzero(np.isfinite(hi) & ~point)

    def gap(self) -> tuple[Any | None, list[Any]]:
        """Return a vector whose least norm under the returned constraints is the scaled distance (None: no finite side)."""
        lo, hi, point, below, above = self._sides()
        parts: list[Any] = []
        constraints: list[Any] = []
        if point.size:
            parts.append(self.Z[point] - lo[point])
        if below.size:
            slack = self.cp.Variable(below.size, nonneg=True)
            constraints.append(self.Z[below] >= lo[below] - slack)
            parts.append(slack)
        if above.size:
            slack = self.cp.Variable(above.size, nonneg=True)
            constraints.append(self.Z[above] <= hi[above] + slack)
            parts.append(slack)
        return (self.cp.hstack(parts) if parts else None), constraints

    def within(self, epsilon: float) -> list[Any]:
        """Return constraints that say ``dist <= epsilon`` (in the original units)."""
        if epsilon > 0:
            gap, constraints = self.gap()
            return constraints if gap is None else constraints + self.bounded(gap, epsilon)
        # A ball of radius zero has no interior, which an interior-point method needs: say it with linear constraints.
        lo, hi, point, below, above = self._sides()
        constraints = [self.Z[point] == lo[point]] if point.size else []
        constraints += [self.Z[below] >= lo[below]] if below.size else []
        constraints += [self.Z[above] <= hi[above]] if above.size else []
        return constraints

    def bounded(self, residual: Any, epsilon: float) -> list[Any]:
        """Return constraints that say that the scaled ``residual`` has norm at most ``epsilon`` (in the original units)."""
        return [self.cp.norm(residual, 2) <= epsilon / self.target_scale] if epsilon > 0 else [residual == 0]

    def solve(self, objective: Any, constraints: list[Any], value: Any) -> ReferenceSolution:
        """Solve and measure; ``value(l1, distance)`` gives the objective in the original units."""
        program = self.cp.Problem(self.cp.Minimize(objective), constraints)
        try:
            with warnings.catch_warnings():  # what the warning says is refused below, as an error
                warnings.filterwarnings("ignore", message="Solution may be inaccurate")
                program.solve(solver=self.cp.CLARABEL, **_TOLERANCES)
        except self.cp.error.SolverError as error:
            raise SolverFailed(f"the reference solver failed: {error}") from error
        if program.status != self.cp.OPTIMAL:
            raise SolverFailed(f"the reference solver ended with status {program.status!r}: the tolerance may be out of reach")
        # A variable that no finite bound touches may come back without a value when there is nothing to minimise over it.
        W = np.zeros(self.W.shape) if self.W.value is None else np.asarray(self.W.value, dtype=np.float64)
        weights = W * (self.target_scale / self.input_scale)
        bias: Array | None = None
        Z = self.A @ weights
        if self.b is not None:
            b = np.zeros(self.b.shape) if self.b.value is None else np.asarray(self.b.value, dtype=np.float64)
            bias = b.ravel() * self.target_scale
            Z = Z + bias
        distance = float(np.linalg.norm(Z - np.clip(Z, self.lo, self.hi)))
        return ReferenceSolution(weights, bias, float(value(float(np.abs(weights).sum()), distance)), distance, str(program.status))


def _cvxpy() -> ModuleType:
    try:
        import clarabel  # noqa: F401  (the solver that CVXPY is asked for)
        import cvxpy
    except ImportError as error:
        raise MissingExtra('the reference solvers need CVXPY and Clarabel: pip install "nettrim[reference]"') from error
    return cvxpy


def _tolerance(epsilon: float) -> float:
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise InvalidInput(f"epsilon must be a finite number >= 0 (a Frobenius norm in the units of the box), not {epsilon}")
    return float(epsilon)


def _array(name: str, value: Array, *, finite: bool = True) -> Array:
    value = np.asarray(value, dtype=np.float64)
    if value.ndim != 2:
        raise InvalidInput(f"{name} must be a matrix with samples in rows; its shape is {value.shape}")
    if value.size == 0:
        raise InvalidInput(f"{name} is empty (shape {value.shape}): at least one sample and one column are required")
    if np.isnan(value).any() or (finite and np.isinf(value).any()):
        raise InvalidInput(f"{name} holds NaN{' or infinite' if finite else ''} values")
    return value


def _box(lo: Array, hi: Array) -> tuple[Array, Array]:
    lo, hi = _array("lo", lo, finite=False), _array("hi", hi, finite=False)
    if lo.shape != hi.shape:
        raise InvalidInput(f"lo has shape {lo.shape} and hi has shape {hi.shape}: they must agree")
    if (lo > hi).any() or np.isposinf(lo).any() or np.isneginf(hi).any():
        raise InvalidInput("the box is empty: lo <= hi, lo < +inf and hi > -inf are required in every entry")
    return lo, hi
