"""The application: every command by its name, in the order in which help lists them."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from ..verification import versions
from . import deployment, overview, pruning, studies
from .ending import told
from .options import Command, Commands, ManyValues

app = typer.Typer(
    name="nettrim",
    cls=Commands,
    help="Prune trained networks layer by layer, with a guarantee. "
    "Exit codes: 0 done, 2 bad input, 3 guarantee not met, 130 interrupted; 1 is a fault of nettrim itself.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

SHORT = """\
nettrim prunes trained networks layer by layer, with a guarantee.

  nettrim layers net.py:make
      what would be pruned of the model that make() in net.py gives
  nettrim prune net.py:make --weights net.pt --data data.npz \\
      --sparsity 0.8 --output pruned
      prune it, and save it with its report and certificate
  nettrim verify pruned net.py:make --weights net.pt --data data.npz
      recompute every number of that certificate

All commands: nettrim --help. Of one: nettrim prune --help. To see it at
work on real data: nettrim demo."""


def _version(asked: bool) -> None:
    if asked:
        found = versions()
        typer.echo(f"nettrim {found['nettrim']}, torch {found['torch']}")
        raise typer.Exit


@app.callback()
def _start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show versions and end.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(SHORT)


def _add(name: str, command: Callable[..., None], example: str, kind: type[Command] = Command) -> None:
    lines = ["nettrim"]
    for part in re.split(" (?=--)", example.removeprefix("nettrim ")):
        if len(lines[-1]) + len(part) > 74:
            lines[-1] += " \\"
            lines.append(part)
        else:
            lines[-1] += f" {part}"
    app.command(name, cls=kind, epilog="\n\n".join(["Example:", *lines]))(told(command))


NET = "net.py:make --weights net.pt --data data.npz"

_add("layers", overview.layers_command, "nettrim layers net.py:make")
_add("prune", pruning.prune_command, f"nettrim prune {NET} --sparsity 0.8 --output out")
_add("verify", pruning.verify_command, f"nettrim verify out {NET}")
_add("report", pruning.report_command, "nettrim report out")
_add("distill", pruning.distill_command, f"nettrim distill out {NET} --output tuned")
_add("export", deployment.export_command, "nettrim export net.py:make --weights out --data data.npz --output net.onnx")
_add("bench", deployment.bench_command, "nettrim bench net.py:make --weights out --data data.npz", deployment.ManySizes)
_add("bound", studies.bound_command, f"nettrim bound {NET} --share 0.5")
_add("demo", studies.demo_command, "nettrim demo")
_add("compare", studies.compare_command, f"nettrim compare {NET} --output comparison", ManyValues)
_add("reproduce", studies.reproduce_command, "nettrim reproduce mnist-fc --quick")


def main() -> None:
    """Runs the command line."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever called
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # for as long as the program runs
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal's encoding does not have
    app()
