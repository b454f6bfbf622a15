"""Cascade against parallel on nested spirals: nonzero weights of each layer against the relative discrepancy of the outputs.

Source of the settings: Aghasi et al., NIPS 2017, supplement: hidden layers 50-50, 75-75 and 100-100, 20 trainings a point, gamma = 1.1
and kappa = 1. A cascade's first layer takes ``epsilon ||Y_1||_F`` and every later one ``sqrt(gamma)`` times the discrepancy of its own
original weights; in the parallel scheme every layer takes ``epsilon`` times the norm of its own reference output. ``spiral_points`` gives
the prunings, ``compare`` the two schemes at equal discrepancy; ``spiral_schemes_figures.draw`` draws them.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..status import InvalidInput
from . import outputs, spiral_pruning, spiral_training
from .journal import Journal
from .spiral_pruning import GAMMA, WAYS, Pruned, Pruner, Scheme
from .spiral_training import Recipe, Spirals
from .spirals import points_of, training_seed

NAME = "spiral_schemes"
HIDDEN = (50, 75, 100)
QUICK_HIDDEN = (50,)
REPEATS, QUICK_REPEATS = 20, 2
CASCADE_GRID = (0.002, 0.005, 0.01, 0.02, 0.04, 0.08)
PARALLEL_GRID = (0.002, 0.005, 0.01, 0.02, 0.04, 0.08)
QUICK_CASCADE_GRID = (0.005, 0.02, 0.08)
QUICK_PARALLEL_GRID = (0.01, 0.03, 0.08)
MAGNITUDES = (0.01, 0.02, 0.05, 0.1)
"""The discrepancies at which the schemes are compared, where both curves reach them."""
_FORMAT = 1


@dataclass(frozen=True)
class SpiralPoint:
    """One training pruned at one ``epsilon`` of one scheme."""

    hidden: int
    repeat: int
    scheme: str
    epsilon: float
    pruned: Pruned


@dataclass(frozen=True)
class MeanPoint:
    """All trainings of one width, scheme and epsilon: means of the nonzeros by layer, geometric mean of rd."""

    hidden: int
    scheme: str
    epsilon: float
    repeats: int
    rd: float
    nonzeros: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """Nonzeros by layer of the two mean curves at ``rd``, interpolated linearly in the logarithms; ``ratios`` are cascade over parallel."""

    hidden: int
    rd: float
    cascade: tuple[float, ...]
    parallel: tuple[float, ...]
    ratios: tuple[float, ...]


def spiral_points(
    *,
    out: Path,
    quick: bool = False,
    seed: int = 0,
    progress: Callable[[float, float, str], None] = lambda done, total, what: None,
    resume: bool = True,
    hidden: Sequence[int] | None = None,
    repeats: int | None = None,
    cascade: Sequence[float] | None = None,
    parallel: Sequence[float] | None = None,
    way: str = "published",
    spirals: Spirals | None = None,
    recipe: Recipe | None = None,
) -> tuple[SpiralPoint, ...]:
    """Trains and prunes, and writes ``spiral_schemes.jsonl`` with one line a pruning; networks are kept in ``out/cache``.

    ``cascade`` and ``parallel`` are each scheme's epsilons; ``way`` is one of ``spiral_pruning.WAYS``. ``quick`` shrinks what is not given.
    The networks are those of ``spirals.run`` with dropout alone. An interrupted run continues with ``resume``, and a quick one
    grows into the full one. Raises InvalidInput.
    """
    sizes = tuple(hidden) if hidden is not None else QUICK_HIDDEN if quick else HIDDEN
    count = repeats if repeats is not None else QUICK_REPEATS if quick else REPEATS
    grids: list[tuple[Scheme, tuple[float, ...]]] = [
        ("cascade", tuple(cascade) if cascade is not None else QUICK_CASCADE_GRID if quick else CASCADE_GRID),
        ("parallel", tuple(parallel) if parallel is not None else QUICK_PARALLEL_GRID if quick else PARALLEL_GRID),
    ]
    _check(sizes, count, seed, [grid for _, grid in grids], way)
    data, settings = spirals or Spirals(), recipe or Recipe()
    header = {
        "format": _FORMAT,
        "experiment": NAME,
        "version": spiral_training.VERSION,
        "spirals": asdict(data),
        "recipe": asdict(settings),
        "way": way,
        "gamma": GAMMA,
        "solver": {"gap": spiral_pruning.GAP, "max_iterations": spiral_pruning.ITERATIONS},
        "seed": seed,
    }
    plan = [(h, repeat, scheme, epsilon) for repeat in range(count) for h in sizes for scheme, grid in grids for epsilon in grid]
    outputs.begin(out, NAME)
    points = points_of(data, seed)
    pruner: tuple[tuple[int, int], Pruner] | None = None
    with Journal(out / f"{NAME}.jsonl", header, resume=resume) as journal:
        missing = [unit for unit in plan if _key(*unit) not in journal]
        done = len(plan) - len(missing)
        progress(done, len(plan), "resumed" if done else "started")
        for h, repeat, scheme, epsilon in missing:
            if pruner is None or pruner[0] != (h, repeat):
                model = spiral_training.trained(data, h, settings, seed, training_seed(seed, repeat), out / "cache", reuse=resume)
                pruner = (h, repeat), Pruner(model, points)
            key = _key(h, repeat, scheme, epsilon)
            pruned = pruner[1].prune(way, epsilon, GAMMA if scheme == "cascade" else None, scheme=scheme)
            journal.add(key, asdict(pruned))
            done += 1
            progress(done, len(plan), f"{key}: {'/'.join(map(str, pruned.nonzeros))}, rd {pruned.rd:.4f}")
    return tuple(
        SpiralPoint(h, repeat, scheme, epsilon, Pruned.from_record(journal.records[_key(h, repeat, scheme, epsilon)]))
        for h, repeat, scheme, epsilon in sorted(plan)
    )


def means(points: Sequence[SpiralPoint]) -> tuple[MeanPoint, ...]:
    """The points of every width, scheme and epsilon, averaged over the trainings; an rd of exactly 0 counts as 1e-12."""
    found = []
    for hidden, scheme, epsilon in dict.fromkeys((p.hidden, p.scheme, p.epsilon) for p in points):
        own = [p.pruned for p in points if (p.hidden, p.scheme, p.epsilon) == (hidden, scheme, epsilon)]
        rd = math.exp(statistics.fmean(math.log(max(p.rd, 1e-12)) for p in own))
        nonzeros = tuple(statistics.fmean(column) for column in zip(*(p.nonzeros for p in own), strict=True))
        found.append(MeanPoint(hidden, scheme, epsilon, len(own), rd, nonzeros))
    return tuple(found)


def compare(points: Sequence[SpiralPoint], at: Sequence[float] = MAGNITUDES) -> tuple[Comparison, ...]:
    """Cascade and parallel at equal discrepancy, for every width at every one of ``at`` that lies on both mean curves.

    ``all(c.ratios[2] < 1 for c in compare(points))`` says that the cascade is sparser in layer 3.
    """
    curves = means(points)
    found = []
    for hidden in dict.fromkeys(p.hidden for p in curves):
        for rd in at:
            ours, other = (_interpolated([p for p in curves if (p.hidden, p.scheme) == (hidden, s)], rd) for s in ("cascade", "parallel"))
            if ours is not None and other is not None:
                ratios = tuple(a / b if b > 0 else math.inf for a, b in zip(ours, other, strict=True))
                found.append(Comparison(hidden, rd, ours, other, ratios))
    return tuple(found)


def _interpolated(curve: Sequence[MeanPoint], rd: float) -> tuple[float, ...] | None:
    """Nonzeros by layer where the curve passes ``rd``; ``None`` outside its range."""
    ordered = sorted(curve, key=lambda p: p.rd)
    for low, high in itertools.pairwise(ordered):
        if low.rd <= rd <= high.rd and low.rd < high.rd:
            part = math.log(rd / low.rd) / math.log(high.rd / low.rd)
            return tuple(_between(a, b, part) for a, b in zip(low.nonzeros, high.nonzeros, strict=True))
    return None


def _between(low: float, high: float, part: float) -> float:
    """The weighted geometric mean of two counts; the plain one where a count is zero."""
    if low > 0 and high > 0:
        return math.exp((1 - part) * math.log(low) + part * math.log(high))
    return (1 - part) * low + part * high


def _key(hidden: int, repeat: int, scheme: str, epsilon: float) -> str:
    return f"{hidden}-{hidden}, repeat {repeat}: {scheme}, epsilon {epsilon:g}"


def _check(sizes: Sequence[int], repeats: int, seed: int, grids: Sequence[Sequence[float]], way: str) -> None:
    for name, value, least in (("repeats", repeats, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InvalidInput(f"{name} must be a whole number of at least {least}, found {value!r}: see experiments.spiral_schemes")
    if not sizes or any(isinstance(h, bool) or not isinstance(h, int) or h < 1 for h in sizes) or len(set(sizes)) < len(sizes):
        raise InvalidInput(
            f"hidden must hold different positive numbers of units, found {list(sizes)}: leave it out for the published ones"
        )
    for grid in grids:
        if not grid or any(not 0 < epsilon < math.inf for epsilon in grid) or len(set(grid)) < len(grid):
            raise InvalidInput(
                f"a scheme's epsilons must be different numbers above 0, found {list(grid)}: leave them out for the usual ones"
            )
    if way not in WAYS:
        raise InvalidInput(f"way must be one of {', '.join(map(repr, WAYS))}, found {way!r}; choose one of them")
