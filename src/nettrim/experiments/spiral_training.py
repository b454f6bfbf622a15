"""Nested spirals, and the small networks that the spirals experiments train on them.

The points are generated: the published ones are not available. Each of two classes is one arm of a spiral, the second arm being the
first turned by half a turn. Networks are 2-h-h-2 with ReLU, trained with dropout or with dropout and an l1 penalty.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..status import InvalidInput
from .models import fully_connected
from .training import digest, restored, store, writable

VERSION = 1
"""Raise it when a change of this module changes points or trained weights: cached networks are then trained anew."""

COUNTED = 1e-3
"""Weights of trained networks count as nonzero above this magnitude. At it, networks trained with dropout count as the published ones do
(99 of 100, 2483 of 2500, ...: weights without biases); an l1 penalty leaves small weights, hardly ever exact zeros."""


@dataclass(frozen=True)
class Spirals:
    """How points are drawn: ``points`` in all, half of them in each class; arms of ``turns`` turns from radius ``inner`` to 1, the points
    uniform along them in area, moved by normal noise of standard deviation ``noise`` in each coordinate."""

    points: int = 200
    turns: float = 1.0
    inner: float = 0.2
    noise: float = 0.02

    def __post_init__(self) -> None:
        if isinstance(self.points, bool) or not isinstance(self.points, int) or self.points < 2:
            raise InvalidInput(f"Spirals: points must be a whole number of at least 2, found {self.points!r}; each class needs one")
        if not self.turns > 0 or not 0 < self.inner < 1 or not 0 <= self.noise < math.inf:
            raise InvalidInput(
                "Spirals: turns must be above 0, inner in (0, 1) and noise at least 0; "
                f"found {self.turns}, {self.inner} and {self.noise}; the defaults are a spiral"
            )


@dataclass(frozen=True)
class Recipe:
    """Adam on all points at once with a one-cycle schedule that peaks at ``learning_rate``; dropout after each hidden layer keeps a value
    with probability ``keep``; ``l1`` weighs the sum of absolute weights, biases left out, beside the mean cross entropy."""

    steps: int = 1000
    learning_rate: float = 0.01
    keep: float = 0.5
    l1: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 2:
            raise InvalidInput(f"Recipe: steps must be a whole number of at least 2, found {self.steps!r}; 1000 is usual")
        if not self.learning_rate > 0 or not 0 < self.keep <= 1 or not 0 <= self.l1 < math.inf:
            raise InvalidInput(
                "Recipe: learning_rate must be above 0, keep in (0, 1] and l1 at least 0; "
                f"found {self.learning_rate}, {self.keep} and {self.l1}; change the one that is outside"
            )


def draw(spirals: Spirals, seed: int, *, heldout: bool = False) -> tuple[Tensor, Tensor]:
    """Points (n, 2) float32 and classes (n,) int64, in random order; ``heldout`` draws others of the same law."""
    random = np.random.default_rng([seed, int(heldout)])
    labels = random.permutation(np.arange(spirals.points) % 2)
    radius = np.sqrt(random.uniform(spirals.inner**2, 1.0, spirals.points))
    angle = 2 * math.pi * spirals.turns * radius + math.pi * labels
    points = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    points += spirals.noise * random.standard_normal(points.shape)
    return torch.from_numpy(points.astype(np.float32)), torch.from_numpy(labels.astype(np.int64))


def train(model: nn.Sequential, points: Tensor, labels: Tensor, recipe: Recipe, seed: int) -> None:
    """Trains in place, and leaves the model in eval mode. Dropout draws from a generator of its own: the same seed, the same weights.

    Raises InvalidInput when the loss is no longer finite.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = [module.weight for module in model if isinstance(module, nn.Linear)]
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=recipe.learning_rate, total_steps=recipe.steps)
    with torch.enable_grad():
        for _ in range(recipe.steps):
            loss = functional.cross_entropy(_dropped(model, points, recipe.keep, generator), labels)
            if recipe.l1 > 0:
                loss = loss + recipe.l1 * torch.stack([weight.abs().sum() for weight in weights]).sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    model.zero_grad()
    model.eval()
    if not math.isfinite(loss.item()):
        raise InvalidInput(f"the training loss must stay finite, found {loss.item()}; lower learning_rate (now {recipe.learning_rate})")


def trained(spirals: Spirals, hidden: int, recipe: Recipe, data_seed: int, seed: int, cache: Path, *, reuse: bool = True) -> nn.Sequential:
    """A 2-h-h-2 network trained on the points of ``data_seed``, from the folder ``cache`` when it is there; ``seed`` draws all else.

    Raises InvalidInput for a width below 1 and a folder that cannot be written.
    """
    points, labels = draw(spirals, data_seed)
    sizes = [2, hidden, hidden, 2]
    facts = {
        "data": asdict(spirals),
        "data_sha256": digest(points, labels),
        "sizes": sizes,
        "seed": seed,
        "recipe": asdict(recipe),
        "version": VERSION,
    }
    stated = json.dumps(facts, sort_keys=True)
    key = hashlib.sha256(stated.encode()).hexdigest()[:12]
    path = writable(cache) / f"spirals-{'-'.join(map(str, sizes))}-seed{seed}-{key}.safetensors"
    model = fully_connected(sizes, seed).eval()
    if reuse and restored(model, path, stated):
        return model
    with one_thread():
        train(model, points, labels, recipe, seed)
    store(model, path, stated)
    return model


def counted(model: nn.Sequential) -> tuple[int, ...]:
    """Weights above ``COUNTED`` in magnitude, layer by layer, biases left out."""
    return tuple(int((module.weight.abs() > COUNTED).sum()) for module in model if isinstance(module, nn.Linear))


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch inside: the matrices are small, and results do not depend on how many processors there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _dropped(model: nn.Sequential, x: Tensor, keep: float, generator: torch.Generator) -> Tensor:
    """The logits with dropout after each hidden layer; the model itself holds no dropout, so pruning sees none."""
    for module in model:
        x = module(x)
        if keep < 1 and isinstance(module, nn.ReLU):
            x = x * torch.empty_like(x).bernoulli_(keep, generator=generator).div_(keep)
    return x
