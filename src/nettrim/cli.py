"""The command line: parses arguments, calls the library, shows the result. Exit codes: 0 done, 2 bad input, 3 guarantee not met."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from . import checkpoint, render
from .bound_query import ask
from .certificate import Certificate
from .compare import compare, first_samples
from .methods import Magnitude, NetTrim
from .methods.targets import PerLayer
from .progress import CountBar
from .pruning import MAX_SAMPLES, prune
from .render.bounds import bound_table
from .report import PruneReport
from .sources import batches_from, model_from
from .status import CertificateError, InvalidInput, NetTrimError, Status
from .verify import verify

GUARANTEE_NOT_MET = 3
BAD_INPUT = 2
INTERRUPTED = 130

Given = ParamSpec("Given")


def _told(command: Callable[Given, None]) -> Callable[Given, None]:
    """Turns errors into messages and exit codes."""

    @functools.wraps(command)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except CertificateError as error:
            _fail(str(error), GUARANTEE_NOT_MET)
        except NetTrimError as error:
            _fail(str(error), BAD_INPUT)
        except KeyboardInterrupt:
            _fail("interrupted; earlier output is as it was", INTERRUPTED)

    return run


app = typer.Typer(
    name="nettrim",
    help="Prune trained networks layer by layer, with a guarantee. Exit codes: 0 done, 2 bad input, 3 guarantee not met.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Scheme(StrEnum):
    """Which inputs a layer sees."""

    cascade = "cascade"
    parallel = "parallel"


class Norm(StrEnum):
    """What Net-Trim minimises."""

    l1 = "l1"
    l0 = "l0"


class MethodName(StrEnum):
    """Pruning methods."""

    nettrim = "nettrim"
    magnitude = "magnitude"


class Program(StrEnum):
    """Which program of a layer is solved."""

    preimage = "preimage"
    halfspace = "halfspace"


class ExperimentName(StrEnum):
    """Published experiments that can be repeated."""

    recovery = "recovery"
    spirals = "spirals"
    mnist_fc = "mnist-fc"
    mnist_lenet_fc = "mnist-lenet-fc"
    cascade_vs_parallel = "cascade-vs-parallel"
    robustness = "robustness"
    bounds = "bounds"


class RuleName(StrEnum):
    """What a bound leaves to chance."""

    random = "random"
    bernoulli = "bernoulli"
    magnitude = "magnitude"
    any = "any"


class DatasetName(StrEnum):
    """Data sets of the demonstration."""

    digits = "digits"
    mnist = "mnist"
    fashion = "fashion-mnist"


Model = Annotated[str, typer.Argument(help="The model, as package.module:factory.")]
Weights = Annotated[Path | None, typer.Option(help="Trained weights: .safetensors, or a state dict saved by torch.save.")]
Data = Annotated[str, typer.Option(help="Calibration data: .npy, .npz or .safetensors file, or package.module:factory giving batches.")]
Heldout = Annotated[str | None, typer.Option(help="Held-out data for the statement about unseen inputs; same forms.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, and nothing else.")]
BatchSize = Annotated[int, typer.Option(help="Samples per batch when data come from a file.")]
Device = Annotated[str | None, typer.Option(help="Torch device; by default where the model is.")]


@app.command("prune")
@_told
def prune_command(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option(help="Folder for model.safetensors, report.json, certificate.json, report.html.")],
    weights: Weights = None,
    heldout: Heldout = None,
    epsilon: Annotated[list[str] | None, typer.Option(help="Tolerance, relative: a number, or LAYER=NUMBER (repeatable).")] = None,
    sparsity: Annotated[list[str] | None, typer.Option(help="Fraction of zeros in [0, 1): a number, or LAYER=NUMBER (repeatable).")] = None,
    penalty: Annotated[list[str] | None, typer.Option(help="Absolute penalty: a number, or LAYER=NUMBER (repeatable).")] = None,
    method: Annotated[MethodName, typer.Option(help="Pruning method.")] = MethodName.nettrim,
    norm: Annotated[Norm | None, typer.Option(help="Default: l1 for epsilon and penalty, l0 for sparsity.")] = None,
    polish: Annotated[bool | None, typer.Option(help="Least distance on the final support. Default: off for l1, on for l0.")] = None,
    program: Annotated[Program, typer.Option(help="Ours, or the published one (halfspace).")] = Program.preimage,
    gamma: Annotated[
        list[str] | None, typer.Option(help="Cascade: tolerances after the first layer, as published: a number, or LAYER=NUMBER.")
    ] = None,
    kappa: Annotated[float, typer.Option(help="With --gamma: factor on the tolerance of a layer without activation.")] = 1.0,
    scheme: Annotated[
        Scheme, typer.Option(help="Whose inputs a layer sees: the pruned network's or the reference network's.")
    ] = Scheme.cascade,
    layers: Annotated[list[str] | None, typer.Option(help="Only these layers: names or re:pattern (repeatable).")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Not these layers: names or re:pattern (repeatable).")] = None,
    activation: Annotated[list[str] | None, typer.Option(help="LAYER=ACTIVATION where the graph does not show it (repeatable).")] = None,
    max_samples: Annotated[int, typer.Option(help="Most rows kept for one layer.")] = MAX_SAMPLES,
    batch_size: BatchSize = 256,
    seed: Annotated[int, typer.Option(help="Chooses rows where there are more than --max-samples.")] = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Prune a trained model and save it with its report and certificate."""
    targets = {name: _target(name, texts) for name, texts in (("epsilon", epsilon), ("sparsity", sparsity), ("penalty", penalty))}
    chosen = _method(method, norm, polish, program, _target("gamma", gamma), kappa, targets)
    checkpoint.check_writable(output)
    network = model_from(model, weights)
    result = prune(
        network,
        batches_from(data, network, batch_size),
        chosen,
        scheme=scheme.value,
        layers=layers,
        ignore=ignore or (),
        activations=dict(_pair("activation", text) for text in activation or ()),
        heldout=None if heldout is None else batches_from(heldout, network, batch_size),
        max_samples=max_samples,
        seed=seed,
        device=device,
        progress=not as_json,
    )
    result.save(output)
    _show(result.report, result.certificate, output, as_json)
    _exit_unless_met(result.report, result.certificate)


