"""Bounds of single layers and of weights not known yet: against every mask of tiny layers, identities, and drawn masks."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from nettrim.bounds import RULES, Block, Entries, Layer, Step, at_most, ball_terms, data_terms, iid_gap, lipschitz, safe_width
from nettrim.bounds.iid import removed_norm, whole_norm
from nettrim.bounds.masks import removed_count
from nettrim.bounds.tails import check_delta, check_share, fixed_count_factor, mask_variance
from nettrim.status import InvalidInput

SHAPES = [(2, 4), (4, 2), (3, 3), (8, 1), (1, 8)]
DELTAS = (0.02, 0.1, 0.3, 0.7)


def tiny(seed: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Weights (N, M) and inputs (5, N) with very unequal sizes every other time."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=g, dtype=torch.float64)
    X = torch.randn(5, shape[0], generator=g, dtype=torch.float64) + 0.5
    if seed % 2:
        W, X = W**3, X * torch.tensor([10.0] + [1.0] * (shape[0] - 1), dtype=torch.float64)
    return W, X


def masks(n: int) -> Tensor:
    """Every mask of n entries, (2^n, n)."""
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=n)), dtype=torch.float64)


def chances(rule: str, B: Tensor, share: float) -> Tensor:
    """The probability of every mask under a rule."""
    n = B.shape[1]
    if rule == "bernoulli":
        return (share * B + (1 - share) * (1 - B)).prod(1)
    fits = B.sum(1) == removed_count(n, share)
    return fits / fits.sum()


def layer_of(W: Tensor, X: Tensor) -> Layer:
    return Layer("layer", [Block(W, X.T @ X)])


@pytest.mark.parametrize("rule", ["bernoulli", "random"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.13, 0.37, 0.5, 0.85])
def test_random_masks_exceed_a_bound_as_rarely_as_stated(rule: str, shape: tuple[int, int], share: float) -> None:
    for seed in range(4):
        W, X = tiny(seed, shape)
        E = 0.3 * tiny(seed + 10, shape)[1]
        B = masks(W.numel())
        D = W * B.view(-1, *shape)
        chance = chances(rule, B, share)
        removed = torch.linalg.matrix_norm(D, 2)
        kept = torch.linalg.matrix_norm(W - D, 2)
        moved = torch.linalg.matrix_norm(E @ (W - D) - X @ D)
        for delta in DELTAS:
            ball, data = ball_terms(layer_of(W, X), rule, share, delta), data_terms(layer_of(W, X), rule, share, delta)
            beyond = (removed > ball.removed * (1 + 1e-12)) | (kept > ball.kept * (1 + 1e-12))
            assert float(chance[beyond].sum()) <= delta
            e, h = float(E.norm(dim=1).max()), float(X.norm(dim=1).max())
            uniform = torch.linalg.vector_norm(E @ (W - D) - X @ D, dim=2).max(1).values  # one mask, all of these inputs
            assert float(chance[uniform > ball.moved(e, h) * (1 + 1e-12)].sum()) <= delta
            assert float(chance[moved > data.moved(float(E.norm())) * (1 + 1e-12)].sum()) <= delta
            assert float(chance[torch.linalg.matrix_norm(X @ D) > data.moved(0.0) * (1 + 1e-12)].sum()) <= delta


@pytest.mark.parametrize("shape", SHAPES)
def test_random_signs_exceed_a_bound_as_rarely_as_stated(shape: tuple[int, int]) -> None:
    for seed, share in itertools.product(range(4), (0.2, 0.5, 0.9)):
        W, X = tiny(seed, shape)
        E = 0.3 * tiny(seed + 10, shape)[1]
        signs = 2 * masks(W.numel()).view(-1, *shape) - 1
        order = W.abs().flatten().argsort()[: removed_count(W.numel(), share)]
        mask = torch.zeros(W.numel(), dtype=torch.bool)
        mask[order] = True
        drawn = signs * W.abs()
        D = drawn * mask.view(shape)
        moved = torch.linalg.matrix_norm(E @ (drawn - D) - X @ D)
        for delta in DELTAS:
            ball, data = ball_terms(layer_of(W, X), "magnitude", share, delta), data_terms(layer_of(W, X), "magnitude", share, delta)
            assert float((torch.linalg.matrix_norm(D, 2) > ball.removed * (1 + 1e-12)).double().mean()) <= delta
            assert float((moved > data.moved(float(E.norm())) * (1 + 1e-12)).double().mean()) <= delta


@pytest.mark.parametrize("shape", SHAPES)
def test_no_mask_exceeds_the_bounds_for_every_mask(shape: tuple[int, int]) -> None:
    for seed, share in itertools.product(range(4), (0.2, 0.5, 0.9)):
        W, X = tiny(seed, shape)
        B = masks(W.numel())
        B = B[B.sum(1) <= removed_count(W.numel(), share)]
        D = W * B.view(-1, *shape)
        ball, data = ball_terms(layer_of(W, X), "any", share, 0.5), data_terms(layer_of(W, X), "any", share, 0.5)
        assert float(torch.linalg.matrix_norm(D, 2).max()) <= ball.removed * (1 + 1e-12)
        assert float(torch.linalg.matrix_norm(W - D, 2).max()) <= min(ball.kept, data.kept) * (1 + 1e-12)
        assert float(torch.linalg.matrix_norm(X @ D).max()) <= data.moved(0.0) * (1 + 1e-12)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_a_fixed_count_is_dominated_by_independent_removals(count: int) -> None:
    """Lemma 2 for several convex functions, by enumeration."""
    W, X = tiny(3, (4, 2))
    n, p = W.numel(), count / 8
    B = masks(n)
    centred = X @ (W * (B - p).view(-1, 4, 2))
    factor = 1 / (1 - float(binom.pmf(count, n, p)))
    independent = (p * B + (1 - p) * (1 - B)).prod(1)
    fixed = (B.sum(1) == count).double()
    fixed /= fixed.sum()
    for of in (lambda Z: Z.square().sum((1, 2)), lambda Z: torch.exp(torch.linalg.matrix_norm(Z, 2)), lambda Z: (Z[:, 0, 0] - 0.3).relu()):
        assert float(fixed @ of(centred)) <= float(independent @ of(factor * centred)) * (1 + 1e-12)
    assert factor <= fixed_count_factor(count, n) * (1 + 1e-12)  # that of the smallest count from which on it is one and the same
    assert 1 < fixed_count_factor(300 * count, 300 * n) < 1.1 and fixed_count_factor(0, n) == 1


def test_the_moments_are_those_of_all_masks() -> None:
    W, X = tiny(1, (3, 3))
    p = 0.3
    B = masks(9)
    chance = chances("bernoulli", B, p)
    D = W * B.view(-1, 3, 3)
    centred = D - p * W
    block = layer_of(W, X).blocks[0]
    mean, energy, slope, jump = block.on_data
    assert float(chance @ (X @ D).square().sum((1, 2))) == pytest.approx(p * p * mean + p * (1 - p) * energy)
    squared = centred @ centred.transpose(1, 2)
    lines, quartic = block.fourths
    exact = float(chance @ squared.square().sum((1, 2)))
    v = p * (1 - p)
    assert exact == pytest.approx(v * v * (lines - 3 * quartic) + v * quartic)
    assert exact <= v * v * lines + v * quartic
    columns = [float(torch.linalg.matrix_norm(X * W[:, m], 2)) for m in range(3)]
    assert max(columns) <= slope
    assert jump == pytest.approx(float((X.norm(dim=0)[:, None] * W.abs()).max()))
    assert block.inputs_norm == pytest.approx(float(torch.linalg.matrix_norm(X, 2)))


@pytest.mark.parametrize("rule", list(RULES))
def test_bounds_increase_with_the_share_and_with_certainty(rule: str) -> None:
    W, X = tiny(1, (30, 20))
    grouped = Layer("groups", [Block(W[:, :11], X.T @ X), Block(W[:15], (X.T @ X)[:15, :15])], 1.7)  # groups that round differently
    for layer in (layer_of(W, X), grouped):
        shares = np.linspace(0.01, 0.99, 30) if layer.factor == 1 else np.arange(0.1, 1, 0.1)
        last = [0.0] * 4
        for share in shares:
            ball, data = ball_terms(layer, rule, float(share), 0.05), data_terms(layer, rule, float(share), 0.05)
            now = [ball.moved(0.0, 1.0), ball.moved(2.0, 1.0), data.moved(0.0), data.moved(20.0)]
            assert all(after >= before * (1 - 1e-12) for before, after in zip(last, now, strict=True))
            last = now
        for small, large in itertools.pairwise((0.5, 0.1, 0.01, 1e-6)):
            assert ball_terms(layer, rule, 0.3, large).moved(1, 1) >= ball_terms(layer, rule, 0.3, small).moved(1, 1)
            assert data_terms(layer, rule, 0.3, large).moved(1) >= data_terms(layer, rule, 0.3, small).moved(1)


def test_data_are_worth_knowing() -> None:
    g = torch.Generator().manual_seed(0)
    W, X = torch.randn(100, 80, generator=g).double(), torch.randn(50, 100, generator=g).double()
    layer = layer_of(W, X)
    h = float(X.norm())  # the ball form, row by row, summed over the rows
    for rule in RULES:
        assert data_terms(layer, rule, 0.3, 0.05).moved(0.0) <= ball_terms(layer, rule, 0.3, 0.05).moved(0.0, h) * (1 + 1e-12)
    drawn = [float((X @ (W * (torch.rand(W.shape, generator=g) < 0.3))).norm()) for _ in range(20)]
    assert max(drawn) < data_terms(layer, "random", 0.3, 0.05).moved(0.0) < 1.6 * max(drawn)


def test_nothing_removed_moves_nothing() -> None:
    W, X = tiny(0, (3, 3))
    for rule in RULES:
        assert ball_terms(layer_of(W, X), rule, 0.0, 0.1).moved(0.0, 5.0) == 0.0
        assert data_terms(layer_of(W, X), rule, 0.0, 0.1).moved(0.0) == 0.0
    assert mask_variance(0.2) == 0.2 * 0.8 and mask_variance(0.8) == 0.25


def test_bounds_travel_along_branches() -> None:
    steps = [
        Step("input"),
        Step("layer", (0,), "a"),
        Step("map", (1,), lipschitz=2.0),
        Step("layer", (2,), "b"),
        Step("sum", (1, 3)),
        Step("constant"),
        Step("stack", (4, 2, 5)),
    ]
    value, before = at_most(steps, lambda name, e: 3 * e + 1)
    assert value == math.hypot(1 + (3 * 2 + 1), 2) and before == {"a": 0.0, "b": 2.0}
    assert lipschitz(steps, {"a": 5.0, "b": 7.0}.__getitem__) == {"a": 1.0, "b": 10.0}


@pytest.mark.parametrize("entries", [Entries(), Entries("uniform", 2.0), Entries(gain=0.5, per="widest")])
@pytest.mark.parametrize(("rule", "share"), [("magnitude", 0.3), ("magnitude", 0.02), ("bernoulli", 0.2)])
def test_weights_that_are_drawn_keep_to_the_bound(entries: Entries, rule: str, share: float) -> None:
    rng, delta, trials = np.random.default_rng(5), 0.2, 60
    sizes, exceeded = (12, 30, 7), np.zeros(3, int)
    gap = iid_gap(sizes, share, delta, rule=rule, entries=entries, radius=2.0)
    for _ in range(trials):
        weights = []
        for N, M in itertools.pairwise(sizes):
            s = entries.deviation(N, M)
            weights.append(
                rng.normal(0, s, (N, M)) if entries.kind == "normal" else rng.uniform(-math.sqrt(3) * s, math.sqrt(3) * s, (N, M))
            )
        pruned = []
        for W in weights:
            ordered = np.sort(np.abs(W), axis=None)[removed_count(W.size, share)] if rule == "magnitude" else None
            keep = np.abs(W) >= ordered if ordered is not None else rng.random(W.shape) >= share
            pruned.append(W * keep)
        x = rng.normal(size=(40, 12))
        x *= 2 / np.linalg.norm(x, axis=1, keepdims=True)
        before, after = np.maximum(x @ weights[0], 0) @ weights[1], np.maximum(x @ pruned[0], 0) @ pruned[1]
        exceeded[0] += np.linalg.norm(after - before, axis=1).max() > gap
        exceeded[1] += np.linalg.norm(weights[0] - pruned[0], 2) > removed_norm(entries, 12, 30, share, rule, delta)
        exceeded[2] += np.linalg.norm(weights[0], 2) > whole_norm(entries, 12, 30, delta)
    assert (exceeded <= binom.ppf(1 - 1e-6, trials, delta)).all()


def test_moments_of_truncated_weights() -> None:
    rng = np.random.default_rng(0)
    for entries, drawn in ((Entries(), rng.normal(size=200_000)), (Entries("uniform"), rng.uniform(-math.sqrt(3), math.sqrt(3), 200_000))):
        for probability in (0.2, 0.7):
            t = entries.below(probability)
            assert np.mean(np.abs(drawn) <= t) == pytest.approx(probability, abs=0.01)
            inside = np.where(np.abs(drawn) <= t, drawn, 0)
            assert entries.moments(t) == pytest.approx((np.mean(inside**2), np.mean(inside**4)), rel=0.05)
    assert Entries().above(0.05) == pytest.approx(1.95996, abs=1e-4)
    assert Entries().moments(Entries().below(1.0)) == (1.0, 3.0)


@pytest.mark.parametrize("share", [0.3, 0.999])
def test_a_tiny_delta_only_makes_bounds_larger(share: float) -> None:
    found = [removed_norm(Entries(), 100, 100, share, "magnitude", delta) for delta in (1e-2, 1e-8, 1e-15, 1e-16, 1e-17, 1e-40)]
    assert found == sorted(found)  # one less half of them is one, in floating point, from the fourth on


def test_the_width_from_which_pruning_is_safe() -> None:
    settings = {"entries": Entries(per="widest")}
    width = safe_width(0.2, 0.05, hidden=2, inputs=20, outputs=5, exponent=0.5, **settings)

    def gap(width: int) -> float:
        return iid_gap((20, width, width, 5), lambda D: D**-0.5, 0.05, **settings)

    assert gap(width) <= 0.2 < gap(width - 1)
    assert all(gap(width * 2**k) <= 0.2 for k in range(8))
    assert safe_width(0.1, 0.05, hidden=2, inputs=20, outputs=5, exponent=0.5, **settings) >= width
    by_chance = safe_width(0.2, 0.05, inputs=20, outputs=5, exponent=0.9, rule="bernoulli", **settings)
    assert iid_gap((20, by_chance, 5), lambda D: D**-0.9, 0.05, rule="bernoulli", **settings) <= 0.2
    with pytest.raises(InvalidInput, match="no width up to"):
        safe_width(1e-3, 0.05, inputs=20, outputs=5, share=0.9)


def test_gaps_of_unknown_weights_are_monotone() -> None:
    for rule in ("magnitude", "bernoulli"):
        gaps = [iid_gap((20, 50, 5), share, 0.05, rule=rule) for share in (0.0, 0.01, 0.1, 0.3, 0.6, 0.9)]
        assert gaps[0] == 0 and gaps == sorted(gaps)
        assert [iid_gap((20, *[50] * k, 5), 0.1, 0.05, rule=rule) for k in (1, 2, 3)] == sorted(
            iid_gap((20, *[50] * k, 5), 0.1, 0.05, rule=rule) for k in (1, 2, 3)
        )
        assert iid_gap((20, 50, 5), 0.1, 0.01, rule=rule) > iid_gap((20, 50, 5), 0.1, 0.2, rule=rule)


@pytest.mark.parametrize("delta", [0, 1, -0.1, 1.5, math.nan, "x", True])
def test_a_delta_outside_its_range_is_refused(delta: object) -> None:
    with pytest.raises(InvalidInput, match="delta must"):
        check_delta(delta)


def test_other_settings_outside_their_range_are_refused() -> None:
    for share in (1, -0.1, math.inf):
        with pytest.raises(InvalidInput, match="share"):
            check_share(share)
    with pytest.raises(InvalidInput, match="'normal' or 'uniform'"):
        Entries("cauchy")
    with pytest.raises(InvalidInput, match="gain must be above 0"):
        Entries(gain=0)
    with pytest.raises(InvalidInput, match="per must be"):
        Entries(per="layer")
    with pytest.raises(InvalidInput, match="rule must be"):
        iid_gap((2, 2), 0.1, 0.1, rule="random")
    with pytest.raises(InvalidInput, match="sizes must be"):
        iid_gap((2,), 0.1, 0.1)
    with pytest.raises(InvalidInput, match="exactly one of share and exponent"):
        safe_width(1, 0.1, inputs=2, outputs=2)
    with pytest.raises(InvalidInput, match="hidden must be"):
        safe_width(1, 0.1, hidden=0, inputs=2, outputs=2, share=0.1)
