"""Targets that are a number or a mapping from layer name (or ``re:pattern``) to number, and what they leave of a layer's weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from ..patterns import Pattern
from ..status import InvalidInput

T = TypeVar("T")
PerLayer = float | Mapping[str, float]


def check_target(method: str, kind: str, target: PerLayer) -> None:
    """Refuses a sparsity or an epsilon outside [0, 1), and a penalty that is negative or not finite."""
    if isinstance(target, Mapping):
        if not target:
            raise InvalidInput(f"{method}: {kind} is an empty mapping; name at least one layer")
        for layer, value in target.items():
            _check_number(method, f"{kind}[{layer!r}]", kind, value)
    else:
        _check_number(method, kind, kind, target)


def _check_number(method: str, label: str, kind: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidInput(f"{method}: {label} must be a finite number, found {value!r}")
    if kind == "sparsity" and not 0 <= value < 1:
        raise InvalidInput(f"{method}: {label} is the fraction of zeros and must lie in [0, 1), found {value}{_percent(kind, value)}")
    if kind == "epsilon" and value >= 1:
        raise InvalidInput(
            f"{method}: {label} is the share of its norm by which a layer's output may move and must lie in [0, 1), found {value}, "
            f"which allows it to vanish{_percent(kind, value)}"
        )
    if value < 0:
        raise InvalidInput(f"{method}: {label} must be >= 0, found {value}")


def _percent(kind: str, value: float) -> str:
    """How a number that was meant as one of per cent is written, as the end of a sentence."""
    return f"; for {value:g} % write {kind}={value / 100:g}" if 1 < value < 100 else ""


def numbers(target: PerLayer) -> list[float]:
    """All numbers of a target."""
    return [float(value) for value in (target.values() if isinstance(target, Mapping) else (target,))]


def target_for(target: PerLayer, layer: str) -> float | None:
    """The number for that layer; ``None`` when a mapping does not name it."""
    value = lookup(target, layer) if isinstance(target, Mapping) else target
    return None if value is None else float(value)


def lookup(mapping: Mapping[str, T], layer: str) -> T | None:
    """The entry of a layer: exact names come before ``re:pattern``; ``None`` when neither names it."""
    if layer in mapping:
        return mapping[layer]
    return next((value for key, value in mapping.items() if key.startswith("re:") and re.fullmatch(key[3:], layer)), None)


def kept_weights(count: int, sparsity: float) -> int:
    """How many of ``count`` weights stay: the nearest whole number to ``(1 - sparsity) * count``."""
    return round((1 - sparsity) * count)


def weights_kept(method: str, pattern: Pattern, sparsity: float | None, layer: str, N: int, M: int) -> int:
    """How many of the weights (N, M) of a program of a layer may stay; with ``None``, as many as the pattern admits.

    Raises:
        InvalidInput: the pattern keeps whole groups, and none is as small as what should stay: nothing would be left of the layer.
    """
    if sparsity is None:
        return N * M
    kept = kept_weights(N * M, sparsity)
    _check_room(method, pattern, layer, kept, N, M)
    return kept


def shares(kept: int, sizes: Sequence[int]) -> list[int]:
    """``kept`` weights shared out over parts of a layer by their sizes; the shares add up exactly."""
    total, before = sum(sizes), 0
    found = []
    for size in sizes:
        found.append(round(kept * (before + size) / total) - round(kept * before / total))
        before += size
    return found


def takes_nothing(pattern: Pattern, kept: int, W: Tensor, groups: int) -> bool:
    """Whether weights ``W`` (N, M) of a layer are within a budget of ``kept`` as they are, and in the pattern."""
    if int((W != 0).sum()) > kept:
        return False
    parts = W.chunk(groups, dim=1)
    counts = shares(kept, [part.numel() for part in parts]) if pattern.kind else []
    return all(not bool(((part != 0) & ~pattern.mask(part, count)).any()) for part, count in zip(parts, counts, strict=False))


def check_room(method: str, pattern: Pattern, sparsity: float, layer: str, N: int, M: int, groups: int) -> None:
    """Refuses beforehand what :func:`weights_kept` would refuse of a layer (N, M), whose convolution groups share its count evenly."""
    _check_room(method, pattern, layer, kept_weights(N * M, sparsity) // groups, N, M // groups)


def _check_room(method: str, pattern: Pattern, layer: str, kept: int, N: int, M: int) -> None:
    least = pattern.least(N, M)
    if 0 < kept < least:
        raise InvalidInput(
            f"{method}: layer {layer!r}: its sparsity leaves {kept} of {N * M} weights, less than the smallest group of pattern "
            f"{pattern.name!r} ({least} weights), so nothing would stay (of a grouped convolution, each group is patterned by itself); "
            "lower its sparsity, choose smaller groups, or leave the layer out with ignore="
        )
