"""The bounds of docs/bounds.md beside what is observed: trained fully connected networks of several widths, pruned by random masks.

For every width and share the bound is computed once, before any mask is drawn; then masks are drawn and the output's movement is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binom
from torch import Tensor, nn

from ..bound_network import NetworkBounds, network_bounds
from ..bounds.tails import check_delta, check_share
from ..methods import Magnitude, Random
from ..pruning import prune
from ..status import InvalidInput
from . import datasets, outputs
from .journal import Journal
from .models import fully_connected
from .training import recipe_for, train_classifier

NAME = "bounds"
WIDTHS, QUICK_WIDTHS = (32, 64, 128, 256, 512), (32, 128)
SHARES, QUICK_SHARES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9), (0.01, 0.1, 0.5)
TRIALS, QUICK_TRIALS = 40, 10
SAMPLES, QUICK_SAMPLES = 1000, 300
DELTA = 0.05
GAP = 0.5  # relative gap for which the largest share is sought
UNLIKELY = 1e-6  # more bounds exceeded than this probability allows: the bound would be wrong
Progress = Callable[[float, float, str], None]


@dataclass(frozen=True)
class Point:
    """One width and share. Gaps are ``||f_hat(X) - f(X)||_F / ||f(X)||_F`` on the calibration images.

    ``bound`` holds for a random mask with probability 1 - delta, ``ball`` is the bound uniform over the ball that holds all images, divided
    by the root mean square of the outputs' norms, and ``farthest`` the largest movement of a single image in the same units.
    ``magnitude_bound`` assumes random signs; ``magnitude`` was observed.
    """

    width: int
    share: float
    trials: int
    bound: float
    mean: float
    largest: float
    exceeded: int
    ball: float
    farthest: float
    ball_exceeded: int
    magnitude_bound: float
    magnitude: float


@dataclass(frozen=True)
class Inverse:
    """For one width, the largest share whose bound is at most ``GAP``: for a random mask, and by magnitude under random signs."""

    width: int
    random: float
    magnitude: float


@dataclass(frozen=True)
class Summary:
    """What the experiment found. ``consistent``: no bound was exceeded more often than chance allows (at probability ``UNLIKELY``)."""

    dataset: str
    depth: int
    samples: int
    delta: float
    gap: float
    seed: int
    points: tuple[Point, ...]
    inverse: tuple[Inverse, ...]
    exceeded: int
    trials: int
    consistent: bool
    files: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for JSON."""
        data = asdict(self)
        return {**data, "points": list(data["points"]), "inverse": list(data["inverse"]), "files": list(self.files)}


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
    widths: Sequence[int] | None = None,
    shares: Sequence[float] | None = None,
    trials: int | None = None,
    hidden: int = 2,
    epochs: int | None = None,
    delta: float = DELTA,
) -> Summary:
    """Measures bounds and gaps, and writes ``bounds.jsonl``, ``.json``, ``.png`` and ``.svg`` into ``out``. Raises InvalidInput.

    ``quick`` shrinks what is not given. An interrupted run continues with ``resume``.
    """
    delta = check_delta(delta)
    widths = tuple(widths or (QUICK_WIDTHS if quick else WIDTHS))
    shares = tuple(check_share(share) for share in shares or (QUICK_SHARES if quick else SHARES))
    trials = (QUICK_TRIALS if quick else TRIALS) if trials is None else trials
    samples = (QUICK_SAMPLES if quick else SAMPLES) if samples is None else samples
    if min(*widths, trials, samples, hidden) < 1:
        raise InvalidInput(f"widths, trials, samples and hidden must be at least 1, found {widths}, {trials}, {samples} and {hidden}")
    images = datasets.load(dataset, data, seed)
    epochs = (3 if quick else recipe_for(images).epochs) if epochs is None else epochs
    calibration = images.train_images[:samples]
    header = {
        "experiment": NAME,
        "dataset": dataset,
        "seed": seed,
        "samples": len(calibration),
        "trials": trials,
        "delta": delta,
        "hidden": hidden,
        "epochs": epochs,
    }
    folder = outputs.begin(Path(out), NAME)
    points, inverse = [], []
    total, done = len(widths) * (len(shares) + 1), 0
    with Journal(folder / f"{NAME}.jsonl", header, resume=resume) as journal:
        for width in widths:
            keys = [f"{width}/{share}" for share in shares]
            if any(key not in journal for key in [*keys, str(width)]):
                progress(done, total, f"width {width}: training")
                model = _trained(images, width, hidden, epochs, seed)
                radius = float(calibration.flatten(1).double().norm(dim=1).max())
                found = network_bounds(model, calibration, radius=radius)
                for key, share in zip(keys, shares, strict=True):
                    if key not in journal:
                        progress(done, total, f"width {width}, share {share:g}")
                        journal.add(key, asdict(_measure(model, found, calibration, width, share, trials, delta, seed)))
                if str(width) not in journal:
                    safe = {rule: found.largest_share(GAP, delta, rule=rule, relative=True) for rule in ("random", "magnitude")}
                    journal.add(str(width), asdict(Inverse(width, **safe)))
            done += len(shares) + 1
            progress(done, total, f"width {width}")
            points += [Point(**journal.records[key]) for key in keys]
            inverse.append(Inverse(**journal.records[str(width)]))
    files = tuple(f"{NAME}.{ending}" for ending in ("jsonl", "json", "png", "svg"))
    exceeded = sum(p.exceeded + p.ball_exceeded for p in points)
    consistent = all(binom.sf(max(p.exceeded, p.ball_exceeded) - 1, p.trials, delta) > UNLIKELY for p in points)
    summary = Summary(
        dataset,
        hidden + 1,
        len(calibration),
        delta,
        GAP,
        seed,
        tuple(points),
        tuple(inverse),
        exceeded,
        2 * trials * len(points),
        consistent,
        files,
    )
    from .bounds_figures import picture  # drawing is needed only here

    outputs.write(folder, NAME, summary.to_dict(), picture(summary))
    return summary


