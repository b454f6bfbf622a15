"""A layer whose sparsity takes none of its weights is kept to the last bit, whatever the method, the scheme and the dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nettrim import LOBS, OBS, LinearADMM, Magnitude, NetTrim, Random, SparseGPT, Wanda, prune, verify
from nettrim.status import Status

NONE = [
    NetTrim(sparsity=0.0),
    NetTrim(sparsity=0.0, norm="l1"),
    NetTrim(sparsity=0.0, effort="quick"),
    NetTrim(sparsity=0.0, importance="uniform"),
    NetTrim(epsilon=0.0),
    *(kind(sparsity=0.0) for kind in (Magnitude, Random, Wanda, OBS, SparseGPT, LinearADMM, LOBS)),
]
HALF = [NetTrim(sparsity=0.5), *(kind(sparsity=0.5) for kind in (Magnitude, Random, Wanda, OBS, SparseGPT, LinearADMM, LOBS))]


class Net(nn.Module):
    """Batch-norms of tiny and negative factors, a silent channel, groups, offsets in the layer and in the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.b, self.nb = nn.Conv2d(6, 6, 3, padding=1, groups=3), nn.BatchNorm2d(6)
        self.c = nn.Linear(6 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.na(self.a(x)))
        return self.c(torch.relu(self.nb(self.b(h)) + h).flatten(1))


def network(dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    generator = torch.Generator().manual_seed(3)
    net = Net().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for norm in (net.na, net.nb):
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.copy_(torch.randn(6, generator=generator))
            norm.running_var.copy_(torch.rand(6, generator=generator) + 0.1)
            norm.weight[0], norm.weight[1] = 0.0, 1e-9
    return net.to(dtype), torch.randn(5, 2, 4, 4, generator=generator).to(dtype)


def same(first: nn.Module, second: nn.Module) -> bool:
    states = first.state_dict(), second.state_dict()
    return list(states[0]) == list(states[1]) and all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
@pytest.mark.parametrize("method", NONE, ids=lambda m: f"{m.describe()}, {m.kind}")
def test_nothing_asked_for_changes_nothing(dtype: torch.dtype, scheme: Any, method: Any) -> None:
    net, x = network(dtype)
    result = prune(net, [x], method, scheme=scheme, progress=False)
    assert same(result.model, net)
    assert result.certificate.network.achieved == 0.0
    for layer in result.report.layers:
        assert layer.nonzeros == layer.weights and layer.status in (Status.CONVERGED, Status.ORIGINAL_KEPT)


@pytest.mark.parametrize("method", HALF, ids=lambda m: m.describe())
def test_weights_that_are_within_the_budget_already_stay(method: Any, tmp_path: Path) -> None:
    net, x = network(torch.float32)
    pruned = prune(net, [x], Magnitude(sparsity=0.6), progress=False).model
    again = prune(pruned, [x], method, progress=False)
    assert same(again.model, pruned)
    assert all(any("takes none of its weights" in note for note in layer.notes) for layer in again.report.layers)
    verify(again.save(tmp_path), pruned, [x])


@pytest.mark.parametrize("pattern", ["2:4", "rows", "columns", "2x2"])
def test_weights_that_keep_to_the_pattern_already_stay(pattern: str) -> None:
    net, x = network(torch.float32)
    pruned = prune(net, [x], Magnitude(sparsity=0.5, pattern=pattern), layers=["c"], progress=False).model
    again = prune(pruned, [x], NetTrim(sparsity=0.5, pattern=pattern), layers=["c"], progress=False)
    assert same(again.model, pruned)
    others = prune(net, [x], NetTrim(sparsity=0.0, pattern="2:4"), layers=["c"], progress=False)
    assert not same(others.model, net)  # the pattern itself takes some


def test_one_layer_is_kept_while_others_are_pruned() -> None:
    net, x = network(torch.float32)
    result = prune(net, [x], NetTrim(sparsity={"a": 0.5, "b": 0.0, "c": 0.5}), progress=False)
    state, before = result.model.state_dict(), net.state_dict()
    assert all(torch.equal(state[key], before[key]) for key in ("b.weight", "b.bias", "nb.weight", "nb.bias"))
    assert not torch.equal(state["a.weight"], before["a.weight"])
