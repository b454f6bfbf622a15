"""The table of a comparison of methods."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD, Box
from rich.table import Table
from rich.text import Text

from ..compare import Comparison
from .fitting import PLAIN_BOX, Column, fitting_table, plain_text
from .numbers import NONE, densities_text, percent, seconds_text


def compare_table(comparison: Comparison) -> Table:
    """One row for each method and sparsity, the reference network first. The best number of its kind at each sparsity is bold."""
    return _table(comparison, SIMPLE_HEAD)


def compare_text(comparison: Comparison) -> str:
    """The table as plain text."""
    return plain_text(_table(comparison, PLAIN_BOX))


def _table(comparison: Comparison, box: Box) -> Table:
    where = "held-out" if comparison.measured_on == "heldout" else "calibration"
    labels = list(dict.fromkeys(run.label for run in comparison.runs))
    runs = [run for label in labels for run in comparison.runs if run.label == label]
    best = _best(comparison)

    def cells(name: str, texts: list[str]) -> list[str | Text]:
        """The reference network's cell, empty, and those of the runs."""
        marked = zip(runs, texts, strict=True)
        return [NONE, *(Text(text, "bold" if getattr(run, name) == best[run.sparsity].get(name, ()) else "") for run, text in marked)]

    accuracy = cells("accuracy", [percent(run.accuracy, decimals=2) for run in runs])
    accuracy[0] = percent(comparison.accuracy, decimals=2)
    columns = [
        Column("method", ["reference", *(run.label for run in runs)], fold=9),
        Column("zeros\nasked", [NONE, *(percent(run.sparsity) for run in runs)]),
        Column("kept", [NONE, *(percent(run.density) for run in runs)]),
        Column("accu-\nracy", accuracy),
        Column("agree-\nment", cells("agreement", [percent(run.agreement, -1, decimals=2) for run in runs])),
        Column("discrep-\nancy", cells("discrepancy", [percent(run.discrepancy) for run in runs])),
    ]
    if comparison.measured_on == "heldout":
        columns.append(Column("on cali-\nbration", [NONE, *(percent(run.calibration_discrepancy) for run in runs)]))
    if any(run.bound is not None for run in runs):
        columns.append(Column("proven\nbound", [NONE, *(percent(run.bound, +1) for run in runs)]))
    columns += [
        Column("s", [NONE, *(seconds_text(run.seconds) for run in runs)]),
        Column("kept by layer", [NONE, *(densities_text(list(run.densities.values())) for run in runs)], fold=12),
    ]
    caption = (
        f"{comparison.calibration_samples:,} calibration samples; agreement: the reference network's predicted class; "
        "discrepancy and bound: share of the norm of its outputs, the bound on calibration samples"
    )
    starts = [1 + number for number, run in enumerate(runs) if number == 0 or run.label != runs[number - 1].label]
    title = f"Methods compared on {comparison.samples:,} {where} samples"
    return fitting_table(columns, caption, title, box, last_row=False, keys=2, sections=starts)


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
