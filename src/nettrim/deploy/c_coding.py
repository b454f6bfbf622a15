"""How the weights of a layer are stored in C: dense, or as their nonzeros and packed gaps between them.

Gaps are codes of ``width`` bits each, the first in the lowest bits of the first byte. A code below ``2 ** width - 1`` says how many zeros
stand before the next nonzero, in the order of the weights in memory; the code ``2 ** width - 1`` says that there are that many
zeros and that another code follows. With a width of 1 this is a bitmap. The width that takes the fewest bytes is found layer by layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WIDEST = 16


@dataclass(frozen=True, eq=False)
class Coded:
    """Weights of ``size`` entries: ``values`` (all, or the nonzeros), float32, and ``codes``, uint8; ``width`` 0 where they are dense."""

    size: int
    values: NDArray[np.float32]
    codes: NDArray[np.uint8]
    width: int

    @property
    def bytes(self) -> int:
        """Values and codes together."""
        return self.values.nbytes + self.codes.nbytes


def coded(weights: NDArray[np.float32]) -> Coded:
    """The smallest form of these weights; dense where nothing is smaller."""
    flat = np.ascontiguousarray(weights, dtype=np.float32).reshape(-1)
    places = np.flatnonzero(flat)
    gaps = np.diff(places, prepend=-1) - 1
    width = min(range(1, WIDEST + 1), key=lambda bits: _packed_bytes(gaps, bits))
    sparse = 4 * len(places) + _packed_bytes(gaps, width)
    if sparse >= flat.nbytes:
        return Coded(flat.size, flat, np.zeros(0, np.uint8), 0)
    return Coded(flat.size, flat[places], _packed(gaps, width), width)


def decoded(stored: Coded) -> NDArray[np.float32]:
    """The weights (size,) again."""
    if not stored.width:
        return stored.values
    bits = np.unpackbits(stored.codes, bitorder="little")
    whole = bits[: len(bits) // stored.width * stored.width].reshape(-1, stored.width)
    codes = whole.astype(np.int64) @ (1 << np.arange(stored.width))
    flat, place, used, escape = np.zeros(stored.size, np.float32), 0, 0, (1 << stored.width) - 1
    for value in stored.values:
        while codes[used] == escape:
            place, used = place + escape, used + 1
        place += int(codes[used])
        flat[place] = value
        place, used = place + 1, used + 1
    return flat


def _packed_bytes(gaps: NDArray[np.int64], width: int) -> int:
    return -(-int((gaps // ((1 << width) - 1) + 1).sum()) * width // 8)


def _packed(gaps: NDArray[np.int64], width: int) -> NDArray[np.uint8]:
    escape = (1 << width) - 1
    repeats = gaps // escape
    ends = np.cumsum(repeats + 1)
    codes = np.full(int(ends[-1]) if len(ends) else 0, escape, np.int64)
    codes[ends - 1] = gaps - repeats * escape
    bits = (codes[:, None] >> np.arange(width)) & 1
    return np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little")
