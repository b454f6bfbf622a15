"""The nested-spirals experiment of Net-Trim: 2-h-h-2 ReLU networks pruned in the cascade to a relative discrepancy below 0.02.

Source of the published numbers: Aghasi et al., NIPS 2017, supplement. ``rd = ||Z - Z_hat||_F / ||Z||_F`` of the outputs before soft-max
on the training points. The published counts are of weights without biases (2-50-50-2 has 100, 2500 and 100, of which 99, 2483 and 100
are given as nonzero); so are ours: pruned weights that are not exactly 0, trained ones above ``spiral_training.COUNTED``. The points are
generated, as the published ones, and the settings of its trainings, are not available.
"""

from __future__ import annotations

import json
import signal
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..status import InvalidInput
from . import outputs, spiral_pruning, spiral_training
from .journal import Journal, Record
from .spiral_pruning import LIMIT, WAYS, Points, Pruned, Pruner
from .spiral_training import Recipe, Spirals

NAME = "spirals"
HIDDEN = (50, 75, 125, 175, 200)
QUICK_HIDDEN = (50, 75)
TRAININGS: Mapping[str, float] = MappingProxyType({"dropout": 0.0, "dropout + l1": 1e-4})
"""The weight of the l1 penalty, by the training's name; dropout keeps half of the hidden values in both."""
REPEATS, QUICK_REPEATS = 5, 1
HELDOUT = 2000
EXAMPLE_HIDDEN, EXAMPLE_EPSILON, EXAMPLE_KAPPA = 200, 0.01, 0.35
_FORMAT = 1
_EXAMPLE = "example"

Counts = tuple[int, int, int]

PUBLISHED: Mapping[tuple[int, str], tuple[Counts, Counts]] = MappingProxyType(
    {
        (50, "dropout"): ((99, 2483, 100), (98, 467, 54)),
        (75, "dropout"): ((149, 5594, 150), (149, 710, 72)),
        (125, "dropout"): ((250, 15529, 250), (247, 3477, 96)),
        (175, "dropout"): ((349, 30395, 350), (348, 1743, 116)),
        (200, "dropout"): ((400, 39668, 399), (399, 1991, 113)),
        (50, "dropout + l1"): ((58, 1604, 95), (54, 342, 46)),
        (75, "dropout + l1"): ((96, 2867, 135), (90, 651, 62)),
        (125, "dropout + l1"): ((126, 5316, 226), (95, 751, 60)),
        (175, "dropout + l1"): ((171, 9580, 320), (136, 906, 61)),
        (200, "dropout + l1"): ((134, 8700, 382), (109, 606, 70)),
    }
)
"""Nonzeros by layer, trained and pruned with rd < 0.02."""
PUBLISHED_EXAMPLE: Mapping[str, tuple[Counts, Counts, float]] = MappingProxyType(
    {
        "dropout": ((397, 39770, 399), (362, 2663, 131), 0.046),
        "dropout + l1": ((319, 6554, 304), (189, 929, 84), 0.0183),
    }
)
"""2-200-200-2: nonzeros trained and pruned, and rd. The settings (0.01, 1.1, 0.35) are stated with the first."""


@dataclass(frozen=True)
class Trained:
    """One trained network: nonzeros by layer, accuracies in [0, 1] on training and on held-out points."""

    hidden: int
    training: str
    repeat: int
    nonzeros: tuple[int, ...]
    accuracy: float
    accuracy_heldout: float


@dataclass(frozen=True)
class Result:
    """One network pruned one way. ``best`` of the ``attempts`` is within the limit where ``reached`` says so."""

    hidden: int
    training: str
    repeat: int
    way: str
    reached: bool
    best: Pruned
    attempts: int


@dataclass(frozen=True)
class Cell:
    """All repeats of one network and way: medians by layer and of rd, the range of layer 2's nonzeros.

    A repeat that never came within the limit counts with its trained nonzeros; ``reached`` counts those that did. ``with_biases``: whether
    layer 2's nonzeros stay at or below the published count when our nonzero biases are added to them.
    """

    hidden: int
    training: str
    way: str
    repeats: int
    reached: int
    nonzeros: tuple[float, ...]
    biases: tuple[float, ...]
    least: int
    most: int
    rd: float
    rd_heldout: float
    accuracy: float
    accuracy_heldout: float
    published: Counts | None
    at_or_below: bool | None
    with_biases: bool | None


@dataclass(frozen=True)
class Example:
    """The worked example at the published settings, medians over the repeats; ``kappa_reached`` counts those whose last layer met its
    tightened tolerance."""

    training: str
    repeats: int
    epsilon: float
    gamma: float
    kappa: float
    kappa_reached: int
    trained: tuple[float, ...]
    nonzeros: tuple[float, ...]
    rd: float
    rd_heldout: float


