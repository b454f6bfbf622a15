"""Compressed weights files: small, the same to everything that reads weights, and refused when damaged."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner, Result

import nettrim
from nettrim import InvalidInput, Magnitude, NetTrim, PruneResult, checkpoint
from nettrim.cli import app
from nettrim.experiments import datasets, training

FILES = ["certificate.json", "model.safetensors", "report.html", "report.json"]


@pytest.fixture(scope="module")
def digits() -> datasets.Dataset:
    return datasets.load("digits")


@pytest.fixture(scope="module")
def network(digits: datasets.Dataset) -> nn.Module:
    return training.trained_network(digits)


@pytest.fixture(scope="module")
def result(network: nn.Module, digits: datasets.Dataset) -> PruneResult:
    return nettrim.prune(network, digits.train_images[:200], NetTrim(sparsity=0.95), progress=False)


def blank() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)).eval()


def same(one: nn.Module, other: nn.Module) -> bool:
    """The same keys, dtypes and bytes."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key].reshape(-1).view(torch.uint8), b[key].reshape(-1).view(torch.uint8))
        for key in a
    )


def zipped(file: Path) -> int:
    """Bytes of a zip archive (deflate, the highest level) that holds the file."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as made:
        made.write(file, file.name)
    return len(archive.getvalue())


def test_smaller_than_a_zip_archive(result: PruneResult, tmp_path: Path) -> None:
    dense = result.save(tmp_path / "dense") / "model.safetensors"
    small = result.save(tmp_path / "small", compressed=True) / "model.safetensors"
    size = small.stat().st_size
    assert size <= 0.08 * dense.stat().st_size  # biases are dense, and the header is counted
    assert size < 0.85 * zipped(dense)
    assert zipped(small) > 0.98 * size - 1500  # nothing is left to be taken out but the header's text


def test_masked_weights_are_small_too(network: nn.Module, digits: datasets.Dataset, tmp_path: Path) -> None:
    model = nettrim.prune(network, digits.train_images[:20], Magnitude(sparsity=0.95), progress=False).model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(network.get_parameter(name) * (parameter != 0))
    assert any(bool((parameter.signbit() & (parameter == 0)).any()) for parameter in model.parameters())
    dense, small = (nettrim.save_weights(model, tmp_path / f"{c}.safetensors", compressed=c) for c in (False, True))
    assert small.stat().st_size <= 0.1 * dense.stat().st_size
    assert small.stat().st_size < 0.85 * zipped(dense)
    assert same(nettrim.load(small, into=blank()), model)


def test_everything_reads_them(result: PruneResult, network: nn.Module, digits: datasets.Dataset, tmp_path: Path) -> None:
    data = digits.train_images[:200]
    folder = result.save(tmp_path / "out", compressed=True)
    loaded = nettrim.load(folder, into=blank())
    assert same(loaded, result.model)
    assert same(nettrim.load(folder / "model.safetensors", into=blank()), result.model)
    assert nettrim.verify(folder, network, data).weights_hash == result.certificate.weights_hash
    saved = PruneResult(loaded, checkpoint.read_report(folder), checkpoint.read_certificate(folder))
    assert nettrim.recertify(saved, loaded, network, data).certificate.weights_hash == result.certificate.weights_hash


def test_dense_and_compressed_replace_each_other(result: PruneResult, tmp_path: Path) -> None:
    folder = result.save(tmp_path)
    dense = (folder / "model.safetensors").read_bytes()
    result.save(folder, compressed=True)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert (folder / "model.safetensors").stat().st_size < 0.1 * len(dense)
    result.save(folder)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert same(nettrim.load(folder, into=blank()), result.model)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert "nettrim_packing" not in file.metadata()


def test_other_readers_see_what_it_is(result: PruneResult, tmp_path: Path) -> None:
    folder = result.save(tmp_path, compressed=True)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["nettrim_packing"])
    assert header["version"] == 1
    entry = dict(zip(header["fields"], header["tensors"]["1.weight"], strict=True))
    assert (entry["shape"], entry["dtype"], entry["listed"]) == ([300, 64], "F32", 960)
    state = load_file(folder / "model.safetensors")
    assert state["packed:1.weight"].dtype is torch.uint8 and torch.equal(state["5.bias"], result.model.state_dict()["5.bias"])
    with pytest.raises(RuntimeError, match=r"Missing key.*1\.weight"):
        blank().load_state_dict(state)


def test_added_biases_and_batch_norm(tmp_path: Path) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(40, 60, bias=False), nn.ReLU(), nn.Linear(60, 50), nn.BatchNorm1d(50), nn.ReLU(), nn.Linear(50, 3)
        ).eval()

    x = torch.randn(60, 40, generator=torch.Generator().manual_seed(0))
    made = nettrim.prune(net(), x, NetTrim(sparsity=0.9), add_bias=True, progress=False)
    folder = made.save(tmp_path, compressed=True)
    loaded = nettrim.load(folder, into=net())
    assert (
        same(loaded, made.model) and "0.bias" in loaded.state_dict() and loaded.state_dict()["3.num_batches_tracked"].dtype is torch.int64
    )
    assert nettrim.verify(folder, net(), x).holds


def test_sizes_are_those_of_the_files(result: PruneResult, tmp_path: Path) -> None:
    parameters = sum(p.numel() for p in result.model.parameters())
    for compressed in (False, True):
        file = result.save(tmp_path, compressed=compressed) / "model.safetensors"
        size = checkpoint.weights_size(file)
        assert (size.dense_bytes, size.stored_bytes, size.tensors) == (4 * parameters, file.stat().st_size, 6)
        assert size.ratio == size.stored_bytes / size.dense_bytes and (size.packed > 0) == compressed
        assert size.to_dict().keys() == {"dense_bytes", "stored_bytes", "ratio", "tensors", "packed"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_any_model_can_be_saved(result: PruneResult, tmp_path: Path, dtype: torch.dtype) -> None:
    model = nettrim.load(result.save(tmp_path), into=blank()).to(dtype)
    file = nettrim.save_weights(model, tmp_path / "new" / "small.safetensors", compressed=True)
    assert [path.name for path in file.parent.iterdir()] == ["small.safetensors"]
    assert same(nettrim.load(file, into=blank().to(dtype)), model)
    assert file.stat().st_size < 0.11 * checkpoint.weights_size(file).dense_bytes


def test_compacted_models(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    x = torch.randn(60, 30, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    pruned = nettrim.prune(
        nn.Sequential(nn.Linear(30, 80), nn.ReLU(), nn.Linear(80, 4)).eval(), x, Magnitude(sparsity=0.96), progress=False
    )
    small = nettrim.compact(pruned.model, x).model
    before = {key: value.clone() for key, value in small.state_dict().items()}
    file = nettrim.save_weights(small, tmp_path / "small.safetensors", compressed=True)
    assert checkpoint.weights_size(file).packed > 0
    assert all(torch.equal(value, before[key]) for key, value in checkpoint.read_weights(file).items())
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())


def test_names_that_cannot_be(result: PruneResult, tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("weights", "weights.pt", "folder.safetensors"):
        with pytest.raises(InvalidInput, match=r"must be a file whose name ends in \.safetensors"):
            nettrim.save_weights(result.model, tmp_path / name)
    with pytest.raises(InvalidInput, match="found PruneResult; a PruneResult has a save of its own"):
        nettrim.save_weights(result, tmp_path / "a.safetensors")  # type: ignore[arg-type]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InvalidInput, match=r"output folder .*choose another"):
        nettrim.save_weights(result.model, tmp_path / "file" / "a.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.safetensors"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(3, dtype=torch.complex128), "safetensors does not hold torch.complex128 .extra."),
        (torch.eye(3).to_sparse(), "entry 'extra' is a torch.sparse_coo tensor.*use .to_dense"),
        (torch.zeros(3, device="meta"), "entry 'extra' holds no values yet"),
    ],
)
def test_state_that_cannot_be_stored(value: torch.Tensor, words: str, tmp_path: Path) -> None:
    model = nn.Linear(50, 40)
    model.register_buffer("extra", value)
    for compressed in (False, True):
        with pytest.raises(InvalidInput, match=words):
            nettrim.save_weights(model, tmp_path / "a.safetensors", compressed=compressed)
    with pytest.raises(InvalidInput, match="holds no values yet"):
        nettrim.save_weights(nn.LazyLinear(3), tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_save_leaves_the_earlier_file(result: PruneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = nettrim.save_weights(result.model, tmp_path / "a.safetensors")
    before = file.read_bytes()

    def fail(*arguments: Any, **keywords: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(InvalidInput, match=r"nothing could be written .*earlier files are as they were"):
        nettrim.save_weights(blank(), file, compressed=True)
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_damaged_files_are_refused_and_the_model_stays(result: PruneResult, tmp_path: Path) -> None:
    file = result.save(tmp_path, compressed=True) / "model.safetensors"
    good, model = file.read_bytes(), blank()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for length in (0, 7, 100, len(good) // 2, len(good) - 1):
        file.write_bytes(good[:length])
        with pytest.raises(InvalidInput, match=r"weights file .*model\.safetensors: it cannot be read"):
            nettrim.load(tmp_path, into=model)
    start = 8 + int.from_bytes(good[:8], "little")
    for place in range(start, len(good), 97):
        file.write_bytes(good[:place] + bytes([good[place] ^ 0x55]) + good[place + 1 :])
        with safe_open(file, framework="pt") as opened:
            plain = {key: opened.get_tensor(key) for key in opened.keys() if not key.startswith("packed:")}  # noqa: SIM118 (no mapping)
        if all(torch.equal(value, result.model.state_dict()[key]) for key, value in plain.items()):  # dense tensors bear no checksum
            with pytest.raises(InvalidInput, match=r"weights file .*model\.safetensors: tensor '[135]\.(weight|bias)': .*damaged"):
                nettrim.load(tmp_path, into=model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_later_versions_and_foreign_headers(result: PruneResult, tmp_path: Path) -> None:
    file = result.save(tmp_path, compressed=True) / "model.safetensors"
    state = load_file(file)
    for header, message in (('{"version":2}', "upgrade nettrim, or save the weights again without compression"), ("{", "not valid JSON")):
        save_file(state, file, metadata={"nettrim_packing": header})
        for call in (lambda: nettrim.load(tmp_path, into=blank()), lambda: checkpoint.weights_size(file)):
            with pytest.raises(InvalidInput, match=rf"weights file .*model\.safetensors: header of packed tensors.*{message}"):
                call()
    with pytest.raises(InvalidInput, match="there is no such file"):
        checkpoint.weights_size(tmp_path / "nothing.safetensors")


def command(*arguments: str) -> Result:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return done


def test_on_the_command_line(digits: datasets.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    save_file({"inputs": digits.train_images[:100].contiguous()}, tmp_path / "data.safetensors")
    nettrim.save_weights(blank(), "weights.safetensors", compressed=True)  # weights to start from may be compressed too
    made = ("prune", f"{__name__}:blank", "--weights", "weights.safetensors", "--data", "data.safetensors", "--sparsity", "0.95")
    told = command(*made, "--output", "out", "--compressed").stdout
    size = checkpoint.weights_size(tmp_path / "out" / "model.safetensors")
    assert size.ratio < 0.08 and size.packed >= 3
    line = f"weights: {size.stored_bytes:,} bytes on disk, {size.dense_bytes:,} dense ({size.ratio:.1%}; {size.packed} of 6 tensors packed)"
    assert line in told and line in command("report", "out", "--html", "page.html").stdout
    assert (tmp_path / "page.html").read_text() == (tmp_path / "out" / "report.html").read_text()  # masks from packed weights
    assert json.loads(command("report", "out", "--json").stdout)["size"] == size.to_dict()
    assert json.loads(command(*made, "--output", "dense", "--json").stdout)["size"]["ratio"] > 1
    assert "(100." in command("report", "dense").stdout
    tuned = command("distill", "out", *made[1:6], "--steps", "3", "--output", "tuned", "--compressed", "--json")
    assert json.loads(tuned.stdout)["size"]["packed"] >= 3
    command("verify", "tuned", *made[1:6])
    (tmp_path / "dense" / "model.safetensors").unlink()
    assert "weights: model.safetensors is not in this folder" in command("report", "dense").stdout
    assert json.loads(command("report", "dense", "--json").stdout)["size"] is None
