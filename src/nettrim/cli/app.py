"""The application: every command by its name, in the order in which help lists them."""

from __future__ import annotations

import typer

from . import deployment, pruning, studies
from .options import ManyValues
from .output import told

app = typer.Typer(
    name="nettrim",
    help="Prune trained networks layer by layer, with a guarantee. Exit codes: 0 done, 2 bad input, 3 guarantee not met.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("prune")(told(pruning.prune_command))
app.command("verify")(told(pruning.verify_command))
app.command("report")(told(pruning.report_command))
app.command("distill")(told(pruning.distill_command))
app.command("export")(told(deployment.export_command))
app.command("bench", cls=deployment.ManySizes)(told(deployment.bench_command))
app.command("bound")(told(studies.bound_command))
app.command("demo")(told(studies.demo_command))
app.command("compare", cls=ManyValues)(told(studies.compare_command))
app.command("reproduce")(told(studies.reproduce_command))


def main() -> None:
    """Runs the command line."""
    app()
