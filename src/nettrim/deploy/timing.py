"""The one clock of accelerate and bench: candidates measured side by side, so that none is favoured by what else the machine does."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any, TypeVar

import torch

from ..progress import Advance, silent

try:
    import resource
except ImportError:  # Windows does not tell
    resource = None  # type: ignore[assignment]

K = TypeVar("K")

ROUNDS = 10
WARM_UP = 3
PATIENCE = 4
"""A turn ends after so many times its measured seconds, however often it was interrupted."""
CHANCE = 0.05


@dataclass
class Passes:
    """Seconds of single passes, in order of time: the undisturbed ones, and those from which the system took a processor away meanwhile.

    ``turns`` are the medians of each turn's passes, the undisturbed ones where it has any. ``rounds`` were to be run.
    """

    clear: list[float] = field(default_factory=list)
    interrupted: list[float] = field(default_factory=list)
    turns: list[float] = field(default_factory=list)
    rounds: int = ROUNDS

    @property
    def enough(self) -> bool:
        """Whether there are enough undisturbed ones to go by."""
        return len(self.clear) >= self.rounds

    @property
    def counted(self) -> list[float]:
        """The undisturbed ones; all where those are too few."""
        return self.clear if self.enough else [*self.clear, *self.interrupted]

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Of those that count: the lower quartile, the median, the upper quartile."""
        counted = self.counted
        lower, median, upper = quantiles(counted, n=4, method="inclusive") if len(counted) > 1 else counted * 3
        return lower, median, upper

    @property
    def median(self) -> float:
        """What the passes are summed up as."""
        return self.quartiles[1]


def faster_in(ours: Passes, theirs: Passes) -> tuple[int, int]:
    """In how many rounds ours was the faster of the two, and the number of rounds."""
    pairs = list(zip(ours.turns, theirs.turns, strict=True))
    return sum(a < b for a, b in pairs), len(pairs)


def apart(ours: Passes, theirs: Passes) -> bool:
    """Whether two candidates differ by more than noise: one was faster in so many rounds as by chance happens in at most one of 20 cases
    (the sign test, two-sided)."""
    wins, rounds = faster_in(ours, theirs)
    extreme = min(wins, rounds - wins)
    likely: int = 2 * sum(math.comb(rounds, k) for k in range(extreme + 1))
    return likely <= CHANCE * float(2**rounds)


def side_by_side(runs: Mapping[K, Callable[[], Any]], seconds: float, rounds: int = ROUNDS, tell: Advance = silent) -> dict[K, Passes]:
    """Passes of each candidate: at least ``seconds`` of them and at least ``rounds``.

    After a warm-up of up to three passes there are ``rounds`` rounds. In each, every candidate has its turn of at least
    ``seconds / rounds``, in an order that moves on from round to round, so that slow phases of the machine meet all alike. A turn begins
    with a pass that is not measured: the caches hold another's weights. Gradients and Python's garbage collection are off.

    On a busy machine long passes are interrupted and short ones are not, which would make ratios of the two too large; so the system's
    count of involuntary context switches tells interrupted passes apart, and turns go on until they have their seconds without them,
    as far as ``PATIENCE`` goes. ``tell`` hears of each round before it begins: nothing is drawn while a pass is timed.
    """
    names, turn = list(runs), seconds / rounds
    found = {name: Passes(rounds=rounds) for name in names}
    collecting = gc.isenabled()
    with torch.inference_mode():
        for run in runs.values():
            started = time.perf_counter()
            for _ in range(WARM_UP):
                run()
                if time.perf_counter() - started >= seconds:  # one pass is enough where passes are long
                    break
        gc.disable()
        try:
            for number in range(rounds):
                tell(number, rounds, "timing whole passes")
                first = number % len(names)
                for name in names[first:] + names[:first]:
                    _turn(runs[name], turn, found[name])
        finally:
            if collecting:
                gc.enable()
    return found


def _turn(run: Callable[[], Any], least: float, passes: Passes) -> None:
    """Runs until ``least`` seconds are measured, at least once."""
    if not passes.counted or passes.counted[-1] < least:  # a run that is longer than a turn warms the caches itself
        run()
    clear = spent = 0.0
    before_turn = len(passes.clear), len(passes.interrupted)
    while not spent or (clear < least and spent < PATIENCE * least):
        before = _interruptions()
        started = time.perf_counter()
        run()
        passed = time.perf_counter() - started
        spent += passed
        if _interruptions() == before:
            passes.clear.append(passed)
            clear += passed
        else:
            passes.interrupted.append(passed)
    passes.turns.append(median(passes.clear[before_turn[0] :] or passes.interrupted[before_turn[1] :]))


def _interruptions() -> int:
    """How often the system has taken a processor away from this process, all threads together; 0 where it does not tell."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
