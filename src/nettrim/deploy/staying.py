"""Why dead neurons and channels stay, layer by layer, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from . import constants
from .channels import Flow
from .constants import Layer
from .follow import COMES, OUTPUT
from .removal import Dependencies

CARRIES = "one of a layer carries the constants of those that went, which a border of zeros or a missing bias keeps from being folded"
LAST = "a layer keeps at least one"


@dataclass(frozen=True, eq=False)
class Step:
    """What one pass over the network found. ``gone``: the classes that can go; ``dead``: those that the function does not need.

    ``carriers``: by layer, the input that carries the constants of others. ``apart``: why dead classes stay although the graph allows it.
    ``needed``: classes that are no constants where a layer reads them, and that layer.
    """

    flow: Flow
    modules: Mapping[str, nn.Module]
    dead: set[int]
    gone: set[int]
    carriers: Mapping[str, int]
    apart: Mapping[int, str]
    needed: Mapping[int, str]
    dependencies: Dependencies | None


def staying(step: Step) -> list[str]:
    """One sentence for every reason: the layers, how many of their dead outputs stay, and why.

    Dead are outputs that always hold one value, and those that nothing reads. The network's own outputs are not counted.
    """
    flow = step.flow
    read = {c for (_, side), ids in flow.ends.items() if side == "in" for c in ids.tolist()}
    carriers = {int(flow.ends[name, "in"][i]) for name, i in step.carriers.items()}
    found: dict[str, Counter[str]] = {}
    for name, module in step.modules.items():
        if not constants.is_layer(module):
            continue
        layer = cast(Layer, module)
        if (name, "out") not in flow.ends:
            why = flow.outside.get(name, "its call is not seen in the graph")
            reason = f"the layer keeps its size{f' ({why})' if why else f': {type(layer).__name__} is not followed'}"
            found.setdefault(reason, Counter())[name] += int((~constants.touched(layer).any(1)).sum())
            continue
        values = flow.inputs.get(name)
        still = ~constants.touched(layer).any(1) if values is None else ~constants.outputs(layer, values).isnan()
        for c, constant in zip(flow.ends[name, "out"].tolist(), still.tolist(), strict=True):
            if reason := _why(step, c, constant, read, carriers):
                found.setdefault(reason, Counter())[name] += 1
    sentences = [_sentence(layers, step.modules, reason) for reason, layers in found.items() if layers.total()]
    return sentences + _unread(step)


def _why(step: Step, c: int, constant: bool, read: set[int], carriers: set[int]) -> str:
    """Why an output of this class stays; empty for one that is not dead, and for the network's own outputs."""
    if c in step.flow.fixed:
        reason = step.flow.fixed[c]
        if not constant or (reason == OUTPUT and c not in read):
            return ""
        return f"they go with what comes from {reason.removeprefix(COMES)}" if reason.startswith(COMES) else reason
    if c in step.apart:
        return step.apart[c]
    if c in step.dead:
        return LAST
    if not constant:
        return ""
    if c in carriers:
        return CARRIES
    return f"what {step.needed[c]} reads in their place varies: something is added, or a border of zeros" if c in step.needed else ""


def _unread(step: Step) -> list[str]:
    """Inputs that no layer reads, where they come from something that is not followed."""
    flow = step.flow
    reads = torch.zeros(flow.count, dtype=torch.bool)
    for name in flow.inputs:
        ids = flow.ends[name, "in"]
        reads[ids[constants.read(cast(Layer, step.modules[name]))]] = True
    found: Counter[tuple[str, str]] = Counter()
    for name in flow.inputs:
        found.update((name, flow.fixed[c]) for c in sorted(set(flow.ends[name, "in"].tolist())) if c in flow.foreign and not reads[c])
    return [f"{name}: {count} inputs that no layer reads stay: {reason}" for (name, reason), count in found.items()]


def _sentence(layers: Counter[str], modules: Mapping[str, nn.Module], reason: str) -> str:
    shown = {name: count for name, count in layers.items() if count}
    kinds = {isinstance(modules[name], nn.Linear) for name in shown}
    noun = "neurons" if kinds == {True} else "channels" if kinds == {False} else "neurons and channels"
    total = sum(shown.values())
    noun = noun.removesuffix("s") if total == 1 else noun
    return f"{', '.join(f'{name}: {count}' for name, count in shown.items())} dead {noun} {'stays' if total == 1 else 'stay'}: {reason}"
