"""Tables for a terminal, and the report as plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD, Box
from rich.table import Table
from rich.text import Text

from ..certificate import Certificate
from ..report import PruneReport
from ..status import Status
from .fitting import PLAIN_BOX, Column, fitting_table, plain_text
from .numbers import clean, densities_text, percent, seconds_text, share_of, share_over_all_rows, short_count
from .words import headline, layer_remarks, left_out_words

_WIDTH = 110  # of plain text


@dataclass(frozen=True)
class ComparisonRow:
    """One network of a comparison. All but ``seconds`` and the texts are shares: 0.02 is shown as 2 %.

    ``discrepancy`` is the output's discrepancy from the reference network and ``bound`` its proven upper bound, both relative to
    the norm of the reference output. ``certificate`` is a short verdict such as ``"holds"``.
    """

    label: str
    densities: tuple[float, ...]
    density: float
    accuracy: float | None
    agreement: float | None
    discrepancy: float | None
    bound: float | None
    seconds: float | None
    certificate: str

    def cells(self) -> tuple[str, ...]:
        """All fields as text, in their order."""
        return (
            self.label,
            densities_text(self.densities),
            percent(self.density),
            percent(self.accuracy, decimals=2),
            percent(self.agreement, -1, decimals=2),
            percent(self.discrepancy),
            percent(self.bound, +1),
            seconds_text(self.seconds),
            self.certificate,
        )


def _status(status: Status) -> Text:
    style = "green" if status is Status.CONVERGED else "dim" if status.ok else "bold yellow"
    return Text(textwrap.fill(status.value, 9), style=style)


def _report_table(report: PruneReport, box: Box) -> Table:
    layers = report.layers
    tolerances = any(layer.tolerance is not None for layer in layers)
    unmet = sum(not layer.status.ok for layer in layers)
    columns = [
        Column("layer", [layer.name for layer in layers], "total", fold=6),
        Column("shape", [f"{layer.inputs}->{layer.outputs}" for layer in layers]),
        Column("activ-\nation", [layer.activation for layer in layers], fold=6),
        Column("density", [percent(layer.density) for layer in layers], percent(report.density)),
        Column(
            "nonzeros/\nweights",
            [f"{short_count(layer.nonzeros)}/{short_count(layer.weights)}" for layer in layers],
            f"{short_count(report.nonzeros)}/{short_count(report.weights)}",
        ),
        Column("dis-\ntance", [percent(layer.relative_distance) for layer in layers]),
    ]
    if tolerances:
        columns.append(Column("toler-\nance", [percent(layer.relative_tolerance) for layer in layers]))
    if any(layer.gap is not None for layer in layers):
        columns.append(Column("gap", [percent(layer.gap, +1) for layer in layers]))
    columns += [
        Column("status", [_status(layer.status) for layer in layers], f"{unmet:,} not" if unmet else "all met", justify="left"),
        Column("s", [seconds_text(layer.seconds) for layer in layers], seconds_text(report.seconds)),
    ]
    what = "distance and tolerance" if tolerances else "distance"
    return fitting_table(columns, f"{what}: share of the norm of the layer's reference output", box=box)


def report_table(report: PruneReport) -> Table:
    """The report as a table: one row per layer, then a total. Columns that no layer fills (tolerance, gap) are left out."""
    return _report_table(report, SIMPLE_HEAD)


def report_text(report: PruneReport) -> str:
    """The report as plain text without control codes: headline, table with an ASCII frame, what to do, notes."""
    lines = [textwrap.fill(headline(report), _WIDTH), "", plain_text(_report_table(report, PLAIN_BOX), width=_WIDTH)]
    notes = [f"{clean(layer.name)}: {remark}" for layer in report.layers for remark in layer_remarks(layer)]
    notes += [clean(note) for note in report.notes]
    for title, texts in (("not pruned", left_out_words(report)), ("notes", notes)):
        if texts:
            lines += ["", title, *(textwrap.fill(text, _WIDTH, initial_indent="  ", subsequent_indent="    ") for text in texts)]
    return "\n".join(lines)


def _yes_no(holds: bool) -> Text:
    return Text("yes", style="green") if holds else Text("NO", style="bold red")


def certificate_table(certificate: Certificate) -> Table:
    """The certificate as a table: one row per layer, then the network's output, as shares of the reference output's norm."""
    layers, network = certificate.layers, certificate.network
    sampled = any(layer.rows != layer.rows_total for layer in layers)
    columns = [
        Column("layer", [layer.name for layer in layers], "network output", fold=8),
        Column(
            "rows",
            [
                f"{layer.rows:,}" if layer.rows == layer.rows_total else f"{short_count(layer.rows)}/{short_count(layer.rows_total)}"
                for layer in layers
            ],
            f"{network.rows:,}",
        ),
        Column("distance", [percent(share_of(layer.distance, layer.reference_norm)) for layer in layers]),
    ]
    if any(layer.tolerance is not None for layer in layers):
        columns.append(Column("tolerance", [percent(share_of(layer.tolerance, layer.reference_norm)) for layer in layers]))
    columns += [
        Column(
            "discrep-\nancy",
            [percent(share_over_all_rows(layer.discrepancy, layer)) for layer in layers],
            percent(share_of(network.achieved, network.reference_norm)),
        ),
        Column(
            "proven\nbound",
            [percent(share_over_all_rows(layer.bound, layer), +1) for layer in layers],
            percent(share_of(network.bound, network.reference_norm), +1),
        ),
    ]
    if certificate.program == "halfspace" and any(layer.theorem is not None for layer in layers):
        columns.append(
            Column(
                "theorem's\nbound",
                [percent(share_over_all_rows(layer.theorem, layer), +1) for layer in layers],
                percent(share_of(network.bound_link_normalised, network.reference_norm), +1),
            )
        )
    if any(layer.gap is not None for layer in layers):
        columns.append(Column("gap", [percent(layer.gap, +1) for layer in layers]))
    columns.append(Column("holds", [_yes_no(layer.holds) for layer in layers], _yes_no(network.holds)))
    caption = "shares of the norm of the reference output" + ("; over sampled rows compared per row" if sampled else "")
    return fitting_table(columns, caption, f"certificate: {certificate.verdict.value}")


def comparison_table(rows: Sequence[ComparisonRow]) -> Table:
    """Several networks side by side: densities, accuracy, agreement with the reference, output discrepancy, bound, time, verdict."""
    widths = {
        "network": 10,
        "density by layer": 12,
        "density": 0,
        "accuracy": 0,
        "agree-\nment": 0,
        "discrep-\nancy": 0,
        "proven\nbound": 0,
        "s": 0,
        "certi-\nficate": 6,
    }
    cells = [row.cells() for row in rows]
    columns = [Column(header, [row[index] for row in cells], fold=fold) for index, (header, fold) in enumerate(widths.items())]
    return fitting_table(columns, "discrepancy and bound: share of the norm of the reference network's output", last_row=False)
