"""The fully connected ReLU network of the demo and the experiments."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import nn

from nettrim.status import InvalidInput


def fully_connected(sizes: Sequence[int], seed: int) -> nn.Sequential:
    """A network Flatten, Linear, ReLU, ..., Linear of ``sizes`` (inputs, hidden ..., outputs) units, in float32 on the CPU.

    Inputs are (B, sizes[0]) or images (B, C, H, W) with C H W = sizes[0]; outputs are (B, sizes[-1]) logits. The weights have
    `torch.nn.Linear`'s own initial distribution, drawn from a generator of their own: the same seed gives the same weights, and no
    global random state is read or changed.

    Raises InvalidInput for fewer than two sizes or a size below 1.
    """
    if len(sizes) < 2 or any(size < 1 for size in sizes):
        raise InvalidInput(f"sizes must be at least two positive numbers of units (inputs, hidden ..., outputs); found {list(sizes)}")
    generator = torch.Generator().manual_seed(seed)
    modules: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(sizes):
        # Made without values: nn.Linear's own initialisation would advance the global generator.
        linear = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")
        bound = 1 / math.sqrt(inputs)
        for parameter in (linear.weight, linear.bias):
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules[:-1])
