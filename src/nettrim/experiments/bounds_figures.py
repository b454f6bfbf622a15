"""The experiment on bounds as a table and a picture."""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from ..render.fitting import FittingTable
from .bounds_observed import Point, Summary

COLOURS = ("#1864ab", "#e8590c", "#2b8a3e", "#862e9c", "#495057", "#c92a2a")


def table(summary: Summary) -> Table:
    """Bounds and observed gaps; what else was found stands under it."""
    shown = FittingTable(title=f"Relative gap of the output, {summary.dataset}, {summary.depth} layers: bound and observed", keys=2)
    names = (
        "width",
        "share",
        "bound",
        "mean",
        "largest",
        "bound / largest",
        "exceeded",
        "ball bound",
        "farthest",
        "magnitude, signs",
        "observed",
    )
    for name in names:
        shown.add_column(name, justify="right", no_wrap=True)
    last = None
    for p in summary.points:
        if last is not None and p.width != last:
            shown.add_section()
        last = p.width
        ratio = f"{p.bound / p.largest:.1f}" if p.largest else "-"
        numbers = (p.ball, p.farthest, p.magnitude_bound, p.magnitude)
        counted = f"{p.exceeded} of {p.trials}"
        moved = (p.bound, p.mean, p.largest)
        shown.add_row(str(p.width), f"{p.share:g}", *(f"{v:.3g}" for v in moved), ratio, counted, *(f"{v:.3g}" for v in numbers))
    shown.caption = "\n".join(words(summary))
    return shown


def words(summary: Summary) -> Iterator[str]:
    """What stands under the table."""
    verdict = "as stated" if summary.consistent else "MORE OFTEN than stated"
    yield f"bounds at probability {1 - summary.delta:.0%}: exceeded {summary.exceeded} times in {summary.trials}, {verdict}"
    for own in summary.inverse:
        shares = f"{own.random:.2g} at random, {own.magnitude:.2g} by magnitude (random signs)"
        yield f"width {own.width}: gap {summary.gap:g} is safe up to share {shares}"


def picture(summary: Summary) -> Figure:
    """Left: against the share, for the narrowest and the widest network. Right: against the width, for a few shares."""
    figure = Figure(figsize=(12.5, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    widths = sorted({p.width for p in summary.points})
    shares = sorted({p.share for p in summary.points})
    for colour, width in zip(COLOURS, dict.fromkeys((widths[0], widths[-1])), strict=False):
        own = sorted((p for p in summary.points if p.width == width), key=lambda p: p.share)
        _draw(left, [p.share for p in own], own, colour, f"width {width}")
    chosen = dict.fromkeys((shares[0], shares[len(shares) // 2], shares[-1]))
    for colour, share in zip(COLOURS[2:], chosen, strict=False):
        own = sorted((p for p in summary.points if p.share == share), key=lambda p: p.width)
        _draw(right, [float(p.width) for p in own], own, colour, f"share {share:g}")
    left.set(xlabel="share of weights removed at random", ylabel="relative gap of the output", title="Against the share")
    right.set(xlabel="width of the hidden layers", title="Against the width")
    right.set_xticks(widths, [str(width) for width in widths])
    right.minorticks_off()
    for axes in (left, right):
        axes.set_ylim(top=60 * max(p.ball for p in summary.points))  # room for the legend
        axes.legend(fontsize=8.5, loc="upper center", ncols=2)
    figure.suptitle(
        f"Bound at probability {1 - summary.delta:.0%} (lines), observed mean and largest of the masks drawn (bars), "
        "bound uniform over the ball (dotted)"
    )
    return figure


def _draw(axes: Axes, x: list[float], points: list[Point], colour: str, label: str) -> None:
    axes.plot(x, [p.bound for p in points], "-", color=colour, lw=1.8, label=f"{label}, bound")
    axes.plot(x, [p.ball for p in points], ":", color=colour, lw=1.4)
    error = [[0.0 for _ in points], [p.largest - p.mean for p in points]]
    axes.errorbar(x, [p.mean for p in points], yerr=error, fmt="o", color=colour, ms=4.5, capsize=3, lw=1.2, label=f"{label}, observed")
    axes.set(xscale="log", yscale="log")
    axes.grid(True, which="major", lw=0.4, color="#ced4da")
