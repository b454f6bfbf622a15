"""Options that commands share, and how their texts are read."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextvars import ContextVar
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..factories import factory_named
from ..methods.targets import PerLayer
from ..sources import Source, carries_weights, source_from
from ..status import InvalidInput
from .ending import usage_told


class Scheme(StrEnum):
    """Which inputs a layer sees."""

    cascade = "cascade"
    parallel = "parallel"


class DatasetName(StrEnum):
    """Data sets of the demonstration and the experiments."""

    digits = "digits"
    mnist = "mnist"
    fashion = "fashion-mnist"


GROUPS = {
    "What you choose": (
        *("output", "sparsity", "epsilon", "method", "methods", "pattern", "layers", "ignore", "allocation", "counted", "compressed"),
        *("force", "format", "compacted", "loss", "steps", "share", "gap", "relative", "rule", "dataset", "quick", "html", "batch_sizes"),
        *("weights_too", "measure", "resume"),
    ),
    "Data": ("data", "weights", "untrained", "heldout", "reference", "samples", "batch_size", "radius", "input_shape"),
    "Options": ("help", "as_json", "version"),
}
"""The groups of options in help; all others are for experts."""

Model = Annotated[str, typer.Argument(help="package.module:factory, file.py:factory, or a .pt2 program of torch.export.")]
Folder = Annotated[Path, typer.Argument(help="What nettrim prune or result.save wrote.")]
Weights = Annotated[Path | None, typer.Option(help="Trained weights: .safetensors, or a state dict saved by torch.save.")]
Untrained = Annotated[
    bool,
    typer.Option(
        "--untrained",
        help="Instead of --weights: take the model as its factory makes it, with random weights or those it loads itself.",
    ),
]
Data = Annotated[str, typer.Option(help="Calibration data: .npy, .npz, .safetensors, or a factory of batches.")]
Heldout = Annotated[str | None, typer.Option(help="Other data, for what is said of unseen inputs.")]
SchemeOption = Annotated[Scheme, typer.Option(help="Whose inputs a layer sees: the pruned or the reference network's.")]
Layers = Annotated[list[str] | None, typer.Option(help="Only these layers: names or re:pattern (repeatable).")]
Ignore = Annotated[list[str] | None, typer.Option(help="Not these layers: names or re:pattern (repeatable).")]
ActivationOption = Annotated[
    list[str] | None,
    typer.Option("--activation", help="LAYER=ACTIVATION where the graph does not show it (repeatable)."),
]
ReadingOption = Annotated[
    list[str] | None,
    typer.Option(
        "--reading",
        help="LAYER:PART=VALUE (repeatable): corrects norm, branch, activation or pool behind a layer; none takes it out.",
    ),
]
MaxSamples = Annotated[int, typer.Option(help="Most rows kept for one layer.")]
BatchSize = Annotated[int, typer.Option(help="Samples per batch when data come from a file.")]
Device = Annotated[str | None, typer.Option(help="Torch device; by default where the model is.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an earlier result in --output. Inputs and files of others stay.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, and nothing else.")]


_written: ContextVar[tuple[str, ...]] = ContextVar("written", default=())


class Command(typer.core.TyperCommand):
    """A command whose help shows its options in groups, and which keeps its arguments as they were written."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        panels = {name: panel for panel, names in GROUPS.items() for name in names}
        self.params.sort(key=lambda option: [*GROUPS].index(panels[option.name]) if option.name in panels else len(GROUPS))
        for option in self.params:
            if isinstance(option, typer.core.TyperOption):
                option.rich_help_panel = panels.get(option.name or "", "Expert")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keeps them for :func:`again`."""
        _written.set((ctx.info_name, *args))
        with usage_told(args):
            return super().parse_args(ctx, args)


class Commands(typer.core.TyperGroup):
    """The commands by name; one that there is not is told of in JSON too."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is named first."""
        with usage_told(args):
            return super().resolve_command(ctx, args)


