"""Settings by name alone: what a number means is said where it is given, and a misplaced one is answered with what could be meant."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeVar, dataclass_transform

from ..status import InvalidInput

T = TypeVar("T")

READINGS = {
    "sparsity": "that share of the weights becomes zero",
    "epsilon": "each layer's output may move by that share of its norm",
    "error": "each layer's response may move by that share of its norm",
}
"""The targets for which a bare number could stand, and what it would say of them."""


@dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(cls: type[T]) -> type[T]:
    """A frozen dataclass whose fields are given by name; anything else raises :class:`InvalidInput` and says what to write."""
    made = dataclass(frozen=True, kw_only=True)(cls)
    fill: Callable[..., None] = made.__init__
    takes = [name for name in inspect.signature(fill).parameters if name != "self"]

    @functools.wraps(fill)
    def by_name(self: Any, *values: Any, **given: Any) -> None:
        if values:
            raise InvalidInput(_misplaced(made.__name__, values, takes))
        for name in given:
            if name not in takes:
                near = get_close_matches(name, takes, n=1, cutoff=0.6)
                hint = f"; the nearest is {near[0]!r}" if near else ""
                raise InvalidInput(f"{made.__name__} has no setting {name!r}{hint} (settings: {', '.join(takes)})")
        fill(self, **given)

    made.__init__ = by_name  # type: ignore[method-assign]
    return made


def is_number(value: object) -> bool:
    """Whether a value could be a target: a number, or a mapping of numbers by layer."""
    if isinstance(value, Mapping):
        return bool(value) and all(is_number(item) for item in value.values())
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def readings(value: Any, takes: list[str]) -> list[tuple[str, str]]:
    """What a bare number could mean among the settings ``takes``: the setting written out, and what it says."""
    shares = value.values() if isinstance(value, Mapping) else [value]
    fits = {name: name != "sparsity" or all(0 <= share < 1 for share in shares) for name in READINGS}
    return [(f"{name}={value!r}", words) for name, words in READINGS.items() if name in takes and fits[name]]


def _misplaced(name: str, values: tuple[Any, ...], takes: list[str]) -> str:
    shown = ", ".join(text if len(text := repr(value)) <= 40 else type(value).__name__ for value in values)
    said = f"{name}({shown}): settings are given by name"
    found = readings(values[0], takes) if len(values) == 1 and is_number(values[0]) else []
    if found:
        return f"{said}; write " + ", or ".join(f"{name}({text}) ({words})" for text, words in found)
    if len(values) == 1 and isinstance(values[0], str) and "pattern" in takes:
        return f"{said}; write {name}(pattern={values[0]!r})"
    return f"{said} ({', '.join(takes)}), as in {name}({next((n for n in READINGS if n in takes), takes[0])}=...)"
