"""Every method within its pattern: on networks, against slow twins, at tolerances and penalties, and what is refused."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from layer_programs import layer
from linear_problems import correlated, generator, on_support
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from nettrim import OBS, LinearADMM, Magnitude, NetTrim, Random, SparseGPT, Wanda, prune
from nettrim.methods import obs
from nettrim.methods.linear import gram
from nettrim.methods.targets import check_room, kept_weights
from nettrim.patterns import parse
from nettrim.preimage import nearest_point
from nettrim.program import LayerProgram
from nettrim.status import InvalidInput, Status

GROUPED: list[Any] = [NetTrim, LinearADMM, Magnitude, Wanda, Random]
METHODS: list[Any] = [*GROUPED, OBS, SparseGPT]


class Small(nn.Module):
    """A convolution with batch-norm, a grouped one, a depthwise one and two linear layers; ragged for 2:4 and for blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.pair, self.depth = nn.Conv2d(6, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=8)
        self.fc, self.head = nn.Linear(8, 10), nn.Linear(10, 7)
        assert self.norm.running_var is not None
        nn.init.uniform_(self.norm.running_var, 0.3, 2.0)
        nn.init.normal_(self.norm.weight)  # of both signs
        nn.init.constant_(self.norm.bias, 0.5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = leaky_relu(self.pair(x), 0.1)
        return self.head(leaky_relu(self.fc(self.depth(x).mean((2, 3))), 0.1))


def kept_of(weight: Tensor, convolution_groups: int, text: str) -> tuple[int, int, int]:
    """From the module's weight (out, ...): the most nonzeros in M consecutive inputs (N:M); or the blocks with nonzeros and all blocks."""
    flat = weight.reshape(len(weight), -1) != 0
    if ":" in text:
        of = int(text.split(":")[1])
        return max(int(row[i : i + of].sum()) for row in flat for i in range(0, len(row), of)), 0, int(flat.sum())
    kept = total = 0
    for part in flat.chunk(convolution_groups):
        r, c = (1, part.shape[1]) if text == "rows" else (len(part), 1) if text == "columns" else map(int, text.split("x"))
        for i, j in itertools.product(range(0, len(part), r), range(0, part.shape[1], c)):
            total += 1
            kept += bool(part[i : i + r, j : j + c].any())
    return kept, total, int(flat.sum())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["2:4", "1:3"])
def test_n_of_m_on_networks(method: Any, pattern: str) -> None:
    model, x = Small(), torch.randn(16, 2, 8, 8, generator=generator(0))
    result = prune(model, x, method(pattern=pattern), layers=["stem", "pair", "depth", "fc", "head"], max_samples=100, progress=False)
    assert result.certificate.holds and f"pattern {pattern}" in result.report.method and result.report.settings["pattern"] == pattern
    most, of = map(int, pattern.split(":"))
    for report in result.report.layers:
        assert not report.dead_inputs
        module = getattr(result.model, report.name)
        found, _, nonzeros = kept_of(module.weight, getattr(module, "groups", 1), pattern)
        full, rest = divmod(report.inputs, of)
        assert found == most and nonzeros == report.nonzeros == report.outputs * (full * most + min(rest, most)), report.name
        assert report.target == f"pattern {most}:{of}"


@pytest.mark.parametrize("method", METHODS)
def test_a_sparsity_beside_n_of_m(method: Any) -> None:
    """The sparser of both: 2:4 and 70 % zeros, 2:4 and 20 % zeros; in grouped convolutions too."""
    model, x = Small(), torch.randn(16, 2, 8, 8, generator=generator(1))
    targets = {"stem": 0.7, "pair": 0.7, "fc": 0.2, "head": 0.7}
    result = prune(model, x, method(sparsity=targets, pattern="2:4"), layers=[*targets], scheme="parallel", max_samples=100, progress=False)
    for report in result.report.layers:
        assert not report.dead_inputs
        module = getattr(result.model, report.name)
        found, _, nonzeros = kept_of(module.weight, getattr(module, "groups", 1), "2:4")
        assert found <= 2 and nonzeros == (kept_weights(report.weights, 0.7) if report.name != "fc" else 40), report.name


