"""Plain-data records as JSON, and read back from it: every field present, of the declared type, finite, and of a possible sign."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from .status import InvalidInput

R = TypeVar("R")
LARGEST_FILE = 2**28
"""Bytes: what a JSON file of nettrim's may have at most (its own have some kilobytes a layer)."""
LARGEST_INTEGER = 2**63
SIGNED = frozenset({"gap"})
"""Numbers that may lie below 0 (a duality gap, by rounding); all others are counts, norms, shares or times."""
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
        if all(kinds) and isinstance(value, (int, float)) and value < 0 and field.name not in SIGNED:
            raise InvalidInput(f"{cls.__name__}: {field.name} must be at least 0, found {value!r}; the file is damaged")
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


def texts(data: Any, key: str) -> tuple[str, ...]:
    """The list of texts at ``key`` of a mapping. Raises InvalidInput where there is none."""
    found = items(data, key)
    if not all(isinstance(text, str) for text in found):
        raise InvalidInput(f"{key} must be a list of texts; the file is damaged")
    return tuple(found)


def _fits(value: object, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool):  # a bool is an int to Python, not to a record
        return bool in kinds
    if isinstance(value, int) and not -LARGEST_INTEGER < value < LARGEST_INTEGER:
        return False
    return isinstance(value, kinds) and not (isinstance(value, float) and not math.isfinite(value))


def read_json(path: Path, make: Callable[[dict[str, Any]], R], remedy: str) -> R:
    """What ``make`` builds from the JSON object in a file.

    Raises:
        InvalidInput: the file cannot be read, is too large, holds no JSON object, or not the one that is wanted; with the remedy.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise InvalidInput(f"{path}: it has {path.stat().st_size:,} bytes, the limit is {LARGEST_FILE:,}; {remedy}")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"{path}: it cannot be read ({error.strerror or error}); {remedy}") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path}: it is not valid JSON ({error}); the file is damaged: {remedy}") from error
    return make_from(text, make, str(path), remedy)


def make_from(text: str, make: Callable[[dict[str, Any]], R], origin: str, remedy: str) -> R:
    """What ``make`` builds from a text that is a JSON object. Raises InvalidInput, whatever the text is."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{origin}: it is not valid JSON ({error}); the file is damaged: {remedy}") from error
    if not isinstance(data, dict):
        raise InvalidInput(f"{origin}: it must hold a JSON object; the file is damaged: {remedy}")
    try:
        return make(data)
    except InvalidInput as error:
        raise InvalidInput(f"{origin}: {error}; {remedy}") from error
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise InvalidInput(f"{origin}: it cannot be read ({type(error).__name__}: {error}); the file is damaged: {remedy}") from error


def plain(data: Any, place: str = "") -> tuple[Any, list[str]]:
    """``data`` as JSON takes it, and a sentence for each entry that JSON has no form for.

    Numbers that are not finite become null, numbers of NumPy and torch become Python's, and everything else its text.
    """
    if isinstance(data, Mapping):
        made: dict[str, Any] = {}
        said: list[str] = []
        for key, value in data.items():
            made[str(key)], more = plain(value, f"{place}.{key}" if place else str(key))
            said += more
        return made, said
    if isinstance(data, (list, tuple, set, frozenset)):
        parts = [plain(value, f"{place}[{i}]") for i, value in enumerate(data)]
        return [part for part, _ in parts], [text for _, more in parts for text in more]
    if data is None or isinstance(data, (bool, str)):
        return data, []
    if isinstance(data, int):
        return int(data), []
    if isinstance(data, float):
        return (float(data), []) if math.isfinite(data) else (None, [f"{place} was {data} and is written as null"])
    item = getattr(data, "item", None)
    if callable(item) and getattr(data, "ndim", None) == 0:
        return plain(item(), place)
    return str(data), [f"{place} is written as text"]
