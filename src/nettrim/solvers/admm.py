"""The one Gram-space ADMM loop that serves every method; only its proximal steps differ (design section 3).

The weights ``U`` meet a copy ``D`` that the penalty shapes (scaled dual ``V``), and the response ``A U + e c^T`` meets a target:

* *majorised*: the target is the nearest point ``T`` of the box, refreshed as ``D`` moves. ``1/2 ||A U + e c^T - T||^2`` lies
  above ``1/2 dist^2`` and touches it at the point where ``T`` was taken, so this descends on the distance itself;
* *split*: the response has a copy ``R`` of its own (scaled dual ``Y``), and ``dist <= eps`` or ``1/2 dist^2`` enters by its exact
  proximal step. It converges much faster to high accuracy on convex programs.

Either way the weight step is the same: ``(G + beta I) U = A^T target + beta (D - V)``, by the eigendecomposition of ``G``.

Passes over the rows go block by block, so that the elementwise steps between two matrix products find their operands in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..preimage import nearest_point
from ..program import StandardProgram
from ..prox import ball_share, squared_distance_share

Prox = Callable[[Tensor], Tensor]

BLOCK_ENTRIES = 1 << 18  # entries of one block of rows: 1 MiB in float32


class GramADMM:
    """State and steps of the loop, in scaled form. Drivers (``l1``, ``l0``) choose proximal steps, penalties and when to stop.

    The split form keeps one array of the response's size: ``B = relaxed response + Y``, the argument of its last proximal step. With ``T``
    the point of the box nearest to ``B``, that step is ``R = T + share (B - T)`` and leaves ``Y = (1 - share) (B - T)``. Where the
    program's box is a hard constraint the share is 0: ``R = T``.
    """

    def __init__(self, program: StandardProgram, start: Tensor, *, relaxation: float = 1.8) -> None:
        self.program = program
        self.relaxation = relaxation
        self.U = start.clone()  # satisfies the data
        self.D = start.clone()  # satisfies the penalty
        self.V = torch.zeros_like(start)
        self.c = program.c0  # the first pass over the rows moves it
        self.cross = torch.empty_like(start)
        self.B: Tensor | None = None
        self.share = 1.0
        P, M = program.lo.shape
        self.block = max(64, min(P, BLOCK_ENTRIES // max(M, 1)))
        self.work = program.lo.new_empty(min(self.block, P), M)

    def _blocks(self, first: int = 0, last: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        last = len(self.program.lo) if last is None else last
        for start in range(first, last, self.block):
            rows = slice(start, min(last, start + self.block))
            yield rows, self.work[: rows.stop - rows.start]

    def _nearest(self, B: Tensor, rows: slice, out: Tensor) -> Tensor:
        torch.maximum(B, self.program.lo[rows], out=out)
        return torch.minimum(out, self.program.hi[rows], out=out)

    def _gather(self, target: Tensor, rows: slice, total: Tensor | None) -> None:
        """Adds a block of the target to the cross matrix and to its sums along ``e``."""
        p = self.program
        self.cross.addmm_(p.A[rows].T, target)
        if total is not None and p.e is not None:
            total += p.e[rows] @ target

    def _shares(self, rows: slice, hard: float, soft: float) -> Tensor | float:
        """A factor for each entry of a block: ``soft``, and ``hard`` where the box is a hard constraint."""
        return soft if self.program.hard is None else torch.where(self.program.hard[rows], hard, soft).to(self.work.dtype)

    def _weight_step(self, beta: float, ridge: float) -> Tensor:
        """``(G + (ridge + beta) I) U = cross + ridge U0 + beta (D - V)``."""
        p = self.program
        right = torch.add(self.cross, self.D - self.V, alpha=beta)
        if ridge:
            right.add_(p.U0, alpha=ridge)
        return p.vectors @ (p.vectors.T @ right).div_((p.values + (ridge + beta))[:, None])

    def refresh(self, part: int = 0, parts: int = 1) -> float:
        """Moves the majorised target to the nearest point of the present sparse weights; returns their distance.

        With ``parts`` above 1 only that run of rows is looked at and stands for all: the gradient of the majoriser,
        ``G D - A^T (Z - T)`` (inputs are centred), is then estimated, and the distance with it. Rows should be in random order.
        """
        p = self.program
        P = len(p.lo)
        first, last = part * P // parts, (part + 1) * P // parts
        weight = P / max(last - first, 1)
        torch.mm(p.gram, self.D, out=self.cross)
        total = None if self.c is None else torch.zeros_like(self.c)
        square = p.lo.new_zeros((), dtype=torch.float64)
        for rows, T in self._blocks(first, last):
            Z = p.response(self.D, self.c, rows)
            residual = Z.sub_(self._nearest(Z, rows, T))
            self.cross.addmm_(p.A[rows].T, residual, alpha=-weight)
            if total is not None and p.e is not None:
                total += p.e[rows] @ residual
            square += torch.linalg.vector_norm(residual).double().square()
        if self.c is not None and total is not None:
            self.c = self.c - total * (weight / p.e_square)
        return float((square * weight).sqrt())

    def majorised_step(self, prox: Prox, beta: float, ridge: float) -> None:
        """One over-relaxed iteration against the target of the last :meth:`refresh`."""
        self.U = self._weight_step(beta, ridge)
        self.V.add_(torch.lerp(self.D, self.U, self.relaxation))
        self.D = prox(self.V)
        self.V.sub_(self.D)

    def split_step(self, prox: Prox, beta: float, rho: float, radius: float | None) -> None:
        """One over-relaxed iteration with the response split off.

        ``rho`` weighs the response's copy, ``rho * beta`` the weights' copy. ``radius`` is the distance allowed; ``None`` stands for the
        penalised program, whose term is ``1/2 dist^2``.
        """
        p = self.program
        if self.B is None:
            self.B = p.response(self.U, self.c)
            self.share = self._share(self._distance_of_copy(), rho, radius)
        self.cross.zero_()
        total = None if self.c is None else torch.zeros_like(self.c)
        for rows, T in self._blocks():  # target = R - Y = T + (2 share - 1) (B - T)
            self._nearest(self.B[rows], rows, T)
            self._gather(T.lerp_(self.B[rows], self._shares(rows, -1.0, 2 * self.share - 1)), rows, total)
        self.c = None if total is None else total / p.e_square
        self.U = self._weight_step(beta, 0.0)
        a = self.relaxation
        relaxed = torch.lerp(self.D, self.U, a)
        V = relaxed.add_(self.V)
        self.D = prox(V)
        self.V = V.sub_(self.D)
        square = p.lo.new_zeros((), dtype=torch.float64)
        kept = a * self.share
        for rows, T in self._blocks():  # B = a Z + (1 - a) R + Y = a Z + (1 - a share) B + (a share - a) T
            B = self.B[rows]
            self._nearest(B, rows, T)
            B.lerp_(T, self._shares(rows, 0.0, kept)).add_(T, alpha=-a)
            p.add_response_(B, self.U, self.c, rows, alpha=a)
            self._nearest(B, rows, T)
            square += torch.linalg.vector_norm(self._soft(torch.sub(B, T, out=T), rows)).double().square()
        self.share = self._share(float(square.sqrt()), rho, radius)

    def _share(self, distance: float, rho: float, radius: float | None) -> float:
        return squared_distance_share(rho) if radius is None else ball_share(distance, radius)

    def _soft(self, residual: Tensor, rows: slice = slice(None)) -> Tensor:
        """The residual where the box may be missed, 0 where it is a hard constraint; in place."""
        return residual if self.program.hard is None else residual.masked_fill_(self.program.hard[rows], 0.0)

    def _distance_of_copy(self) -> float:
        assert self.B is not None
        return float(torch.linalg.vector_norm(self._soft(self.B - nearest_point(self.B, self.program.lo, self.program.hi))))

    def multiplier(self) -> tuple[Tensor, Tensor]:
        """The point ``T`` (P, M) of the box nearest to ``B``, and the scaled dual ``Y`` (P, M); ``rho Y`` tends to the multiplier."""
        assert self.B is not None
        T = nearest_point(self.B, self.program.lo, self.program.hi)
        return T, (self.B - T).mul_(self._shares(slice(None), 1.0, 1.0 - self.share))

    def rescale(self, old: float, new: float, radius: float | None) -> None:
        """Keeps the unscaled duals when ``rho`` changes from ``old`` to ``new``."""
        factor = old / new
        self.V.mul_(factor)
        if self.B is None:
            return
        T = nearest_point(self.B, self.program.lo, self.program.hi)
        self.B = T.lerp_(self.B, self._shares(slice(None), factor, self.share + (1 - self.share) * factor))
        self.share = self._share(self._distance_of_copy(), new, radius)
