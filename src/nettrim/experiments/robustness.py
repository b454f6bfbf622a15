"""Accuracy under noise of trained and pruned MNIST networks: does pruning make a network more robust, or less?

Each image x gets Gaussian noise scaled to the norm ``g ||x||`` exactly; pixels are not clipped (as in the code of Aghasi, Abdi and Romberg,
SIAM J. Math. Data Science 2020). Every network sees the same noise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..pruning import prune
from ..status import InvalidInput
from . import curves, datasets, mnist_fc, mnist_lenet_fc, outputs
from .curves import METHODS
from .datasets import Dataset
from .journal import Journal
from .published_training import Architecture, Recipe, digest, trained
from .training import accuracy

NAME = "robustness"
NETWORKS = ("fc", "lenet")
GAINS = (0.04, 0.1, 0.2)
QUICK_GAINS = (0.1,)
LEVELS = {"fc": tuple(round(0.25 * k, 2) for k in range(17)), "lenet": tuple(round(0.125 * k, 3) for k in range(17))}
"""The noise levels g: 0 to 4 for the fully connected network and 0 to 2 for LeNet, as published."""
QUICK_LEVELS = {"fc": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0), "lenet": (0.0, 0.5, 1.0, 1.5, 2.0)}
REPEATS = 10
_QUICK_REPEATS = 2
_QUICK_TESTED = 2000
_TRAINED = "trained network"
_FORMAT = 1

NetworkName = Literal["fc", "lenet"]


@dataclass(frozen=True)
class Curve:
    """One network: ``method`` is empty for the trained one; mean and standard deviation over the repeats of the accuracy in [0, 1] at
    every level; the rest is that of ``curves.Point``."""

    network: str
    method: str
    gain: float
    kept: float
    levels: tuple[float, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    discrepancy: float
    bound: float | None
    slacks: tuple[float, ...]
    holds: bool
    theorems_hold: bool


@dataclass(frozen=True)
class Summary:
    """All curves. ``gained``: by network, and by method and gain, the pruned network's accuracy less the trained one's, on average over the
    levels above 0."""

    dataset: str
    architectures: dict[str, str]
    seed: int
    samples: int
    repeats: int
    tested: int
    curves: tuple[Curve, ...]
    gained: dict[str, dict[str, float]]
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
    networks: Sequence[NetworkName] = ("fc", "lenet"),
    gains: Sequence[float] | None = None,
    methods: Sequence[str] | None = None,
    hidden: Sequence[int] | None = None,
    channels: Sequence[int] | None = None,
    recipe: Recipe | None = None,
    repeats: int | None = None,
    levels: Sequence[float] | None = None,
) -> Summary:
    """Measures the curves and writes ``robustness.jsonl`` (one line a network), ``.json``, ``.png`` and ``.svg`` into ``out``.

    ``samples`` training images calibrate (default 10,000, or all there are). ``hidden`` and ``channels`` replace those of the published
    networks. ``quick`` shrinks what is not given, and measures on the first 2,000 test images. An interrupted run continues with
    ``resume``. Raises InvalidInput.
    """
    for network in networks:
        if network not in NETWORKS:
            raise InvalidInput(f"networks must be some of {', '.join(map(repr, NETWORKS))}, found {network!r}; choose one of them")
    turns = (_QUICK_REPEATS if quick else REPEATS) if repeats is None else repeats
    if isinstance(turns, bool) or not isinstance(turns, int) or turns < 1:
        raise InvalidInput(f"repeats must be a whole number of at least 1, found {turns!r}; the papers use 10")
    images = datasets.load(dataset, data, seed)
    count = min(mnist_lenet_fc.QUICK_SAMPLES if quick else curves.SAMPLES, len(images.train_images)) if samples is None else samples
    calibration = curves.calibration_images(images, count)
    tested = min(_QUICK_TESTED, len(images.test_images)) if quick else len(images.test_images)
    plans = {network: _plan(network, images, quick, hidden, channels, recipe) for network in networks}
    chosen = {network: tuple(levels or (QUICK_LEVELS if quick else LEVELS)[network]) for network in networks}
    pruned = [(method, gain) for gain in (gains or (QUICK_GAINS if quick else GAINS)) for method in (methods or METHODS)]
    header = {
        "format": _FORMAT,
        "experiment": NAME,
        "data": images.name,
        "data_sha256": digest(images.train_images, images.train_labels, images.test_images, images.test_labels),
        "networks": {network: {"network": architecture.name, "recipe": asdict(own)} for network, (architecture, own) in plans.items()},
        "levels": chosen,
        "repeats": turns,
        "tested": tested,
        "samples": count,
        "seed": seed,
    }
    total, done = len(plans) * (2 + len(pruned)), 0
    outputs.begin(out, NAME)
    found: list[Curve] = []
    with Journal(out / f"{NAME}.jsonl", header, resume=resume) as journal:
        for network, (architecture, own) in plans.items():
            model = trained(
                images,
                architecture,
                own,
                seed,
                out / "cache",
                reuse=resume,
                tell=lambda i, n, at=done, what=network: progress(at, total, f"{what}: training, {i} of {n} iterations"),  # type: ignore[misc]
            )
            done += 1
            progress(done, total, f"{network}: trained")

            def tests(model: nn.Module, what: str, at: int, g: tuple[float, ...] = chosen[network]) -> dict[str, Any]:
                accuracies = []
                for k, level in enumerate(g):
                    accuracies.append(noisy_accuracies(model, images, level, turns, seed, tested))
                    progress(at, total, f"{what}: noise level {k + 1} of {len(g)}")
                values = torch.tensor(accuracies, dtype=torch.float64)
                return {"levels": g, "mean": values.mean(1).tolist(), "deviation": values.std(1, correction=0).tolist()}

            key = f"{network}: {_TRAINED}"
            if key not in journal:
                nothing: dict[str, Any] = {
                    "kept": 1.0,
                    "discrepancy": 0.0,
                    "bound": None,
                    "slacks": [],
                    "holds": True,
                    "theorems_hold": True,
                }
                journal.add(key, {"network": network, "method": "", "gain": 0.0, **nothing, **tests(model, key, done)})
            found.append(_curve(journal.records[key]))
            done += 1
            progress(done, total, key)
            for method, gain in pruned:
                key = f"{network}: {method}, gain {gain:g}"
                if key not in journal:
                    result = prune(
                        model,
                        calibration,
                        curves.settings(method, gain),
                        scheme="parallel",
                        layers=list(architecture.layers),
                        max_samples=count,
                        seed=seed,
                        progress=False,
                    )
                    point = curves.measured(network, method, gain, result, images)
                    state: dict[str, Any] = {
                        "kept": point.kept,
                        "discrepancy": point.discrepancy,
                        "bound": point.bound,
                        "holds": point.holds,
                    }
                    state |= {"slacks": curves.slacks_of(point), "theorems_hold": curves.theorems_hold(point)}
                    journal.add(key, {"network": network, "method": method, "gain": gain, **state, **tests(result.model, key, done)})
                found.append(_curve(journal.records[key]))
                done += 1
                progress(done, total, f"{key}: kept {found[-1].kept:.1%}")
    slacks = [slack for curve in found for slack in curve.slacks]
    summary = Summary(
        dataset=images.name,
        architectures={network: architecture.name for network, (architecture, _) in plans.items()},
        seed=seed,
        samples=count,
        repeats=turns,
        tested=tested,
        curves=tuple(found),
        gained={network: gained(network, found) for network in plans},
        holds=all(curve.holds for curve in found),
        theorems_hold=all(curve.theorems_hold for curve in found),
        smallest_slack=min(slacks, default=None),
        largest_slack=max(slacks, default=None),
        files=tuple(f"{NAME}.{ending}" for ending in ("jsonl", "json", "png", "svg")),
    )
    from .robustness_figures import picture  # drawn from this module's data

    outputs.write(out, NAME, summary.to_dict(), picture(summary))
    return summary


def noisy(images: Tensor, level: float, generator: torch.Generator) -> Tensor:
    """``images`` (n, C, H, W), each with Gaussian noise of norm ``level`` times its own."""
    noise = torch.randn(images.shape, generator=generator)
    scale = level * torch.linalg.vector_norm(images.flatten(1), dim=1) / torch.linalg.vector_norm(noise.flatten(1), dim=1)
    return torch.addcmul(images, noise, scale[:, None, None, None])


def noisy_accuracies(model: nn.Module, dataset: Dataset, level: float, repeats: int, seed: int, tested: int) -> list[float]:
    """Accuracy in [0, 1] on the first ``tested`` test images in each of ``repeats`` draws of noise; a draw depends on the seed and its
    number only. Without noise all repeats are one."""
    found: list[float] = []
    for repeat in range(1 if level == 0 else repeats):
        generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + repeat)
        found.append(accuracy(model, noisy(dataset.test_images[:tested], level, generator), dataset.test_labels[:tested]))
    return found * (repeats if level == 0 else 1)


def gained(network: str, found: Sequence[Curve]) -> dict[str, float]:
    """For every pruned network, its accuracy less the trained one's, on average over the levels above 0."""
    own = [curve for curve in found if curve.network == network]
    base = next(curve for curve in own if not curve.method)

    def mean(curve: Curve) -> float:
        values = [a - b for a, b, level in zip(curve.mean, base.mean, curve.levels, strict=True) if level > 0]
        return sum(values) / len(values) if values else 0.0

    return {f"{curve.method}, gain {curve.gain:g}": mean(curve) for curve in own if curve.method}


