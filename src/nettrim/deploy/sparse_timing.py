"""Compares candidates by the clock: repeats are interleaved, so that what else the machine does meets all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

_K = TypeVar("_K")


def interleaved(candidates: Mapping[_K, Callable[[], Any]], budget: float, fewest: int = 5, most: int = 300) -> dict[_K, list[float]]:
    """Seconds of each run of each candidate, in rounds of one run of each, until ``budget`` seconds are spent on each on average.

    Every candidate runs twice beforehand.
    """
    found: dict[_K, list[float]] = {key: [] for key in candidates}
    with torch.inference_mode():
        for run in candidates.values():
            run()
            run()
        begun = time.perf_counter()
        for number in range(most):
            if number >= fewest and time.perf_counter() - begun > budget * len(candidates):
                break
            for key, run in candidates.items():
                started = time.perf_counter()
                run()
                found[key].append(time.perf_counter() - started)
    return found


def typical(seconds: list[float]) -> float:
    """The lower quartile: interruptions only ever add time, and the very fastest run is luck."""
    return sorted(seconds)[len(seconds) // 4]
