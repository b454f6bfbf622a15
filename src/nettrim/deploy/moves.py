"""Nodes that only move, pool or average channels: where the channels are behind them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..nodes import hooked
from .channels import Channels, NotUnderstood

Node = fx.Node
Modules = Mapping[str, nn.Module]


def argument(node: Node, position: int, name: str, default: Any) -> Any:
    """An argument of a call, by position or name."""
    return node.kwargs[name] if name in node.kwargs else node.args[position] if len(node.args) > position else default


def pooled(node: Node, modules: Modules, state: Channels, size: int) -> Channels | None:
    """Behind a pooling over the last dimensions of a tensor of ``size`` dimensions; None for another node. Raises NotUnderstood."""
    if node.op == "call_module":
        module: Any = modules[str(node.target)]
        found = None if hooked(module) else _POOLS.get(type(module))
        padded = found is not None and found[1] and (_any(module.padding) or module.ceil_mode or getattr(module, "divisor_override", None))
    else:
        found = _POOL_FUNCTIONS.get(node.target) if node.op == "call_function" else None
        odd = argument(node, 4, "ceil_mode", False) or argument(node, 6, "divisor_override", None)
        padded = found is not None and found[1] and bool(_any(argument(node, 3, "padding", 0)) or odd)
    if found is None:
        return None
    if state.dim >= size - found[0]:
        raise NotUnderstood
    # a mean over padded zeros is not the constant, nor is a sum divided by another number
    return Channels(state.dim, state.labels, state.values.where(state.values == 0, torch.nan)) if padded else state


def resized(node: Node, modules: Modules, state: Channels, size: int) -> Channels | None:
    """Behind an interpolation, or a padding, of the last of a tensor's ``size`` dimensions; None for another node. Raises NotUnderstood."""
    module = modules[str(node.target)] if node.op == "call_module" else None
    kind: Any = type(module) if module is not None and not hooked(module) else node.target if node.op == "call_function" else None
    value: Any = 0.0
    if kind in _SCALES:
        reach = size - 2
    elif kind is F.pad:
        widths, value = argument(node, 1, "pad", None), argument(node, 3, "value", None) or 0.0
        kind = argument(node, 2, "mode", "constant")
        if not isinstance(widths, (tuple, list)):
            raise NotUnderstood
        reach = len(widths) // 2
    elif kind in _PADS:
        padding, value = cast(Any, module).padding, getattr(module, "value", 0.0)
        kind, reach = _PADS[kind], len(padding) // 2
    else:
        return None
    if state.dim >= size - reach or not isinstance(value, (int, float)):
        raise NotUnderstood
    # a border that is filled holds the fill value, which is the channel's constant only where the two are the same
    return Channels(state.dim, state.labels, state.values.where(state.values == value, torch.nan)) if kind == "constant" else state


def averaged(node: Node, state: Channels, size: int) -> Channels | None:
    """Behind a mean over other dimensions than the channels'; None for another node. Raises NotUnderstood."""
    if node.target not in ("mean", torch.mean):
        return None
    dims = argument(node, 1, "dim", None)
    dims = (dims,) if isinstance(dims, int) else dims
    if not isinstance(dims, (tuple, list)) or any(not isinstance(dim, int) for dim in dims):
        raise NotUnderstood
    places = {cast(int, dim) % size for dim in dims}
    if state.dim in places:
        raise NotUnderstood
    shift = 0 if argument(node, 2, "keepdim", False) else sum(place < state.dim for place in places)
    return Channels(state.dim - shift, state.labels, state.values)


