"""The command that shows what would be pruned: layers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..overview import overview
from ..render.overview import left_table, overview_table
from ..sources import batches_from, carries_weights, source_from
from ..terminal import Terminal
from .ending import answer
from .options import BatchSize, Device, Ignore, Json, Layers, Model


def layers_command(
    model: Model,
    weights: Annotated[Path | None, typer.Option(help="Trained weights; without them the form of the model is shown all the same.")] = None,
    data: Annotated[str | None, typer.Option(help="Calibration data: tells rows, and which layers are never called.")] = None,
    layers: Layers = None,
    ignore: Ignore = None,
    batch_size: BatchSize = 256,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Show what would be pruned, what is read behind each layer, and what would be left and why. Nothing is written."""
    source = source_from(model, weights)
    batches = None if data is None else batches_from(data, source.model, batch_size)
    found = overview(source.model, batches, layers=layers, ignore=ignore or (), device=device)
    notes = [*found.notes, *(source.notes if weights is not None or carries_weights(model) else ())]
    if as_json:
        answer(found.to_dict() | {"notes": notes})
        return
    console = Terminal()
    console.print(overview_table(found))
    if found.left:
        console.print(left_table(found))
    pruned = sum(layer.weights for layer in found.layers)
    vectors = found.parameters - pruned - sum(part.parameters for part in found.left)
    console.print(
        f"{len(found.layers)} layers with {pruned:,} weights would be pruned, of {found.parameters:,} parameters "
        f"({vectors:,} of them in biases, norms and other vectors, which are never pruned)",
        highlight=False,
        markup=False,
    )
    for note in notes:
        console.print(f"note: {note}", highlight=False, markup=False)
