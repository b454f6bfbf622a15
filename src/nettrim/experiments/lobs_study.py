"""L-OBS on LeNet-300-100 and LeNet-5: its published form, what each of its shortcuts costs, the iterative variant, and Net-Trim beside it.

Every network is pruned at the same shares by layer, measured, retrained lightly with labels, and measured again. All norms in the records
are relative to the norm of the reference output.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ..alternating import alternate
from ..methods import LOBS, OBS, Magnitude, Method, NetTrim, Random
from ..pruning import PruneResult, prune
from ..status import InvalidInput
from . import datasets, lobs_networks, outputs
from .curves import calibration_images
from .datasets import Dataset
from .journal import Journal
from .lobs_bound import accumulated
from .lobs_networks import PUBLISHED, SHARES, Published
from .lobs_retraining import retrain
from .published_training import digest
from .training import accuracy

NAME = "lobs"
SAMPLES = {lobs_networks.FULLY_CONNECTED: 4_096, lobs_networks.CONVOLUTIONAL: 2_000}
QUICK_SAMPLES = {lobs_networks.FULLY_CONNECTED: 500, lobs_networks.CONVOLUTIONAL: 250}
MAX_ROWS = 8_000  # patches of a convolution that are kept
ROUNDS = 2  # of the iterative variant, as in the published code
QUICK_ITERATIONS = 100
_FORMAT = 1

Progress = Callable[[float, float, str], None]
Scheme = Literal["cascade", "parallel"]


@dataclass(frozen=True)
class Way:
    """How a network is pruned: ``make`` gives the method for ``sparsity``, by layer. ``rounds`` above 1: alternating with retraining."""

    label: str
    make: Callable[..., Method]
    scheme: Scheme = "parallel"
    rounds: int = 1


SHARED = (
    Way("L-OBS", LOBS),
    Way("L-OBS, biases kept", partial(LOBS, keep_bias=True)),
    Way("its weights, refitted", partial(LOBS, form="refitted", keep_bias=True)),
    Way("greedy, with biases", partial(LOBS, form="greedy")),
    Way("greedy (OBS)", OBS),
    Way("Net-Trim", NetTrim, "cascade"),
    Way("magnitude", Magnitude),
)
"""At the main ratio."""
FORMS = tuple(way.label for way in SHARED[:5])
"""The forms of the optimal brain surgeon among them."""
BASELINES = (Way("random", Random), Way("magnitude", Magnitude))
ITERATIVE = (
    Way("L-OBS, iterative", partial(LOBS, iterative=True), rounds=ROUNDS),
    Way("greedy, iterative", partial(LOBS, iterative=True, form="greedy"), rounds=ROUNDS),
    Way("Net-Trim", NetTrim, "cascade"),
)
"""At the small ratios."""


@dataclass(frozen=True)
class Point:
    """One pruned network. Errors are on the test images, in [0, 1]: ``dense``, ``pruned`` (before the last retraining) and ``retrained``.

    ``iterations`` of retraining in all, over ``rounds``. ``layers`` are the shares kept, ``distances`` those of the layers' outputs, as
    certified. ``achieved`` is how far the output moved on the calibration images, ``certified`` the certificate's bound of it, and
    ``accumulated`` the theorem's, which is for one parallel round; ``holds`` covers certificate and theorem. ``seconds`` are those of
    pruning, certificate included.
    """

    network: str
    method: str
    target: float
    kept: float
    layers: tuple[float, ...]
    dense: float
    pruned: float
    retrained: float
    iterations: int
    rounds: int
    achieved: float
    certified: float | None
    accumulated: float | None
    distances: tuple[float, ...]
    holds: bool
    seconds: float

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Point:
        """The point of a journal's record."""
        return cls(**{**record, "layers": tuple(record["layers"]), "distances": tuple(record["distances"])})