def moved(node: Node, modules: Modules, state: Channels, before: tuple[int, ...], after: tuple[int, ...]) -> Channels:
    """Flattening, reshaping to (..., -1), transposition, and dimensions of size 1. Raises NotUnderstood for all else."""
    size = len(before)
    kind = node.target.__name__ if callable(node.target) else str(node.target)
    if node.op == "call_module":
        module = modules[kind]
        if type(module) is not nn.Flatten or hooked(module):
            raise NotUnderstood
        return _flattened(state, before, module.start_dim % size, module.end_dim % size)
    if kind == "flatten":
        start, end = argument(node, 1, "start_dim", 0), argument(node, 2, "end_dim", -1)
        return _flattened(state, before, start % size, end % size)
    if kind in ("view", "reshape"):
        sizes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
        last = len(after) - 1
        # sizes that are written as numbers would be wrong after a removal
        if len(sizes) != len(after) or sizes[-1] != -1 or after[:last] != before[:last] or state.dim < last:
            raise NotUnderstood
        return _flattened(state, before, last, size - 1)
    if kind == "transpose":
        a, b = (argument(node, i, f"dim{i - 1}", None) for i in (1, 2))
        if not isinstance(a, int) or not isinstance(b, int):
            raise NotUnderstood
        return Channels({a % size: b % size, b % size: a % size}.get(state.dim, state.dim), state.labels, state.values)
    if kind == "permute":
        dims: Any = node.args[1] if len(node.args) == 2 else node.args[1:]
        if not isinstance(dims, (tuple, list)) or any(not isinstance(dim, int) for dim in dims):
            raise NotUnderstood
        return Channels([dim % size for dim in dims].index(state.dim), state.labels, state.values)
    if kind in ("squeeze", "unsqueeze"):
        place = argument(node, 1, "dim", None)
        if not isinstance(place, int):
            raise NotUnderstood
        place %= size + (kind == "unsqueeze")
        if kind == "unsqueeze":
            return Channels(state.dim + (place <= state.dim), state.labels, state.values)
        if place != state.dim:
            return Channels(state.dim - (place < state.dim and before[place] == 1), state.labels, state.values)
    raise NotUnderstood


def _flattened(state: Channels, before: tuple[int, ...], start: int, end: int) -> Channels:
    """Dimensions ``start`` to ``end`` made one: every channel gets as many places as there are positions behind it."""
    if not start <= state.dim <= end:
        return Channels(state.dim - (end - start if state.dim > end else 0), state.labels, state.values)
    if math.prod(before[start : state.dim]) != 1:
        raise NotUnderstood
    times = math.prod(before[state.dim + 1 : end + 1])
    return Channels(start, state.labels.repeat_interleave(times), state.values.repeat_interleave(times))


def _any(sizes: Any) -> bool:
    return any(sizes) if isinstance(sizes, (tuple, list)) else bool(sizes)


# dimensions that are pooled over, and whether padding takes part in the result
_POOLS: dict[type[nn.Module], tuple[int, bool]] = {
    nn.MaxPool1d: (1, False),
    nn.MaxPool2d: (2, False),
    nn.AvgPool1d: (1, True),
    nn.AvgPool2d: (2, True),
    **{kind: (1, False) for kind in (nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d)},
    **{kind: (2, False) for kind in (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)},
}
_SCALES = (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, F.interpolate)
_PADS: dict[Any, str] = {
    **dict.fromkeys((nn.ZeroPad1d, nn.ZeroPad2d, nn.ConstantPad1d, nn.ConstantPad2d), "constant"),
    **dict.fromkeys((nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d), "copied"),
    **dict.fromkeys((nn.CircularPad1d, nn.CircularPad2d), "copied"),
}
_POOL_FUNCTIONS: dict[Any, tuple[int, bool]] = {
    **dict.fromkeys((F.max_pool1d, torch.max_pool1d), (1, False)),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), (2, False)),
    **dict.fromkeys((F.avg_pool1d, torch.avg_pool1d), (1, True)),
    F.avg_pool2d: (2, True),
    **dict.fromkeys((F.adaptive_avg_pool1d, F.adaptive_max_pool1d), (1, False)),
    **dict.fromkeys((F.adaptive_avg_pool2d, F.adaptive_max_pool2d), (2, False)),
}