@dataclass(frozen=True)
class Summary:
    """What was found. ``at_or_below``: by way, in how many of ``compared`` networks layer 2's median is at or below the published count;
    ``with_biases``: the same with our nonzero biases counted.

    ``holds``: the certificates of all results and examples; ``refused`` counts the attempts whose certificate does not hold, which are no
    results; ``theorems_hold``: no published bound was exceeded in any attempt; slacks: bound over achieved in all attempts, of our
    bounds of all layers and networks, and of the published ones; ``largest_violation`` of the published program's constraints off Omega
    (absolute) in any result, which the solver holds to ``gap / 20`` of the layer's tolerance. ``spirals`` and ``recipes`` are the settings
    of data and trainings.
    """

    seed: int
    limit: float
    spirals: dict[str, Any]
    recipes: dict[str, Any]
    trained: tuple[Trained, ...]
    results: tuple[Result, ...]
    cells: tuple[Cell, ...]
    examples: tuple[Example, ...]
    compared: int
    at_or_below: dict[str, int]
    with_biases: dict[str, int]
    least_accuracy: float
    prunings: int
    refused: int
    holds: bool
    theorems_hold: bool
    smallest_slack: float | None
    largest_slack: float | None
    smallest_theorem_slack: float | None
    largest_theorem_slack: float | None
    largest_violation: float | None
    files: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain JSON types."""
        return dict(json.loads(json.dumps(asdict(self), allow_nan=False)))


@dataclass(frozen=True)
class Unit:
    """A piece of work for one process; ``way`` is empty for the training itself."""

    hidden: int
    training: str
    repeat: int
    way: str
    spirals: Spirals
    recipe: Recipe
    seed: int
    cache: Path
    reuse: bool

    @property
    def name(self) -> str:
        return f"{self.hidden}-{self.hidden}, {self.training}, repeat {self.repeat}: {self.way or 'trained'}"


def run(
    *,
    out: Path,
    quick: bool = False,
    seed: int = 0,
    progress: Callable[[float, float, str], None] = lambda done, total, what: None,
    resume: bool = True,
    hidden: Sequence[int] | None = None,
    repeats: int | None = None,
    ways: Sequence[str] = WAYS,
    spirals: Spirals | None = None,
    recipe: Recipe | None = None,
    processes: int = 2,
) -> Summary:
    """Trains every network ``repeats`` times, prunes it in every way and writes ``spirals.jsonl``, ``.json``, ``.png`` and ``.svg``.

    All trainings share the points of ``seed``; weights and dropout differ. ``recipe`` gives everything of the training but l1. ``quick``
    shrinks what is not given, and leaves the worked example out, which needs 200 hidden units. A record depends only on its network,
    way and ``seed``, so an interrupted run continues with ``resume`` and a quick one grows into the full one; without it networks are
    trained again too. Processes are spawned: call this under ``if __name__ == "__main__"`` in a script, or give ``processes=1``.
    Raises InvalidInput.
    """
    sizes = tuple(hidden) if hidden is not None else QUICK_HIDDEN if quick else HIDDEN
    count = repeats if repeats is not None else QUICK_REPEATS if quick else REPEATS
    _check(sizes, count, seed, ways, processes)
    points, base = spirals or Spirals(), recipe or Recipe()
    recipes = {training: replace(base, l1=l1) for training, l1 in TRAININGS.items()}
    networks = [
        Unit(h, training, repeat, "", points, recipes[training], seed, out / "cache", resume)
        for h in sorted(sizes, reverse=True)  # the long ones first, so that processes end together
        for training in TRAININGS
        for repeat in range(count)
    ]
    header = {
        "format": _FORMAT,
        "experiment": NAME,
        "version": spiral_training.VERSION,
        "spirals": asdict(points),
        "heldout": HELDOUT,
        "recipes": {training: asdict(recipe) for training, recipe in recipes.items()},
        "limit": LIMIT,
        "search": spiral_pruning.SEARCH,
        "seed": seed,
    }
    outputs.begin(out, NAME)
    with Journal(out / f"{NAME}.jsonl", header, resume=resume) as journal:
        units = [*networks, *(pruning for network in networks for pruning in _prunings(network, ways))]
        done = sum(unit.name in journal for unit in units)
        progress(done, len(units), "resumed" if done else "started")
        for unit, record in _solve(networks, ways, journal, processes):
            journal.add(unit.name, record)
            done += 1
            progress(done, len(units), f"{unit.name}, {_words(record)}")
    records = {(u.hidden, u.training, u.repeat, u.way): journal.records[u.name] for u in units}
    summary = _summarise(records, ways, seed, header)
    from .spirals_figures import picture  # drawn from this module's data

    outputs.write(out, NAME, summary.to_dict(), picture(summary))
    return summary


def points_of(spirals: Spirals, seed: int) -> Points:
    """The training points of ``seed``, and ``HELDOUT`` others of the same law."""
    return Points(*spiral_training.draw(spirals, seed), *spiral_training.draw(replace(spirals, points=HELDOUT), seed, heldout=True))


def training_seed(seed: int, repeat: int) -> int:
    """The seed of a network's weights and dropout."""
    return 1000 * seed + repeat


