"""Commands that bring a pruned model to where it runs: export."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .. import checkpoint
from ..calibration import Calibration
from ..deploy import compact, export
from ..deploy.export import check_target
from ..sources import batches_from, model_from
from .options import BatchSize, Data, Json, Model
from .output import print_json


class FormatName(StrEnum):
    """What is written."""

    onnx = "onnx"
    pt2 = "pt2"
    c = "c"


SavedWeights = Annotated[
    Path | None, typer.Option(help="Weights: a folder that nettrim prune wrote, .safetensors, or a state dict saved by torch.save.")
]


def export_command(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option(help="The file: .onnx, .pt2 or .c (a header goes beside it).")],
    format: Annotated[FormatName | None, typer.Option(help="Default: what the output ends in.")] = None,
    weights: SavedWeights = None,
    compacted: Annotated[bool, typer.Option("--compact", help="First remove dead neurons and channels; the function stays.")] = False,
    batch_size: BatchSize = 256,
    as_json: Json = False,
) -> None:
    """Write a model as ONNX, as a torch.export program or as C99, checked against the model on the first batch of the data."""
    chosen = check_target(output, None if format is None else format.value)
    network = model_from(model, None)
    if weights is not None:
        network = checkpoint.load(weights, network)
    example = next(iter(Calibration(batches_from(data, network, batch_size), "data")))
    small = compact(network, example) if compacted else None
    made = export(network if small is None else small.model, example, output, format=chosen)
    if as_json:
        parameters = None if small is None else {"before": small.parameters[0], "after": small.parameters[1], "notes": list(small.notes)}
        print_json({"exported": made.to_dict(), "compacted": parameters})
        return
    console = Console()
    for text in (small, made):
        if text is not None:
            console.print(str(text), highlight=False, markup=False, soft_wrap=True)
