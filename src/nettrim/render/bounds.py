"""A bound as a table for a terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD, Box
from rich.table import Table

from ..bound_network import GapBound, NetworkBounds
from ..bounds.masks import RULES
from .fitting import PLAIN_BOX, Column, fitting_table, plain_text
from .numbers import number, plural


def bound_table(bound: GapBound) -> Table:
    """Layer by layer, and what is stated of the output under it."""
    return _table(bound, SIMPLE_HEAD)


def bound_text(bound: GapBound) -> str:
    """The same as plain text."""
    return plain_text(_table(bound, PLAIN_BOX))


def bounds_text(bounds: NetworkBounds) -> str:
    """What can be asked of the bounds of a network."""
    over = {
        "ball": f"ball: every input of norm at most {bounds.radius or 0.0:g}",
        "data": f"data: {plural(bounds.samples or 0, 'sample')}, whose outputs have the norm {number(bounds.output_norm)}",
    }
    return plain_text(
        f"bounds of a network whose weights are removed in {plural(len(bounds.names), 'layer')}: {', '.join(bounds.names)}",
        *(f"  {over[form]}" for form in bounds.forms),
        "ask .gap(share), .largest_share(gap) or .of_pruned(model)",
    )


def _table(bound: GapBound, box: Box) -> Table:
    layers = bound.layers
    columns = [
        Column("layer", [layer.name for layer in layers], fold=8),
        Column("weights", [f"{layer.weights:,}" for layer in layers]),
        Column("share", [f"{layer.share:.4g}" for layer in layers]),
        *(
            Column(name, [number(getattr(layer, field), 1) for layer in layers])
            for name, field in (("norm ≤", "norm"), ("removed ≤", "removed"), ("moved ≤", "discrepancy"))
        ),
    ]
    return fitting_table(columns, "\n".join(bound_words(bound)), "How far the output moves, at most", box, last_row=False)


def bound_words(bound: GapBound) -> list[str]:
    """The statement, in sentences."""
    if bound.form == "ball":
        what = f"for every input of norm at most {bound.radius:g} the output moves by at most {number(bound.value, 1)}"
    else:
        share = "" if bound.relative is None else f", {number(bound.relative, 1)} of its own norm,"
        what = f"over the {bound.samples} samples given the output moves by at most {number(bound.value, 1)}{share} in the Frobenius norm"
    chance = "certainly" if bound.delta is None else f"with probability at least {bound.probability:g}"
    sentences = [f"{chance}, {what}"]
    if bound.rule in RULES:
        sentences.append(f"rule {bound.rule}: {RULES[bound.rule]}")
    return sentences