def again(*more: str) -> str:
    """The command under way, with more arguments, as a line for a shell."""
    return shlex.join(["nettrim", *_written.get(), *more])


def check_weights(text: str, weights: Path | None, untrained: bool, *, known: bool = False) -> None:
    """Refuses a factory without ``--weights`` whose own weights ``--untrained`` does not ask for, and both; a program holds its own.
    Which weights are meant can be ``known``: a saved result has the hash of those that it was made from.

    Raises:
        InvalidInput: the message holds the command as it could be meant. Or it is no name of a factory.
    """
    if not carries_weights(text):
        factory_named(text, "model")
    if carries_weights(text):
        if untrained:
            raise InvalidInput(f"model {text}: a .pt2 program holds its weights; leave out --untrained")
    elif weights is None and not untrained and not known:
        raise InvalidInput(
            f"model {text}: a factory makes a model, not its trained weights; add --weights FILE. If the factory loads them itself, or "
            f"random weights are meant, say so:\n  {again('--untrained')}"
        )
    elif weights is not None and untrained:
        raise InvalidInput(f"--weights {weights} and --untrained say two things of the weights; leave out one")


def given_model(text: str, weights: Path | None, untrained: bool, *, known: bool = False) -> Source:
    """The model that a command is given, with its trained weights. Raises InvalidInput."""
    check_weights(text, weights, untrained, known=known)
    return source_from(text, weights)


class ManyValues(Command):
    """Takes several values behind one ``--methods`` or ``--sparsity``: ``--sparsity 0.5 0.9`` is ``--sparsity 0.5 --sparsity 0.9``.

    The model, told by its colon or its .pt2, is never taken for a value.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Spreads the values before they are parsed."""
        spread: list[str] = []
        option = ""
        for text in args:
            if option and not text.startswith("-") and ":" not in text and not text.endswith(".pt2"):
                spread += [option, text]
            elif text in ("--methods", "--sparsity"):
                option = text
            else:
                option = ""
                spread.append(text)
        return super().parse_args(ctx, spread)


def target(name: str, texts: Sequence[str] | None) -> PerLayer | None:
    """A number, or a mapping from LAYER=NUMBER."""
    if not texts:
        return None
    if len(texts) == 1 and "=" not in texts[0]:
        return _number(name, texts[0])
    return {layer: _number(f"{name} of {layer}", value) for layer, value in by_layer(name, texts).items()}


def by_layer(name: str, texts: Sequence[str] | None) -> dict[str, str]:
    """A mapping from LAYER=VALUE."""
    found: dict[str, str] = {}
    for text in texts or ():
        layer, equals, value = text.rpartition("=")
        if not equals or not layer or not value:
            raise InvalidInput(f"--{name} {text!r}: several values must each be written LAYER=VALUE")
        if layer in found:
            raise InvalidInput(f"--{name}: {layer!r} is given twice, as {found[layer]!r} and as {value!r}; leave one out")
        found[layer] = value
    return found


def readings(texts: Sequence[str] | None) -> dict[str, dict[str, str | None]]:
    """Corrections by layer from LAYER:PART=VALUE; the value ``none`` takes the part out. Colons may stand in LAYER (``re:pattern``)."""
    found: dict[str, dict[str, str | None]] = {}
    for text in texts or ():
        place, _, value = text.rpartition("=")
        layer, _, part = place.rpartition(":")
        if not layer or not part or not value:
            raise InvalidInput(f"--reading {text!r}: it must be written LAYER:PART=VALUE, such as conv1:norm=bn1 or fc1:activation=none")
        parts = found.setdefault(layer, {})
        if part in parts:
            raise InvalidInput(f"--reading {text!r}: {part!r} of {layer!r} is given twice; leave one out")
        parts[part] = None if value.lower() == "none" else value
    return found


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InvalidInput(f"{name} must be a number, found {text!r}") from error
