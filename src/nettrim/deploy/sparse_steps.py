"""What an accelerated region computes, as plain data: steps between numbered tensors, and the sparse weights of its layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nodes import norm_scale

Layer = nn.Linear | nn.Conv2d

FUNCTIONS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "gelu": F.gelu,
        "silu": F.silu,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "hardswish": F.hardswish,
        "mish": F.mish,
        "softsign": F.softsign,
        "leaky_relu": F.leaky_relu,
    }
)
"""Elementwise functions that a region applies with torch, by name."""

MOVES_ZERO = frozenset({"sigmoid"})
"""Those that do not map zero to zero: borders of images would not stay zero."""


@dataclass(frozen=True)
class Window:
    """Kernel, stride, padding before and after, and dilation of a convolution or pooling, each as (rows, columns)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    before: tuple[int, int] = (0, 0)
    after: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def reach(self) -> int:
        """How far it reaches beyond a position, in rows or columns, on either side."""
        spans = [d * (k - 1) for k, d in zip(self.kernel, self.dilation, strict=True)]
        return max((*self.before, *self.after, *(span - b for span, b in zip(spans, self.before, strict=True))))

    def out(self, height: int, width: int) -> tuple[int, int]:
        """The output's height and width; not positive where the window does not fit."""
        sizes = []
        for i, size in enumerate((height, width)):
            free = size + self.before[i] + self.after[i] - self.dilation[i] * (self.kernel[i] - 1) - 1
            sizes.append(free // self.stride[i] + 1 if free >= 0 else 0)
        return sizes[0], sizes[1]


@dataclass(frozen=True)
class Step:
    """One step. ``kind`` is conv, linear, pool, sum or apply; ``source`` and ``target`` number tensors.

    conv, linear and sum end with ``clamp(result + added, low, high)``. ``layer`` names the weights; ``mean`` makes a pool an average, and
    ``whole`` one over the whole image.
    """

    kind: str
    source: int
    target: int
    layer: str = ""
    added: int | None = None
    low: float = -math.inf
    high: float = math.inf
    window: Window | None = None
    mean: bool = False
    whole: bool = False
    function: str = ""
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, eq=False)
class SparseWeights:
    """The nonzeros of a layer, batch-norm folded in, by output.

    ``values`` and ``columns`` (nnz), ``rows`` (outputs + 1), ``bias`` (outputs).

    A column is the place in the layer's own weight of one output, flattened.
    """

    values: Tensor
    columns: Tensor
    rows: Tensor
    bias: Tensor
    shape: tuple[int, ...]
    groups: int = 1

    @property
    def density(self) -> float:
        """The share of weights that are not zero."""
        return len(self.values) / max(1, math.prod(self.shape))


def sparse_weights(layer: Layer, norm: nn.Module | None = None) -> SparseWeights:
    """The nonzeros of a float32 layer, with a batch-norm behind it folded in (in float64, rounded once)."""
    W = layer.weight.detach().cpu().double()
    b = torch.zeros(len(W), dtype=torch.float64, device="cpu") if layer.bias is None else layer.bias.detach().cpu().double()
    if norm is not None:
        assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
        scale = norm_scale(norm).cpu()
        beta = 0.0 if norm.bias is None else norm.bias.detach().cpu().double()
        b = (b - norm.running_mean.cpu().double()) * scale + beta
        W = W * scale.view(-1, *[1] * (W.ndim - 1))
    flat = W.reshape(len(W), -1)
    outputs, columns = torch.nonzero(flat, as_tuple=True)
    counts = torch.bincount(outputs, minlength=len(W))
    rows = torch.cat((torch.zeros(1, dtype=torch.int64, device="cpu"), counts.cumsum(0)))
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    values = flat[outputs, columns].float().contiguous()
    return SparseWeights(values, columns.int(), rows.int(), b.float(), tuple(W.shape), groups)


def window_of(conv: nn.Conv2d) -> Window | None:
    """The window of a convolution; ``None`` for one that pads otherwise than with zeros, or by more than its own reach."""
    kernel, stride = (conv.kernel_size[0], conv.kernel_size[1]), (conv.stride[0], conv.stride[1])
    dilation = (conv.dilation[0], conv.dilation[1])
    spans = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if conv.padding_mode != "zeros":
        return None
    if isinstance(conv.padding, str):
        before = [span // 2 if conv.padding == "same" else 0 for span in spans]
        after = [span - b if conv.padding == "same" else 0 for span, b in zip(spans, before, strict=True)]
    else:
        before = after = [int(n) for n in conv.padding]
    if any(b + a > span for b, a, span in zip(before, after, spans, strict=True)):
        return None
    return Window(kernel, stride, (before[0], before[1]), (after[0], after[1]), dilation)
