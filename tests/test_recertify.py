"""Whatever was trained after pruning is certified as what it is: named, with bounds only where they still hold, and verifiable."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from newcomers import BATCH, NEWCOMERS, call, train, trained
from torch import Tensor, nn

import nettrim
from nettrim import CertificateError, InvalidInput, Magnitude, PruneResult, recertify
from nettrim.render import certificate_words


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, 1e-2)


def everything(result: PruneResult, data: Any, mode: bool) -> nn.Module:
    """All parameters, by hand, zeros kept."""
    model = copy.deepcopy(result.model)
    with nettrim.keep_zeros(model, optimizer := adam(model.parameters())):
        train(model, data, optimizer, mode=mode)
    return model


def pruned_only(result: PruneResult, data: Any, keep: bool) -> nn.Module:
    """The pruned layers, by hand, in train mode: batch-norm statistics move."""
    model = copy.deepcopy(result.model)
    names = tuple(f"{layer.name}." for layer in result.report.layers)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(names))
    optimizer = adam([parameter for parameter in model.parameters() if parameter.requires_grad])
    if keep:
        nettrim.keep_zeros(model, optimizer)
    train(model, data, optimizer)
    return model


def helped(result: PruneResult, data: Any, learn: Any) -> nn.Module:
    with nettrim.finetuning(result, learn=learn) as tuning:
        train(tuning.model, data, adam(tuning.parameters()))
    return tuning.model


WAYS: dict[str, Callable[[PruneResult, Any], nn.Module]] = {
    "train(), all": lambda result, data: everything(result, data, True),
    "eval(), all": lambda result, data: everything(result, data, False),
    "train(), pruned": lambda result, data: pruned_only(result, data, True),
    "train(), pruned, zeros lost": lambda result, data: pruned_only(result, data, False),
    "finetuning": lambda result, data: helped(result, data, "pruned"),
    "finetuning, all": lambda result, data: helped(result, data, "all"),
}


def pruned(name: str, scheme: Any = "cascade") -> PruneResult:
    newcomer = NEWCOMERS[name]
    method = nettrim.NetTrim(sparsity=0.7, effort="quick")
    return nettrim.prune(trained(name), newcomer.batches(), method, scheme=scheme, heldout=newcomer.heldout(), progress=False)


@pytest.fixture(scope="module", params=NEWCOMERS)
def case(request: pytest.FixtureRequest) -> tuple[str, PruneResult]:
    return request.param, pruned(request.param)


def moved(reference: nn.Module, model: nn.Module, data: Any) -> float:
    """The outputs' discrepancy, by hand in float64."""
    total = 0.0
    for x, _ in data:
        wide = {k: v.double() for k, v in x.items()} if isinstance(x, dict) else x.double() if x.is_floating_point() else x
        with torch.no_grad():
            outputs = [call(copy.deepcopy(net).double().eval(), wide) for net in (reference, model)]
        pairs = zip(*(output.values() if isinstance(output, dict) else [output] for output in outputs), strict=True)
        total += sum(float((a - b).square().sum()) for a, b in pairs)
    return math.sqrt(total)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_training_is_certified_as_what_it_is(case: tuple[str, PruneResult], way: str, tmp_path: Path) -> None:
    name, result = case
    data, heldout, reference = NEWCOMERS[name].batches(), NEWCOMERS[name].heldout(), trained(name)
    before = copy.deepcopy(reference.state_dict())
    model = WAYS[way](result, data)
    tuned = recertify(result, model, reference, data, heldout=heldout)
    certificate = tuned.certificate
    assert certificate.sound and certificate.heldout is not None and certificate.heldout.samples
    assert certificate.met == ("zeros lost" not in way)
    assert certificate.network.achieved == pytest.approx(moved(reference, model, data), rel=1e-9)
    state = model.state_dict()
    own = {f"{layer.name}.{part}" for layer in certificate.layers for part in ("weight", "bias")}
    differ = {key for key, value in state.items() if not torch.equal(value, before[key])} - own
    offsets = {"net.5.bias", "model.net.5.bias"} | {f"{part}.{i}.bias" for part in ("down", "middle", "joined") for i in (1, 4)}
    assert set(certificate.trained) <= differ <= set(certificate.trained) | offsets
    if way == "finetuning":
        assert certificate.trained == ()
    words = " ".join(certificate_words(certificate))
    assert ("Trained besides the pruned layers: " in words) == bool(certificate.trained)
    assert any("besides the pruned layers" in note for note in tuned.report.notes) == bool(certificate.trained)
    for layer, old in zip(tuned.report.layers, result.report.layers, strict=True):
        assert layer.nonzeros == int((model.get_submodule(layer.name).weight != 0).sum())  # type: ignore[operator, arg-type]
        assert (layer.nonzeros > old.nonzeros) == any("zeros were lost after pruning" in note for note in layer.notes)
    assert (tuned.report.nonzeros > result.report.nonzeros) == ("zeros lost" in way)
    again = nettrim.verify(tuned.save(tmp_path), reference, data, heldout)
    assert again == certificate
    assert all(torch.equal(value, before[key]) for key, value in reference.state_dict().items())


