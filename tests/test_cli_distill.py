"""``nettrim distill``: a saved result is fine-tuned, certified anew and saved, as the library does it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import nettrim
from nettrim.cli import app
from nettrim.experiments.models import fully_connected

MODEL = f"{__name__}:network"
FEW: dict[str, Any] = {"steps": 60, "batch_size": 16}


def network() -> nn.Sequential:
    return fully_connected((12, 16, 10, 4), seed=3)


def images(seed: int = 0) -> Tensor:
    return torch.rand(120, 12, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    for name, seed in (("data", 0), ("others", 1), ("heldout", 2)):
        np.save(folder / f"{name}.npy", images(seed).numpy())
    nettrim.prune(network(), [images()], nettrim.Magnitude(sparsity=0.6), progress=False).save(folder / "pruned")
    return folder


def command(workplace: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Result:
    monkeypatch.chdir(workplace)
    return CliRunner().invoke(app, list(arguments))


GIVEN = ("distill", "pruned", MODEL, "--untrained", "--data", "data.npy", "--steps", "60", "--step-samples", "16")


def test_it_is_the_librarys_result_and_verifies(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in (workplace / "pruned").iterdir()}
    done = command(workplace, monkeypatch, *GIVEN, "--heldout", "heldout.npy", "--output", "tuned", "--json")
    assert done.exit_code == 0 and done.stderr == "", done.output
    assert {path.name: path.read_bytes() for path in (workplace / "pruned").iterdir()} == before
    own = nettrim.distill(nettrim.load(workplace / "pruned", network()), network(), [images()], progress=False, **FEW)
    saved = load_file(workplace / "tuned" / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in own.model.state_dict().items())
    pruned = load_file(workplace / "pruned" / "model.safetensors")
    assert all(bool((saved[name][value == 0] == 0).all()) for name, value in pruned.items() if name.endswith("weight"))
    told = json.loads(done.stdout)
    assert told["distilled"]["after"] == own.after < 0.8 * own.before == pytest.approx(0.8 * told["distilled"]["before"])
    assert told["certificate"]["holds"] is True and told["certificate"]["heldout"] is not None
    assert told["report"]["method"] == "Magnitude, fine-tuned"
    checked = command(workplace, monkeypatch, "verify", "tuned", MODEL, "--untrained", "--data", "data.npy", "--heldout", "heldout.npy")
    assert checked.exit_code == 0, checked.output


def test_it_tells_what_it_did(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = command(workplace, monkeypatch, *GIVEN, "--no-mixing", "--holdback", "0", "--loss", "kl", "--output", "again")
    assert done.exit_code == 0, done.output
    assert "fine-tuned without labels: the outputs' discrepancy went from" in done.stdout and "(step 60 of 60 is kept)" in done.stdout
    assert "verdict:  holds" in done.stdout
    note = nettrim.checkpoint.read_report(workplace / "again").notes[-1]
    assert note.startswith("fine-tuned without labels") and "held back" not in note


def test_all_parameters_may_learn(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nettrim.prune(network(), [images()], nettrim.Magnitude(sparsity=0.6), ignore=["1"], progress=False).save(workplace / "partly")
    arguments = (
        "distill",
        "partly",
        MODEL,
        "--untrained",
        "--data",
        "data.npy",
        "--steps",
        "20",
        "--learn",
        "all",
        "--output",
        "all-tuned",
    )
    done = command(workplace, monkeypatch, *arguments, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["certificate"]["trained"] == ["1.weight", "1.bias"]
    checked = command(workplace, monkeypatch, "verify", "all-tuned", MODEL, "--untrained", "--data", "data.npy", "--json")
    assert checked.exit_code == 0 and json.loads(checked.stdout)["certificate"]["trained"] == ["1.weight", "1.bias"], checked.output


def test_biases_that_pruning_added_stay(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nettrim.prune(biasless(), [images()], nettrim.NetTrim(sparsity=0.6), add_bias=True, progress=False).save(workplace / "biased")
    arguments = (
        "distill",
        "biased",
        f"{__name__}:biasless",
        "--untrained",
        "--data",
        "data.npy",
        "--steps",
        "20",
        "--output",
        "biased-tuned",
    )
    done = command(workplace, monkeypatch, *arguments)
    assert done.exit_code == 0, done.output
    assert load_file(workplace / "biased-tuned" / "model.safetensors").keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    checked = command(workplace, monkeypatch, "verify", "biased-tuned", f"{__name__}:biasless", "--untrained", "--data", "data.npy")
    assert checked.exit_code == 0, checked.output


def biasless() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10, bias=False), nn.ReLU(), nn.Linear(10, 4, bias=False))


def other() -> nn.Sequential:
    return fully_connected((12, 16, 10, 4), seed=4)


def never(*given: Any, **settings: Any) -> None:
    raise AssertionError("it began to train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", MODEL, "--untrained", "--data", "data.npy"), "there is no such file"),
        (("pruned", f"{__name__}:other", "--untrained", "--data", "data.npy"), "must be the network that the result was pruned from"),
        (("pruned", f"{__name__}:biasless", "--untrained", "--data", "data.npy"), "do not fit the model"),
        (("pruned", MODEL, "--untrained", "--data", "others.npy"), "calibration must be the data of the run"),
        (("pruned", MODEL, "--untrained", "--data", "data.npy", "--batch-size", "50"), "batch sizes"),
        (("pruned", MODEL, "--untrained", "--data", "data.npy", "--heldout", "data.npy"), "all of these samples are calibration data"),
    ],
)
def test_bad_input_is_refused_before_training(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr("nettrim.cli.pruning.distill", never)
    done = command(workplace, monkeypatch, "distill", *arguments, "--output", "refused")
    assert done.exit_code == 2 and message in done.stderr, done.output
    assert not any((workplace / "refused").iterdir())


def test_settings_outside_their_range_are_refused(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (("--steps", "0"), ("--holdback", "1"), ("--learning-rate", "0"), ("--seed", "-1")):
        done = command(workplace, monkeypatch, *GIVEN, *wrong, "--output", "refused")
        assert done.exit_code == 2 and wrong[0].strip("-").replace("-", "_") in done.stderr, done.output


def test_a_model_without_zeros_is_refused(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = workplace / "dense"
    nettrim.prune(network(), [images()], nettrim.Magnitude(sparsity=0.6), progress=False).save(folder)
    save_file(network().state_dict(), folder / "model.safetensors")
    done = command(workplace, monkeypatch, "distill", "dense", MODEL, "--untrained", "--data", "data.npy", "--output", "refused")
    assert done.exit_code == 2 and "no zero weights" in done.stderr, done.output
