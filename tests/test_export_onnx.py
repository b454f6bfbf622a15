"""Export to ONNX and .pt2: what the files compute, batch sizes, and what is refused."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nettrim
from nettrim.calibration import state_hash
from nettrim.deploy import export_onnx, export_program
from nettrim.experiments import zoo
from nettrim.experiments.models import fully_connected
from nettrim.quiet import unheard
from nettrim.solvers.reference import MissingExtra
from nettrim.status import InvalidInput, NetTrimError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SMALL: dict[str, Any] = {
    "lenet5": lambda: zoo.lenet5(width=4, image_size=16),
    "vgg_like": lambda: zoo.vgg_like(width=4, image_size=16),
    "resnet20_a": lambda: zoo.resnet(width=4, blocks=1, shortcut="A", image_size=16),
    "resnet20_b": lambda: zoo.resnet(width=4, blocks=1, shortcut="B", image_size=16),
    "depthwise_separable": lambda: zoo.depthwise_separable(width=4, image_size=16),
    "transformer_encoder": lambda: zoo.transformer_encoder(width=8, heads=2, layers=1, patch=4, image_size=16),
}
LIMITS = {"onnx": 1e-4, "pt2": 1e-5}


def thinned(model: nn.Module, density: float = 0.3) -> nn.Module:
    """Zeros at random in every layer, and statistics of batch-norms that are not ones and zeros."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.weight *= torch.rand(module.weight.shape, generator=generator) < density
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
    return model


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ran(path: Path, x: Tensor) -> Tensor:
    """What the file computes, read anew."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    with unheard():
        made: Tensor = torch.export.load(path).module()(x)
    return made.detach()


def assert_same(model: nn.Module, path: Path, x: Tensor) -> None:
    with torch.no_grad():
        wanted = model.eval()(x)
    assert float((ran(path, x) - wanted).abs().max()) <= LIMITS[path.suffix[1:]] * float(wanted.abs().max())


def test_all_networks_of_the_zoo_are_here() -> None:
    assert SMALL.keys() == zoo.NETWORKS.keys()


# the exporters of torch take seconds whatever the network: a part of the pairs runs every time, the others in the slow run
QUICK = {("lenet5", "onnx"), ("transformer_encoder", "onnx"), ("resnet20_a", "pt2"), ("vgg_like", "pt2")}


@pytest.mark.parametrize(
    ("name", "format"),
    [
        pytest.param(name, format, marks=() if (name, format) in QUICK else pytest.mark.slow, id=f"{name}-{format}")
        for name in SMALL
        for format in LIMITS
    ],
)
def test_networks_of_the_zoo_at_any_batch_size(name: str, format: str, tmp_path: Path) -> None:
    model = thinned(SMALL[name]())
    before = state_hash(model.state_dict())
    made = nettrim.export(model, images(3, 1, 16, 16), tmp_path / f"net.{format}")
    assert made.dynamic and made.checked == (3, 4, 1) and made.notes == ()
    assert made.difference is not None and made.difference <= LIMITS[format]
    assert made.bytes == made.path.stat().st_size and [file.name for file in tmp_path.iterdir()] == [f"net.{format}"]
    for samples in (1, 5):
        assert_same(model, made.path, images(samples, 1, 16, 16, seed=7))
    assert state_hash(model.state_dict()) == before and all(parameter.requires_grad for parameter in model.parameters())


def test_zeros_stay_zeros_and_compacted_shapes_are_small(tmp_path: Path) -> None:
    model = thinned(fully_connected((20, 30, 10, 4), seed=0))
    with torch.no_grad():
        model[3].weight[:, :12] = 0  # nothing reads the first 12 neurons
    small = nettrim.compact(model, images(3, 20)).model
    layers = [module for module in small.modules() if isinstance(module, nn.Linear)]
    assert layers[0].out_features <= 18
    path = nettrim.export(small, images(3, 20), tmp_path / "net.onnx").path
    arrays = [onnx.numpy_helper.to_array(item) for item in onnx.load(path).graph.initializer]
    weights = [array for array in arrays if array.ndim == 2]
    assert sorted(array.shape for array in weights) == sorted(tuple(layer.weight.shape) for layer in layers)
    assert sum(int((array != 0).sum()) for array in weights) == sum(int((layer.weight != 0).sum()) for layer in layers)
    # no file names of the computer it was made on
    assert str(Path(nettrim.__file__).parent).encode() not in path.read_bytes() and b"site-packages" not in path.read_bytes()


class Fixed(nn.Module):
    """Runs on batches of six only."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x.reshape(6, 4))
        return out


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_a_fixed_batch_size_is_kept_and_told(format: str, tmp_path: Path) -> None:
    model = Fixed()
    made = nettrim.export(model, images(6, 4), tmp_path / f"net.{format}")
    assert not made.dynamic and made.checked == (6,) and "fixed at 6" in made.notes[0]
    assert_same(model, made.path, images(6, 4, seed=2))


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_an_example_of_one_sample_and_train_mode(format: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 2)).train()
    made = nettrim.export(model, (images(1, 4), torch.zeros(1, dtype=torch.long)), tmp_path / f"net.{format}")
    assert made.dynamic and made.checked == (1, 2) and model.training
    assert_same(model, made.path, images(6, 4, seed=2))