def test_the_folder_serves_as_the_result(tmp_path: Path) -> None:
    result, data, reference = pruned("tabular"), NEWCOMERS["tabular"].batches(), trained("tabular")
    result.save(tmp_path)
    model = nettrim.load(tmp_path, trained("tabular"))
    with nettrim.finetuning(model, reference) as tuning:
        train(model, data, adam(tuning.parameters()))
    assert tuning.learned == ("net.0.weight", "net.0.bias", "net.4.weight", "net.5.bias", "net.7.weight", "net.7.bias")
    tuned = recertify(tmp_path, model, reference, data)
    assert tuned.certificate == recertify(result, model, reference, data).certificate and tuned.certificate.trained == ()


# --- bounds pass only through what both networks compute alike ----------------------------------------------------------------------


class Mixed(nn.Module):
    """A layer that is not pruned before, between and behind pruned ones, each with a norm; positions, and a sum of two branches."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.shift = nn.Parameter(torch.zeros(8))
        self.first, self.norm0 = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.a, self.norm1 = nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8)
        self.middle, self.norm2 = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.b, self.norm3 = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.side = nn.Linear(8, 8) if branches else None
        self.last = nn.Linear(8, 4)
        with torch.no_grad():
            for name, value in self.named_parameters():
                value.copy_(0.5 * torch.randn(value.shape, generator=generator) + float("norm" in name))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm0(self.first(x + self.shift)))
        y = torch.relu(self.norm1(self.a(x)))
        y = torch.relu(self.norm2(self.middle(y)))
        y = self.norm3(self.b(y))
        if self.side is not None:
            y = y + self.side(x)
        out: Tensor = self.last(torch.relu(y))
        return out


FOLDED = ("norm1.", "norm3.")


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
def test_no_bound_is_claimed_that_training_broke(scheme: Any, branches: bool, tmp_path: Path) -> None:
    """Every entry of the state in turn is moved far; a bound that did not see it would be exceeded."""
    reference = Mixed(branches).eval()
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(6))
    result = nettrim.prune(reference, x, Magnitude(sparsity=0.2), layers=["a", "b"], scheme=scheme, progress=False)
    generator = torch.Generator().manual_seed(7)
    bounded = {}
    for key, value in result.model.state_dict().items():
        if key in ("a.weight", "norm1.bias", "b.weight", "b.bias"):
            continue
        model = copy.deepcopy(result.model)
        with torch.no_grad():
            old = model.state_dict()[key]
            old.copy_(old + 7 if not value.is_floating_point() else 3 * old.abs() + torch.rand(old.shape, generator=generator))
        again = recertify(result, model, reference, x)
        assert again.certificate.trained == (key,)
        assert again.certificate.sound, key  # discrepancies are below the bounds that are stated
        network = again.certificate.network
        bounded[key] = (network.bound is not None, *(layer.bound is not None for layer in again.certificate.layers))
        if network.bound is None and result.certificate.network.bound is not None:
            assert key.rpartition(".")[0] in network.reason and "was changed too" in network.reason
        if not branches and key.startswith(("shift", "last.weight")):
            nettrim.verify(again.save(tmp_path), reference, x)
    whole = {key: found for key, found in bounded.items() if key.startswith(FOLDED) or key.endswith("num_batches_tracked")}
    plain = recertify(result, copy.deepcopy(result.model), reference, x).certificate
    assert set(whole.values()) == {(plain.network.bound is not None, *(layer.bound is not None for layer in plain.layers))}
    before = ("shift", "first.", "norm0.weight", "norm0.running")
    for key, found in bounded.items():
        if scheme == "cascade":  # each layer's own distance bounds its output, and that of the last one all that is alike behind it
            assert found[1:] == (True, True) and found[0] == (not key.startswith("last")), key
        elif key.startswith(before):
            assert found == (False, False, False), key
        elif key.startswith(("middle", "norm2.w", "norm2.b", "norm2.r")):
            assert found == (False, True, False), key


def test_a_module_that_is_the_layer_itself_and_more() -> None:
    class Odd(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3)
            self.register_buffer("count", torch.zeros(1))

    torch.manual_seed(0)
    reference, x = Odd(), torch.randn(20, 4)
    result = nettrim.prune(reference, x, Magnitude(sparsity=0.5), progress=False)
    assert result.certificate.network.bound is not None
    model = copy.deepcopy(result.model)
    model.get_buffer("count").add_(1)
    again = recertify(result, model, reference, x).certificate
    assert again.trained == ("count",) and again.network.bound is None and "count was changed too" in again.network.reason


# --- what is said is checked --------------------------------------------------------------------------------------------------------


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def tuned() -> PruneResult:
    result, data = pruned("tabular"), NEWCOMERS["tabular"].batches()
    return recertify(result, WAYS["train(), all"](result, data), trained("tabular"), data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["trained"].remove("net.1.weight"), r"net\.1\.weight differs .* does not name it as trained"),
        (lambda c: c["trained"].clear(), r"net\.1\.weight differs"),
        (lambda c: c.pop("trained"), r"net\.1\.weight differs"),
        (lambda c: c["trained"].append("net.0.weight"), r"net\.0\.weight is stated as trained"),
        (lambda c: c["trained"].append("nowhere"), "nowhere is stated as trained"),
        (lambda c: c["trained"].append(c["trained"][0]), "stated twice, or in another order"),
        (lambda c: c["trained"].reverse(), "stated twice, or in another order"),
    ],
)
def test_verify_wants_exactly_what_differs(tuned: PruneResult, change: Any, message: str, tmp_path: Path) -> None:
    tuned.save(tmp_path)
    edit(tmp_path / "certificate.json", change)
    with pytest.raises(CertificateError, match=message):
        nettrim.verify(tmp_path, trained("tabular"), NEWCOMERS["tabular"].batches())


def test_damaged_entries_are_refused(tuned: PruneResult, tmp_path: Path) -> None:
    tuned.save(tmp_path)
    for wrong, message in (("net.0", "trained must be a list"), ([1], "trained must be a list of texts")):
        edit(tmp_path / "certificate.json", lambda c, wrong=wrong: c.update(trained=wrong))  # type: ignore[misc]
        with pytest.raises(InvalidInput, match=message):
            nettrim.checkpoint.read_certificate(tmp_path)


def test_the_report_names_the_norm_that_is_folded_in(tuned: PruneResult, tmp_path: Path) -> None:
    assert [layer.norm for layer in tuned.report.layers] == ["net.1", "net.5", ""]
    tuned.save(tmp_path)
    edit(tmp_path / "report.json", lambda r: r["layers"][1].update(norm="net.1"))
    with pytest.raises(CertificateError, match=r"net\.4: norm is stated as net\.1, recomputed as net\.5"):
        nettrim.verify(tmp_path, trained("tabular"), NEWCOMERS["tabular"].batches())


def test_a_result_whose_model_was_trained_is_not_saved_with_the_old_certificate(tmp_path: Path) -> None:
    result, data, reference = pruned("tabular"), NEWCOMERS["tabular"].batches(), trained("tabular")
    with nettrim.keep_zeros(result.model, optimizer := adam(result.model.parameters())):
        train(result.model, data, optimizer)
    with pytest.raises(InvalidInput, match=r"not those that its certificate speaks of.*nettrim\.recertify"):
        result.save(tmp_path / "stale")
    assert not (tmp_path / "stale").exists()
    nettrim.verify(recertify(result, result.model, reference, data).save(tmp_path / "new"), reference, data)


def test_zeros_that_come_back_and_go_again() -> None:
    result, data, reference = pruned("tabular"), NEWCOMERS["tabular"].batches(), trained("tabular")
    lost = recertify(result, WAYS["train(), pruned, zeros lost"](result, data), reference, data)
    again = recertify(lost, lost.model, reference, data)
    assert again.report == lost.report
    back = recertify(lost, result.model, reference, data)
    assert not any("zeros were lost" in note for layer in back.report.layers for note in layer.notes)
    assert [layer.nonzeros for layer in back.report.layers] == [layer.nonzeros for layer in result.report.layers]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.net[0].weight.data.fill_(math.nan), r"net\.0\.weight holds NaN or inf"),
        (lambda m: m.net[1].running_var.fill_(math.inf), r"net\.1\.running_var holds NaN or inf"),
        (lambda m: m.net[1].running_var.fill_(-1.0), "puts out NaN or inf on the calibration data"),
        (lambda m: m.net[0].to(torch.float64), r"found another 'net\.0\.weight': .*float64.*float32"),
        (lambda m: m.register_buffer("more", torch.zeros(1)), "found another 'more'"),
        (lambda m: m.net.append(nn.Linear(3, 3)), r"found another 'net\.8\.weight'"),
        (lambda m: m.net.pop(7), r"found another 'net\.7\.weight'"),
        (lambda m: setattr(m.net[1], "eps", 0.5), "computes something else than the reference network with the same state"),
        (lambda m: m.net.__setitem__(2, nn.Tanh()), "computes something else than the reference network"),
    ],
)
def test_what_cannot_be_certified_is_refused_by_name(change: Any, message: str) -> None:
    result, data = pruned("tabular"), NEWCOMERS["tabular"].batches()
    model = copy.deepcopy(result.model)
    change(model)
    with pytest.raises(InvalidInput, match=message):
        recertify(result, model, trained("tabular"), data)


def test_attention_names_what_its_layers_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    x = torch.rand(BATCH, 3, 8, generator=torch.Generator().manual_seed(0))
    result = nettrim.prune(model, x, Magnitude(sparsity=0.5), layers=["self_attn.q_proj", "linear1"], progress=False)
    with nettrim.finetuning(result, learn="all") as tuning:
        optimizer = adam(tuning.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            tuning.model.train()(x).square().mean().backward()
            optimizer.step()
    again = recertify(result, tuning.model, model, x)
    assert {"self_attn.k_proj.weight", "self_attn.out_proj.bias", "norm1.weight", "linear2.weight"} <= set(again.certificate.trained)
    assert not {"self_attn.q_proj.weight", "linear1.bias"} & set(again.certificate.trained)
    nettrim.verify(again.save(tmp_path), model, x)
