"""The demonstration: train a small network on real data, prune it with Net-Trim and with magnitude, compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..methods import Magnitude, NetTrim
from ..progress import Advance
from ..pruning import PruneResult, prune
from ..render import ComparisonRow
from . import datasets, training

HIDDEN = (300, 100)
EPSILON = 0.1
SAMPLES = 4096
TEST_BATCH = 500


@dataclass(frozen=True)
class Demo:
    """The reference network, the sparsest result (cascade, l0), one comparison row for each network, the reference first, and a batch of
    test images."""

    reference: nn.Module
    result: PruneResult
    rows: tuple[ComparisonRow, ...]
    example: torch.Tensor


def run(
    name: str = "digits",
    *,
    data: Path | None = None,
    epsilon: float = EPSILON,
    samples: int = SAMPLES,
    seed: int = 0,
    cache: Path | None = None,
    progress: bool | Advance = True,
    announce: Callable[[str], None] = lambda text: None,
) -> Demo:
    """Trains an input-300-100-classes ReLU network on a data set and prunes it without retraining.

    Net-Trim in both schemes (l1, with its duality gap), in the cascade with l0, and magnitude pruning with the very numbers of weights
    that each cascade left in each layer. Calibration uses the first ``samples`` training images without their labels; accuracy,
    agreement and the statement about unseen inputs use the test images.
    """
    dataset = datasets.load(name, data, seed)
    announce(f"training {'-'.join(map(str, _sizes(dataset)))} on {name} ({len(dataset.train_images)} images)")
    network = training.trained_network(dataset, HIDDEN, seed, cache)
    calibration = dataset.train_images[:samples]
    heldout = list(zip(torch.split(dataset.test_images, TEST_BATCH), torch.split(dataset.test_labels, TEST_BATCH), strict=True))
    accuracy = training.accuracy(network, dataset.test_images, dataset.test_labels)

    def pruned(label: str, method: NetTrim | Magnitude, scheme: str) -> tuple[PruneResult, ComparisonRow]:
        announce(label)
        result = prune(
            network,
            calibration,
            method,
            scheme="parallel" if scheme == "parallel" else "cascade",
            heldout=heldout,
            seed=seed,
            progress=progress,
        )
        return result, comparison(label, result)

    _, first = pruned("Net-Trim l1, parallel", NetTrim(epsilon=epsilon), "parallel")
    l1, second = pruned("Net-Trim l1, cascade", NetTrim(epsilon=epsilon), "cascade")
    _, third = pruned("Magnitude, as many weights", same_counts(l1), "cascade")
    l0, fourth = pruned("Net-Trim l0, cascade", NetTrim(epsilon=epsilon, norm="l0"), "cascade")
    _, fifth = pruned("Magnitude, as many weights", same_counts(l0), "cascade")
    layers = len(l0.report.layers)
    dense = ComparisonRow("Trained network", (1.0,) * layers, 1.0, accuracy, 1.0, 0.0, None, None, "reference")
    return Demo(network, l0, (dense, first, second, third, fourth, fifth), dataset.test_images[:TEST_BATCH])


def same_counts(result: PruneResult) -> Magnitude:
    """Magnitude pruning that keeps exactly as many weights in each layer as ``result`` has."""
    return Magnitude(sparsity={layer.name: 1 - layer.nonzeros / layer.weights for layer in result.report.layers})


def comparison(label: str, result: PruneResult) -> ComparisonRow:
    """One row for the comparison table; discrepancy and bound are relative to the norm of the reference output."""
    network, heldout = result.certificate.network, result.certificate.heldout
    norm = network.reference_norm or 1.0
    agreement = None
    if heldout is not None and heldout.class_changes is not None:
        agreement = 1 - heldout.class_changes / heldout.counted
    promised = any(layer.tolerance is not None for layer in result.certificate.layers)
    return ComparisonRow(
        label=label,
        densities=tuple(layer.density for layer in result.report.layers),
        density=result.report.density,
        accuracy=None if heldout is None else heldout.accuracy_after,
        agreement=agreement,
        discrepancy=network.achieved / norm,
        bound=None if network.bound is None else network.bound / norm,
        seconds=result.report.seconds,
        certificate=("holds" if result.certificate.holds else "does not hold") if promised else "no tolerance",
    )


def _sizes(dataset: datasets.Dataset) -> tuple[int, ...]:
    return (dataset.train_images[0].numel(), *HIDDEN, len(dataset.classes))
