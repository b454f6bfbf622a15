"""One budget shared out over layers, so that the network's outputs move least: from error-against-density curves of the layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .methods import Magnitude, Method, NetTrim
from .preimage import nearest_point
from .program import LayerProgram, standardise
from .solvers import l0
from .status import InvalidInput
from .tasks import LayerTask

DENSITIES = (0.9, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.055, 0.035, 0.022, 0.014, 0.009, 0.006, 0.004)
CURVE_ROWS = 2048  # most rows of a layer that its curve is measured on
TARGETS = ("parameters", "bytes", "macs")


@dataclass(frozen=True)
class Curve:
    """For one layer: how far the network's outputs move, squared, when ``kept`` of its ``weights`` stay; what one weight ``cost``s."""

    name: str
    weights: int
    cost: float
    kept: tuple[int, ...]
    errors: tuple[float, ...]

    def fine(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Counts from 1 to all, closely spaced in the logarithm, and the errors between the measured ones (linear in the logarithms)."""
        order = np.argsort(self.kept)
        k, e = np.asarray(self.kept)[order], np.maximum(np.asarray(self.errors)[order], 1e-300)
        e = np.minimum.accumulate(e)  # a rough solve may be worse with more weights; a good one is not
        counts = np.unique(np.concatenate([np.round(np.geomspace(1, self.weights, 600)), k, [self.weights]])).astype(np.int64)
        x, y = np.log(k), np.log(e)
        found = np.exp(np.interp(np.log(counts), x, y))
        if len(k) > 1:  # below the sparsest measured: as steep as there
            below = counts < k[0]
            found[below] = np.exp(y[0] + (np.log(counts[below]) - x[0]) * min(0.0, (y[1] - y[0]) / (x[1] - x[0])))
        beyond = counts > k[-1]
        found[beyond] = e[-1] * (self.weights - counts[beyond]) / max(self.weights - k[-1], 1)
        return counts, found


def error_curve(method: Method, task: LayerTask, name: str, cost: float) -> Curve:
    """Measures a layer's curve: for Net-Trim by one warm-started path from dense to sparse, for other methods by solving at each density.

    Errors are sums over outputs of importance times mean squared distance; without importance, of squared relative distances.
    """
    total = task.weights.numel()
    kept = sorted({max(1, round(share * total)) for share in DENSITIES}, reverse=True)
    errors = np.zeros(len(kept))
    for program in task.programs:
        if not program.weights.numel():
            continue
        own = [max(1, round(k * program.weights.numel() / total)) for k in kept]
        errors += _errors(method, program, own)
    largest = float(np.finfo(np.float64).max)  # stands for errors beyond it
    return Curve(name, total, cost, tuple(kept), tuple(float(value) for value in np.nan_to_num(errors, nan=largest, posinf=largest)))


def _errors(method: Method, program: LayerProgram, kept: Sequence[int]) -> NDArray[np.float64]:
    h = program.importance
    if isinstance(method, NetTrim):
        standard = standardise(program, ridge=method.ridge, shuffled=True, rough=True, weighted=True)
        distances = np.asarray(l0.path(standard, kept))
        return _relative(distances, program) if h is None else np.square(distances) * (float(h.mean()) / program.rows)
    found = []
    for k in kept:
        solution = method.solve(program, 1 - k / program.weights.numel())
        Z = program.preactivation(solution.weights, solution.bias)
        square = (Z - nearest_point(Z, program.lo, program.hi)).square().sum(0)
        found.append(math.sqrt(float(square.sum())) if h is None else float((h * square).sum()) / program.rows)
    return _relative(np.asarray(found), program) if h is None else np.asarray(found)


def _relative(distances: NDArray[np.float64], program: LayerProgram) -> NDArray[np.float64]:
    """Squared relative distances; none where the reference output is zero, which weights of zero give as well."""
    norm = program.reference_norm
    return np.square(distances / norm) if norm > 0 else np.zeros_like(distances)


def shared(curves: Sequence[Curve], budget: float) -> dict[str, int]:
    """How many weights each layer keeps: least sum of errors among those whose costs add up to at most ``budget``, by a common price for
    a unit of cost (Lagrangian; each layer's part is found on its own). What rounding leaves of the budget goes where it gains most."""
    fine = {curve.name: (*curve.fine(), curve.cost) for curve in curves}

    def at(price: float) -> dict[str, int]:
        return {name: int(k[np.argmin(e + price * cost * k)]) for name, (k, e, cost) in fine.items()}

    def spent(kept: Mapping[str, int]) -> float:
        return sum(fine[name][2] * k for name, k in kept.items())

    low, high = -200.0, 200.0  # logarithms of the price
    for _ in range(120):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(at(math.exp(middle))) > budget else (low, middle)
    kept = at(math.exp(high))
    while True:
        left = budget - spent(kept)
        gains = []
        for name, (k, e, cost) in fine.items():
            room = min(math.floor(left / cost + 1e-9), int(k[-1]) - kept[name])
            if room > 0:
                gained = float(np.interp(kept[name], k, e) - np.interp(kept[name] + room, k, e))
                gains.append((gained / (room * cost), name, room))
        if not gains:
            return kept
        _, name, room = max(gains)
        kept[name] += room


def by_magnitude(weights: Mapping[str, Tensor], costs: Mapping[str, float], budget: float) -> dict[str, int]:
    """How many weights each layer keeps when the largest magnitudes of all layers stay: magnitude pruning with one threshold.

    A layer that would lose all of them keeps one; that can exceed the budget by one weight of each layer.
    """
    names = list(weights)
    magnitudes = torch.cat([weights[name].detach().double().abs().flatten().cpu() for name in names])
    owners = torch.cat([torch.full((weights[name].numel(),), index) for index, name in enumerate(names)])
    order = magnitudes.argsort(descending=True, stable=True)
    spent = torch.tensor([costs[name] for name in names], dtype=torch.float64)[owners[order]].cumsum(0)
    kept = torch.bincount(owners[order[: int((spent <= budget * (1 + 1e-12)).sum())]], minlength=len(names))
    return {name: max(1, int(count)) for name, count in zip(names, kept, strict=True)}


def check_budget(costs: Mapping[str, float], budget: float, target: str) -> None:
    """Refuses a budget that does not leave one weight in each layer."""
    least = sum(costs.values())
    if least > budget:
        raise InvalidInput(
            f"allocation='global': the sparsity leaves {budget:.4g} {target}, but one weight in each of the {len(costs)} layers takes "
            f"{least:.4g}; lower the sparsity, or leave layers out with ignore="
        )


def check_allocation(method: Method, allocation: object, target: object, sweeps: object, scheme: str) -> None:
    """Refuses settings that do not go together."""
    own = type(method).__name__
    if allocation not in ("uniform", "global"):
        raise InvalidInput(f"allocation must be 'uniform' or 'global', found {allocation!r}")
    if target not in TARGETS:
        raise InvalidInput(f"target must be one of {', '.join(map(repr, TARGETS))}, found {target!r}")
    if allocation == "uniform" and target != "parameters":
        raise InvalidInput(f"target={target!r} says what a sparsity counts over all layers: it needs allocation='global'")
    if allocation == "global" and (method.kind != "sparsity" or isinstance(method.targets, Mapping) or method.chosen.kind):
        found = f"pattern {method.chosen.name!r}" if method.chosen.kind else f"{method.kind} {method.targets!r}"
        raise InvalidInput(f"allocation='global' shares one sparsity, a number without a pattern, out over the layers; {own} has {found}")
    if isinstance(sweeps, bool) or not isinstance(sweeps, int) or sweeps < 0:
        raise InvalidInput(f"sweeps must be a whole number of at least 0, found {sweeps!r}")
    if sweeps and (scheme != "cascade" or not method.weighs_outputs or method.correction != 1):
        raise InvalidInput(
            "sweeps solve the layers again by what each output counts for in the pruned network: they need scheme='cascade' and "
            f"NetTrim(sparsity=..., norm='l0') with importance='output' and correction 1; found {own} ({method.kind}), scheme={scheme!r}"
        )


def is_ranked(method: Method) -> bool:
    """Whether the budget is shared by one threshold on all layers' weights, as published for that method."""
    return isinstance(method, Magnitude)
