"""A bound as a table for a terminal."""

from __future__ import annotations

from rich.table import Table

from ..bound_network import GapBound
from ..bounds.masks import RULES
from .numbers import clean, number


def bound_table(bound: GapBound) -> Table:
    """Layer by layer, and what is stated of the output under it."""
    shown = Table(title="How far the output moves, at most", caption="\n".join(bound_words(bound)), caption_justify="left")
    shown.add_column("layer", min_width=8)
    for name in ("weights", "share", "norm ≤", "removed ≤", "moved ≤"):
        shown.add_column(name, justify="right", no_wrap=True)
    for layer in bound.layers:
        numbers = (layer.norm, layer.removed, layer.discrepancy)
        shown.add_row(clean(layer.name), f"{layer.weights:,}", f"{layer.share:.4g}", *(number(value, 1) for value in numbers))
    return shown


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
