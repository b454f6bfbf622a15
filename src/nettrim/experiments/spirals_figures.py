"""The tables and the picture of the nested-spirals experiment."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from rich.table import Table

from ..render.fitting import FittingTable
from .spirals import PUBLISHED, PUBLISHED_EXAMPLE, Cell, Summary

_COLOURS = {"published": "#1864ab", "preimage l1": "#2b8a3e", "preimage l0": "#e8590c"}
_MARKERS = {"published": "o", "preimage l1": "s", "preimage l0": "D"}
NAMES = {"published": "published program", "preimage l1": "preimage, l1", "preimage l0": "preimage, l0"}


def table(summary: Summary) -> Table:
    """One row a network: nonzero weights by layer as published and ours, trained and pruned; what is not shown stands under it."""
    shown = FittingTable(
        title=f"Nested spirals: nonzero weights by layer, cascade, rd < {summary.limit:g}; medians of {_repeats(summary)}",
        caption="\n".join(_captions(summary)),
    )
    ways = list(dict.fromkeys(cell.way for cell in summary.cells))
    for name in ("network", "trained, paper", "trained, ours", "pruned, paper", *(NAMES[way] for way in ways)):
        shown.add_column(name, justify="right")
    last = None
    for hidden, training in dict.fromkeys((cell.hidden, cell.training) for cell in summary.cells):
        if training != last:
            shown.add_section()
            last = training
        cells = {cell.way: cell for cell in summary.cells if (cell.hidden, cell.training) == (hidden, training)}
        published = PUBLISHED.get((hidden, training))
        shown.add_row(
            f"{hidden}-{hidden}, {training}",
            "" if published is None else _counts(published[0]),
            _counts(_trained(summary, hidden, training)),
            "" if published is None else _counts(published[1]),
            *(_cell(cells[way]) for way in ways),
        )
    return shown


def picture(summary: Summary) -> Figure:
    """Layer 2's nonzeros against the width, one panel for each training; then rd, on the training points and on others."""
    trainings = list(dict.fromkeys(cell.training for cell in summary.cells))
    figure = Figure(figsize=(4.9 * (len(trainings) + 1), 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    row = list(figure.subplots(1, len(trainings) + 1, squeeze=False)[0])
    for axes, training in zip(row, trainings, strict=False):
        _draw_counts(axes, summary, training)
    low, high = min(a.get_ylim()[0] for a in row[:-1]), max(a.get_ylim()[1] for a in row[:-1])
    for axes in row[:-1]:  # equal scales, so that panels can be compared
        axes.set_ylim(low, high)
    _draw_discrepancies(row[-1], summary)
    handles, labels = row[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    spirals = summary.spirals
    figure.suptitle(
        f"Nested spirals, 2-h-h-2, cascade: {spirals['points']} generated points, medians of {_repeats(summary)}, bars from least to most"
    )
    return figure


def _draw_counts(axes: Axes, summary: Summary, training: str) -> None:
    widths = sorted({cell.hidden for cell in summary.cells if cell.training == training})
    known = [h for h in widths if (h, training) in PUBLISHED]
    axes.plot(known, [PUBLISHED[h, training][0][1] for h in known], "x:", color="#868e96", ms=7, lw=1.2, label="trained, as published")
    axes.plot(widths, [_trained(summary, h, training)[1] for h in widths], ".--", color="#495057", ms=8, lw=1.2, label="trained, ours")
    axes.plot(
        known, [PUBLISHED[h, training][1][1] for h in known], "x-", color="#c2255c", ms=8, mew=2, lw=1.6, label="pruned, as published"
    )
    for way in dict.fromkeys(cell.way for cell in summary.cells):
        cells = sorted((c for c in summary.cells if (c.training, c.way) == (training, way)), key=lambda c: c.hidden)
        middle = [c.nonzeros[1] for c in cells]
        axes.errorbar(
            [c.hidden for c in cells],
            middle,
            yerr=[[m - c.least for m, c in zip(middle, cells, strict=True)], [c.most - m for m, c in zip(middle, cells, strict=True)]],
            fmt=f"{_MARKERS[way]}-",
            color=_COLOURS[way],
            ms=5,
            lw=1.5,
            capsize=3,
            label=f"pruned, ours: {NAMES[way]}",
        )
    axes.set(
        yscale="log", xlabel="units h of each hidden layer", ylabel="nonzero weights of layer 2 (h × h)", title=f"trained with {training}"
    )
    axes.set_xticks(widths)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(True, which="major", lw=0.4, color="#ced4da")


def _draw_discrepancies(axes: Axes, summary: Summary) -> None:
    networks = list(dict.fromkeys((cell.hidden, cell.training) for cell in summary.cells))
    ways = list(dict.fromkeys(cell.way for cell in summary.cells))
    for index, way in enumerate(ways):
        cells = {(c.hidden, c.training): c for c in summary.cells if c.way == way}
        at = [k + 0.22 * (index - (len(ways) - 1) / 2) for k in range(len(networks))]
        for filled in (True, False):
            axes.plot(
                at,
                [100 * (cells[n].rd if filled else cells[n].rd_heldout) for n in networks],
                _MARKERS[way],
                color=_COLOURS[way],
                mfc=_COLOURS[way] if filled else "white",
                ms=5,
            )
    axes.axhline(100 * summary.limit, color="#212529", ls="--", lw=1.2, label=f"limit on the training points, {summary.limit:.0%}")
    axes.plot([], [], "o", color="#495057", label="training points (calibration)")
    axes.plot([], [], "o", color="#495057", mfc="white", label="held-out points")
    axes.set_xticks(range(len(networks)), [f"{h}, {'l1' if 'l1' in t else 'no l1'}" for h, t in networks], rotation=60)
    axes.set(xlabel="units h, training", ylabel="relative discrepancy rd of the outputs (%)", title="discrepancy, by the same colours")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.25)  # room for the legend
    axes.grid(True, axis="y", lw=0.4, color="#ced4da")
    axes.legend(loc="upper right", fontsize=8.5)


def _captions(summary: Summary) -> list[str]:
    worst = max((cell.rd_heldout for cell in summary.cells), default=0.0)
    least = min((cell.accuracy_heldout for cell in summary.cells), default=0.0)
    lines = [
        f"seed {summary.seed}; {summary.spirals['points']} generated points in arms of {summary.spirals['turns']:g} turn(s); every trained "
        f"network classifies at least {summary.least_accuracy:.1%} of them",
        "counts are weights, without biases, by layer; in brackets the trainings that came within the limit, when not all",
        f"held-out points: median rd at most {worst:.1%}, median accuracy at least {least:.1%}",
    ]
    for way, count in summary.at_or_below.items():
        lines.append(
            f"layer 2 at or below the published count, {NAMES[way]}: {count} of {summary.compared} networks; "
            f"{summary.with_biases[way]} with our nonzero biases added to our count"
        )
    for example in summary.examples:
        published = PUBLISHED_EXAMPLE[example.training]
        lines.append(
            f"example 200-200, {example.training}, epsilon {example.epsilon:g}, gamma {example.gamma:g}, kappa {example.kappa:g}, "
            f"published program: {_counts(example.trained)} -> {_counts(example.nonzeros)}, rd {example.rd:.4f}, kappa reached "
            f"{example.kappa_reached} of {example.repeats}; paper {_counts(published[0])} -> {_counts(published[1])}, rd {published[2]:g}"
        )
    verdict = "the certificate of every result holds" if summary.holds else "NOT the certificate of every result holds"
    if summary.refused:
        verdict += f" (attempts refused because theirs does not: {summary.refused})"
    theorems = "no published bound is exceeded" if summary.theorems_hold else "a published bound is EXCEEDED"
    lines.append(f"{summary.prunings} prunings: {verdict}, {theorems}")
    for name, low, high in (
        ("proven bound", summary.smallest_slack, summary.largest_slack),
        ("published bound", summary.smallest_theorem_slack, summary.largest_theorem_slack),
    ):
        if low is not None and high is not None:
            lines.append(f"{name} / achieved discrepancy, layers and network: from {low:.4g} to {high:.4g}")
    if summary.largest_violation is not None:
        lines.append(f"published program: largest violation of a constraint off Omega in any result {summary.largest_violation:.2g}")
    return lines


def _cell(cell: Cell) -> str:
    words = _counts(cell.nonzeros)
    return words if cell.reached == cell.repeats else f"{words} ({cell.reached} of {cell.repeats})"


def _trained(summary: Summary, hidden: int, training: str) -> tuple[float, ...]:
    own = [t.nonzeros for t in summary.trained if (t.hidden, t.training) == (hidden, training)]
    return tuple(float(statistics.median(column)) for column in zip(*own, strict=True))


def _repeats(summary: Summary) -> str:
    count = max((cell.repeats for cell in summary.cells), default=0)
    return f"{count} training{'s' if count != 1 else ''}"


def _counts(counts: Sequence[float]) -> str:
    return "/".join(f"{count:g}" for count in counts)
