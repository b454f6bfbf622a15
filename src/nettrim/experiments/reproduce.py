"""The published experiments by name: runs one, and gives its numbers and what to show of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ..status import InvalidInput

NAMES = ("recovery", "spirals", "mnist-fc", "mnist-lenet-fc", "cascade-vs-parallel", "robustness", "bounds", "network-trimming", "lobs")
Progress = Callable[[float, float, str], None]


@dataclass(frozen=True)
class Settings:
    """What every experiment is given. ``dataset``, ``data`` and ``samples`` are for those on images; without ``samples`` they choose."""

    out: Path
    quick: bool = False
    seed: int = 0
    dataset: str = "mnist"
    data: Path | None = None
    samples: int | None = None
    progress: Progress = lambda done, total, what: None


@dataclass(frozen=True)
class Outcome:
    """All numbers as plain JSON types, a table and lines of text, and the files written (names in the experiment's folder)."""

    numbers: dict[str, Any]
    table: Table
    words: tuple[str, ...]
    files: tuple[str, ...]


def run(name: str, settings: Settings) -> Outcome:
    """Runs an experiment of ``NAMES``; an interrupted run in the same folder is continued. Raises InvalidInput."""
    if name not in _EXPERIMENTS:
        raise InvalidInput(f"experiment {name!r} is not known; there are {', '.join(NAMES)}")
    return _EXPERIMENTS[name](settings)


def _recovery(settings: Settings) -> Outcome:
    from . import recovery, recovery_figures

    summary = recovery.run(quick=settings.quick, seed=settings.seed, out=settings.out, progress=settings.progress)
    return Outcome(summary.to_dict(), recovery_figures.table(summary), (), summary.files)


def _spirals(settings: Settings) -> Outcome:
    from . import spirals, spirals_figures

    summary = spirals.run(out=settings.out, quick=settings.quick, seed=settings.seed, progress=settings.progress)
    return Outcome(summary.to_dict(), spirals_figures.table(summary), (), summary.files)


def _on_images(settings: Settings) -> dict[str, Any]:
    names = ("out", "quick", "seed", "progress", "dataset", "data", "samples")
    return {name: getattr(settings, name) for name in names}


def _mnist_fc(settings: Settings) -> Outcome:
    from . import mnist_fc, mnist_fc_figures

    summary = mnist_fc.run(**_on_images(settings))
    return Outcome(summary.to_dict(), mnist_fc_figures.table(summary), (), summary.files)


def _mnist_lenet_fc(settings: Settings) -> Outcome:
    from . import mnist_lenet_fc, mnist_lenet_fc_figures

    summary = mnist_lenet_fc.run(**_on_images(settings))
    return Outcome(summary.to_dict(), mnist_lenet_fc_figures.table(summary), (), summary.files)


def _robustness(settings: Settings) -> Outcome:
    from . import robustness, robustness_figures

    summary = robustness.run(**_on_images(settings))
    return Outcome(summary.to_dict(), robustness_figures.table(summary), (), summary.files)


def _bounds(settings: Settings) -> Outcome:
    from . import bounds_figures, bounds_observed

    summary = bounds_observed.run(**_on_images(settings))
    return Outcome(summary.to_dict(), bounds_figures.table(summary), (), summary.files)


def _network_trimming(settings: Settings) -> Outcome:
    from . import network_trimming, network_trimming_figures

    summary = network_trimming.run(**_on_images(settings))
    return Outcome(summary.to_dict(), network_trimming_figures.table(summary), (), summary.files)


def _lobs(settings: Settings) -> Outcome:
    from . import lobs_figures, lobs_study

    summary = lobs_study.run(**_on_images(settings))
    return Outcome(summary.to_dict(), lobs_figures.table(summary), (), summary.files)


def _cascade_vs_parallel(settings: Settings) -> Outcome:
    """First on the spirals, as in the first paper; then on images, as in the second."""
    from . import cascade_vs_parallel, cascade_vs_parallel_figures, outputs, spiral_schemes, spiral_schemes_figures

    common: dict[str, Any] = {"out": settings.out, "quick": settings.quick, "seed": settings.seed, "progress": settings.progress}
    points = spiral_schemes.spiral_points(**common)
    name = spiral_schemes.NAME
    numbers = {"points": [asdict(point) for point in points], "comparisons": [asdict(c) for c in spiral_schemes.compare(points)]}
    outputs.write(settings.out, name, numbers, spiral_schemes_figures.picture(points))
    summary = cascade_vs_parallel.run(**_on_images(settings))
    files = (*(f"{name}.{ending}" for ending in ("jsonl", "json", "png", "svg")), *summary.files)
    words = ("Nested spirals:", *spiral_schemes_figures.words(points))
    return Outcome({"spirals": numbers, "images": summary.to_dict()}, cascade_vs_parallel_figures.table(summary), words, files)


_EXPERIMENTS: dict[str, Callable[[Settings], Outcome]] = {
    "recovery": _recovery,
    "spirals": _spirals,
    "mnist-fc": _mnist_fc,
    "mnist-lenet-fc": _mnist_lenet_fc,
    "cascade-vs-parallel": _cascade_vs_parallel,
    "robustness": _robustness,
    "bounds": _bounds,
    "network-trimming": _network_trimming,
    "lobs": _lobs,
}
