"""The fast solver of the published program against CVXPY and the published ADMM, and its dual values."""

from __future__ import annotations

import math

import cvxpy
import numpy as np
import pytest
import torch
from layer_programs import layer

from nettrim.halfspace import HalfspaceProgram, published_program
from nettrim.preimage import RELU
from nettrim.program import LayerProgram, from_rows, standardise
from nettrim.solvers import halfspace_l1
from nettrim.solvers.halfspace import published_admm
from nettrim.solvers.reference import preimage_l1

# P, N, M, bias, rank, moved: a layer at its own response, or behind layers that were pruned
CASES = [
    (60, 15, 5, True, None, False),
    (25, 30, 4, True, None, False),
    (60, 15, 5, False, 8, False),
    (60, 15, 5, True, None, True),
    (50, 20, 4, False, None, True),
]
EPSILONS = (0.02, 0.1, 0.4)


def made(case: int) -> tuple[LayerProgram, HalfspaceProgram]:
    P, N, M, bias, rank, moved = CASES[case]
    p = layer(P, N, M, bias=bias, rank=rank, noise=0.05 if moved else 0.0, seed=case)
    return p, published_program(p, moved=moved)


def radius_of(case: int, relative: float, p: LayerProgram, h: HalfspaceProgram) -> float:
    """In the published cascade the tolerance grows from the original weights' own residual."""
    return math.sqrt(1 + relative) * h.original_residual if CASES[case][5] else relative * p.reference_norm


def optimum(h: HalfspaceProgram, radius: float | None, penalty: float = 0.0) -> float:
    """The published program written down word for word."""
    p = h.program
    X, lo, hi = p.inputs.numpy(), p.lo.numpy(), p.hi.numpy()
    U = cvxpy.Variable((X.shape[1], lo.shape[1]))
    on = lo == hi
    Z = X @ U
    residual = cvxpy.hstack([Z[i, j] - hi[i, j] for i, j in zip(*np.nonzero(on), strict=True)])
    held = [Z[i, j] <= hi[i, j] for i, j in zip(*np.nonzero(~on), strict=True)]
    norm = cvxpy.sum(cvxpy.abs(U))
    if radius is not None:
        problem = cvxpy.Problem(cvxpy.Minimize(norm), [cvxpy.norm(residual, 2) <= radius, *held])
    else:
        problem = cvxpy.Problem(cvxpy.Minimize(0.5 * cvxpy.sum_squares(residual) + penalty * norm), held)
    return float(problem.solve(solver=cvxpy.CLARABEL))


@pytest.mark.parametrize("relative", EPSILONS)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_ours_the_published_admm_and_cvxpy_agree(case: int, relative: float) -> None:
    p, h = made(case)
    radius = radius_of(case, relative, p, h)
    best = optimum(h, radius)
    ours = halfspace_l1.within_tolerance(standardise(h.program, power=0.5), radius, gap=1e-5, max_iterations=50_000, slack=h.slack)
    assert ours.converged
    assert float(ours.weights.abs().sum()) == pytest.approx(best, rel=1e-4)
    assert ours.violation <= 1e-5 * float(p.hi.abs().max())
    assert h.program.distance(ours.weights, None) <= radius
    W, b = h.split(ours.weights)
    assert p.distance(W, b) <= math.hypot(radius, h.slack_norm)
    published = published_admm(
        h.program.inputs,
        torch.where(h.program.lo == h.program.hi, h.program.hi, 0.0),
        radius,
        V=h.program.hi,
        omega=h.program.lo == h.program.hi,
        bias=False,  # the column of ones is there already
        iterations=60_000,
        stop=1e-13,
    )
    assert published.objective == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_penalised_form_agrees_with_cvxpy(case: int) -> None:
    _, h = made(case)
    penalty = 0.05 * float((h.program.inputs.T @ torch.where(h.program.lo == h.program.hi, h.program.hi, 0.0)).abs().max())
    best = optimum(h, None, penalty)
    standard = standardise(h.program, power=0.5)
    ours = halfspace_l1.penalised(standard, penalty, gap=1e-5, max_iterations=50_000)
    assert ours.converged
    Z = h.program.preactivation(ours.weights, None)
    on = h.program.lo == h.program.hi
    value = 0.5 * float((Z - h.program.hi)[on].square().sum()) + penalty * float(ours.weights.abs().sum())
    assert value == pytest.approx(best, rel=1e-4)
    assert ours.violation <= 1e-4 * float(h.program.hi.abs().max())


@pytest.mark.parametrize("iterations", [25, 50, 100])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_gap_of_an_unfinished_solve_is_a_valid_bound(case: int, iterations: int) -> None:
    p, h = made(case)
    radius = radius_of(case, 0.1, p, h)
    best = optimum(h, radius)
    standard = standardise(h.program, power=0.5)
    ours = halfspace_l1.within_tolerance(standard, radius, gap=1e-9, max_iterations=iterations, slack=h.slack)
    assert not ours.converged
    assert float(ours.weights.abs().sum()) * (1 - ours.gap) <= best * (1 + 1e-6)


@pytest.mark.parametrize("relative", EPSILONS)
def test_the_preimage_program_is_never_above(relative: float) -> None:
    p, h = made(3)
    radius = radius_of(3, relative, p, h)
    implied = math.hypot(radius, h.slack_norm)  # what weights of the published program are certified with
    assert implied <= math.sqrt(1 + relative) * p.original_distance() * (1 + 1e-12)
    ours = preimage_l1(p.inputs.numpy(), p.lo.numpy(), p.hi.numpy(), implied, bias=True)
    assert ours.objective <= optimum(h, radius) * (1 + 1e-6)


def test_omega_is_where_the_box_is_a_point_and_v_is_the_original_response_once_inputs_moved() -> None:
    p, _ = made(3)
    Z0 = p.preactivation(p.weights, p.bias)
    for moved in (False, True):
        h = published_program(p, moved=moved)
        on = p.lo == p.hi
        assert torch.equal(h.program.hi[on], p.hi[on])
        assert torch.equal(h.program.hi[~on], Z0[~on] if moved else torch.zeros_like(Z0[~on]))
        assert torch.equal(h.slack, torch.where(on, 0.0, Z0.clamp(min=0)) if moved else torch.zeros_like(Z0))
        assert h.original_residual == pytest.approx(float(torch.linalg.vector_norm((Z0 - p.hi)[on])))
        assert h.program.inputs.shape[1] == p.inputs.shape[1] + 1 and h.program.bias is None


def test_lower_bounds_are_kept_too() -> None:
    p = layer(60, 12, 4, "hardtanh", seed=3)
    h = published_program(p, moved=False)
    radius = 0.1 * p.reference_norm
    found = halfspace_l1.within_tolerance(standardise(h.program, power=0.5), radius, gap=1e-4, max_iterations=20_000)
    assert found.converged
    Z = h.program.preactivation(found.weights, None)
    above, below = (h.program.hi == math.inf), (h.program.lo == -math.inf)
    assert bool(above.any()) and bool(below.any())
    assert bool((Z[above] >= 1 - 1e-3).all()) and bool((Z[below] <= -1 + 1e-3).all())


def test_a_layer_with_nothing_off_omega_has_no_constraints() -> None:
    A = torch.rand(30, 5, dtype=torch.float64) + 0.1
    W = torch.rand(5, 3, dtype=torch.float64)
    p = from_rows(A, A @ W, RELU, W, None, dtype=torch.float64)
    h = published_program(p, moved=False)
    assert standardise(h.program, power=0.5).hard is None
    assert halfspace_l1.violation(h.program, torch.zeros_like(W)) == 0.0
