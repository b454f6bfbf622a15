"""Commands that bring a pruned model to where it runs: export, bench."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from .. import checkpoint
from ..calibration import Calibration
from ..capture import hashes
from ..deploy import bench, compact, export
from ..deploy.bench import SECONDS, SIZES, check_settings
from ..deploy.export import check_target
from ..render import bench_files, bench_table
from ..sources import batches_from, model_from
from ..terminal import Terminal
from .ending import answer
from .options import BatchSize, Data, Device, Force, Json, ManyValues, Model, Untrained, check_weights


class FormatName(StrEnum):
    """What is written."""

    onnx = "onnx"
    pt2 = "pt2"
    c = "c"


SavedWeights = Annotated[
    Path | None, typer.Option(help="Weights: a folder that nettrim prune wrote, .safetensors, or a state dict saved by torch.save.")
]


def saved_model(text: str, weights: Path | None, untrained: bool) -> nn.Module:
    """The model that a command is given, with weights in any of the forms that ``nettrim.load`` reads."""
    check_weights(text, weights, untrained)
    network = model_from(text, None)
    return network if weights is None else checkpoint.load(weights, network)


def export_command(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option(help="The file: .onnx, .pt2 or .c (a header goes beside it).")],
    format: Annotated[FormatName | None, typer.Option(help="Default: what the output ends in.")] = None,
    weights: SavedWeights = None,
    untrained: Untrained = False,
    compacted: Annotated[bool, typer.Option("--compact", help="First remove dead neurons and channels; the function stays.")] = False,
    batch_size: BatchSize = 256,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a model as ONNX, as a torch.export program or as C99, checked against the model on the first batch of the data."""
    check_weights(model, weights, untrained)
    read = checkpoint.files_of((model, weights, data))
    chosen = check_target(output, None if format is None else format.value, force=force, inputs=read)
    network = saved_model(model, weights, untrained)
    example = next(iter(Calibration(batches_from(data, network, batch_size), "data")))
    small = compact(network, example) if compacted else None
    made = export(network if small is None else small.model, example, output, format=chosen, force=force, progress=not as_json)
    if as_json:
        parameters = None if small is None else {"before": small.parameters[0], "after": small.parameters[1], "notes": list(small.notes)}
        answer({"exported": made.to_dict(), "compacted": parameters})
        return
    console = Terminal()
    for text in (small, made):
        if text is not None:
            console.print(str(text), highlight=False, markup=False, soft_wrap=True)


class ManySizes(ManyValues):
    """Takes several numbers behind one ``--batch-sizes``: ``--batch-sizes 1 32`` is ``--batch-sizes 1 --batch-sizes 32``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Spreads the numbers before they are parsed."""
        spread: list[str] = []
        within = False
        for text in args:
            within = text == "--batch-sizes" or (within and text.isdecimal())
            if text != "--batch-sizes":
                spread += ["--batch-sizes", text] if within else [text]
        return super().parse_args(ctx, spread)


def bench_command(
    model: Model,
    data: Data,
    weights: SavedWeights = None,
    untrained: Untrained = False,
    reference: Annotated[
        Path | None, typer.Option(help="The trained network's weights, in the same forms; ratios then compare with it.")
    ] = None,
    batch_sizes: Annotated[list[int] | None, typer.Option(help="Samples in a batch. Default: 1 32 256.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch; by default as many as it takes by itself.")] = None,
    seconds: Annotated[float, typer.Option(help="Measured at least, for each form and batch size.")] = SECONDS,
    output: Annotated[
        Path | None, typer.Option(help="Folder for bench.json; in that of a saved result, its report.html gets a section too.")
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure size and speed of a pruned model here: as it is, compacted and accelerated, beside the trained network."""
    sizes = check_settings(batch_sizes or SIZES, threads, seconds)
    network = saved_model(model, weights, untrained)
    dense = None if reference is None else checkpoint.load(reference, model_from(model, None))
    if output is not None:
        bench_files.check_folder(output, hashes(network), (model, weights, reference, data))
    example = next(iter(Calibration(batches_from(data, network, max(sizes)), "data")))
    made = bench(
        network,
        example,
        reference=dense,
        batch_sizes=sizes,
        threads=threads,
        seconds=seconds,
        device=device,
        progress=not as_json,
    )
    files = [] if output is None else bench_files.write(made, output)
    if as_json:
        answer(made.to_dict() | {"files": [str(file) for file in files]})
        return
    console = Terminal()
    for table in bench_table.bench_tables(made):
        console.print(table)
    for line in (*bench_table.bench_lines(made), *(f"written: {file}" for file in files)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
