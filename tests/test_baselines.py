"""The one-shot baselines: what they choose by definition, and on layers and networks. OBS and SparseGPT by themselves: test_obs.py."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from layer_programs import layer
from linear_problems import change, correlated, generator, on_support, problem
from torch import Tensor, nn

from nettrim import OBS, LinearADMM, Magnitude, Random, SparseGPT, Wanda, prune
from nettrim.fold import Fold
from nettrim.methods import linear_admm
from nettrim.methods.linear import gram, response_change
from nettrim.methods.targets import kept_weights
from nettrim.solution import Solution
from nettrim.status import InvalidInput, Status

METHODS: list[Any] = [Magnitude, Random, Wanda, OBS, SparseGPT, LinearADMM]
UPDATING: list[Any] = [OBS, SparseGPT, LinearADMM]


def count(solution: Solution) -> int:
    return int((solution.weights != 0).sum())


def test_wanda_by_definition() -> None:
    p = correlated(60, 10, 6, seed=7)
    solution = Wanda(sparsity=0.7).solve(p, 0.7)
    kept = solution.weights != 0
    score = p.weights.abs() * p.inputs.square().sum(0).sqrt()[:, None]
    assert kept.sum(0).tolist() == [3] * 6
    assert all(float(score[kept[:, m], m].min()) > float(score[~kept[:, m], m].max()) for m in range(6))
    assert torch.equal(solution.weights[kept], p.weights[kept]) and torch.equal(solution.bias, p.bias)
    odd = Wanda(sparsity=0.66).solve(p, 0.66).weights != 0  # 20 of 60: two outputs keep one more
    counts = odd.sum(0)
    assert sorted(counts.tolist()) == [3, 3, 3, 3, 4, 4]
    following = score.sort(0, descending=True).values[3]
    assert set((counts == 4).nonzero().flatten().tolist()) == set(following.topk(2).indices.tolist())


def test_random_by_definition() -> None:
    p = layer(20, 30, 40, seed=8)
    runs = [Random(sparsity=0.8, seed=seed).solve(p, 0.8).weights for seed in (0, 0, 1)]
    other = Random(sparsity=0.8).solve(replace(p, name="other"), 0.8).weights
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2]) and not torch.equal(runs[0], other)
    for W in (*runs, other):
        assert int((W != 0).sum()) == 240
        assert torch.equal(W[W != 0], p.weights[W != 0])
    share = torch.stack([Random(sparsity=0.8, seed=seed).solve(p, 0.8).weights != 0 for seed in range(200)]).double().mean(0)
    assert abs(float(share.mean()) - 0.2) < 1e-12
    assert float((share - 0.2).abs().max()) < 5 * math.sqrt(0.2 * 0.8 / 200)  # every weight is as likely as every other


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("kind", ["random", "correlated"])
def test_least_change_among_one_shot_methods(kind: str, sparsity: float, seed: int) -> None:
    p = layer(300, 60, 20, "identity", seed=seed) if kind == "random" else correlated(300, 60, 20, seed)
    found = {method: change(p, method(sparsity=sparsity).solve(p, sparsity)) for method in METHODS}
    assert found[LinearADMM] <= min(found[m] for m in (Random, Magnitude, Wanda, SparseGPT)) * (1 + 1e-9)
    assert found[OBS] <= found[SparseGPT] <= found[Wanda] * (1 + 1e-9) <= found[Random]


@pytest.mark.parametrize("method", METHODS)
def test_the_change_is_the_norm_of_the_residual(method: Any) -> None:
    p = correlated(80, 15, 6, seed=9)
    solution = method(sparsity=0.6).solve(p, 0.6)
    residual = p.inputs @ (solution.weights - p.weights)
    assert change(p, solution) == pytest.approx(float(residual.norm()), rel=1e-9)
    assert solution.distance == pytest.approx(float(residual.norm()), rel=1e-9)  # the program's boxes are the linear response here
    assert math.hypot(*(float(column.norm()) for column in residual.T)) == pytest.approx(solution.distance, rel=1e-9)


def test_supports_of_small_layers_against_every_other() -> None:
    """Never below the best of all supports of one output, which is what distances are compared with; near it in most layers."""
    ratios = []
    for seed in range(15):
        p = correlated(60, 8, 1, seed)
        H, w = gram(p), p.weights[:, 0]
        best = math.inf
        for chosen in combinations(range(8), 3):
            stay = torch.zeros(8, dtype=torch.bool)
            stay[list(chosen)] = True
            best = min(best, response_change(H, (on_support(H, w, stay) - w)[:, None]))
        ratios.append([change(p, method.solve(p, 0.625)) / best for method in (OBS(sparsity=0.625), LinearADMM(sparsity=0.625, ridge=0.0))])
    found = torch.tensor(ratios)
    assert float(found.min()) >= 1 - 1e-6
    assert float(found[:, 0].median()) < 1.001 and float(found[:, 1].median()) < 1.08


def published_admm(H: Tensor, W0: Tensor, k: int) -> tuple[Tensor, int]:
    """The published iteration step by step, with explicit inverses: H with unit diagonal and ridge; at most 300 steps."""

    def largest(V: Tensor) -> Tensor:
        kept = torch.zeros(V.numel(), dtype=torch.bool)
        kept[V.flatten().abs().topk(k).indices] = True
        return torch.where(kept.view_as(V), V, 0.0)

    D, V, rho, grown = largest(W0), torch.zeros_like(W0), 0.1, False
    support = D != 0
    B = W0
    for step in range(300):
        B = torch.linalg.inv(H + rho * torch.eye(len(H), dtype=H.dtype)) @ (H @ W0 - V + rho * D)
        D = largest(B + V / rho)
        V = V + rho * (B - D)
        if (step + 1) % 3 == 0:
            changed = int(((D != 0) != support).sum())  # what has left and what has come
            support = D != 0
            if changed / k > 0.1:
                rho, grown = rho * 1.3, True
            elif changed / k > 0.005:
                rho, grown = rho * 1.2, True
            elif changed and grown:
                rho *= 1.1
            elif changed:
                rho, D, V = rho / 5, largest(W0), torch.zeros_like(W0)
            elif grown:
                return B, step + 1
            else:
                rho /= 5
            if step >= 30 and changed / k < 0.0003:
                return B, step + 1
    return B, 300


@pytest.mark.parametrize(("N", "M", "share"), [(6, 3, 0.5), (20, 12, 0.3), (15, 400, 0.1), (40, 60, 0.9), (12, 400, 0.98)])
def test_admm_is_the_published_iteration(N: int, M: int, share: float) -> None:
    H, W = problem(N, M, seed=N)
    H = H + 0.01 * H.diagonal().mean() * torch.eye(N, dtype=torch.float64)
    H = H / H.diagonal().sqrt() / H.diagonal().sqrt()[:, None]
    k = round(share * N * M)
    found, steps, settled = linear_admm.within_budget(H, W, k, 300, N * M, None)
    expected = published_admm(H, W, k)
    assert (steps, settled) == (expected[1], steps < 300)
    torch.testing.assert_close(found, expected[0])


def test_conjugate_gradients_solve_on_the_support() -> None:
    H, W = problem(8, 5, seed=10)
    mask = torch.rand(8, 5, generator=generator(3)) < 0.5
    mask[:, 0] = False
    solved = linear_admm.conjugate_gradients(H, H @ W, mask, W * mask, steps=20)
    for m in range(5):
        torch.testing.assert_close(solved[:, m], on_support(H, W[:, m], mask[:, m]), rtol=1e-6, atol=1e-8)
    one = linear_admm.conjugate_gradients(H, H @ W, mask, W * mask, steps=1)
    assert float(((one - W) * (H @ (one - W))).sum()) < float(((W * mask - W) * (H @ (W * mask - W))).sum())


def test_admm_shows_its_progress_and_its_limit() -> None:
    p = correlated(80, 20, 8, seed=11)
    shown: list[tuple[int, float, float]] = []
    solution = LinearADMM(sparsity=0.7).solve(p, 0.7, lambda *now: shown.append(now))
    assert solution.status is Status.CONVERGED and [now[0] for now in shown] == list(range(3, solution.iterations + 1, 3))
    assert all(density == pytest.approx(0.3) and distance > 0 for _, distance, density in shown)
    assert LinearADMM(sparsity=0.7, max_iterations=3).solve(p, 0.7).status is Status.ITERATION_LIMIT


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", [0.0, 0.31, 0.9, 0.999])
@pytest.mark.parametrize("rank", [None, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_counts_are_exact(method: Any, sparsity: float, rank: int | None, dtype: torch.dtype) -> None:
    """Also with fewer independent inputs than weights of an output."""
    p = layer(50, 20, 7, rank=rank, seed=12, dtype=dtype)
    solution = method(sparsity=sparsity).solve(p, sparsity)
    assert solution.status is Status.CONVERGED and solution.weights.dtype == dtype
    assert count(solution) == kept_weights(140, sparsity)
    assert bool(torch.isfinite(solution.weights).all()) and torch.equal(solution.bias, p.bias.to(dtype))
    assert solution.distance == pytest.approx(p.distance(solution.weights, solution.bias), rel=1e-12)
    if sparsity == 0.0:
        torch.testing.assert_close(solution.weights, p.weights.to(dtype))


@pytest.mark.parametrize("method", [OBS, LinearADMM])
def test_inputs_that_depend_on_each_other_lose_weights_for_nothing(method: Any) -> None:
    p = layer(50, 20, 7, "identity", rank=6, seed=13)
    assert change(p, method(sparsity=0.6).solve(p, 0.6)) < 0.02 * float((p.inputs @ p.weights).norm())


@pytest.mark.parametrize("method", [Wanda, *UPDATING])
@pytest.mark.parametrize("dead", [[0, 1, 2], [9], [3, 7], list(range(10))])
def test_dead_inputs_lose_their_weights_and_nothing_else(method: Any, dead: list[int]) -> None:
    p = correlated(40, 10, 4, seed=14)
    alive = torch.tensor([i not in dead for i in range(10)])
    p = replace(p, inputs=p.inputs * alive)
    solution = method(sparsity=0.5).solve(p, 0.5)
    assert not bool(solution.weights[dead].any()) and bool(torch.isfinite(solution.weights).all())
    if method is not Wanda:
        assert count(solution) == min(20, 4 * int(alive.sum()))
    if method in (OBS, LinearADMM) and len(dead) < 10:  # what is dead plays no part in the rest
        rest = replace(p, inputs=p.inputs[:, alive], weights=p.weights[alive])
        own = 1 - count(solution) / rest.weights.numel()
        if own > 0:
            torch.testing.assert_close(solution.weights[alive], method(sparsity=own).solve(rest, own).weights)


@pytest.mark.parametrize("method", METHODS)
def test_batch_norm_is_taken_out_and_put_back(method: Any) -> None:
    p = correlated(60, 10, 6, seed=15)
    raw = method(sparsity=0.6).solve(p, 0.6)
    a = torch.tensor([2.0, -0.5, 30.0, 0.1, 1.0, -3.0], dtype=torch.float64)
    fold = Fold(scale=a, mean=torch.ones_like(a), beta=torch.zeros_like(a), bias=p.bias, home="layer")
    folded = replace(p, weights=fold.weights(p.weights), bias=fold.offset, fold=fold, lo=fold.apply(p.lo), hi=fold.apply(p.hi))
    solution = method(sparsity=0.6).solve(folded, 0.6)
    if method is not Random:  # its draw depends on the last digits of the weights
        torch.testing.assert_close(fold.raw(solution.weights), raw.weights, rtol=1e-6, atol=1e-9)
    assert count(solution) == 24
    torch.testing.assert_close(solution.bias, fold.offset)
    assert solution.distance == pytest.approx(folded.distance(solution.weights, solution.bias))


class Small(nn.Module):
    """A stem with batch-norm, a grouped and a depthwise convolution, a linear head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.norm = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.pair, self.pair_norm = nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6)
        self.depth, self.head = nn.Conv2d(6, 6, 3, groups=6), nn.Linear(6, 5)
        for norm in (self.norm, self.pair_norm):
            assert norm.running_mean is not None and norm.running_var is not None
            nn.init.normal_(norm.running_mean, std=0.3)
            nn.init.uniform_(norm.running_var, 0.3, 2.0)
            nn.init.uniform_(norm.weight, 0.5, 2.0)
            nn.init.uniform_(norm.bias, 0.5, 1.0)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.pair_norm(self.pair(x)))
        return self.head(torch.nn.functional.leaky_relu(self.depth(x), 0.1).mean((2, 3)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
def test_networks(method: Any, scheme: Any) -> None:
    model, x = Small(), torch.randn(20, 2, 8, 8, generator=generator(0))
    sparsity = {"stem": 0.5, "re:pair|depth": 0.37, "head": 0.7}
    first, second = (prune(model, x.split(8), method(sparsity=sparsity), scheme=scheme, max_samples=600, progress=False) for _ in range(2))
    assert first.certificate.holds
    assert [layer.name for layer in first.report.layers] == ["stem", "pair", "depth", "head"]
    for report in first.report.layers:
        wanted = method(sparsity=sparsity).target(report.name)
        assert report.nonzeros == kept_weights(report.weights, wanted), report.name
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
        if not name.endswith("weight"):  # biases and statistics stay
            torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-5, atol=1e-6)
    if method is Random:  # groups of one convolution do not share a mask
        masks = first.masks()["depth"].reshape(6, -1)
        assert any((mask != masks[0]).any() for mask in masks[1:])


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
def test_moments_and_rows_give_the_same_weights(scheme: Any) -> None:
    """A layer whose boxes are points is compressed; the Gram matrix of its inputs, means included, is not changed by that."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4)).double()
    x = torch.rand(50, 12, generator=generator(4), dtype=torch.float64)
    for method in UPDATING:
        result = prune(model, x, method(sparsity=0.5), layers=["2"], scheme=scheme, progress=False)
        hidden = torch.relu(model[0](x)).detach()
        p = replace(layer(50, 10, 4), inputs=hidden, weights=model[2].weight.detach().T, bias=model[2].bias.detach())
        torch.testing.assert_close(result.model[2].weight.T, method(sparsity=0.5).solve(p, 0.5).weights, rtol=1e-6, atol=1e-8)


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    *((method, {"sparsity": 1.0}, f"{method.__name__}: sparsity is the fraction of zeros") for method in METHODS),
    *((method, {"sparsity": {}}, f"{method.__name__}: sparsity is an empty mapping") for method in METHODS),
    (Random, {"sparsity": 0.5, "seed": -1}, "Random: seed must be a whole number of at least 0, found -1"),
    (Random, {"sparsity": 0.5, "seed": True}, "Random: seed"),
    (OBS, {"sparsity": 0.5, "damping": 0.0}, "OBS: damping must be a finite number above 0, found 0"),
    (SparseGPT, {"sparsity": 0.5, "damping": math.nan}, "SparseGPT: damping"),
    (SparseGPT, {"sparsity": 0.5, "damping": "0.1"}, "SparseGPT: damping"),
    (SparseGPT, {"sparsity": 0.5, "block": 0}, "SparseGPT: block must be a whole number of at least 1, found 0"),
    (SparseGPT, {"sparsity": 0.5, "block": 2.0}, "SparseGPT: block"),
    (LinearADMM, {"sparsity": 0.5, "ridge": -0.1}, "LinearADMM: ridge must be a finite number >= 0, found -0.1"),
    (LinearADMM, {"sparsity": 0.5, "ridge": math.inf}, "LinearADMM: ridge"),
    (LinearADMM, {"sparsity": 0.5, "max_iterations": 0}, "LinearADMM: max_iterations"),
]


@pytest.mark.parametrize(("method", "settings", "words"), REFUSED, ids=[f"{m.__name__} {s}" for m, s, _ in REFUSED])
def test_settings_are_refused(method: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        method(**settings)


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_their_settings(method: Any) -> None:
    assert method(sparsity=0.5) == method(sparsity=0.5) != method(sparsity=0.6)
    assert hash(method(sparsity=0.5)) == hash(method(sparsity=0.5))
    by_layer = method(sparsity={"a": 0.5, "re:b.*": 0.6})
    assert [by_layer.target(name) for name in ("a", "b1", "c")] == [0.5, 0.6, None]
    assert method(sparsity=0.5).layer_settings == {"sparsity": 0.5} and method(sparsity=0.5).targets == 0.5
    assert method(sparsity=0.5).describe() == method.__name__
    half = method(sparsity=0.5)
    assert (half.kind, half.program, half.certified_program, half.needs_cascade) == ("sparsity", "none", "", "")


def test_settings_off_their_defaults_are_named() -> None:
    assert SparseGPT(sparsity=0.5, damping=0.05, block=64).describe() == "SparseGPT, damping 0.05, block 64"
    assert Random(sparsity=0.5, seed=3).describe() == "Random, seed 3"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 8, 3), (1, 1, 1), (30, 1, 4), (30, 8, 1)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("zero", ["", "weights", "inputs"])
def test_degenerate_layers(method: Any, shape: tuple[int, int, int], bias: bool, zero: str) -> None:
    p = layer(*shape, bias=bias, seed=16, dtype=torch.float32)
    if zero:
        p = replace(p, **{zero: torch.zeros_like(getattr(p, zero))})
    solution = method(sparsity=0.5).solve(p, 0.5)
    assert solution.weights.shape == p.weights.shape and bool(torch.isfinite(solution.weights).all())
    assert count(solution) <= kept_weights(p.weights.numel(), 0.5) and math.isfinite(solution.distance)
    assert (solution.bias is None) == (not bias)
