"""Where every value of a C network lies: in the caller's arrays, or at a place of one work array that is used again as values end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .c_steps import Plan

INPUT, OUTPUT = "input", "output"


@dataclass(frozen=True)
class Memory:
    """``places``: for each value an offset into the work array, or ``INPUT`` or ``OUTPUT``; ``size`` of the work array, in floats."""

    places: Mapping[int, int | str]
    size: int


def planned(plan: Plan) -> Memory:
    """A place for every value, so that no two share entries while both are needed.

    An elementwise step writes over its input where that is not read again. The others' values are placed first fit, the largest first.
    """
    last = {plan.output: len(plan.steps)}
    for index, step in enumerate(plan.steps):
        for value in step.inputs:
            last[value] = max(index, last.get(value, 0))
    home = {0: 0}  # the first value that lies where this one lies
    life: dict[int, tuple[int, int]] = {}
    for index, step in enumerate(plan.steps):
        end = last.get(step.output, index)
        over = [value for value in step.inputs if step.elementwise and home[value] != 0 and last[value] == index]
        over = [value for value in over if life[home[value]][1] == index]
        home[step.output] = home[over[0]] if over else step.output
        life[home[step.output]] = (life[home[step.output]][0] if over else index, end)
    fixed = {0: INPUT, home[plan.output]: OUTPUT}
    offsets: dict[int, int] = {}
    sizes = {value: math.prod(plan.shapes[value]) for value in life if value not in fixed}
    for value in sorted(sizes, key=lambda value: (-sizes[value], value)):
        start, end = life[value]
        busy = sorted((offsets[other], sizes[other]) for other in offsets if life[other][0] <= end and start <= life[other][1])
        offset = 0
        for begin, size in busy:
            if begin - offset >= sizes[value]:
                break
            offset = max(offset, begin + size)
        offsets[value] = offset
    places: dict[int, int | str] = {value: fixed[first] if first in fixed else offsets[first] for value, first in home.items()}
    return Memory(places, max((offsets[value] + sizes[value] for value in offsets), default=0))
