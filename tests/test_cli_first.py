"""The first command: how models are named, what is shown of them, and what is said where something is missing."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from nettrim.cli import app
from nettrim.factories import made_by
from nettrim.sources import source_from
from nettrim.status import InvalidInput

PARTS = """
from torch import nn
def block(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU())
"""
NET = """
import torch
from torch import nn
from parts_of_net import block

class Net(nn.Module):
    def __init__(self, inputs=20):
        super().__init__()
        self.a = block(inputs, 30)
        self.gru = nn.GRU(30, 8, batch_first=True)
        self.b = nn.Linear(8, 4)
        self.unused = nn.Linear(3, 3)
    def forward(self, x):
        return self.b(self.gru(self.a(x)[:, None])[0][:, 0])

def sized(inputs):
    return Net(inputs)

def make():
    torch.manual_seed(0)
    return Net()

def data():
    return [torch.rand(64, 20, generator=torch.Generator().manual_seed(1))]

def later():
    import parts_of_net  # found while the factory runs
    return nn.Sequential(parts_of_net.block(20, 4))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "parts_of_net.py").write_text(PARTS)
    (tmp_path / "models" / "net_of_mine.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    yield tmp_path  # type: ignore[misc]
    for name in ("parts_of_net", "net_of_mine"):
        sys.modules.pop(name, None)


MODEL = "models/net_of_mine.py:make"
DATA = ("--data", "models/net_of_mine.py:data")


def run(*arguments: str, expect: int = 0) -> Result:
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})
    assert done.exit_code == expect, done.output
    return done


def test_a_file_is_loaded_by_its_path_and_leaves_the_search_path_as_it_was(place: Path) -> None:
    before = list(sys.path)
    first = made_by(MODEL, "model")
    assert sys.path == before
    assert type(made_by("models/net_of_mine.py:later", "model")[0][0]).__name__ == "Linear"
    assert type(made_by(str(place / "models" / "net_of_mine.py") + ":Net", "model")) is type(first)  # one file, one module
    assert sys.path == before


def test_two_files_of_one_name_do_not_meet(place: Path) -> None:
    (place / "net_of_mine.py").write_text("def make():\n    return 'another'\n")
    made_by(MODEL, "model")
    assert made_by("net_of_mine.py:make", "model") == "another"
    (place / "json.py").write_text("def make():\n    return 'mine'\n")
    assert made_by("json.py:make", "model") == "mine" and json.loads("[]") == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models/net_of_mine.py", "models/net_of_mine.py:Net or models/net_of_mine.py:make"),
        ("models/net_of_mine", "models/net_of_mine.py:make"),
        ("models/nowhere.py", "there is no file models/nowhere.py"),
        ("models/nowhere.py:make", "there is no file models/nowhere.py"),
        ("models/net_of_mine.py:mak", "(it has: Net, make, data, later, sized)"),
        ("models/net_of_mine.py:sized", "def make(): return sized(...)"),
        ("models", "this is a folder"),
        ("model.pt", "--weights model.pt"),
        ("models/fails.py:make", "fails.py failed with ZeroDivisionError"),
        ("models/leaves.py:make", "leaves.py failed with SystemExit"),
        ("models/dotted.py:make", "write package.module:factory"),
        ("../x:y", "no module's name"),
        ("net_of_mine:make", "cannot be imported"),
        (":make", "it must be written package.module:factory or file.py:factory"),
    ],
)
def test_what_names_no_model_is_answered_with_what_would(text: str, words: str, place: Path) -> None:
    (place / "models" / "fails.py").write_text("1 / 0\n")
    (place / "models" / "leaves.py").write_text("raise SystemExit(3)\n")
    (place / "models" / "dotted.py").write_text("from .parts_of_net import block\n")
    torch.save(torch.nn.Linear(2, 2), place / "model.pt")
    before = list(sys.path)
    with pytest.raises(InvalidInput, match=re.escape(words)):
        source_from(text, None)
    assert sys.path == before and "fails" not in sys.modules
    assert words in run("layers", text, expect=2).output.replace("\n", " ")


def test_layers_shows_what_would_be_pruned_and_what_would_be_left(place: Path) -> None:
    found = json.loads(run("layers", MODEL, "--json").stdout)
    assert [(layer["name"], layer["shape"], layer["weights"], layer["rows"]) for layer in found["layers"]] == [
        ("a.0", [30, 20], 600, None),
        ("b", [4, 8], 32, None),
        ("unused", [3, 3], 9, None),
    ]
    assert found["layers"][0]["activation"] == "relu" and found["left"][0]["name"] == "gru"
    found = json.loads(run("layers", MODEL, *DATA, "--ignore", "b", "--json").stdout)
    assert [(layer["name"], layer["rows"]) for layer in found["layers"]] == [("a.0", 64)]
    reasons = {part["name"]: part["reason"] for part in found["left"]}
    assert reasons["unused"] == "never called on the calibration data" and "ignore" in reasons["b"]
    shown = run("layers", MODEL, *DATA).stdout
    assert max(map(len, shown.splitlines())) <= 80
    assert "relu, seen in the graph" in shown and "2 layers with 632 weights" in shown and "gru" in shown


