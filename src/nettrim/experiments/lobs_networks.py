"""The two networks of the L-OBS experiment: how they are trained, which share of each layer's weights stays, and what is published.

Source of the published numbers: Dong, Chen, Pan, NIPS 2017, as they are cited; they were not checked against the paper's text. The
shares by layer are ours (docs/lobs.md, 5).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ..layers import is_prunable
from . import zoo, zoo_training
from .datasets import Dataset
from .training import trained_network

FULLY_CONNECTED, CONVOLUTIONAL = "LeNet-300-100", "LeNet-5"
NAMES = (FULLY_CONNECTED, CONVOLUTIONAL)
SMALLEST_IMAGE = 16  # pixels a side that LeNet-5 needs
_QUICK_IMAGES, _QUICK_HIDDEN, _QUICK_WIDTH = 6_000, (60, 30), 6


@dataclass(frozen=True)
class Published:
    """One published row: ``kept`` share of weights; errors in [0, 1] of the dense, the pruned and the retrained network; iterations."""

    network: str
    method: str
    kept: float
    dense: float
    pruned: float
    retrained: float
    iterations: int


PUBLISHED = (
    Published(FULLY_CONNECTED, "random", 0.08, 0.0176, 0.8572, 0.0225, 350_000),
    Published(FULLY_CONNECTED, "magnitude", 0.08, 0.0176, 0.8132, 0.0195, 140_000),
    Published(FULLY_CONNECTED, "L-OBS", 0.07, 0.0176, 0.0310, 0.0182, 510),
    Published(FULLY_CONNECTED, "L-OBS, iterative", 0.015, 0.0176, 0.0243, 0.0196, 643),
    Published(CONVOLUTIONAL, "L-OBS", 0.07, 0.0127, 0.0321, 0.0127, 740),
    Published(CONVOLUTIONAL, "L-OBS, iterative", 0.009, 0.0127, 0.0204, 0.0166, 841),
)

SHARES: dict[tuple[str, float], tuple[float, ...]] = {
    # the smaller a layer, the more of it: the first layer is 88 % of the weights
    (FULLY_CONNECTED, 0.08): (0.060, 0.21, 0.61),
    (FULLY_CONNECTED, 0.07): (0.051, 0.20, 0.60),
    (FULLY_CONNECTED, 0.015): (0.0095, 0.04, 0.54),
    # the third layer is 93 % of the weights
    (CONVOLUTIONAL, 0.07): (0.60, 0.20, 0.0580, 0.30),
    (CONVOLUTIONAL, 0.009): (0.40, 0.060, 0.0040, 0.10),
}
"""Of each layer, in order; together at most the share that is asked for."""


def trained(name: str, dataset: Dataset, *, quick: bool, seed: int, cache: Path) -> nn.Sequential:
    """A trained network of ``NAMES``, in eval mode on the CPU, from ``cache`` where it is; ``quick``: narrower, and 6,000 images.

    LeNet-5 is 20-50-500-10 with a ReLU after every hidden layer.
    """
    if quick:
        dataset = replace(dataset, train_images=dataset.train_images[:_QUICK_IMAGES], train_labels=dataset.train_labels[:_QUICK_IMAGES])
    if name == FULLY_CONNECTED:
        return trained_network(dataset, _QUICK_HIDDEN if quick else (300, 100), seed, cache)
    if not quick:
        model = zoo_training.trained("lenet5", dataset, seed=seed, cache=cache)
    else:  # the cache holds networks of the published widths
        _, channels, size, _ = dataset.train_images.shape
        model = zoo.lenet5(in_channels=channels, classes=len(dataset.classes), width=_QUICK_WIDTH, image_size=size, seed=seed)
        settings = zoo_training.settings_for("lenet5", dataset, quick=True)
        zoo_training.train(model, dataset.train_images, dataset.train_labels, settings, seed=seed)
    assert isinstance(model, nn.Sequential)
    return model


def layer_names(model: nn.Module) -> list[str]:
    """Names of the layers that are pruned, in order: all of them."""
    return [name for name, module in model.named_modules() if is_prunable(module)]


def sparsities(model: nn.Module, shares: tuple[float, ...]) -> dict[str, float]:
    """By layer, the fraction of zeros."""
    return {name: 1 - share for name, share in zip(layer_names(model), shares, strict=True)}


def fits(name: str, images: torch.Tensor) -> bool:
    """Whether images (n, C, H, W) are large enough for the network."""
    return name == FULLY_CONNECTED or min(images.shape[2:]) >= SMALLEST_IMAGE
