"""A disk that takes no more: everything that writes says so, leaves no part of a file, and what was there is as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import nettrim
from nettrim import InvalidInput
from nettrim.experiments.journal import Journal

resource = pytest.importorskip("resource")


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """No file grows beyond ``size`` bytes: the system refuses the write as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10)).eval()


WRITERS: dict[str, Callable[[Path], object]] = {
    "net.pt2": lambda folder: nettrim.export(network(), torch.ones(4, 64), folder / "net.pt2"),
    "net.c": lambda folder: nettrim.export(network(), torch.ones(4, 64), folder / "net.c"),
    "net.onnx": lambda folder: nettrim.export(network(), torch.ones(4, 64), folder / "net.onnx"),
    "net.safetensors": lambda folder: nettrim.save_weights(network(), folder / "net.safetensors"),
    "result": lambda folder: nettrim.prune(network(), [torch.rand(30, 64)], nettrim.Magnitude(sparsity=0.5), progress=False).save(folder),
}


@pytest.mark.parametrize("size", [0, 30_000])
@pytest.mark.parametrize("name", WRITERS)
def test_nothing_is_left_of_what_could_not_be_written(tmp_path: Path, name: str, size: int) -> None:
    if name == "net.onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    for earlier in (False, True):
        folder = tmp_path / str(earlier)
        folder.mkdir()
        if earlier:
            WRITERS[name](folder)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with full_after(size), pytest.raises(InvalidInput, match=r"nothing could be written|it must be a folder that can be written to"):
            WRITERS[name](folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_journal_says_so(tmp_path: Path) -> None:
    with Journal(tmp_path / "a.jsonl", {"seed": 1}) as journal:
        journal.add("a", {"value": 1})
        with full_after(200), pytest.raises(InvalidInput, match="a record could not be written"):
            journal.add("b", {"value": "x" * 1000})
    assert list(Journal(tmp_path / "a.jsonl", {"seed": 1}).records) == ["a"]
