"""Biases that pruning may add where a layer has no home for an offset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from verdicts import truthful

import nettrim
from nettrim import InvalidInput, Magnitude, NetTrim, prune, verify
from nettrim.layers import add_bias, can_take_bias

X = torch.randn(60, 2, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Layers without bias: without batch-norm, with one that has no offset, and with one that has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv1d(2, 6, 3, padding=1, bias=False)
        self.second, self.scale = nn.Conv1d(6, 5, 1, bias=False), nn.BatchNorm1d(5, affine=False)
        self.third, self.norm = nn.Conv1d(5, 4, 1, bias=False), nn.BatchNorm1d(4)
        self.head = nn.Linear(32, 3, bias=False)
        self.train()
        for _ in range(3):
            self(X)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.scale(self.second(torch.relu(self.first(x)))))
        return self.head(torch.relu(self.norm(self.third(x))).flatten(1))


def keys(model: nn.Module) -> set[str]:
    return set(model.state_dict())


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
def test_biases_are_added_only_where_there_is_no_other_home(scheme: Any, tmp_path: Path) -> None:
    model = Net()
    without = prune(model, X, NetTrim(epsilon=0.2), scheme=scheme, progress=False)
    assert keys(without.model) == keys(model) and without.report.settings["added_biases"] == []
    result = prune(model, X, NetTrim(epsilon=0.2), scheme=scheme, add_bias=True, progress=False)
    added = ["first", "second", "head"]
    assert keys(result.model) - keys(model) == {f"{name}.bias" for name in added} and keys(model) < keys(result.model)
    assert keys(model) == keys(Net())  # the user's own model has none
    assert result.report.settings["added_biases"] == added
    noted = [layer.name for layer in result.report.layers if "it was given a bias (add_bias)" in layer.notes]
    assert noted == added
    assert all(bool(result.model.get_parameter(f"{name}.bias").abs().max() > 0) for name in added)
    assert truthful(result) and truthful(without)
    # one more free parameter for each output: the first layer's program, the same in both runs but for that, can only get better
    first, plain = result.report.layers[0], without.report.layers[0]
    sizes = [float(run.model.get_parameter("first.weight").detach().abs().sum()) for run in (result, without)]
    assert sizes[0] <= sizes[1] * 1.03 and first.reference_norm == plain.reference_norm
    folder = result.save(tmp_path / "out")
    assert verify(folder, Net(), X).holds == result.certificate.holds
    fresh = Net()
    assert nettrim.load(folder, fresh) is fresh
    torch.testing.assert_close(fresh(X), result.model(X))
    again = nettrim.load(folder, fresh)  # into a model that has them already
    torch.testing.assert_close(again(X), result.model(X))


def test_without_weights_a_bias_is_the_mean() -> None:
    """One sample's worth of everything: with a bias, a layer whose output hardly varies needs no weights at all."""
    layer = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(3, 4))
    x = torch.tensor([2.0, -1.0, 0.5, 3.0]).repeat(50, 1) + 0.01 * torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    result = prune(layer, x, NetTrim(epsilon=0.05), add_bias=True, progress=False)
    assert result.report.layers[0].nonzeros == 0
    torch.testing.assert_close(result.model.bias.detach(), x[:, :3].mean(0), rtol=0.02, atol=0.01)
    assert prune(layer, x, NetTrim(epsilon=0.05), progress=False).report.layers[0].nonzeros > 0


def test_methods_that_leave_offsets_alone_leave_zero() -> None:
    result = prune(Net(), X, Magnitude(sparsity=0.5), add_bias=True, progress=False)
    assert result.certificate.holds
    assert result.model.get_parameter("head.bias").dtype == torch.float32


def test_frozen_layers_get_frozen_biases() -> None:
    result = prune(Net().requires_grad_(False), X, NetTrim(epsilon=0.2), add_bias=True, progress=False)
    assert not any(parameter.requires_grad for parameter in result.model.parameters())


class Odd(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def test_modules_that_would_not_use_a_bias_get_none() -> None:
    assert can_take_bias(nn.Linear(2, 2, bias=False)) and not can_take_bias(nn.Linear(2, 2))
    assert not can_take_bias(Odd(2, 2, bias=False)) and not can_take_bias(nn.ReLU())
    conv = nn.Conv2d(4, 6, 3, groups=2, bias=False)
    x = torch.randn(2, 4, 5, 5)
    before = conv(x)
    add_bias(conv)
    assert tuple(conv.bias.shape) == (6,) and torch.equal(conv(x), before) and not can_take_bias(conv)
    torch.manual_seed(0)
    result = prune(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), Odd(6, 3, bias=False)), X, NetTrim(epsilon=0.2), add_bias=True, progress=False)
    assert any(note.startswith("2: it takes no bias") for note in result.report.notes)
    assert result.report.settings["added_biases"] == []


def test_attention_keeps_its_form_and_other_layers_get_biases(tmp_path: Path) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.own, self.head = nn.MultiheadAttention(8, 2, bias=False, batch_first=True), nn.Linear(8, 3, bias=False)
            self.eval()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.own(x, x, x, need_weights=False)[0].mean(1))

    result = prune(Small(), X, NetTrim(epsilon=0.2), add_bias=True, progress=False)
    assert type(result.model.own) is nn.MultiheadAttention and keys(result.model) - keys(Small()) == {"head.bias"}
    assert sum("it takes no bias (attention" in note for note in result.report.notes) == 4
    folder = result.save(tmp_path / "out")
    assert verify(folder, Small(), X).holds
    torch.testing.assert_close(nettrim.load(folder, Small())(X), result.model(X))


def test_files_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    folder = prune(Net(), X, NetTrim(epsilon=0.2), add_bias=True, progress=False).save(tmp_path / "out")
    other = Net()
    other.head = nn.Linear(32, 4, bias=False)
    with pytest.raises(InvalidInput, match=r"head\.bias must be \(4,\)"):
        nettrim.load(folder, other)
    assert other.first.bias is None and keys(other) == keys(Net())
    # a file without the header of this library says nothing of added biases
    plain = tmp_path / "plain.safetensors"
    save_file(nettrim.checkpoint.read_weights(folder / "model.safetensors"), plain)
    with pytest.raises(InvalidInput, match=r"not in the model first.bias, head.bias, second.bias; if add_bias=True made"):
        nettrim.load(plain, Net())
    save_file({"a": torch.zeros(1)}, plain, metadata={"added_biases": "{}"})
    with pytest.raises(InvalidInput, match="must be a list of names"):
        nettrim.load(plain, Net())


def test_verification_names_biases_that_the_report_hides(tmp_path: Path) -> None:
    folder = prune(Net(), X, NetTrim(epsilon=0.2), add_bias=True, progress=False).save(tmp_path / "out")
    content = json.loads((folder / "report.json").read_text())
    content["settings"]["added_biases"] = []
    (folder / "report.json").write_text(json.dumps(content))
    with pytest.raises(nettrim.CertificateError, match="added_biases are not those of the weights"):
        verify(folder, Net(), X)
