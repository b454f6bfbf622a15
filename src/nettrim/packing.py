"""Tensors with many zeros in fewer bytes, and back to the last bit: where the values stand, and the bytes of the values (docs/files.md)."""

from __future__ import annotations

import json
import math
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .status import InvalidInput

VERSION = 1
CODINGS = ("gaps", "bitmask", "dense")
PREFIX = "packed:"
FIELDS = ("dtype", "shape", "coding", "listed", "negative_zeros", "gaps", "sections", "crc32")  # of a tensor in the header, in this order
ESCAPE = 255  # in a stream of gaps: 255 zeros, and no value behind them
EXPANSION = 1024  # a payload has at least its tensor's dense bytes over this, so that a small file cannot claim much memory
LEVEL = 6  # of deflate: 9 takes three times as long for 0.1 % of the bytes
DTYPES: dict[str, torch.dtype] = {  # by safetensors' names
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
DIMENSIONS = 64  # the most that torch has

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Entry:
    """What a file's header says of one packed tensor; ``sections`` are the stored bytes of its parts, ``gaps`` the bytes of that stream.

    ``listed`` values are stored (of a dense coding all); of the other entries, ``negative_zeros`` are -0.0 and the rest +0.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    coding: str
    listed: int
    negative_zeros: int
    gaps: int
    sections: tuple[int, ...]
    crc32: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the tensor as it was."""
        return self.numel * self.dtype.itemsize

    @property
    def payload_bytes(self) -> int:
        """Bytes of the tensor as it is stored: its sections, filled up with zeros to the least that is allowed."""
        return max(sum(self.sections), -(-self.dense_bytes // EXPANSION))

    @property
    def decoded(self) -> list[int]:
        """Bytes of each section when decoded: positions, signs of zeros where there are any, and the bytes of the values plane by plane."""
        positions = {"gaps": [self.gaps], "bitmask": [-(-self.numel // 8)], "dense": []}[self.coding]
        signs = [-(-(self.numel - self.listed) // 8)] if self.negative_zeros else []
        return [*positions, *signs, *[self.listed] * self.dtype.itemsize]

    def to_list(self) -> list[Any]:
        """As JSON, in the order of `FIELDS`."""
        numbers = (self.listed, self.negative_zeros, self.gaps)
        return [NAMES[self.dtype], list(self.shape), self.coding, *numbers, list(self.sections), self.crc32]

    @classmethod
    def from_list(cls, name: str, data: Any) -> Entry:
        """Reads JSON. Raises InvalidInput, with the tensor's name, for what `pack` cannot have written; allocates nothing."""
        if not isinstance(data, list) or len(data) != len(FIELDS):
            raise _damaged(name, f"its entry must be a list of {', '.join(FIELDS)}, found {data!r}")
        dtype, shape, coding, listed, negative, gaps, sections, crc32 = data
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise _damaged(name, f"dtype must be one of {', '.join(DTYPES)}, found {dtype!r}")
        if not isinstance(shape, list) or len(shape) > DIMENSIONS or not all(_count(size) and size > 0 for size in shape):
            raise _damaged(name, f"shape must be a list of at most {DIMENSIONS} positive integers, found {shape!r}")
        if coding not in CODINGS:
            raise _damaged(name, f"coding must be one of {', '.join(CODINGS)}, found {coding!r}")
        numel = math.prod(shape)
        if numel * DTYPES[dtype].itemsize >= 2**63:
            raise _damaged(name, f"shape {shape} holds more bytes than can be addressed")
        if not _count(listed) or not (numel if coding == "dense" else 0) <= listed <= numel:
            raise _damaged(
                name, f"listed must be {'' if coding == 'dense' else 'at most '}the {numel} entries of its shape, found {listed!r}"
            )
        zeros = numel - listed if DTYPES[dtype].is_floating_point else 0
        least, most = (listed, listed + numel // ESCAPE) if coding == "gaps" else (0, 0)
        for field, value, low, high in (
            ("negative_zeros", negative, 0, zeros),
            ("gaps", gaps, least, most),
            ("crc32", crc32, 0, 2**32 - 1),
        ):
            if not _count(value) or not low <= value <= high:
                raise _damaged(name, f"{field} must be an integer from {low} to {high}, found {value!r}")
        if not isinstance(sections, list) or not all(map(_count, sections)):
            raise _damaged(name, f"sections must be a list of byte counts, found {sections!r}")
        entry = cls(tuple(shape), DTYPES[dtype], coding, listed, negative, gaps, tuple(sections), crc32)
        if len(sections) != len(entry.decoded) or any(map(int.__gt__, sections, entry.decoded)):
            raise _damaged(name, f"its sections hold {entry.decoded} bytes, which cannot be stored in {sections}")
        return entry


def pack(state: Mapping[str, Tensor], codings: Sequence[str] = CODINGS) -> tuple[dict[str, Tensor], str]:
    """Each tensor in the smallest of ``codings``, or as it is where none of them saves bytes, its part of the header counted.

    Returns:
        The tensors to store, a packed one as uint8 (bytes,) under a prefix that no key of ``state`` begins with; and the header that
        `unpack` needs to restore ``state`` to the last bit.

    Raises:
        InvalidInput: the machine keeps numbers with the highest byte first.
    """
    _check_byte_order()
    prefix = PREFIX
    while any(key.startswith(prefix) for key in state):
        prefix += PREFIX
    stored, entries = {}, {}
    for key, value in state.items():
        made = packed(value, codings)
        if made is not None:
            # JSON inside the JSON of safetensors: quotes are escaped there
            said = len(_json(_json({key: made[0].to_list()}))) + len(prefix)
        if made is None or made[0].payload_bytes + said >= made[0].dense_bytes:
            stored[key] = value
        else:
            entries[key], stored[prefix + key] = made[0].to_list(), made[1]
    return stored, _json({"version": VERSION, "prefix": prefix, "fields": FIELDS, "tensors": entries})


def packed(tensor: Tensor, codings: Sequence[str] = CODINGS) -> tuple[Entry, Tensor] | None:
    """A tensor in the smallest of ``codings``: its entry and its payload, uint8 (bytes,). None for dtypes that are not in `DTYPES`
    and for tensors that are empty or not strided.

    Values are left out whose bytes are all zero, and negative zeros where there are many: pruning by a product with a mask leaves them
    in place of all negative weights. Their signs are then one bit for each entry that is left out.
    """
    if tensor.layout is not torch.strided or tensor.dtype not in NAMES or tensor.numel() == 0:
        return None
    size = tensor.dtype.itemsize
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    words, rows = raw.view(f"u{size}"), raw.reshape(-1, size)
    minus = words == (1 << (8 * size - 1)) if tensor.is_floating_point() else np.zeros(words.shape, bool)
    listed = words != 0
    split = 8 * size * int(minus.sum()) > int((~listed | minus).sum())  # as values they would take more than one bit an entry
    if split:
        listed &= ~minus
    positions = np.flatnonzero(listed)
    gaps = _gaps(positions) if "gaps" in codings else np.zeros(0, np.uint8)
    signs = [np.packbits(minus[~listed], bitorder="little").tobytes()] if split else []
    values = [*signs, *_planes(rows[positions])]
    decoded: dict[str, list[bytes]] = {
        "gaps": [gaps.tobytes(), *values],
        "bitmask": [np.packbits(listed, bitorder="little").tobytes(), *values],
        "dense": _planes(rows),
    }
    shared = [_deflated(part) for part in values]  # of gaps and bitmask
    parts = {
        coding: [_deflated(part) for part in decoded[coding]] if coding == "dense" else [_deflated(decoded[coding][0]), *shared]
        for coding in codings
    }
    best = min(parts, key=lambda coding: sum(map(len, parts[coding])))
    sections = tuple(map(len, parts[best]))
    negative = int(minus.sum()) if split and best != "dense" else 0
    count = words.size if best == "dense" else positions.size
    entry = Entry(
        tuple(tensor.shape),
        tensor.dtype,
        best,
        count,
        negative,
        gaps.size if best == "gaps" else 0,
        sections,
        _checksum(tensor.dtype, tensor.shape, raw),
    )
    payload = bytearray(entry.payload_bytes)
    joined = b"".join(parts[best])
    payload[: len(joined)] = joined
    return entry, torch.frombuffer(payload, dtype=torch.uint8)


def read_header(text: str) -> tuple[str, dict[str, Entry]]:
    """The prefix of packed tensors, and their entries by the names that they had.

    Raises:
        InvalidInput: the header is damaged, or of a later version.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"header of packed tensors: it is not valid JSON ({error}); the file is damaged") from error
    version = data.get("version") if isinstance(data, dict) else None
    if not _count(version) or version == 0:
        raise InvalidInput(f"header of packed tensors: version must be a positive integer, found {version!r}; the file is damaged")
    if version > VERSION:
        raise InvalidInput(
            f"header of packed tensors: version {version} is later than {VERSION}, the last that this nettrim knows; "
            "upgrade nettrim, or save the weights again without compression where they were made"
        )
    prefix, tensors = data.get("prefix"), data.get("tensors")
    if not isinstance(prefix, str) or not prefix or not isinstance(tensors, dict) or data.get("fields") != list(FIELDS):
        raise InvalidInput(
            f"header of packed tensors: it must hold a prefix, the fields {', '.join(FIELDS)} and an object of tensors; the file is damaged"
        )
    return prefix, {name: Entry.from_list(name, entry) for name, entry in tensors.items()}


def unpack(stored: Mapping[str, Tensor], header: str) -> dict[str, Tensor]:
    """The tensors that `pack` was given, to the last bit.

    Raises:
        InvalidInput: the header is damaged or of a later version, or a tensor is missing, or its bytes are not what the header says;
            the message names it. What is allocated is what the stated shape takes, at most 1024 times what is stored, and while a tensor
            is decoded up to some 20 bytes more for each of its entries.
    """
    _check_byte_order()
    prefix, entries = read_header(header)
    state = {key: value for key, value in stored.items() if not key.startswith(prefix)}
    unknown = [key for key in stored if key.startswith(prefix) and key.removeprefix(prefix) not in entries]
    if unknown:
        raise InvalidInput(f"tensor {unknown[0]!r}: the header of packed tensors does not speak of it; the file is damaged")
    for name, entry in entries.items():
        if name in state:
            raise _damaged(name, "it is stored both packed and as it is")
        if prefix + name not in stored:
            raise _damaged(name, f"the header speaks of it, and there is no {prefix + name!r}")
        state[name] = restored(name, entry, stored[prefix + name])
    return state


def restored(name: str, entry: Entry, payload: Tensor) -> Tensor:
    """One packed tensor as it was. Raises InvalidInput, with ``name``, when the payload is not what the entry says."""
    if payload.dtype is not torch.uint8 or payload.ndim != 1 or payload.numel() != entry.payload_bytes:
        raise _damaged(
            name, f"it must be stored as {entry.payload_bytes} bytes, found {payload.dtype} of shape {tuple(payload.shape)}; truncated?"
        )
    data, start, parts = payload.cpu().numpy().data, 0, []
    for length, size in zip(entry.decoded, entry.sections, strict=True):
        parts.append(_inflated(name, data[start : start + size], length))
        start += size
    planes = parts[-entry.dtype.itemsize :]
    rows = np.zeros((entry.numel, entry.dtype.itemsize), np.uint8)
    if entry.coding == "dense":
        np.stack(planes, axis=1, out=rows)
    else:
        where = _positions(name, entry, parts[0])
        for column, plane in enumerate(planes):
            rows[where, column] = plane
        if entry.negative_zeros:
            rows[_negative(name, entry, where, parts[1]), -1] = 0x80
    if _checksum(entry.dtype, entry.shape, rows) != entry.crc32:
        raise _damaged(name, "its bytes do not have the stated checksum")
    if entry.dtype is torch.bool and bool((rows > 1).any()):
        raise _damaged(name, "a bool must be 0 or 1")
    return torch.from_numpy(rows.reshape(-1)).view(entry.dtype).reshape(entry.shape)


def _positions(name: str, entry: Entry, where: Bytes) -> NDArray[np.int64]:
    """Where the values stand in the flattened tensor: as many as the entry says, and none past the end."""
    if entry.coding == "bitmask":
        bits = np.unpackbits(where, bitorder="little")
        found: NDArray[np.int64] = np.flatnonzero(bits)
    else:
        value = where != ESCAPE
        found = np.cumsum(where.astype(np.int64) + value)[value] - 1
    if found.size != entry.listed:
        raise _damaged(name, f"its positions are those of {found.size} values, the header says {entry.listed}")
    if found.size and found[-1] >= entry.numel:
        raise _damaged(name, f"a value stands at position {found[-1]}, past the end of its {entry.numel} entries")
    return found


def _negative(name: str, entry: Entry, listed: NDArray[np.int64], signs: Bytes) -> NDArray[np.int64]:
    """Where the negative zeros stand among the entries that are not listed."""
    left = np.ones(entry.numel, bool)
    left[listed] = False
    bits = np.flatnonzero(np.unpackbits(signs, bitorder="little"))
    zeros: NDArray[np.int64] = np.flatnonzero(left)
    if bits.size != entry.negative_zeros or bits[-1] >= zeros.size:
        raise _damaged(name, f"its signs are not those of {entry.negative_zeros} negative zeros among {zeros.size}")
    return zeros[bits]


def _gaps(positions: NDArray[np.int64]) -> Bytes:
    """For each value the zeros between the one before and it, 255 of them at a time as an escape byte."""
    zeros = np.diff(positions, prepend=-1) - 1
    escapes = zeros // ESCAPE
    stream = np.full(positions.size + int(escapes.sum()), ESCAPE, np.uint8)
    stream[np.arange(positions.size) + np.cumsum(escapes)] = zeros % ESCAPE
    return stream


def _planes(rows: Bytes) -> list[bytes]:
    """First bytes of all values, second bytes, and so on: signs and exponents repeat, the ends of mantissas do not."""
    return [rows[:, column].tobytes() for column in range(rows.shape[1])]


def _deflated(raw: bytes) -> bytes:
    """``raw``, or its deflate stream where that is shorter: with repeats (runs, structure) or with Huffman's code alone."""
    best = raw
    for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY):
        coder = zlib.compressobj(LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, strategy)
        coded = coder.compress(raw) + coder.flush()
        best = min(best, coded, key=len)
    return best


def _inflated(name: str, data: memoryview, length: int) -> Bytes:
    """A section decoded: as it is where it has its full length, a deflate stream of exactly ``length`` bytes otherwise."""
    if len(data) == length:
        return np.frombuffer(data, np.uint8)
    coder = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        raw = coder.decompress(data, length + 1)  # one more than allowed shows that there is more, whatever it would expand to
    except zlib.error as error:
        raise _damaged(name, f"a section is not a deflate stream ({error})") from error
    if len(raw) != length or not coder.eof or coder.unused_data:
        raise _damaged(name, f"a section does not decode to its stated {length} bytes")
    return np.frombuffer(raw, np.uint8)


def _checksum(dtype: torch.dtype, shape: Sequence[int], raw: Bytes) -> int:
    """CRC-32 of dtype, shape and bytes: damage to the header must not give the same bytes another meaning."""
    return zlib.crc32(raw.data, zlib.crc32(_json([NAMES[dtype], list(shape)]).encode()))


def _json(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False)


def _count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**63


def _damaged(name: str, what: str) -> InvalidInput:
    return InvalidInput(f"tensor {name!r}: {what}; the file is damaged: save or copy it again")


def _check_byte_order() -> None:
    if sys.byteorder != "little":
        raise InvalidInput("packed weights: they are read and written on machines that keep the lowest byte first; use dense files here")
