"""Proximal steps against searches that must not beat them."""

from __future__ import annotations

import itertools

import pytest
import torch

from nettrim.preimage import nearest_point
from nettrim.prox import ball_share, keep_largest, largest_mask, soft_threshold, squared_distance_share


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 5.0])
def test_soft_threshold_against_a_grid(threshold: float) -> None:
    grid = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    V = normal(0, 30)
    D = soft_threshold(V, threshold)

    def value(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return threshold * x.abs() + (x - v).square() / 2

    for v, d in zip(V, D, strict=True):
        assert float(value(d, v)) <= float(value(grid, v).min()) + 1e-12
    assert bool((D[V.abs() <= threshold] == 0).all())


def test_soft_threshold_weighted_by_rows() -> None:
    V, weights = normal(1, 5, 4), torch.tensor([0.0, 0.1, 0.5, 1.0, 9.0], dtype=torch.float64)
    D = soft_threshold(V, weights[:, None])
    for i, w in enumerate(weights.tolist()):
        torch.testing.assert_close(D[i], soft_threshold(V[i], w))
    assert torch.equal(D[0], V[0]) and bool((D[4] == 0).all())


@pytest.mark.parametrize("k", range(8))
def test_keep_largest_against_every_support(k: int) -> None:
    V = normal(2, 7)
    V[3] = -V[1]  # a tie
    D = keep_largest(V, k)
    assert int((D != 0).sum()) == k
    best = min(float(V.square().sum() - V[list(s)].square().sum()) for s in itertools.combinations(range(7), k))
    assert float((D - V).square().sum()) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("k", [-1, 0, 1, 5, 11, 12, 99])
def test_counts_are_exact_with_ties(k: int) -> None:
    for V in (torch.ones(3, 4), torch.zeros(3, 4), torch.tensor([1.0, -1.0] * 6).view(3, 4)):
        mask = largest_mask(V, k)
        assert int(mask.sum()) == min(max(k, 0), 12)
        assert torch.equal(mask, largest_mask(V, k))
        assert torch.equal(mask.flatten(), torch.arange(12) < k)  # ties go by position
    assert largest_mask(torch.zeros(0, 3), 2).shape == (0, 3)


def boxes(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    V, a, b = normal(seed, 6), normal(seed + 1, 6), normal(seed + 2, 6)
    lo, hi = torch.minimum(a, b), torch.maximum(a, b)
    lo[0], hi[1] = -torch.inf, torch.inf
    lo[2] = hi[2]
    return 2 * V, lo, hi


def away(Z: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor) -> torch.Tensor:
    return (Z - nearest_point(Z, lo, hi)).norm(dim=-1)


@pytest.mark.parametrize("radius", [0.0, 0.2, 1.0, 50.0])
@pytest.mark.parametrize("seed", range(4))
def test_projection_on_a_neighbourhood_of_a_box(seed: int, radius: float) -> None:
    V, lo, hi = boxes(10 * seed)
    T = nearest_point(V, lo, hi)
    R = T + ball_share(float((V - T).norm()), radius) * (V - T)
    assert float(away(R, lo, hi)) <= radius + 1e-12
    g = torch.Generator().manual_seed(seed)
    tries = R + torch.logspace(-4, 1, 4000, dtype=torch.float64)[:, None] * torch.randn(4000, 6, generator=g, dtype=torch.float64)
    feasible = tries[away(tries, lo, hi) <= radius]
    if radius == 0.0:
        feasible = nearest_point(tries, lo, hi)
    assert bool(((feasible - V).norm(dim=-1) >= (R - V).norm() - 1e-12).all())


@pytest.mark.parametrize("rho", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("seed", range(4))
def test_step_of_the_squared_distance(seed: int, rho: float) -> None:
    V, lo, hi = boxes(10 * seed + 5)
    T = nearest_point(V, lo, hi)
    R = T + squared_distance_share(rho) * (V - T)

    def value(Z: torch.Tensor) -> torch.Tensor:
        return away(Z, lo, hi).square() / 2 + rho / 2 * (Z - V).square().sum(-1)

    g = torch.Generator().manual_seed(seed)
    tries = R + torch.logspace(-4, 1, 4000, dtype=torch.float64)[:, None] * torch.randn(4000, 6, generator=g, dtype=torch.float64)
    assert bool((value(tries) >= value(R) - 1e-12).all())
