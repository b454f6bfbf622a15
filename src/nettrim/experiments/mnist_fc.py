"""The published curves of a fully connected MNIST network, 784-300-1000-100-10: Net-Trim over the gains against magnitude.

Source of the settings: Aghasi, Abdi and Romberg, SIAM J. Math. Data Science 2020, and the authors' code (see ``published_training``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from . import curves, datasets
from .curves import GAINS, METHODS, SAMPLES, Series, Summary
from .published_training import Architecture, Recipe, Tuning

NAME = "mnist_fc"
HIDDEN = (300, 1000, 100)
QUICK_HIDDEN = (100, 200, 50)
QUICK_GAINS = (0.04, 0.1, 0.2)
QUICK_SAMPLES = 500
QUICK_ITERATIONS = 2000


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
    gains: Sequence[float] | None = None,
    methods: Sequence[str] = METHODS,
    hidden: Sequence[int] | None = None,
    recipe: Recipe | None = None,
    tuning: Tuning | None = None,
) -> Summary:
    """Measures the curves and writes ``mnist_fc.jsonl`` (one line a pruned network), ``.json``, ``.png`` and ``.svg`` into ``out``.

    ``samples`` training images calibrate (default 10,000, or all there are; the papers use all). ``quick`` shrinks what is not given:
    a narrower network, fewer iterations, gains and samples. An interrupted run continues with ``resume``. Raises InvalidInput.
    """
    images = datasets.load(dataset, data, seed)
    architecture = Architecture(
        image=curves.image_shape(images),
        channels=(),
        hidden=tuple(hidden or (QUICK_HIDDEN if quick else HIDDEN)),
        classes=len(images.classes),
    )
    series = Series(
        label="published settings",
        architecture=architecture,
        recipe=recipe or Recipe(iterations=QUICK_ITERATIONS if quick else Recipe.iterations),
        tuning=tuning or (Tuning(steps=(500,)) if quick else Tuning()),
        gains=tuple(gains or (QUICK_GAINS if quick else GAINS)),
        methods=tuple(methods),
    )
    return curves.run(
        NAME,
        f"{dataset}, fully connected, {architecture.name}",
        [series],
        images,
        samples=min(QUICK_SAMPLES if quick else SAMPLES, len(images.train_images)) if samples is None else samples,
        seed=seed,
        out=out,
        progress=progress,
        resume=resume,
    )
