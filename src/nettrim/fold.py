"""An affine map per output channel behind a layer (batch-norm in eval mode), folded into its program and unfolded on write-back.

With the layer's ``y = A W + 1 b^T`` and the map ``z = a (y - mu) + beta`` per channel, ``z = A W' + 1 b'^T`` with ``W' = W diag(a)`` and
``b' = a (b - mu) + beta`` (docs/theory.md, 1: batch-norm).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Home = Literal["layer", "norm", "none"]


@dataclass(frozen=True)
class Fold:
    """``scale`` a, ``mean`` mu and ``beta`` (M,), float64; ``bias`` b (M,) of the layer, zero where it has none.

    ``home`` says which parameter takes a new offset: the layer's bias, batch-norm's bias, or none (the offset is then fixed).
    Channels whose scale is zero put out ``beta`` whatever the layer does; they are left out of programs (``live``).
    """

    scale: Tensor
    mean: Tensor
    beta: Tensor
    bias: Tensor
    home: Home

    @property
    def live(self) -> Tensor:
        """(M,), bool: channels that the layer's weights can reach."""
        return self.scale != 0

    @property
    def offset(self) -> Tensor:
        """``b'`` (M,)."""
        return self.scale * (self.bias - self.mean) + self.beta

    def weights(self, W: Tensor) -> Tensor:
        """``W'`` (N, M), float64, from the layer's own weights."""
        return W.double() * self.scale

    def apply(self, y: Tensor) -> Tensor:
        """``z`` from the layer's own outputs as rows (P, M)."""
        return y.double() * self.scale + (self.beta - self.scale * self.mean)

    def columns(self, which: Tensor | slice) -> Fold:
        """The fold of some of the channels."""
        return Fold(self.scale[which], self.mean[which], self.beta[which], self.bias[which], self.home)

    def raw(self, W: Tensor) -> Tensor:
        """The layer's own weights (N, M), float64, for folded ones; zero in channels that it does not reach."""
        return torch.where(self.live, W.double() / torch.where(self.live, self.scale, 1.0), 0.0)

    def own_offset(self, b: Tensor) -> Tensor:
        """What its ``home`` must hold (M,), float64, for the offset ``b'`` to be ``b``."""
        if self.home == "layer":
            return torch.where(self.live, (b.double() - self.beta) / torch.where(self.live, self.scale, 1.0) + self.mean, self.bias)
        return b.double() - self.scale * (self.bias - self.mean)

    def stored(self, W: Tensor, b: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Folded weights and offset, float64, as they will be once their parameters are stored in ``dtype``."""
        W = self.weights(self.raw(W).to(dtype))
        if b is None or self.home == "none":
            return W, b
        own = self.own_offset(b).to(dtype).double()
        return W, self.scale * (own - self.mean) + self.beta if self.home == "layer" else self.scale * (self.bias - self.mean) + own
