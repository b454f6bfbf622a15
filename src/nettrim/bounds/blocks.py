"""A layer in the numbers that its bounds need: norms of its weights, and of its inputs on given data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..tally import spectral_norm


@dataclass(frozen=True)
class Block:
    """The weights ``W`` (N, M) of one group of a layer, float64, and ``G = X^T X`` (N, N) of its inputs on given data, if any.

    Batch-norm behind the layer is folded in. Only columns that reach the output belong to it.
    """

    W: Tensor
    G: Tensor | None = None

    @property
    def weights(self) -> int:
        """``n = N M``."""
        return self.W.numel()

    @cached_property
    def norm(self) -> float:
        """``||W||_2``."""
        return spectral_norm(self.W)

    @cached_property
    def absolute(self) -> float:
        """``|| |W| ||_2``: at least ``||W o B||_2`` for every mask B."""
        return spectral_norm(self.W.abs())

    @cached_property
    def squares(self) -> Tensor:
        """``w^2`` (N, M)."""
        return self.W.square()

    @cached_property
    def frobenius(self) -> float:
        """``||W||_F``."""
        return math.sqrt(float(self.squares.sum()))

    @cached_property
    def largest(self) -> float:
        """The largest ``|w|``."""
        return float(self.W.abs().max()) if self.weights else 0.0

    @cached_property
    def row(self) -> float:
        """The largest norm of the weights that leave one input."""
        return _largest_root(self.squares.sum(1))

    @cached_property
    def line(self) -> float:
        """The largest norm of a row or a column."""
        return max(self.row, _largest_root(self.squares.sum(0)))

    @cached_property
    def fourths(self) -> tuple[float, float]:
        """``sum_i R_i^2 + sum_j C_j^2 - 2 sum w^4`` with the sums of squares R of rows and C of columns, and ``sum w^4``."""
        return fourths(self.squares)

    @cached_property
    def ordered(self) -> Tensor:
        """(n + 1,): the sum of the k largest squares, for k = 0..n."""
        ordered = self.squares.flatten().sort(descending=True).values.cumsum(0)
        return torch.cat([ordered.new_zeros(1), ordered])

    def most(self, count: int) -> float:
        """The sum of the ``count`` largest squares."""
        return float(self.ordered[min(count, self.weights)])

    def any_removed(self, count: int) -> float:
        """At least ``||W o B||_2`` for every mask that removes at most ``count`` weights."""
        return min(self.absolute, math.sqrt(self.most(count)))

    @cached_property
    def any_kept(self) -> float:
        """At least ``||W o (1 - B)||_2`` for every mask."""
        return min(self.absolute, self.frobenius)

    # On data: X are the rows of inputs of which G is the Gram matrix.

    @property
    def gram(self) -> Tensor:
        """``G``, which must have been given."""
        assert self.G is not None
        return self.G

    @cached_property
    def sizes(self) -> Tensor:
        """(N,): ``||x_n||^2`` of the inputs' columns."""
        return self.gram.diagonal().clamp(min=0.0)

    @cached_property
    def inputs_norm(self) -> float:
        """``||X||_2``."""
        return math.sqrt(max(0.0, float(torch.linalg.eigvalsh(self.gram)[-1])) * (1 + 1e-12))

    @cached_property
    def any_summed(self) -> float:
        """``sum over outputs of (sum_n |w_nm| ||x_n||)^2``: at least ``||X (W o B)||_F^2`` for every mask."""
        return float((self.sizes.sqrt() @ self.W.abs()).square().sum())

    def mean(self, W: Tensor) -> float:
        """``||X W||_F^2`` for any weights (N, M)."""
        return max(0.0, float((W * (self.gram @ W)).sum()))

    def energy(self, squares: Tensor) -> float:
        """``sum w^2 ||x_n||^2``."""
        return float((self.sizes @ squares).sum())

    def slope(self, squares: Tensor) -> float:
        """At least the largest over outputs of ``||X diag(w_m)||_2``: by the Frobenius norm of ``diag(w) G diag(w)``, or by ``||X||_2``."""
        if not squares.numel():
            return 0.0
        crossed = (squares * (self.gram.square() @ squares)).sum(0).clamp(min=0.0)
        return min(math.sqrt(math.sqrt(float(crossed.max()))), math.sqrt(float(squares.max())) * self.inputs_norm)

    def jump(self, squares: Tensor) -> float:
        """The largest ``|w_nm| ||x_n||``."""
        return math.sqrt(float((self.sizes[:, None] * squares).max())) if squares.numel() else 0.0

    @cached_property
    def on_data(self) -> tuple[float, float, float, float]:
        """Of the block's own weights: mean, energy, slope, jump."""
        return self.mean(self.W), self.energy(self.squares), self.slope(self.squares), self.jump(self.squares)

    @cached_property
    def by_size(self) -> Tensor:
        """(n,): positions of the weights, smallest first; ties in order of position."""
        return self.W.abs().flatten().argsort(stable=True)

    def smallest(self, count: int) -> Tensor:
        """(N, M), bool: the ``count`` smallest weights."""
        mask = torch.zeros(self.weights, dtype=torch.bool, device=self.W.device)
        mask[self.by_size[:count]] = True
        return mask.view(self.W.shape)


@dataclass(frozen=True)
class Layer:
    """The blocks of a layer, one for each group; its operator norm is at most ``factor ||W||_2``."""

    name: str
    blocks: Sequence[Block]
    factor: float = 1.0

    @cached_property
    def norm(self) -> float:
        """An upper bound of the layer's operator norm: groups act on disjoint inputs."""
        return self.factor * max((block.norm for block in self.blocks), default=0.0)

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return sum(block.weights for block in self.blocks)


def fourths(squares: Tensor) -> tuple[float, float]:
    """``sum_i R_i^2 + sum_j C_j^2 - 2 sum s^2`` and ``sum s^2`` for a matrix ``s`` of squares with sums R of rows, C of columns."""
    quartic = float(squares.square().sum())
    lines = float(squares.sum(1).square().sum() + squares.sum(0).square().sum())
    return max(0.0, lines - 2 * quartic), quartic


def _largest_root(values: Tensor) -> float:
    return math.sqrt(float(values.max())) if values.numel() else 0.0
