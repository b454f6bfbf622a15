"""The layout of activations in a region, and the native program of its steps for one number of images and one image size.

A field holds (channels, rows, columns, images), images innermost. Behind the columns of each row, above the first and below the last
row lie zeros as wide as the region's widest reach, so that a convolution's taps are offsets: the border right of a row is the border left
of the next. Positions there are computed like all others and then set to zero by a mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..status import InvalidInput
from . import kernels
from .kernels_vectors import LANES
from .sparse_steps import SparseWeights, Step, Window

Int = NDArray[np.int64]
_ITEMS = 16  # so that a few threads find work of about the same length


def _up(number: int, to: int = LANES) -> int:
    return -(-number // to) * to


@dataclass(frozen=True)
class Field:
    """The layout of one tensor of a chunk of images; sizes in floats. ``flat``: (rows of features), with neither rows nor columns."""

    channels: int
    height: int
    width: int
    pitch: int
    border: int
    images: int
    flat: bool = False

    @property
    def length(self) -> int:
        """What one operation computes of a channel: all rows with the border between them, and to the end of the last register."""
        run = self.height * self.pitch * self.images
        return run if self.flat and self.images == 1 else _up(run)

    @property
    def begin(self) -> int:
        """Where the first row lies in a channel."""
        return _up(self.border * (self.pitch + 1) * self.images)

    @property
    def stride(self) -> int:
        """From one channel to the next."""
        behind = self.begin + LANES if self.border else 0
        return self.length if self.flat else self.begin + self.length + behind

    @property
    def size(self) -> int:
        return self.channels * self.stride

    def mask(self) -> NDArray[np.float32] | None:
        """1 at the image's positions and 0 between them, (length); ``None`` where nothing lies between that anyone reads."""
        if not self.border:
            return None
        places = np.zeros(self.length, dtype=np.float32)
        rows = places[: self.height * self.pitch * self.images].reshape(self.height, self.pitch, self.images)
        rows[:, : self.width] = 1
        return places


@dataclass(frozen=True)
class Operation:
    """A native operation in terms of the arena: ``places`` are numbers, ``floats`` places that hold offsets into the arena (in floats)."""

    step: int
    places: Mapping[int, int]
    floats: Mapping[int, int]
    arrays: Mapping[int, NDArray[np.generic]]
    layer: str = ""
    work: int = 0


@dataclass
class Plan:
    """Where every tensor lies and what is done, for a number of images and the sizes of the inputs.

    ``fields`` and ``offsets`` by tensor; ``stages`` are native operations, or the number of a step that torch applies.
    """

    size: int
    fields: dict[int, Field] = field(default_factory=dict)
    offsets: dict[int, int] = field(default_factory=dict)
    stages: list[list[Operation] | int] = field(default_factory=list)

    @property
    def work(self) -> int:
        """Multiply-adds, borders included."""
        return sum(op.work for stage in self.stages if isinstance(stage, list) for op in stage)


def plan(
    steps: Sequence[Step], weights: Mapping[str, SparseWeights], inputs: Mapping[int, tuple[int, ...]], outputs: Sequence[int], images: int
) -> Plan:
    """The plan for inputs of (channels, height, width) or (features,) each.

    Raises InvalidInput for sizes that the steps cannot take.
    """
    return _Planner(steps, weights, outputs, images).made(inputs)


