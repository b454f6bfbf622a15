"""Sparsity patterns: which sets of weights may stay, and the exact projection on them.

Weights are ``W`` (N, M), one row for each input, one column for each output: the transpose of PyTorch's ``weight`` (out, in), which
the names follow:

========== ===================================================================================================================
``None``   any weights
``"N:M"``  at most N nonzeros among every M consecutive inputs of each output: in_features of a Linear layer, the flattened
           in_channels * kh * kw of a convolution, in the order in which the module stores its weights
``rows``   whole rows of ``weight``: neurons, that is columns of ``W``
``columns`` whole columns of ``weight``: inputs (of a convolution: one tap of one channel), that is rows of ``W``
``"RxC"``  blocks of R outputs by C inputs (R rows by C columns of ``weight``), counted from the first output and input
========== ===================================================================================================================

Groups of a grouped convolution are patterned each by itself. Ragged ends: where a size is no multiple of M, R or C, the last group is
smaller; a smaller group of N:M keeps up to N weights too.

Counts: a mask for ``k`` weights has exactly ``k`` of them without pattern and with N:M (as far as it admits so many), and otherwise whole
groups of at most ``k`` weights in all, which is within one full group of ``k``. Inputs that are known to be zero (``live`` false) keep no
weight; whole groups are counted with them, so that a share of the weights is a share of the groups.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .prox import largest_mask
from .status import InvalidInput

KNOWN = "None, 'N:M' such as '2:4', 'rows', 'columns', or 'RxC' such as '4x4'"


class Pattern(Protocol):
    """What the methods ask of a pattern. ``live`` (N,), bool, marks the inputs whose weights may stay."""

    @property
    def name(self) -> str:
        """As it was given; empty for no pattern."""

    @property
    def kind(self) -> str:
        """Which of its family: ``""``, ``"N:M"``, ``"rows"``, ``"columns"`` or ``"RxC"``."""

    @property
    def sparsity(self) -> float | None:
        """The fraction of zeros that follows from the pattern alone; ``None`` when none does."""

    def capacity(self, live: Tensor, M: int) -> int:
        """The largest useful ``k`` for a layer of ``M`` outputs."""

    def unit(self, N: int, M: int) -> int:
        """Weights in a full group, by which counts move: 1 where weights are chosen one by one."""

    def least(self, N: int, M: int) -> int:
        """Weights in the smallest group."""

    def mask(self, V: Tensor, k: int, live: Tensor | None = None) -> Tensor:
        """Mask of ``argmin_D ||D - V||_F  subject to  D in the pattern, at most k weights``; ``V`` holds the live rows of (N, M) only.

        Ties are broken by position, so that the result is the same every time.
        """

    def admits(self, W: Tensor) -> bool:
        """Whether the nonzeros of ``W`` (N, M) are a set that may stay."""

    def drawn(self, N: int, M: int, k: int, generator: torch.Generator) -> Tensor:
        """A random mask (N, M) on the CPU with the counts of :meth:`mask`; every weight (every group of one size) is as likely."""


@dataclass(frozen=True)
class Unstructured:
    """Any weights."""

    name = ""
    kind = ""
    sparsity = None

    def capacity(self, live: Tensor, M: int) -> int:
        """All weights of live inputs."""
        return int(live.sum()) * M

    def unit(self, N: int, M: int) -> int:
        """Single weights."""
        return 1

    def least(self, N: int, M: int) -> int:
        """Single weights."""
        return 1

    def mask(self, V: Tensor, k: int, live: Tensor | None = None) -> Tensor:
        """The ``k`` of largest magnitude."""
        return largest_mask(V, k)

    def admits(self, W: Tensor) -> bool:
        """Any may."""
        return True

    def drawn(self, N: int, M: int, k: int, generator: torch.Generator) -> Tensor:
        """``k`` weights, uniformly without replacement."""
        return _picked(torch.randperm(N * M, generator=generator)[:k], N, M)


@dataclass(frozen=True)
class NofM:
    """At most ``most`` nonzeros among every ``of`` consecutive inputs of each output."""

    most: int
    of: int

    kind = "N:M"

    @property
    def name(self) -> str:
        """``"N:M"``."""
        return f"{self.most}:{self.of}"

    @property
    def sparsity(self) -> float | None:
        """``1 - N/M``."""
        return 1 - self.most / self.of

    def capacity(self, live: Tensor, M: int) -> int:
        """Up to ``most`` weights in each group, no more than it has live inputs."""
        counts = [int(live[start : start + self.of].sum()) for start in range(0, len(live), self.of)]
        return M * sum(min(self.most, count) for count in counts)

    def unit(self, N: int, M: int) -> int:
        """Single weights."""
        return 1

    def least(self, N: int, M: int) -> int:
        """Single weights."""
        return 1

    def mask(self, V: Tensor, k: int, live: Tensor | None = None) -> Tensor:
        """The largest of each group, and of these the ``k`` largest.

        The sets that N:M and a count admit are a truncated partition matroid, on which greedy choice is exact.
        """
        place = _places(V, live)
        N, M = len(place) if live is None else len(live), V.shape[1]
        groups = -(-N // self.of)
        size = V.new_full((groups * self.of, M), -1.0)  # what pads the last group, and dead inputs, come last
        size[place] = V.abs()
        order = size.view(groups, self.of, M).argsort(dim=1, descending=True, stable=True)[:, : self.most]
        chosen = torch.zeros(groups, self.of, M, dtype=torch.bool, device=V.device).scatter_(1, order, True)
        mask = chosen.view(-1, M)[place]
        if k < int(mask.sum()):
            mask[mask.clone()] = largest_mask(V[mask], k)
        return mask

    def admits(self, W: Tensor) -> bool:
        """No group may hold more than ``most`` nonzeros."""
        groups = -(-len(W) // self.of)
        there = torch.zeros(groups * self.of, W.shape[1], dtype=torch.bool, device=W.device)
        there[: len(W)] = W != 0
        return int(there.view(groups, self.of, -1).sum(1).max()) <= self.most if W.numel() else True

    def drawn(self, N: int, M: int, k: int, generator: torch.Generator) -> Tensor:
        """``most`` of each group, uniformly, and ``k`` of these."""
        return self.mask(torch.rand(N, M, generator=generator, dtype=torch.float64), k)


@dataclass(frozen=True)
class Blocks:
    """Blocks of ``outputs`` by ``inputs`` weights, kept or removed as a whole; ``None`` stands for all that the layer has."""

    outputs: int | None
    inputs: int | None

    sparsity = None

    @property
    def name(self) -> str:
        """``"rows"``, ``"columns"`` or ``"RxC"``."""
        return self.kind if self.kind != "RxC" else f"{self.outputs}x{self.inputs}"

    @property
    def kind(self) -> str:
        """``"rows"``, ``"columns"`` or ``"RxC"``."""
        return "rows" if self.inputs is None else "columns" if self.outputs is None else "RxC"

    def _sides(self, N: int, M: int) -> tuple[Tensor, Tensor]:
        """How many inputs each row of blocks has, and how many outputs each column of blocks; the last may have fewer."""
        sides = []
        for size, step in ((N, self.inputs or N), (M, self.outputs or M)):
            full, rest = divmod(size, step) if step else (0, 0)
            sides.append(torch.tensor([step] * full + ([rest] if rest else []), dtype=torch.long))
        return sides[0], sides[1]

    def capacity(self, live: Tensor, M: int) -> int:
        """All weights, those of dead inputs included: whole groups are counted."""
        return len(live) * M

    def unit(self, N: int, M: int) -> int:
        """Weights of a full block."""
        tall, wide = self._sides(N, M)
        return int(tall.max() * wide.max())

    def least(self, N: int, M: int) -> int:
        """Weights of the smallest block."""
        tall, wide = self._sides(N, M)
        return int(tall.min() * wide.min())

    def mask(self, V: Tensor, k: int, live: Tensor | None = None) -> Tensor:
        """The blocks of largest summed square that ``k`` weights have room for; the best of all choices, ragged ends included."""
        place = _places(V, live)
        N, M = len(place) if live is None else len(live), V.shape[1]
        if not N or not M:
            return torch.zeros_like(V, dtype=torch.bool)
        tall, wide = self._sides(N, M)
        high, broad = int(tall[0]), int(wide[0])
        square = V.new_zeros(len(tall) * high, len(wide) * broad, dtype=torch.float64)
        square[place, :M] = V.double().square()
        total = square.view(len(tall), high, len(wide), broad).sum((1, 3))
        alive = torch.zeros(len(tall) * high, dtype=torch.bool, device=V.device)
        alive[place] = True
        total[~alive.view(len(tall), high).any(1)] = -1.0  # nothing there can stay
        kept = _heaviest(total, tall, wide, k).to(V.device)
        return kept.repeat_interleave(high, 0)[place].repeat_interleave(broad, 1)[:, :M]

    def admits(self, W: Tensor) -> bool:
        """Any may: weights of a block that stays can be zero."""
        return True

    def drawn(self, N: int, M: int, k: int, generator: torch.Generator) -> Tensor:
        """Blocks in random order, until the next has no room."""
        tall, wide = self._sides(N, M)
        order = torch.randperm(len(tall) * len(wide), generator=generator)
        room = torch.outer(tall, wide).flatten()[order].cumsum(0) <= k
        kept = _picked(order[room], len(tall), len(wide))
        return kept.repeat_interleave(tall, 0).repeat_interleave(wide, 1)


UNSTRUCTURED = Unstructured()


def parse(text: str | None, owner: str = "pattern") -> Pattern:
    """The pattern that a setting of ``owner`` names.

    Raises:
        InvalidInput: no such pattern.
    """
    if text is None:
        return UNSTRUCTURED
    if text == "rows":
        return Blocks(outputs=1, inputs=None)
    if text == "columns":
        return Blocks(outputs=None, inputs=1)
    found = re.fullmatch(r"([0-9]{1,9})([:x])([0-9]{1,9})", text) if isinstance(text, str) else None
    if found is None:
        raise InvalidInput(f"{owner}: pattern must be {KNOWN}; found {text!r}")
    first, second = int(found[1]), int(found[3])
    if found[2] == ":":
        if not 1 <= first < second:
            raise InvalidInput(f"{owner}: pattern 'N:M' keeps N of M, with 1 <= N < M; found {text!r}; for no pattern leave it out")
        return NofM(first, second)
    if not (first and second):
        raise InvalidInput(f"{owner}: pattern 'RxC' needs blocks of at least one output by one input; found {text!r}")
    return Blocks(outputs=first, inputs=second)


def _places(V: Tensor, live: Tensor | None) -> Tensor:
    """The positions of the rows of ``V`` among all inputs."""
    return torch.arange(len(V), device=V.device) if live is None else live.nonzero()[:, 0]


def _picked(positions: Tensor, N: int, M: int) -> Tensor:
    mask = torch.zeros(N * M, dtype=torch.bool)
    mask[positions] = True
    return mask.view(N, M)


def _heaviest(total: Tensor, tall: Tensor, wide: Tensor, k: int) -> Tensor:
    """Which blocks, of summed squares ``total`` and sizes ``tall x wide``, to keep for the largest sum within ``k`` weights.

    Blocks of one size are best taken in order of their sums. Ragged ends make up to four sizes: every number of blocks of the three
    smaller ones (the corner is one block) is tried with as many full ones as then have room. Blocks of negative sum are not taken.
    """
    total = total.cpu()
    rows = int((tall == tall[0]).sum())
    columns = int((wide == wide[0]).sum())
    parts = [(slice(rows), slice(columns)), (slice(rows, None), slice(columns)), (slice(rows), slice(columns, None))]
    parts.append((slice(rows, None), slice(columns, None)))
    orders, sums, sizes = [], [], []
    for down, across in parts:
        values = total[down, across].flatten()
        order = values.argsort(descending=True, stable=True)
        order = order[: int((values >= 0).sum())]
        orders.append(order)
        sums.append(torch.cat([values.new_zeros(1), values[order].cumsum(0)]))
        sizes.append(int(tall[down][0] * wide[across][0]) if values.numel() else 0)
    counts = [torch.arange(len(order) + 1) for order in orders]
    b, c, d = torch.meshgrid(*counts[1:], indexing="ij")
    used = b * sizes[1] + c * sizes[2] + d * sizes[3]
    a = ((k - used).clamp(min=0) // sizes[0]).clamp(max=len(orders[0]))
    value = torch.where(used <= k, sums[0][a] + sums[1][b] + sums[2][c] + sums[3][d], -1.0)
    weights = torch.where(value == value.max(), used + a * sizes[0], -1)  # of equal choices, the one that keeps most
    best = int(weights.argmax())
    kept = torch.zeros(total.shape, dtype=torch.bool)
    for (down, across), order, number in zip(parts, orders, (a, b, c, d), strict=True):
        part = torch.zeros(total[down, across].numel(), dtype=torch.bool)
        part[order[: int(number.flatten()[best])]] = True
        kept[down, across] = part.view(total[down, across].shape)
    return kept
