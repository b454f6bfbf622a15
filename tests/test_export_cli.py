"""``nettrim export`` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import nettrim
from nettrim.cli import app
from nettrim.deploy import c_check
from nettrim.experiments.models import fully_connected
from nettrim.quiet import unheard

MODEL = f"{__name__}:network"


def network() -> nn.Sequential:
    return fully_connected((12, 16, 10, 4), seed=3)


def images(count: int = 40) -> Tensor:
    return torch.rand(count, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    np.save(folder / "data.npy", images().numpy())
    nettrim.prune(network(), [images()], nettrim.Magnitude(sparsity=0.9), progress=False).save(folder / "pruned")
    save_file(fully_connected((12, 16, 10, 4), seed=4).state_dict(), folder / "other.safetensors")
    return folder


def command(workplace: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str, expect: int = 0) -> Result:
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("nettrim.progress.SHORT", float("inf"))  # how far it is would be shown on a busy machine
    done = CliRunner().invoke(
        app, ["export", MODEL, "--data", "data.npy", *([] if "--weights" in arguments else ["--untrained"]), *arguments]
    )
    assert done.exit_code == expect, done.output
    return done


def ran(path: Path, x: Tensor) -> Tensor:
    with unheard():
        made: Tensor = torch.export.load(path).module()(x)
    return made.detach()


def test_a_program_of_the_pruned_weights(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = command(workplace, monkeypatch, "--weights", "pruned", "--output", "net.pt2", "--json")
    told = json.loads(done.stdout)["exported"]
    assert told["format"] == "pt2" and told["dynamic"] and told["checked"] == [40, 41, 1] and told["difference"] <= 1e-5
    wanted = nettrim.load(workplace / "pruned", network())(images(7))
    assert torch.allclose(ran(workplace / "net.pt2", images(7)), wanted, atol=1e-5)


def test_a_weights_file_and_a_stated_format(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command(workplace, monkeypatch, "--weights", "other.safetensors", "--output", "new/net.pt2", "--format", "pt2", "--batch-size", "3")
    wanted = fully_connected((12, 16, 10, 4), seed=4)(images(7))
    assert torch.allclose(ran(workplace / "new" / "net.pt2", images(7)), wanted, atol=1e-5)


@pytest.mark.skipif(c_check.compiler() is None, reason="there is no C compiler (cc, gcc or clang)")
def test_c_compacted_first(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = json.loads(command(workplace, monkeypatch, "--weights", "pruned", "--output", "whole.c", "--json").stdout)
    small = json.loads(command(workplace, monkeypatch, "--weights", "pruned", "--output", "small.c", "--compact", "--json").stdout)
    assert whole["compacted"] is None and small["compacted"]["after"] < small["compacted"]["before"] == 208 + 170 + 44
    assert small["exported"]["sizes"]["work"] < whole["exported"]["sizes"]["work"]
    with torch.no_grad():
        wanted = nettrim.load(workplace / "pruned", network())(images())
    for name in ("whole", "small"):
        assert torch.allclose(c_check.run(workplace, name, images()), wanted, atol=1e-5)
    words = command(workplace, monkeypatch, "--weights", "pruned", "--output", "small.c", "--compact", "--force").stdout
    assert "parameters" in words and "small.c:" in words and "of work memory" in words


def test_onnx(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    done = command(workplace, monkeypatch, "--weights", "pruned", "--output", "net.onnx")
    assert "largest difference" in done.stdout and done.stderr == ""
    session = onnxruntime.InferenceSession(str(workplace / "net.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: images(5).numpy()})[0]
    with torch.no_grad():
        wanted = nettrim.load(workplace / "pruned", network())(images(5))
    assert torch.allclose(torch.from_numpy(found), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--output", "net.tflite"), "format must be one of onnx, pt2, c"),
        (("--output", "net9.onnx", "--format", "c"), "must end in .c"),
        (("--output", "pruned/model.safetensors/net.c"), "output folder"),
        (("--output", "bad-name.c"), "cannot be its name"),
        (("--output", "net9.c", "--weights", "nowhere"), "nowhere"),
        (("--output", "net9.c", "--batch-size", "0"), "batch size"),
    ],
)
def test_bad_input_ends_with_2(workplace: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: str) -> None:
    done = command(workplace, monkeypatch, *arguments, expect=2)
    assert words in done.stderr and not (workplace / arguments[1]).exists()
