"""Curves over the tolerance: Net-Trim at every gain, magnitude with as many weights in each layer, the same fine-tuning of both.

Shared by the published MNIST experiments. All norms in the records are relative to the norm of the reference output they speak of.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..certificate import LayerCertificate
from ..methods import Magnitude, NetTrim
from ..pruning import PruneResult, prune
from ..report import LayerReport
from ..status import InvalidInput
from . import outputs
from .datasets import Dataset
from .journal import Journal
from .published_training import Architecture, Recipe, Tuning, digest, finetune, trained
from .training import accuracy

GAINS = (0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
"""The published tolerances: each layer's epsilon is the gain times the norm of its reference output."""
METHODS = ("published", "preimage l1", "preimage l0")
"""The published program, and the preimage program with both norms."""
MAGNITUDE = "magnitude, as "
"""Before the name of the method whose numbers of weights it keeps."""
SAMPLES = 10_000
ROUNDING = 1e-6  # relative; a theorem counts as met up to it
_FORMAT = 1

Progress = Callable[[float, float, str], None]


@dataclass(frozen=True)
class LayerPoint:
    """One layer of one pruned network; a slack is a bound divided by what was achieved, ``None`` where there is no bound or no error.

    ``theorem`` is the published bound of the layer's discrepancy, ``violation`` (absolute) the published program's largest one.
    """

    name: str
    weights: int
    nonzeros: int
    status: str
    tolerance: float | None
    distance: float
    discrepancy: float
    bound: float | None
    slack: float | None
    theorem: float | None
    theorem_slack: float | None
    violation: float | None
    gap: float | None
    iterations: int


@dataclass(frozen=True)
class Point:
    """One pruned network: ``kept`` of the pruned layers' weights, ``discrepancy`` of its logits on the calibration images with the
    proven ``bound``, test ``accuracy`` in [0, 1], and ``tuned``: the accuracy after so many iterations of fine-tuning."""

    series: str
    method: str
    gain: float
    scheme: str
    layers: tuple[LayerPoint, ...]
    kept: float
    discrepancy: float
    bound: float | None
    slack: float | None
    theorem: float | None
    theorem_slack: float | None
    agreement: float | None
    holds: bool
    accuracy: float
    tuned: tuple[tuple[int, float], ...]
    seconds: float

    @property
    def magnitude(self) -> bool:
        """Whether it is the baseline."""
        return self.method.startswith(MAGNITUDE)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Point:
        """The point of a journal's record."""
        layers = tuple(LayerPoint(**layer) for layer in record["layers"])
        tuned = tuple((int(step), float(value)) for step, value in record["tuned"])
        return cls(**{**record, "layers": layers, "tuned": tuned})


@dataclass(frozen=True)
class Series:
    """One trained network and what is done with it; ``gains`` for every one of ``methods``."""

    label: str
    architecture: Architecture
    recipe: Recipe
    tuning: Tuning
    gains: tuple[float, ...]
    methods: tuple[str, ...] = METHODS


@dataclass(frozen=True)
class Trained:
    """The network of a series before pruning: its size, settings and test accuracy in [0, 1]."""

    label: str
    architecture: str
    weights: int
    recipe: dict[str, Any]
    tuning: dict[str, Any]
    accuracy: float


@dataclass(frozen=True)
class Published:
    """A published result; ``kept`` and accuracies in [0, 1], nonzeros by layer; ``note`` says where its parts differ from ours."""

    series: str
    gain: float
    nonzeros_before: tuple[int, ...]
    nonzeros: tuple[int, ...]
    accuracy_before: float
    accuracy: float
    accuracy_tuned: float
    note: str

    @property
    def kept(self) -> float:
        """Share of the nonzero weights that stays."""
        return sum(self.nonzeros) / sum(self.nonzeros_before)


