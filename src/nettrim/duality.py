"""Lower bounds for the l1 programs from weak duality: a dual point is built from the residual (docs/theory.md, duality)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .preimage import nearest_point


class DualPoint:
    """Accumulates, batch by batch in float64, all that the dual value of a residual needs; memory 2 N M, whatever the rows.

    From ``Z = A W + 1 b^T`` and its nearest point ``T`` of the box, the residual ``D = Z - T`` has the sign that the dual asks for. Its
    positive and negative parts are kept apart, so that each column can be balanced to sum to zero (which the bias demands) without
    leaving that sign pattern.

    With ``scale`` (N,), the inputs that are added are the layer's divided by it, and the products are made in its
    dtype: an estimate for solvers.
    """

    def __init__(self, N: int, M: int, has_bias: bool, device: torch.device, scale: Tensor | None = None) -> None:
        self.has_bias = has_bias
        self.scale = scale
        dtype = torch.float64 if scale is None else scale.dtype
        self.correlation = torch.zeros(2, N, M, dtype=dtype, device=device)  # A^T D+, A^T D-
        self.total = torch.zeros(2, M, dtype=torch.float64, device=device)  # e^T D+, e^T D-
        self.inner = torch.zeros(2, M, dtype=torch.float64, device=device)  # <D+, T>, <D-, T> by column
        self.square = torch.zeros(2, M, dtype=torch.float64, device=device)

    def add(self, A: Tensor, Z: Tensor, lo: Tensor, hi: Tensor, column: Tensor | None = None, hard: Tensor | None = None) -> None:
        """Adds rows: inputs (p, N), pre-activations and boxes (p, M), and the bias column (p,) (ones when not given).

        ``hard`` (p, M) marks boxes that are constraints: their multipliers cost nothing but their inner product (docs/theory.md, 3.3).

        With a bias column all rows come in one call; where the boxes are points as well, any sign is allowed, so the residual is
        made orthogonal to the column by projection (a compressed program's column is zero on most rows and cannot be balanced).
        """
        T = nearest_point(Z, lo, hi)
        D = Z - T
        if column is not None and torch.equal(lo, hi):
            D = D - torch.outer(column, (column @ D) / column.square().sum())
            self.has_bias = False
        else:
            T = torch.where(D == 0, 0.0, T)  # a nearest point is the box's bound wherever the residual is not zero
        for i, part in enumerate((D.clamp(min=0), D.clamp(max=0).neg_())):
            self.correlation[i].addmm_(A.T, part)
            self.total[i] += part.sum(0) if column is None else column @ part
            self.inner[i] += (part * T).sum(0)
            self.square[i] += (part if hard is None else part.masked_fill(hard, 0.0)).square().sum(0)

    def _columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """``||A^T theta||_inf``, ``<theta, T>`` and ``||theta||^2`` by column, of the balanced residual."""
        if self.has_bias:
            smaller = torch.minimum(self.total[0], self.total[1])
            share = torch.where(self.total > 0, smaller / self.total.clamp(min=1e-300), 0.0)
        else:
            share = torch.ones_like(self.total)
        correlation = (share[0] * self.correlation[0] - share[1] * self.correlation[1]).abs()
        if self.scale is not None:
            correlation = correlation * self.scale[:, None]
        largest = correlation.amax(0).double() if len(correlation) else self.total[0] * 0.0
        inner = share[0] * self.inner[0] - share[1] * self.inner[1]
        square = share[0].square() * self.square[0] + share[1].square() * self.square[1]
        return largest, inner, square

    def _scales(self, largest: Tensor, limit: float) -> list[Tensor]:
        """Candidate column scales; every one of them makes ``|A^T theta| <= limit``."""
        cap = limit / largest.clamp(min=1e-300)
        positive = largest[largest > 0]
        if not len(positive):
            return [torch.zeros_like(largest)]
        levels = torch.quantile(positive, torch.linspace(0, 1, 33, dtype=torch.float64, device=largest.device))
        return [torch.minimum(cap, limit / level) for level in levels.clamp(min=1e-300)]

    def constrained(self, epsilon: float, unreachable: float = 0.0) -> float:
        """A lower bound of ``min ||W||_1  subject to  dist(A W + e b^T, [lo, hi])^2 + unreachable <= epsilon^2``."""
        radius = math.sqrt(max(0.0, epsilon * epsilon - unreachable))
        largest, inner, square = self._columns()
        values = [-float((t * inner).sum()) - radius * math.sqrt(float((t.square() * square).sum())) for t in self._scales(largest, 1.0)]
        return max(0.0, *values)

    def penalised(self, penalty: float) -> float:
        """A lower bound of ``min 1/2 dist(A W + e b^T, [lo, hi])^2 + penalty ||W||_1`` (without the unreachable part)."""
        largest, inner, square = self._columns()
        t = torch.minimum(torch.ones_like(largest), penalty / largest.clamp(min=1e-300))
        # along each column the dual value -t <theta, T> - t^2/2 ||theta||^2 is concave in t: its best t within the cap
        best = torch.minimum(t, (-inner / square.clamp(min=1e-300)).clamp(min=0))
        return max(0.0, float((-best * inner - best.square() * square / 2).sum()))


def relative_gap(primal: float, dual: float) -> float:
    """``(primal - dual) / primal``: how far above the optimum ``primal`` can be, as a share of it; 0 when the primal is 0."""
    return max(0.0, primal - dual) / primal if primal > 0 else 0.0
