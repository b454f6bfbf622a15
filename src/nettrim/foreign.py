"""Files that others made: their form and their size are checked before anything of them is taken in, and nothing in them is executed."""

from __future__ import annotations

import io
import math
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .status import InvalidInput, first_line

EXPANSION, ALLOWED = 64, 2**30
"""What an archive's parts may take together: so many times its own bytes, or so many bytes where that is more."""
PARTS = 100_000
"""How many parts an archive may have."""


def archive(file: IO[bytes], origin: str) -> zipfile.ZipFile:
    """A zip archive whose parts, unpacked, stay within the limits, each of its name only once.

    Raises:
        InvalidInput: it is no zip archive, damaged, encrypted, or too large unpacked.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    try:
        opened = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        raise InvalidInput(f"{origin}: it cannot be read ({error}); the file is damaged, copy or make it again") from error
    parts = opened.infolist()
    total, limit = sum(part.file_size for part in parts), max(ALLOWED, EXPANSION * size)
    if len(parts) > PARTS or total > limit:
        raise InvalidInput(
            f"{origin}: unpacked, its {len(parts):,} parts would take {total:,} bytes; the limit for a file of its {size:,} bytes "
            f"is {limit:,} bytes in {PARTS:,} parts; store the arrays without compression"
        )
    if len({part.filename for part in parts}) < len(parts) or any(part.flag_bits & 1 for part in parts):
        raise InvalidInput(f"{origin}: two of its parts have one name, or one is encrypted; make the file again")
    return opened


def part(opened: zipfile.ZipFile, name: str, origin: str) -> bytes:
    """The bytes of one part. Raises InvalidInput for damage."""
    try:
        return opened.read(name)
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, NotImplementedError, RuntimeError, EOFError, zipfile.zlib.error) as error:  # type: ignore[attr-defined]
        raise InvalidInput(f"{origin}: its part {name!r} cannot be read ({error}); the file is damaged, copy or make it again") from error


def unpickled(data: bytes | Path, origin: str, wanted: str) -> Any:
    """What ``torch.save`` wrote, of tensors and plain containers only: torch's restricted unpickler calls nothing that a file names.

    Raises:
        InvalidInput: anything else; it says that ``wanted`` is.
    """
    try:
        with open(data, "rb") if isinstance(data, Path) else io.BytesIO(data) as file:
            if zipfile.is_zipfile(file):
                archive(file, origin)
            file.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of pickle's versions
                return torch.load(file, map_location="cpu", weights_only=True)
    except InvalidInput:
        raise
    except Exception as error:  # torch raises many kinds, for damaged files and for what it does not unpickle
        raise InvalidInput(f"{origin}: it is not {wanted}, and nothing else is read of such files{_refusal(error)}") from error


def _refusal(error: Exception) -> str:
    """Why torch does not unpickle it, without torch's advice to do so all the same."""
    text = str(error)
    named = re.search(r"GLOBAL ([\w.]+)", text)
    if named:
        return f"; it would call or make {named[1]}"
    return "" if "weights_only" in text else f" ({first_line(error)})"


def dense_state(state: object, origin: str) -> dict[str, Tensor]:
    """A state dict of dense tensors with values. Raises InvalidInput, with the key, for anything else."""
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InvalidInput(f"{origin}: it must hold a state dict of tensors; save model.state_dict()")
    for key, value in state.items():
        if not isinstance(key, str):
            raise InvalidInput(f"{origin}: its keys must be names, found {key!r}; save model.state_dict()")
        if value.is_meta:
            raise InvalidInput(f"{origin}: {key} holds no values (the meta device); save the model after it was given some")
        if value.layout is not torch.strided or value.is_quantized or value.is_nested:
            raise InvalidInput(f"{origin}: {key} is no plain dense tensor ({value.layout}); save dense ones (.to_dense(), .dequantize())")
    return dict(state)


def arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of a ``.npy`` (named ``arr_0``), ``.npz`` or ``.safetensors`` file.

    Raises:
        InvalidInput: the file is damaged, holds objects, or its arrays would take more than the limits.
    """
    origin = f"data file {path}"
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with path.open("rb") as file:
            if path.suffix == ".npy":
                return {"arr_0": _tensor(file, path.stat().st_size, origin)}
            opened = archive(file, origin)
            names = [name for name in opened.namelist() if name.endswith(".npy")]
            return {
                name.removesuffix(".npy"): _tensor(io.BytesIO(data), len(data), origin)
                for name in names
                if (data := part(opened, name, origin))
            }
    except (OSError, ValueError, SafetensorError, MemoryError, RuntimeError, TypeError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"{origin}: it cannot be read ({first_line(error)}); arrays of plain numbers are needed") from error


def _tensor(file: IO[bytes], size: int, origin: str) -> Tensor:
    """The array of a ``.npy`` file of ``size`` bytes, which must be there whole before room is made for it."""
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"version {version} of the format is not known")
        shape, _, dtype = read(file)
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        stated, there = math.prod(shape) * dtype.itemsize, size - file.tell()
        if min(shape, default=0) < 0 or stated > there:
            raise ValueError(f"its shape {shape} of {dtype} takes {stated:,} bytes, and {there:,} are there")
        file.seek(0)
        array: NDArray[Any] = np.load(file, allow_pickle=False)
        return torch.from_numpy(array)
    except Exception as error:  # numpy parses the header as Python, and raises what that raises
        raise InvalidInput(f"{origin}: it cannot be read ({first_line(error)}); arrays of plain numbers are needed") from error