def _plan(
    network: str,
    images: Dataset,
    quick: bool,
    hidden: Sequence[int] | None,
    channels: Sequence[int] | None,
    recipe: Recipe | None,
) -> tuple[Architecture, Recipe]:
    """The same networks and settings as in the curves, so that their trained weights are found again in a common folder."""
    made: tuple[int, ...]
    units: tuple[int, ...]
    if network == "fc":
        made, units = (), mnist_fc.QUICK_HIDDEN if quick else mnist_fc.HIDDEN
        iterations = mnist_fc.QUICK_ITERATIONS if quick else Recipe.iterations
    else:
        made = tuple(channels or (mnist_lenet_fc.QUICK_CHANNELS if quick else mnist_lenet_fc.CHANNELS))
        units = mnist_lenet_fc.QUICK_HIDDEN if quick else mnist_lenet_fc.HIDDEN
        iterations = mnist_lenet_fc.QUICK_ITERATIONS if quick else Recipe.iterations
    architecture = Architecture(curves.image_shape(images), made, tuple(hidden or units), len(images.classes))
    return architecture, recipe or Recipe(iterations=iterations)


def _curve(record: dict[str, Any]) -> Curve:
    lists = {name: tuple(float(value) for value in record[name]) for name in ("levels", "mean", "deviation", "slacks")}
    return Curve(**{**record, **lists})
