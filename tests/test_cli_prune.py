"""``nettrim prune``: every method and option does what the library does with the same settings, and what does not fit is refused."""

from __future__ import annotations

import json
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import nettrim
from nettrim import InvalidInput, methods
from nettrim.cli import app, pruning
from nettrim.cli.method import METHODS, method_from
from nettrim.cli.options import by_layer, readings, target


class Small(nn.Module):
    """A convolution with batch-norm behind it, then two layers, the first without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.first, self.last = nn.Linear(64, 12, bias=False), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(torch.relu(self.norm(self.conv(x))).flatten(1))))  # type: ignore[no-any-return]


def small() -> nn.Module:
    torch.manual_seed(3)
    model = Small()
    with torch.no_grad():
        model.norm.running_mean.normal_()  # type: ignore[union-attr]
        model.norm.weight.uniform_(0.5, 1.5)
        model.norm.bias.fill_(2.0)  # no input of the next layer is always zero: such inputs lose their weights in every pattern
    return model.eval()


def images() -> Tensor:
    return torch.rand(120, 1, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    np.save(tmp_path / "data.npy", images().numpy())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*arguments: str) -> Result:
    fixed = ["prune", f"{__name__}:small", "--untrained", "--data", "data.npy", "--output", "out", "--batch-size", "120", "--json"]
    return CliRunner().invoke(app, [*fixed, *arguments])


def same_as_library(workplace: Path, done: Result, method: methods.Method, **settings: Any) -> dict[str, Tensor]:
    """The state that was saved, which must be the library's with the same settings, to the last bit."""
    assert done.exit_code == 0, done.output
    own = nettrim.prune(small(), [images()], method, progress=False, **settings)
    saved = load_file(workplace / "out" / "model.safetensors")
    assert saved.keys() == own.model.state_dict().keys()
    assert all(torch.equal(value, saved[name]) for name, value in own.model.state_dict().items())
    assert json.loads(done.stdout)["report"]["method"] == own.report.method == method.describe()
    return saved


