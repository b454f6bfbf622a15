"""A model's output taken apart, however it nests, and how far two outputs are apart: the one comparison that everything else uses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .status import InvalidInput

CHUNK = 2**20  # entries widened to float64 at a time: outputs over a large vocabulary are most of a pass's memory
_NUMBERS = (bool, int, float, complex, np.number)
_PLAIN = (*_NUMBERS, type(None), str, bytes, range, slice, Enum, type, torch.dtype, torch.device, np.generic)
_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType)
_DEPTH = 32  # of nesting: what goes deeper refers to itself


@dataclass(frozen=True)
class Outputs:
    """What a model put out, by readable path such as ``"logits"``, ``"[1][0]"`` or ``"[0].scores"`` (``""``: the output itself).

    ``tensors`` in the order of the output; ``plain`` values (numbers, strings, ``None``); ``others``: the class of every object of another
    kind that holds tensors, or may hold some, which cannot be compared.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)

    @property
    def scores(self) -> dict[str, Tensor]:
        """The floating-point (and complex) tensors: they enter the norms."""
        return {path: value for path, value in self.tensors.items() if value.is_floating_point() or value.is_complex()}

    @property
    def integers(self) -> dict[str, Tensor]:
        """The integer and boolean tensors: compared for equality, since token ids and masks would drown a norm."""
        return {path: value for path, value in self.tensors.items() if not (value.is_floating_point() or value.is_complex())}

    @property
    def not_compared(self) -> tuple[str, ...]:
        """What no comparison sees: ``"past_key_values (DynamicCache)"``."""
        return tuple(f"{path or 'the output'} ({kind})" for path, kind in self.others.items())

    @property
    def notes(self) -> list[str]:
        """The same as notes of a result."""
        return [f"not compared: {part}" for part in self.not_compared]

    def cloned(self) -> Outputs:
        """The same values in memory of their own."""
        return Outputs({path: value.clone() for path, value in self.tensors.items()}, self.plain, self.others)


def outputs_of(output: Any) -> Outputs:
    """The parts of a model's output: tuples, lists, named tuples, mappings, dataclasses and namespaces are gone into, at any depth.

    Raises:
        InvalidInput: there is no floating-point tensor, so that nothing can be compared; the message says what was found.
    """
    found = Outputs()
    _collect(output, "", found, 0)
    if not found.scores:
        kinds = [f"{path or 'itself'} ({str(value.dtype).removeprefix('torch.')} tensor)" for path, value in found.tensors.items()]
        kinds += [f"{path or 'itself'} ({type(value).__name__})" for path, value in found.plain.items()]
        kinds += [f"{path or 'itself'} ({kind})" for path, kind in found.others.items()]
        more = f" and {len(kinds) - 6} more" if len(kinds) > 6 else ""
        forms = f"{', '.join(kinds[:6])}{more}" if kinds else f"an empty {_kind(output)}"
        raise InvalidInput(
            f"the model's output holds no floating-point tensor to compare, found {forms}; "
            "let the model return its scores, in tuples, lists, mappings or dataclasses"
        )
    return found


def pairs(before: Outputs, after: Outputs) -> list[tuple[str, Tensor, Tensor]]:
    """The floating-point tensors of two outputs of one form, with their paths.

    Raises:
        InvalidInput: the forms differ; the message names the first difference.
    """
    other = other_form(before, after)
    if other:
        raise InvalidInput(
            f"the pruned network's output has another form than the reference network's ({other}), so they cannot be compared"
        )
    return [(path, Y, after.tensors[path]) for path, Y in before.scores.items()]


def other_form(before: Outputs, after: Outputs) -> str:
    """The first difference in form: parts that only one has, another shape or kind of tensor; empty where there is none."""
    for name, first, second in (("tensor", before.tensors, after.tensors), ("value", before.plain, after.plain)):
        for path in [*first, *second]:
            if path not in second or path not in first:
                return f"only one has the {name} {_named(path)}"
    for path, Y in before.tensors.items():
        X = after.tensors[path]
        if Y.shape != X.shape:
            return f"{_named(path)} has the shapes {tuple(Y.shape)} and {tuple(X.shape)}"
        if _is_score(Y) != _is_score(X):
            return f"{_named(path)} is {Y.dtype} and {X.dtype}"
    return "" if before.others == after.others else "they hold objects of other classes"