class _Planner:
    def __init__(self, steps: Sequence[Step], weights: Mapping[str, SparseWeights], outputs: Sequence[int], images: int) -> None:
        self.steps, self.weights, self.images = steps, weights, images
        self.border = max((step.window.reach for step in steps if step.kind == "conv" and step.window is not None), default=0)
        self.plan = Plan(0)
        self.last: dict[int, int] = {}
        for number, step in enumerate(steps):
            self.last[step.source] = number
            if step.added is not None:
                self.last[step.added] = number
        self.last.update(dict.fromkeys(outputs, len(steps)))
        self.free: dict[Field, list[int]] = {}
        self.number = -1  # imports belong to no step
        self.masks: dict[Field, NDArray[np.float32] | None] = {}

    def made(self, inputs: Mapping[int, tuple[int, ...]]) -> Plan:
        for tensor, shape in inputs.items():
            self._import(tensor, shape)
        for number, step in enumerate(self.steps):
            self.number = number
            if step.kind == "apply":
                self._place(step.target, self.plan.fields[step.source])
                self.plan.stages.append(number)
            elif step.kind == "pool":
                self._pool(step)
            elif step.kind == "sum":
                self._sum(step)
            elif step.kind == "linear":
                self._linear(step)
            else:
                self._conv(step)
            for tensor in {step.source, step.target} | ({step.added} if step.added is not None else set()):
                if self.last.get(tensor, -1) <= number:
                    self._release(tensor)
        return self.plan

    def _import(self, tensor: int, shape: tuple[int, ...]) -> None:
        channels, height, width = shape if len(shape) == 3 else (1, 1, shape[0])  # features are like the columns of one row
        out = self._image(*shape) if len(shape) == 3 else self._flat(width)
        target = self._place(tensor, out)
        rows = channels * height
        group = -(-rows // _ITEMS)
        places = {
            kernels.ITEMS: -(-rows // group),
            kernels.GROUP_ROWS: group,
            kernels.ALL_ROWS: rows,
            kernels.IMAGES: self.images,
            kernels.HEIGHT: height,
            kernels.WIDE: width,
            kernels.X_PITCH: width,
            kernels.OUT_PITCH: out.pitch * self.images,
            kernels.STEP_H: math.prod(shape),
            kernels.STEP_W: out.stride if out.flat else self.images,
        }
        self._add(kernels.IMPORT, (target, out), (0, out), places)

    def _flat(self, features: int) -> Field:
        return Field(features, 1, 1, 1, 0, self.images, flat=True)

    def _image(self, channels: int, height: int, width: int, pitch: int | None = None) -> Field:
        return Field(channels, height, width, width + self.border if pitch is None else pitch, self.border, self.images)

    def _place(self, tensor: int, field: Field) -> int:
        if field.size >= 2**31:
            raise InvalidInput(
                f"accelerated region: an activation of {field.channels} x {field.height} x {field.width} for {field.images} samples at "
                "once is too large for offsets of 32 bits; use smaller images, or keep the dense model"
            )
        waiting = self.free.get(field)
        if waiting:
            offset = waiting.pop()
        else:
            offset, self.plan.size = self.plan.size, self.plan.size + _up(field.size, 16)
        self.plan.fields[tensor], self.plan.offsets[tensor] = field, offset
        return offset

    def _release(self, tensor: int) -> None:
        # only for a tensor of the same layout, whose borders are the same places and stay zero
        self.free.setdefault(self.plan.fields[tensor], []).append(self.plan.offsets[tensor])

    def _add(
        self,
        kind: int,
        target: tuple[int, Field],
        source: tuple[int, Field],
        places: Mapping[int, int],
        floats: Mapping[int, int] | None = None,
        arrays: Mapping[int, NDArray[np.generic]] | None = None,
        layer: str = "",
        work: int = 0,
    ) -> None:
        out, x = target[1], source[1]
        shared = {kernels.KIND: kind, kernels.OUT_STRIDE: out.stride, kernels.X_STRIDE: x.stride, kernels.LENGTH: out.length}
        there = {kernels.OUT: target[0] + out.begin, kernels.X: source[0] + x.begin, **(floats or {})}
        if not self.plan.stages or not isinstance(self.plan.stages[-1], list):
            self.plan.stages.append([])
        stage = self.plan.stages[-1]
        assert isinstance(stage, list)
        stage.append(Operation(self.number, {**shared, **places}, there, arrays or {}, layer, work))

    def _end(self, step: Step, field: Field) -> tuple[dict[int, int], dict[int, NDArray[np.generic]]]:
        """What RUNS, DOTS and SUM end with: the tensor that is added, bounds, mask."""
        floats: dict[int, int] = {}
        arrays: dict[int, NDArray[np.generic]] = {kernels.CLAMP: np.array([step.low, step.high], dtype=np.float32)}
        if step.added is not None:
            offset, other = self._like(step.added, field)
            floats[kernels.ADDED] = offset + other.begin
        if field not in self.masks:
            self.masks[field] = field.mask()
        mask = self.masks[field]
        if mask is not None:
            arrays[kernels.MASK] = mask
        return floats, arrays

    def _like(self, tensor: int, wanted: Field) -> tuple[int, Field]:
        """A tensor in the layout that is wanted; copied where its own is another."""
        field, offset = self.plan.fields[tensor], self.plan.offsets[tensor]
        if field == wanted:
            return offset, field
        if (field.channels, field.height, field.width) != (wanted.channels, wanted.height, wanted.width):
            raise InvalidInput(
                f"accelerated region: a sum of {field.channels} x {field.height} x {field.width} and "
                f"{wanted.channels} x {wanted.height} x {wanted.width}; give images of a size that the model can add"
            )
        copy = self._place(-1 - len(self.plan.offsets), wanted)
        self._copy((offset, field), (copy, wanted), (1, 1), (1, 1))
        return copy, wanted

    def _copy(self, source: tuple[int, Field], target: tuple[int, Field], step: tuple[int, int], phases: tuple[int, int]) -> None:
        x, out = source[1], target[1]
        places = {
            kernels.ITEMS: x.channels,
            kernels.IMAGES: self.images,
            kernels.HEIGHT: out.height,
            kernels.WIDE: out.width,
            kernels.X_PITCH: x.pitch,
            kernels.OUT_PITCH: out.pitch,
            kernels.X_HEIGHT: x.height,
            kernels.X_WIDE: x.width,
            kernels.STEP_H: step[0],
            kernels.STEP_W: step[1],
            kernels.KERNEL_H: phases[0],
            kernels.KERNEL_W: phases[1],
        }
        self._add(kernels.PHASES, target, source, places)

    def _source(self, step: Step) -> tuple[int, Field]:
        return self.plan.offsets[step.source], self.plan.fields[step.source]

    def _sum(self, step: Step) -> None:
        offset, field = self._source(step)
        floats, arrays = self._end(step, field)
        target = self._place(step.target, field)
        self._add(kernels.SUM, (target, field), (offset, field), {kernels.ITEMS: field.channels}, floats, arrays)

    def _pool(self, step: Step) -> None:
        source = self._source(step)
        x = source[1]
        window = step.window or Window((x.height, x.width), (1, 1))  # without one: over the whole image
        height, width = window.out(x.height, x.width)
        self._fits(height, width, x, window)
        out = self._image(x.channels, height, width)
        target = self._place(step.target, out)
        places = {
            kernels.ITEMS: x.channels,
            kernels.IMAGES: self.images,
            kernels.HEIGHT: height,
            kernels.WIDE: width,
            kernels.X_PITCH: x.pitch,
            kernels.OUT_PITCH: out.pitch,
            kernels.KERNEL_H: window.kernel[0],
            kernels.KERNEL_W: window.kernel[1],
            kernels.STEP_H: window.stride[0],
            kernels.STEP_W: window.stride[1],
            kernels.MEAN: int(step.mean),
        }
        self._add(kernels.POOL, (target, out), source, places)

    def _fits(self, height: int, width: int, x: Field, window: Window) -> None:
        if height < 1 or width < 1:
            raise InvalidInput(
                f"accelerated region: images of {x.height} x {x.width} are smaller than a window of "
                f"{window.kernel[0]} x {window.kernel[1]}; give larger images"
            )

    def _linear(self, step: Step) -> None:
        source = self._source(step)
        x, found = source[1], self.weights[step.layer]
        features = x.channels * x.height * x.width
        if features != found.shape[1]:
            raise InvalidInput(
                f"accelerated layer {step.layer}: takes {found.shape[1]} features, found {features}; give inputs of the size that the "
                "model is made for"
            )
        columns = found.columns.numpy().astype(np.int64)
        channel, place = np.divmod(columns, x.height * x.width)
        row, column = np.divmod(place, x.width)
        offsets = channel * x.stride + (row * x.pitch + column) * self.images
        self._sparse(step, source, self._flat(found.shape[0]), offsets)

    def _conv(self, step: Step) -> None:
        offset, x = self._source(step)
        found, window = self.weights[step.layer], step.window
        assert window is not None
        inputs = found.shape[1] * found.groups
        if x.channels != inputs:
            raise InvalidInput(f"accelerated layer {step.layer}: takes {inputs} channels, found {x.channels}")
        height, width = window.out(x.height, x.width)
        self._fits(height, width, x, window)
        (kh, kw), (sh, sw) = window.kernel, window.stride
        inner, tap = np.divmod(found.columns.numpy().astype(np.int64), kh * kw)
        per_group = found.shape[0] // found.groups
        owner = np.repeat(np.arange(found.shape[0]), np.diff(found.rows.numpy()))
        channel = inner + owner // per_group * found.shape[1]
        down = tap // kw * window.dilation[0] - window.before[0]
        right = tap % kw * window.dilation[1] - window.before[1]
        temporary = None
        if (sh, sw) != (1, 1):  # the rows and columns of each remainder by themselves: then it is a convolution of stride 1
            phases = (1 if kh == 1 else sh, 1 if kw == 1 else sw)
            rows, columns = -(-x.height // sh), -(-x.width // sw)
            split = self._image(x.channels * phases[0] * phases[1], rows, columns, max(columns, width) + self.border)
            temporary = -1 - len(self.plan.offsets)
            place = self._place(temporary, split)
            self._copy((offset, x), (place, split), (sh, sw), phases)
            channel = (channel * phases[0] + down % sh) * phases[1] + right % sw
            down, right = down // sh, right // sw
            offset, x = place, split
        offsets = channel * x.stride + (down * x.pitch + right) * self.images
        self._sparse(step, (offset, x), self._image(found.shape[0], height, width, x.pitch), offsets)
        if temporary is not None:
            self._release(temporary)

    def _sparse(self, step: Step, source: tuple[int, Field], out: Field, offsets: Int) -> None:
        floats, arrays = self._end(step, out)
        target = self._place(step.target, out)
        single = out.flat and self.images == 1
        tiles = 1 if single else -(-out.length // kernels.TILE)
        group = max(1 if out.length >= kernels.TILE else 8, -(-out.channels * tiles // _ITEMS))
        group = min(group, out.channels)
        places = {
            kernels.CHANNELS: out.channels,
            kernels.GROUP: group,
            kernels.TILES: tiles,
            kernels.ITEMS: tiles * -(-out.channels // group),
        }
        arrays[kernels.OFFSETS] = offsets.astype(np.int32)
        kind = kernels.DOTS if single else kernels.RUNS
        self._add(kind, (target, out), source, places, floats, arrays, step.layer, len(offsets) * out.length)