@app.command("verify")
@_told
def verify_command(
    folder: Annotated[Path, typer.Argument(help="What nettrim prune or result.save wrote.")],
    model: Model,
    data: Data,
    weights: Weights = None,
    heldout: Heldout = None,
    batch_size: BatchSize = 256,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Recompute a saved certificate from the files, the reference model and the data."""
    network = model_from(model, weights)
    try:
        certificate = verify(
            folder,
            network,
            batches_from(data, network, batch_size),
            None if heldout is None else batches_from(heldout, network, batch_size),
            device=device,
        )
    except CertificateError as error:
        if as_json:
            _print_json({"holds": False, "error": str(error)})
        raise
    if as_json:
        _print_json({"holds": True, "certificate": certificate.to_dict()})
        return
    console = Console()
    console.print(render.certificate_table(certificate))
    console.print("verified: every number was recomputed and holds", highlight=False)


@app.command("report")
@_told
def report_command(
    folder: Annotated[Path, typer.Argument(help="What nettrim prune or result.save wrote.")],
    html: Annotated[Path | None, typer.Option(help="Also write the page to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Show the report and certificate of a saved result."""
    report, certificate = checkpoint.read_report(folder), checkpoint.read_certificate(folder)
    if html is not None:
        state = checkpoint.read_weights(folder / checkpoint.MODEL)
        masks = {layer.name: (checkpoint.weight_of(state, layer.name) != 0).numpy() for layer in report.layers}
        try:
            html.write_text(render.report_html(report, certificate, masks), encoding="utf-8")
        except OSError as error:
            raise InvalidInput(f"page {html}: it cannot be written ({error.strerror})") from error
    _show(report, certificate, folder, as_json)
    if not as_json:
        for sentence in render.certificate_words(certificate)[1:]:
            Console().print(f"- {sentence}", highlight=False, markup=False)


@app.command("bound")
@_told
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
    layers: Annotated[list[str] | None, typer.Option(help="Only these layers: names or re:pattern (repeatable).")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Not these layers: names or re:pattern (repeatable).")] = None,
    batch_size: BatchSize = 256,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """How far removing a share of the weights can move the output, before anything is pruned."""
    asked = ask(
        model_from(model, weights),
        data,
        radius=radius,
        input_shape=input_shape,
        share=_target("share", share),
        gap=gap,
        relative=relative,
        delta=delta,
        rule=rule.value,
        layers=layers,
        ignore=ignore or (),
        batch_size=batch_size,
        device=device,
    )
    if as_json:
        _print_json({"bounds": [bound.to_dict() for bound in asked]})
        return
    for bound in asked:
        Console().print(bound_table(bound))


@app.command("demo")
@_told
def demo_command(
    dataset: Annotated[DatasetName, typer.Option(help="Which data set.")] = DatasetName.digits,
    data: Annotated[Path | None, typer.Option(help="Folder with the IDX files of mnist or fashion-mnist.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the pruned model, its report and its certificate.")] = Path("out/demo"),
    epsilon: Annotated[float, typer.Option(help="Tolerance of every layer, relative to its output's norm.")] = 0.1,
    samples: Annotated[int, typer.Option(help="Calibration images.")] = 4096,
    seed: Annotated[int, typer.Option(help="Seed of training and pruning.")] = 0,
    as_json: Json = False,
) -> None:
    """Train a small network on real data, prune it in several ways without retraining, and compare."""
    from .experiments import demo  # needs the extra packages for data sets

    checkpoint.check_writable(output)
    console = Console(stderr=as_json)
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
    checkpoint.save(done.result, output, comparison=done.rows)
    if as_json:
        rows = [dict(row.__dict__, densities=list(row.densities)) for row in done.rows]
        _print_json({"comparison": rows, "report": done.result.report.to_dict(), "certificate": done.result.certificate.to_dict()})
    else:
        console.print(render.comparison_table(done.rows))
        _show(done.result.report, done.result.certificate, output, as_json)
    _exit_unless_met(done.result.report, done.result.certificate)


class _ManyValues(typer.core.TyperCommand):
    """Takes several values behind one ``--methods`` or ``--sparsity``: ``--sparsity 0.5 0.9`` is ``--sparsity 0.5 --sparsity 0.9``.

    The model, told by its colon, is never taken for a value.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spread: list[str] = []
        option = ""
        for text in args:
            if option and not text.startswith("-") and ":" not in text:
                spread += [option, text]
            elif text in ("--methods", "--sparsity"):
                option = text
            else:
                option = ""
                spread.append(text)
        return super().parse_args(ctx, spread)


@app.command("compare", cls=_ManyValues)
@_told
def compare_command(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option(help="Folder for results, table and picture; an interrupted comparison there is continued.")],
    weights: Weights = None,
    heldout: Annotated[
        str | None, typer.Option(help="Data to measure on, with labels for accuracy; by default the calibration data.")
    ] = None,
    methods: Annotated[list[str] | None, typer.Option(help="Names of methods, or all (the default).")] = None,
    sparsity: Annotated[list[float] | None, typer.Option(help="Fractions of zeros in [0, 1). Default: 0.5 0.7 0.9.")] = None,
    pattern: Annotated[str | None, typer.Option(help="Which weights may stay, such as 2:4, for all methods.")] = None,
    scheme: Annotated[
        Scheme, typer.Option(help="Whose inputs a layer sees: the pruned network's or the reference network's.")
    ] = Scheme.cascade,
    layers: Annotated[list[str] | None, typer.Option(help="Only these layers: names or re:pattern (repeatable).")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Not these layers: names or re:pattern (repeatable).")] = None,
    activation: Annotated[list[str] | None, typer.Option(help="LAYER=ACTIVATION where the graph does not show it (repeatable).")] = None,
    samples: Annotated[int | None, typer.Option(help="Only this many calibration samples, the first ones.")] = None,
    max_samples: Annotated[int, typer.Option(help="Most rows kept for one layer.")] = MAX_SAMPLES,
    batch_size: BatchSize = 256,
    seed: Annotated[int, typer.Option(help="Chooses rows where there are more than --max-samples, and what Random keeps.")] = 0,
    device: Device = None,
    resume: Annotated[bool, typer.Option(help="Continue what is in the folder.")] = True,
    as_json: Json = False,
) -> None:
    """Prune a model with several methods, and compare what they leave."""
    from .render import compare_files  # drawing is needed only here

    folder = checkpoint.check_writable(output)
    network = model_from(model, weights)
    batches = batches_from(data, network, batch_size)
    with CountBar(Console(stderr=True), silent=as_json) as bar:
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
            activations=dict(_pair("activation", text) for text in activation or ()),
            max_samples=max_samples,
            seed=seed,
            device=device,
            folder=folder,
            resume=resume,
            progress=bar.advance,
        )
    files = compare_files.write(comparison, folder)
    if as_json:
        _print_json(comparison.to_dict() | {"files": [str(file) for file in files]})
        return
    _show_wide(compare_files.compare_table(comparison))
    for file in files:
        Console().print(f"written: {file}", highlight=False, markup=False, soft_wrap=True)


@app.command("reproduce")
@_told
def reproduce_command(
    name: Annotated[ExperimentName, typer.Argument(help="The published experiment.")],
    output: Annotated[Path, typer.Option(help="Folder for numbers and pictures; an interrupted run there is continued.")] = Path(
        "out/reproduce"
    ),
    quick: Annotated[bool, typer.Option(help="A smaller form, about two minutes on two cores.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    dataset: Annotated[DatasetName, typer.Option(help="Images of the experiments that need some.")] = DatasetName.mnist,
    data: Annotated[Path | None, typer.Option(help="Folder with the IDX files of mnist or fashion-mnist.")] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration images; by default the experiment's own choice.")] = None,
    as_json: Json = False,
) -> None:
    """Repeat a published experiment: numbers beside the published ones, a table and a picture."""
    from .experiments import reproduce  # what the experiments need is needed only here

    folder = checkpoint.check_writable(output / name.value)
    with CountBar(Console(stderr=True), silent=as_json) as bar:
        settings = reproduce.Settings(folder, quick, seed, dataset.value, data, samples, bar.advance)
        outcome = reproduce.run(name.value, settings)
    if as_json:
        _print_json(outcome.numbers)
        return
    console = _show_wide(outcome.table)
    for line in outcome.words:
        console.print(line, highlight=False, markup=False)
    for file in outcome.files:
        console.print(f"written: {file}", highlight=False, markup=False, soft_wrap=True)


def main() -> None:
    """Runs the command line."""
    app()


def _fail(message: str, code: int) -> None:
    Console(stderr=True).print(f"error: {message}", style="bold", highlight=False, markup=False, soft_wrap=True)
    sys.exit(code)


def _target(name: str, texts: Sequence[str] | None) -> PerLayer | None:
    """A number, or a mapping from LAYER=NUMBER."""
    if not texts:
        return None
    if len(texts) == 1 and "=" not in texts[0]:
        return _number(name, texts[0])
    pairs = [_pair(name, text) for text in texts]
    return {layer: _number(f"{name} of {layer}", value) for layer, value in pairs}


def _pair(name: str, text: str) -> tuple[str, str]:
    layer, equals, value = text.rpartition("=")
    if not equals or not layer or not value:
        raise InvalidInput(f"--{name} {text!r}: several values must each be written LAYER=VALUE")
    return layer, value


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InvalidInput(f"{name} must be a number, found {text!r}") from error


def _method(
    name: MethodName,
    norm: Norm | None,
    polish: bool | None,
    program: Program,
    gamma: PerLayer | None,
    kappa: float,
    targets: Mapping[str, PerLayer | None],
) -> NetTrim | Magnitude:
    if name is MethodName.magnitude:
        sparsity = targets["sparsity"]
        if sparsity is None or any(value is not None for key, value in targets.items() if key != "sparsity"):
            raise InvalidInput("method magnitude needs --sparsity, and nothing else")
        if norm is not None or polish is not None or program is not Program.preimage or gamma is not None or kappa != 1:
            raise InvalidInput("method magnitude takes none of --norm, --polish, --program, --gamma and --kappa")
        return Magnitude(sparsity=sparsity)
    return NetTrim(
        epsilon=targets["epsilon"],
        sparsity=targets["sparsity"],
        penalty=targets["penalty"],
        program=program.value,
        gamma=gamma,
        kappa=kappa,
        norm=None if norm is None else norm.value,
        polish=polish,
    )


def _show(report: PruneReport, certificate: Certificate, folder: Path, as_json: bool) -> None:
    if as_json:
        _print_json({"output": str(folder), "report": report.to_dict(), "certificate": certificate.to_dict()})
        return
    console = Console()
    console.print(render.report_table(report))
    console.print(render.certificate_table(certificate))
    console.print(render.certificate_words(certificate)[0], highlight=False, markup=False)
    for note in report.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    page = folder / checkpoint.PAGE
    if page.is_file():
        console.print(f"report: {page}", highlight=False, markup=False, soft_wrap=True)


def _show_wide(table: Table) -> Console:
    """Prints a table whole: without its numbers it says nothing; lines may run over a narrow terminal."""
    console = Console()
    console.width = max(console.width, Measurement.get(console, console.options.update(max_width=10_000), table).maximum)
    console.print(table)
    return console


def _print_json(data: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(data, indent=1, allow_nan=False) + "\n")


def _exit_unless_met(report: PruneReport, certificate: Certificate) -> None:
    """A tolerance that was out of reach or a number that does not hold ends with exit code 3."""
    missed = [layer.name for layer in report.layers if layer.status is Status.INFEASIBLE]
    if missed:
        _fail(
            f"guarantee not met: the tolerance is out of reach for {', '.join(missed)} (the best reachable distance was used)",
            GUARANTEE_NOT_MET,
        )
    if not certificate.holds:
        _fail("guarantee not met: the certificate does not hold", GUARANTEE_NOT_MET)
