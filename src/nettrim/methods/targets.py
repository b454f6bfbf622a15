"""Targets that are a number or a mapping from layer name (or ``re:pattern``) to number."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TypeVar

from ..status import InvalidInput

T = TypeVar("T")
PerLayer = float | Mapping[str, float]


def check_target(method: str, kind: str, target: PerLayer) -> None:
    """Refuses a sparsity outside [0, 1), and an epsilon or penalty that is negative or not finite."""
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
        raise InvalidInput(f"{method}: {label} is the fraction of zeros and must lie in [0, 1), found {value}")
    if value < 0:
        raise InvalidInput(f"{method}: {label} must be >= 0, found {value}")


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
