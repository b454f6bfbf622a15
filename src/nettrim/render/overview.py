"""What would be pruned, as tables."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..overview import Overview


def overview_table(found: Overview) -> Table:
    """The layers that would be pruned, and what is read behind each."""
    table = Table(title="would be pruned", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    rows = any(layer.rows is not None for layer in found.layers)
    for heading, numbers in (("layer", False), ("kind", False), ("shape", True), ("weights", True), *([("rows", True)] if rows else [])):
        table.add_column(heading, justify="right" if numbers else "left", overflow="fold", no_wrap=numbers)
    table.add_column("read behind it", overflow="fold")
    for layer in found.layers:
        shape = "x".join(map(str, layer.shape))
        table.add_row(layer.name, layer.kind, shape, f"{layer.weights:,}", *([f"{layer.rows:,}"] if rows else []), layer.reading)
    return table


def left_table(found: Overview) -> Table:
    """The modules that would be left, and why."""
    table = Table(title="would be left as it is", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("module", "kind", "weights", "why"):
        table.add_column(heading, justify="right" if heading == "weights" else "left", overflow="fold", no_wrap=heading == "weights")
    for part in found.left:
        table.add_row(part.name or "the model", part.kind, f"{part.weights:,}", part.reason)
    return table
