"""nn.TransformerEncoderLayer and nn.TransformerEncoder as plain steps, which torch.fx can follow: their own hide all that is inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn


class EncoderLayerSteps(nn.Module):
    """What nn.TransformerEncoderLayer computes in eval mode, by the same modules under the same names; arguments as there."""

    self_attn: nn.Module
    linear1: nn.Module
    linear2: nn.Module
    norm1: nn.Module
    norm2: nn.Module
    dropout: nn.Module
    dropout1: nn.Module
    dropout2: nn.Module
    activation: Callable[[Tensor], Tensor]

    def __init__(self, source: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        for name, child in source._modules.items():
            self.add_module(name, child)
        self.norm_first = source.norm_first
        if not isinstance(source.activation, nn.Module):
            self.activation = source.activation
        self.train(source.training)

    def forward(
        self, src: Tensor, src_mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attention and two layers, each with a sum around it; layer-norm before them (``norm_first``) or after the sums."""
        if self.norm_first:
            x = src + self._attend(self.norm1(src), src_mask, src_key_padding_mask)
            return x + self._feed(self.norm2(x))
        x = self.norm1(src + self._attend(src, src_mask, src_key_padding_mask))
        return cast(Tensor, self.norm2(x + self._feed(x)))

    def _attend(self, x: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor:
        return cast(Tensor, self.dropout1(self.self_attn(x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=False)[0]))

    def _feed(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x))))))


class EncoderSteps(nn.Module):
    """What nn.TransformerEncoder computes in eval mode: its layers one after the other, and a norm at the end; arguments as there."""

    def __init__(self, source: nn.TransformerEncoder) -> None:
        super().__init__()
        self.layers, self.norm = source.layers, source.norm
        self.train(source.training)

    def forward(
        self, src: Tensor, mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None, is_causal: bool | None = None
    ) -> Tensor:
        """``src`` through all layers."""
        for layer in self.layers:
            src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask)
        return src if self.norm is None else cast(Tensor, self.norm(src))


def as_steps(module: nn.Module, attention: type[nn.Module]) -> nn.Module | None:
    """The module as steps, where it is one of torch's own with ``attention`` inside and without hooks; ``None`` for all others."""
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    if type(module) is nn.TransformerEncoderLayer and isinstance(module.self_attn, attention):
        return EncoderLayerSteps(module)
    if type(module) is nn.TransformerEncoder and all(isinstance(layer, EncoderLayerSteps) for layer in module.layers):
        return EncoderSteps(module)
    return None
