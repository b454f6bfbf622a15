"""The table and the picture of network trimming."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from ..render.fitting import FittingTable
from .network_trimming import Run, Summary

_COLOURS = ("#1864ab", "#2b8a3e", "#d9480f", "#862e9c", "#5c940d", "#c2255c", "#495057")


def table(summary: Summary) -> Table:
    """One row a round, the published rows under LeNet's."""
    shown = FittingTable(title=f"Network trimming: {summary.dataset}", caption="\n".join(captions(summary)))
    shown.add_column("round", no_wrap=True)
    shown.add_column("sizes")
    for name in ("parameters", "times fewer", "validation, %", "retrained, %", "test, %", "retrained, %"):
        shown.add_column(name, justify="right")
    for run in summary.runs:
        shown.add_section()
        for step in run.steps:
            number = f"{run.network}, trained" if not step.number else f"{step.number}" if step.kept else f"{step.number}, taken back"
            accuracies = (step.validation_trimmed, step.validation, step.test_trimmed, step.test)
            shown.add_row(number, step.sizes, f"{step.parameters:,}", f"{step.compression:.2f}", *(f"{100 * x:.2f}" for x in accuracies))
        if run.network == "lenet5":
            shown.add_section()
            for row in summary.published:
                tests = (f"{100 * row.trimmed:.2f}", f"{100 * row.retrained:.2f}")
                shown.add_row("published", row.sizes, "", f"{row.compression:.2f}", "", "", *tests)
    return shown


def captions(summary: Summary) -> tuple[str, ...]:
    """What the numbers are, and what they say."""
    lines = [
        f"APoZ and the decision about a round: {summary.validation:,} training images held back; test: {summary.tested:,} images",
        f"a round is kept when validation is at most {100 * summary.tolerance:g} points below the trained network's; seed {summary.seed}",
    ]
    for run in summary.runs:
        best, dense = run.best, run.steps[0]
        lines.append(
            f"{run.network}: {best.compression:.2f} times fewer parameters at {100 * best.test:.2f} % "
            f"(trained: {100 * dense.test:.2f} %); ended: {run.stopped}"
        )
    return tuple(lines)


def picture(summary: Summary) -> Figure:
    """A row a network: mean APoZ by layer over the rounds, and accuracy against the number of parameters."""
    figure = Figure(figsize=(11, 4.2 * len(summary.runs)), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(summary.runs), 2, squeeze=False)
    for (left, right), run in zip(rows, summary.runs, strict=True):
        _draw_apoz(left, run)
        _draw_accuracy(right, run, summary)
    figure.suptitle(f"Network trimming: {summary.dataset}")
    return figure


def _draw_apoz(axes: Axes, run: Run) -> None:
    """Mean and standard deviation of each layer's APoZ, as each round found it."""
    steps = [step for step in run.steps if step.layers]
    names = [layer.name for layer in steps[0].layers] if steps else []
    for place, name in enumerate(names):
        found = [(step.number, layer) for step in steps for layer in step.layers if layer.name == name]
        numbers = [number + 0.6 * (place / max(1, len(names) - 1) - 0.5) for number, _ in found]
        means = [100 * layer.mean for _, layer in found]
        spreads = [100 * (sum((x - layer.mean) ** 2 for x in layer.apoz) / len(layer.apoz)) ** 0.5 for _, layer in found]
        axes.errorbar(numbers, means, spreads, marker="o", markersize=4, capsize=2, color=_COLOURS[place % len(_COLOURS)], label=name)
    axes.set_xticks([step.number for step in steps])
    axes.set_xlabel("round")
    axes.set_ylabel("zeros of a neuron's output, %")
    axes.set_title(f"{run.network}: APoZ by layer (mean, one standard deviation)", fontsize=10)
    if names:
        axes.legend(fontsize=8)


def _draw_accuracy(axes: Axes, run: Run, summary: Summary) -> None:
    ratios = [step.compression for step in run.steps]
    axes.plot(ratios, [100 * step.test for step in run.steps], "o-", color=_COLOURS[0], label="test, retrained")
    axes.plot(ratios[1:], [100 * step.test_trimmed for step in run.steps[1:]], "o:", color=_COLOURS[0], label="test, before retraining")
    if run.network == "lenet5":
        published = [row.compression for row in summary.published]
        axes.plot(published, [100 * row.retrained for row in summary.published], "s-", color=_COLOURS[2], label="published, retrained")
        axes.plot(published[1:], [100 * row.trimmed for row in summary.published[1:]], "s:", color=_COLOURS[2], label="published, before")
    axes.axhline(100 * run.steps[0].test, color="#868e96", linewidth=0.8, label="trained network")
    axes.set_xlabel("times fewer parameters")
    axes.set_ylabel("accuracy, %")
    axes.set_title(f"{run.network}: accuracy by round", fontsize=10)
    axes.legend(fontsize=8)