def test_the_table_holds_every_method() -> None:
    there = {getattr(methods, name) for name in methods.__all__}
    assert set(METHODS.values()) == {made for made in there if is_dataclass(made)}
    assert all(name == name.lower() for name in METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_methods_by_name(workplace: Path, name: str) -> None:
    settings: dict[str, Any] = {"seed": 5} if name == "random" else {}
    done = command("--method", name.upper(), "--sparsity", "0.5", "--seed", "5")
    saved = same_as_library(workplace, done, METHODS[name](sparsity=0.5, **settings), seed=5)
    assert int((saved["first.weight"] == 0).sum()) == saved["first.weight"].numel() // 2


@pytest.mark.parametrize("name", [name for name in METHODS if name != "lobs"])
def test_n_of_m_by_every_method_that_has_patterns(workplace: Path, name: str) -> None:
    saved = same_as_library(workplace, command("--method", name, "--pattern", "2:4"), METHODS[name](pattern="2:4"))
    assert bool(((saved["first.weight"].view(12, 16, 4) != 0).sum(2) <= 2).all())


@pytest.mark.parametrize("pattern", ["rows", "columns", "4x4"])
def test_whole_groups(workplace: Path, pattern: str) -> None:
    done = command("--pattern", pattern, "--sparsity", "first=0.5")
    weight = same_as_library(workplace, done, nettrim.NetTrim(sparsity={"first": 0.5}, pattern=pattern))["first.weight"] != 0
    blocks = {"rows": weight, "columns": weight.T, "4x4": weight.view(3, 4, 16, 4).transpose(1, 2).reshape(-1, 16)}[pattern]
    assert bool((blocks == blocks[:, :1]).all()) and 0 < int(weight.sum()) <= weight.numel() // 2


def test_a_quick_effort(workplace: Path) -> None:
    done = command("--sparsity", "0.7", "--effort", "quick")
    quick = same_as_library(workplace, done, nettrim.NetTrim(sparsity=0.7, effort="quick"))
    full = nettrim.prune(small(), [images()], nettrim.NetTrim(sparsity=0.7), progress=False).model.state_dict()
    assert not torch.equal(quick["first.weight"], full["first.weight"])


def test_an_error_for_lobs(workplace: Path) -> None:
    done = command("--method", "lobs", "--error", "first=0.2", "--scheme", "parallel")
    same_as_library(workplace, done, nettrim.LOBS(error={"first": 0.2}), scheme="parallel")


def test_readings_and_biases(workplace: Path) -> None:
    given = ("--reading", "conv:norm=norm", "--reading", "conv:activation=none", "--reading", "re:l.*:activation=relu")
    wanted: dict[str, dict[str, str | None]] = {"conv": {"norm": "norm", "activation": None}, "re:l.*": {"activation": "relu"}}
    done = command("--sparsity", "0.6", *given, "--add-bias")
    saved = same_as_library(workplace, done, nettrim.NetTrim(sparsity=0.6), readings=wanted, add_bias=True)
    assert "first.bias" in saved
    found = {layer["name"]: layer["activation"] for layer in json.loads(done.stdout)["report"]["layers"]}
    assert found == {"conv": "identity", "first": "relu", "last": "relu"}


def test_how_a_sparsity_is_shared_reaches_prune(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str, int]] = []

    def record(*given: Any, allocation: str, target: str, sweeps: int, **others: Any) -> None:
        seen.append((allocation, target, sweeps))
        raise InvalidInput("that is all")

    monkeypatch.setattr(pruning, "prune", record)
    for options in ((), ("--allocation", "global", "--target", "macs", "--sweeps", "2")):
        assert command("--sparsity", "0.5", *options).exit_code == 2
    assert seen == [("uniform", "parameters", 0), ("global", "macs", 2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "wand", "--sparsity", "0.5"), "the nearest is 'wanda'"),
        (("--method", "obs", "--sparsity", "0.5", "--norm", "l0"), "--method obs does not take --norm; it takes --sparsity and --pattern"),
        (("--method", "wanda", "--epsilon", "0.1", "--gamma", "2"), "does not take --epsilon and --gamma"),
        (("--method", "random", "--sparsity", "0.5", "--kappa", "0.5"), "leave it out, or choose nettrim"),
        (("--method", "magnitude", "--sparsity", "0.5", "--no-polish", "--program", "preimage"), "does not take --polish and --program"),
        (("--method", "magnitude"), "prune needs to know how far to go"),
        (("--method", "sparsegpt", "--pattern", "rows", "--sparsity", "0.5"), "SparseGPT takes pattern N:M"),
        (("--method", "lobs", "--pattern", "2:4"), "does not take --pattern"),
        (("--error", "0.1"), "--method nettrim does not take --error"),
        (("--pattern", "4:2"), "found '4:2'"),
        (("--pattern", "rows"), "exactly one of epsilon, sparsity and penalty"),
        (("--sparsity", "0.5", "--reading", "conv:norm"), "it must be written LAYER:PART=VALUE"),
        (("--sparsity", "0.5", "--reading", "norm=none"), "it must be written LAYER:PART=VALUE"),
        (("--sparsity", "0.5", "--reading", "conv:norm=norm", "--reading", "conv:norm=none"), "given twice"),
        (("--sparsity", "0.5", "--reading", "conv:norms=none"), "did you mean 'norm'?"),
        (("--sparsity", "0.5", "--reading", "convo:norm=none"), "'convo'"),
        (("--sparsity", "0.5", "--reading", "conv:branch=norm"), "a branch can only be taken out"),
        (("--sparsity", "first=0.5", "--sparsity", "first=0.6"), "given twice"),
        (("--sparsity", "0.5", "--sweeps", "-1"), "sweeps"),
    ],
)
def test_what_does_not_fit_is_refused(workplace: Path, arguments: tuple[str, ...], message: str) -> None:
    done = command(*arguments)
    assert done.exit_code == 2 and message.lower() in done.stderr.lower(), done.output
    assert not (workplace / "out").exists() or not any((workplace / "out").iterdir())


def test_an_option_in_words() -> None:
    assert target("sparsity", None) is None and target("sparsity", ["0.5"]) == 0.5
    assert target("sparsity", ["a=0.5", "re:b=.*=0.25"]) == {"a": 0.5, "re:b=.*": 0.25}
    assert by_layer("activation", ["a=hardtanh(-1, 1)"]) == {"a": "hardtanh(-1, 1)"} and by_layer("activation", None) == {}
    assert readings(["re:(?:a|b=c):pool=None", "d.0:activation=leaky_relu(0.1)"]) == {
        "re:(?:a|b=c)": {"pool": None},
        "d.0": {"activation": "leaky_relu(0.1)"},
    }
    for wrong in ("relu", "=relu", "a="):
        with pytest.raises(InvalidInput, match="LAYER=VALUE"):
            by_layer("activation", [wrong])
    with pytest.raises(InvalidInput, match="sparsity of a must be a number, found 'x'"):
        target("sparsity", ["a=x"])


def test_seeds_are_for_methods_that_draw() -> None:
    assert method_from("random", {"sparsity": 0.5}, 7) == nettrim.Random(sparsity=0.5, seed=7)
    assert method_from("wanda", {"sparsity": 0.5, "pattern": None}, 7) == nettrim.Wanda(sparsity=0.5)
