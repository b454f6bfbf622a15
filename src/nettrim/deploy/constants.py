"""Channels that always hold one value: what a layer makes of them, and how they are folded into what follows.

Values are (C,) float64, NaN where a channel is not known to be constant.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..nodes import norm_scale

Layer = nn.Linear | nn.modules.conv._ConvNd
Norm = nn.modules.batchnorm._BatchNorm


def by_output(layer: Layer) -> Tensor:
    """A view of the weights as (outputs, inputs of a group, taps...); a transposed convolution keeps its inputs first."""
    weight = layer.weight.detach()
    if isinstance(layer, nn.Linear) or not layer.transposed:
        return weight
    if layer.groups == 1:
        return weight.transpose(0, 1)
    parts = weight.reshape(layer.groups, -1, *weight.shape[1:])  # (groups, inputs of a group, outputs of a group, taps...)
    return parts.transpose(1, 2).flatten(0, 1)


def touched(layer: Layer) -> Tensor:
    """Which pairs (outputs, inputs of a group) have a weight other than zero."""
    found = by_output(layer) != 0
    return (found.flatten(2).any(2) if found.ndim > 2 else found).cpu()


def sums(layer: Layer, columns: Tensor) -> Tensor:
    """The weights of some inputs (a mask (inputs of a group,)), summed over taps: (outputs, chosen), float64; only these are copied."""
    weight = by_output(layer)[:, columns.to(layer.weight.device)].double().cpu()
    return weight.flatten(2).sum(2) if weight.ndim > 2 else weight


def is_layer(module: nn.Module) -> bool:
    """True for what holds weights between input and output channels."""
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and module.weight.ndim > 1


def is_depthwise(layer: Layer) -> bool:
    """True for a convolution of each channel by itself."""
    if isinstance(layer, nn.Linear) or layer.transposed:
        return False
    return layer.groups == layer.in_channels == layer.out_channels > 1


def moves_constants(layer: Layer) -> bool:
    """True where a constant input does not give a constant output: the border sees zeros too, or each position other taps."""
    if isinstance(layer, nn.Linear):
        return False
    if layer.transposed:
        return True
    if layer.padding_mode != "zeros" or layer.padding == "valid":
        return False
    if isinstance(layer.padding, str):  # "same"
        return any(size > 1 for size in layer.kernel_size)
    return any(layer.padding)


def read(layer: Layer) -> Tensor:
    """Which inputs (inputs,) have a weight other than zero."""
    return touched(layer).any(0)


def outputs(layer: Layer, values: Tensor) -> Tensor:
    """The constants (outputs,) that a layer makes of inputs with constants ``values`` (inputs,)."""
    moving = values.isnan() | ((values != 0) if moves_constants(layer) else torch.zeros_like(values, dtype=torch.bool))
    still = torch.where(moving, 0.0, values)
    if is_depthwise(layer):
        varies, found = touched(layer)[:, 0] & moving, sums(layer, torch.ones(1, dtype=torch.bool))[:, 0] * still
    else:
        counted = still != 0
        varies, found = touched(layer)[:, moving].any(1), sums(layer, counted) @ still[counted]
    if layer.bias is not None:
        found = found + layer.bias.detach().double().cpu()
    return torch.where(varies, torch.nan, found)


def normed(norm: Norm, values: Tensor) -> Tensor:
    """The constants (C,) behind a batch-norm in eval mode."""
    assert norm.running_mean is not None
    found = (values - norm.running_mean.double().cpu()) * norm_scale(norm).cpu()
    return found if norm.bias is None else found + norm.bias.detach().double().cpu()


def foldable(layer: Layer, values: Tensor, place: bool) -> Tensor:
    """Which inputs (inputs,) a layer can lose: they are not read, or are constants that its bias can take over exactly.

    ``place``: there is a bias, or a batch-norm right behind it.
    """
    taken = values == 0
    if place and not moves_constants(layer):
        taken |= ~values.isnan()
    return ~read(layer) | taken


def fold(layer: Layer, norm: Norm | None, values: Tensor, lost: Tensor) -> None:
    """Puts what the inputs ``lost`` (a mask (inputs,)) contribute into the bias, or into the mean of the batch-norm behind, in place."""
    wanted = lost & read(layer) & (values != 0)
    if not bool(wanted.any()):
        return
    shift = sums(layer, wanted) @ values[wanted]
    with torch.no_grad():
        if layer.bias is not None:
            layer.bias.copy_(layer.bias.double().cpu() + shift)
        else:
            assert norm is not None and norm.running_mean is not None
            norm.running_mean.copy_(norm.running_mean.double().cpu() - shift)


def merge(layer: Layer, source: int, target: int, ratio: float) -> None:
    """Adds ``ratio`` times the weights of input ``source`` to those of input ``target``, in place: exact where source = ratio * target."""
    with torch.no_grad():
        weight = by_output(layer)
        both = weight[:, target].double() + ratio * weight[:, source].double()
        weight[:, target] = both.to(weight.dtype)
