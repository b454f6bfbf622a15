"""The table and the picture of the L-OBS experiment."""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from ..render.fitting import FittingTable
from .lobs_study import Point, Summary


def table(summary: Summary) -> Table:
    """Ours and the published rows by network; what they say stands under it."""
    shown = FittingTable(
        title=f"Layer-wise optimal brain surgeon on {summary.dataset}: test error in % (discrepancy and bounds: of the output, in %)",
        keys=2,
    )
    columns = (
        "network",
        "method",
        "kept",
        "by layer",
        "dense",
        "pruned",
        "retrained",
        "iterations",
        "discrepancy",
        "certified",
        "L-OBS bound",
        "s",
    )
    for name in columns:
        shown.add_column(name, justify="left" if name in columns[:2] else "right", no_wrap=True)
    for network in summary.networks:
        for row in summary.published:
            if row.network == network:
                numbers = (row.kept, None, row.dense, row.pruned, row.retrained)
                cells = [_percent(value) for value in numbers]
                shown.add_row(network, f"published: {row.method}", *cells, f"{row.iterations:,}", "", "", "", "", style="dim")
        for p in summary.points:
            if p.network == network:
                shown.add_row(network, p.method, *_cells(p))
        shown.add_section()
    shown.caption = "\n".join(words(summary))
    return shown


def words(summary: Summary) -> Iterator[str]:
    """What stands under the table."""
    for network, best in summary.best.items():
        own = {p.method: p for p in summary.points if p.network == network and p.target == 0.07}
        greedy, refitted, once = own["greedy, with biases"], own["its weights, refitted"], own["L-OBS"]
        yield (
            f"{network}: best form of OBS: {best}, {own[best].pruned:.2%} before retraining; the published shortcut costs "
            f"{once.pruned - refitted.pruned:+.2%} by its updates and {refitted.pruned - greedy.pruned:+.2%} by sorting once"
        )
        for row in summary.published:
            if row.network == network and row.method == "L-OBS":
                verdict = "at or below" if own[best].pruned <= row.pruned else "ABOVE"
                after = f"retrained {own[best].retrained:.2%}, dense {own[best].dense:.2%}"
                yield f"{network}: {verdict} the published {row.pruned:.2%} at {row.kept:.0%}; {after}"
    yield "every certificate and every accumulated-error bound holds" if summary.holds else "A BOUND DOES NOT HOLD"


def picture(summary: Summary) -> Figure:
    """For each network: test errors before and after retraining; and what the output moved by, with its bounds."""
    count = len(summary.networks)
    figure = Figure(figsize=(13, 4.6 * count), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(count, 2, squeeze=False)
    for (left, right), network in zip(axes, summary.networks, strict=True):
        own = [p for p in summary.points if p.network == network and p.target == 0.07]
        _errors(left, network, own, summary)
        _bounds(right, own)
    return figure


def _errors(axes: Axes, network: str, points: list[Point], summary: Summary) -> None:
    places = range(len(points))
    axes.barh([i - 0.2 for i in places], [100 * p.pruned for p in points], 0.38, color="#1864ab", label="pruned")
    axes.barh([i + 0.2 for i in places], [100 * p.retrained for p in points], 0.38, color="#74c0fc", label="retrained")
    axes.axvline(100 * points[0].dense, color="#212529", lw=1.2, ls=":", label="dense")
    for row in summary.published:
        if row.network == network and row.method == "L-OBS":
            axes.axvline(100 * row.pruned, color="#e8590c", lw=1.4, ls="--", label="published L-OBS, pruned")
    axes.set_yticks(list(places), [p.method for p in points])
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="test error, %", title=f"{network}, 7 % of the weights kept")
    axes.legend(fontsize=8.5)


def _bounds(axes: Axes, points: list[Point]) -> None:
    own = [(p.achieved, p.certified, p.accumulated) for p in points if p.certified is not None and p.accumulated is not None]
    places = list(range(len(own)))
    looks = (("o", "#1864ab", "achieved"), ("s", "#2b8a3e", "certified"), ("D", "#e8590c", "accumulated error (Frobenius norms)"))
    for values, (marker, colour, label) in zip(zip(*own, strict=True), looks, strict=False):
        axes.plot(values, places, marker, color=colour, label=label)
    axes.set_yticks(places, [p.method for p in points if p.certified is not None and p.accumulated is not None])
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="discrepancy of the output, relative", title="Parallel scheme: what moved, and the proven bounds")
    axes.grid(True, which="major", lw=0.4, color="#ced4da")
    axes.legend(fontsize=8.5)


def _cells(p: Point) -> list[str]:
    by_layer = " / ".join(f"{100 * share:.3g}" for share in p.layers)
    moved = (p.achieved, p.certified, p.accumulated)
    errors = [_percent(value) for value in (p.dense, p.pruned, p.retrained)]
    bounds = ["" if value is None else f"{100 * value:,.0f}" for value in moved]
    return [_percent(p.kept), by_layer, *errors, f"{p.iterations:,}", *bounds, f"{p.seconds:.0f}"]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"
