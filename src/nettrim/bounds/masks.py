"""What a mask of a layer does to its response, at most: for every mask, for random ones, and for the smallest weights under random signs.

``W_hat = W - D`` with the removed part ``D = W o B``. With the reference input ``X`` and the pruned network's input ``X + E`` the
response moves by ``E W_hat - X D``. Every bound is a function of ``e >= ||E||_F``, increasing in e and in the share (docs/bounds.md,
sections 3 and 4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..methods.targets import kept_weights
from ..status import InvalidInput
from .blocks import Block, Layer, fourths
from .tails import fixed_count_factor, mask_variance, response, spectral

RULES = {
    "any": "every mask that removes at most the share: no probability",
    "random": "exactly the share is removed, drawn uniformly: what nettrim.Random does",
    "bernoulli": "every weight is removed with probability share, independently",
    "magnitude": "the smallest weights are removed; their signs are independent and symmetric given their magnitudes",
}


def check_rule(rule: Any) -> str:
    """The name of a rule. Raises InvalidInput."""
    if not isinstance(rule, str) or rule not in RULES:
        raise InvalidInput(f"rule must be one of {', '.join(map(repr, RULES))}, found {rule!r}; 'random' is what nettrim.Random does")
    return rule


@dataclass(frozen=True)
class BallTerms:
    """Of one layer, uniformly over inputs: with ``||x|| <= h`` and ``||E|| <= e`` the response moves by at most :meth:`moved`.

    ``removed >= ||D||``, ``kept >= ||W_hat||``. With a ``share``, ``D = p W + Delta`` and ``spread >= ||Delta||`` as well; p is between
    ``least`` and ``share`` (groups of a convolution can round differently).
    """

    removed: float
    kept: float
    norm: float = 0.0
    share: float | None = None
    least: float = 0.0
    spread: float = 0.0

    def moved(self, e: float, h: float) -> float:
        """The bound of ``||E W_hat - x D||``."""
        value = self.removed * h + self.kept * e
        if self.share is not None:
            # (1 - p) ||W|| e + p ||W|| h, or ||W|| e where that is more: so that it increases with p
            value = min(value, self.norm * (e + max(0.0, self.share * h - self.least * e)) + self.spread * (h + e))
        return value


@dataclass(frozen=True)
class DataTerms:
    """Of one layer, on given rows ``X`` of reference inputs: with ``||E||_F <= e`` the response moves by at most :meth:`moved`.

    Without masks at random (``delta`` None) that is ``removed + kept e``. Else it holds with probability 1 - delta given everything but
    this layer's mask (or signs), and the other numbers are those of docs/bounds.md, (3.4): mean and deviation, slope and jump, on X and for
    each unit of e.
    """

    removed: float
    kept: float
    delta: float | None = None
    norm: float = 0.0
    share: float = 0.0
    least: float = 0.0
    mean: float = 0.0
    deviation: float = 0.0
    deviation_rate: float = 0.0
    slope: float = 0.0
    jump: float = 0.0
    rate: float = 0.0
    span: float = 1.0

    def moved(self, e: float) -> float:
        """The bound of ``||E W_hat - X D||_F``."""
        certain = self.removed + self.kept * e
        if self.delta is None:
            return certain
        carried = self.norm * e
        mean = carried + max(0.0, self.share * self.mean - self.least * carried)
        deviation = self.deviation + self.deviation_rate * e
        return min(certain, response(mean, deviation, self.slope + self.rate * e, self.jump + self.rate * e, self.delta, self.span))


def removed_count(weights: int, share: float) -> int:
    """How many of ``weights`` a share removes; pruning rounds the same way."""
    return weights - kept_weights(weights, share)


def removed_counts(sizes: Sequence[int], share: float) -> list[int]:
    """How many weights each group of a layer loses: together what the layer loses, split as pruning splits it."""
    total = sum(sizes)
    kept, before, counts = kept_weights(total, share), 0, []
    for size in sizes:
        counts.append(size - round(kept * (before + size) / total) + round(kept * before / total))
        before += size
    return counts


def ball_terms(layer: Layer, rule: str, share: float, delta: float) -> BallTerms:
    """The layer's terms uniformly over inputs; for a random rule they hold with probability 1 - ``delta``, split over the groups."""
    if share == 0 or not layer.blocks:
        return BallTerms(0.0, layer.norm)
    each = delta / len(layer.blocks)
    counts = removed_counts([block.weights for block in layer.blocks], share)
    parts = [_ball_block(block, rule, share, each, layer, count) for block, count in zip(layer.blocks, counts, strict=True)]
    f = layer.factor
    shares = [part.share for part in parts if part.share is not None]
    removed = f * max(part.removed for part in parts)
    return BallTerms(
        removed=removed,
        kept=min(f * max(part.kept for part in parts), layer.norm + removed),
        norm=layer.norm,
        share=max(shares, default=None),
        least=min(shares, default=0.0),
        spread=f * max(part.spread for part in parts),
    )


