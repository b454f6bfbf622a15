"""Sparsity patterns: the projections against every mask there is, counts, random masks, and what is refused."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nettrim.patterns import UNSTRUCTURED, Blocks, NofM, Pattern, parse
from nettrim.prox import largest_mask
from nettrim.status import InvalidInput


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def groups_of(text: str, N: int, M: int) -> Tensor:
    """The group of each weight (N, M), by loops over the weight of PyTorch's form (out, in)."""
    if text == "rows":
        r, c = 1, N
    elif text == "columns":
        r, c = M, 1
    else:
        r, c = map(int, text.split("x"))
    weight = torch.zeros(M, N, dtype=torch.long)
    for out, inp in itertools.product(range(M), range(N)):
        weight[out, inp] = (out // r) * 1000 + inp // c
    return weight.T


def best_n_of_m(V: Tensor, most: int, of: int, k: int, live: list[int]) -> float:
    """The largest sum of squares of all masks that N:M and the count admit, one by one."""
    best = 0.0
    places = [(i, m) for i in live for m in range(V.shape[1])]
    for number in range(min(k, len(places)) + 1):
        for chosen in itertools.combinations(places, number):
            counts: dict[tuple[int, int], int] = {}
            for i, m in chosen:
                counts[i // of, m] = counts.get((i // of, m), 0) + 1
            if all(count <= most for count in counts.values()):
                best = max(best, sum(float(V[place]) ** 2 for place in chosen))
    return best


@pytest.mark.parametrize(("N", "M", "most", "of"), [(4, 2, 2, 4), (5, 2, 1, 2), (6, 1, 2, 4), (7, 1, 3, 5), (3, 3, 2, 4), (2, 2, 1, 3)])
@pytest.mark.parametrize("dead", [(), (0,), (0, 1)])
def test_n_of_m_against_every_mask(N: int, M: int, most: int, of: int, dead: tuple[int, ...]) -> None:
    pattern, live = NofM(most, of), torch.tensor([i not in dead for i in range(N)])
    V = normal(N + M, N, M)
    capacity = pattern.capacity(live, M)
    for k in range(N * M + 1):
        mask = torch.zeros(N, M, dtype=torch.bool)
        mask[live] = pattern.mask(V[live], k, live)
        assert int(mask.sum()) == min(k, capacity)
        assert all(int(part.sum(0).max()) <= most for part in mask.split(of))
        best = best_n_of_m(V, most, of, k, live.nonzero().flatten().tolist())
        assert float(V[mask].square().sum()) == pytest.approx(best, abs=1e-12)


BLOCKS = [
    ("rows", 3, 4),
    ("columns", 3, 4),
    ("2x2", 4, 4),
    ("2x2", 5, 3),
    ("2x3", 7, 5),
    ("4x4", 3, 6),
    ("1x3", 8, 2),
    ("2x1", 2, 5),
    ("1x1", 2, 3),
]


@pytest.mark.parametrize(("text", "N", "M"), BLOCKS)
@pytest.mark.parametrize("dead", [(), (0,), (1, 2)])
def test_whole_groups_against_every_choice(text: str, N: int, M: int, dead: tuple[int, ...]) -> None:
    pattern, group = parse(text), groups_of(text, N, M)
    live = torch.tensor([i not in dead for i in range(N)])
    V = normal(N * M, N, M)
    V[~live] = 0.0
    names = group.unique().tolist()
    assert len(names) <= 12
    value = {name: float(V[group == name].square().sum()) for name in names}
    size = {name: int((group == name).sum()) for name in names}
    alive = [name for name in names if bool(live[(group == name).any(1)].any())]
    choices = [chosen for number in range(len(alive) + 1) for chosen in itertools.combinations(alive, number)]
    assert (pattern.unit(N, M), pattern.least(N, M)) == (max(size.values()), min(size.values()))
    for k in range(N * M + 1):
        mask = torch.zeros(N, M, dtype=torch.bool)
        mask[live] = pattern.mask(V[live], k, live)
        taken = [name for name in names if bool(mask[group == name].any())]
        assert all(bool(mask[(group == name) & live[:, None]].all()) for name in taken)
        assert sum(size[name] for name in taken) <= k
        best = max(sum(value[name] for name in chosen) for chosen in choices if sum(size[name] for name in chosen) <= k)
        assert sum(value[name] for name in taken) == pytest.approx(best, abs=1e-12)
        room = k - sum(size[name] for name in taken)
        assert room < pattern.unit(N, M) or len(taken) == len(alive)


def test_rows_are_neurons_and_columns_are_inputs() -> None:
    weight = torch.tensor([[1.0, 0.0, 9.0], [3.0, 3.0, 3.0]])  # (out, in), as PyTorch keeps it
    assert parse("rows").mask(weight.T, 3).T.tolist() == [[True] * 3, [False] * 3]
    assert parse("columns").mask(weight.T, 2).T.tolist() == [[False, False, True]] * 2
    assert parse("2x1").mask(weight.T, 2).T.tolist() == [[False, False, True]] * 2
    assert parse("1x2").mask(weight.T, 3).T.tolist() == [[False, False, True], [True, True, False]]  # the ragged 9 is a block of its own
    assert parse("1:3").mask(weight.T, 6).T.tolist() == [[False, False, True], [True, False, False]]  # ties by position


def test_no_pattern_is_the_largest() -> None:
    V = normal(0, 5, 4)
    for k in range(21):
        assert torch.equal(UNSTRUCTURED.mask(V, k), largest_mask(V, k))
        assert torch.equal(parse("1x1").mask(V, k), largest_mask(V, k))
    assert torch.equal(NofM(1, 2).mask(torch.ones(4, 1), 1), torch.tensor([True, False, False, False])[:, None])


def patterns() -> st.SearchStrategy[Pattern]:
    small = st.integers(1, 6)
    ratio = st.tuples(small, small).map(lambda pair: NofM(pair[0], pair[0] + pair[1]))
    blocks = st.tuples(small, small).map(lambda pair: Blocks(*pair))
    return st.one_of(st.sampled_from([UNSTRUCTURED, parse("rows"), parse("columns")]), ratio, blocks)


@settings(max_examples=25)
@given(pattern=patterns(), N=st.integers(1, 20), M=st.integers(1, 12), share=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_no_mask_of_the_pattern_comes_nearer(pattern: Pattern, N: int, M: int, share: float, seed: int) -> None:
    V, k = normal(seed, N, M), round(share * N * M)
    V[V.abs() < 0.2] = 0.0  # ties
    mask = pattern.mask(V, k)
    capacity = pattern.capacity(torch.ones(N, dtype=torch.bool), M)
    assert int(mask.sum()) <= k and int(mask.sum()) > min(k, capacity) - pattern.unit(N, M)
    assert torch.equal(mask, pattern.mask(V, k)) and torch.equal(pattern.mask(V * mask, k) & (V != 0), mask & (V != 0))
    reached = float(((V * mask) - V).square().sum())
    generator = torch.Generator().manual_seed(seed)
    for _ in range(8):
        other = pattern.drawn(N, M, k, generator)
        assert int(other.sum()) <= k and int(other.sum()) > min(k, capacity) - pattern.unit(N, M)
        assert reached <= float(((V * other) - V).square().sum()) + 1e-12
        assert bool((pattern.mask(other.double(), k) | ~other).all())  # what is in the pattern already stays


@pytest.mark.parametrize(
    ("text", "N", "M", "k"), [("2:4", 7, 3, 12), ("2:4", 8, 3, 5), ("rows", 4, 6, 12), ("columns", 6, 4, 8), ("2x2", 6, 4, 8)]
)
def test_random_masks_favour_nothing(text: str, N: int, M: int, k: int) -> None:
    pattern, generator = parse(text), torch.Generator().manual_seed(0)
    share = torch.stack([pattern.drawn(N, M, k, generator) for _ in range(1500)]).double().mean(0)
    full = share[: 4 if text == "2:4" else N]  # the last, smaller group of N:M keeps more of its weights
    expected = float(full.mean())
    assert float((full - expected).abs().max()) < 5 * math.sqrt(expected * (1 - expected) / 1500)
    if text == "2:4" and N == 7:
        assert expected == 0.5 and float(share[4:].mean()) == pytest.approx(2 / 3)


def test_names() -> None:
    for text, kind, sparsity in (
        ("2:4", "N:M", 0.5),
        ("1:4", "N:M", 0.75),
        ("rows", "rows", None),
        ("columns", "columns", None),
        ("4x8", "RxC", None),
    ):
        pattern = parse(text)
        assert (pattern.name, pattern.kind, pattern.sparsity) == (text, kind, sparsity)
    assert parse("4x8") == Blocks(outputs=4, inputs=8) and parse("2:4") == NofM(2, 4)
    assert parse(None) == UNSTRUCTURED and (parse(None).name, parse(None).kind, parse(None).sparsity) == ("", "", None)


@pytest.mark.parametrize(
    "text", ["", "4:2", "2:2", "0:4", "2:4:8", "2 : 4", "-1:4", "0x4", "4x0", "4X4", "row", "Rows", "2.0:4", 4, True, ("2", "4")]
)
def test_what_is_no_pattern_is_refused(text: Any) -> None:
    with pytest.raises(InvalidInput, match=r"Magnitude: pattern .*found"):
        parse(text, "Magnitude")
