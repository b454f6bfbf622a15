"""``finetuning``: in any ordinary loop the pruned layers learn, zeros stay, all else is still; and afterwards every flag is as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from newcomers import NEWCOMERS, loss, train, trained
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks

import nettrim
from nettrim import InvalidInput, Magnitude, PruneResult, finetuning

DATA = NEWCOMERS["tabular"].batches()
LEARNED = ("net.0.weight", "net.0.bias", "net.4.weight", "net.5.bias", "net.7.weight", "net.7.bias")


@pytest.fixture(scope="module")
def result() -> PruneResult:
    return nettrim.prune(trained("tabular"), DATA, Magnitude(sparsity=0.6), progress=False)


def zeros(model: nn.Module) -> dict[str, Tensor]:
    return {name: module.weight == 0 for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def changed(model: nn.Module, before: nn.Module) -> set[str]:
    old = before.state_dict()
    return {key for key, value in model.state_dict().items() if not torch.equal(value, old[key])}


def flags(model: nn.Module) -> tuple[dict[str, bool], dict[str, bool]]:
    return {n: p.requires_grad for n, p in model.named_parameters()}, {n: m.training for n, m in model.named_modules()}


def nothing_left() -> bool:
    return not _global_optimizer_post_hooks


def closure_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x, y = DATA[0]

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model, x, y)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    for _ in range(3):
        optimizer.step(closure)  # type: ignore[arg-type]


def scaled_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for x, y in DATA:
        optimizer.zero_grad()
        scaler.scale(loss(model, x, y)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        scaler.step(optimizer)
        scaler.update()


def plain_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    train(model, DATA, optimizer, epochs=2)


class Blended(torch.optim.Optimizer):
    """Spreads each gradient over its whole tensor, as optimizers that work on matrices do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.sub_(0.1 * (parameter.grad + parameter.grad.abs().mean()))


OPTIMIZERS: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], Callable[[nn.Module, torch.optim.Optimizer], None]]] = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True), plain_steps),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.01), plain_steps),
    "adamw foreach": (lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True), plain_steps),
    "adamw fused": (lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True), plain_steps),
    "rmsprop": (lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9), plain_steps),
    "lbfgs": (lambda p: torch.optim.LBFGS(p, lr=0.5, line_search_fn="strong_wolfe"), closure_step),
    "scaled": (lambda p: torch.optim.AdamW(p, lr=0.01), scaled_steps),
    "of one's own": (Blended, plain_steps),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_pruned_layers_learn_and_all_else_is_still(result: PruneResult, name: str) -> None:
    make, steps = OPTIMIZERS[name]
    before, kept = flags(result.model), zeros(result.model)
    own = copy.deepcopy(result.model)
    with finetuning(result) as tuning:
        assert tuning.learned == LEARNED and tuning.model is not result.model
        optimizer = make(tuning.parameters())
        tuning.model.train()
        steps(tuning.model, optimizer)
        assert tuning.model.training and tuning.model.get_submodule("net.3").training  # dropout is the user's
        assert not tuning.model.get_submodule("net.1").training
        assert all(torch.equal(mask, kept[layer]) for layer, mask in zeros(tuning.model).items())
    assert changed(tuning.model, result.model) == set(LEARNED) and flags(tuning.model) == before
    assert all(torch.equal(mask, kept[layer]) for layer, mask in zeros(tuning.model).items())
    assert not changed(result.model, own) and nothing_left()


def test_what_clipping_sees_is_what_can_move(result: PruneResult) -> None:
    x, y = DATA[0]
    with finetuning(result) as tuning:
        loss(tuning.model, x, y).backward()  # type: ignore[no-untyped-call]
        for name, parameter in tuning.named_parameters():
            assert parameter.grad is not None
            if name.endswith("weight"):
                assert bool((parameter.grad[parameter == 0] == 0).all()) and bool((parameter.grad != 0).any())
        assert all(p.grad is None for n, p in tuning.model.named_parameters() if n not in tuning.learned)


def test_all_parameters(result: PruneResult) -> None:
    kept = zeros(result.model)
    with finetuning(result, learn="all") as tuning:
        groups = [{"params": [p], "weight_decay": 0.1 if n.endswith("weight") else 0.0} for n, p in tuning.named_parameters()]
        train(tuning.model, DATA, torch.optim.AdamW(groups, lr=0.01))
    everything = {name for name, _ in result.model.named_parameters()}
    assert changed(tuning.model, result.model) == everything == set(tuning.learned)
    assert all(torch.equal(mask, kept[layer]) for layer, mask in zeros(tuning.model).items())


def test_a_model_of_ones_own_is_trained_itself(result: PruneResult) -> None:
    model = copy.deepcopy(result.model)
    model.train()
    model.get_submodule("net.3").eval()
    model.get_parameter("net.0.bias").requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)  # made before, of everything
    loss(model, *DATA[0]).backward()  # type: ignore[no-untyped-call]
    before, start = flags(model), copy.deepcopy(model)
    with finetuning(model, trained("tabular")) as tuning:
        assert tuning.model is model and tuning.learned == tuple(name for name in LEARNED if name != "net.0.bias")
        optimizer.step()  # gradients from before are not taken to what is still
        train(model, DATA, optimizer)
    assert changed(model, start) == set(tuning.learned) and flags(model) == before