def disagreement(before: Any, after: Any, precision: float) -> str:
    """The first thing in which two outputs of a model differ by more than rounding, in words; empty where they agree.

    ``precision`` is the unit of rounding of the passes. NaN and inf agree with themselves.
    """
    first, second = (output if isinstance(output, Outputs) else outputs_of(output) for output in (before, after))
    other = other_form(first, second)
    if other:
        return other
    for path, Y in first.tensors.items():
        if not same(Y, second.tensors[path], precision):
            return f"{_named(path)} differs"
    for path in changed_plain(first, second, allowance(precision)):
        return f"{_named(path)} is {first.plain[path]!r:.60} and {second.plain[path]!r:.60}"
    return ""


def allowance(precision: float) -> float:
    """What rounding can change of an output, relative to its largest entry, where the passes round by ``precision``.

    Much above one rounding, since errors add up through a network; but coarse arithmetic must not make everything agree.
    """
    return min(1e4 * precision, max(2e-3, 32 * precision))


def same(Y: Tensor, X: Tensor, precision: float) -> bool:
    """Whether two tensors agree up to rounding, relative to the largest finite entry of ``Y``; integers exactly."""
    if Y.shape != X.shape or _is_score(Y) != _is_score(X):
        return False
    return largest_move(Y, X) <= (allowance(precision) * largest_entry(Y) if _is_score(Y) else 0.0)


def largest_entry(Y: Tensor) -> float:
    """The largest finite absolute value of a tensor."""
    wide = (y.double() for y in _chunks(Y))
    return max((float(torch.where(y.isfinite(), y.abs(), 0.0).max()) for y in wide), default=0.0)


def largest_difference(wanted: Outputs, found: Outputs, *, exact: bool = True) -> float:
    """The largest difference of two outputs, relative to the largest finite entry of the same tensor of the first.

    inf where the forms differ, where only one is NaN or inf, and, unless ``exact`` is ``False``, where an integer entry or a plain value
    differs (numbers up to rounding in float32).
    """
    if other_form(wanted, found):
        return math.inf
    numbers = allowance(torch.finfo(torch.float32).eps)
    if exact and (changed_integers(wanted, found) or changed_plain(wanted, found, numbers)):
        return math.inf
    worst = 0.0
    for path, Y in wanted.scores.items():
        size, moved = largest_entry(Y), largest_move(Y, found.tensors[path])
        worst = max(worst, moved / size if size else moved)
    return worst


def largest_move(Y: Tensor, X: Tensor) -> float:
    """The largest difference of two tensors of one shape; inf where only one is NaN or inf, or, for integers, where any entry differs."""
    if not (_is_score(Y) and _is_score(X)):
        return 0.0 if torch.equal(Y, X) else math.inf
    worst = 0.0
    for y, x in zip(_chunks(Y), _chunks(X), strict=True):
        a, b = y.double(), x.double()
        equal = (a == b) | (a.isnan() & b.isnan())
        worst = max(worst, float(torch.where(equal, 0.0, (b - a).abs()).nan_to_num(nan=math.inf, posinf=math.inf).max()))
    return worst


def squares(before: Outputs, after: Outputs) -> tuple[float, float]:
    """``||X - Y||_F^2`` and ``||Y||_F^2`` over all floating-point tensors, in float64. Raises InvalidInput as :func:`pairs`."""
    moved = size = 0.0
    for _, Y, X in pairs(before, after):
        for y, x in zip(_chunks(Y), _chunks(X), strict=True):
            moved += float((x.double() - y.double()).square_().sum())
        size += square(Y)
    return moved, size


def square(Y: Tensor) -> float:
    """``||Y||_F^2`` in float64."""
    return sum((float(y.double().square().sum()) for y in _chunks(Y)), 0.0)


def changed_integers(before: Outputs, after: Outputs) -> dict[str, int]:
    """How many entries of every integer and boolean tensor differ, by path; paths without a difference are left out."""
    found = {path: int((after.tensors[path] != Y).sum()) for path, Y in before.integers.items()}
    return {path: count for path, count in found.items() if count}


