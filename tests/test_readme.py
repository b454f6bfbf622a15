"""What README.md and the pages for users show runs: the first file, the commands and the Python, in order, on small networks."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import nettrim
from nettrim.cli import app

ROOT = Path(__file__).parents[1]
FACTORY = f"from {__name__} import Small as factory, Small as make\n"
COMMANDS = ("README.md", "docs/command_line.md")


class Small(nn.Module):
    """The names that the pages use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.fc1, self.fc2 = nn.Linear(64, 12), nn.Linear(12, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(torch.relu(self.bn1(self.conv1(x))).flatten(1))))  # type: ignore[no-any-return]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page(name), flags=re.DOTALL | re.MULTILINE)
    return [text for named, text in found if named == language]


def commands(name: str) -> list[list[str]]:
    lines = "".join(blocks(name, "")).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("nettrim ")]


def images(seed: int) -> Tensor:
    return torch.rand(200, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def words(text: str) -> str:
    """A text without its numbers and the spaces between its words."""
    return " ".join(re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?", "#", text).split())


def test_the_readme_fits_two_screens() -> None:
    lines = page("README.md").splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 120


def test_the_first_file_runs_and_prints_what_is_shown(tmp_path: Path) -> None:
    (source,) = blocks("README.md", "python")
    (tmp_path / "first.py").write_text(source)
    done = subprocess.run([sys.executable, "first.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown = re.search(r"<!-- printed -->\n```\n(.*?)```\n<!-- end of printed -->", page("README.md"), flags=re.DOTALL)
    assert shown is not None and words(shown[1]) == words(done.stdout), done.stdout
    assert {file.name for file in (tmp_path / "pruned").iterdir()} >= {
        "model.safetensors",
        "report.json",
        "certificate.json",
        "report.html",
    }


def test_every_command_is_shown() -> None:
    assert {arguments[0] for arguments in commands("docs/command_line.md")} == {command.name for command in app.registered_commands}


def test_links_lead_to_pages_and_headings() -> None:
    for name in ("README.md", *(f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md")))):
        for target, heading in re.findall(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)", page(name)):
            file = (ROOT / name).parent / target if target else ROOT / name
            assert file.exists(), f"{name}: {target}"
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE) if heading else []
            anchors = {"#" + re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert not heading or heading in anchors, f"{name}: {target}{heading}"


def test_every_page_is_listed() -> None:
    listed = re.findall(r"^\| \[(\S+\.md)\]", page("docs/README.md"), flags=re.MULTILINE)
    assert sorted(listed) == sorted(file.name for file in (ROOT / "docs").glob("*.md") if file.name != "README.md")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_the_commands_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "module.py").write_text(FACTORY)
    (tmp_path / "net.py").write_text(FACTORY)
    for weights in ("model.safetensors", "net.safetensors"):
        save_file(Small().state_dict(), tmp_path / weights)
    for data, seed in (("calibration.npz", 0), ("data.npz", 0), ("test.npz", 1)):
        np.savez(tmp_path / data, inputs=images(seed).numpy(), labels=np.arange(200) % 4)
    for arguments in commands(name):
        if arguments[0] not in ("demo", "reproduce"):  # data sets and minutes: they have tests of their own
            done = CliRunner().invoke(app, arguments)
            assert done.exit_code == 0, f"{arguments}\n{done.output}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["docs/deployment.md", "docs/files.md", "docs/acceleration.md"])
def test_the_python_of_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, batches = Small(), list(images(0).split(50))
    result = nettrim.prune(model, batches, nettrim.NetTrim(sparsity=0.9), heldout=images(1), progress=False)
    names: dict[str, Any] = {"nettrim": nettrim, "model": model, "batches": batches, "result": result}
    names |= {"example": images(0)[:16], "images": images(0)}
    for block in blocks(name, "python"):
        exec(block, names)
