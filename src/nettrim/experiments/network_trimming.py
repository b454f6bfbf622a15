"""Network trimming of LeNet 20-50-500-10, as published, and of the zoo's VGG-like network: round by round, beside the published table.

Hu, Peng, Tai and Tang, "Network Trimming" (2016, arXiv 1607.03250). The last training images are held back for validation: APoZ is measured
on them, and they decide whether a round is kept. Test images decide nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..status import InvalidInput
from ..trimming import LayerApoz, NetworkTrimming, trim
from . import datasets, outputs
from .datasets import Dataset
from .journal import Journal
from .training import accuracy, digest
from .zoo import NETWORKS
from .zoo_training import settings_for, train, trained

NAME = "network_trimming"
NETWORKS_HERE = ("lenet5", "vgg_like")
VALIDATION = 5_000
QUICK_TEST = 2_000
TOLERANCE = 0.001
"""A round is kept when its validation accuracy is at most this much below the dense network's: 5 of 5,000 images."""
_BATCH = 1_000
_FORMAT = 1

Progress = Callable[[float, float, str], None]


@dataclass(frozen=True)
class Plan:
    """How a network is trimmed: rounds, layers that are left as they are, and what retrains it after each round.

    The published experiments trimmed LeNet's second convolution and first fully connected layer, and of VGG-16 the same two kinds:
    the last convolution and the layer behind it.
    """

    rounds: int
    ignore: tuple[str, ...]
    epochs: int
    batch_size: int
    learning_rate: float


_EARLY = ("conv1_1", "conv1_2", "conv2_1", "conv2_2", "conv3_1")
PLANS = {"lenet5": Plan(8, ("conv1",), 3, 256, 2e-3), "vgg_like": Plan(5, _EARLY, 3, 128, 0.05)}
QUICK_PLANS = {"lenet5": Plan(3, ("conv1",), 2, 128, 1e-3), "vgg_like": Plan(1, _EARLY, 1, 128, 0.02)}


@dataclass(frozen=True)
class Published:
    """A row of the published table: LeNet's sizes, times fewer parameters, accuracies in [0, 1] before and after retraining."""

    sizes: str
    compression: float
    trimmed: float
    retrained: float


PUBLISHED = (
    Published("20-50-500-10", 1.0, 0.9931, 0.9931),
    Published("20-41-426-10", 1.41, 0.9875, 0.9929),
    Published("20-31-349-10", 2.24, 0.9534, 0.9930),
    Published("20-26-293-10", 3.11, 0.8821, 0.9925),
    Published("20-24-252-10", 3.85, 0.9675, 0.9926),
)


@dataclass(frozen=True)
class Step:
    """A round: sizes of the layers, parameters, accuracies in [0, 1] on validation and test images before and after retraining.

    Number 0 is the trained network. ``layers`` holds the APoZ by layer that the round went by.
    """

    number: int
    sizes: str
    parameters: int
    compression: float
    validation_trimmed: float
    validation: float
    test_trimmed: float
    test: float
    kept: bool
    layers: tuple[LayerApoz, ...]

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Step:
        """The step of a journal's record."""
        layers = tuple(LayerApoz(**{**layer, "apoz": tuple(layer["apoz"])}) for layer in record["layers"])
        return cls(**{**record, "layers": layers})


@dataclass(frozen=True)
class Run:
    """One network: its steps, why it ended, and the most compressed step whose test accuracy is not below the trained network's."""

    network: str
    plan: Plan
    steps: tuple[Step, ...]
    stopped: str
    lossless: int

    @property
    def best(self) -> Step:
        """The step ``lossless``."""
        return self.steps[self.lossless]


