"""The real command, as a user runs it."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from nettrim.cli import app
from nettrim.experiments.models import fully_connected

FACTORY = """
import torch
from nettrim.experiments.models import fully_connected

def small():
    return fully_connected((20, 30, 10, 4), seed=1)

def nothing():
    return torch.nn.Sequential(torch.nn.LayerNorm(20))

def text():
    return "not a model"

def batches():
    return list(torch.rand(64, 20, generator=torch.Generator().manual_seed(5)).split(16))

def waiting():  # a model that says so when it is in its sixth pass, and stays there
    import time
    from pathlib import Path
    class Waiting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.passes = torch.nn.Linear(20, 4), []
        def forward(self, x):
            self.passes.append(len(x))
            if len(self.passes) == 6:
                Path("waiting").touch()
                time.sleep(3600)
            return self.fc(x)
    torch.manual_seed(0)
    return Waiting()
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "mine.py").write_text(FACTORY)
    generator = torch.Generator().manual_seed(0)
    np.save(folder / "calibration.npy", torch.rand(300, 20, generator=generator).numpy())
    labels = torch.randint(0, 4, (100,), generator=generator)
    np.savez(folder / "heldout.npz", inputs=torch.rand(100, 20, generator=generator).numpy(), labels=labels.numpy())
    model = fully_connected((20, 30, 10, 4), seed=2)
    save_file(model.state_dict(), folder / "weights.safetensors")
    return folder


