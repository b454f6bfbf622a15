"""Data sets: the IDX format, where files are looked for, and what is refused."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nettrim.experiments import datasets
from nettrim.experiments.datasets import DATA_VARIABLE, load, parse_idx, read_idx
from nettrim.status import InvalidInput

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx(array: np.ndarray) -> bytes:
    """The array as an IDX file, written from the format's description and not with the library."""
    code = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}[array.dtype.str[1:]]
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def small_files() -> dict[str, bytes]:
    """A data set of five training and three test images of 4 x 6 pixels."""
    random = np.random.default_rng(0)
    contents = {}
    for images, labels, count in ((FILES[0], FILES[1], 5), (FILES[2], FILES[3], 3)):
        contents[images] = idx(random.integers(0, 256, (count, 4, 6), dtype=np.uint8))
        contents[labels] = idx(random.integers(0, 10, count, dtype=np.uint8))
    return contents


def write(folder: Path, contents: dict[str, bytes], *, compress: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / (f"{name}.gz" if compress else name)).write_bytes(gzip.compress(content) if compress else content)


def publish(monkeypatch: pytest.MonkeyPatch, contents: dict[str, bytes], name: str = "mnist") -> None:
    """Make ``contents`` the published files of the data set."""
    sums = {file: hashlib.md5(content).hexdigest() for file, content in contents.items()}
    monkeypatch.setitem(datasets._SOURCES, name, dataclasses.replace(datasets._SOURCES[name], md5=sums))


@pytest.fixture(autouse=True)
def nothing_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees the machine's own data sets, its environment or a network."""
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    monkeypatch.setattr(datasets, "SYSTEM_FOLDER", tmp_path / "system")

    def refuse(*_: object, **__: object) -> str:
        raise ConnectionError("no network in tests")

    monkeypatch.setattr("pooch.retrieve", refuse)


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "i4", "f4", "f8"])
@pytest.mark.parametrize("shape", [(7,), (3, 2), (2, 3, 4), (0, 5)])
def test_idx_round_trip(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(1).uniform(-100, 100, shape).astype(dtype)
    parsed = parse_idx(idx(array), "here")
    assert parsed.dtype == array.dtype and parsed.dtype.isnative
    np.testing.assert_array_equal(parsed, array)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "not an IDX file"),
        (b"\0\0\x08", "not an IDX file"),
        (b"\0\1\x08\1\0\0\0\1a", "not an IDX file"),
        (b"\0\0\x07\1\0\0\0\1a", "not an IDX file"),
        (b"\0\0\x08\0", "not an IDX file"),
        (b"<html>an error page</html>", "not an IDX file"),
        (b"\0\0\x08\3\0\0\0\1", "truncated IDX header"),
        (b"\0\0\x08\1\0\0\0\4abc", "truncated: the header states"),
        (b"\0\0\x08\1\0\0\0\2abc", "longer than"),
        (b"\0\0\x08\4" + b"\xff" * 16, "truncated: the header states"),
    ],
)
def test_malformed_idx_is_refused(content: bytes, fault: str) -> None:
    with pytest.raises(InvalidInput, match=fault) as caught:
        parse_idx(content, "somewhere/file")
    assert "somewhere/file" in str(caught.value)


def test_gzip_is_told_by_content_and_damage_is_refused(tmp_path: Path) -> None:
    array = np.arange(50, dtype=np.uint8)
    unnamed = tmp_path / "no-suffix"
    unnamed.write_bytes(gzip.compress(idx(array)))
    np.testing.assert_array_equal(read_idx(unnamed), array)

    whole = gzip.compress(idx(array))
    for damaged in (whole[:-12], whole[:15] + b"\xff\xff\xff" + whole[18:]):
        unnamed.write_bytes(damaged)
        with pytest.raises(InvalidInput, match="damaged gzip"):
            read_idx(unnamed)
    with pytest.raises(InvalidInput, match="cannot be read"):
        read_idx(tmp_path / "absent")


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("subfolder", ["", "mnist", "MNIST/raw"])
@pytest.mark.parametrize("by", ["argument", "variable"])
def test_files_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: bool, subfolder: str, by: str) -> None:
    contents = small_files()
    publish(monkeypatch, contents)
    write(tmp_path / "data" / subfolder, contents, compress=compress)
    if by == "variable":
        monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "data"))
    data = load("mnist", tmp_path / "data" if by == "argument" else None)

    assert data.name == "mnist" and data.classes == tuple("0123456789")
    assert data.train_images.shape == (5, 1, 4, 6) and data.test_images.shape == (3, 1, 4, 6)
    assert data.train_images.dtype == torch.float32 and data.train_labels.dtype == torch.int64
    pixels = np.frombuffer(contents[FILES[0]][16:], np.uint8).reshape(5, 1, 4, 6)
    np.testing.assert_allclose(data.train_images.numpy(), pixels / 255, rtol=1e-6)
    assert data.train_labels.tolist() == list(contents[FILES[1]][8:])
    assert data.test_labels.tolist() == list(contents[FILES[3]][8:])


def test_subfolder_goes_before_the_folder_and_the_argument_before_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = small_files()
    publish(monkeypatch, contents, "fashion-mnist")
    others = {name: content[:-1] + bytes([content[-1] ^ 1]) for name, content in contents.items()}
    write(tmp_path, others)
    write(tmp_path / "fashion-mnist", contents)
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "absent"))
    assert load("fashion-mnist", tmp_path).classes[9] == "Ankle boot"