@dataclass(frozen=True)
class Summary:
    """All runs, with the published table for LeNet."""

    dataset: str
    seed: int
    validation: int
    tested: int
    tolerance: float
    runs: tuple[Run, ...]
    published: tuple[Published, ...]
    files: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain JSON types."""
        return dict(json.loads(json.dumps(asdict(self), allow_nan=False)))


def run(
    *,
    out: Path,
    quick: bool = False,
    seed: int = 0,
    progress: Progress = lambda done, total, what: None,
    resume: bool = True,
    dataset: str = "mnist",
    data: Path | None = None,
    samples: int | None = None,
    networks: Sequence[str] | None = None,
) -> Summary:
    """Trims the networks and writes ``network_trimming.jsonl`` (one line a network), ``.json``, ``.png`` and ``.svg`` into ``out``.

    ``samples``: training images held back for validation (default 5,000, or a sixth where there are few). ``quick``: LeNet only, trained on
    6,000 images for 2 epochs, three rounds, 2,000 test images. An interrupted run continues with ``resume``. Raises InvalidInput.
    """
    chosen = tuple(networks or (("lenet5",) if quick else NETWORKS_HERE))
    for name in chosen:
        if name not in NETWORKS_HERE:
            raise InvalidInput(f"networks must be some of {', '.join(map(repr, NETWORKS_HERE))}, found {name!r}; choose one of them")
    images = datasets.load(dataset, data, seed)
    available = len(images.train_labels)
    count = min(VALIDATION, available // 6) if samples is None else samples
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count < available:
        raise InvalidInput(f"samples must be a whole number from 1 to {available - 1}, found {count!r}: training images held back")
    tested = min(QUICK_TEST, len(images.test_labels)) if quick else len(images.test_labels)
    plans = {name: (QUICK_PLANS if quick else PLANS)[name] for name in chosen}
    header = {
        "format": _FORMAT,
        "experiment": NAME,
        "data": images.name,
        "data_sha256": digest(images.train_images, images.train_labels, images.test_images, images.test_labels),
        "quick": quick,
        "seed": seed,
        "validation": count,
        "tolerance": TOLERANCE,
        "networks": {name: {"plan": asdict(plan), "arguments": dict(NETWORKS[name].arguments)} for name, plan in plans.items()},
    }
    outputs.begin(out, NAME)
    runs: list[Run] = []
    total = sum(1 + plan.rounds for plan in plans.values())
    done = 0
    with Journal(out / f"{NAME}.jsonl", header, resume=resume) as journal:
        for name, plan in plans.items():
            if name not in journal:
                tell = _telling(progress, done, total, name)
                found = _trimmed(name, plan, images, count, tested, quick, seed, out / "cache", tell)
                journal.add(name, json.loads(json.dumps(asdict(found))))
            record = journal.records[name]
            steps = tuple(Step.from_record(step) for step in record["steps"])
            runs.append(Run(name, plan, steps, record["stopped"], record["lossless"]))
            done += 1 + plan.rounds
            progress(done, total, f"{name}: {runs[-1].best.compression:.2f} times fewer parameters at no loss")
    summary = Summary(
        dataset=images.name,
        seed=seed,
        validation=count,
        tested=tested,
        tolerance=TOLERANCE,
        runs=tuple(runs),
        published=PUBLISHED,
        files=tuple(f"{NAME}.{ending}" for ending in ("jsonl", "json", "png", "svg")),
    )
    from .network_trimming_figures import picture  # drawn from this module's data

    outputs.write(out, NAME, summary.to_dict(), picture(summary))
    return summary


def _telling(progress: Progress, done: int, total: int, name: str) -> Progress:
    return lambda step, steps, what: progress(done + step, total, f"{name}: {what}")


def _trimmed(
    name: str, plan: Plan, images: Dataset, count: int, tested: int, quick: bool, seed: int, cache: Path, progress: Progress
) -> Run:
    """Trains a network on what is not held back, and trims it."""
    kept = replace(images, train_images=images.train_images[:-count], train_labels=images.train_labels[:-count])
    settings = settings_for(name, kept, quick)
    progress(0, plan.rounds, "training")

    def told(epoch: int, loss: float) -> None:
        progress(0, plan.rounds, f"epoch {epoch} of {settings.epochs}, loss {loss:.4f}")

    dense = trained(name, kept, seed=seed, cache=cache, quick=quick, progress=told)
    test_images, test_labels = images.test_images[:tested], images.test_labels[:tested]
    held = list(zip(torch.split(images.train_images[-count:], _BATCH), torch.split(images.train_labels[-count:], _BATCH), strict=True))
    again = replace(settings, epochs=plan.epochs, batch_size=plan.batch_size, learning_rate=plan.learning_rate)
    tests: list[tuple[float, float, str]] = []

    def retrained(model: nn.Module, number: int) -> None:
        before = accuracy(model, test_images, test_labels)
        train(model, kept.train_images, kept.train_labels, again, seed=seed + number)
        tests.append((before, accuracy(model, test_images, test_labels), sizes(model)))

    result = trim(
        dense,
        held,
        NetworkTrimming(rounds=plan.rounds, train=retrained, tolerance=TOLERANCE),
        ignore=plan.ignore,
        seed=seed,
        progress=lambda step, steps, what: progress(1 + step, 1 + steps, what),
    )
    start = accuracy(dense, test_images, test_labels)
    first = result.parameters[0]
    steps = [Step(0, sizes(dense), first, 1.0, result.score[0], result.score[0], start, start, True, ())]
    for one, (before, after, shape) in zip(result.rounds, tests, strict=True):
        ratio = first / one.parameters
        steps.append(Step(one.number, shape, one.parameters, ratio, one.trimmed, one.retrained, before, after, one.kept, one.layers))
    lossless = max((step for step in steps if step.kept and step.test >= start), key=lambda step: step.compression)
    return Run(name, plan, tuple(steps), result.stopped, lossless.number)


def sizes(model: nn.Module) -> str:
    """The outputs of every layer: 20-50-500-10."""
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    return "-".join(str(layer.weight.shape[0]) for layer in layers)
