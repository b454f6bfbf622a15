"""The budget solver's design choices, measured one at a time: CPU time against the distance reached, from which its defaults are taken.

    OMP_NUM_THREADS=1 python benchmarks/solver_study.py --mnist DIR --fashion DIR

Programs: six convolutions of the residual network as the cascade at 90 % meets them (inputs of the network pruned so far, targets of the
trained one) and the first two layers of the MNIST network, each with as many rows again that no solve sees. The loop below is that of
`nettrim.solvers.l0.within_budget` with everything settable; that it is the same one is checked in every run. The base of all variants is
the solver's own settings, except that noise ends the iteration only after a check that found less than 2 % of the support changed. A
distance is that of the weights as stored, without ridge; "above best" compares with the lowest distance that any variant found for that
program and sparsity (variants of the ridge to the original weights minimise something else and do not count). CPU seconds are those of
loop and polish; what the Gram matrix and its eigendecomposition take, the same for all variants, is given by itself.

Results go to benchmarks/results/solver_study.json and solver_study.png; the conclusions are in docs/solver_study.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from single_layers import RESULTS, mnist_layers
from torch import Tensor

import nettrim
from nettrim.experiments import datasets, zoo_training
from nettrim.methods import NetTrim
from nettrim.patterns import UNSTRUCTURED
from nettrim.program import LayerProgram, StandardProgram, standardise
from nettrim.solution import Solution, Watch
from nettrim.solvers import l0
from nettrim.solvers.admm import GramADMM
from nettrim.solvers.l0 import BRISK, CAREFUL, Schedule
from nettrim.solvers.polish import polish

NETWORK, CASCADE = "resnet20_b", 0.9
CONVOLUTIONS = ("stage1.0.conv2", "stage1.2.conv1", "stage2.0.conv1", "stage2.0.conv2", "stage2.2.conv1", "stage3.0.conv2")
SPARSITIES = (0.6, 0.9, 0.97)
IMAGES, BATCH, ROWS = 500, 100, 5_000  # rows that solves see; as many are held out
NEURONS = 40  # of the first layer of the MNIST network: its 784 inputs are what is slow
MOST_STEPS = 500

SLOW = Schedule(0.02, ((0.1, 1.08), (0.005, 1.05), (0.0, 1.03)))
QUICKER = Schedule(0.05, ((0.1, 1.2), (0.005, 1.15), (0.0, 1.08)))
ALPS = Schedule(0.1, ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1)))
STILL = l0.NEARLY_STILL


@dataclass(frozen=True)
class Loop:
    """Settings of the iteration. ``first``: of the stage with targets that stay, ``None`` for none; ``schedule``: of the stage with
    targets that move, ``None`` for none. ``every``: the nearest points are taken anew in every so-manieth step of it only."""

    first: Schedule | None = l0.QUICK
    schedule: Schedule | None = CAREFUL
    most_parts: int = l0.MOST_PARTS
    rows_per_input: int = l0.ROWS_PER_INPUT
    curvature: float = l0.MOST_CURVATURE  # of a part, at most
    relaxation: float = l0.RELAXATION  # at most; and relaxation times curvature:
    stable: float = l0.STABLE
    every: int = 1
    still: float = STILL
    weight_ridge: float = l0.RIDGE
    own_ridge: float = NetTrim.ridge


@dataclass(frozen=True)
class Polish:
    """Settings of the polish; no rounds: none."""

    rounds: int = l0.POLISH[0]
    steps: int = l0.POLISH[1]
    gain: float = l0.POLISH_GAIN


@dataclass(frozen=True)
class Variant:
    """One choice of settings, in a group of such that differ in one thing."""

    group: str
    label: str
    loop: Loop = Loop()
    polish: Polish = Polish()


DEFAULT = Variant("base", "")
QUICK = Variant('effort="quick"', "", Loop(schedule=None), Polish(*l0.POLISH_QUICK))


def variants() -> list[Variant]:
    """The base, then every other value of each choice by itself."""
    found = [DEFAULT]
    schedules = {"slow": SLOW, "brisk": BRISK, "quicker": QUICKER, "ALPS's": ALPS}
    schedules |= {f"from {start:g}": replace(CAREFUL, start=start) for start in (0.03, 0.3, 1.0)}
    found += [Variant("schedule of the second stage", name, Loop(schedule=one)) for name, one in schedules.items()]
    firsts = {"none": None, "ALPS's": ALPS, "slow": l0.POINTS}
    found += [Variant("first stage", name, Loop(first=one)) for name, one in firsts.items()]
    low = replace(CAREFUL, start=0.03)
    found += [Variant("first stage", "none, second from 0.03", Loop(first=None, schedule=low))]
    found += [Variant("first stage", "slow, second from 0.03", Loop(first=l0.POINTS, schedule=low))]
    for last in (1.045, 1.085, 1.2):  # the factor when next to nothing changes
        found.append(
            Variant(
                "last factor of the second stage", f"{last:g}", Loop(schedule=replace(CAREFUL, growth=(*CAREFUL.growth[:2], (0.0, last))))
            )
        )
    found += [Variant("relaxation", f"{a:g}", Loop(relaxation=a)) for a in (1.0, 1.25, 1.8)]
    found += [Variant("relaxation times curvature, at most", f"{a:g}", Loop(stable=a)) for a in (1.0, 2.4, 10.0)]
    found += [Variant("parts of the rows, at most", str(n), Loop(most_parts=n)) for n in (1, 2, 4, 16)]
    found += [Variant("rows of a part, for each input", str(n), Loop(rows_per_input=n)) for n in (1, 3, 5)]
    found += [Variant("all rows in every r-th step", f"r = {n}", Loop(most_parts=1, every=n)) for n in (2, 4, 8)]
    for first, name in ((l0.QUICK, "quick"), (l0.POINTS, "slow")):
        for rounds, steps in ((1, 4), (2, 2), (2, 4), l0.POLISH):
            loop = Loop(first=first, schedule=None)
            found.append(Variant("no second stage; polish", f"{name}, {rounds} x {steps}", loop, Polish(rounds, steps)))
    found.append(QUICK)
    found += [Variant("support nearly still below", f"{share:g}", Loop(still=share)) for share in (0.1, 0.02)]
    shapes = [(0, 6), (1, 6), (2, 6), (12, 6), (6, 3), (6, 15), (12, 30)]
    found += [Variant("polish, rounds x steps", f"{a} x {b}", polish=Polish(rounds=a, steps=b)) for a, b in shapes]
    found += [Variant("polish, least gain", f"{gain:g}", polish=Polish(gain=gain)) for gain in (1e-2, 1e-3, 1e-4)]
    found += [Variant("ridge in the weight step", f"{size:g}", Loop(weight_ridge=size)) for size in (0.0, 0.001, 0.1)]
    found += [Variant("ridge to the original weights", f"{size:g}", Loop(own_ridge=size)) for size in (0.0, 1e-4, 1e-2)]
    return found


@dataclass(frozen=True)
class Layer:
    """A layer's program twice: on the rows that are solved for, and on rows that are held out."""

    name: str
    seen: LayerProgram
    unseen: LayerProgram


