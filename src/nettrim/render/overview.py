"""What would be pruned, as tables."""

from __future__ import annotations

from rich.table import Table

from ..overview import Overview
from .fitting import Column, fitting_table


def overview_table(found: Overview) -> Table:
    """The layers that would be pruned, and what is read behind each."""
    layers = found.layers
    columns = [
        Column("layer", [layer.name for layer in layers], fold=6),
        Column("kind", [layer.kind for layer in layers], justify="left"),
        Column("shape", ["x".join(map(str, layer.shape)) for layer in layers]),
        Column("weights", [f"{layer.weights:,}" for layer in layers]),
        Column("rows", ["" if layer.rows is None else f"{layer.rows:,}" for layer in layers]),
        Column("read behind it", [layer.reading for layer in layers], fold=14),
    ]
    if all(layer.rows is None for layer in layers):
        del columns[4]
    return fitting_table(columns, "", "would be pruned", last_row=False)


def left_table(found: Overview) -> Table:
    """The modules that would be left, and why."""
    left = found.left
    columns = [
        Column("module", [part.name or "the model" for part in left], fold=6),
        Column("kind", [part.kind for part in left], justify="left"),
        Column("parameters", [f"{part.parameters:,}" for part in left]),
        Column("why", [part.reason for part in left], fold=14),
    ]
    return fitting_table(columns, "", "would be left as it is", last_row=False)
