"""What outputs count for: against Jacobians, through batch-norm, pooling, in-place activations and layers called twice."""

from __future__ import annotations

import math

import pytest
import torch
from layer_programs import layer
from torch import Tensor, nn

import nettrim
from nettrim import importance
from nettrim.calibration import Calibration
from nettrim.capture import random_state_kept, read_graph, reference_replica
from nettrim.importance import output_importance
from nettrim.program import standardise
from nettrim.status import InvalidInput


def measured(model: nn.Module, x: Tensor, names: list[str], seed: int = 0) -> tuple[dict[str, Tensor], str]:
    with random_state_kept(torch.device("cpu")):
        reference, _ = reference_replica(model.eval(), torch.device("cpu"), x)
        reference.graph = read_graph(reference, names, {}, x)
        return output_importance(reference, names, Calibration([x]), seed)


def net(outputs: int) -> nn.Sequential:
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -2.0, 1.0, 3.0]))
        norm.running_var.copy_(torch.tensor([0.3, 2.0, 1.0, 4.0]))
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        norm,
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 6),
        nn.Tanh(),
        nn.Linear(6, outputs),
    )


def test_one_output_gives_the_squared_gradients_of_folded_preactivations() -> None:
    model, x = net(1).eval(), torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found, notice = measured(model, x, ["0", "5", "7"])
    assert notice == ""
    wide, y = net(1).double().eval(), x.double()
    Z = wide[1](wide[0](y)).detach().requires_grad_(True)  # what the folded weights give
    hidden = wide[5](torch.flatten(wide[3](torch.relu(Z)), 1))
    hidden.retain_grad()
    wide[7](torch.tanh(hidden)).sum().backward()
    assert Z.grad is not None and hidden.grad is not None
    assert torch.allclose(found["0"], Z.grad.square().mean((0, 2, 3)))
    assert torch.allclose(found["5"], hidden.grad.square().mean(0))
    assert torch.equal(found["7"], torch.ones(1, dtype=torch.float64))
    assert all(p.grad is None for p in model.parameters())


def test_many_outputs_add_up() -> None:
    x = torch.randn(4000, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found, _ = measured(net(7), x, ["5"])
    wide, y = net(7).double().eval(), x.double()
    hidden = wide[5](wide[4](wide[3](wide[2](wide[1](wide[0](y)))))).detach()
    slopes = 1 - torch.tanh(hidden).square()
    exact = slopes.square().mean(0) * wide[7].weight.detach().square().sum(0)
    assert torch.allclose(found["5"], exact, rtol=0.15)
    again, _ = measured(net(7), x, ["5"])
    assert torch.equal(found["5"], again["5"])


def test_layers_called_twice_count_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.last = nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.inner(self.inner(x)))

    model, x = Twice(), torch.randn(6, 3)
    found, _ = measured(model, x, ["inner"])
    V, W = model.last.weight.detach().double(), model.inner.weight.detach().double()
    assert torch.allclose(found["inner"], ((V @ W).square() + V.square()).squeeze(0) / 2)


def test_outputs_without_gradients_are_said() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).detach()

    x = torch.randn(20, 4)
    found, notice = measured(Cut(), x, ["layer"])
    assert found == {} and "no gradient" in notice
    result = nettrim.prune(Cut(), x, nettrim.NetTrim(sparsity=0.5), progress=False)
    assert any("importance of outputs is not known" in note for note in result.report.notes)


def test_frozen_networks_have_importance_too() -> None:
    model = net(1)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert set(measured(model, torch.randn(4, 1, 8, 8), ["0", "5"])[0]) == {"0", "5"}


def test_batches_beyond_what_is_needed_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "SAMPLES", 8)
    model, x = net(1), torch.randn(16, 1, 8, 8)
    with random_state_kept(torch.device("cpu")):
        reference, _ = reference_replica(model.eval(), torch.device("cpu"), x[:8])
        reference.graph = read_graph(reference, ["5"], {}, x[:8])
        some, _ = output_importance(reference, ["5"], Calibration([x[:8], x[8:]]), 0)
    assert torch.equal(some["5"], measured(model, x[:8], ["5"])[0]["5"])


def test_weighted_programs_weigh_distances_and_restore_weights() -> None:
    from dataclasses import replace

    p = replace(layer(50, 6, 4, seed=3), importance=torch.tensor([1.0, 4.0, 0.0, 3.0], dtype=torch.float64))
    s = standardise(p, torch.float64, weighted=True)
    assert s.columns is not None and torch.allclose(s.columns.square(), torch.tensor([0.5, 2.0, 1e-3, 1.5], dtype=torch.float64))
    V = p.weights + 0.1
    assert p.bias is not None
    U, c = s.enter(V, p.bias)
    Z = p.preactivation(V, p.bias)
    squares = (Z - torch.minimum(torch.maximum(Z, p.lo), p.hi)).square().sum(0)
    assert s.distance(U, c) == pytest.approx(math.sqrt(float((squares * s.columns.square()).sum())))
    W, b = s.restore(U, c)
    assert b is not None and torch.allclose(W.double(), V, rtol=1e-6) and torch.allclose(b.double(), p.bias, rtol=1e-6, atol=1e-6)
    assert standardise(p).columns is None


def test_importance_moves_weights_to_outputs_that_count() -> None:
    from dataclasses import replace

    p = layer(200, 12, 2, seed=5)
    even = nettrim.NetTrim(sparsity=0.5).solve(p, 0.5)
    first = nettrim.NetTrim(sparsity=0.5).solve(replace(p, importance=torch.tensor([100.0, 1.0], dtype=torch.float64)), 0.5)
    assert int((first.weights[:, 0] != 0).sum()) > int((even.weights[:, 0] != 0).sum())
    assert int((first.weights != 0).sum()) == int((even.weights != 0).sum()) == 12
    uniform = nettrim.NetTrim(sparsity=0.5, importance="uniform")
    assert torch.equal(uniform.solve(replace(p, importance=torch.ones(2, dtype=torch.float64)), 0.5).weights, even.weights)
    with pytest.raises(InvalidInput, match="importance must be"):
        nettrim.NetTrim(sparsity=0.5, importance="outputs")  # type: ignore[arg-type]