def _trained(images: datasets.Dataset, width: int, hidden: int, epochs: int, seed: int) -> nn.Sequential:
    recipe = recipe_for(images)
    model = fully_connected((images.train_images[0].numel(), *[width] * hidden, len(images.classes)), seed)
    train_classifier(
        model,
        images.train_images,
        images.train_labels,
        epochs=epochs,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        seed=seed,
    )
    return model


def _measure(
    model: nn.Module, found: NetworkBounds, images: Tensor, width: int, share: float, trials: int, delta: float, seed: int
) -> Point:
    bound = found.gap(share, delta)
    ball = found.gap(share, delta, form="ball").value
    by_signs = found.gap(share, delta, rule="magnitude")
    assert bound.relative is not None and by_signs.relative is not None
    with torch.no_grad():
        reference = model(images).double()
    scale = float(reference.norm())
    gaps, farthest = [], []
    for trial in range(trials):
        # the rule that the bound speaks of; the numbers of the draw differ from trial to trial and from share to share
        moved = _moved(model, images, Random(sparsity=share, seed=seed * 100_003 + trial), reference)
        gaps.append(float(moved.norm()))
        farthest.append(float(moved.norm(dim=1).max()))
    typical = scale / len(images) ** 0.5
    return Point(
        width=width,
        share=share,
        trials=trials,
        bound=bound.relative,
        mean=sum(gaps) / trials / scale,
        largest=max(gaps) / scale,
        exceeded=sum(gap > bound.value for gap in gaps),
        ball=ball / typical,
        farthest=max(farthest) / typical,
        ball_exceeded=sum(gap > ball for gap in farthest),
        magnitude_bound=by_signs.relative,
        magnitude=float(_moved(model, images, Magnitude(sparsity=share), reference).norm()) / scale,
    )


def _moved(model: nn.Module, images: Tensor, method: Random | Magnitude, reference: Tensor) -> Tensor:
    # these methods look at weights alone, so one image is calibration enough
    pruned = prune(model, images[:1], method, scheme="parallel", progress=False).model
    with torch.no_grad():
        moved: Tensor = pruned(images).double() - reference
    return moved
