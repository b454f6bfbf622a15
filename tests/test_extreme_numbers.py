"""Numbers at the ends of their range: refused before a layer is solved, or pruned, saved and verified with every number finite."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nettrim
from nettrim import LOBS, OBS, LinearADMM, Magnitude, NetTrim, Random, SparseGPT, Wanda, prune, verify
from nettrim.status import Status
from nettrim.tally import root

METHODS: list[Any] = [
    NetTrim(sparsity=0.5, max_iterations=20),
    NetTrim(epsilon=0.1, max_iterations=200),
    NetTrim(epsilon=0.2, norm="l0", max_iterations=5),
    NetTrim(penalty=0.1, max_iterations=50),
    NetTrim(epsilon=0.1, program="halfspace", max_iterations=2),
    NetTrim(epsilon=0.1, program="halfspace", max_iterations=200),
    NetTrim(penalty=0.1, program="halfspace", max_iterations=50),
    Magnitude(sparsity=0.5),
    Random(sparsity=0.5),
    Wanda(sparsity=0.5),
    OBS(sparsity=0.5),
    SparseGPT(sparsity=0.5),
    LinearADMM(sparsity=0.5),
    LOBS(sparsity=0.5, damping=1e-3),
]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


def finite(value: object) -> bool:
    """Whether no number anywhere in plain data is NaN or infinite."""
    if isinstance(value, dict):
        return all(finite(item) for item in value.values())
    if isinstance(value, list):
        return all(finite(item) for item in value)
    return not isinstance(value, float) or math.isfinite(value)


def pruned_and_verified(net: nn.Module, x: Tensor, method: Any, folder: Path, **settings: Any) -> nettrim.PruneResult:
    result = prune(net, [x], method, progress=False, **settings)
    result.save(folder)
    for name in ("report.json", "certificate.json"):
        assert finite(json.loads((folder / name).read_text()))
    verify(folder, net, [x])
    return result


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.describe()}, {m.kind}, {getattr(m, 'max_iterations', '')}")
@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.parametrize("where", ["data", "weights"])
def test_every_method_at_extreme_scales(method: Any, scale: float, where: str, tmp_path: Path) -> None:
    net, x = network(), torch.randn(30, 5, generator=torch.Generator().manual_seed(1))
    if where == "data":
        x = x * scale
    else:
        with torch.no_grad():
            net[0].weight.mul_(scale)
    if isinstance(method, LOBS) and where == "data" and scale > 1:  # its damping is absolute: nothing beside such a Hessian
        with pytest.raises(nettrim.InvalidInput, match=r"layer '0'.*raise damping"):
            prune(net, [x], method, progress=False)
        return
    result = pruned_and_verified(net, x, method, tmp_path)
    if method.kind == "sparsity" and not isinstance(method, LOBS):
        assert result.report.nonzeros <= 0.5 * result.report.weights + 3


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.describe()}, {m.kind}, {getattr(m, 'max_iterations', '')}")
def test_every_method_on_layers_that_put_out_nothing(method: Any, tmp_path: Path) -> None:
    net, x = network(), torch.randn(30, 5, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        net[2].bias.fill_(-100.0)  # dead: what follows sees zeros
        net[4].weight.zero_()
        net[4].bias.zero_()
    result = pruned_and_verified(net, x, method, tmp_path)
    assert [layer.reference_norm for layer in result.report.layers][1:] == [0.0, 0.0]


@pytest.mark.parametrize("method", [m for m in METHODS if m.kind == "sparsity"], ids=lambda m: m.describe())
@pytest.mark.parametrize("zeroed", [[4], [0, 2, 4]])
def test_one_budget_over_layers_that_put_out_zero(method: Any, zeroed: list[int], tmp_path: Path) -> None:
    net, x = network(), torch.randn(30, 5, generator=torch.Generator().manual_seed(1))
    for index in zeroed:
        nn.init.zeros_(net[index].weight)
        nn.init.zeros_(net[index].bias)
    if isinstance(method, LOBS) and zeroed != [4]:
        pytest.skip("its Hessian of inputs that are zero has no inverse, which it says before anything is solved")
    result = pruned_and_verified(net, x, method, tmp_path, allocation="global")
    assert result.report.nonzeros <= 0.5 * result.report.weights


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [100.0, 1e-6])
def test_other_dtypes_near_their_ends(dtype: torch.dtype, scale: float, tmp_path: Path) -> None:
    net, x = network(), torch.randn(30, 5, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        net[0].weight.mul_(scale)
    net, x = net.to(dtype), x.to(dtype)
    for place, method in enumerate((NetTrim(sparsity=0.5, max_iterations=20), NetTrim(epsilon=0.1), Magnitude(sparsity=0.5))):
        pruned_and_verified(net, x, method, tmp_path / str(place))


def test_what_float64_cannot_sum_is_refused_beforehand() -> None:
    net, x = network().double(), torch.randn(30, 5).double()
    with torch.no_grad():
        net[0].weight.mul_(1e120)
    with pytest.raises(nettrim.InvalidInput, match=r"layer '0' must be at most 1e\+100 in size, found .*; scale the weights or the data"):
        prune(net, [x], NetTrim(epsilon=0.1), progress=False)
    assert root(math.inf) == root(math.nan) == torch.finfo(torch.float64).max and root(4.0) == 2.0


class Failing(Magnitude):
    """Cannot solve one of the layers."""

    fails = "2"

    def solve(self, program: Any, target: float, watch: Any = None) -> Any:
        if program.name == self.fails:
            raise nettrim.InvalidInput("no inverse")
        return super().solve(program, target, watch)


def test_a_layer_that_cannot_be_solved_does_not_cost_those_that_were(tmp_path: Path) -> None:
    net, x = network(), torch.randn(30, 5)
    result = pruned_and_verified(net, x, Failing(sparsity=0.5), tmp_path)
    assert [layer.status for layer in result.report.layers] == [Status.CONVERGED, Status.SKIPPED, Status.CONVERGED]
    assert "it could not be solved (no inverse): left as it was" in result.report.layers[1].notes
    assert not result.certificate.holds and torch.equal(result.model[2].weight, net[2].weight)
    Failing.fails = "0"
    with pytest.raises(nettrim.InvalidInput, match="no inverse"):  # nothing is lost yet
        prune(net, [x], Failing(sparsity=0.5), progress=False)


@pytest.mark.parametrize("last", [1, 3])
def test_batches_none_of_whose_rows_are_used(last: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4, 3)).eval()
    batches = list(torch.split(torch.randn(64 + last, 1, 6, 6), 64)) + [torch.randn(1, 1, 6, 6) for _ in range(10)]
    for place, method in enumerate(
        (NetTrim(sparsity=0.5, max_iterations=10), NetTrim(epsilon=0.1, max_iterations=100), Magnitude(sparsity=0.5))
    ):
        for scheme in ("cascade", "parallel"):
            folder = tmp_path / f"{place}{scheme}"
            result = prune(net, batches, method, scheme=scheme, max_samples=40, progress=False)  # type: ignore[arg-type]
            verify(result.save(folder), net, batches)
            assert [layer.rows for layer in result.report.layers][:2] == [40, 40]


class Routed(nn.Module):
    """Sends rows to one of two layers: a batch may send none to one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.never = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, 0] > 0
        out = x.new_zeros(len(x), 2)
        out[first], out[~first] = self.a(x[first]), self.b(x[~first])
        out[x[:, 0] > 1e9] = self.never(x[x[:, 0] > 1e9])
        return out


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
def test_calls_with_no_rows(scheme: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Routed().eval()
    x = torch.randn(20, 3)
    batches = [x[x[:, 0] > 0], x[x[:, 0] <= 0], x]
    result = prune(net, batches, NetTrim(epsilon=0.1), scheme=scheme, progress=False)
    assert [layer.name for layer in result.report.layers] == ["a", "b"]
    (left,) = result.report.model.left_out
    assert left.name == "never" and "never called" in left.reason
    verify(result.save(tmp_path), net, batches)
