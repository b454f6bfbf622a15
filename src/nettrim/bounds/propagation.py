"""How bounds of layers become bounds of a network: a walk through its steps, branches included (docs/bounds.md, section 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["input", "constant", "layer", "map", "sum", "stack"]


@dataclass(frozen=True)
class Step:
    """One step of a network; ``inputs`` are the numbers of earlier steps, the last step is the output.

    A ``layer`` is named, a ``map`` has a Lipschitz constant, a ``sum`` adds tensors of one shape, a ``stack`` puts them side by side.
    A ``constant`` depends on no input and on no weight that is pruned.
    """

    kind: Kind
    inputs: tuple[int, ...] = ()
    name: str = ""
    lipschitz: float = 1.0


def at_most(steps: Sequence[Step], of_layer: Callable[[str, float], float], at_input: float = 0.0) -> tuple[float, dict[str, float]]:
    """The bound at the output, and what comes into each layer, when ``of_layer`` turns a layer's incoming bound into its outgoing one."""
    values: list[float] = []
    incoming: dict[str, float] = {}
    for step in steps:
        given = [values[i] for i in step.inputs]
        if step.kind == "input":
            values.append(at_input)
        elif step.kind == "constant":
            values.append(0.0)
        elif step.kind == "layer":
            incoming[step.name] = given[0]
            values.append(of_layer(step.name, given[0]))
        elif step.kind == "map":
            values.append(step.lipschitz * given[0])
        else:
            values.append(sum(given) if step.kind == "sum" else math.hypot(*given))
    return values[-1], incoming


def lipschitz(steps: Sequence[Step], norms: Callable[[str], float]) -> dict[str, float]:
    """For each layer, a Lipschitz constant of the map from the network's input to that layer's input."""
    return at_most(steps, lambda name, value: norms(name) * value, 1.0)[1]
