"""Models read from .pt2 programs: the layers, names and outputs of the model that was exported."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

import nettrim
from nettrim.cli import app
from nettrim.experiments import zoo
from nettrim.experiments.models import fully_connected
from nettrim.programs import model_from_program
from nettrim.status import InvalidInput

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d)


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def read_back(model: nn.Module, example: Any, folder: Path) -> nn.Module:
    return model_from_program(nettrim.export(model, example, folder / "net.pt2").path)


def assert_same(model: nn.Module, found: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        assert torch.allclose(found(x), model.eval()(x), rtol=0, atol=1e-5)
    before, after = model.state_dict(), found.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())


class Mixed(nn.Module):
    """Signals, both forms of padding, functions, a shared layer, a parameter of its own, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, padding="same", dilation=2)
        self.depthwise = nn.Conv1d(4, 4, 2, 2, 1, groups=4, bias=False)
        self.norm = nn.BatchNorm1d(4, affine=False)
        self.fc = nn.Linear(20, 20)
        self.scale = nn.Parameter(torch.full((20,), 0.5))
        self.last = nn.Linear(20, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.norm(self.depthwise(F.hardtanh(self.conv(x), -1.0, 2.0))), 0.2)
        y = F.dropout(y.reshape(x.size(0), -1), 0.5, self.training)
        y = self.fc(torch.relu_(self.fc(y))) * self.scale + y
        return self.last(F.gelu(y, approximate="tanh"))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: zoo.resnet(width=4, blocks=1, shortcut="A", image_size=12), (1, 12, 12)),
        (lambda: zoo.vgg_like(width=4, image_size=16), (1, 16, 16)),
        (lambda: zoo.transformer_encoder(width=8, heads=2, layers=1, patch=4, image_size=16), (1, 16, 16)),
        (Mixed, (2, 9)),
    ],
)
def test_it_has_the_layers_names_and_outputs_of_the_model(make: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    model = make().eval()
    found = read_back(model, images(3, *shape), tmp_path)
    assert_same(model, found, images(5, *shape, seed=4))
    wanted = {name: repr(module) for name, module in model.named_modules() if type(module) in LAYERS}
    inside = {name for name in wanted if "attention" in name}  # attention keeps three projections in one parameter
    made = {name: repr(module) for name, module in found.named_modules() if type(module) in LAYERS}
    assert made.items() >= {name: text for name, text in wanted.items() if name not in inside}.items()


class Changed(nn.Module):
    """Reads a value again that was changed in place, and computes sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.last = nn.Linear(4, 6), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        z = torch.relu_(y)
        return self.last((y + z).view(2 * x.shape[0], 3))  # type: ignore[no-any-return]


def test_changes_in_place_are_kept(tmp_path: Path) -> None:
    model = Changed()
    assert_same(model, read_back(model, images(4, 4), tmp_path), images(5, 4, seed=4))


def test_pruning_it_is_pruning_the_model(tmp_path: Path) -> None:
    model = zoo.resnet(width=4, blocks=1, image_size=12)
    batches = [images(20, 1, 12, 12)]
    found = read_back(model, images(3, 1, 12, 12), tmp_path)
    results = [nettrim.prune(network, batches, nettrim.NetTrim(sparsity=0.5), progress=False) for network in (model, found)]
    one, other = (result.report.layers for result in results)
    assert [(layer.name, layer.activation) for layer in one] == [(layer.name, layer.activation) for layer in other]
    first, second = (result.model.state_dict() for result in results)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    results[1].save(tmp_path / "pruned")
    nettrim.verify(tmp_path / "pruned", model, batches)


def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, x = fully_connected((12, 16, 4), seed=3), images(40, 12)
    np.save("data.npy", x.numpy())
    nettrim.export(model, x, "net.pt2")
    given = ["net.pt2", "--data", "data.npy"]
    for arguments in (["prune", *given, "--sparsity", "0.5", "--output", "pruned"], ["verify", "pruned", *given]):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
    wanted = nettrim.prune(model, [x], nettrim.NetTrim(sparsity=0.5), progress=False).model.state_dict()
    found = nettrim.load(tmp_path / "pruned", model).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())


class Unread(nn.Module):
    """Layers that forward does not read, and a batch-norm without its shift."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.spare = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        self.norm.bias = None  # type: ignore[assignment]
        self.lone = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc(x))  # type: ignore[no-any-return]


def test_names_that_the_graph_does_not_read_stay(tmp_path: Path) -> None:
    model = Unread().eval()
    found = read_back(model, images(4, 4), tmp_path)
    assert_same(model, found, images(5, 4, seed=4))
    assert {name for name, _ in found.named_parameters()} == {name for name, _ in model.named_parameters()}
    nettrim.prune(found, [images(9, 4)], nettrim.Magnitude(sparsity=0.5), progress=False).save(tmp_path / "pruned")
    assert int((nettrim.load(tmp_path / "pruned", Unread()).fc.weight == 0).sum()) == 12


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, xs: Any) -> Tensor:
        return self.fc(xs["a"]) if isinstance(xs, dict) else self.fc(xs[0])  # type: ignore[no-any-return]


@pytest.mark.parametrize("given", [[images(3, 4)], {"a": images(3, 4)}])
def test_inputs_inside_of_others_are_refused(given: Any, tmp_path: Path) -> None:
    torch.export.save(torch.export.export(Nested(), (given,)), tmp_path / "net.pt2")
    with pytest.raises(InvalidInput, match=f"one input is a {type(given).__name__}; export the model with plain tensors"):
        model_from_program(tmp_path / "net.pt2")


class Keyed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"scores": self.fc(x)}


class Number(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return self.fc(x) * factor  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "example", "words"),
    [
        (nn.Sequential(nn.LayerNorm(4)), images(3, 4), "no Linear or convolution"),
        (Keyed(), images(3, 4), "a tensor or a tuple"),
        (Number(), {"x": images(3, 4), "factor": 2.0}, "is not a tensor"),
    ],
)
def test_what_cannot_be_read_is_refused(model: nn.Module, example: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=words):
        read_back(model, example, tmp_path)


def test_files_that_are_no_programs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InvalidInput, match="no such file"):
        model_from_program(tmp_path / "net.pt2")
    (tmp_path / "net.pt2").write_bytes(b"something else")
    logger = logging.getLogger("torch.export")  # torch logs a traceback there, by a handler of its own
    logger.addHandler(caplog.handler)
    try:
        with pytest.raises(InvalidInput, match="cannot be read"):
            model_from_program(tmp_path / "net.pt2")
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.records == []