def nettrim(workplace: Path, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONWARNINGS": "error", "COLUMNS": "110", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "nettrim", *arguments],
        cwd=workplace,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


UNTRAINED = ("--untrained", "--data", "calibration.npy", "--output", "o")


def refused(workplace: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What the command says to bad input; in this process, as starting another takes longer than finding it out."""
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(str(workplace))
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2, done.output
    return done.stderr


PRUNE = ("prune", "mine:small", "--weights", "weights.safetensors", "--data", "calibration.npy")


@pytest.fixture(scope="module")
def pruned(workplace: Path) -> Path:
    done = nettrim(workplace, *PRUNE, "--heldout", "heldout.npz", "--epsilon", "0.05", "--output", "out")
    assert "verdict:  holds" in done.stdout
    assert "report: out/report.html" in done.stdout
    return workplace / "out"


def test_prune_writes_everything(pruned: Path) -> None:
    assert {path.name for path in pruned.iterdir()} == {"model.safetensors", "report.json", "certificate.json", "report.html"}
    report = json.loads((pruned / "report.json").read_text())
    assert [layer["status"] for layer in report["layers"]] == ["converged"] * 3
    assert 0 < report["density"] < 0.95
    assert json.loads((pruned / "certificate.json").read_text())["holds"] is True


def test_json_is_the_only_output(workplace: Path) -> None:
    done = nettrim(workplace, *PRUNE, "--sparsity", "0.75", "--output", "out-json", "--json")
    told: dict[str, Any] = json.loads(done.stdout)
    assert done.stderr == ""
    assert told["report"]["density"] == pytest.approx(0.25, abs=0.002)
    assert told["certificate"]["network"]["scheme"] == "cascade"


def test_targets_by_layer_and_ignore(workplace: Path) -> None:
    done = nettrim(
        workplace,
        *PRUNE,
        "--sparsity",
        "1=0.9",
        "--sparsity",
        "3=0.5",
        "--ignore",
        "5",
        "--scheme",
        "parallel",
        "--output",
        "out-dict",
        "--json",
    )
    layers = json.loads(done.stdout)["report"]["layers"]
    assert [(layer["name"], layer["nonzeros"]) for layer in layers] == [("1", 60), ("3", 150)]


def test_verify_passes_and_fails_loudly(workplace: Path, pruned: Path) -> None:
    base = ("verify", "out", "mine:small", "--data", "calibration.npy")
    done = nettrim(workplace, *base, "--weights", "weights.safetensors", "--heldout", "heldout.npz")
    assert "verified" in done.stdout
    done = nettrim(workplace, *base, "--untrained", expect=3)  # the factory's own weights are not those that were pruned
    assert "reference model's weights are not those" in done.stderr
    done = nettrim(workplace, *base, "--untrained", "--json", expect=3)
    assert json.loads(done.stdout)["holds"] is False


def test_report_shows_and_rewrites_the_page(workplace: Path, pruned: Path) -> None:
    done = nettrim(workplace, "report", "out", "--html", "again.html")
    assert "relu" in done.stdout
    assert (workplace / "again.html").read_text() == (pruned / "report.html").read_text()
    assert json.loads(nettrim(workplace, "report", "out", "--json").stdout)["certificate"]["holds"] is True


def test_an_unreachable_tolerance_ends_with_3(workplace: Path) -> None:
    # the first layer is cut to a fifth, so the second cannot come back to the reference output
    targets = ("--epsilon", "1=0.6", "--epsilon", "3=0.001", "--epsilon", "5=0.5")
    done = nettrim(workplace, *PRUNE, *targets, "--output", "out-far", expect=3)
    assert "guarantee not met" in done.stderr and "best reachable" in done.stdout
    report = json.loads((workplace / "out-far" / "report.json").read_text())
    assert report["layers"][1]["status"] == "tolerance out of reach"
    assert any("best reachable distance" in note for note in report["layers"][1]["notes"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prune", "mine:small", *UNTRAINED, "--sparsity", "1"), "must lie in [0, 1)"),
        (("prune", "mine:small", *UNTRAINED, "--epsilon", "-1"), "must be >= 0"),
        (
            ("prune", "mine:small", *UNTRAINED),
            "--sparsity 0.8",
        ),
        (("prune", "mine:small", "--untrained", "--data", "nowhere.npy", "--output", "o", "--epsilon", "0.1"), "there is no such file"),
        (("prune", "mine:smal", *UNTRAINED, "--epsilon", "0.1"), "has no 'smal'"),
        (("prune", "mine:text", *UNTRAINED, "--epsilon", "0.1"), "must give an nn.Module"),
        (
            ("prune", "mine:nothing", *UNTRAINED, "--epsilon", "0.1"),
            "no layer that nettrim can prune",
        ),
        (("prune", "mine:small", "--untrained", "--data", "calibration.npy", "--output", "mine.py", "--epsilon", "0.1"), "output folder"),
        (("prune", "mine:small", *UNTRAINED, "--epsilon", "l1=0.1"), "the nearest is '1'"),
        (
            ("prune", "mine:small", "--weights", "heldout.npz", "--data", "mine:batches", "--output", "o", "--epsilon", "0.1"),
            "weights file",
        ),
        (("verify", "nowhere", "mine:small", "--untrained", "--data", "calibration.npy"), "cannot be read"),
    ],
)
def test_bad_input_ends_with_2_and_names_the_thing(
    workplace: Path, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refused(workplace, monkeypatch, *arguments)
    assert message in said, said


def test_the_real_command_ends_with_2(workplace: Path) -> None:
    done = nettrim(
        workplace, "prune", "mine:smal", "--untrained", "--data", "calibration.npy", "--output", "o", "--epsilon", "0.1", expect=2
    )
    assert "has no 'smal'" in done.stderr


def test_interruption_leaves_earlier_output(workplace: Path, pruned: Path) -> None:
    before = {path.name: path.read_bytes() for path in pruned.iterdir()}
    command = [sys.executable, "-m", "nettrim", "prune", "mine:waiting", "--untrained", "--data", "mine:batches"]
    command += ["--epsilon", "0.1", "--output", "out", "--force"]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # ignored by what runs in the background
    running = subprocess.Popen(command, cwd=workplace, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, preexec_fn=heard)
    while not (workplace / "waiting").exists() and running.poll() is None:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate()
    assert running.returncode == 130
    assert "interrupted" in errors
    assert {path.name: path.read_bytes() for path in pruned.iterdir()} == before


def test_demo_runs_on_digits(workplace: Path) -> None:
    done = nettrim(workplace, "demo", "--output", "demo", "--epsilon", "0.2", "--samples", "600", "--json")
    told = json.loads(done.stdout)
    rows = told["comparison"]
    assert rows[0]["label"] == "Trained network"
    by_label = {row["label"]: row for row in rows}
    assert by_label["Net-Trim l0, cascade"]["accuracy"] > rows[-1]["accuracy"] + 0.2  # magnitude at the same counts
    assert rows[-1]["densities"] == by_label["Net-Trim l0, cascade"]["densities"]
    assert told["certificate"]["holds"] is True
    assert {"dense", "pruned", "accelerated"} <= {form["name"] for form in told["bench"]["forms"]}
    assert "Size and speed" in (workplace / "demo" / "report.html").read_text()


def test_the_published_program_and_cascade(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = nettrim(
        workplace,
        *PRUNE,
        *("--epsilon", "0.05", "--program", "halfspace", "--gamma", "1.1", "--kappa", "0.99", "--output", "out-published", "--json"),
    )
    told: dict[str, Any] = json.loads(done.stdout)
    assert told["certificate"]["program"] == "halfspace"
    assert [layer["target"].split()[0] for layer in told["report"]["layers"]] == ["epsilon", "inflation", "inflation"]
    assert all(layer["violation"] is not None for layer in told["report"]["layers"])
    by_layer = (*PRUNE, "--epsilon", "0.05", "--gamma", "9=1.1", "--output", "o")
    assert "NetTrim.gamma" in refused(workplace, monkeypatch, *by_layer)
    parallel = (*PRUNE, "--epsilon", "0.05", "--gamma", "1.1", "--scheme", "parallel", "--output", "o")
    assert "speaks of the cascade" in refused(workplace, monkeypatch, *parallel)


@pytest.mark.slow
def test_every_experiment_runs_by_its_name(workplace: Path) -> None:
    for name in ("spirals", "mnist-fc", "mnist-lenet-fc", "cascade-vs-parallel", "robustness"):
        done = nettrim(workplace, "reproduce", name, "--quick", "--dataset", "digits", "--samples", "60", "--output", "again")
        folder = workplace / "again" / name
        written = [line.removeprefix("written: ") for line in done.stdout.splitlines() if line.startswith("written: ")]
        assert written and all((folder / file).stat().st_size > 0 for file in written)
        assert {Path(file).suffix for file in written} == {".jsonl", ".json", ".png", ".svg"}


@pytest.mark.slow
def test_reproduce_continues_and_tells(workplace: Path) -> None:
    folder = workplace / "again" / "recovery"
    done = nettrim(workplace, "reproduce", "recovery", "--quick", "--output", "again", "--json")
    told = json.loads(done.stdout)
    assert told["theorem_above"] is True
    lines = (folder / "recovery.jsonl").read_text().splitlines()
    (folder / "recovery.jsonl").write_text("\n".join(lines[:-5]) + "\n")  # as if it had been interrupted
    again = json.loads(nettrim(workplace, "reproduce", "recovery", "--quick", "--output", "again", "--json").stdout)
    assert again["transitions"] == told["transitions"]
    assert len((folder / "recovery.jsonl").read_text().splitlines()) == len(lines)
    assert (folder / "recovery.png").stat().st_size > 10_000
