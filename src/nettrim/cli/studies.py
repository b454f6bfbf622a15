"""Commands that tell what pruning would do, or did elsewhere: bound, demo, compare, reproduce."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .. import checkpoint, render, staging
from ..bound_query import ask
from ..compare import compare, first_samples
from ..deploy import bench
from ..experiments import reproduce
from ..progress import shown
from ..pruning import MAX_SAMPLES
from ..render import bench_files, bench_table
from ..render.bounds import bound_table
from ..sources import batches_from
from ..status import InvalidInput
from ..terminal import Terminal
from .ending import answer
from .options import (
    ActivationOption,
    BatchSize,
    Data,
    DatasetName,
    Device,
    Force,
    Ignore,
    Json,
    Layers,
    MaxSamples,
    Model,
    ReadingOption,
    Scheme,
    SchemeOption,
    Untrained,
    Weights,
    by_layer,
    check_weights,
    given_model,
    readings,
    target,
)
from .output import exit_unless_met, show


class RuleName(StrEnum):
    """What a bound leaves to chance."""

    random = "random"
    bernoulli = "bernoulli"
    magnitude = "magnitude"
    any = "any"


Images = Annotated[Path | None, typer.Option(help="Folder with the IDX files of mnist or fashion-mnist.")]


def bound_command(
    model: Model,
    share: Annotated[list[str] | None, typer.Option(help="Share of weights removed in [0, 1): a number, or LAYER=NUMBER.")] = None,
    gap: Annotated[float | None, typer.Option(help="Instead of --share: the largest share whose bound is at most this.")] = None,
    relative: Annotated[bool, typer.Option(help="--gap is relative to the norm of the outputs on the data.")] = False,
    data: Annotated[str | None, typer.Option(help="Calibration data, as for prune: a bound over these samples.")] = None,
    radius: Annotated[float | None, typer.Option(help="A bound uniform over all inputs of at most this norm.")] = None,
    input_shape: Annotated[str | None, typer.Option(help="Shape of one sample, as 1,28,28; for --radius without --data.")] = None,
    delta: Annotated[float, typer.Option(help="Probability with which the bound may fail.")] = 0.05,
    rule: Annotated[RuleName, typer.Option(help="Which weights are removed; magnitude assumes random signs.")] = RuleName.random,
    weights: Weights = None,
    untrained: Untrained = False,
    layers: Layers = None,
    ignore: Ignore = None,
    batch_size: BatchSize = 256,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """How far removing a share of the weights can move the output, before anything is pruned."""
    asked = ask(
        given_model(model, weights, untrained).model,
        data,
        radius=radius,
        input_shape=input_shape,
        share=target("share", share),
        gap=gap,
        relative=relative,
        delta=delta,
        rule=rule.value,
        layers=layers,
        ignore=ignore or (),
        batch_size=batch_size,
        device=device,
        progress=not as_json,
    )
    if as_json:
        answer({"bounds": [bound.to_dict() for bound in asked]})
        return
    for bound in asked:
        Terminal().print(bound_table(bound))


def demo_command(
    dataset: Annotated[DatasetName, typer.Option(help="Which data set.")] = DatasetName.digits,
    data: Images = None,
    output: Annotated[Path, typer.Option(help="Folder for the pruned model, its report and its certificate.")] = Path("out/demo"),
    epsilon: Annotated[float, typer.Option(help="Tolerance of every layer, relative to its output's norm.")] = 0.1,
    samples: Annotated[int, typer.Option(help="Calibration images.")] = 4096,
    seed: Annotated[int, typer.Option(help="Seed of training and pruning.")] = 0,
    measure: Annotated[bool, typer.Option("--bench/--no-bench", help="Measure size and speed of the result here.")] = True,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train a small network on real data, prune it in several ways without retraining, compare, and measure size and speed."""
    from ..experiments import demo  # needs the extra packages for data sets

    checkpoint.check_output(output, force=force, kind="demo")
    console = Terminal(stderr=as_json)
    done = demo.run(
        dataset.value,
        data=data,
        epsilon=epsilon,
        samples=samples,
        seed=seed,
        cache=output / "cache",
        progress=not as_json,
        announce=lambda text: console.print(text, style="bold", highlight=False),
    )
    checkpoint.save(done.result, output, comparison=done.rows, force=force, kind="demo")
    made = None
    if measure:
        console.print("size and speed", style="bold", highlight=False)
        made = bench(done.result.model, done.example, reference=done.reference, seconds=0.2, progress=not as_json)
        bench_files.write(made, output)
    if as_json:
        rows = [dict(row.__dict__, densities=list(row.densities)) for row in done.rows]
        data_of = {"comparison": rows, "report": done.result.report.to_dict(), "certificate": done.result.certificate.to_dict()}
        answer(data_of | ({} if made is None else {"bench": made.to_dict()}))
    else:
        console.print(render.comparison_table(done.rows))
        if made is not None:
            for table in bench_table.bench_tables(made):
                console.print(table)
            for note in made.notes:
                console.print(f"note: {note}", highlight=False, markup=False)
        following = f"open {output / checkpoint.PAGE} in a browser; for a network of your own: nettrim layers net.py:make"
        show(done.result.report, done.result.certificate, output, as_json, following=following)
    exit_unless_met(done.result.certificate)