def halves(program: LayerProgram) -> tuple[LayerProgram, LayerProgram]:
    """The first and the second half of the rows: other images."""
    middle = len(program.inputs) // 2

    def part(rows: slice) -> LayerProgram:
        column = None if program.bias_column is None else program.bias_column[rows]
        inputs, lo, hi = program.inputs[rows], program.lo[rows], program.hi[rows]
        return replace(program, inputs=inputs, lo=lo, hi=hi, bias_column=column, rows=len(inputs))

    return part(slice(0, middle)), part(slice(middle, 2 * middle))


def cascade_layers(data: Path | None, wanted: Sequence[str], rows: int) -> list[Layer]:
    """Convolutions of the residual network in its cascade, which is solved on the rows that are seen."""
    dataset = datasets.load("fashion-mnist", data)
    network = zoo_training.trained(NETWORK, dataset, seed=0, cache=RESULTS / "cache")
    convolutions = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Conv2d)][1:]
    last = max(convolutions.index(name) for name in wanted)
    found = []

    class Recorder(NetTrim):
        """Keeps the programs that it is given."""

        def solve(self, program: LayerProgram, target: float, watch: Watch | None = None) -> Solution:
            seen, unseen = halves(program)
            if program.name in wanted:
                found.append(Layer(program.name, seen, unseen))
            solution = super().solve(seen, target, watch)
            return replace(solution, distance=program.distance(solution.weights, solution.bias))

    batches = list(torch.split(dataset.train_images[:IMAGES], BATCH))
    nettrim.prune(network, batches, Recorder(sparsity=CASCADE), layers=convolutions[: last + 1], max_samples=2 * rows, progress=False)
    return found