def test_the_system_folder_is_used_when_the_variable_s_folder_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = small_files()
    publish(monkeypatch, contents, "fashion-mnist")
    write(tmp_path / "system" / "fashion-mnist", contents, compress=True)
    assert len(load("fashion-mnist").train_labels) == 5
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "empty"))
    assert len(load("fashion-mnist").train_labels) == 5


@pytest.mark.parametrize("file", FILES)
def test_wrong_checksum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    contents = small_files()
    publish(monkeypatch, contents)
    contents[file] = contents[file][:-1] + bytes([contents[file][-1] ^ 1])
    write(tmp_path, contents)
    with pytest.raises(InvalidInput, match="MD5") as caught:
        load("mnist", tmp_path)
    assert str(tmp_path / file) in str(caught.value) and "not the published file" in str(caught.value)


def test_another_data_set_s_files_are_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = small_files()
    publish(monkeypatch, contents)
    write(tmp_path, contents)
    with pytest.raises(InvalidInput, match="published file of 'mnist'"):
        load("fashion-mnist", tmp_path)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = small_files()
    contents[FILES[1]] = contents[FILES[3]]
    publish(monkeypatch, contents)
    write(tmp_path, contents)
    with pytest.raises(InvalidInput, match=r"images must be \(n, H, W\)"):
        load("mnist", tmp_path)
    contents[FILES[1]] = idx(np.array([0, 1, 2, 3, 10], dtype=np.uint8))
    publish(monkeypatch, contents)
    write(tmp_path, contents)
    with pytest.raises(InvalidInput, match="below 10"):
        load("mnist", tmp_path)


def test_missing_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput, match="existing folder"):
        load("mnist", tmp_path / "absent")
    with pytest.raises(InvalidInput, match="no files of 'mnist'") as caught:
        load("mnist", tmp_path)
    assert all(file in str(caught.value) for file in FILES)

    contents = small_files()
    del contents[FILES[2]]
    write(tmp_path, contents)
    with pytest.raises(InvalidInput, match="3 of the 4") as caught:
        load("mnist", tmp_path)
    assert FILES[2] in str(caught.value) and FILES[0] not in str(caught.value)

    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "absent"))
    with pytest.raises(InvalidInput, match=DATA_VARIABLE):
        load("mnist")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_a_failed_download_names_the_remedy(name: str) -> None:
    with pytest.raises(InvalidInput, match="no network in tests") as caught:
        load(name)
    message = str(caught.value)
    assert "data=DIR" in message and DATA_VARIABLE in message and FILES[0] in message
    assert ("dataset-fashion-mnist" in message) == (name == "fashion-mnist")


def test_download_asks_for_the_published_files_and_checks_their_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = small_files()
    publish(monkeypatch, contents)
    asked: list[tuple[str, str]] = []

    def retrieve(url: str, known_hash: str, fname: str, path: Path) -> str:
        asked.append((url, known_hash))
        return str(tmp_path / fname)

    monkeypatch.setattr("pooch.retrieve", retrieve)
    write(tmp_path, contents, compress=True)
    assert len(load("mnist").train_labels) == 5
    source = datasets._SOURCES["mnist"]
    assert asked == [(f"{source.url}{file}.gz", f"md5:{source.gz_md5[file]}") for file in FILES]

    write(tmp_path, {FILES[3]: contents[FILES[1]]}, compress=True)
    with pytest.raises(InvalidInput, match="MD5"):
        load("mnist")


@pytest.mark.parametrize(("name", "missing"), [("digits", "sklearn.datasets"), ("mnist", "pooch")])
def test_a_missing_optional_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, name: str, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InvalidInput, match=r"nettrim\[data\]"):
        load(name)


def test_importing_the_loaders_needs_no_optional_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sklearn", "pooch"):
        monkeypatch.setitem(sys.modules, module, None)
    spec = importlib.util.find_spec("nettrim.experiments.datasets")
    assert spec is not None and spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, fresh)  # dataclasses look their module up
    spec.loader.exec_module(fresh)


@pytest.mark.parametrize(("wrong", "nearest"), [("fashion", "fashion-mnist"), ("MNIST", "mnist"), ("digit", "digits")])
def test_unknown_name_is_refused_with_the_nearest(wrong: str, nearest: str) -> None:
    with pytest.raises(InvalidInput, match=f"did you mean '{nearest}'"):
        load(wrong)


def test_unknown_name_without_a_near_one() -> None:
    with pytest.raises(InvalidInput, match=r"must be one of 'digits', 'mnist', 'fashion-mnist'$"):
        load("xyzzy")


def test_digits() -> None:
    data = load("digits")
    assert data.train_images.shape == (1437, 1, 8, 8) and data.test_images.shape == (360, 1, 8, 8)
    assert data.train_labels.shape == (1437,) and data.test_labels.shape == (360,)
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        assert images.min() == 0 and images.max() == 1
        # Stratified: every class has its share of a tenth, give or take the classes' own imbalance.
        shares = torch.bincount(labels, minlength=10) / len(labels)
        assert shares.shape == (10,) and (shares - 0.1).abs().max() < 0.005
    again, other = load("digits", seed=0), load("digits", seed=1)
    assert torch.equal(again.train_images, data.train_images) and torch.equal(again.test_labels, data.test_labels)
    assert not torch.equal(other.test_images, data.test_images)
    # The two parts share no sample: together they are all 1,797, whatever the split.
    totals = [torch.cat([part.train_images, part.test_images]).flatten(1).double().sum(0) for part in (data, other)]
    torch.testing.assert_close(*totals)
