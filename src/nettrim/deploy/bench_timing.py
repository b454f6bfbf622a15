"""Seconds of several models on one batch, measured side by side so that none is favoured by what else the machine does."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

try:
    import resource
except ImportError:  # Windows does not tell
    resource = None  # type: ignore[assignment]

ROUNDS = 10
WARM_UP = 3
PATIENCE = 4
"""A turn ends after so many times its measured seconds, however often it was interrupted."""


@dataclass
class Passes:
    """Seconds of single passes, in order of time: the undisturbed ones, and those from which the system took a processor away meanwhile."""

    clear: list[float] = field(default_factory=list)
    interrupted: list[float] = field(default_factory=list)

    @property
    def enough(self) -> bool:
        """Whether there are enough undisturbed ones to go by."""
        return len(self.clear) >= ROUNDS

    @property
    def counted(self) -> list[float]:
        """The undisturbed ones; all where those are too few."""
        return self.clear if self.enough else [*self.clear, *self.interrupted]


def side_by_side(runs: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, Passes]:
    """Passes of each candidate: at least ``seconds`` of them and at least ``ROUNDS``.

    After a warm-up there are ``ROUNDS`` rounds. In each, every candidate has its turn of at least ``seconds / ROUNDS``, in an order
    that moves on from round to round, so that slow phases of the machine meet all alike. A turn begins with a pass that is not measured:
    the caches hold another's weights. Gradients and Python's garbage collection are off.

    On a busy machine long passes are interrupted and short ones are not, which would make ratios of the two too large; so the system's
    count of involuntary context switches tells interrupted passes apart, and turns go on until they have their seconds without them,
    as far as ``PATIENCE`` goes.
    """
    names, turn = list(runs), seconds / ROUNDS
    found = {name: Passes() for name in names}
    collecting = gc.isenabled()
    with torch.inference_mode():
        for run in runs.values():
            for _ in range(WARM_UP):
                run()
        gc.collect()
        gc.disable()
        try:
            for number in range(ROUNDS):
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


def _interruptions() -> int:
    """How often the system has taken a processor away from this process, all threads together; 0 where it does not tell."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
