"""The steps of a network in C, on one sample, and the values between them. Shapes are without the batch dimension."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Pair = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Step:
    """One operation, named by its ``label`` in the model: values by number. ``elementwise`` steps may write where they read."""

    label: str
    inputs: tuple[int, ...]
    output: int

    elementwise = False


@dataclass(frozen=True, eq=False)
class Linear(Step):
    """``y = W x + b`` for each of ``count`` vectors; ``weight`` (M, N), ``bias`` (M,) or None, both float64."""

    weight: Array
    bias: Array | None
    count: int


@dataclass(frozen=True, eq=False)
class Window:
    """How a kernel moves over the last two dimensions; one of height 1 for signals."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair


@dataclass(frozen=True, eq=False)
class Convolution(Step):
    """``weight`` (M, N / groups, kernel); ``before`` (N, H, W) and ``after`` (M, H', W') are the shapes around it."""

    weight: Array
    bias: Array | None
    groups: int
    window: Window
    before: tuple[int, int, int]
    after: tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class MaxPool(Step):
    """The largest entry of each window, padding left out."""

    window: Window
    before: tuple[int, int, int]
    after: tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class AveragePool(Step):
    """The mean of each window: padding counts where ``counts_padding``; a ``divisor`` above 0 goes before the number of entries."""

    window: Window
    before: tuple[int, int, int]
    after: tuple[int, int, int]
    counts_padding: bool
    divisor: int


@dataclass(frozen=True, eq=False)
class AdaptivePool(Step):
    """Means over windows that share out the input evenly, as torch's adaptive average pooling has them."""

    before: tuple[int, int, int]
    after: tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Clip(Step):
    """``min(max(x, low), high)``; infinite where a side is open."""

    low: float
    high: float

    elementwise = True


@dataclass(frozen=True, eq=False)
class Leaky(Step):
    """``x`` above zero and ``slope * x`` below."""

    slope: float

    elementwise = True


@dataclass(frozen=True, eq=False)
class Affine(Step):
    """``scale * x + shift`` for each channel, of ``inner`` entries each: a batch-norm that no layer takes in."""

    scale: Array
    shift: Array
    inner: int

    elementwise = True


@dataclass(frozen=True, eq=False)
class Add(Step):
    """The sum of two values."""

    elementwise = True


@dataclass(frozen=True, eq=False)
class Copy(Step):
    """The input as it is, for networks that put out what they read."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Steps in order; ``shapes`` of all values, of which number 0 is the network's input and ``output`` its output."""

    steps: tuple[Step, ...]
    shapes: tuple[tuple[int, ...], ...]
    output: int
