"""Compiled and data-parallel models: the inner module is worked on, and results come back in the form in which the model came."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nettrim
from nettrim.status import InvalidInput
from nettrim.wrappers import bare_modules, unwrapped, wrapped_as

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile reads it where it runs

X = torch.randn(60, 8, generator=torch.Generator().manual_seed(1))


def network(bias: bool = True) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inside = nn.Sequential(nn.Linear(10, 10), nn.ReLU())
        return nn.Sequential(nn.Linear(8, 10, bias=bias), nn.ReLU(), inside, nn.Linear(10, 3)).eval()


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def within(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Sequential], nn.Module]:
    def wrapped(model: nn.Sequential) -> nn.Module:
        model[2] = wrap(model[2])
        return model

    return wrapped


WRAPS: dict[str, Any] = {
    "compiled": compiled,
    "parallel": nn.DataParallel,
    "both": lambda model: compiled(nn.DataParallel(model)),
    "compiled inside": within(compiled),
    "parallel inside": within(nn.DataParallel),
    "both inside one": lambda model: nn.DataParallel(within(compiled)(model)),
}
wraps = pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)


def kinds(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.modules()]


def values(model: nn.Module) -> list[Tensor]:
    return list(model.state_dict().values())


@wraps
def test_unwrapping_shares_the_tensors_and_wrapping_undoes_it(wrap: Any) -> None:
    model = wrap(network())
    bare = unwrapped(model)
    assert kinds(bare) == kinds(network()) and [*bare.state_dict()] == [*network().state_dict()]
    assert {id(p) for p in bare.parameters()} == {id(p) for p in model.parameters()}
    assert {name: type(m) for name, m in bare_modules(model).items()} == {name: type(m) for name, m in bare.named_modules()}
    again = wrapped_as(copy.deepcopy(bare), model)
    assert kinds(again) == kinds(model) and [*again.state_dict()] == [*model.state_dict()]
    assert not {id(p) for p in again.parameters()} & {id(p) for p in model.parameters()}


@wraps
def test_pruning_saving_and_verifying(wrap: Any, tmp_path: Path) -> None:
    model, bare = wrap(network()), nettrim.prune(network(), [X], sparsity=0.5, progress=False)
    before = copy.deepcopy(model.state_dict())
    result = nettrim.prune(model, [X], sparsity=0.5, progress=False)
    assert kinds(result.model) == kinds(model) == kinds(wrap(network()))
    assert result.certificate == bare.certificate and result.masks().keys() == bare.masks().keys()
    assert all(torch.equal(a, b) for a, b in zip(values(result.model), values(bare.model), strict=True))
    assert torch.equal(result.model(X), bare.model(X))
    assert all(torch.equal(a, b) for a, b in zip(values(model), before.values(), strict=True))
    result.save(tmp_path / "r")
    for reference in (model, network()):
        assert nettrim.verify(tmp_path / "r", reference, [X]).layers
    for home in (wrap(network()), network()):
        assert nettrim.load(tmp_path / "r", home) is home
        assert torch.equal(home(X), bare.model(X))


@wraps
def test_fine_tuning_and_its_certificate(wrap: Any) -> None:
    model = wrap(network())
    result = nettrim.prune(model, [X], sparsity=0.5, progress=False)
    tuned = nettrim.distill(result.model, model, [X], steps=3, progress=False)
    again = nettrim.recertify(result, tuned.model, model, [X])
    assert kinds(tuned.model) == kinds(again.model) == kinds(model)
    optimizer = torch.optim.SGD(result.model.parameters(), 0.1)
    with nettrim.keep_zeros(result.model, optimizer):
        result.model(X).square().sum().backward()
        optimizer.step()
    assert sum(int((value == 0).sum()) for value in values(result.model)) >= sum(
        int(mask.size - mask.sum()) for mask in result.masks().values()
    )
    with nettrim.finetuning(again) as tuning:
        optimizer = torch.optim.SGD(tuning.parameters(), 0.1)
        tuning.model(X).square().sum().backward()
        optimizer.step()
    assert kinds(tuning.model) == kinds(model)
    assert nettrim.recertify(again, tuning.model, model, [X]).certificate.layers
    assert nettrim.compare(model, [X], methods=["magnitude"], sparsities=[0.5], progress=False).runs


@pytest.mark.slow
@wraps
def test_bringing_it_to_where_it_runs(wrap: Any, tmp_path: Path) -> None:
    model = wrap(network())
    small = nettrim.compact(model, X)
    assert kinds(small.model) == kinds(model)
    fast = nettrim.accelerate(model, X, budget=0.01)
    assert type(fast.model) is type(model) or type(model) is nn.Sequential  # whose accelerated form is made from its graph
    torch.testing.assert_close(fast.model(X), model(X))
    assert nettrim.export(model, X, tmp_path / "m.c").path.is_file()
    assert nettrim.bench(model, X, reference=network(), batch_sizes=(2,), seconds=0.01).forms


@wraps
def test_biases_that_pruning_added_are_loaded_into_a_wrapped_model(wrap: Any, tmp_path: Path) -> None:
    result = nettrim.prune(wrap(network(bias=False)), [X], sparsity=0.5, add_bias=True, progress=False)
    result.save(tmp_path / "r")
    assert torch.equal(nettrim.load(tmp_path / "r", wrap(network(bias=False)))(X), result.model(X))


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel, WRAPS["both"]], ids=["compiled", "parallel", "both"])
def test_a_state_dict_of_a_wrapped_model_is_loaded_into_a_bare_one(wrap: Any, tmp_path: Path) -> None:
    state = wrap(network()).state_dict()
    torch.save(state, tmp_path / "w.pt")
    home = network()
    torch.nn.init.zeros_(home[0].weight)
    nettrim.load(tmp_path / "w.pt", home)
    assert torch.equal(home[0].weight, network()[0].weight)
    torch.save({**state, "other": torch.ones(1)}, tmp_path / "w.pt")  # names of which only some have the prefix
    with pytest.raises(InvalidInput, match="do not fit the model"):
        nettrim.load(tmp_path / "w.pt", home)


def test_a_network_whose_own_part_is_called_module_keeps_its_names(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)  # type: ignore[no-any-return]

    model = Own().eval()
    assert unwrapped(model) is model
    result = nettrim.prune(model, [X], sparsity=0.5, progress=False)
    assert result.report.layers[0].name == "module.0"
    result.save(tmp_path / "r")
    assert torch.equal(nettrim.load(tmp_path / "r", Own())(X), result.model(X))


class DistributedDataParallel(nn.Module):
    """Stands for torch's, which needs a process group."""

    __module__ = "torch.nn.parallel.distributed"

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def traced() -> Any:
    with pytest.warns(DeprecationWarning):
        return torch.jit.trace(network(), X)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (traced, "is a TorchScript program"),
        (lambda: DistributedDataParallel(network()), "give its .module in one process"),
        (lambda: network().state_dict(), "model.load_state_dict"),
        (lambda: "weights.pt", "load its weights into it"),
        (lambda: nn.Identity, "found the class Identity; make one"),
        (lambda: torch.export.export(network(), (X,)), "the module that it was exported from"),
        (lambda: 3, "must be an nn.Module, found int"),
        (lambda: nettrim.prune(network(), [X], sparsity=0.5, progress=False), "found PruneResult; give the network in it, its .model"),
    ],
    ids=["traced", "distributed", "state", "file", "class", "program", "number", "result"],
)
def test_what_is_no_module_is_refused_with_what_to_give(make: Any, words: str, tmp_path: Path) -> None:
    given = make()
    calls = [
        lambda: nettrim.prune(given, [X], sparsity=0.5),
        lambda: nettrim.verify(tmp_path, given, [X]),
        lambda: nettrim.compact(given, X),
        lambda: nettrim.accelerate(given, X),
        lambda: nettrim.export(given, X, tmp_path / "m.c"),
        lambda: nettrim.bench(given, X),
        lambda: nettrim.distill(given, network(), [X]),
        lambda: nettrim.compare(given, [X]),
        lambda: nettrim.load(tmp_path, given),
    ]
    for call in calls:
        with pytest.raises(InvalidInput) as caught:
            call()
        assert words in str(caught.value)


def test_modes_of_autograd_do_not_matter() -> None:
    wanted = values(nettrim.prune(network(), [X], sparsity=0.5, progress=False).model)
    with torch.inference_mode():
        made = network()  # its parameters know no gradients
        inside = nettrim.prune(network(), [X.clone()], sparsity=0.5, progress=False)
    with torch.no_grad():
        without = nettrim.prune(network(), [X], sparsity=0.5, progress=False)
    outside = nettrim.prune(made, [X], sparsity=0.5, progress=False)
    trained = nettrim.prune(network().train(), [X], sparsity=0.5, progress=False)
    frozen = nettrim.prune(network().requires_grad_(False), [X], sparsity=0.5, progress=False)
    for result in (inside, without, outside, trained, frozen):
        assert all(torch.equal(a, b) for a, b in zip(values(result.model), wanted, strict=True))
        assert not any(parameter.is_inference() for parameter in result.model.parameters())
    assert trained.model.training and not outside.model.training
    assert not any(parameter.requires_grad for parameter in frozen.model.parameters())