@dataclass(frozen=True)
class Summary:
    """What an experiment found: ``holds`` when every certificate does; ``theorems_hold`` when no published bound was exceeded.

    ``smallest_slack`` and ``largest_slack`` are over all bounds of layers and networks that apply to Net-Trim's results, ours and the
    published; ``None`` where there was none.
    """

    name: str
    title: str
    dataset: str
    seed: int
    samples: int
    trained: tuple[Trained, ...]
    points: tuple[Point, ...]
    published: tuple[Published, ...]
    holds: bool
    theorems_hold: bool
    smallest_slack: float | None
    largest_slack: float | None
    files: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain JSON types."""
        return dict(json.loads(json.dumps(asdict(self), allow_nan=False)))


def run(
    name: str,
    title: str,
    series: Sequence[Series],
    dataset: Dataset,
    *,
    samples: int,
    seed: int,
    out: Path,
    progress: Progress,
    resume: bool,
    published: tuple[Published, ...] = (),
) -> Summary:
    """Trains the networks of all series, prunes, tunes and measures them; writes ``NAME.jsonl``, one line a pruned network.

    Net-Trim runs in the parallel scheme, as published. Trained networks are kept in ``out/cache``; ``resume=False`` trains them again.
    """
    calibration = calibration_images(dataset, samples)
    header = {
        "format": _FORMAT,
        "experiment": name,
        "data": dataset.name,
        "data_sha256": digest(dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels),
        "seed": seed,
        "samples": samples,
        "series": {s.label: {"network": s.architecture.name, "recipe": asdict(s.recipe), "tuning": asdict(s.tuning)} for s in series},
    }
    units = [(s, method, gain, kind) for s in series for gain in s.gains for method in s.methods for kind in ("", MAGNITUDE)]
    total, done = len(series) + len(units), 0
    outputs.begin(out, name)
    networks: dict[str, nn.Sequential] = {}
    origins: list[Trained] = []
    points: list[Point] = []
    with Journal(out / f"{name}.jsonl", header, resume=resume) as journal:
        for s in series:
            networks[s.label] = trained(
                dataset,
                s.architecture,
                s.recipe,
                seed,
                out / "cache",
                reuse=resume,
                tell=lambda i, n, at=done, label=s.label: progress(at, total, f"{label}: training, {i} of {n} iterations"),  # type: ignore[misc]
            )
            key = f"{s.label}: trained"
            if key not in journal:
                journal.add(key, {"accuracy": accuracy(networks[s.label], dataset.test_images, dataset.test_labels)})
            reached = float(journal.records[key]["accuracy"])
            origins.append(_trained(s, networks[s.label], reached))
            done += 1
            progress(done, total, f"{s.label}: trained, test accuracy {reached:.2%}")
        for s, method, gain, kind in units:
            key = f"{s.label}: {kind}{method}, gain {gain:g}"
            if key not in journal:
                if kind:
                    like = Point.from_record(journal.records[f"{s.label}: {method}, gain {gain:g}"])
                    way: NetTrim | Magnitude = as_many(like)
                else:
                    way = settings(method, gain)
                result = prune(
                    networks[s.label],
                    calibration,
                    way,
                    scheme="parallel",
                    layers=list(s.architecture.layers),
                    max_samples=samples,
                    seed=seed,
                    progress=False,
                )
                point = measured(s.label, kind + method, gain, result, dataset)
                tuned = finetune(
                    copy.deepcopy(result.model),
                    dataset,
                    s.tuning,
                    seed,
                    tell=lambda i, n, at=done, what=key: progress(at, total, f"{what}: tuning, {i} of {n} iterations"),  # type: ignore[misc]
                )
                journal.add(key, asdict(point) | {"tuned": tuned})
            points.append(Point.from_record(journal.records[key]))
            done += 1
            progress(done, total, f"{key}: kept {points[-1].kept:.1%}, test accuracy {points[-1].accuracy:.2%}")
    slacks = [slack for point in points if not point.magnitude for slack in slacks_of(point)]
    summary = Summary(
        name=name,
        title=title,
        dataset=dataset.name,
        seed=seed,
        samples=samples,
        trained=tuple(origins),
        points=tuple(points),
        published=published,
        holds=all(point.holds for point in points),
        theorems_hold=all(theorems_hold(point) for point in points),
        smallest_slack=min(slacks, default=None),
        largest_slack=max(slacks, default=None),
        files=(f"{name}.jsonl", f"{name}.json", f"{name}.png", f"{name}.svg"),
    )
    from .curves_figures import picture  # drawn from this module's data

    outputs.write(out, name, summary.to_dict(), picture(summary))
    return summary


def settings(method: str, gain: float, *, gamma: float | None = None) -> NetTrim:
    """The Net-Trim of a method's name; ``gamma`` is the published tolerance rule of the cascade. Raises InvalidInput."""
    if method not in METHODS:
        raise InvalidInput(f"method must be one of {', '.join(map(repr, METHODS))}, found {method!r}; choose one of them")
    program: Literal["halfspace", "preimage"] = "halfspace" if method == "published" else "preimage"
    norm: Literal["l1", "l0"] = "l0" if method == "preimage l0" else "l1"
    return NetTrim(epsilon=gain, program=program, norm=norm, gamma=gamma)


