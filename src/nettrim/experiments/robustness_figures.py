"""The table and the picture of the accuracies under noise."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from ..render.fitting import FittingTable
from .curves_figures import NAMES, bounds_in_words, percent
from .robustness import Curve, Summary

_COLOURS = {"published": "#1864ab", "preimage l1": "#2b8a3e", "preimage l0": "#d9480f"}
_STYLES = ("-", "--", ":", "-.")
_COLUMNS = 6  # noise levels shown in the table


def table(summary: Summary) -> Table:
    """One row a network: accuracy at some of the noise levels, and what pruning gained on average over all levels."""
    shown = FittingTable(title=f"Test accuracy (%) under noise of norm g times the image's: {summary.dataset}")
    for name in ("network", "gain", "kept, %", "discrepancy, %"):
        shown.add_column(name, justify="right" if name != "network" else "left", no_wrap=True)
    for index in range(_COLUMNS):
        shown.add_column("g, accuracy" if index == 0 else "", justify="right", no_wrap=True)
    shown.add_column("gained", justify="right")
    shown.add_column("certificate", justify="right")
    for network, architecture in summary.architectures.items():
        own = [curve for curve in summary.curves if curve.network == network]
        places = _places(len(own[0].levels))
        shown.add_section()
        levels = [f"g = {own[0].levels[place]:g}" for place in places]
        shown.add_row(architecture, "", "", "", *levels, *[""] * (_COLUMNS - len(levels)))
        for curve in own:
            values = [f"{100 * curve.mean[place]:.1f}" for place in places]
            shown.add_row(*_head(curve), *values, *[""] * (_COLUMNS - len(values)), *_tail(curve, summary))
    shown.caption = "\n".join(
        (
            f"{summary.samples:,} calibration images, seed {summary.seed}",
            f"accuracies: mean of {summary.repeats} draws of noise on {summary.tested:,} test images",
            "gained: accuracy less the trained network's, in points, on average over all levels above 0",
            bounds_in_words(summary.holds, summary.theorems_hold, summary.smallest_slack, summary.largest_slack),
            "no published numbers are at hand for these curves: the paper shows a picture",
        )
    )
    return shown


def picture(summary: Summary) -> Figure:
    """Above: accuracy against the noise level, one panel a network. Below: the same, less the trained network's."""
    count = len(summary.architectures)
    figure = Figure(figsize=(6.4 * count, 8.6), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(2, count, squeeze=False, height_ratios=(1.25, 1))
    for column, network in enumerate(summary.architectures):
        own = [curve for curve in summary.curves if curve.network == network]
        _draw(rows[0][column], own, summary.architectures[network])
        _draw_difference(rows[1][column], own)
    handles, labels = rows[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8.5)
    figure.suptitle(f"{summary.dataset}: accuracy under noise, {summary.repeats} draws (bands: one standard deviation)")
    return figure


def _draw(axes: Axes, own: list[Curve], title: str) -> None:
    for curve in own:
        y = [100 * value for value in curve.mean]
        axes.plot(curve.levels, y, **_style(curve, own))  # type: ignore[arg-type]
        low = [100 * (m - d) for m, d in zip(curve.mean, curve.deviation, strict=True)]
        high = [100 * (m + d) for m, d in zip(curve.mean, curve.deviation, strict=True)]
        axes.fill_between(curve.levels, low, high, color=_colour(curve), alpha=0.15, lw=0)
    axes.set(xlabel="noise level g: norm of the noise / norm of the image", ylabel="test accuracy (%)", title=title)
    axes.grid(True, lw=0.4, color="#ced4da")


def _draw_difference(axes: Axes, own: list[Curve]) -> None:
    base = next(curve for curve in own if not curve.method)
    for curve in own:
        y = [100 * (a - b) for a, b in zip(curve.mean, base.mean, strict=True)]
        axes.plot(curve.levels, y, **_style(curve, own))  # type: ignore[arg-type]
    axes.set(xlabel="noise level g: norm of the noise / norm of the image", ylabel="accuracy less the trained network's (points)")
    axes.grid(True, lw=0.4, color="#ced4da")


def _style(curve: Curve, own: list[Curve]) -> dict[str, object]:
    if not curve.method:
        return {"color": _colour(curve), "lw": 2.6, "label": "trained network"}
    gains = sorted({c.gain for c in own if c.method})
    style = _STYLES[gains.index(curve.gain) % len(_STYLES)]
    return {"color": _colour(curve), "lw": 1.5, "ls": style, "label": f"{NAMES[curve.method]}, gain {curve.gain:g}"}


def _colour(curve: Curve) -> str:
    return _COLOURS[curve.method] if curve.method else "#212529"


def _places(count: int) -> list[int]:
    """Positions of at most six levels, evenly spread from the first to the last."""
    if count <= _COLUMNS:
        return list(range(count))
    return [round(index * (count - 1) / (_COLUMNS - 1)) for index in range(_COLUMNS)]


def _head(curve: Curve) -> list[str]:
    if not curve.method:
        return ["trained network", "", "100", "0"]
    return [NAMES[curve.method], f"{curve.gain:g}", f"{100 * curve.kept:.2f}", percent(curve.discrepancy)]


def _tail(curve: Curve, summary: Summary) -> list[str]:
    if not curve.method:
        return ["", ""]
    gained = 100 * summary.gained[curve.network][f"{curve.method}, gain {curve.gain:g}"]
    return [f"{gained:+.2f}", "holds" if curve.holds else "does NOT hold"]
