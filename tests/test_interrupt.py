"""Ctrl-C: the real command says how far it was and what is kept, ends with 130, and files are as they were."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import nettrim
from nettrim import staging
from nettrim.experiments.models import fully_connected

PASSES = int(os.environ.get("TEST_PASSES", "0"))


def network() -> nn.Sequential:
    return fully_connected((8, 10, 10, 3), seed=3)


class Stops:
    """Batches whose reader gets a Ctrl-C when they are read for the ``PASSES``-th time."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.read += 1
        if self.read == PASSES:
            os.kill(os.getpid(), signal.SIGINT)
        yield torch.rand(30, 8, generator=torch.Generator().manual_seed(0))


def batches() -> Stops:
    return Stops()


def run(folder: Path, passes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TEST_PASSES": str(passes), "PYTHONPATH": paths}
    command = [sys.executable, "-m", "nettrim", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "passes", "words"),
    [
        (("prune", "--epsilon", "0.1"), 1, "before the first layer"),
        (("prune", "--epsilon", "0.1"), 5, " of 3 layers ("),
        (("distill", "pruned", "--steps", "4000"), 7, ": nothing of it is kept, and all files are as they were"),
    ],
)
def test_it_says_what_was_done_and_that_nothing_is_kept(tmp_path: Path, arguments: tuple[str, ...], passes: int, words: str) -> None:
    x = next(iter(Stops()))
    nettrim.prune(network(), [x], nettrim.Magnitude(sparsity=0.5), progress=False).save(tmp_path / "pruned")
    nettrim.prune(network(), [x], nettrim.Magnitude(sparsity=0.2), progress=False).save(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    name, *options = arguments
    folder = [options.pop(0)] if name == "distill" else []
    given = (
        name,
        *folder,
        "test_interrupt:network",
        "--untrained",
        "--data",
        "test_interrupt:batches",
        *options,
        "--output",
        "out",
        "--force",
    )
    done = run(tmp_path, passes, *given)
    assert done.returncode == 130, done.stderr
    assert "error: interrupted" in done.stderr and words in done.stderr and "Traceback" not in done.stderr
    assert "nothing of it is kept, and all files are as they were" in done.stderr
    staging.settle(tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_comparison_keeps_what_is_finished(tmp_path: Path) -> None:
    given = ("compare", "test_interrupt:network", "--untrained", "--data", "test_interrupt:batches", "--methods", "magnitude")
    done = run(tmp_path, 14, *given, "--sparsity", "0.3", "0.5", "0.7", "0.8", "0.9", "--output", "out")
    assert done.returncode == 130 and "what is finished is kept in out" in done.stderr, done.stderr
    kept = (tmp_path / "out" / "compare.jsonl").read_text().splitlines()
    assert f"interrupted after {len(kept) - 1} of 5 runs" in done.stderr and len(kept) > 1
