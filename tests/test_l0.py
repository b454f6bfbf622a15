"""Budgets against brute force over all supports, tolerances, and the polish against least squares and CVXPY."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from layer_programs import layer

from nettrim import LinearADMM, NetTrim
from nettrim.preimage import RELU
from nettrim.program import LayerProgram, from_rows, standardise
from nettrim.solvers import l0
from nettrim.solvers.admm import GramADMM
from nettrim.solvers.polish import polish
from nettrim.solvers.reference import nearest


def least(p: LayerProgram, support: torch.Tensor) -> float:
    """Least distance with weights on ``support`` (N, M), from a long polish in float64."""
    s = standardise(p, torch.float64)
    start = torch.zeros_like(s.U0)
    return polish(s, start, s.c0, support=support[s.live], rounds=100, steps=100, tolerance=1e-10)[2]


def brute(p: LayerProgram, k: int) -> float:
    """The best over all supports of ``k`` weights of a layer with one neuron."""
    N = p.shape[1]
    best = math.inf
    for chosen in itertools.combinations(range(N), k):
        support = torch.zeros(N, 1, dtype=torch.bool)
        support[list(chosen)] = True
        best = min(best, least(p, support))
    return best


@pytest.mark.parametrize("activation", ["relu", "identity", "hardtanh"])
def test_budget_against_brute_force(activation: str) -> None:
    ratios = []
    for seed in range(8):
        p = layer(40, 6, 1, activation, seed=seed)
        for k in (2, 4):
            best = brute(p, k)
            found = l0.within_budget(standardise(p), k, ridge=0.0)
            W, b = standardise(p).restore(found.U, found.c)
            assert int((W != 0).sum()) <= k
            ratios.append(p.distance(W, b) / best)
    assert min(ratios) >= 1 - 1e-4
    assert max(ratios) <= 2.5
    assert sum(r <= 1 + 1e-3 for r in ratios) >= 0.65 * len(ratios)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", "identity", "hardtanh", "leaky"])
def test_counts_are_exact(activation: str, bias: bool) -> None:
    p = layer(60, 12, 5, activation, bias=bias, seed=1)
    s = standardise(p)
    distances = []
    for k in (0, 1, 17, 30, 59, 60, 99):
        found = l0.within_budget(s, k)
        assert int((found.U != 0).sum()) == min(k, 60) == found.k
        W, b = s.restore(found.U, found.c)
        assert p.distance(W, b) == pytest.approx(found.distance, rel=1e-9, abs=1e-12)
        distances.append(found.distance)
    assert distances[0] > distances[2] > distances[3] > distances[5]
    assert distances[-1] <= 1e-6 * p.reference_norm  # every weight: the reference itself


@pytest.mark.parametrize("relative", [0.02, 0.1, 0.4])
@pytest.mark.parametrize("activation", ["relu", "identity", "leaky"])
def test_tolerance_is_met_with_few_weights(activation: str, relative: float) -> None:
    p = layer(80, 15, 6, activation, seed=2)
    s = standardise(p)
    epsilon = relative * p.reference_norm
    found = l0.within_tolerance(s, epsilon)
    assert found is not None
    W, b = s.restore(found.U, found.c)
    assert p.distance(W, b) <= epsilon
    if found.k > 3 and found.distance < epsilon * (1 - 0.005):  # then the bracket was closed: clearly fewer weights miss it
        fewer = l0.within_budget(s, int(found.k * 0.85) - 1)
        assert fewer.distance > epsilon


def test_looser_tolerances_need_no_more_weights() -> None:
    p = layer(80, 15, 6, seed=3)
    counts = []
    for relative in (0.01, 0.05, 0.2, 0.5, 3.0):
        found = l0.within_tolerance(standardise(p), relative * p.reference_norm)
        assert found is not None
        counts.append(found.k)
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0


def test_out_of_reach_is_none() -> None:
    p = layer(40, 6, 3, "identity", noise=1.0)
    best = nearest(p.inputs.numpy(), p.lo.numpy(), p.hi.numpy()).distance
    assert l0.within_tolerance(standardise(p), 0.9 * best) is None


@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_penalised_against_brute_force(activation: str) -> None:
    close = 0
    for seed in range(6):
        p = layer(30, 5, 1, activation, seed=seed)
        penalty = 0.02 * p.reference_norm**2
        best = min(brute(p, k) ** 2 / 2 + penalty * k for k in range(6))
        found = l0.penalised(standardise(p), penalty, ridge=0.0)
        value = found.distance**2 / 2 + penalty * int((found.U != 0).sum())
        assert best * (1 - 1e-4) <= value <= 1.5 * best
        close += value <= best * (1 + 1e-3)
    assert close >= 4


def test_no_live_inputs() -> None:
    p = layer(20, 4, 2)
    p = replace(p, inputs=torch.ones_like(p.inputs))
    s = standardise(p)
    found = l0.within_budget(s, 3)
    W, b = s.restore(found.U, found.c)
    assert int((W != 0).sum()) == 0 and math.isfinite(p.distance(W, b))
    assert l0.within_tolerance(s, 10 * p.reference_norm) is not None
    assert l0.within_tolerance(s, 1e-3 * found.distance) is None
    assert math.isfinite(l0.penalised(s, 1.0).distance)


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("activation", ["relu", "identity", "hardtanh", "leaky"])
@pytest.mark.parametrize("seed", range(3))
def test_polish_only_lowers_the_distance_and_keeps_the_zeros(seed: int, activation: str, power: float) -> None:
    p = layer(50, 12, 5, activation, seed=seed)
    s = standardise(p, power=power)
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(s.U0.shape, generator=g) < 0.4
    U = s.U0 * mask
    before = s.distance(U, s.c0)
    for rounds in (0, 1, 6):
        V, c, after = polish(s, U, s.c0, rounds=rounds)
        assert after <= before * (1 + 1e-12)
        assert bool((V[~mask] == 0).all())
        assert after == pytest.approx(s.distance(V, c), rel=1e-12)
        before = after
    assert rounds and after < s.distance(U, s.c0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["identity", "leaky"])
def test_polish_is_least_squares_for_point_boxes(activation: str, bias: bool) -> None:
    p = layer(40, 10, 4, activation, bias=bias, seed=6, noise=0.3)
    s = standardise(p)
    mask = torch.rand(10, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[:, 3] = False
    U, c, reached = polish(s, s.U0, s.c0, support=mask[s.live], rounds=20, steps=100, tolerance=1e-12)
    W, b = s.restore(U, c)
    square = 0.0
    for m in range(4):
        columns = p.inputs[:, mask[:, m]]
        if bias:
            columns = torch.cat([columns, torch.ones(40, 1, dtype=torch.float64)], 1)
        if columns.shape[1] == 0:
            square += float(p.lo[:, m].square().sum())
            continue
        x = torch.linalg.lstsq(columns, p.lo[:, m : m + 1]).solution[:, 0]
        square += float((columns @ x - p.lo[:, m]).square().sum())
        torch.testing.assert_close(W[mask[:, m], m], x[: int(mask[:, m].sum())], rtol=1e-6, atol=1e-8)
        if bias:
            assert b is not None
            assert float(b[m]) == pytest.approx(float(x[-1]), rel=1e-6, abs=1e-8)
    assert reached == pytest.approx(math.sqrt(square), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", "hardtanh"])
def test_polish_reaches_the_least_distance_of_box_programs(activation: str, bias: bool, dtype: torch.dtype) -> None:
    pytest.importorskip("clarabel")
    p = layer(60, 8, 4, activation, bias=bias, seed=7, noise=0.5)
    best = nearest(p.inputs.numpy(), p.lo.numpy(), p.hi.numpy(), bias=bias).distance
    s = standardise(p, dtype)
    every = torch.ones_like(s.U0, dtype=torch.bool)
    for start in (s.U0, torch.zeros_like(s.U0)):
        reached = polish(s, start, s.c0, support=every, rounds=50, steps=60, tolerance=1e-9)[2]
        assert reached == pytest.approx(best, rel=1e-5)


def test_weights_of_inputs_that_hardly_vary_stay_small() -> None:
    """An input that is seen in one sample can repair that sample at any size of its weight; the ridge keeps it from doing so."""
    p = layer(40, 30, 10, seed=1, dtype=torch.float32)
    rare = p.inputs.clone()
    rare[:, 8:] = 0.0
    rare[torch.arange(22), torch.arange(8, 30)] = 0.02
    q = from_rows(rare, (rare @ p.weights + p.bias).relu(), RELU, p.weights, p.bias)
    free, held = (NetTrim(sparsity=0.4, ridge=ridge).solve(q, 0.8) for ridge in (0.0, 0.001))
    largest = float(p.weights.abs().max())
    assert float(free.weights.abs().max()) > 10 * largest
    assert float(held.weights.abs().max()) < 4 * largest
    assert held.distance == pytest.approx(q.distance(held.weights, held.bias))


def test_rare_inputs_are_not_sampled() -> None:
    """An input that is active in a single row: all of its curvature is in one part, and a step on that part would overshoot."""
    p = layer(4000, 12, 6, seed=1, dtype=torch.float32)
    inputs = p.inputs.clone()
    inputs[:, 3] = 0.0
    inputs[17, 3] = 5.0
    rare = from_rows(inputs, RELU.apply(inputs @ p.weights + p.bias), RELU, p.weights, p.bias)
    common, single = (standardise(q, ridge=0.001, shuffled=True) for q in (p, rare))
    assert l0.row_parts(common).count == 8 and l0.row_parts(single).count <= 2 and l0.row_parts(standardise(p)).count == 1
    unshuffled = standardise(rare, ridge=0.001)
    assert l0.within_budget(single, 30).distance == pytest.approx(l0.within_budget(unshuffled, 30).distance, rel=0.02)


def test_steps_are_relaxed_no_further_than_the_curvature_allows() -> None:
    """Half of the inputs are active in two rows: with steps 1.5 times as long, the distance ends at three times that of all rows."""
    p = layer(2000, 60, 10, seed=1, dtype=torch.float32)
    inputs = p.inputs.clone()
    source = torch.Generator().manual_seed(1)
    for i in range(30):
        inputs[:, i] = 0.0
        inputs[torch.randperm(2000, generator=source)[:2], i] = 5.0
    s = standardise(from_rows(inputs, RELU.apply(inputs @ p.weights + p.bias), RELU, p.weights, p.bias), ridge=0.001, shuffled=True)
    parts = l0.row_parts(s)
    assert parts.count == 2 and 1.0 <= parts.relaxation <= max(1.0, l0.STABLE / l0.curvature(s, 2))
    low = replace(l0.CAREFUL, start=0.01)  # the smaller the penalty, the less it damps
    whole = l0.within_budget(s, 200, parts=l0.Parts(), schedule=low).distance
    assert l0.within_budget(s, 200, schedule=low).distance <= 1.1 * whole
    assert l0.within_budget(s, 200).distance <= 1.1 * whole
    assert l0.within_budget(s, 200, parts=l0.Parts(2, 1.5), schedule=low).distance > 1.5 * whole  # so that the limit is what keeps it


@pytest.mark.parametrize("parts", [2, 5])
def test_curvature_is_the_largest_eigenvalue(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(l0, "MOST_CURVATURE", math.inf)
    s = standardise(layer(600, 10, 3, seed=2), torch.float64, shuffled=True)
    root = torch.linalg.inv(torch.linalg.cholesky(s.gram + 0.03 * torch.eye(10, dtype=torch.float64)))
    largest = max(float(torch.linalg.eigvalsh(root @ (parts * A.T @ A) @ root.T)[-1]) for A in torch.split(s.A, len(s.A) // parts))
    assert l0.curvature(s, parts, steps=200) == pytest.approx(largest, rel=1e-3)


def test_parts_of_the_rows_come_near_all_of_them() -> None:
    p = layer(6000, 40, 10, seed=3, rank=25, noise=0.3, dtype=torch.float32)
    s = standardise(p, ridge=0.001, shuffled=True)
    assert l0.row_parts(s).count > 1
    for k in (40, 120, 240):
        assert l0.within_budget(s, k).distance <= 1.02 * l0.within_budget(s, k, parts=l0.Parts()).distance


class Counted(GramADMM):
    """Counts its passes over the rows."""

    passes = 0

    def refresh(self, part: int = 0, parts: int = 1) -> float:
        Counted.passes += 1
        return super().refresh(part, parts)


@pytest.mark.parametrize("activation, quick, again", [("relu", True, False), ("identity", False, False), ("relu", False, True)])
def test_only_full_effort_on_boxes_passes_over_the_rows_again(
    activation: str, quick: bool, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(l0, "GramADMM", Counted)
    Counted.passes = 0
    found = l0.within_budget(standardise(layer(200, 20, 8, activation, seed=3)), 40, quick=quick)
    assert found.iterations > 10
    assert 10 < Counted.passes < found.iterations if again else Counted.passes == 1


@pytest.mark.parametrize("moved", [0.0, 0.5])
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.95])
def test_quick_weights_see_the_boxes(sparsity: float, moved: float) -> None:
    """They miss the boxes by less than the best weights for the original response do, on linear matching's support or on their own."""
    for seed in range(4):
        p = layer(600, 30, 12, "relu", seed=seed, noise=moved, dtype=torch.float32)
        quick, full = (NetTrim(sparsity=sparsity, effort=effort).solve(p, sparsity) for effort in ("quick", "full"))
        matched = LinearADMM(sparsity=sparsity).solve(p, sparsity)
        assert quick.distance < p.distance(matched.weights, p.bias)
        assert quick.distance <= 1.2 * full.distance


def test_iterations_count_on_through_the_stages_and_end_at_the_limit() -> None:
    s = standardise(layer(200, 20, 8, "relu", seed=3))
    seen: list[int] = []
    free = l0.within_budget(s, 40, watch=lambda iteration, distance, density: seen.append(iteration))
    first = l0.within_budget(s, 40, quick=True).iterations
    assert seen == sorted(set(seen)) and seen[-1] == free.iterations > first and free.converged
    for limit in (first - 1, first, first + 4):
        found = l0.within_budget(s, 40, max_iterations=limit)
        assert found.iterations == limit and not found.converged and int((found.U != 0).sum()) == 40
