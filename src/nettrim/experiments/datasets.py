"""Image data sets: scikit-learn's digits, MNIST and Fashion-MNIST, each checked against its published checksum."""

from __future__ import annotations

import difflib
import gzip
import hashlib
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nettrim.status import InvalidInput

DATA_VARIABLE = "NETTRIM_DATA"
"""The environment variable that names a folder of data sets, used when no folder is passed."""

SYSTEM_FOLDER = Path("/usr/share/datasets")
"""Where operating systems install data sets, one folder each (Debian's ``dataset-fashion-mnist``, for example)."""

NAMES = ("digits", "mnist", "fashion-mnist")
"""The names that `load` knows."""

_TEST_DIGITS = 360
_GZIP_MAGIC = b"\x1f\x8b"
_TRAIN_IMAGES, _TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
_TEST_IMAGES, _TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"

_IDX_TYPES: dict[int, str] = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images with their labels, split into training and test.

    ``train_images`` and ``test_images`` are (n, C, H, W) float32 in [0, 1]; ``train_labels`` and ``test_labels`` are (n,) int64,
    each label an index into ``classes``, the names of the classes. All on the CPU.
    """

    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: tuple[str, ...]


@dataclass(frozen=True)
class _IdxSource:
    """One data set published as four IDX files: where it is found and what its files must be."""

    folders: tuple[str, ...]  # subfolders of a data folder in which the files may lie; the first one is also the system's name
    url: str
    md5: Mapping[str, str]  # of the uncompressed files: what every copy is checked against, however it was compressed
    gz_md5: Mapping[str, str]  # of the compressed files as published
    classes: tuple[str, ...]
    debian_package: str | None = None


_SOURCES: dict[str, _IdxSource] = {
    "mnist": _IdxSource(
        folders=("mnist", "MNIST/raw"),
        url="https://ossci-datasets.s3.amazonaws.com/mnist/",
        md5={
            _TRAIN_IMAGES: "6bbc9ace898e44ae57da46a324031adb",
            _TRAIN_LABELS: "a25bea736e30d166cdddb491f175f624",
            _TEST_IMAGES: "2646ac647ad5339dbf082846283269ea",
            _TEST_LABELS: "27ae3e4e09519cfbb04c329615203637",
        },
        gz_md5={
            _TRAIN_IMAGES: "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            _TRAIN_LABELS: "d53e105ee54ea40749a09fcbcd1e9432",
            _TEST_IMAGES: "9fb629c4189551a2d022fa330f9573f3",
            _TEST_LABELS: "ec29112dd5afa0611ce80d1b7f02629c",
        },
        classes=tuple("0123456789"),
    ),
    "fashion-mnist": _IdxSource(
        folders=("fashion-mnist", "FashionMNIST/raw"),
        url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        md5={
            _TRAIN_IMAGES: "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            _TRAIN_LABELS: "9018921c3c673c538a1fc5bad174d6f9",
            _TEST_IMAGES: "8181f5470baa50b63fa0f6fddb340f0a",
            _TEST_LABELS: "15d484375f8d13e6eb1aabb0c3f46965",
        },
        gz_md5={
            _TRAIN_IMAGES: "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            _TRAIN_LABELS: "25c81989df183df01b3e8a0aad5dffbe",
            _TEST_IMAGES: "bef4ecab320f06d8554ea6380940ec79",
            _TEST_LABELS: "bb300cfdad3c16e7a12a480ee83cd310",
        },
        classes=("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        debian_package="dataset-fashion-mnist",
    ),
}


def load(name: str, data: Path | str | None = None, seed: int = 0) -> Dataset:
    """Load the data set ``name``: one of "digits", "mnist" and "fashion-mnist".

    ``digits`` are scikit-learn's 1,797 digits of 8 x 8 pixels, divided by 16 and split into 1,437 for training and 360 for
    testing, stratified by class; ``seed`` chooses the split. They ship with scikit-learn, so ``data`` is not looked at.

    ``mnist`` and ``fashion-mnist`` (28 x 28 pixels, 60,000 + 10,000, divided by 255; ``seed`` plays no part) are read from
    their four original IDX files, compressed or not. The first of these places that holds them is used:

    1. the folder ``data`` if one is passed, where they must then be; else the folder that the environment variable
       NETTRIM_DATA names: in its subfolder of the data set's name or directly in it;
    2. the system's folder, /usr/share/datasets/NAME;
    3. a download, kept in the user's cache folder.

    Every file's uncompressed content is checked against its published MD5, wherever it was found.

    Raises InvalidInput for an unknown name, files that are missing, damaged or not the published ones, and a download that fails.
    """
    if name == "digits":
        return _load_digits(seed)
    source = _SOURCES.get(name)
    if source is None:
        nearest = difflib.get_close_matches(str(name).lower(), NAMES, n=1, cutoff=0.3)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise InvalidInput(f"unknown data set {name!r}: the name must be one of {', '.join(map(repr, NAMES))}{hint}")
    paths = _find(name, source, data) or _download(name, source)
    arrays = {file: _read_checked(path, file, name) for file, path in paths.items()}
    train_images, train_labels = _as_split(arrays[_TRAIN_IMAGES], arrays[_TRAIN_LABELS], paths[_TRAIN_IMAGES], len(source.classes))
    test_images, test_labels = _as_split(arrays[_TEST_IMAGES], arrays[_TEST_LABELS], paths[_TEST_IMAGES], len(source.classes))
    return Dataset(name, train_images, train_labels, test_images, test_labels, source.classes)


def parse_idx(content: bytes, origin: str) -> NDArray[Any]:
    """The array held by an uncompressed IDX file, in native byte order.

    ``origin`` names the file in error messages. Raises InvalidInput when the magic number is not IDX, the header is cut short,
    or the length is not exactly what the header states.
    """
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _IDX_TYPES or content[3] == 0:
        raise InvalidInput(
            f"{origin}: not an IDX file: it must begin with two zero bytes, a type code and a number of dimensions, "
            f"and begins with {content[:4].hex(' ') or 'nothing (it is empty)'}; fetch the file again"
        )
    dtype, dimensions = np.dtype(_IDX_TYPES[content[2]]), content[3]
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise InvalidInput(
            f"{origin}: truncated IDX header: {dimensions} dimensions need {start} bytes and the file has {len(content)}; fetch it again"
        )
    shape = tuple(int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4))
    # Python integers: a hostile header cannot overflow the product.
    expected = start + math.prod(shape) * dtype.itemsize
    if len(content) != expected:
        fault = "truncated" if len(content) < expected else "longer than its header states"
        raise InvalidInput(
            f"{origin}: {fault}: the header states shape {shape}, which makes {expected} bytes, and the file has {len(content)}; "
            "fetch it again"
        )
    array = np.frombuffer(content, dtype=dtype, offset=start).reshape(shape)
    return array.astype(dtype.newbyteorder("="))


def read_idx(path: Path) -> NDArray[Any]:
    """The array held by the IDX file at ``path``, gzip-compressed or not (told by its content, not its name).

    Raises InvalidInput when the file cannot be read or is malformed.
    """
    return parse_idx(_read_bytes(path), str(path))


def _load_digits(seed: int) -> Dataset:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise InvalidInput("the data set 'digits' comes with scikit-learn, which is not installed: pip install 'nettrim[data]'") from error
    pixels, labels = load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(labels)), test_size=_TEST_DIGITS, random_state=seed, stratify=labels)
    images = torch.from_numpy((pixels / 16).astype(np.float32)).reshape(-1, 1, 8, 8)
    targets = torch.from_numpy(labels.astype(np.int64))
    return Dataset("digits", images[train], targets[train], images[test], targets[test], tuple("0123456789"))


def _find(name: str, source: _IdxSource, data: Path | str | None) -> dict[str, Path] | None:
    """The four files of a data set on this machine, or None when no folder holds any of them."""
    variable = os.environ.get(DATA_VARIABLE)
    if data is not None or variable:
        asked = Path(data if data is not None else str(variable)).expanduser()
        origin = "the folder data" if data is not None else f"the environment variable {DATA_VARIABLE}"
        if not asked.is_dir():
            raise InvalidInput(f"{origin} must name an existing folder, and {str(asked)!r} is not one; pass the folder of the IDX files")
        # The named subfolder first: MNIST and Fashion-MNIST use the same file names, so a subfolder is the clearer statement.
        for folder in (*(asked / sub for sub in source.folders), asked):
            paths = _files_in(folder, source)
            if paths is not None:
                return paths
        if data is not None:
            raise InvalidInput(
                f"no files of {name!r} in {str(asked)!r}: it must hold {', '.join(source.md5)} (each may end in .gz), "
                f"directly or in a subfolder {source.folders[0]!r}; pass another folder, or none to look elsewhere and download"
            )
    return _files_in(SYSTEM_FOLDER / source.folders[0], source)


def _files_in(folder: Path, source: _IdxSource) -> dict[str, Path] | None:
    """The four files in ``folder``, None when it has none of them; some but not all is an error, not a reason to look elsewhere."""
    paths: dict[str, Path] = {}
    for file in source.md5:
        for candidate in (folder / file, folder / f"{file}.gz"):
            if candidate.is_file():
                paths[file] = candidate
                break
    if not paths:
        return None
    missing = [file for file in source.md5 if file not in paths]
    if missing:
        raise InvalidInput(
            f"{str(folder)!r} holds {len(paths)} of the {len(source.md5)} files of a data set: "
            f"{', '.join(missing)} must be there too (each may end in .gz); add the missing or pass another folder"
        )
    return paths


def _download(name: str, source: _IdxSource) -> dict[str, Path]:
    """Fetch the four files into the user's cache folder, checked against the published checksums of the compressed files."""
    remedy = f"pass data=DIR (or set {DATA_VARIABLE}) with a folder that holds {', '.join(source.md5)}, each may end in .gz"
    if source.debian_package is not None:
        remedy += f"; or install Debian's package {source.debian_package}"
    try:
        import pooch
    except ImportError as error:
        raise InvalidInput(
            f"{name!r} was not found on this machine and pooch, which would download it, is not installed: "
            f"{remedy}; or pip install 'nettrim[data]'"
        ) from error
    paths = {}
    for file, md5 in source.gz_md5.items():
        url = f"{source.url}{file}.gz"
        try:
            found = pooch.retrieve(url, known_hash=f"md5:{md5}", fname=f"{file}.gz", path=pooch.os_cache("nettrim") / name)
        except (OSError, ValueError) as error:  # the network's errors are OSErrors; a wrong checksum is a ValueError
            raise InvalidInput(f"{name!r} was not found on this machine and the download of {url} failed ({error}): {remedy}") from error
        paths[file] = Path(found)
    return paths


