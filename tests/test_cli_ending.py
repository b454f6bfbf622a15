"""How commands end, whatever the user's own code, the names in foreign files, and whoever reads the output do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from nettrim.cli import app
from nettrim.cli.output import next_commands
from nettrim.terminal import Terminal

NET = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

def talking():
    print("from the factory")
    return Talking()

def leaving():
    raise GeneratorExit("left")

def named():
    made = nn.Sequential()
    made.add_module("\\x1b[31mred\\u202e", nn.Linear(6, 3))
    return made

def unnamed():
    made = nn.Sequential()
    made.add_module("\\udcff", nn.Linear(6, 3))
    return made

class Talking(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = make()
    def forward(self, x):
        print("from the model")
        return self.inner(x)

class Exiting(Talking):
    def forward(self, x):
        raise SystemExit(0)

class Broken:
    def __len__(self):
        return 1
    def __iter__(self):
        raise OSError("gone")
"""
PRUNE = ["prune", "--untrained", "--sparsity", "0.5", "--output", "out"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.py").write_text(NET)
    torch.manual_seed(1)
    np.save(tmp_path / "data.npy", torch.randn(40, 6).numpy())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def only_object(text: str) -> dict[str, Any]:
    found = json.loads(text)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([*PRUNE, "net.py:make", "--data", "none.npy"], 2, "no such file"),
        ([*PRUNE, "net.py:leaving", "--data", "data.npy"], 2, "net.py, line 14, in leaving: GeneratorExit: left"),
        ([*PRUNE, "net.py:Exiting", "--data", "data.npy"], 2, "SystemExit: 0"),
        ([*PRUNE, "net.py:make", "--data", "net.py:Broken"], 2, "OSError: gone"),
        ([*PRUNE, "net.py:unnamed", "--data", "data.npy"], 2, "rename that module"),
        (["prune", "net.py:make", "--sparsity", "0.5"], 2, "Missing option"),
        (["report", "nothing", "--html"], 2, "--html"),
        (["layers", "net.py:make", "--batch-size", "many"], 2, "--batch-size"),
        (["prun"], 2, "prun"),
    ],
)
def test_every_failure_is_one_json_object_too(place: Path, words: list[str], code: int, said: str) -> None:
    result = run(words[0], "--json", *words[1:])
    assert result.exit_code == code
    found = only_object(result.stdout)
    assert said in found["error"] and found["exit_code"] == code
    assert result.exception is None or isinstance(result.exception, SystemExit)
    told = run(*words)
    assert told.exit_code == code and not told.stdout and "Traceback" not in told.stderr


def test_what_users_code_prints_is_not_in_the_json(place: Path) -> None:
    result = run(*PRUNE, "net.py:talking", "--data", "data.npy", "--json")
    assert result.exit_code == 0
    assert only_object(result.stdout)["report"] and "error" not in only_object(result.stdout)
    assert "from the factory" in result.stderr and "from the model" in result.stderr


def test_a_guarantee_that_is_not_met_is_the_result_and_the_error(place: Path) -> None:
    assert run(*PRUNE, "net.py:make", "--data", "data.npy").exit_code == 0
    file = place / "out" / "certificate.json"
    data = json.loads(file.read_text())
    data["network"]["achieved"] *= 0.5
    file.write_text(json.dumps(data))
    result = run("verify", "out", "net.py:make", "--untrained", "--data", "data.npy", "--json")
    found = only_object(result.stdout)
    assert result.exit_code == found["exit_code"] == 3 and found["holds"] is False and found["error"]


def test_numbers_that_json_does_not_have_are_null(place: Path) -> None:
    assert run(*PRUNE, "net.py:make", "--data", "data.npy").exit_code == 0
    file = place / "out" / "report.json"
    data = json.loads(file.read_text())
    data["settings"]["ridge"] = float("inf")
    file.write_text(json.dumps(data))
    result = run("report", "out", "--json")
    assert result.exit_code == 0 and only_object(result.stdout)["report"]["settings"]["ridge"] is None


def test_names_do_not_steer_the_terminal(place: Path) -> None:
    for words in (["layers", "net.py:named"], [*PRUNE, "net.py:named", "--data", "data.npy"], ["report", "out"]):
        result = run(*words)
        assert result.exit_code == 0
        assert not {character for character in result.output if not character.isprintable()} - {"\n"}
    assert "\x1b[31mred\u202e" in json.loads((place / "out" / "certificate.json").read_text())["layers"][0]["name"]


def test_colours_are_kept_and_text_is_marked() -> None:
    terminal = Terminal(force_terminal=True, color_system="standard", width=60)
    with terminal.capture() as shown:
        terminal.print("\x1b]0;title\x07a", style="red", markup=False, highlight=False)
    assert shown.get() == "\x1b[31m]0;titlea\x1b[0m\n"


@pytest.mark.slow
def test_what_is_shown_may_stop_without_stopping_the_work(place: Path) -> None:
    """Standard output that is full, closed, read only in part, or of an encoding without the marks of a table."""
    assert run(*PRUNE, "net.py:make", "--data", "data.npy").exit_code == 0
    command = [sys.executable, "-m", "nettrim", "report", "out"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    reading, writing = os.pipe()
    os.close(reading)
    for more in ([], ["--json"]):
        left = subprocess.run([*command, *more], stdout=writing, stderr=subprocess.PIPE, env=environment, text=True)
        assert left.returncode == 0 and not left.stderr
        closed = subprocess.run(["/bin/sh", "-c", 'exec "$@" >&-', "sh", *command, *more], capture_output=True, env=environment, text=True)
        assert closed.returncode == 0 and not closed.stderr
        if Path("/dev/full").exists():
            with open("/dev/full", "w") as full:
                result = subprocess.run([*command, *more], stdout=full, stderr=subprocess.PIPE, env=environment, text=True)
            assert result.returncode == 2 and "No space left" in result.stderr and "Traceback" not in result.stderr
    os.close(writing)


@pytest.mark.parametrize(
    ("name", "said"), [("net.py", "net.py:make"), ("net", "net.py:make"), ("net.pt", "hold no code"), (".", "a folder")]
)
def test_a_name_without_a_factory_is_told_of_before_its_weights(place: Path, name: str, said: str) -> None:
    result = run("prune", name, "--data", "data.npy", "--sparsity", "0.5", "--output", "out")
    assert result.exit_code == 2 and said in result.stderr and "--untrained" not in result.stderr
    assert not (place / "out").exists()


def test_a_folder_that_looks_like_an_option_can_be_pasted() -> None:
    said = next_commands(Path("-out"), "net.py:make", None, "x.npy", None)
    assert "verify ./-out net.py:make --untrained" in said and "--weights ./-out" in said


def test_a_folder_given_as_weights_is_told_of(place: Path) -> None:
    assert run(*PRUNE, "net.py:make", "--data", "data.npy").exit_code == 0
    result = run("layers", "net.py:make", "--weights", "out")
    assert result.exit_code == 2 and str(Path("out") / "model.safetensors") in result.stderr


def test_a_pickle_is_refused_without_advice_to_run_it(place: Path) -> None:
    class Calls:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, ("made",)

    torch.save({"a": Calls()}, "evil.pt")
    result = run("layers", "net.py:make", "--weights", "evil.pt")
    assert result.exit_code == 2 and "mkdir" in result.stderr and "weights_only" not in result.stderr and not Path("made").exists()
