"""The picture of a comparison of methods: the quality that each leaves and the time it takes, against the weights kept."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from ..compare import METHODS, ComparedRun, Comparison

# of Okabe and Ito (2008): told apart with every kind of colour vision; the markers tell them apart in grey
_COLOURS = ("#0072b2", "#000000", "#999999", "#e69f00", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")
_MARKERS = ("o", "x", "+", "s", "D", "^", "v", "P")
_LABELS = {"accuracy": "accuracy (%)", "agreement": "predicted class unchanged (%)", "discrepancy": "discrepancy of the outputs (%)"}
_CLOSE = 1.12  # ticks nearer than this factor would print over each other


def compare_picture(comparison: Comparison) -> Figure:
    """Two panels with one line a method: ``comparison.metric`` and seconds, against the share of weights kept."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    quality, time = figure.subplots(1, 2)
    styles = dict(zip(METHODS, zip(_COLOURS, _MARKERS, strict=True), strict=True))
    for label in dict.fromkeys(run.label for run in comparison.runs):
        runs = sorted((run for run in comparison.runs if run.label == label), key=lambda run: run.density)
        colour, marker = styles[runs[0].method]
        x = [100 * run.density for run in runs]
        quality.plot(x, [_value(run, comparison.metric) for run in runs], color=colour, marker=marker, lw=1.8, label=label)
        time.plot(x, [run.seconds for run in runs], color=colour, marker=marker, lw=1.8)
    where = "held-out" if comparison.measured_on == "heldout" else "calibration"
    quality.set(ylabel=_LABELS[comparison.metric], title=f"On {comparison.samples:,} {where} samples")
    time.set(ylabel="seconds", yscale="log", title=f"Time, {comparison.calibration_samples:,} calibration samples")
    time.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    time.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    time.yaxis.set_minor_locator(NullLocator())
    if comparison.metric == "discrepancy":
        quality.set_yscale("log")
        quality.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        quality.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    elif comparison.accuracy is not None:
        quality.axhline(100 * comparison.accuracy, color="#212529", lw=1, ls="--", label="reference network")
    for axes in (quality, time):
        _densities(axes, [100 * run.density for run in comparison.runs])
        axes.grid(True, which="major", lw=0.4, color="#ced4da")
    handles, labels = quality.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(8, len(labels)), fontsize=9)
    return figure


def _value(run: ComparedRun, metric: str) -> float:
    value = getattr(run, metric)
    return float("nan") if value is None else 100 * float(value)


def _densities(axes: Axes, densities: list[float]) -> None:
    """A logarithmic axis with the densities themselves as ticks."""
    shown: list[float] = []
    for density in sorted(densities):
        if density > 0 and (not shown or density / shown[-1] > _CLOSE):
            shown.append(density)
    axes.set(xlabel="weights kept (%)", xscale="log")
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.xaxis.set_minor_locator(NullLocator())