def test_random_weights_are_not_pruned_without_a_word(place: Path) -> None:
    given = ("prune", MODEL, *DATA, "--sparsity", "0.5", "--output", "a folder")
    refused = run(*given, expect=2)
    line = next(line for line in refused.output.splitlines() if line.startswith("  nettrim "))
    assert shlex.split(line)[1:] == [*given, "--untrained"]
    run(*shlex.split(line)[1:], "--json")
    notes = json.loads((place / "a folder" / "report.json").read_text())["notes"]
    assert f"its weights are those with which {MODEL} makes it; none were read" in notes
    run("verify", "a folder", MODEL, *DATA)  # a result knows whose weights it was made from
    run("verify", "a folder", MODEL, *DATA, "--untrained")
    for name in ("bench", "export"):
        more = ("--output", "m.pt2") if name == "export" else ()
        assert "--untrained" in run(name, MODEL, *DATA, *more, expect=2).output
    for name in (("compare", MODEL), ("bound", MODEL)):
        more = ("--share", "0.5") if name[0] == "bound" else ("--output", "other")
        assert "--untrained" in run(*name, *DATA, *more, expect=2).output
    torch.save(made_by(MODEL, "model").state_dict(), place / "w.pt")
    assert "leave out one" in run(*given, "--force", "--weights", "w.pt", "--untrained", expect=2).output


@pytest.mark.parametrize("method", [(), ("--method", "wanda"), ("--method", "lobs")])
def test_without_a_target_the_lines_that_have_one_can_be_pasted(method: tuple[str, ...], place: Path) -> None:
    given = ("prune", MODEL, *DATA, "--untrained", "--output", "out", *method)
    lines = [line for line in run(*given, expect=2).output.splitlines() if line.startswith("  nettrim ")]
    targets = ["--sparsity 0.8", "--epsilon 0.05"] if not method else ["--sparsity 0.8"]
    assert [shlex.split(line)[1:] for line in lines] == [[*given, *target.split()] for target in targets]
    run(*shlex.split(lines[0])[1:], "--json")


def test_the_next_lines_can_be_pasted(place: Path) -> None:
    torch.save(made_by(MODEL, "model").state_dict(), place / "my weights.pt")
    (place / "models" / "unseen.py").write_text("import torch\ndef data():\n    return [torch.rand(30, 20)]\n")
    given = ("--weights", "my weights.pt", *DATA, "--heldout", "models/unseen.py:data")
    shown = run("prune", MODEL, *given, "--sparsity", "0.5", "--output", "out").output
    tuned = run("distill", "out", MODEL, *given, "--steps", "2", "--output", "tuned").output
    for text, folder in ((shown, "out"), (tuned, "tuned")):
        lines = [shlex.split(line.removeprefix("next:")) for line in text[text.index("next:") :].splitlines()]
        assert [line[1] for line in lines] == ["verify", "bench", "export"]
        assert lines[0][1:] == ["verify", folder, MODEL, *given]
        assert lines[1][2:] == [MODEL, "--weights", folder, "--reference", "my weights.pt", *DATA]
        run(*lines[0][1:])
    told = run("report", "out").output
    assert "next:     nettrim verify out MODEL --weights FILE --data DATA --heldout DATA" in told and "result.save" not in told


def test_weights_of_a_compiled_model_are_read_and_said(place: Path) -> None:
    state = made_by(MODEL, "model").state_dict()
    torch.save({f"_orig_mod.{key}": value for key, value in state.items()}, place / "w.pt")
    run("prune", MODEL, *DATA, "--weights", "w.pt", "--sparsity", "0.5", "--output", "out", "--json")
    assert any("'_orig_mod.'" in note for note in json.loads((place / "out" / "report.json").read_text())["notes"])


def test_help_and_versions() -> None:
    short = run().stdout
    assert all(f"nettrim {name}" in short for name in ("layers", "prune", "verify")) and "Usage" not in short
    assert max(map(len, short.splitlines())) <= 80
    assert re.fullmatch(r"nettrim \S+, torch \S+\n", run("--version").stdout)
    for command in app.registered_commands:
        shown = run(command.name or "", "--help").stdout
        assert max(map(len, shown.splitlines())) <= 80
        assert "Example:" in shown and f"nettrim {command.name}" in shown
    shown = run("prune", "--help").stdout
    places = [shown.index(words) for words in ("What you choose", "--sparsity", "─ Data", "--weights", "─ Expert", "--sweeps")]
    assert places == sorted(places)


def test_the_module_runs_as_the_command_does() -> None:
    done = subprocess.run([sys.executable, "-m", "nettrim", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("nettrim ") and done.stderr == ""
