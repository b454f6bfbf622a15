"""The published curves of a LeNet on MNIST of which the two fully connected layers are pruned, and the authors' worked example.

Source of the settings and of the published numbers: Aghasi, Abdi and Romberg, SIAM J. Math. Data Science 2020, the authors' code and
the output printed beside it. The worked example trains the same network in another way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from . import curves, datasets
from .curves import GAINS, METHODS, SAMPLES, Published, Series, Summary
from .published_training import Architecture, Recipe, Tuning

NAME = "mnist_lenet_fc"
CHANNELS, HIDDEN = (32, 64), (512,)
QUICK_CHANNELS, QUICK_HIDDEN = (6, 12), (48,)
QUICK_GAINS = (0.1, 0.3)
QUICK_SAMPLES = 300
QUICK_ITERATIONS = 300
EXAMPLE = "worked example"
EXAMPLE_GAIN = 0.15
EXAMPLE_RECIPE = Recipe(iterations=2001, batch_size=200, keep=0.75, l2=0.0)
EXAMPLE_TUNING = Tuning(steps=(2001,), batch_size=200)
PUBLISHED_EXAMPLE = Published(
    series=EXAMPLE,
    gain=EXAMPLE_GAIN,
    nonzeros_before=(1_605_621, 5_120),
    nonzeros=(108_967, 493),
    accuracy_before=0.9921,
    accuracy=0.9848,
    accuracy_tuned=0.9892,
    note="pruned accuracy on validation images, the others on test images; all 55,000 training images; "
    "its first layer had not converged: distance 879 against a tolerance of 817",
)
"""As printed by the authors' program."""


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
    channels: Sequence[int] | None = None,
    hidden: Sequence[int] | None = None,
    recipe: Recipe | None = None,
    tuning: Tuning | None = None,
    example: bool = True,
    example_recipe: Recipe | None = None,
    example_tuning: Tuning | None = None,
) -> Summary:
    """Measures the curves and writes ``mnist_lenet_fc.jsonl`` (one line a pruned network), ``.json``, ``.png`` and ``.svg`` into ``out``.

    ``samples`` training images calibrate (default 10,000, or all there are; the papers use all). ``quick`` shrinks what is not given:
    a narrower network, fewer iterations, gains and samples. ``example`` adds the worked example, a network of its own. An interrupted
    run continues with ``resume``. Raises InvalidInput.
    """
    images = datasets.load(dataset, data, seed)
    architecture = Architecture(
        image=curves.image_shape(images),
        channels=tuple(channels or (QUICK_CHANNELS if quick else CHANNELS)),
        hidden=tuple(hidden or (QUICK_HIDDEN if quick else HIDDEN)),
        classes=len(images.classes),
    )
    series = [
        Series(
            label="published settings",
            architecture=architecture,
            recipe=recipe or Recipe(iterations=QUICK_ITERATIONS if quick else Recipe.iterations),
            tuning=tuning or (Tuning(steps=(50,)) if quick else Tuning()),
            gains=tuple(gains or (QUICK_GAINS if quick else GAINS)),
            methods=tuple(methods),
        )
    ]
    if example:
        series.append(
            Series(
                label=EXAMPLE,
                architecture=architecture,
                recipe=example_recipe or (Recipe(iterations=200, batch_size=200, keep=0.75, l2=0.0) if quick else EXAMPLE_RECIPE),
                tuning=example_tuning or (Tuning(steps=(50,), batch_size=200) if quick else EXAMPLE_TUNING),
                gains=(EXAMPLE_GAIN,),
                methods=tuple(methods),
            )
        )
    return curves.run(
        NAME,
        f"{dataset}, LeNet, {architecture.name}; fully connected layers pruned",
        series,
        images,
        samples=min(QUICK_SAMPLES if quick else SAMPLES, len(images.train_images)) if samples is None else samples,
        seed=seed,
        out=out,
        progress=progress,
        resume=resume,
        published=(PUBLISHED_EXAMPLE,) if example and dataset == "mnist" else (),
    )
