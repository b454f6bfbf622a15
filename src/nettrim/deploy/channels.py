"""Channels and their classes: which places of a network must be removed together, and which always hold one value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

End = tuple[str, str]
"""A module's name, and "out" or "in"; batch-norms and depthwise convolutions have their channels under "out" only."""


class NotUnderstood(Exception):
    """A node's effect on channels is not known; what goes into it stays. Its text says why, where there is more to say than its name."""


@dataclass(frozen=True, eq=False)
class Channels:
    """Labels and constants (C,) of the channels of a tensor, along its dimension ``dim``; NaN where a channel is not constant."""

    dim: int
    labels: Tensor
    values: Tensor


@dataclass(eq=False)
class Flow:
    """The classes of channels: of each, all channels are removed together or none.

    ``ends`` gives, for every module that would become smaller, the class of each of its channels; ``inputs`` the constants that the
    channels of a layer's input hold; ``norms`` the batch-norm right behind a layer. ``fixed`` says why a class cannot be removed.
    ``rectified`` has, by the name of its node in ``module``, the dimension of every ReLU's channels and their classes. ``outside`` says of
    Linear and convolutional layers that are not among the ``inputs`` why they keep their sizes. ``foreign`` are classes that come from
    something whose channels cannot be followed, and that layers alone read.
    """

    count: int
    ends: dict[End, Tensor]
    inputs: dict[str, Tensor]
    norms: dict[str, str]
    fixed: dict[int, str]
    rectified: dict[str, tuple[int, Tensor]]
    outside: dict[str, str]
    foreign: set[int]
    module: fx.GraphModule

    def places(self, classes: Iterable[int]) -> dict[End, list[int]]:
        """The channels of these classes, at every end that has any."""
        wanted = torch.zeros(self.count, dtype=torch.bool)
        wanted[list(classes)] = True
        found = {end: torch.nonzero(wanted[ids]).flatten().tolist() for end, ids in self.ends.items()}
        return {end: places for end, places in found.items() if places}

    def sources(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The classes that these layers put out, by layer; those of depthwise convolutions belong to the layer before."""
        return {name: self.ends[name, "out"] for name in names if (name, "out") in self.ends and (name, "in") in self.ends}
