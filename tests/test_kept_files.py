"""The command line never writes over what it reads, nor over files of others; ``--force`` replaces an earlier result and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

import nettrim
from nettrim import checkpoint
from nettrim.cli import app
from nettrim.experiments.models import fully_connected

MODEL = f"{__name__}:network"


def network() -> nn.Sequential:
    return fully_connected((8, 10, 3), seed=3)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained weights in a folder of their own, data, a program, and a saved result."""
    folder = tmp_path_factory.mktemp("outputs")
    x = torch.rand(30, 8, generator=torch.Generator().manual_seed(0))
    np.save(folder / "data.npy", x.numpy())
    (folder / "run").mkdir()
    save_file(network().state_dict(), folder / "run" / "model.safetensors", metadata={"format": "pt"})
    nettrim.export(network(), x, folder / "net.pt2")
    nettrim.prune(network(), [x], nettrim.Magnitude(sparsity=0.5), progress=False).save(folder / "pruned")
    return folder


@pytest.fixture
def workplace(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(template, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


PRUNE = ("prune", MODEL, "--data", "data.npy", "--sparsity", "0.6", "--method", "magnitude")
DISTILL = ("distill", "pruned", MODEL, "--untrained", "--data", "data.npy", "--steps", "2")
BENCH = ("bench", MODEL, "--data", "data.npy", "--weights", "pruned", "--batch-sizes", "1", "--seconds", "0.001")
COMPARE = ("compare", MODEL, "--untrained", "--data", "data.npy", "--methods", "magnitude", "--sparsity", "0.5")


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize(
    "arguments",
    [
        (*PRUNE, "--weights", "run/model.safetensors", "--output", "run"),
        (*PRUNE, "--weights", "link.safetensors", "--output", "pruned"),
        (*PRUNE, "--weights", "pruned/model.safetensors", "--output", "pruned"),
        (*PRUNE, "--weights", "pruned/model.safetensors", "--output", "linked"),
        (*PRUNE, "--untrained", "--output", "run"),
        (*DISTILL, "--output", "pruned"),
        (*DISTILL, "--output", "linked"),
        ("export", "net.pt2", "--data", "data.npy", "--output", "net.pt2"),
        ("export", MODEL, "--untrained", "--data", "data.npy", "--output", "foreign.pt2"),
        ("export", MODEL, "--untrained", "--data", "data.npy", "--output", "foreign.c"),
    ],
)
def test_inputs_and_files_of_others_stay(workplace: Path, arguments: tuple[str, ...], force: tuple[str, ...]) -> None:
    (workplace / "link.safetensors").hardlink_to(workplace / "pruned" / "model.safetensors")
    (workplace / "linked").symlink_to("pruned", target_is_directory=True)
    (workplace / "foreign.pt2").write_bytes(b"mine")
    (workplace / "foreign.h").write_text("mine")
    before = contents(workplace)
    done = command(*arguments, *force)
    assert done.exit_code == 2, done.output
    assert "error: output" in done.stderr and ("must stay as it is" in done.stderr or "nettrim did not write it" in done.stderr)
    assert contents(workplace) == before


@pytest.mark.parametrize("name", ["compare.json", "compare.svg", "compare.jsonl"])
def test_compare_leaves_files_of_others(workplace: Path, name: str) -> None:
    (workplace / "out").mkdir()
    (workplace / "out" / name).write_text("mine")
    done = command(*COMPARE, "--output", "out", "--no-resume")
    assert done.exit_code == 2 and "nettrim did not write it" in done.stderr
    assert contents(workplace / "out") == {name: b"mine"}


def test_a_result_is_replaced_only_where_the_user_says_so(workplace: Path) -> None:
    (workplace / "pruned" / "notes.txt").write_text("mine")
    before = contents(workplace / "pruned")
    done = command(*PRUNE, "--untrained", "--output", "pruned")
    assert done.exit_code == 2 and "an earlier result of nettrim is there" in done.stderr and "--force" in done.stderr
    assert contents(workplace / "pruned") == before
    assert command(*PRUNE, "--untrained", "--output", "pruned", "--force").exit_code == 0
    after = contents(workplace / "pruned")
    assert after.keys() == before.keys() and after["model.safetensors"] != before["model.safetensors"] and after["notes.txt"] == b"mine"
    assert command("export", MODEL, "--untrained", "--data", "data.npy", "--output", "new.pt2").exit_code == 0
    assert "an earlier export of nettrim" in command("export", MODEL, "--untrained", "--data", "data.npy", "--output", "new.pt2").stderr
    assert command("export", MODEL, "--untrained", "--data", "data.npy", "--output", "new.pt2", "--force").exit_code == 0


def test_bench_and_compare_renew_their_own(workplace: Path) -> None:
    for _ in range(2):
        assert command(*BENCH, "--output", "pruned").exit_code == 0
        assert command(*COMPARE, "--output", "out").exit_code == 0
    assert checkpoint.read_certificate("pruned").holds and "bench.json" in contents(workplace / "pruned")
    (workplace / "pruned" / "bench.json").write_text(json.dumps({"mine": 1}))
    done = command(*BENCH, "--output", "pruned")
    assert done.exit_code == 2 and "nettrim did not write it" in done.stderr
    assert json.loads((workplace / "pruned" / "bench.json").read_text()) == {"mine": 1}


def test_the_page_of_a_report(workplace: Path) -> None:
    assert command("report", "pruned", "--html", "page.html").exit_code == 0
    assert command("report", "pruned", "--html", "page.html").exit_code == 0
    (workplace / "page.html").write_text("<p>mine</p>")
    done = command("report", "pruned", "--html", "page.html")
    assert done.exit_code == 2 and (workplace / "page.html").read_text() == "<p>mine</p>"
    before = contents(workplace)
    for name in ("data.npy", "pruned/report.json", "run/model.safetensors"):
        assert command("report", "pruned", "--html", name).exit_code == 2
    assert contents(workplace) == before


class Odd(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"a": 1}

    def set_extra_state(self, state: object) -> None:
        return None


def odd() -> nn.Module:
    return nn.Sequential(Odd(8, 3))


def test_a_model_that_cannot_be_saved_is_refused_before_the_work(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nettrim.cli.pruning.prune", lambda *_, **__: pytest.fail("it was pruned"))
    done = command("prune", f"{__name__}:odd", "--untrained", *PRUNE[2:], "--output", "new")
    assert done.exit_code == 2 and "safetensors holds tensors only" in done.stderr