def solve_unit(unit: Unit) -> Record:
    """The record of one piece of work."""
    points = points_of(unit.spirals, unit.seed)
    network_seed = training_seed(unit.seed, unit.repeat)
    model = spiral_training.trained(unit.spirals, unit.hidden, unit.recipe, unit.seed, network_seed, unit.cache, reuse=unit.reuse)
    if not unit.way:
        accuracy, heldout = spiral_pruning.accuracies(model, points)
        return {"nonzeros": spiral_training.counted(model), "accuracy": accuracy, "accuracy_heldout": heldout}
    pruner = Pruner(model, points)
    if unit.way == _EXAMPLE:
        return {"attempts": [asdict(pruner.prune("published", EXAMPLE_EPSILON, spiral_pruning.GAMMA, EXAMPLE_KAPPA))]}
    return {"attempts": [asdict(attempt) for attempt in pruner.search(unit.way)]}


def _prunings(network: Unit, ways: Sequence[str]) -> list[Unit]:
    example = network.hidden == EXAMPLE_HIDDEN and "published" in ways
    return [replace(network, way=way, reuse=True) for way in (*ways, *((_EXAMPLE,) if example else ()))]


def _check(sizes: Sequence[int], repeats: int, seed: int, ways: Sequence[str], processes: int) -> None:
    for name, value, least in (("repeats", repeats, 1), ("seed", seed, 0), ("processes", processes, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InvalidInput(f"{name} must be a whole number of at least {least}, found {value!r}: see experiments.spirals.run")
    if not sizes or any(isinstance(h, bool) or not isinstance(h, int) or h < 1 for h in sizes) or len(set(sizes)) < len(sizes):
        raise InvalidInput(
            f"hidden must hold different positive numbers of units, found {list(sizes)}: leave it out for the published ones"
        )
    if not ways or any(way not in WAYS for way in ways) or len(set(ways)) < len(ways):
        raise InvalidInput(f"ways must be different ones of {', '.join(map(repr, WAYS))}, found {list(ways)}: leave them out for all")


def _solve(networks: Sequence[Unit], ways: Sequence[str], journal: Journal, processes: int) -> Iterator[tuple[Unit, Record]]:
    """Every missing unit; a network is trained before it is pruned, so that no two processes train the same one."""

    def missing(units: Sequence[Unit]) -> list[Unit]:
        return [unit for unit in units if unit.name not in journal]

    if processes == 1:
        for network in networks:
            for unit in missing([network, *_prunings(network, ways)]):
                yield unit, solve_unit(unit)
        return
    ready = missing([u for n in networks for u in ([n] if n.name not in journal else _prunings(n, ways))])
    if not ready:
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_ignore_interrupts) as pool:
        waiting: dict[Future[Record], Unit] = {}
        try:
            waiting = {pool.submit(solve_unit, unit): unit for unit in ready}
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    unit = waiting.pop(future)
                    yield unit, future.result()
                    if not unit.way:
                        waiting |= {pool.submit(solve_unit, pruning): pruning for pruning in missing(_prunings(unit, ways))}
        finally:  # an interrupt must not wait for all that is queued
            for future in waiting:
                future.cancel()


def _ignore_interrupts() -> None:
    """Ctrl-C goes to the whole group; the parent alone decides how to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _words(record: Record) -> str:
    if "attempts" not in record:
        return f"accuracy {record['accuracy']:.1%}"
    chosen, _ = spiral_pruning.best([Pruned.from_record(attempt) for attempt in record["attempts"]])
    return f"{'/'.join(map(str, chosen.nonzeros))}, rd {chosen.rd:.4f}"


def _summarise(records: Mapping[tuple[int, str, int, str], Record], ways: Sequence[str], seed: int, header: Mapping[str, Any]) -> Summary:
    trained, results, every = [], [], []
    examples: dict[str, list[tuple[Trained, Pruned]]] = {}
    networks: dict[tuple[int, str, int], Trained] = {}
    for (h, training, repeat, way), record in sorted(records.items(), key=lambda item: _order(item[0])):
        if not way:
            networks[h, training, repeat] = Trained(
                h, training, repeat, tuple(record["nonzeros"]), record["accuracy"], record["accuracy_heldout"]
            )
            trained.append(networks[h, training, repeat])
            continue
        attempts = [Pruned.from_record(attempt) for attempt in record["attempts"]]
        every += attempts
        if way == _EXAMPLE:
            examples.setdefault(training, []).append((networks[h, training, repeat], attempts[-1]))
        else:
            chosen, reached = spiral_pruning.best(attempts)
            results.append(Result(h, training, repeat, way, reached, chosen, len(attempts)))
    cells = []
    for h, training in dict.fromkeys((t.hidden, t.training) for t in trained):
        for way in ways:
            own = [r for r in results if (r.hidden, r.training, r.way) == (h, training, way)]
            cells.append(_cell(own, [networks[h, training, r.repeat] for r in own]))
    slacks = [slack for pruned in every for slack in pruned.slacks]
    violations = [layer.violation for r in results for layer in r.best.layers if layer.violation is not None]
    theorem_slacks = [slack for pruned in every for slack in pruned.theorem_slacks]
    return Summary(
        seed=seed,
        limit=LIMIT,
        spirals=header["spirals"],
        recipes=header["recipes"],
        trained=tuple(trained),
        results=tuple(results),
        cells=tuple(cells),
        examples=tuple(_example(training, own) for training, own in examples.items()),
        compared=len({(c.hidden, c.training) for c in cells if c.published is not None}),
        at_or_below={way: sum(c.at_or_below is True for c in cells if c.way == way) for way in ways},
        with_biases={way: sum(c.with_biases is True for c in cells if c.way == way) for way in ways},
        least_accuracy=min(t.accuracy for t in trained),
        prunings=len(every),
        refused=sum(not pruned.holds for pruned in every),
        holds=all(pruned.holds for pruned in [*(r.best for r in results), *(pruned for own in examples.values() for _, pruned in own)]),
        theorems_hold=all(pruned.theorems_hold for pruned in every),
        smallest_slack=min(slacks, default=None),
        largest_slack=max(slacks, default=None),
        smallest_theorem_slack=min(theorem_slacks, default=None),
        largest_theorem_slack=max(theorem_slacks, default=None),
        largest_violation=max(violations, default=None),
        files=tuple(f"{NAME}.{ending}" for ending in ("jsonl", "json", "png", "svg")),
    )


def _order(key: tuple[int, str, int, str]) -> tuple[int, int, int, int]:
    h, training, repeat, way = key
    return list(TRAININGS).index(training), h, repeat, ("", *WAYS, _EXAMPLE).index(way)


def _cell(own: Sequence[Result], networks: Sequence[Trained]) -> Cell:
    first = own[0]
    kept = [r.best.nonzeros if r.reached else n.nonzeros for r, n in zip(own, networks, strict=True)]
    medians = _medians(kept)
    biases = _medians([tuple(layer.biases for layer in r.best.layers) for r in own])
    published = PUBLISHED.get((first.hidden, first.training))
    return Cell(
        hidden=first.hidden,
        training=first.training,
        way=first.way,
        repeats=len(own),
        reached=sum(r.reached for r in own),
        nonzeros=medians,
        biases=biases,
        least=min(counts[1] for counts in kept),
        most=max(counts[1] for counts in kept),
        rd=statistics.median(r.best.rd for r in own),
        rd_heldout=statistics.median(r.best.rd_heldout for r in own),
        accuracy=statistics.median(r.best.accuracy for r in own),
        accuracy_heldout=statistics.median(r.best.accuracy_heldout for r in own),
        published=None if published is None else published[1],
        at_or_below=None if published is None else medians[1] <= published[1][1],
        with_biases=None if published is None else medians[1] + biases[1] <= published[1][1],
    )


def _example(training: str, own: Sequence[tuple[Trained, Pruned]]) -> Example:
    prunings = [pruned for _, pruned in own]
    return Example(
        training=training,
        repeats=len(own),
        epsilon=EXAMPLE_EPSILON,
        gamma=spiral_pruning.GAMMA,
        kappa=EXAMPLE_KAPPA,
        kappa_reached=sum(p.rd <= (p.layers[-1].tolerance or 0.0) * (1 + 1e-6) for p in prunings),
        trained=_medians([network.nonzeros for network, _ in own]),
        nonzeros=_medians([p.nonzeros for p in prunings]),
        rd=statistics.median(p.rd for p in prunings),
        rd_heldout=statistics.median(p.rd_heldout for p in prunings),
    )


def _medians(counts: Sequence[Sequence[int]]) -> tuple[float, ...]:
    return tuple(float(statistics.median(column)) for column in zip(*counts, strict=True))
