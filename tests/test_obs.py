"""The optimal brain surgeon: exact greedy removal and SparseGPT's sweep against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from linear_problems import correlated, generator, on_support, problem
from torch import Tensor

from nettrim import OBS, SparseGPT
from nettrim.methods import obs
from nettrim.methods.linear import gram


def brute_force(H: Tensor, w0: Tensor) -> tuple[list[int], list[float]]:
    """Greedy OBS of one output from its definition: every candidate's least squares anew, by explicit inverses."""
    stay = torch.ones(len(w0), dtype=torch.bool)
    order, costs, before = [], [], 0.0
    for _ in range(len(w0)):
        best = (math.inf, -1)
        for j in stay.nonzero().flatten().tolist():
            stay[j] = False
            d = on_support(H, w0, stay) - w0
            best = min(best, (float(d @ H @ d), j))
            stay[j] = True
        order.append(best[1])
        costs.append(best[0] - before)
        before = best[0]
        stay[best[1]] = False
    return order, costs


@pytest.mark.parametrize("deferred", [1, 3, 96])
@pytest.mark.parametrize("memory", [1, 2**20])
def test_obs_is_the_greedy_removal_of_its_definition(monkeypatch: pytest.MonkeyPatch, deferred: int, memory: int) -> None:
    monkeypatch.setattr(obs, "DEFERRED", deferred)
    monkeypatch.setattr(obs, "MEMORY", memory)
    for seed, N in enumerate((1, 2, 5, 9)):
        H, W = problem(N, 4, seed)
        order, cost = obs.removal_order(H, torch.linalg.inv(H), W)
        for output in range(4):
            expected = brute_force(H, W[:, output])
            assert order[output].tolist() == expected[0]
            torch.testing.assert_close(cost[output], torch.tensor(expected[1], dtype=torch.float64), rtol=1e-7, atol=1e-9)


def test_one_removal_is_the_constrained_least_squares() -> None:
    H, W = problem(6, 3)
    inverse = torch.linalg.inv(H)
    for j in range(6):
        stay = torch.arange(6) != j
        mask = stay[:, None].expand(6, 3)
        solved = obs.least_squares(H, inverse, W, mask)
        step = W - inverse[:, j : j + 1] * (W[j] / inverse[j, j])
        step[j] = 0.0
        torch.testing.assert_close(solved, step)
        torch.testing.assert_close(solved, torch.stack([on_support(H, W[:, m], stay) for m in range(3)], 1))
        torch.testing.assert_close(((solved - W) * (H @ (solved - W))).sum(0), W[j].square() / inverse[j, j])


def test_least_squares_for_any_count_by_either_system() -> None:
    H, W = problem(8, 9, seed=3)
    mask = torch.rand(8, 9, generator=generator(1)).argsort(0) < torch.arange(9)  # 0, 1, ..., 8 weights stay
    solved = obs.least_squares(H, torch.linalg.inv(H), W, mask)
    for m in range(9):
        torch.testing.assert_close(solved[:, m], on_support(H, W[:, m], mask[:, m]))
    assert torch.equal(solved[:, 8], W[:, 8])


def test_removals_are_shared_as_by_a_heap() -> None:
    """Also where a removal is cheaper than the one before it."""
    g = generator(0)
    cost = torch.rand(5, 7, generator=g, dtype=torch.float64)
    order = torch.rand(5, 7, generator=g).argsort(1)
    taken, mask = [0] * 5, torch.ones(7, 5, dtype=torch.bool)
    for removed in range(35):
        assert torch.equal(obs.mask_by_cost(order, cost, 35 - removed), mask)
        row = min((r for r in range(5) if taken[r] < 7), key=lambda r: float(cost[r, taken[r]]))
        mask[order[row, taken[row]], row] = False
        taken[row] += 1


def test_obs_on_a_layer_is_least_squares_on_a_greedy_support() -> None:
    p = correlated(200, 12, 5, seed=2)
    W = OBS(sparsity=0.6, damping=1e-9).solve(p, 0.6).weights
    H = gram(p)
    for m in range(5):
        stay = W[:, m] != 0
        removed = set((~stay).nonzero().flatten().tolist())
        assert removed == set(brute_force(H, p.weights[:, m])[0][: len(removed)])
        torch.testing.assert_close(W[:, m], on_support(H, p.weights[:, m], stay), rtol=1e-5, atol=1e-7)
    assert int((W != 0).sum()) == 24


@pytest.mark.parametrize("block", [1, 2, 5, 16, 17, 100])
def test_sweeps_in_blocks_equal_the_sweep_by_single_inputs(block: int) -> None:
    H, W = problem(17, 6, seed=4)
    mask = torch.rand(17, 6, generator=generator(2)) < 0.4
    swept = obs.sweep(H, W, block, mask=mask)
    assert torch.equal(swept != 0, mask)
    expected, inverse = W.clone(), torch.linalg.inv(H)  # from the definition: OBS on what is left of the inputs
    for i in range(17):
        error = torch.where(mask[i], 0.0, expected[i]) / inverse[0, 0]
        expected[i:] -= torch.outer(inverse[:, 0], error)
        expected[i] *= mask[i]
        inverse = torch.linalg.inv(H[i + 1 :, i + 1 :])
    torch.testing.assert_close(swept, expected)


def test_what_a_sweep_removes_first_moves_later_inputs_as_obs_does() -> None:
    H, W = problem(9, 4, seed=5)
    mask = torch.ones(9, 4, dtype=torch.bool)
    mask[:3] = False
    swept = obs.sweep(H, W, 128, mask=mask)
    torch.testing.assert_close(swept, torch.stack([on_support(H, W[:, m], mask[:, m]) for m in range(4)], 1))


def test_sparsegpt_chooses_by_cost_within_each_block() -> None:
    p = correlated(100, 12, 4, seed=6)
    solution = SparseGPT(sparsity=0.5, block=4).solve(p, 0.5)
    kept = solution.weights != 0
    assert [int(part.sum()) for part in kept.split(4)] == [8, 8, 8]
    H = gram(p)
    H = H + 0.01 * H.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    # the first block is chosen before anything has moved; in a block, U_ii^2 is the inverse's entry with the inputs before i settled
    score = torch.stack([p.weights[i].square() / torch.linalg.inv(H[i:, i:])[0, 0] for i in range(4)])
    assert float(score[kept[:4]].min()) > float(score[~kept[:4]].max())
    torch.testing.assert_close(solution.weights, obs.sweep(H, p.weights, 1, mask=kept))


@pytest.mark.parametrize(
    ("live", "block", "kept"), [("1111111", 3, 9), ("0001111", 3, 6), ("1111000", 2, 7), ("0100010", 2, 4), ("000", 2, 0)]
)
def test_block_budgets(live: str, block: int, kept: int) -> None:
    alive = torch.tensor([c == "1" for c in live])
    shares = obs.block_budgets(alive, 2, block, kept)
    assert sum(shares) == kept and len(shares) == math.ceil(len(live) / block)
    assert all(0 <= share <= 2 * int(part.sum()) for share, part in zip(shares, alive.split(block), strict=True))
    if bool(alive.all()):
        assert all(abs(share - kept * len(part) / len(live)) < 1 for share, part in zip(shares, alive.split(block), strict=True))
