"""What ``prune`` would prune of a model, what it reads behind each layer, and what it would leave, and why; nothing is solved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .attention import opened
from .calibration import Batches, Calibration
from .capture import device_of, random_state_kept, read_graph, reference_replica, replicate, scan
from .graph import Graph, read
from .layers import is_prunable
from .opening import how_opened
from .selection import select
from .status import InvalidInput, NothingToPrune
from .whole import OUTSIDE, UNREACHED, LeftOut, whole_model
from .wrappers import takes_models

UNTRACED = "read from the model's graph alone: a model that takes keywords, or turns by its data, is read with data (--data)"


@dataclass(frozen=True)
class LayerOverview:
    """A layer that would be pruned. ``shape`` is its weight's; ``norm``, ``activation`` and ``pool`` are what is read behind it, empty
    where there is none, and ``branch`` says whether its output is added to another; ``reading`` says all that in words, and ``seen``
    whether the graph shows it. ``rows``: what its program would have, with data."""

    name: str
    kind: str
    shape: tuple[int, ...]
    weights: int
    norm: str
    branch: bool
    activation: str
    pool: str
    reading: str
    seen: bool
    rows: int | None


@dataclass(frozen=True)
class Overview:
    """``parameters``: of the whole model. ``left``: what would be left as it is. ``notes``: what was remarked while the model was read."""

    parameters: int
    layers: tuple[LayerOverview, ...]
    left: tuple[LeftOut, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@takes_models("model")
def overview(
    model: nn.Module,
    calibration: Batches | None = None,
    *,
    layers: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    device: torch.device | str | None = None,
) -> Overview:
    """Reads a model as :func:`nettrim.prune` would.

    Args:
        model, layers, ignore, device: as for :func:`nettrim.prune`.
        calibration: the same data; without them the model is traced as called with its first argument, and nothing is said of rows and of
            layers that are never called.

    Raises:
        InvalidInput: names that fit no layer; with data, all that ``prune`` would refuse of them.
    """
    given, whole = model, opened(model)
    place = device_of(model, device)
    notes: list[str] = []
    rows: Mapping[str, int] = {}
    reached: list[str] | None = None
    if calibration is None:
        names, refused = _choose(whole, layers, ignore, given)
        replica = replicate(whole, place, torch.float64)
        graph = read(replica.model, names)
        if graph.traced is None:
            notes.append(f"{graph.notice}; {UNTRACED}")
    else:
        batches = Calibration(calibration)
        with random_state_kept(place):
            first = next(iter(batches))
            encoders, opening = how_opened(given, place, first)
            whole = whole if encoders else opened(given, encoders=False)
            names, refused = _choose(whole, layers, ignore, given)
            reference, notice = reference_replica(whole, place, first)
            found = scan(reference, names, batches)
            reached, rows = found.order, found.rows
            graph = read_graph(reference, reached, {}, first)
        notes += [text for text in (opening, notice, graph.notice) if text]
    modules = dict(whole.named_modules())
    shown = tuple(_shown(name, modules[name], graph, rows.get(name)) for name in (names if reached is None else reached))
    reasons = {name: UNREACHED for name in names if reached is not None and name not in reached} | refused
    counts = whole_model(whole, [layer.name for layer in shown], {name: reasons.get(name, OUTSIDE) for name in modules})
    return Overview(counts.parameters, shown, counts.left_out, tuple(notes))


def _choose(model: nn.Module, layers: Sequence[str] | None, ignore: Sequence[str], given: nn.Module) -> tuple[list[str], dict[str, str]]:
    """The layers that could be pruned, and those chosen that ``prune`` would refuse, with the reason."""
    try:
        return select(model, layers, ignore, given), {}
    except NothingToPrune:
        return [], {}
    except InvalidInput as error:
        refused: dict[str, str] = {}
        names: list[str] = []
        for name in (name for name, module in model.named_modules() if is_prunable(module)):
            try:
                names += select(model, [name], ignore, given)
            except NothingToPrune:
                pass  # left out by ignore
            except InvalidInput as reason:
                refused[name] = str(reason)
        if not refused:  # it is layers= or ignore= that is wrong
            raise error
        if layers is None:
            return names, refused
        raise


def _shown(name: str, module: nn.Module, graph: Graph, rows: int | None) -> LayerOverview:
    reading = graph.readings[name]
    weight = module.get_parameter("weight")
    return LayerOverview(
        name=name,
        kind=type(module).__name__,
        shape=tuple(weight.shape),
        weights=weight.numel(),
        norm=reading.norm,
        branch=bool(reading.total),
        activation=reading.activation.name,
        pool="" if reading.pool is None else "x".join(map(str, reading.pool.kernel)),
        reading=reading.words,
        seen=reading.source != "not seen",
        rows=rows,
    )
