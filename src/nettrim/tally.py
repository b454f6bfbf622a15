"""The arithmetic of certificates: what recomputes their numbers in float64 from inputs and stored weights, batch by batch."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from .certificate import LayerCertificate, within
from .duality import DualPoint, relative_gap
from .patterns import parse
from .preimage import Activation, nearest_point


class LayerTally:
    """Recomputes one layer's numbers batch by batch in float64; memory does not grow with the number of rows.

    ``W`` (N, M) are the stored weights, with the batch-norm behind them folded in; ``groups`` those of a grouped convolution.
    ``gap_kind`` is ``"epsilon"``, ``"penalty"`` or ``""``; with a gap, ``gap_level`` is the absolute tolerance or the penalty that the l1
    program was solved for. ``live`` (M,), bool, are the outputs that weights reach: the distance of the others is a fixed amount of that
    program.
    """

    def __init__(
        self,
        W: Tensor,
        has_bias: bool,
        activation: Activation,
        gap_kind: str = "",
        gap_level: float = 0.0,
        groups: int = 1,
        live: Tensor | None = None,
    ) -> None:
        self.W, self.activation = W.double(), activation
        self.live = None if live is None or bool(live.all()) else live
        outputs = W.shape[1] if self.live is None else int(self.live.sum())
        self.original_distance = 0.0
        self.gap_kind, self.gap_level = gap_kind, gap_level
        self.dual = DualPoint(W.shape[0], outputs, has_bias, W.device) if gap_kind and groups == 1 else None
        self.rows = self.rows_total = 0
        self.reference = self.reference_all = self.distance = self.distance_all = self.discrepancy = self.fixed = 0.0
        self.entered = self.rounding_before = self.rounding_after = 0.0

    def add(
        self,
        box: tuple[Tensor, Tensor],
        Y: Tensor,
        Z: Tensor,
        original: Tensor,
        moved: float,
        rows: Tensor | slice,
        inputs: Callable[[Tensor | slice], Tensor],
        rounding: tuple[float, float] = (0.0, 0.0),
        entered: float = 0.0,
    ) -> None:
        """Adds a batch; all matrices are (p, M), in float64.

        Args:
            box: ``lo`` and ``hi`` of the layer's own part of the pre-activation.
            Y: the reference output where it arises.
            Z: the stored weights' part of the pre-activation on the inputs of the layer's program: the reference network's
                (parallel) or the pruned network's (cascade).
            original: the same for the unpruned weights.
            moved: the squared discrepancy of the layer's output between the two networks.
            rows: which of these rows the layer's program used.
            inputs: gives some rows of the program's inputs (p, N).
            rounding: the squared distance between the layer's part as the reference network, and the pruned one, computed it and in
                float64.
            entered: the squared difference of the layer's inputs between the two networks.
        """
        lo, hi = box
        residual = (Z - nearest_point(Z, lo, hi)).square_()
        self.original_distance += float((original - nearest_point(original, lo, hi))[rows].square().sum())
        self.rows_total += len(Z)
        self.reference_all += float(Y.square().sum())
        self.distance_all += float(residual.sum())
        self.discrepancy += moved
        self.rows += len(Z[rows])
        self.reference += float(Y[rows].square().sum())
        self.distance += float(residual[rows].sum())
        self.rounding_before += rounding[0]
        self.rounding_after += rounding[1]
        self.entered += entered
        chosen = [matrix[rows] for matrix in (residual, Z, lo, hi)]
        if self.live is not None:
            self.fixed += float(chosen[0][:, ~self.live].sum())
            chosen = [matrix[:, self.live] for matrix in chosen]
        if self.dual is not None:
            self.dual.add(inputs(rows).double(), *chosen[1:])

    @property
    def rounding(self) -> float:
        """How far rounding can have taken the layer's output from where it is in float64, in both networks together."""
        return math.sqrt(self.rounding_before) + math.sqrt(self.rounding_after)

    def gap(self) -> float | None:
        """The relative duality gap of the stored weights, or ``None`` when their program has none."""
        if self.dual is None:
            return None
        norm = float(self.W.abs().sum())
        if self.gap_kind == "epsilon":
            return relative_gap(norm, self.dual.constrained(self.gap_level, self.fixed))
        return relative_gap((self.distance - self.fixed) / 2 + self.gap_level * norm, self.dual.penalised(self.gap_level))

    def certificate(
        self,
        name: str,
        tolerance: float | None,
        bound: float | None,
        reason: str,
        source: str = "graph",
        theorem: float | None = None,
        budget: int | None = None,
        pattern: str = "",
        stored: Tensor | None = None,
        rounding: float = 0.0,
    ) -> LayerCertificate:
        """The layer's certificate, given what was asked of it (see :class:`LayerCertificate`) and the proven bounds of its discrepancy.

        ``stored`` (N, M) are the weights as the layer stores them, where those of the tally have a batch-norm folded in. ``rounding``
        is the part of the bound that was measured as rounding.
        """
        distance, discrepancy = root(self.distance), root(self.discrepancy)
        stored = self.W if stored is None else stored
        nonzeros = int((stored != 0).sum())
        met = within(distance, tolerance, math.sqrt(self.reference)) and (budget is None or nonzeros <= budget)
        sound = all(within(discrepancy, proven, math.sqrt(self.reference_all)) for proven in (bound, theorem))
        return LayerCertificate(
            name=name,
            activation=self.activation.name,
            rows=self.rows,
            rows_total=self.rows_total,
            reference_norm=math.sqrt(self.reference),
            tolerance=tolerance,
            distance=distance,
            distance_all_rows=root(self.distance_all),
            discrepancy=discrepancy,
            bound=bound,
            reason=reason,
            gap=self.gap(),
            gap_kind=self.gap_kind,
            weights=self.W.numel(),
            nonzeros=nonzeros,
            budget=budget,
            pattern=pattern,
            sound=sound,
            met=met and parse(pattern or None).admits(stored),
            gap_level=self.gap_level,
            original_distance=root(self.original_distance),
            source=source,
            theorem=theorem,
            rounding=rounding,
        )


def root(square: float) -> float:
    """The root of a sum of squares; where that is beyond float64, the largest number, which nothing holds within."""
    return math.sqrt(square) if math.isfinite(square) else sys.float_info.max


def spectral_norm(W: Tensor) -> float:
    """``||W||_2`` from a float64 singular value decomposition, rounded up so that it stays an upper bound."""
    if not W.numel():
        return 0.0
    return float(torch.linalg.matrix_norm(W.detach().double(), 2)) * (1 + 1e-12)


def entry_norm(W: Tensor) -> float:
    """``||W||_1``, the sum of absolute entries: the norm of the published link-normalised bounds; at least ``||W||_2``."""
    return float(W.detach().double().abs().sum())