def compare_command(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option(help="Folder for results, table and picture; an interrupted comparison there is continued.")],
    weights: Weights = None,
    untrained: Untrained = False,
    heldout: Annotated[
        str | None, typer.Option(help="Data to measure on, with labels for accuracy; by default the calibration data.")
    ] = None,
    methods: Annotated[
        list[str] | None, typer.Option(help="Names of methods, or all (the default): with a pattern, those that take it.")
    ] = None,
    sparsity: Annotated[list[float] | None, typer.Option(help="Fractions of zeros in [0, 1). Default: 0.5 0.7 0.9.")] = None,
    pattern: Annotated[str | None, typer.Option(help="Which weights may stay, such as 2:4, for all methods.")] = None,
    scheme: SchemeOption = Scheme.cascade,
    layers: Layers = None,
    ignore: Ignore = None,
    activation: ActivationOption = None,
    reading: ReadingOption = None,
    samples: Annotated[int | None, typer.Option(help="Only this many calibration samples, the first ones.")] = None,
    max_samples: MaxSamples = MAX_SAMPLES,
    batch_size: BatchSize = 256,
    seed: Annotated[int, typer.Option(help="Chooses rows where there are more than --max-samples, and what Random keeps.")] = 0,
    device: Device = None,
    resume: Annotated[bool, typer.Option(help="Continue what is in the folder.")] = True,
    as_json: Json = False,
) -> None:
    """Prune a model with several methods, and compare what they leave."""
    from ..render import compare_files  # drawing is needed only here

    corrections, activations = readings(reading), by_layer("activation", activation)
    check_weights(model, weights, untrained)
    folder = compare_files.check_folder(output, checkpoint.files_of((model, weights, data, heldout)))
    network = given_model(model, weights, untrained).model
    batches = batches_from(data, network, batch_size)
    comparison = compare(
        network,
        batches if samples is None else first_samples(batches, samples),
        methods=methods or "all",
        sparsities=sparsity,
        pattern=pattern,
        heldout=None if heldout is None else batches_from(heldout, network, batch_size),
        scheme=scheme.value,
        layers=layers,
        ignore=ignore or (),
        activations=activations,
        readings=corrections,
        max_samples=max_samples,
        seed=seed,
        device=device,
        folder=folder,
        resume=resume,
        progress=not as_json,
    )
    files = compare_files.write(comparison, folder)
    if as_json:
        answer(comparison.to_dict() | {"files": [str(file) for file in files]})
        return
    Terminal().print(compare_files.compare_table(comparison))
    for file in files:
        Terminal().print(f"written: {file}", highlight=False, markup=False, soft_wrap=True)


def reproduce_command(
    name: Annotated[str, typer.Argument(help="The published experiment.", metavar=f"[{'|'.join(reproduce.NAMES)}]")],
    output: Annotated[Path, typer.Option(help="Folder for numbers and pictures; an interrupted run there is continued.")] = Path(
        "out/reproduce"
    ),
    quick: Annotated[bool, typer.Option(help="A smaller form, about two minutes on two cores.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    dataset: Annotated[DatasetName, typer.Option(help="Images of the experiments that need some.")] = DatasetName.mnist,
    data: Images = None,
    samples: Annotated[int | None, typer.Option(help="Calibration images; by default the experiment's own choice.")] = None,
    as_json: Json = False,
) -> None:
    """Repeat a published experiment: numbers beside the published ones, a table and a picture."""
    if name not in reproduce.NAMES:  # before its folder is made
        raise InvalidInput(f"experiment {name!r} is not known; there are {', '.join(reproduce.NAMES)}")
    folder = staging.check_writable(output / name)
    kept = f"what is finished is kept in {folder}, where the same command continues"
    with shown(not as_json, pieces="parts", kept=kept) as advance:
        settings = reproduce.Settings(folder, quick, seed, dataset.value, data, samples, advance)
        outcome = reproduce.run(name, settings)
    if as_json:
        answer(outcome.numbers)
        return
    console = Terminal()
    console.print(outcome.table)
    for line in outcome.words:
        console.print(line, highlight=False, markup=False)
    for file in outcome.files:
        console.print(f"written: {file}", highlight=False, markup=False, soft_wrap=True)
