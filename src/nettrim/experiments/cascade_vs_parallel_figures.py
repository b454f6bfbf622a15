"""The table and the picture of cascade against parallel."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from rich.table import Table

from ..render.fitting import FittingTable
from .cascade_vs_parallel import Summary, series
from .curves import Point
from .curves_figures import NAMES, bounds_in_words, percent

_COLOURS = ("#1864ab", "#2b8a3e", "#f08c00", "#c92a2a", "#862e9c", "#495057")


def table(summary: Summary) -> Table:
    """One row a pruned network, grouped by trained network, and what the comparison says."""
    shown = FittingTable(title=f"Cascade against parallel: {summary.dataset}, {summary.network}", keys=2)
    for name in ("keep", "l1", "trained, %", "scheme", "gain", "kept by layer, %", "kept, %", "discrepancy, %", "proven, %", "theorem, %"):
        shown.add_column(name, justify="right", no_wrap=name != "kept by layer, %")
    shown.add_column("accuracy, %", justify="right")
    shown.add_column("certificate", justify="right")
    for network in summary.trained:
        shown.add_section()
        first = (f"{network.keep:g}", f"{network.l1:g}", f"{100 * network.accuracy:.2f}")
        for point in [p for p in summary.points if p.series == series(network.keep, network.l1)]:
            shown.add_row(*first, *_row(point))
            first = ("", "", "")
    shown.caption = "\n".join(_captions(summary))
    return shown


def picture(summary: Summary, panel: Callable[[Axes], None] | None = None) -> Figure:
    """Weights kept against discrepancy, one panel for each dropout; ``panel`` draws one more, such as another data set's."""
    keeps = sorted({network.keep for network in summary.trained}, reverse=True)
    count = len(keeps) + (panel is not None)
    figure = Figure(figsize=(4.6 * count + 0.6, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    row = list(figure.subplots(1, count, squeeze=False)[0])
    penalties = sorted({network.l1 for network in summary.trained})
    methods = list(dict.fromkeys(point.method for point in summary.points))
    for axes, keep in zip(row, keeps, strict=False):
        _draw(axes, summary, keep, penalties, methods)
    # equal scales, so that panels can be compared
    own = row[: len(keeps)]
    low, high = min(a.get_ylim()[0] for a in own), max(a.get_ylim()[1] for a in own)
    for axes in own:
        axes.set_ylim(low, high)
    if panel is not None:
        panel(row[-1])
    handles, labels = row[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=8.5)
    title = f"{summary.dataset}, {summary.network}, {summary.samples:,} calibration images, cascade with gamma {summary.gamma:g}"
    figure.suptitle(title)
    return figure


def _draw(axes: Axes, summary: Summary, keep: float, penalties: Sequence[float], methods: Sequence[str]) -> None:
    for index, l1 in enumerate(penalties):
        colour = _COLOURS[index % len(_COLOURS)]
        for method in methods:
            for scheme, style, marker in (("parallel", "--", "o"), ("cascade", "-", "^")):
                points = [p for p in summary.points if (p.series, p.scheme, p.method) == (series(keep, l1), scheme, method)]
                points.sort(key=lambda p: p.gain)
                axes.plot(
                    [100 * p.discrepancy for p in points],
                    [100 * p.kept for p in points],
                    color=colour,
                    ls=style,
                    marker=marker,
                    mfc="white" if method != methods[0] else colour,
                    ms=5.5,
                    lw=1.5,
                )
        axes.plot([], [], color=colour, lw=3, label=f"trained with l1 {l1:g}")
    axes.plot([], [], color="#495057", ls="--", marker="o", label="parallel")
    axes.plot([], [], color="#495057", ls="-", marker="^", label="cascade")
    for index, method in enumerate(methods if len(methods) > 1 else ()):
        axes.plot([], [], color="#495057", ls="", marker="s", mfc="white" if index else "#495057", label=NAMES[method])
    axes.set(xscale="log", yscale="log", xlabel="discrepancy of the logits, relative (%)", ylabel="weights kept (%)")
    axes.set_title(f"dropout keeps {100 * keep:g} %")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    axes.grid(True, which="major", lw=0.4, color="#ced4da")


def _row(point: Point) -> list[str]:
    return [
        point.scheme if point.method == "published" else f"{point.scheme}, {NAMES[point.method]}",
        f"{point.gain:g}",
        " / ".join(f"{100 * layer.nonzeros / layer.weights:.1f}" for layer in point.layers),
        f"{100 * point.kept:.2f}",
        percent(point.discrepancy),
        percent(point.bound),
        percent(point.theorem),
        f"{100 * point.accuracy:.2f}",
        "holds" if point.holds else "does NOT hold",
    ]


def _captions(summary: Summary) -> list[str]:
    lines = [
        f"{summary.samples:,} calibration images, seed {summary.seed}, {summary.recipe['iterations']} iterations of training; "
        f"cascade: gamma {summary.gamma:g}, kappa 1",
        bounds_in_words(summary.holds, summary.theorems_hold, summary.smallest_slack, summary.largest_slack),
        "published: the cascade is sparser at equal discrepancy (a picture, without numbers at hand); ours: "
        + (f"sparser at {summary.sparser} of {summary.compared} points" if summary.compared else "no point of equal discrepancy"),
    ]
    if summary.compared:
        count = len(summary.comparisons[0].parallel_layers)
        ratios = [
            _geometric(
                [
                    c.cascade_layers[i] / c.parallel_layers[i]
                    for c in summary.comparisons
                    if min(c.cascade_layers[i], c.parallel_layers[i]) > 0
                ]
            )
            for i in range(count)
        ]
        whole = _geometric([c.cascade / c.parallel for c in summary.comparisons])
        lines.append(
            f"weights of the cascade per weight of the parallel scheme: {whole:.2f}; by layer " + ", ".join(f"{r:.2f}" for r in ratios)
        )
    return lines


def _geometric(ratios: Sequence[float]) -> float:
    return math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios)) if ratios else math.nan