def changed_plain(before: Outputs, after: Outputs, relative: float = 0.0) -> list[str]:
    """The paths of plain values that differ, numbers by more than the share ``relative``."""
    return [path for path, value in before.plain.items() if path in after.plain and not _same_plain(value, after.plain[path], relative)]


def real(Y: Tensor) -> Tensor:
    """A complex tensor as a real one with a dimension more; others as they are."""
    return torch.view_as_real(Y.resolve_conj()) if Y.is_complex() else Y


def _chunks(Y: Tensor) -> Iterator[Tensor]:
    return iter(torch.split(real(Y).reshape(-1), CHUNK)) if Y.numel() else iter(())


def _is_score(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _collect(value: Any, path: str, found: Outputs, depth: int) -> None:
    """Sorts a value and all that it holds into ``found``."""
    if isinstance(value, Tensor):
        _collect_tensor(value, path, found)
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        found.tensors[path] = torch.from_numpy(np.ascontiguousarray(value))
    elif isinstance(value, _PLAIN):
        found.plain[path] = value
    else:
        parts = _parts(value, path) if depth < _DEPTH else None
        if parts is not None:
            for place, part in parts:
                _collect(part, place, found, depth + 1)
        elif _may_hold_tensors(value):
            found.others[path] = _kind(value)


def _collect_tensor(value: Tensor, path: str, found: Outputs) -> None:
    if value.is_nested:
        for i, part in enumerate(value.unbind()):
            found.tensors[f"{path}[{i}]"] = part
    elif value.is_meta:
        found.others[path] = "meta tensor"
    elif value.is_quantized:
        found.tensors[path] = value.dequantize()
    else:
        found.tensors[path] = value if value.layout == torch.strided else value.to_dense()


def _parts(value: Any, path: str) -> list[tuple[str, Any]] | None:
    """What a container holds, with paths; ``None`` for an object of another kind."""
    if isinstance(value, Mapping) or (is_dataclass(value) and not isinstance(value, type)):
        held = dict(value) if isinstance(value, Mapping) else {}
        own = fields(value) if is_dataclass(value) else ()
        # a dataclass may be a mapping too, which leaves out what is None
        held |= {one.name: getattr(value, one.name, None) for one in own if one.name not in held}
        return [(_joined(path, key, place), part) for place, (key, part) in enumerate(held.items())]
    if isinstance(value, SimpleNamespace):
        return [(_joined(path, key, 0), part) for key, part in vars(value).items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(_joined(path, key, 0), part) for key, part in zip(value._fields, value, strict=True)]
    if isinstance(value, (tuple, list)):
        return [(f"{path}[{i}]", part) for i, part in enumerate(value)]
    return None


def _joined(path: str, key: object, place: int) -> str:
    if isinstance(key, str) and key.isidentifier():
        return f"{path}.{key}" if path else key
    return f"{path}[{key!r}]" if isinstance(key, _PLAIN) else f"{path}[{_kind(key)} {place}]"  # other objects may show an address


def _may_hold_tensors(value: Any) -> bool:
    """Whether an object holds a tensor, or does not let itself be looked into."""
    waiting, seen = [value], set[int]()
    while waiting:
        one = waiting.pop()
        if isinstance(one, (Tensor, np.ndarray)):
            return True
        if id(one) in seen or isinstance(one, (*_PLAIN, *_FUNCTIONS)):
            continue
        seen.add(id(one))
        slots = [name for kind in type(one).__mro__ for name in _slots(kind)]
        if isinstance(one, Mapping):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, (tuple, list, set, frozenset)):
            waiting += one
        elif not hasattr(one, "__dict__") and not slots:
            return True
        waiting += [*getattr(one, "__dict__", {}).values(), *(getattr(one, name, None) for name in slots)]
    return False


def _slots(kind: type) -> tuple[str, ...]:
    stated = kind.__dict__.get("__slots__", ())
    return (stated,) if isinstance(stated, str) else tuple(stated)


def _same_plain(first: Any, second: Any, relative: float) -> bool:
    if isinstance(first, _NUMBERS) and isinstance(second, _NUMBERS):
        return bool(np.isclose(first, second, rtol=relative, atol=0.0, equal_nan=True))
    return bool(first == second)


def _named(path: str) -> str:
    return f"output {path!r}" if path else "the output"


def _kind(value: object) -> str:
    return type(value).__name__
