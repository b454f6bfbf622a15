"""What README.md shows runs: its commands and its Python, in order, on a small network."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from nettrim.cli import app

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
FACTORY = f"from {__name__} import Small as factory\n"


class Small(nn.Module):
    """The names that README.md uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.fc1, self.fc2 = nn.Linear(64, 12), nn.Linear(12, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(torch.relu(self.bn1(self.conv1(x))).flatten(1))))  # type: ignore[no-any-return]


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    return [text for named, text in found if named == language]


def commands() -> list[list[str]]:
    lines = "".join(blocks("")).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("nettrim ")]


def images(seed: int) -> Tensor:
    return torch.rand(200, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def test_every_command_is_shown() -> None:
    assert {arguments[0] for arguments in commands()} == {command.name for command in app.registered_commands}


@pytest.mark.slow
def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "module.py").write_text(FACTORY)
    save_file(Small().state_dict(), tmp_path / "model.safetensors")
    for name, seed in (("calibration", 0), ("test", 1)):
        np.savez(tmp_path / f"{name}.npz", inputs=images(seed).numpy(), labels=np.arange(200) % 4)
    for arguments in commands():
        if arguments[0] not in ("demo", "reproduce"):  # data sets and minutes: they have tests of their own
            done = CliRunner().invoke(app, arguments)
            assert done.exit_code == 0, f"{arguments}\n{done.output}"


@pytest.mark.slow
def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"model": Small(), "batches": list(images(0).split(50)), "test_batches": images(1)}
    for block in blocks("python"):
        exec(block, names)
    assert names["tuned"].certificate.holds and names["made"].after < names["made"].before
    assert (tmp_path / "tuned" / "certificate.json").is_file()
