"""Cascade against parallel on MNIST: weights kept against discrepancy, over networks trained with more or less dropout and l1.

Source of the settings: Aghasi et al., NIPS 2017, and the authors' code: 784-300-1000-100-10, no l2, batches of 200, 10,001 iterations,
learning rate times 0.97 every 500. The first layer of a cascade takes ``gain * ||Y_1||_F``; every later one ``sqrt(gamma)`` times the
discrepancy that its own original weights leave.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..pruning import prune
from . import curves, datasets, outputs
from .curves import Point
from .journal import Journal
from .mnist_fc import HIDDEN
from .published_training import Architecture, Recipe, digest, trained
from .training import accuracy

NAME = "cascade_vs_parallel"
KEEPS = (1.0, 0.75, 0.5)
PENALTIES = (0.0, 1e-4, 5e-4, 1e-3, 2e-3)
PARALLEL_GAINS = (0.01, 0.03, 0.04)
CASCADE_GAINS = (0.005, 0.01, 0.03, 0.07)
GAMMA = 1.1
RECIPE = Recipe(iterations=10_001, batch_size=200, decay=0.97, l2=0.0)
QUICK_HIDDEN = (60, 100, 40)
QUICK_KEEPS, QUICK_PENALTIES = (1.0, 0.5), (0.0, 5e-4)
QUICK_PARALLEL_GAINS, QUICK_CASCADE_GAINS = (0.03, 0.04), (0.03, 0.07, 0.15)
QUICK_SAMPLES = 300
_FORMAT = 1

Scheme = Literal["parallel", "cascade"]


@dataclass(frozen=True)
class Training:
    """One trained network: dropout's probability to keep a value, the weight of the l1 penalty, and the test accuracy in [0, 1]."""

    keep: float
    l1: float
    accuracy: float


@dataclass(frozen=True)
class Comparison:
    """The cascade's share of weights at the parallel point's discrepancy, both of one network and method.

    The cascade's curve is interpolated linearly in the logarithms; ``layers`` are the shares layer by layer.
    """

    keep: float
    l1: float
    method: str
    gain: float
    discrepancy: float
    parallel: float
    cascade: float
    parallel_layers: tuple[float, ...]
    cascade_layers: tuple[float, ...]