class Named(nn.Module):
    """Keyword inputs, one of them not a tensor, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, left: Tensor, right: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        return self.fc(left) * factor + right, self.fc(left)


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_keyword_inputs_and_several_outputs(format: str, tmp_path: Path) -> None:
    example = {"left": images(3, 4), "right": images(3, 3, seed=5), "factor": 2.0}
    made = nettrim.export(Named(), example, tmp_path / f"net.{format}")
    assert made.dynamic and made.difference is not None and made.difference <= LIMITS[format]


class Rest(nn.Module):
    """Inputs that forward names nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, **kwargs: Tensor) -> Any:
        return self.layer(kwargs["left"]) + self.layer(kwargs["right"])


class OneAndRest(Rest):
    def forward(self, left: Tensor, **kwargs: Tensor) -> Any:  # type: ignore[override]
        return self.layer(left) + self.layer(kwargs["right"])


@pytest.mark.parametrize("format", ["onnx", "pt2"])
@pytest.mark.parametrize("kind", [Rest, OneAndRest])
def test_what_forward_takes_by_any_name_has_any_batch_size(kind: type[nn.Module], format: str, tmp_path: Path) -> None:
    made = nettrim.export(kind(), {"left": images(4, 6), "right": images(4, 6, seed=2)}, tmp_path / f"m.{format}")
    assert made.dynamic and not made.notes and made.checked == (4, 5, 1)


class Table(nn.Module):
    """An input that is no batch, however many rows it has."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        out: Tensor = self.fc(x) @ table.T
        return out


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_an_input_with_two_rows_is_no_batch(format: str, tmp_path: Path) -> None:
    """Two samples are what torch.export is shown."""
    model, table = Table(), images(2, 3, seed=5)
    made = nettrim.export(model, {"x": images(5, 4), "table": table}, tmp_path / f"net.{format}")
    assert made.dynamic and made.checked == (5, 6, 1)
    if format == "onnx":
        shapes = {item.name: item.shape for item in onnxruntime.InferenceSession(str(made.path)).get_inputs()}
        assert shapes["table"] == [2, 3] and shapes["x"][0] != 2


class Several(nn.Module):
    """Outputs inside of outputs, of an input that is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        x += 1.0
        y = self.fc(x)
        return y, (y * 2, {"third": y - 1, "class": y.argmax(1)})


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_nested_outputs_and_an_example_that_the_model_would_change(format: str, tmp_path: Path) -> None:
    example = images(5, 4)
    made = nettrim.export(Several(), example, tmp_path / f"net.{format}")
    assert made.dynamic and made.difference is not None and made.difference <= LIMITS[format]
    assert torch.equal(example, images(5, 4))


def test_the_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        path = nettrim.export(nn.Linear(4, 3), images(2, 4), tmp_path / "net.pt2").path
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_what_cannot_be_followed_is_refused(format: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="data-dependent"):
        nettrim.export(Branching(), images(3, 4), tmp_path / f"net.{format}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_bad_input_is_refused_before_anything_is_done(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_program, "_program", lambda *given: pytest.fail("work was done"))
    model = nn.Linear(4, 3)
    (tmp_path / f"folder.{format}").mkdir()
    for path, words in ((f"net.{format}.bin", "must end in"), (f"folder.{format}", "folder")):
        with pytest.raises(InvalidInput, match=words):
            nettrim.export(model, images(3, 4), tmp_path / path, format=format)
    with pytest.raises(InvalidInput, match="format must be one of onnx, pt2, c"):
        nettrim.export(model, images(3, 4), tmp_path / "net.tflite")
    for example, words in ((images(3, 5), "cannot run"), (images(3, 4) * float("nan"), "NaN"), ("text", "tensor")):
        with pytest.raises(InvalidInput, match=words):
            nettrim.export(model, example, tmp_path / f"net.{format}")
    with torch.no_grad():
        model.weight[0, 0] = float("inf")
    with pytest.raises(InvalidInput, match="weight holds NaN or inf"):
        nettrim.export(model, images(3, 4), tmp_path / f"net.{format}")
    assert [file.name for file in tmp_path.iterdir()] == [f"folder.{format}"]


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_a_wrong_file_is_not_left(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is made from other weights than it is compared with."""
    path = tmp_path / f"net.{format}"
    model = nn.Linear(4, 3, bias=False)
    earlier = nettrim.export(model, images(3, 4), path).path.read_bytes()
    original = export_program.traced

    def copied(twin: Any, inputs: Any) -> Any:  # so that the program keeps the weights it was made with
        made = original(twin, inputs)
        twin.model.weight = nn.Parameter(twin.model.weight * 1.01)
        return made

    for module in (export_program, export_onnx):
        monkeypatch.setattr(module, "traced", copied)
    with pytest.raises(NetTrimError, match="differ"):
        nettrim.export(model, images(3, 4), path)
    assert path.read_bytes() == earlier and [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_extra_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=r"nettrim\[onnx\]"):
        nettrim.export(nn.Linear(4, 3), images(3, 4), tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []
