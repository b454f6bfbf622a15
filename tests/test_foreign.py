"""Every reader of files, given files that others made or damaged: what leaves it is a result or a NetTrimError, within stated limits."""

from __future__ import annotations

import copy
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_bench import example_bench
from torch import nn

import nettrim
from nettrim import InvalidInput, checkpoint, foreign, packing, records
from nettrim.deploy.bench_result import Bench
from nettrim.experiments.journal import Journal
from nettrim.layers import view
from nettrim.render import bench_files
from nettrim.sources import batches_from, model_from

QUICKLY = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@dataclass(frozen=True)
class Sound:
    """Sound files of every kind, and the network and data that they belong to."""

    folder: Path
    net: nn.Sequential
    x: torch.Tensor

    def twin(self) -> nn.Sequential:
        return copy.deepcopy(self.net)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    folder = tmp_path_factory.mktemp("sound")
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 3)).eval(), torch.randn(20, 8)
    result = nettrim.prune(net, [x], nettrim.NetTrim(epsilon=0.1), heldout=[x + 0.1], progress=False)
    result.save(folder / "result")
    result.save(folder / "small", compressed=True)
    bench_files.write(replace(example_bench(), weights_hash=result.certificate.weights_hash), folder / "result")
    nettrim.compare(net, [x], methods="magnitude", sparsities=[0.5], folder=folder, progress=False)
    torch.save(net.state_dict(), folder / "state.pt")
    torch.save(net.state_dict(), folder / "old.pt", _use_new_zipfile_serialization=False)
    np.save(folder / "data.npy", x.numpy())
    np.savez(folder / "data.npz", inputs=x.numpy(), labels=np.zeros(20, int))
    np.savez_compressed(folder / "packed.npz", inputs=x.numpy(), labels=np.zeros(20, int))
    save_file({"inputs": x, "labels": torch.zeros(20)}, folder / "data.safetensors")
    return Sound(folder, net, x)


READERS: dict[str, Callable[[Sound, Path], object]] = {
    "result/model.safetensors": lambda s, file: nettrim.load(file, s.twin()),
    "small/model.safetensors": lambda s, file: (nettrim.load(file, s.twin()), checkpoint.weights_size(file)),
    "state.pt": lambda s, file: model_from("torch.nn:Identity", file),
    "old.pt": lambda s, file: nettrim.load(file, s.twin()),
    "data.npy": lambda s, file: batches_from(str(file), s.net, 8),
    "data.npz": lambda s, file: batches_from(str(file), s.net, 8),
    "packed.npz": lambda s, file: batches_from(str(file), s.net, 8),
    "data.safetensors": lambda s, file: batches_from(str(file), s.net, 8),
    "result/report.json": lambda s, file: checkpoint.read_report(file.parent),
    "result/certificate.json": lambda s, file: checkpoint.read_certificate(file.parent),
    "result/bench.json": lambda s, file: bench_files.read_bench(file.parent),
    "compare.jsonl": lambda s, file: nettrim.compare(
        s.net, [s.x], methods="magnitude", sparsities=[0.5], folder=file.parent, progress=False
    ),
}


def attempt(read: Callable[[], object]) -> str:
    """What a NetTrimError says; nothing where it is read."""
    try:
        read()
    except nettrim.NetTrimError as error:
        assert len(str(error)) < 4000
        return str(error)
    return ""


@pytest.mark.parametrize("name", READERS)
def test_the_files_are_sound(sound: Sound, name: str) -> None:
    assert attempt(lambda: READERS[name](sound, sound.folder / name)) == "" or name == "state.pt"


@pytest.mark.parametrize("name", READERS)
@QUICKLY
@given(data=st.data())
def test_damaged_files(sound: Sound, tmp_path: Path, name: str, data: st.DataObject) -> None:
    content = (sound.folder / name).read_bytes()
    kind = data.draw(st.sampled_from(["cut", "flip", "flips", "insert", "nothing", "other"]))
    if kind == "cut":
        content = content[: data.draw(st.integers(0, len(content)))]
    elif kind in ("flip", "flips"):
        changed = bytearray(content)
        for _ in range(1 if kind == "flip" else 20):  # near the beginning are the headers
            place = data.draw(st.one_of(st.integers(0, min(300, len(content) - 1)), st.integers(0, len(content) - 1)))
            changed[place] = data.draw(st.integers(0, 255))
        content = bytes(changed)
    elif kind == "insert":
        place = data.draw(st.integers(0, len(content)))
        content = content[:place] + data.draw(st.binary(max_size=20)) + content[place:]
    elif kind == "nothing":
        content = data.draw(st.binary(max_size=60))
    else:
        content = (sound.folder / data.draw(st.sampled_from(sorted(READERS)))).read_bytes()
    file = tmp_path / Path(name).name
    file.write_bytes(content)
    attempt(lambda: READERS[name](sound, file))


VALUES = [None, -1, -1.0, 10**400, 1e308, 1e999, float("nan"), "", "text", [], {}, [[]], [1, "a"], {"a": 1}, True, 0, 0.5, 2**70, "\ud800"]


def mutated(value: Any, data: st.DataObject) -> None:
    """One entry somewhere inside becomes something else, or is taken out."""
    while True:
        key = data.draw(st.sampled_from(list(value) if isinstance(value, dict) else list(range(len(value)))))
        if isinstance(value[key], (dict, list)) and value[key] and data.draw(st.integers(0, 9)):
            value = value[key]
            continue
        if data.draw(st.integers(0, 9)):
            value[key] = data.draw(st.sampled_from(VALUES))
        else:
            del value[key]
        return


@pytest.mark.parametrize("name", [name for name in READERS if name.endswith(("json", "jsonl"))])
@QUICKLY
@given(data=st.data())
def test_entries_of_other_types(sound: Sound, tmp_path: Path, name: str, data: st.DataObject) -> None:
    lines = [json.loads(line) for line in (sound.folder / name).read_text().splitlines()] if name.endswith("l") else None
    loaded = [json.loads((sound.folder / name).read_text())] if lines is None else lines
    mutated(loaded, data)
    for path in (sound.folder / name).parent.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / Path(name).name).write_text("".join(json.dumps(part) + "\n" for part in loaded))
    attempt(lambda: READERS[name](sound, tmp_path / Path(name).name))


@pytest.mark.parametrize("name", ["report.json", "certificate.json"])
@QUICKLY
@given(data=st.data())
def test_verify_of_entries_of_other_types(sound: Sound, tmp_path: Path, name: str, data: st.DataObject) -> None:
    for path in (sound.folder / "result").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    loaded = json.loads((tmp_path / name).read_text())
    mutated(loaded, data)
    (tmp_path / name).write_text(json.dumps(loaded))
    attempt(lambda: nettrim.verify(tmp_path, sound.net, [sound.x]))


@QUICKLY
@given(data=st.data())
def test_headers_of_packed_tensors(sound: Sound, data: st.DataObject) -> None:
    file = sound.folder / "small" / "model.safetensors"
    header = json.loads(checkpoint._header(file)[0][checkpoint.PACKING])
    stored = load_file(file)
    mutated(header, data)
    attempt(lambda: packing.unpack(stored, json.dumps(header)))


def test_what_arrays_are_stated_to_take(sound: Sound, tmp_path: Path) -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (4000000000, 1000), }".ljust(117) + b"\n"
    huge = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"1234"
    (tmp_path / "a.npy").write_bytes(huge)
    with pytest.raises(InvalidInput, match=r"takes 16,000,000,000,000 bytes, and 4 are there"):
        batches_from(str(tmp_path / "a.npy"), sound.net, 8)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inputs.npy", huge)
    with pytest.raises(InvalidInput, match="and 4 are there"):
        batches_from(str(tmp_path / "a.npz"), sound.net, 8)
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InvalidInput, match="it holds Python objects"):
        batches_from(str(tmp_path / "o.npy"), sound.net, 8)


@pytest.mark.parametrize("name", ["bomb.npz", "bomb.pt", "bomb.pt2"])
def test_archives_that_expand_without_bound(sound: Sound, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(foreign, "ALLOWED", 2**20)
    with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl" if name != "bomb.npz" else "inputs.npy", bytes(2**22))
    read: dict[str, Callable[[], object]] = {
        "bomb.npz": lambda: batches_from(str(tmp_path / name), sound.net, 8),
        "bomb.pt": lambda: nettrim.load(tmp_path / name, sound.twin()),
        "bomb.pt2": lambda: model_from(str(tmp_path / name), None),
    }
    with pytest.raises(
        InvalidInput, match=r"its 1 parts would take 4,194,304 bytes; the limit for a file of its .* bytes is 1,048,576 bytes"
    ):
        read[name]()


def test_pickles_of_others_run_nothing(sound: Sound, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "EXECUTED",))

    torch.save({"0.weight": Evil()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Evil()))
    np.save(tmp_path / "c.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "d.npz", inputs=np.array([Evil()], dtype=object))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(InvalidInput, match="not a plain state dict"):
            nettrim.load(tmp_path / name, sound.twin())
    for name in ("c.npy", "d.npz"):
        with pytest.raises(InvalidInput, match="cannot be read"):
            batches_from(str(tmp_path / name), sound.net, 8)
    assert not (tmp_path / "EXECUTED").exists()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({1: torch.ones(1)}, "its keys must be names, found 1"),
        ({"a": torch.ones(1, device="meta")}, "a holds no values"),
        ({"a": torch.eye(2).to_sparse()}, "a is no plain dense tensor"),
        ({"a": 1}, "must hold a state dict of tensors"),
        ([torch.ones(1)], "must hold a state dict of tensors"),
    ],
)
def test_state_that_is_none(sound: Sound, tmp_path: Path, state: Any, message: str) -> None:
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(InvalidInput, match=message):
        nettrim.load(tmp_path / "a.pt", sound.twin())


def test_deep_json(sound: Sound, tmp_path: Path) -> None:
    deep = "[" * 100_000
    header = json.dumps({"__metadata__": {"added_biases": deep}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(InvalidInput, match="its header cannot be read"):
        nettrim.load(tmp_path / "a.safetensors", sound.twin())
    for name, read in ((checkpoint.REPORT, checkpoint.read_report), (checkpoint.CERTIFICATE, checkpoint.read_certificate)):
        (tmp_path / name).write_text(deep)
        with pytest.raises(InvalidInput, match="it is not valid JSON"):
            read(tmp_path)
    (tmp_path / "bench.json").write_text(deep)
    with pytest.raises(InvalidInput, match="it is not valid JSON"):
        bench_files.read_bench(tmp_path)
    (tmp_path / "a.jsonl").write_text(f"{deep}\n")
    with pytest.raises(InvalidInput, match="one JSON record a line"):
        Journal(tmp_path / "a.jsonl", {})


def test_a_json_file_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LARGEST_FILE", 100)
    (tmp_path / checkpoint.REPORT).write_text(" " * 101)
    with pytest.raises(InvalidInput, match="it has 101 bytes, the limit is 100"):
        checkpoint.read_report(tmp_path)


@pytest.mark.parametrize("labels", [np.array(3), np.array([0.5] * 20), np.array([np.nan] * 20), np.zeros(20, complex)])
def test_labels_that_are_no_classes(sound: Sound, tmp_path: Path, labels: Any) -> None:
    np.savez(tmp_path / "a.npz", inputs=sound.x.numpy(), labels=labels)
    with pytest.raises(InvalidInput, match="labels must be whole numbers, one class a sample"):
        batches_from(str(tmp_path / "a.npz"), sound.net, 8)


@pytest.mark.parametrize("text", ["../../etc:passwd", "a..b:c", "..:x", ".a:b", "/etc/x:y", "builtins:exit", "builtins:quit", "sys:exit"])
def test_names_that_are_no_modules_and_factories_that_exit(text: str) -> None:
    with pytest.raises(InvalidInput):
        model_from(text, None)


def test_layers_made_in_inference_mode(tmp_path: Path) -> None:
    """They are pruned as copies that can be changed; a view of the layer itself refuses what could not be written to."""
    with torch.inference_mode():
        net = nn.Sequential(nn.Linear(8, 3))
    result = nettrim.prune(net, [torch.ones(9, 8)], nettrim.Magnitude(sparsity=0.5), progress=False)
    assert nettrim.verify(result.save(tmp_path / "out"), net, [torch.ones(9, 8)]) is not None
    with pytest.raises(InvalidInput, match=r"made in inference mode .* outside of torch\.inference_mode"):
        view("0", net[0])


def test_records_keep_numbers_in_their_range(sound: Sound) -> None:
    bench = json.loads((sound.folder / "result" / "bench.json").read_text())
    Bench.from_dict(bench)
    for key, value in (("parameters", -1), ("parameters", 2**63), ("bytes", -5), ("difference", -0.1)):
        changed = copy.deepcopy(bench)
        changed["forms"][0][key] = value
        with pytest.raises(InvalidInput, match=key):
            Bench.from_dict(changed)


def test_zip_parts_of_one_name(tmp_path: Path) -> None:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("a", b"1")
        archive.writestr("a", b"2")
    with pytest.raises(InvalidInput, match="two of its parts have one name"):
        foreign.archive(io.BytesIO(written.getvalue()), "file")