@dataclass(frozen=True)
class Summary:
    """What the experiment found. ``best`` is, by network, the method of least error among the forms of OBS at the main ratio."""

    dataset: str
    seed: int
    quick: bool
    networks: dict[str, str]
    points: tuple[Point, ...]
    published: tuple[Published, ...]
    best: dict[str, str]
    holds: bool
    files: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for JSON."""
        data = asdict(self)
        return {**data, **{name: list(data[name]) for name in ("points", "published", "files")}}


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
    cache: Path | None = None,
) -> Summary:
    """Trains, prunes, retrains and measures; writes ``lobs.jsonl`` (one line a pruned network), ``.json``, ``.png`` and ``.svg``.

    ``samples`` training images calibrate. ``quick``: narrower networks, fewer images and iterations, the main ratio only. Images too small
    for LeNet-5 leave it out. Trained networks are kept in ``cache`` (default ``out/cache``). An interrupted run continues with ``resume``.
    Raises InvalidInput.
    """
    images = datasets.load(dataset, data, seed)
    chosen = tuple(networks or [name for name in lobs_networks.NAMES if lobs_networks.fits(name, images.train_images)])
    for name in chosen:
        if name not in lobs_networks.NAMES:
            raise InvalidInput(f"networks must be among {', '.join(lobs_networks.NAMES)}, found {name!r}")
        if not lobs_networks.fits(name, images.train_images):
            side = lobs_networks.SMALLEST_IMAGE
            raise InvalidInput(f"{name} needs images of at least {side} x {side} pixels, found {tuple(images.train_images.shape[1:])}")
    counts = {name: _samples(name, images, quick, samples) for name in chosen}
    folder = outputs.begin(Path(out), NAME)
    header = {
        "format": _FORMAT,
        "experiment": NAME,
        "data": images.name,
        "data_sha256": digest(images.train_images, images.train_labels, images.test_images, images.test_labels),
        "seed": seed,
        "quick": quick,
        "samples": counts,
    }
    jobs = [(name, target, way) for name in chosen for target, ways in _plan(name, quick) for way in ways]
    points: list[Point] = []
    built: dict[str, nn.Sequential] = {}
    with Journal(folder / f"{NAME}.jsonl", header, resume=resume) as journal:
        for done, (name, target, way) in enumerate(jobs):
            key = f"{name}: {way.label}, {target:g}"
            if name not in built:
                progress(done, len(jobs), f"{name}: training")
                built[name] = lobs_networks.trained(name, images, quick=quick, seed=seed, cache=cache or folder / "cache")
            if key not in journal:
                progress(done, len(jobs), key)
                journal.add(
                    key, asdict(measure(name, built[name], target, way, images, counts[name], _iterations(name, target, quick), seed))
                )
            points.append(Point.from_record(journal.records[key]))
        progress(len(jobs), len(jobs), "done")
    summary = Summary(
        dataset=images.name,
        seed=seed,
        quick=quick,
        networks={name: " - ".join(str(tuple(p.shape)) for p in model.parameters() if p.ndim > 1) for name, model in built.items()},
        points=tuple(points),
        published=tuple(row for row in PUBLISHED if row.network in chosen) if images.name == "mnist" and not quick else (),
        best={name: _best(points, name) for name in chosen},
        holds=all(point.holds for point in points),
        files=tuple(f"{NAME}.{ending}" for ending in ("jsonl", "json", "png", "svg")),
    )
    from .lobs_figures import picture  # drawn from this module's data

    outputs.write(folder, NAME, summary.to_dict(), picture(summary))
    return summary


def measure(name: str, model: nn.Sequential, target: float, way: Way, images: Dataset, samples: int, iterations: int, seed: int) -> Point:
    """Prunes, retrains and measures one network."""
    calibration = calibration_images(images, samples)
    sparsity = lobs_networks.sparsities(model, SHARES[name, target])
    method = way.make(sparsity=sparsity)
    settings: dict[str, Any] = {"scheme": way.scheme, "max_samples": max(samples, MAX_ROWS), "seed": seed, "progress": False}
    settings["layers"] = list(sparsity)
    per_round = iterations // way.rounds

    def train(network: nn.Module) -> None:
        retrain(network, images.train_images, images.train_labels, per_round, seed)

    begun = time.perf_counter()
    if way.rounds > 1:
        assert isinstance(method, LOBS)
        alternated = alternate(model, calibration, method, train, rounds=way.rounds, **settings)
        seconds = sum(result.report.seconds for result in alternated.rounds)
        result, tuned = alternated.rounds[-1], alternated.model
    else:
        result = prune(model, calibration, method, **settings)
        seconds = time.perf_counter() - begun
        tuned = copy.deepcopy(result.model)
        train(tuned)
    return _point(name, model, target, way, images, result, tuned, per_round * way.rounds, seconds, calibration)


def _point(
    name: str,
    model: nn.Sequential,
    target: float,
    way: Way,
    images: Dataset,
    result: PruneResult,
    tuned: nn.Module,
    iterations: int,
    seconds: float,
    calibration: Any,
) -> Point:
    def wrong(network: nn.Module) -> float:
        return 1 - accuracy(network, images.test_images, images.test_labels)

    layers, network = result.report.layers, result.certificate.network
    theorem = None
    holds = result.certificate.holds
    if way.scheme == "parallel" and way.rounds == 1:
        assert isinstance(result.model, nn.Sequential)
        theorem = accumulated(model, result.model, calibration)
        holds = holds and theorem.holds
    return Point(
        network=name,
        method=way.label,
        target=target,
        kept=sum(layer.nonzeros for layer in layers) / sum(layer.weights for layer in layers),
        layers=tuple(layer.nonzeros / layer.weights for layer in layers),
        dense=wrong(model),
        pruned=wrong(result.model),
        retrained=wrong(tuned),
        iterations=iterations,
        rounds=way.rounds,
        achieved=network.achieved / network.reference_norm,
        certified=None if network.bound is None else network.bound / network.reference_norm,
        accumulated=None if theorem is None else theorem.bound / theorem.reference,
        distances=tuple(layer.distance / layer.reference_norm for layer in layers),
        holds=holds,
        seconds=seconds,
    )


def _plan(name: str, quick: bool) -> list[tuple[float, tuple[Way, ...]]]:
    """Ratios and ways of a network."""
    small = 0.015 if name == lobs_networks.FULLY_CONNECTED else 0.009
    if quick:
        return [(0.07, tuple(way for way in SHARED if way.label != "L-OBS, biases kept"))]
    plan = [(0.07, SHARED), (small, ITERATIVE)]
    return [*plan, (0.08, BASELINES)] if name == lobs_networks.FULLY_CONNECTED else plan


def _iterations(name: str, target: float, quick: bool) -> int:
    """As many iterations of retraining as were published for L-OBS at the nearest ratio."""
    if quick:
        return QUICK_ITERATIONS
    rows = [row for row in PUBLISHED if row.network == name and row.method.startswith("L-OBS")]
    return min(rows, key=lambda row: abs(row.kept - target)).iterations


def _samples(name: str, images: Dataset, quick: bool, samples: int | None) -> int:
    if samples is None:
        samples = min((QUICK_SAMPLES if quick else SAMPLES)[name], len(images.train_images))
    return len(calibration_images(images, samples))


def _best(points: Sequence[Point], name: str) -> str:
    own = [p for p in points if p.network == name and p.target == 0.07 and p.method in FORMS]
    return min(own, key=lambda p: p.pruned).method
