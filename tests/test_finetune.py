"""Zeros stay zero while a pruned model is trained on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nettrim
from nettrim import InvalidInput, Magnitude, keep_zeros


def pruned() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    result = nettrim.prune(model, torch.randn(40, 6), Magnitude(sparsity=0.6), progress=False).model
    assert isinstance(result, nn.Sequential)
    return result


def zeros(model: nn.Module) -> list[Tensor]:
    return [layer.weight == 0 for layer in model.modules() if isinstance(layer, nn.Linear)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    x, y = torch.randn(40, 6), torch.randn(40, 3)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


OPTIMIZERS: list[Callable[[nn.Module], torch.optim.Optimizer]] = [
    lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
    lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1),
    lambda model: torch.optim.RMSprop(model.parameters(), lr=0.01, momentum=0.9),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_zeros_stay_and_the_rest_moves(make: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    model = pruned()
    before, start, keys = zeros(model), copy.deepcopy(model.state_dict()), list(model.state_dict())
    optimizer = make(model)
    train(model, optimizer, 1)  # momentum is already there when the keeper comes
    model.load_state_dict(start)
    keep_zeros(model, optimizer)
    train(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(zeros(model), before, strict=True))
    assert not torch.equal(model[0].weight, start["0.weight"])
    assert not torch.equal(model[0].bias, start["0.bias"])
    assert list(model.state_dict()) == keys


def test_remove_and_context_manager() -> None:
    model = pruned()
    before = zeros(model)
    optimizer = OPTIMIZERS[0](model)
    with keep_zeros(model, optimizer):
        train(model, optimizer)
        assert all(torch.equal(a, b) for a, b in zip(zeros(model), before, strict=True))
    train(model, optimizer)
    assert not any(torch.equal(a, b) for a, b in zip(zeros(model), before, strict=True))
    assert not optimizer._optimizer_step_post_hooks
    keeper = keep_zeros(pruned_again := pruned(), other := OPTIMIZERS[1](pruned_again))
    keeper.remove()
    keeper.remove()  # a second time does no harm
    train(pruned_again, other)
    assert int(sum(mask.sum() for mask in zeros(pruned_again))) == 0


def test_context_manager_ends_with_an_error() -> None:
    model = pruned()
    optimizer = OPTIMIZERS[0](model)
    with pytest.raises(KeyboardInterrupt), keep_zeros(model, optimizer):
        raise KeyboardInterrupt
    assert not optimizer._optimizer_step_post_hooks


def test_refused() -> None:
    model = pruned()
    with pytest.raises(InvalidInput, match="holds none of this model's pruned weights"):
        keep_zeros(model, OPTIMIZERS[0](pruned()))
    dense = nn.Linear(3, 3)
    with pytest.raises(InvalidInput, match="no zero weights; prune it first"):
        keep_zeros(dense, OPTIMIZERS[0](dense))


def test_only_the_optimizers_own_weights_matter() -> None:
    model = pruned()
    before = zeros(model)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    with keep_zeros(model, optimizer):
        train(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(zeros(model), before, strict=True))


def test_the_model_can_still_be_copied_and_saved(tmp_path: Path) -> None:
    model = pruned()
    optimizer = OPTIMIZERS[1](model)
    keep_zeros(model, optimizer)
    train(model, optimizer)
    twin = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (twin, loaded):
        assert all(torch.equal(a, b) for a, b in zip(zeros(other), zeros(model), strict=True))
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    train(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(zeros(twin), zeros(model), strict=True))
