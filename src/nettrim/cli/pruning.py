"""Commands that make, check, show and fine-tune a pruned model: prune, verify, report, distill."""

from __future__ import annotations

import copy
import shlex
from dataclasses import fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .. import checkpoint, render, staging
from ..distill import distill
from ..pruning import MAX_SAMPLES, PruneResult, prune
from ..recertify import recertify
from ..render import bench_files, bench_table
from ..render.distilled import distilled_words
from ..sources import Source, batches_from
from ..status import CertificateError, InvalidInput, NetTrimError
from ..terminal import Terminal
from ..verify import verify
from .ending import answer
from .method import METHODS, method_from
from .options import (
    ActivationOption,
    BatchSize,
    Data,
    Device,
    Folder,
    Force,
    Heldout,
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
from .output import exit_unless_met, next_commands, show, size_of


class Norm(StrEnum):
    """What Net-Trim minimises."""

    l1 = "l1"
    l0 = "l0"


class Effort(StrEnum):
    """How much work goes into choosing weights."""

    full = "full"
    quick = "quick"


class Program(StrEnum):
    """Which program of a layer is solved."""

    preimage = "preimage"
    halfspace = "halfspace"


class Allocation(StrEnum):
    """How a sparsity is shared by the layers."""

    uniform = "uniform"
    share = "global"


class Counted(StrEnum):
    """What a sparsity is a share of."""

    parameters = "parameters"
    bytes = "bytes"
    macs = "macs"


class Learn(StrEnum):
    """What fine-tuning may change."""

    pruned = "pruned"
    all = "all"


class LossName(StrEnum):
    """What fine-tuning makes small."""

    mse = "mse"
    kl = "kl"


OutputFolder = Annotated[Path, typer.Option(help="Folder for model.safetensors, report.json, certificate.json, report.html.")]
Compressed = Annotated[bool, typer.Option("--compressed", help="Store tensors with many zeros as values and positions, exactly.")]


def prune_command(
    model: Model,
    data: Data,
    output: OutputFolder,
    weights: Weights = None,
    untrained: Untrained = False,
    heldout: Heldout = None,
    epsilon: Annotated[list[str] | None, typer.Option(help="Tolerance, relative: a number, or LAYER=NUMBER (repeatable).")] = None,
    sparsity: Annotated[list[str] | None, typer.Option(help="Fraction of zeros in [0, 1): a number, or LAYER=NUMBER (repeatable).")] = None,
    penalty: Annotated[list[str] | None, typer.Option(help="Absolute penalty: a number, or LAYER=NUMBER (repeatable).")] = None,
    error: Annotated[
        list[str] | None, typer.Option(help="lobs: how far a layer's response may move, relative: a number, or LAYER=NUMBER (repeatable).")
    ] = None,
    method: Annotated[str, typer.Option(help="Pruning method.", metavar=f"[{'|'.join(METHODS)}]")] = "nettrim",
    pattern: Annotated[
        str | None, typer.Option(help="Which weights may stay: N:M such as 2:4, rows, columns, or blocks such as 4x4.")
    ] = None,
    norm: Annotated[Norm | None, typer.Option(help="Default: l1 for epsilon and penalty, l0 for sparsity and with a pattern.")] = None,
    polish: Annotated[bool | None, typer.Option(help="Least distance on the final support. Default: off for l1, on for l0.")] = None,
    effort: Annotated[Effort | None, typer.Option(help="l0: quick takes a fraction of the time for a few percent more distance.")] = None,
    program: Annotated[Program | None, typer.Option(help="Ours (preimage, the default), or the published one (halfspace).")] = None,
    gamma: Annotated[
        list[str] | None, typer.Option(help="Cascade: tolerances after the first layer, as published: a number, or LAYER=NUMBER.")
    ] = None,
    kappa: Annotated[float | None, typer.Option(help="With --gamma: factor on the tolerance of a layer without activation.")] = None,
    scheme: SchemeOption = Scheme.cascade,
    allocation: Annotated[
        Allocation, typer.Option(help="A sparsity holds for every layer (uniform), or for all together (global).")
    ] = Allocation.uniform,
    counted: Annotated[
        Counted, typer.Option("--target", help="What --sparsity is a share of, with --allocation global.")
    ] = Counted.parameters,
    sweeps: Annotated[int, typer.Option(help="Further passes over the layers, each solved again.")] = 0,
    layers: Layers = None,
    ignore: Ignore = None,
    activation: ActivationOption = None,
    reading: ReadingOption = None,
    add_bias: Annotated[bool, typer.Option("--add-bias", help="Give layers a bias where neither they nor a batch-norm hold one.")] = False,
    max_samples: MaxSamples = MAX_SAMPLES,
    batch_size: BatchSize = 256,
    seed: Annotated[int, typer.Option(help="Chooses rows where there are more than --max-samples, and what random keeps.")] = 0,
    device: Device = None,
    compressed: Compressed = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Prune a trained model and save it with its report and certificate."""
    options = {
        "epsilon": target("epsilon", epsilon),
        "sparsity": target("sparsity", sparsity),
        "penalty": target("penalty", penalty),
        "error": target("error", error),
        "pattern": pattern,
        "norm": None if norm is None else norm.value,
        "polish": polish,
        "effort": None if effort is None else effort.value,
        "program": None if program is None else program.value,
        "gamma": target("gamma", gamma),
        "kappa": kappa,
    }
    chosen = method_from(method, options, seed)
    corrections, activations = readings(reading), by_layer("activation", activation)
    read = (model, weights, data, heldout)
    check_weights(model, weights, untrained)
    checkpoint.check_output(output, force=force, inputs=read)
    source = given_model(model, weights, untrained)
    network = source.model
    checkpoint.check_state(network)
    result = prune(
        network,
        batches_from(data, network, batch_size),
        chosen,
        scheme=scheme.value,
        allocation=allocation.value,
        target=counted.value,
        sweeps=sweeps,
        layers=layers,
        ignore=ignore or (),
        activations=activations,
        readings=corrections,
        add_bias=add_bias,
        heldout=None if heldout is None else batches_from(heldout, network, batch_size),
        max_samples=max_samples,
        seed=seed,
        device=device,
        progress=not as_json,
    )
    result = with_notes(result, source)
    checkpoint.save(result, output, compressed=compressed, force=force, inputs=read)
    show(result.report, result.certificate, output, as_json, following=next_commands(output, model, weights, data, heldout))
    exit_unless_met(result.certificate)


def with_notes(result: PruneResult, source: Source) -> PruneResult:
    """The result with what is to be said of where the model's weights came from."""
    notes = tuple(note for note in source.notes if note not in result.report.notes)
    return replace(result, report=replace(result.report, notes=(*result.report.notes, *notes)))


def verify_command(
    folder: Folder,
    model: Model,
    data: Data,
    weights: Weights = None,
    untrained: Untrained = False,
    heldout: Heldout = None,
    batch_size: BatchSize = 256,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Recompute a saved certificate from the files, the reference model and the data."""
    try:
        network = given_model(model, weights, untrained, known=True).model
        certificate = verify(
            folder,
            network,
            batches_from(data, network, batch_size),
            None if heldout is None else batches_from(heldout, network, batch_size),
            device=device,
            progress=not as_json,
        )
    except NetTrimError as error:
        verdict = "does not recompute" if isinstance(error, CertificateError) else "could not be checked"
        if as_json:
            answer({"verdict": verdict, "holds": False})
        else:
            Terminal().print(f"NOT verified: {folder} {verdict}", highlight=False, markup=False, soft_wrap=True)
        raise
    if as_json:
        told = certificate.to_dict()
        answer({key: told[key] for key in ("verdict", "holds")} | {"certificate": told, "not_checked": certificate.not_checked})
    else:
        console = Terminal()
        console.print(render.certificate_table(certificate))
        for line in (f"verified: {certificate.verdict_words()}", f"not checked: {'; '.join(certificate.not_checked or ('nothing',))}"):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    exit_unless_met(certificate)


def report_command(
    folder: Folder,
    html: Annotated[Path | None, typer.Option(help="Also write the page to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Show the report and certificate of a saved result."""
    if html is not None and html.suffix != ".html":
        raise InvalidInput(f"page {html}: its name must end in .html; choose another")
    report, certificate = checkpoint.read_report(folder), checkpoint.read_certificate(folder)
    bench, stale = bench_files.read_bench(folder)
    if html is not None:
        staging.check([html], "page")
        state = checkpoint.read_weights(folder / checkpoint.MODEL)
        masks = {layer.name: (checkpoint.weight_of(state, layer.name) != 0).numpy() for layer in report.layers}
        page = render.report_html(report, certificate, masks, bench=bench, files=checkpoint.file_hashes(folder))
        with staging.writing(html.parent, [html.name], "page") as hidden:
            (hidden / html.name).write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    unseen = "" if certificate.heldout is None else " --heldout DATA"
    following = f"nettrim verify {shlex.quote(str(folder))} MODEL --weights FILE --data DATA{unseen}  (those that were given to prune)"
    show(report, certificate, folder, as_json, bench=None if bench is None else bench.to_dict(), following=following)
    if as_json:
        return
    for sentence in render.certificate_words(certificate)[1:]:
        Terminal().print(f"- {sentence}", highlight=False, markup=False)
    if bench is not None:
        for table in bench_table.bench_tables(bench):
            Terminal().print(table)
        for line in bench_table.bench_lines(bench):
            Terminal().print(line, highlight=False, markup=False)
    if stale:
        Terminal().print(f"note: {stale}", highlight=False, markup=False)


def distill_command(
    folder: Folder,
    model: Model,
    data: Data,
    output: OutputFolder,
    weights: Weights = None,
    untrained: Untrained = False,
    heldout: Heldout = None,
    loss: Annotated[LossName, typer.Option(help="Squared discrepancy of the outputs, or divergence of softened classes.")] = LossName.mse,
    temperature: Annotated[float, typer.Option(help="Divides the logits of kl.")] = 8.0,
    learn: Annotated[Learn, typer.Option(help="Train the pruned layers, or all parameters of the network.")] = Learn.pruned,
    steps: Annotated[int, typer.Option(help="Steps of the optimizer.")] = 4000,
    step_samples: Annotated[int, typer.Option(help="Samples in a step.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of the first step.")] = 3e-3,
    mixing: Annotated[bool, typer.Option(help="Train on mixtures of two inputs.")] = True,
    holdback: Annotated[float, typer.Option(help="Share of the calibration samples that choose which state is kept.")] = 0.1,
    batch_size: BatchSize = 256,
    seed: Annotated[int, typer.Option(help="Chooses the samples held back, their order and their mixtures.")] = 0,
    device: Device = None,
    compressed: Compressed = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a pruned model towards the trained one without labels, zeros kept, and certify it anew."""
    read = (folder, model, weights, data, heldout)
    check_weights(model, weights, untrained, known=True)
    checkpoint.check_output(output, force=force, inputs=read)
    source = given_model(model, weights, untrained, known=True)
    network = source.model
    checkpoint.check_state(network)
    batches = batches_from(data, network, batch_size)
    unseen = None if heldout is None else batches_from(heldout, network, batch_size)
    pruned = checkpoint.load(folder, copy.deepcopy(network))
    saved = PruneResult(pruned, checkpoint.read_report(folder), checkpoint.read_certificate(folder))
    # whatever the new certificate would refuse, it refuses before the training
    recertify(saved, pruned, network, batches, heldout=unseen, device=device, progress=not as_json)
    made = distill(
        pruned,
        network,
        batches,
        loss=loss.value,
        temperature=temperature,
        learn=learn.value,
        steps=steps,
        batch_size=step_samples,
        learning_rate=learning_rate,
        mixing=mixing,
        holdback=holdback,
        seed=seed,
        device=device,
        progress=not as_json,
    )
    result = recertify(saved, made.model, network, batches, heldout=unseen, device=device, progress=not as_json)
    result = with_notes(result, source)
    result = replace(result, report=replace(result.report, notes=(*result.report.notes, distilled_words(made))))
    checkpoint.save(result, output, compressed=compressed, force=force, inputs=read)
    if as_json:
        told = {item.name: getattr(made, item.name) for item in fields(made) if item.name != "model"}
        made_of = {"report": result.report.to_dict(), "certificate": result.certificate.to_dict(), "size": size_of(output)}
        answer({"output": str(output), "distilled": told, **made_of})
    else:
        show(result.report, result.certificate, output, as_json, following=next_commands(output, model, weights, data, heldout))
    exit_unless_met(result.certificate)