@pytest.mark.parametrize("method", GROUPED)
@pytest.mark.parametrize("pattern", ["rows", "columns", "2x3", "4x4"])
def test_whole_groups_on_networks(method: Any, pattern: str) -> None:
    model, x = Small(), torch.randn(16, 2, 8, 8, generator=generator(2))
    layers = ["stem", "pair", "fc", "head"]
    result = prune(model, x, method(sparsity=0.5, pattern=pattern), layers=layers, scheme="parallel", max_samples=100, progress=False)
    assert result.certificate.holds
    for report in result.report.layers:
        assert not report.dead_inputs
        module = getattr(result.model, report.name)
        kept, total, nonzeros = kept_of(module.weight, getattr(module, "groups", 1), pattern)
        inputs = report.inputs
        unit = {"rows": inputs, "columns": report.outputs // getattr(module, "groups", 1)}.get(pattern) or 6 + 10 * (pattern == "4x4")
        slack = unit * getattr(module, "groups", 1)  # groups of a convolution are counted each by itself
        assert 0 < kept < total and kept_weights(report.weights, 0.5) - slack < nonzeros <= kept_weights(report.weights, 0.5), report.name


@pytest.mark.parametrize(("N", "most", "of"), [(8, 2, 4), (7, 1, 3), (9, 2, 5)])
def test_obs_with_n_of_m_is_greedy_where_groups_hold_too_many(N: int, most: int, of: int) -> None:
    """From the definition: of the weights in groups that hold too many, the one whose removal leaves the best least squares."""
    p = correlated(120, N, 3, seed=N)
    H = gram(p)
    W = OBS(pattern=f"{most}:{of}", damping=1e-9).solve(p, 0.0).weights
    for m in range(3):
        stay = torch.ones(N, dtype=torch.bool)
        while True:
            crowded = [j for j in range(N) if stay[j] and int(stay[j // of * of : j // of * of + of].sum()) > most]
            if not crowded:
                break
            costs = []
            for j in crowded:
                stay[j] = False
                d = on_support(H, p.weights[:, m], stay) - p.weights[:, m]
                costs.append((float(d @ H @ d), j))
                stay[j] = True
            stay[min(costs)[1]] = False
        assert torch.equal(W[:, m] != 0, stay)
        torch.testing.assert_close(W[:, m], on_support(H, p.weights[:, m], stay), rtol=1e-5, atol=1e-7)


def test_obs_with_n_of_m_and_fewer_goes_on_as_without() -> None:
    p = correlated(120, 8, 3, seed=1)
    half, fewer = (OBS(sparsity=sparsity, pattern="2:4").solve(p, sparsity).weights for sparsity in (0.5, 0.75))
    assert int((fewer != 0).sum()) == 6 and bool(((half != 0) | (fewer == 0)).all())


@pytest.mark.parametrize("deferred", [1, 3, 96])
def test_obs_with_n_of_m_does_not_depend_on_how_the_work_is_cut(monkeypatch: pytest.MonkeyPatch, deferred: int) -> None:
    p = correlated(120, 14, 5, seed=2)
    whole = OBS(pattern="2:4").solve(p, 0.0).weights
    monkeypatch.setattr(obs, "DEFERRED", deferred)
    monkeypatch.setattr(obs, "MEMORY", 1)
    torch.testing.assert_close(OBS(pattern="2:4").solve(p, 0.0).weights, whole)


@pytest.mark.parametrize(("N", "most", "of", "block"), [(12, 2, 4, 128), (12, 2, 4, 4), (13, 1, 3, 5), (11, 3, 8, 1)])
def test_sparsegpt_with_n_of_m_input_by_input(N: int, most: int, of: int, block: int) -> None:
    """The published sweep, one output and one input at a time, with the inverse of what is left anew at each step."""
    p = correlated(150, N, 4, seed=N)
    H = gram(p)
    H = H + 0.01 * H.diagonal().mean() * torch.eye(N, dtype=torch.float64)
    W = SparseGPT(pattern=f"{most}:{of}", block=block).solve(p, 0.0).weights
    for m in range(4):
        w, stay = p.weights[:, m].clone(), torch.zeros(N, dtype=torch.bool)
        for i in range(N):
            if i % of == 0:
                cost = {j: float(w[j] ** 2 / torch.linalg.inv(H[j:, j:])[0, 0]) for j in range(i, min(i + of, N))}
                stay[sorted(cost, key=lambda j: -cost[j])[:most]] = True
            if not stay[i]:
                left = torch.linalg.inv(H[i:, i:])
                w[i:] -= w[i] / left[0, 0] * left[:, 0]
                w[i] = 0.0
        torch.testing.assert_close(W[:, m], w, rtol=1e-7, atol=1e-9)


def test_wanda_and_magnitude_take_the_best_of_each_group() -> None:
    p = correlated(60, 10, 6, seed=7)
    for method, score in ((Wanda, p.weights.abs() * p.inputs.norm(dim=0)[:, None]), (Magnitude, p.weights.abs())):
        W = method(pattern="2:4").solve(p, 0.0).weights
        for part, scores in zip(W.split(4), score.split(4), strict=True):
            for column, own in zip((part != 0).T, scores.T, strict=True):
                assert set(column.nonzero().flatten().tolist()) == set(own.topk(2).indices.tolist())
        assert torch.equal(W[W != 0], p.weights[W != 0])
        rows = method(sparsity=0.5, pattern="rows").solve(p, 0.5).weights
        assert set((rows != 0).any(0).nonzero().flatten().tolist()) == set(score.square().sum(0).topk(3).indices.tolist())


@pytest.mark.parametrize("method", [Wanda, LinearADMM, OBS, SparseGPT, partial(NetTrim, ridge=0.0)])
def test_dead_inputs_take_no_place_in_a_group(method: Any) -> None:
    """Groups are counted over all inputs, dead ones included, as the stored weight has them."""
    p = correlated(80, 12, 5, seed=3)
    alive = torch.ones(12, dtype=torch.bool)
    alive[[0, 5, 6, 7]] = False
    inputs = p.inputs * alive
    Z = inputs @ p.weights + p.bias
    W = method(pattern="2:4").solve(replace(p, inputs=inputs, lo=Z, hi=Z), 0.5).weights
    assert [(part != 0).sum(0).tolist() for part in W.split(4)] == [[2] * 5, [1] * 5, [2] * 5] and not bool(W[~alive].any())


def test_least_distance_within_n_of_m() -> None:
    """Net-Trim's supports of a tiny layer against every other: often the best, never far."""
    ratios = []
    for seed in range(12):
        p = layer(60, 8, 1, "identity", seed=seed)
        H, w = gram(p) - 60 * torch.outer(p.inputs.mean(0), p.inputs.mean(0)), p.weights[:, 0]
        pairs = list(itertools.combinations(range(4), 2))
        best = math.inf
        for first, second in itertools.product(pairs, pairs):
            stay = torch.zeros(8, dtype=torch.bool)
            stay[[*first, *(4 + i for i in second)]] = True
            d = on_support(H, w, stay) - w
            best = min(best, math.sqrt(float(d @ H @ d)))
        ratios.append(NetTrim(pattern="2:4").solve(p, 0.5).distance / best)
    assert min(ratios) > 1 - 1e-6 and sorted(ratios)[6] < 1.001 and max(ratios) < 2.0


def without_weights(p: LayerProgram) -> Tensor:
    """(M,): the least squared distance of each output from its boxes with a bias alone, by ternary search."""
    low, high = torch.full((p.shape[2],), -50.0, dtype=torch.float64), torch.full((p.shape[2],), 50.0, dtype=torch.float64)

    def square(b: Tensor) -> Tensor:
        return (b - nearest_point(b.expand_as(p.lo), p.lo, p.hi)).square().sum(0)

    for _ in range(120):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        better = square(left) <= square(right)
        low, high = torch.where(better, low, left), torch.where(better, right, high)
    return square((low + high) / 2)


@pytest.mark.parametrize("pattern", ["1:2", "rows", "columns", "2x4"])
def test_tolerances(pattern: str) -> None:
    """Within the tolerance and in the pattern; of neurons, as few as can be."""
    p = layer(60, 8, 6, seed=4)
    method = NetTrim(epsilon=0.75, pattern=pattern)
    solution = method.solve(p, 0.75)
    assert method.chosen_norm == "l0" and method.certified_program == ""
    assert solution.status is not Status.INFEASIBLE and solution.distance <= 0.75 * p.reference_norm
    count = int((solution.weights != 0).sum())
    assert 0 < count < 48
    if pattern == "1:2":
        assert all(int(part.sum(0).max()) <= 1 for part in (solution.weights != 0).split(2))
    else:
        assert count == kept_of(solution.weights.T, 1, pattern)[0] * method.chosen.unit(8, 6)
    if pattern == "rows":  # outputs share nothing: the cheapest go, the others stay as they are
        removed = without_weights(p).sort().values.cumsum(0) <= (0.75 * p.reference_norm) ** 2
        assert count == 8 * (6 - int(removed.sum()))


def test_a_pattern_comes_before_a_tolerance() -> None:
    p = layer(60, 8, 6, seed=5)
    for epsilon in (0.001, 0.0):
        solution = NetTrim(epsilon=epsilon, pattern="1:4").solve(p, epsilon)
        assert int((solution.weights != 0).sum()) == 12 and solution.status is Status.INFEASIBLE
        assert solution.tolerance is not None and solution.tolerance_used == solution.distance > solution.tolerance
        assert "pattern 1:4 has no weights within the tolerance" in solution.notes[-1]
        assert solution.distance == NetTrim(pattern="1:4").solve(p, 0.75).distance
    whole = NetTrim(epsilon=0.0, pattern="rows").solve(p, 0.0)  # all rows are in the pattern
    assert whole.status is Status.ORIGINAL_KEPT and whole.distance <= 1e-9


@pytest.mark.parametrize("pattern", ["1:2", "rows", "2x4"])
def test_penalties(pattern: str) -> None:
    p = layer(40, 8, 4, seed=7)
    counts = []
    for penalty in (0.0, 0.002, 0.006, 1e6):
        solution = NetTrim(penalty=penalty * p.reference_norm**2, pattern=pattern).solve(p, penalty * p.reference_norm**2)
        counts.append(int((solution.weights != 0).sum()))
    assert counts[0] == (16 if pattern == "1:2" else 32) and counts == sorted(counts, reverse=True) and counts[-1] == 0 < counts[1]
    if pattern == "rows":
        stay = [int((without_weights(p) / 2 > 8 * penalty * p.reference_norm**2).sum()) for penalty in (0.002, 0.006)]
        assert counts[1:3] == [8 * number for number in stay] and stay[1] < 4


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    *((method, {}, "") for method in METHODS),
    *((method, {"pattern": "rows"}, "") for method in METHODS),
    *((method, {"pattern": "2/4", "sparsity": 0.5}, "pattern must be None, 'N:M'") for method in METHODS),
    *(
        (method, {"pattern": pattern, "sparsity": 0.5}, "takes pattern N:M, or none")
        for method in (OBS, SparseGPT)
        for pattern in ("rows", "4x4")
    ),
    (
        NetTrim,
        {"pattern": "2:4", "epsilon": 0.1, "sparsity": 0.5},
        "exactly one of epsilon, sparsity and penalty; found epsilon and sparsity",
    ),
    (NetTrim, {"pattern": "2:4", "epsilon": 0.1, "norm": "l1"}, "pattern '2:4' needs norm='l0'.*found norm='l1'"),
    (NetTrim, {"pattern": "rows", "epsilon": 0.1, "program": "halfspace"}, "found program='halfspace'"),
    (NetTrim, {"pattern": "2:4", "norm": "l1"}, "needs norm='l0'"),
]


@pytest.mark.parametrize(("method", "given", "words"), REFUSED, ids=[f"{m.__name__} {s}" for m, s, _ in REFUSED])
def test_settings_are_refused(method: Any, given: dict[str, Any], words: str) -> None:
    neither = {"NetTrim": "exactly one of epsilon, sparsity and penalty; found none"}.get(
        method.__name__, "needs a sparsity|takes pattern N:M"
    )
    with pytest.raises(InvalidInput, match=words or neither):
        method(**given)


@pytest.mark.parametrize("method", GROUPED)
def test_groups_larger_than_what_should_stay_are_refused(method: Any) -> None:
    p = replace(layer(20, 12, 3, seed=8), name="fc")
    with pytest.raises(InvalidInput, match=r"layer 'fc': its sparsity leaves 11 of 36 weights.*'rows' \(12 weights\)"):
        method(sparsity=0.7, pattern="rows").solve(p, 0.7)


@pytest.mark.parametrize(("sparsity", "pattern", "groups", "refused"), [
    (0.5, "rows", 1, False), (0.5, "rows", 8, True), (0.0, "rows", 8, False), (0.99, "columns", 1, True), (0.5, "columns", 8, False),
    (0.99, "2:4", 8, False), (0.9, "4x4", 1, False), (0.99, "4x4", 1, True),
])  # fmt: skip
def test_and_beforehand(sparsity: float, pattern: str, groups: int, refused: bool) -> None:
    """A convolution of 8 outputs with 9 inputs for each: as a depthwise one its groups are single neurons."""
    with pytest.raises(InvalidInput, match="less than the smallest group") if refused else nullcontext():
        check_room("NetTrim", parse(pattern), sparsity, "depth", 9, 8, groups)


@pytest.mark.parametrize("method", METHODS)
def test_a_pattern_is_a_setting(method: Any) -> None:
    made = method(pattern="1:4")
    assert (made.kind, made.targets, made.layer_settings, made.target("any")) == ("sparsity", 0.75, {"sparsity": 0.75}, 0.75)
    assert made == method(pattern="1:4") != method(pattern="2:8") and hash(made) == hash(method(pattern="1:4"))
    assert "pattern 1:4" in made.describe() and "pattern" not in method(sparsity=0.5).describe()
    assert method(sparsity={"a": 0.9}, pattern="1:4").target("b") is None
