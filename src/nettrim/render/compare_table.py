"""The table of a comparison of methods."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from ..compare import Comparison
from .numbers import NONE, densities_text, percent, seconds_text

_WIDTH = 150  # of plain text


def compare_table(comparison: Comparison) -> Table:
    """One row for each method and sparsity, the reference network first. The best number of its kind at each sparsity is bold."""
    where = "held-out" if comparison.measured_on == "heldout" else "calibration"
    bounds, unseen = any(run.bound is not None for run in comparison.runs), comparison.measured_on == "heldout"
    extra = ["on calibration"] * unseen + ["proven bound"] * bounds
    table = Table(
        title=f"Methods compared on {comparison.samples:,} {where} samples",
        caption=f"{comparison.calibration_samples:,} calibration samples; agreement: the reference network's predicted class; "
        "discrepancy and bound: share of the norm of its outputs, the bound on calibration samples",
        title_justify="left",
        caption_justify="left",
        caption_style="dim",
    )
    for name in ("method", "zeros asked", "kept", "kept by layer"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=name != "kept by layer")
    for name in ("accuracy", "agreement", "discrepancy", *extra, "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("reference", NONE, NONE, NONE, percent(comparison.accuracy, decimals=2), NONE, NONE, *[NONE] * len(extra), NONE)
    best = _best(comparison)
    for label in dict.fromkeys(run.label for run in comparison.runs):
        table.add_section()
        for run in comparison.runs:
            if run.label != label:
                continue
            cells = {
                "accuracy": percent(run.accuracy, decimals=2),
                "agreement": percent(run.agreement, -1, decimals=2),
                "discrepancy": percent(run.discrepancy),
            }
            marked = [f"[bold]{text}[/]" if getattr(run, name) == best[run.sparsity].get(name) else text for name, text in cells.items()]
            table.add_row(
                label,
                percent(run.sparsity),
                percent(run.density),
                densities_text(list(run.densities.values())),
                *marked,
                *[percent(run.calibration_discrepancy)] * unseen,
                *[percent(run.bound, +1)] * bounds,
                seconds_text(run.seconds),
            )
    return table


def compare_text(comparison: Comparison) -> str:
    """The table as plain text."""
    console = Console(file=io.StringIO(), width=_WIDTH, color_system=None, force_terminal=False, no_color=True)
    with console.capture() as capture:
        console.print(compare_table(comparison))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _best(comparison: Comparison) -> dict[float | None, dict[str, float]]:
    """The best numbers at each sparsity, where there are several methods to choose from."""
    found: dict[float | None, dict[str, float]] = {}
    for sparsity in {run.sparsity for run in comparison.runs}:
        runs = [run for run in comparison.runs if run.sparsity == sparsity]
        found[sparsity] = {}
        if len(runs) > 1:
            for name, choose in (("accuracy", max), ("agreement", max), ("discrepancy", min)):
                values = [getattr(run, name) for run in runs if getattr(run, name) is not None]
                if values:
                    found[sparsity][name] = choose(values)
    return found