def as_many(like: Point) -> Magnitude:
    """Magnitude pruning that keeps exactly as many weights in each layer."""
    # a quarter of a weight rounds to none: a sparsity of 1 itself is not allowed
    return Magnitude(sparsity={layer.name: 1 - max(layer.nonzeros, 0.25) / layer.weights for layer in like.layers})


def calibration_images(dataset: Dataset, samples: int) -> torch.Tensor:
    """The first ``samples`` training images. Raises InvalidInput when there are not that many."""
    available = len(dataset.train_images)
    if isinstance(samples, bool) or not isinstance(samples, int) or not 1 <= samples <= available:
        raise InvalidInput(
            f"samples must be a whole number from 1 to {available}, the training images of {dataset.name!r}; found {samples!r}"
        )
    return dataset.train_images[:samples]


def image_shape(dataset: Dataset) -> tuple[int, int, int]:
    """(C, H, W) of the images."""
    _, channels, height, width = dataset.train_images.shape
    return channels, height, width


def measured(series: str, method: str, gain: float, result: PruneResult, dataset: Dataset) -> Point:
    """The point of a pruned network, not yet tuned."""
    network = result.certificate.network
    reports = {layer.name: layer for layer in result.report.layers}
    layers = tuple(_layer(reports[layer.name], layer) for layer in result.certificate.layers)
    last = result.certificate.layers[-1]
    # the published bound of the last pruned layer speaks of the network's output when that layer is the output
    theorem = layers[-1].theorem if last.name == network.output_layer and last.activation == "identity" else None
    norm = network.reference_norm or 1.0
    return Point(
        series=series,
        method=method,
        gain=gain,
        scheme=result.report.scheme,
        layers=layers,
        kept=result.report.density,
        discrepancy=network.achieved / norm,
        bound=None if network.bound is None else network.bound / norm,
        slack=_slack(network.bound, network.achieved),
        theorem=theorem,
        theorem_slack=None if theorem is None else layers[-1].theorem_slack,
        agreement=network.agreement,
        holds=result.certificate.holds,
        accuracy=accuracy(result.model, dataset.test_images, dataset.test_labels),
        tuned=(),
        seconds=result.report.seconds,
    )


def slacks_of(point: Point) -> list[float]:
    """Every bound of a point, ours and the published, divided by what was achieved."""
    found = [point.slack, point.theorem_slack]
    for layer in point.layers:
        found += [layer.slack, layer.theorem_slack]
    return [slack for slack in found if slack is not None]


def theorems_hold(point: Point) -> bool:
    """Whether every published bound of the point is met."""
    return all(layer.theorem_slack is None or layer.theorem_slack >= 1 - ROUNDING for layer in point.layers)


def _layer(report: LayerReport, layer: LayerCertificate) -> LayerPoint:
    norm = layer.reference_norm or 1.0
    return LayerPoint(
        name=layer.name,
        weights=report.weights,
        nonzeros=report.nonzeros,
        status=report.status.value,
        tolerance=None if layer.tolerance is None else layer.tolerance / norm,
        distance=layer.distance / norm,
        discrepancy=layer.discrepancy / norm,
        bound=None if layer.bound is None else layer.bound / norm,
        slack=_slack(layer.bound, layer.discrepancy),
        theorem=None if layer.theorem is None else layer.theorem / norm,
        theorem_slack=_slack(layer.theorem, layer.discrepancy),
        violation=report.violation,
        gap=report.gap,
        iterations=report.iterations,
    )


def _slack(bound: float | None, achieved: float) -> float | None:
    return None if bound is None or achieved == 0 else bound / achieved


def _trained(series: Series, model: nn.Module, reached: float) -> Trained:
    weights = sum(module.weight.numel() for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return Trained(series.label, series.architecture.name, weights, asdict(series.recipe), asdict(series.tuning), reached)
