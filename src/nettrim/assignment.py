"""Which parts of a network's outputs belong to which sample: found by running it on parts of a batch, never taken for granted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .calibration import inputs_of
from .calibration import samples as sample_count
from .capture import Replica
from .outputs import Outputs, allowance, largest_entry, largest_move, outputs_of


@dataclass(frozen=True)
class Layout:
    """Where an output holds its samples: along ``dimension``, in which each has ``k`` entries, side by side or ``interleaved``.

    Side by side, as ``(samples * k, ...)`` of a flattened sequence; interleaved, as ``(k * samples, ...)`` of one with time first.
    """

    dimension: int
    interleaved: bool = False

    def fits(self, Y: Tensor, samples: int) -> bool:
        """Whether the dimension is there and can be shared out among so many samples."""
        return self.dimension < Y.ndim and Y.shape[self.dimension] > 0 and Y.shape[self.dimension] % samples == 0

    def by_sample(self, Y: Tensor, samples: int) -> Tensor:
        """The output as (samples, k, ...)."""
        moved = Y.movedim(self.dimension, 0)
        k = len(moved) // samples
        if self.interleaved:
            return moved.reshape(k, samples, *moved.shape[1:]).transpose(0, 1)
        return moved.reshape(samples, k, *moved.shape[1:])

    def without(self, dimension: int) -> Layout:
        """The layout of what is left when another dimension is summed up."""
        return Layout(self.dimension - (dimension < self.dimension), self.interleaved)


def divisible(batch: Any) -> bool:
    """Whether all tensors of a batch hold one entry for each sample, or one for all."""
    inputs = inputs_of(batch)
    tensors = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    return all(value.ndim > 0 and len(value) in (1, sample_count(batch)) for value in tensors if isinstance(value, Tensor))


def part_of(batch: Any, chosen: Sequence[int]) -> Any:
    """The inputs of some samples of a batch."""
    inputs, samples = inputs_of(batch), sample_count(batch)
    index = torch.tensor(chosen)

    def cut(value: Any) -> Any:
        return value[index.to(value.device)] if isinstance(value, Tensor) and value.ndim and len(value) == samples else value

    return {key: cut(value) for key, value in inputs.items()} if isinstance(inputs, Mapping) else cut(inputs)


def joined(first: Any, second: Any) -> Any:
    """The inputs of two batches of one form as one."""
    a, b = inputs_of(first), inputs_of(second)
    if not isinstance(a, Mapping):
        return torch.cat([a, b])
    return {key: torch.cat([value, b[key]]) if isinstance(value, Tensor) else value for key, value in a.items()}


def form_of(batch: Any) -> Any:
    """What two batches must have in common to be joined: keys, dtypes, shapes of a sample and plain values."""
    inputs = inputs_of(batch)
    items = sorted(inputs.items()) if isinstance(inputs, Mapping) else [("", inputs)]
    return tuple((key, value.dtype, value.shape[1:]) if isinstance(value, Tensor) else (key, repr(value)) for key, value in items)


def layouts_of(network: Replica, batch: Any, whole: Outputs | None = None) -> dict[str, dict[Layout, float]]:
    """For every output the layouts by which it holds the samples of ``batch`` one by one, and how far each was missed by rounding.

    The network is run on the whole batch, on every second sample from the last one backwards, and on the others: so each sample is seen
    again at another place and in other company, and its part of the output must be the same. An output without a layout does not belong
    to samples one by one: they interact in it, or it has none of their number. A batch needs two samples to show anything. ``whole``: the
    outputs on the whole batch, where they are known.

    Raises:
        RuntimeError, ValueError, TypeError, IndexError: the model does not run on a part of the batch.
    """
    samples = sample_count(batch)
    whole = outputs_of(network.run(batch)) if whole is None else whole
    found = {path: dict.fromkeys(candidates(Y, samples), 0.0) for path, Y in whole.tensors.items()}
    sizes = {path: largest_entry(Y) for path, Y in whole.scores.items()}
    for chosen in (list(range(samples))[1::2][::-1], list(range(samples))[0::2][::-1]):
        part = outputs_of(network.run(part_of(batch, chosen)))
        for path, layouts in found.items():
            for layout in list(layouts):
                missed = _missed(whole.tensors[path], part.tensors.get(path), layout, samples, chosen)
                if missed <= allowance(network.precision) * sizes.get(path, 0.0):
                    layouts[layout] = max(layouts[layout], missed)
                else:
                    del layouts[layout]
    return found


def candidates(Y: Tensor, samples: int) -> list[Layout]:
    """The layouts that an output's shape allows."""
    found = []
    for dimension in range(min(2, Y.ndim)):
        plain = Layout(dimension)
        if plain.fits(Y, samples):
            found += [plain] if Y.shape[dimension] == samples or samples == 1 else [plain, Layout(dimension, interleaved=True)]
    return found


def best(layouts: Mapping[Layout, float]) -> Layout | None:
    """The layout that was missed least: in coarse arithmetic more than one may pass. The first among equals."""
    return min(layouts, key=lambda layout: layouts[layout], default=None)


def _missed(whole: Tensor, part: Tensor | None, layout: Layout, samples: int, chosen: Sequence[int]) -> float:
    """The largest difference of a part from the same samples of the whole; inf where it has another form or is not finite alike."""
    if part is None or part.ndim != whole.ndim or not layout.fits(part, len(chosen)):
        return float("inf")
    expected = layout.by_sample(whole, samples)[torch.tensor(chosen, device=whole.device)]
    found = layout.by_sample(part, len(chosen))
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return float("inf")
    return largest_move(expected, found)