def _ball_block(block: Block, rule: str, share: float, delta: float, layer: Layer, count: int) -> BallTerms:
    n = block.weights
    if rule == "any":
        return BallTerms(block.any_removed(removed_count(layer.weights, share)), block.any_kept)
    if rule == "magnitude":
        mask = block.smallest(count)
        removed = block.W * mask
        squares = removed.square()
        lines, quartic = fourths(squares)
        spread = spectral(
            math.sqrt(max(float(squares.sum(0).max()), float(squares.sum(1).max()))),
            math.sqrt(float(squares.sum())),
            lines + quartic,
            math.sqrt(float(squares.max())),
            sum(block.W.shape),
            delta,
            jump=0.0,
            span=2.0,
        )
        return BallTerms(min(spread, block.any_removed(n), math.sqrt(float(squares.sum()))), block.any_kept)
    most, p, factor = _drawn(block, rule, share, count)
    lines, quartic = block.fourths
    v = mask_variance(p)
    spread = factor * spectral(
        math.sqrt(v) * block.line,
        math.sqrt(v) * block.frobenius,
        v * v * lines + v * quartic,
        block.largest,
        sum(block.W.shape),
        delta,
    )
    return BallTerms(min(block.any_removed(most), p * block.norm + spread), block.any_kept, block.norm, p, p, spread)


def _drawn(block: Block, rule: str, share: float, count: int) -> tuple[int, float, float]:
    """Most weights that can be removed, the share of each, and the factor of a fixed count."""
    n = block.weights
    if rule == "bernoulli":
        return n, share, 1.0
    return count, count / n, fixed_count_factor(count, n)


def data_terms(layer: Layer, rule: str, share: float, delta: float) -> DataTerms:
    """The layer's terms on its data; for a random rule they hold with probability 1 - ``delta`` given the other layers' masks."""
    if share == 0 or not layer.blocks:
        return DataTerms(0.0, layer.norm)
    f, blocks = layer.factor, layer.blocks
    counts = removed_counts([block.weights for block in blocks], share)
    kept = f * max(block.any_kept for block in blocks)
    if rule == "any":
        count = removed_count(layer.weights, share)
        removed = _any_on_data(blocks, [block.most(count) for block in blocks])
        return DataTerms(removed, min(kept, layer.norm + f * max(block.any_removed(count) for block in blocks)))
    row = f * max(block.row for block in blocks)
    rate = f * max(block.largest for block in blocks)
    if rule == "magnitude":
        masked = [block.squares * block.smallest(own) for block, own in zip(blocks, counts, strict=True)]
        return DataTerms(
            removed=_any_on_data(blocks, [float(squares.sum()) for squares in masked]),
            kept=kept,
            delta=delta,
            deviation=math.sqrt(sum(b.energy(s) for b, s in zip(blocks, masked, strict=True))),
            deviation_rate=row,
            slope=max(b.slope(s) for b, s in zip(blocks, masked, strict=True)),
            jump=max(b.jump(s) for b, s in zip(blocks, masked, strict=True)),
            rate=rate,
            span=2.0,
        )
    drawn = [_drawn(block, rule, share, own) for block, own in zip(blocks, counts, strict=True)]
    p = max(own for _, own, _ in drawn)
    factor = max(own for _, _, own in drawn)
    root = math.sqrt(mask_variance(p))
    mean, energy, slope, jump = (list(values) for values in zip(*(block.on_data for block in blocks), strict=True))
    return DataTerms(
        removed=_any_on_data(blocks, [block.most(count) for block, (count, _, _) in zip(blocks, drawn, strict=True)]),
        kept=kept,
        delta=delta,
        norm=layer.norm,
        share=p,
        least=min(own for _, own, _ in drawn),
        mean=math.sqrt(sum(mean)),
        deviation=factor * root * math.sqrt(sum(energy)),
        deviation_rate=factor * root * row,
        slope=factor * max(slope),
        jump=factor * max(jump),
        rate=factor * rate,
    )


def _any_on_data(blocks: Sequence[Block], squares: Sequence[float]) -> float:
    """At least ``||X D||_F`` for every mask whose removed weights have at most that sum of squares in each block."""
    return math.sqrt(sum(min(b.any_summed, b.inputs_norm**2 * s) for b, s in zip(blocks, squares, strict=True)))


def exact_ball_terms(layer: Layer, pruned: Sequence[Tensor]) -> BallTerms:
    """The terms for pruned weights in hand, one (N, M) for each block."""
    parts = [
        (float(torch.linalg.matrix_norm(b.W - W, 2)), float(torch.linalg.matrix_norm(W, 2)))
        for b, W in zip(layer.blocks, pruned, strict=True)
        if b.weights
    ]
    removed, kept = (layer.factor * (1 + 1e-12) * max(side, default=0.0) for side in (zip(*parts, strict=True) if parts else ((), ())))
    return BallTerms(removed, kept)


def exact_data_terms(layer: Layer, pruned: Sequence[Tensor]) -> DataTerms:
    """The same on the layer's data."""
    removed = sum(block.mean(block.W - W) for block, W in zip(layer.blocks, pruned, strict=True))
    return DataTerms(math.sqrt(removed), exact_ball_terms(layer, pruned).kept)
