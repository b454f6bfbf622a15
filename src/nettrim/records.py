"""Plain-data records read back from JSON: every field present, of the declared type, and finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from .status import InvalidInput

R = TypeVar("R")
_KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,), "None": (type(None),)}


def build(cls: type[R], data: Any, **made: Any) -> R:
    """The dataclass ``cls`` from a mapping; ``made`` are fields that the caller has built already.

    Fields declared as ``int``, ``float``, ``str``, ``bool`` (or one of them ``| None``) are checked; keys that are no field are left out.

    Raises:
        InvalidInput: not a mapping, a field that is missing, or one of another type or not finite.
    """
    if not isinstance(data, Mapping):
        raise InvalidInput(f"{cls.__name__}: it must be an object, found {type(data).__name__}; the file is damaged")
    values = dict(made)
    for field in fields(cls):  # type: ignore[arg-type]
        if field.name in values:
            continue
        if field.name not in data:
            if field.default is MISSING and field.default_factory is MISSING:
                raise InvalidInput(f"{cls.__name__}: {field.name} is missing; the file is damaged")
            continue
        value = data[field.name]
        kinds = [_KINDS.get(part.strip()) for part in str(field.type).split("|")]
        if all(kinds) and not any(_fits(value, kind) for kind in kinds if kind):
            raise InvalidInput(f"{cls.__name__}: {field.name} must be {field.type}, found {value!r}; the file is damaged")
        values[field.name] = value
    return cls(**values)


def items(data: Any, key: str) -> list[Any]:
    """The list at ``key`` of a mapping.

    Raises:
        InvalidInput: there is none.
    """
    value = data.get(key) if isinstance(data, Mapping) else None
    if not isinstance(value, (list, tuple)):
        raise InvalidInput(f"{key} must be a list, found {type(value).__name__}; the file is damaged")
    return list(value)


def _fits(value: object, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool):  # a bool is an int to Python, not to a record
        return bool in kinds
    return isinstance(value, kinds) and not (isinstance(value, float) and not math.isfinite(value))