@dataclass(frozen=True)
class Summary:
    """What was found. ``compared`` are the parallel points within the cascade's range of discrepancies, ``sparser`` of them denser than
    the cascade there; slacks as in ``curves.Summary``."""

    dataset: str
    network: str
    seed: int
    samples: int
    gamma: float
    recipe: dict[str, Any]
    trained: tuple[Training, ...]
    points: tuple[Point, ...]
    comparisons: tuple[Comparison, ...]
    compared: int
    sparser: int
    holds: bool
    theorems_hold: bool
    smallest_slack: float | None
    largest_slack: float | None
    files: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain JSON types."""
        return dict(json.loads(json.dumps(asdict(self), allow_nan=False)))


def run(
    *,
    out: Path,
    quick: bool = False,
    seed: int = 0,
    progress: Callable[[float, float, str], None] = lambda done, total, what: None,
    resume: bool = True,
    dataset: str = "mnist",
    data: Path | None = None,
    samples: int | None = None,
    keeps: Sequence[float] | None = None,
    penalties: Sequence[float] | None = None,
    parallel_gains: Sequence[float] | None = None,
    cascade_gains: Sequence[float] | None = None,
    methods: Sequence[str] = ("published",),
    hidden: Sequence[int] | None = None,
    recipe: Recipe | None = None,
    gamma: float = GAMMA,
) -> Summary:
    """Trains a network for every (keep, l1), prunes it in both schemes and writes ``cascade_vs_parallel.jsonl`` (one line a pruned
    network), ``.json``, ``.png`` and ``.svg`` into ``out``.

    ``samples`` training images calibrate (default 10,000, or all there are; the papers use all). ``recipe`` gives everything of the
    training but keep and l1. ``quick`` shrinks what is not given. An interrupted run continues with ``resume``. Raises InvalidInput.
    """
    images = datasets.load(dataset, data, seed)
    architecture = Architecture(curves.image_shape(images), (), tuple(hidden or (QUICK_HIDDEN if quick else HIDDEN)), len(images.classes))
    recipe = recipe or (replace(RECIPE, iterations=500) if quick else RECIPE)
    wanted = curves.SAMPLES if not quick else QUICK_SAMPLES
    count = min(wanted, len(images.train_images)) if samples is None else samples
    calibration = curves.calibration_images(images, count)
    header = {
        "format": _FORMAT,
        "experiment": NAME,
        "data": images.name,
        "data_sha256": digest(images.train_images, images.train_labels, images.test_images, images.test_labels),
        "network": architecture.name,
        "recipe": asdict(recipe),
        "gamma": gamma,
        "seed": seed,
        "samples": count,
    }
    grid = [
        (keep, l1)
        for keep in (keeps or (QUICK_KEEPS if quick else KEEPS))
        for l1 in (penalties or (QUICK_PENALTIES if quick else PENALTIES))
    ]
    gains: dict[Scheme, Sequence[float]] = {
        "parallel": parallel_gains or (QUICK_PARALLEL_GAINS if quick else PARALLEL_GAINS),
        "cascade": cascade_gains or (QUICK_CASCADE_GAINS if quick else CASCADE_GAINS),
    }
    pruned = [(method, scheme, gain) for method in methods for scheme, chosen in gains.items() for gain in chosen]
    total, done = len(grid) * (1 + len(pruned)), 0
    outputs.begin(out, NAME)
    networks: list[Training] = []
    points: list[Point] = []
    with Journal(out / f"{NAME}.jsonl", header, resume=resume) as journal:
        for keep, l1 in grid:
            label = series(keep, l1)
            model = trained(
                images,
                architecture,
                replace(recipe, keep=keep, l1=l1),
                seed,
                out / "cache",
                reuse=resume,
                tell=lambda i, n, at=done, what=label: progress(at, total, f"{what}: training, {i} of {n} iterations"),  # type: ignore[misc]
            )
            key = f"{label}: trained"
            if key not in journal:
                journal.add(key, {"accuracy": accuracy(model, images.test_images, images.test_labels)})
            networks.append(Training(keep, l1, float(journal.records[key]["accuracy"])))
            done += 1
            progress(done, total, f"{label}: trained, test accuracy {networks[-1].accuracy:.2%}")
            for method, scheme, gain in pruned:
                key = f"{label}: {method}, {scheme}, gain {gain:g}"
                if key not in journal:
                    result = prune(
                        model,
                        calibration,
                        curves.settings(method, gain, gamma=gamma if scheme == "cascade" else None),
                        scheme=scheme,
                        max_samples=count,
                        seed=seed,
                        progress=False,
                    )
                    journal.add(key, asdict(curves.measured(label, method, gain, result, images)))
                points.append(Point.from_record(journal.records[key]))
                done += 1
                progress(done, total, f"{key}: kept {points[-1].kept:.1%}, discrepancy {points[-1].discrepancy:.1%}")
    comparisons = tuple(compare(networks, points))
    slacks = [slack for point in points for slack in curves.slacks_of(point)]
    summary = Summary(
        dataset=images.name,
        network=architecture.name,
        seed=seed,
        samples=count,
        gamma=gamma,
        recipe={name: value for name, value in asdict(recipe).items() if name not in ("keep", "l1")},
        trained=tuple(networks),
        points=tuple(points),
        comparisons=comparisons,
        compared=len(comparisons),
        sparser=sum(c.cascade < c.parallel for c in comparisons),
        holds=all(point.holds for point in points),
        theorems_hold=all(curves.theorems_hold(point) for point in points),
        smallest_slack=min(slacks, default=None),
        largest_slack=max(slacks, default=None),
        files=tuple(f"{NAME}.{ending}" for ending in ("jsonl", "json", "png", "svg")),
    )
    from .cascade_vs_parallel_figures import picture  # drawn from this module's data

    outputs.write(out, NAME, summary.to_dict(), picture(summary))
    return summary


def series(keep: float, l1: float) -> str:
    """The name of a trained network."""
    return f"keep {keep:g}, l1 {l1:g}"


def compare(networks: Sequence[Training], points: Sequence[Point]) -> list[Comparison]:
    """Every parallel point whose discrepancy lies within the cascade's, with the cascade interpolated there."""
    found = []
    for network in networks:
        own = [p for p in points if p.series == series(network.keep, network.l1)]
        for point in [p for p in own if p.scheme == "parallel"]:
            curve = sorted((p for p in own if (p.scheme, p.method) == ("cascade", point.method)), key=lambda p: p.discrepancy)
            for low, high in itertools.pairwise(curve):
                if 0 < low.discrepancy <= point.discrepancy <= high.discrepancy and low.discrepancy < high.discrepancy:
                    found.append(_comparison(network, point, low, high))
                    break
    return found


def _comparison(network: Training, point: Point, low: Point, high: Point) -> Comparison:
    part = _position(point.discrepancy, low.discrepancy, high.discrepancy)
    ends = zip(_shares(low), _shares(high), strict=True)
    return Comparison(
        keep=network.keep,
        l1=network.l1,
        method=point.method,
        gain=point.gain,
        discrepancy=point.discrepancy,
        parallel=point.kept,
        cascade=_between(low.kept, high.kept, part),
        parallel_layers=_shares(point),
        cascade_layers=tuple(_between(a, b, part) for a, b in ends),
    )


def _position(value: float, low: float, high: float) -> float:
    """Where a value lies between two others on a logarithmic scale, in [0, 1]."""
    return math.log(value / low) / math.log(high / low)


def _between(low: float, high: float, part: float) -> float:
    """The geometric mean of two shares, weighted; the plain one where a share is zero."""
    if low > 0 and high > 0:
        return math.exp((1 - part) * math.log(low) + part * math.log(high))
    return (1 - part) * low + part * high


def _shares(point: Point) -> tuple[float, ...]:
    return tuple(layer.nonzeros / layer.weights for layer in point.layers)
