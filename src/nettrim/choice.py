"""The method of a ``prune`` call: one that is given, or NetTrim with its defaults for a number; other things are told what to write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .methods import Method, NetTrim, PerLayer
from .methods.settings import is_number, readings
from .status import InvalidInput

CHOICE = (
    "prune needs to know how far to go; write one of\n"
    "  nettrim.prune(model, data, sparsity=0.8)   # 80 % of the weights become zero; the certificate says how far the outputs move\n"
    "  nettrim.prune(model, data, epsilon=0.05)   # each layer's output moves by at most 5 % of its norm; as many zeros as that allows"
)


def is_method(value: object) -> bool:
    """Whether a value is a method, ready to solve."""
    return not isinstance(value, type) and _solves(value)


def _solves(value: object) -> bool:
    return callable(getattr(value, "solve", None)) and hasattr(value, "describe")  # a tensor has a solve too


def method_of(method: Any, sparsity: PerLayer | None, epsilon: PerLayer | None) -> Method:
    """The method that was given, or ``NetTrim(sparsity=...)`` or ``NetTrim(epsilon=...)``.

    Raises:
        InvalidInput: none of the three, more than one, or something that is no method.
    """
    numbers = {name: value for name, value in (("sparsity", sparsity), ("epsilon", epsilon)) if value is not None}
    if method is None:
        if not numbers:
            raise InvalidInput(CHOICE)
        if len(numbers) > 1:
            raise InvalidInput(
                f"prune takes sparsity or epsilon, found both; leave out sparsity={sparsity!r} to keep the tolerance, "
                f"or epsilon={epsilon!r} to keep the budget"
            )
        return NetTrim(**numbers)  # type: ignore[arg-type]
    if is_number(method):
        found = " or ".join(f"nettrim.prune(model, data, {text}) ({words})" for text, words in readings(method, ["sparsity", "epsilon"]))
        raise InvalidInput(f"prune: {method!r} by position is no method; write {found}")
    if not is_method(method):
        called = f"; give it its settings, as in {method.__name__}(sparsity=0.8)" if isinstance(method, type) else ""
        raise InvalidInput(
            f"prune: method must be a pruning method such as nettrim.NetTrim(epsilon=0.02), found {method!r}{called}; "
            "or leave it out and give sparsity= or epsilon="
        )
    if numbers:
        given = " and ".join(f"{name}={value!r}" for name, value in numbers.items())
        name = type(method).__name__
        inside = ", ".join(f"{key}=..." for key in numbers)
        raise InvalidInput(
            f"prune: the method {name}(...) has its own target; leave out {given}, or leave out the method ({name}({inside}))"
        )
    return method  # type: ignore[no-any-return]


def check_order(given: Mapping[str, Any]) -> None:
    """Refuses arguments of ``prune`` that stand in each other's place."""
    calibration = given["calibration"]
    if _solves(calibration):
        raise InvalidInput("prune: the second argument is a method; the order is nettrim.prune(model, data, method)")
    if is_number(calibration):
        found = " or ".join(text for text, _ in readings(calibration, ["sparsity", "epsilon"]))
        raise InvalidInput(
            f"prune: the second argument must be calibration data, found the number {calibration!r}; "
            f"write nettrim.prune(model, data, ...) with {found}"
        )
    if isinstance(calibration, nn.Module):
        raise InvalidInput("prune: the second argument is the model; the order is nettrim.prune(model, data, method)")