def mnist_programs(data: Path | None, rows: int, neurons: int = NEURONS) -> list[Layer]:
    """The first layer of the MNIST network (some neurons of it) and the second, on the trained network's own inputs."""
    found = []
    for layer in mnist_layers(data, images=2 * rows)[:2]:
        p, some = layer.program, slice(0, neurons if layer.name == "mnist 1" else None)
        assert p.bias is not None
        p = replace(p, lo=p.lo[:, some], hi=p.hi[:, some], weights=p.weights[:, some], bias=p.bias[some])
        found.append(Layer(layer.name, *halves(p)))
    return found


@dataclass(frozen=True)
class Found:
    """Where a loop ended."""

    D: Tensor
    c: Tensor | None
    mask: Tensor
    iterations: int
    settled: bool
    seconds: float


def iterate(p: StandardProgram, k: int, settings: Loop) -> Found:
    """The stages of `l0.within_budget` with other settings."""
    start = time.process_time()
    loop = GramADMM(p, p.U0, relaxation=l0.RELAXATION)
    loop.refresh()
    mask = UNSTRUCTURED.mask(p.U0, k, p.live)
    loop.D = p.U0 * mask
    iterations, settled = 0, True
    if settings.first is not None:
        mask, iterations, settled = run_stage(loop, mask, k, settings, settings.first, 0)
    if settings.schedule is not None:
        P, N = p.A.shape
        parts = max(1, min(settings.most_parts, P // max(l0.LEAST_ROWS, settings.rows_per_input * N)))
        size = 1.0
        while parts > 1 and settings.curvature < math.inf and (size := l0.curvature(p, parts)) > settings.curvature:
            parts //= 2
        loop.relaxation = settings.relaxation if parts == 1 else min(settings.relaxation, max(1.0, settings.stable / size))
        loop.V.zero_()
        mask, further, settled = run_stage(loop, mask, k, settings, settings.schedule, parts)
        iterations += further
    return Found(loop.D, loop.c, mask, iterations, settled, time.process_time() - start)


def run_stage(loop: GramADMM, mask: Tensor, k: int, settings: Loop, schedule: Schedule, parts: int) -> tuple[Tensor, int, bool]:
    """One stage, with targets that move by that many parts of the rows; none: with targets that stay."""
    p, pace = loop.program, loop.relaxation / l0.RELAXATION
    beta, iteration, settled = schedule.start, 0, False

    def keep(V: Tensor) -> Tensor:
        nonlocal mask
        mask = UNSTRUCTURED.mask(V, k, p.live)
        return V * mask

    previous, least, stale = mask, 1.0, 0
    while iteration < MOST_STEPS and not settled:
        if parts and iteration % settings.every == 0:
            loop.refresh(iteration // settings.every % parts, parts)
        iteration += 1
        loop.majorised_step(keep, beta, settings.weight_ridge)
        if iteration % l0.CHECK_EVERY:
            continue
        changed = int((mask & ~previous).sum()) / max(k, 1)
        previous = mask
        factor = next(growth for share, growth in schedule.growth if changed > share or share == 0.0) ** pace
        stale = 0 if changed < l0.FALLS * least else stale + 1
        least = min(least, changed)
        settled = changed == 0.0 or (parts > 1 and stale >= l0.PATIENCE and least < settings.still)
        beta *= factor
        loop.V /= factor
    return mask, iteration, settled


def finish(p: StandardProgram, found: Found, settings: Polish) -> tuple[Tensor, Tensor | None, float]:
    """The polished weights and bias as stored, and the CPU seconds of the polish."""
    start = time.process_time()
    U, c, _ = polish(p, found.D, found.c, support=found.mask, rounds=settings.rounds, steps=settings.steps, tolerance=settings.gain)
    seconds = time.process_time() - start
    return *p.restore(U, c), seconds


def check_same_loop(p: StandardProgram, k: int) -> None:
    """Refuses to go on when the loop here, with the defaults or the quick effort's settings, is not the solver's any more."""
    for variant in (DEFAULT, QUICK):
        own, _, _ = finish(p, iterate(p, k, variant.loop), variant.polish)
        theirs = l0.within_budget(p, k, max_iterations=MOST_STEPS, quick=variant is QUICK)
        if not torch.equal(own, p.restore(theirs.U, theirs.c)[0]):
            raise SystemExit(f"the study's loop ({variant.group}) does not give what nettrim.solvers.l0 gives: bring it up to date")


def measured(layer: Layer, sparsities: Sequence[float], chosen: Sequence[Variant]) -> Iterator[dict[str, Any]]:
    """Every variant on one layer. Loops that several variants share are run once; so are Gram matrices."""
    standard: dict[float, tuple[StandardProgram, float]] = {}
    for ridge in sorted({variant.loop.own_ridge for variant in chosen}, key=lambda size: size != DEFAULT.loop.own_ridge):
        start = time.process_time()
        standard[ridge] = standardise(layer.seen, power=1.0, ridge=ridge, shuffled=True, rough=True), 0.0
        standard[ridge] = standard[ridge][0], time.process_time() - start
    for sparsity in sparsities:
        k = round((1 - sparsity) * layer.seen.weights.numel())
        loops: dict[Loop, Found] = {}
        for variant in chosen:
            p, prepared = standard[variant.loop.own_ridge]
            if variant.loop not in loops:
                loops[variant.loop] = iterate(p, k, variant.loop)
            found = loops[variant.loop]
            W, b, seconds = finish(p, found, variant.polish)
            yield {
                "layer": layer.name,
                "shape": list(layer.seen.shape),
                "sparsity": sparsity,
                "group": variant.group,
                "variant": variant.label,
                "iterations": found.iterations,
                "settled": found.settled,
                "distance": layer.seen.distance(W, b),
                "unseen": layer.unseen.distance(W, b),
                "loop_seconds": found.seconds,
                "polish_seconds": seconds,
                "prepared_seconds": prepared,
            }


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each variant, over all programs: geometric means against the best (of all, and by sparsity), worst case, iterations, CPU seconds.

    ``time`` and ``unseen`` are shares of the base's: sums for the first, the geometric mean for the second.
    """
    best: dict[tuple[str, float], float] = {}
    default: dict[tuple[str, float], dict[str, Any]] = {}
    for row in rows:
        place = row["layer"], row["sparsity"]
        if row["group"] != "ridge to the original weights":
            best[place] = min(best.get(place, math.inf), row["distance"])
        if row["group"] == DEFAULT.group:
            default[place] = row
    found = []
    for group, label in dict.fromkeys((row["group"], row["variant"]) for row in rows):
        own = [row for row in rows if (row["group"], row["variant"]) == (group, label)]
        above = [row["distance"] / best[row["layer"], row["sparsity"]] for row in own]
        at: dict[str, list[float]] = {}
        for row, factor in zip(own, above, strict=True):
            at.setdefault(f"{row['sparsity']:g}", []).append(factor)
        unseen = [row["unseen"] / default[row["layer"], row["sparsity"]]["unseen"] for row in own]
        seconds = sum(row["loop_seconds"] + row["polish_seconds"] for row in own)
        base = sum(row["loop_seconds"] + row["polish_seconds"] for row in default.values())
        found.append(
            {
                "group": group,
                "variant": label,
                "above_best": mean(above) - 1,
                "above_best_at": {sparsity: mean(factors) - 1 for sparsity, factors in at.items()},
                "worst": max(above) - 1,
                "unseen": mean(unseen),
                "iterations": sum(row["iterations"] for row in own) / len(own),
                "cpu_seconds": seconds,
                "time": seconds / base,
                "polish_share": sum(row["polish_seconds"] for row in own) / seconds,
            }
        )
    return found


def mean(values: Sequence[float]) -> float:
    """The geometric mean."""
    return math.exp(sum(math.log(value) for value in values) / len(values))


def above(share: float) -> str:
    """As a percentage; as a factor where the solver went astray."""
    return f"{share:.2%}" if share < 10 else f"{1 + share:.0e} x"


def table(rows: Sequence[dict[str, Any]]) -> Table:
    found = summary(rows)
    out = Table(title="the budget solver's choices, one at a time; time and unseen in the base's")
    out.add_column("choice", no_wrap=True)
    out.add_column("value", no_wrap=True)
    for name in (
        "above best",
        *(f"at {float(sparsity):.0%}" for sparsity in found[0]["above_best_at"]),
        "worst",
        "unseen",
        "steps",
        "CPU s",
        "time",
        "polish",
    ):
        out.add_column(name, justify="right")
    group = ""
    for one in found:
        if one["group"] != group and group:
            out.add_section()
        cells = [one["group"] if one["group"] != group else "", one["variant"], above(one["above_best"])]
        cells += [above(factor) for factor in one["above_best_at"].values()]
        cells += [above(one["worst"]), f"{one['unseen']:.4f}", f"{one['iterations']:.0f}", f"{one['cpu_seconds']:.1f}"]
        out.add_row(*cells, f"{one['time']:.2f}", f"{one['polish_share']:.0%}")
        group = one["group"]
    return out


def figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Distance above the best against CPU time, a panel for each choice, the base in all."""
    matplotlib.rcParams.update({"font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False})
    found = summary(rows)
    groups = [group for group in dict.fromkeys(one["group"] for one in found) if group != DEFAULT.group]
    default = found[0]
    out = Figure(figsize=(13, 6.2), layout="constrained")
    panels = out.subplots(2, math.ceil(len(groups) / 2)).ravel()
    for axes, group in zip(panels, groups, strict=False):
        unseen = group == "ridge to the original weights"
        own = [default, *(one for one in found if one["group"] == group)]
        for one in own:
            height = 100 * (one["unseen"] - 1 if unseen else one["above_best"])
            axes.plot(one["time"], height, "s" if one is default else "o", color="#b4541a" if one is default else "#1f5fa8")
            axes.annotate("base" if one is default else one["variant"], (one["time"], height), (4, 4), textcoords="offset points")
        axes.set_title(textwrap.fill(group, 32))
        if not unseen and max(one["above_best"] for one in own) > 1:  # some variant went astray
            axes.set_yscale("log")
        axes.set_xlabel("CPU time, base 1")
        axes.set_ylabel("% of distance above the base's, unseen rows" if unseen else "% of distance above the best known")
        axes.grid(alpha=0.3)
        axes.margins(0.18)
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, default=None, help="folder with the MNIST files")
    parser.add_argument("--fashion", type=Path, default=None, help="folder with the Fashion-MNIST files")
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument("--rows", type=int, default=ROWS, help="of each program; as many are held out")
    parser.add_argument("--quick", action="store_true", help="two small programs at one sparsity; nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(1)  # CPU seconds of one thread
    console = Console(stderr=True)
    if options.quick:
        options.sparsities, options.rows = [0.9], 2_000
        layers = [*cascade_layers(options.fashion, CONVOLUTIONS[:1], options.rows), mnist_programs(options.mnist, options.rows)[1]]
    else:
        layers = [*cascade_layers(options.fashion, CONVOLUTIONS, options.rows), *mnist_programs(options.mnist, options.rows)]
    console.print(f"{len(layers)} programs, made in {time.process_time():.0f} CPU seconds")
    chosen = variants()
    first = layers[0].seen
    check_same_loop(standardise(first, power=1.0, ridge=NetTrim.ridge, shuffled=True, rough=True), round(0.1 * first.weights.numel()))
    facts: dict[str, Any] = {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "settings": [asdict(one) for one in chosen]}
    rows: list[dict[str, Any]] = []
    for layer in layers:
        rows += measured(layer, options.sparsities, chosen)
        console.print(f"{layer.name}: {layer.seen.shape}, {time.process_time():.0f} CPU seconds so far")
        if not options.quick:
            (RESULTS / "solver_study.json").write_text(json.dumps(facts | {"summary": summary(rows), "rows": rows}, indent=1) + "\n")
    if not options.quick:
        figure(rows).savefig(RESULTS / "solver_study.png", dpi=150)
    Console(width=170).print(table(rows))


if __name__ == "__main__":
    main()