def _read_bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read ({error}); check its permissions or pass another folder") from error
    if not content.startswith(_GZIP_MAGIC):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidInput(f"{path}: damaged gzip file ({error}); fetch it again") from error


def _read_checked(path: Path, file: str, name: str) -> NDArray[Any]:
    """Parse ``path`` after checking that it is byte for byte the file ``file`` of the data set ``name``."""
    content = _read_bytes(path)
    # A short or garbled file is best explained by its own fault, so the format is looked at before the checksum.
    array = parse_idx(content, str(path))
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    wanted = _SOURCES[name].md5[file]
    if found != wanted:
        owner = next((other for other, source in _SOURCES.items() if found in source.md5.values()), None)
        what = f"the published file of {owner!r}" if owner else "not the published file"
        raise InvalidInput(
            f"{path}: {file} of {name!r} must have the MD5 {wanted} (uncompressed), and this file has {found}: it is {what}; "
            "fetch it again or pass another folder"
        )
    return array


def _as_split(images: NDArray[Any], labels: NDArray[Any], path: Path, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, H, W) and labels (n,) of unsigned bytes as tensors (n, 1, H, W) in [0, 1] and (n,)."""
    fits = images.ndim == 3 and labels.shape == images.shape[:1] and images.dtype == labels.dtype == np.uint8 and labels.size > 0
    if not fits or int(labels.max()) >= classes:
        raise InvalidInput(
            f"{path}: images must be (n, H, W) and labels (n,) below {classes}, both unsigned bytes; found {images.dtype} {images.shape} "
            f"and {labels.dtype} {labels.shape}; fetch the files again"
        )
    return torch.from_numpy(images).unsqueeze(1).to(torch.float32).div_(255), torch.from_numpy(labels).to(torch.int64)