def test_it_ends_with_an_error_and_only_once(result: PruneResult) -> None:
    model = copy.deepcopy(result.model)
    before = flags(model)
    with pytest.raises(KeyboardInterrupt), finetuning(model) as tuning:
        model.train()
        raise KeyboardInterrupt
    assert flags(model) == before and nothing_left()
    model.train()
    tuning.finish()  # a second time does nothing
    assert model.training


def test_without_a_block(result: PruneResult) -> None:
    tuning = finetuning(result)
    train(tuning.model, DATA, torch.optim.Adam(tuning.parameters(), 1e-2))
    tuning.finish()
    assert changed(tuning.model, result.model) == set(LEARNED) and nothing_left()


def test_copies_made_meanwhile_are_plain_models(result: PruneResult, tmp_path: Path) -> None:
    kept = zeros(result.model)
    with finetuning(result) as tuning:
        train(tuning.model, DATA, torch.optim.Adam(tuning.parameters(), 1e-2))
        best = copy.deepcopy(tuning.model)
        torch.save(tuning.model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for model in (best, loaded):
        assert all(torch.equal(mask, kept[layer]) for layer, mask in zeros(model).items())
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
        assert not changed(model, tuning.model)
        model.train()(DATA[0][0])
        assert {"net.1.running_mean", "net.5.running_var"} <= changed(model, tuning.model)


def test_compiled(result: PruneResult) -> None:
    kept = zeros(result.model)
    with finetuning(result) as tuning:
        compiled = torch.compile(tuning.model, backend="eager")
        optimizer = torch.optim.AdamW(tuning.parameters(), lr=0.01, weight_decay=0.1)
        for x, y in DATA:
            compiled.train()
            optimizer.zero_grad()
            nn.functional.cross_entropy(compiled(x), y).backward()
            optimizer.step()
    assert changed(tuning.model, result.model) == set(LEARNED)
    assert all(torch.equal(mask, kept[layer]) for layer, mask in zeros(tuning.model).items())


def test_two_at_once(result: PruneResult) -> None:
    with finetuning(result) as first, finetuning(result, learn="all") as second:
        for tuning in (first, second):
            train(tuning.model, DATA, torch.optim.Adam(tuning.parameters(), 1e-2))
    for tuning in (first, second):
        assert changed(tuning.model, result.model) == set(tuning.learned)


@pytest.mark.parametrize("learn", ["pruned", "all"])
def test_one_projection_of_attention_learns_and_the_others_do_not(learn: Any) -> None:
    """They are parts of one parameter."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    x, y = torch.rand(40, 3, 8), torch.rand(40, 3, 8)
    pruned = nettrim.prune(model, x, Magnitude(sparsity=0.5), layers=["self_attn.q_proj", "linear1"], progress=False)
    with finetuning(pruned, learn=learn) as tuning:
        assert "self_attn.in_proj_weight" in tuning.learned
        optimizer = torch.optim.AdamW(tuning.parameters(), lr=0.01, weight_decay=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            (tuning.model.train()(x) - y).square().mean().backward()
            optimizer.step()
    for part in ("weight", "bias"):
        (q, *others), (q0, *others0) = (
            net.self_attn.get_parameter(f"in_proj_{part}").chunk(3)  # type: ignore[union-attr, operator]
            for net in (tuning.model, pruned.model)
        )
        assert not torch.equal(q, q0) and bool((q[q0 == 0] == 0).all()) == (part == "weight")
        assert all(torch.equal(a, b) == (learn == "pruned") for a, b in zip(others, others0, strict=True)), part
    if learn == "pruned":
        assert nettrim.recertify(pruned, tuning.model, model, x).certificate.trained == ()


def test_the_norm_that_holds_an_offset_is_found_in_every_kind() -> None:
    for name in ("unet", "series", "gru"):
        reference = trained(name)
        model = nettrim.prune(reference, NEWCOMERS[name].batches(), Magnitude(sparsity=0.5), progress=False)
        with finetuning(model) as by_report, finetuning(copy.deepcopy(model.model), reference) as by_graph:
            assert by_report.learned == by_graph.learned
            norms = [key for key in by_report.learned if isinstance(reference.get_submodule(key.rpartition(".")[0]), nn.BatchNorm2d)]
            assert len(norms) == (6 if name == "unet" else 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((nn.Linear(3, 3),), "no zero weights; prune it first"),
        (("model",), "needs what nettrim.prune returned, or a pruned model; found str"),
    ],
)
def test_refused(arguments: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        finetuning(*arguments)
    assert nothing_left()


def test_refused_of_a_result(result: PruneResult) -> None:
    with pytest.raises(InvalidInput, match="learn must be 'pruned' or 'all', found 'some'"):
        finetuning(result, learn="some")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="leave reference out"):
        finetuning(result, trained("tabular"))
    with pytest.raises(InvalidInput, match="nothing was pruned"):
        finetuning(result.model, result.model)
    frozen = copy.deepcopy(result.model).requires_grad_(False)
    with pytest.raises(InvalidInput, match=r"finetuning: all weights of the pruned layers .* are frozen"):
        finetuning(frozen)
