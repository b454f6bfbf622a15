"""Pictures of masks: the sparsity pattern and the reads of each pixel as PNG, the reads of each input as an SVG path."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .numbers import clean, percent

Mask = npt.NDArray[np.bool_]

RAMP = ((0.0, (246, 248, 252)), (0.35, (139, 176, 235)), (0.7, (37, 89, 196)), (1.0, (11, 30, 84)))
"""Light to dark, so that it survives grey print and every kind of colour vision."""
NEVER = (231, 222, 205)
"""Pixels that nobody reads: sand, outside the ramp."""

_MASK_ROWS, _MASK_COLUMNS = 300, 480  # the largest mask picture, in pixels; larger masks are averaged over blocks
_PROFILE_BINS = 240


@dataclass(frozen=True)
class Picture:
    """A raster: its address, the size at which it is drawn, and how to read its colours (``shades``: all of the ramp is used)."""

    source: str
    width: int
    height: int
    low: str
    high: str
    alt: str
    shades: bool = True


@dataclass(frozen=True)
class Profile:
    """How often each input is read: a step-shaped area in a unit-free 1000 x 100 drawing whose height stands for ``top``."""

    path: str
    top: str
    mean: str
    last_input: int
    averaged: bool


def mask_picture(mask: Mask, name: str) -> Picture:
    """Outputs downwards, inputs to the right; cells stretched to whole pixels so that thin matrices stay readable."""
    outputs, inputs = mask.shape
    blocks = _blocks(mask, _MASK_ROWS, _MASK_COLUMNS)
    rows, columns = blocks.shape
    averaged = blocks.shape != mask.shape
    top = float(blocks.max()) or 1.0
    across, down = max(1, _MASK_COLUMNS // columns), max(1, _MASK_ROWS // rows)
    return Picture(
        source=_png(_ramp(blocks / top)),
        width=columns * min(across, 4 * down, 16),
        height=rows * min(down, 4 * across, 16),
        low="0% of a block" if averaged else "zero",
        high=f"{percent(top)} of a block" if averaged else "nonzero",
        alt=f"Where the {outputs} x {inputs} weights of layer {clean(name)} are not zero",
        shades=averaged,
    )


def image_shape(sample_shape: tuple[int, ...], inputs: int) -> tuple[int, int, int] | None:
    """Channels, height and width of a sample where it is an image whose entries are the layer's inputs; else nothing."""
    shape = (1, *sample_shape) if len(sample_shape) == 2 else sample_shape
    if len(shape) != 3 or shape[0] not in (1, 3) or min(shape[1:]) < 2 or math.prod(shape) != inputs:
        return None
    return shape[0], shape[1], shape[2]


def pixel_picture(reads: npt.NDArray[np.int64], image: tuple[int, int, int]) -> Picture:
    """How many nonzero weights read each pixel, summed over the channels."""
    pixels = reads.reshape(image).sum(axis=0)
    top = int(pixels.max())
    shades = _ramp(0.12 + 0.88 * pixels / max(top, 1))
    shades[pixels == 0] = NEVER
    height, width = pixels.shape
    cell = max(1, min(32, 288 // max(height, width)))
    return Picture(
        source=_png(shades),
        width=width * cell,
        height=height * cell,
        low="1",
        high=f"{top:,}",
        alt=f"How many nonzero weights read each of the {height} x {width} pixels",
    )


def input_profile(reads: npt.NDArray[np.int64]) -> Profile:
    """How many nonzero weights read each input, averaged over neighbours where there are many inputs."""
    bins = _blocks(reads[None, :], 1, _PROFILE_BINS)[0]
    top = float(bins.max())
    points = ["M0 100"]
    for index, value in enumerate(bins):
        level = f"{100 - 100 * value / (top or 1.0):.2f}"
        points.append(f"L{1000 * index / len(bins):.2f} {level}L{1000 * (index + 1) / len(bins):.2f} {level}")
    return Profile(
        path="".join([*points, "L1000 100Z"]),
        top=f"{top:,.0f}" if top == round(top) else f"{top:,.1f}",
        mean=f"{float(reads.mean()):.1f}",
        last_input=len(reads) - 1,
        averaged=len(reads) > _PROFILE_BINS,
    )


def _ramp(values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Values in [0, 1] as RGB."""
    stops = [stop for stop, _ in RAMP]
    channels = [np.interp(values, stops, [colour[channel] for _, colour in RAMP]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def _png(pixels: npt.NDArray[np.uint8]) -> str:
    """RGB pixels as a PNG data address."""
    from matplotlib.image import imsave  # slow to import and needed by pages only

    buffer = io.BytesIO()
    nameless: dict[str, Any] = {"Software": None}
    imsave(buffer, pixels, format="png", metadata=nameless, pil_kwargs={"optimize": True})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _blocks(values: npt.NDArray[Any], rows: int, columns: int) -> npt.NDArray[np.float64]:
    """``values`` averaged over a grid of at most ``rows`` x ``columns`` nearly equal blocks."""
    result: npt.NDArray[Any] = values
    for axis, limit in ((0, rows), (1, columns)):
        size = result.shape[axis]
        if size > limit:
            edges = np.linspace(0, size, limit + 1).astype(np.int64)
            sums = np.add.reduceat(result, edges[:-1], axis=axis, dtype=np.float64)
            counts = np.diff(edges).astype(np.float64)
            result = sums / (counts[:, None] if axis == 0 else counts[None, :])
    return result.astype(np.float64)
