"""Tables and pictures of the curves over the gains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from rich.table import Table

from ..render.fitting import FittingTable
from .curves import MAGNITUDE, Point, Published, Summary

_COLOURS = {"published": "#1864ab", "preimage l1": "#2b8a3e", "preimage l0": "#d9480f"}
_MARKERS = {"published": "o", "preimage l1": "s", "preimage l0": "^"}
NAMES = {"published": "published program", "preimage l1": "preimage program, l1", "preimage l0": "preimage program, l0"}
"""The methods' names in full."""


def table(summary: Summary) -> Table:
    """One row a pruned network, magnitude's accuracies beside; published results among ours."""
    shown = FittingTable(title=summary.title, caption="\n".join(captions(summary)), keys=2)
    shown.add_column("gain", justify="right", no_wrap=True)
    shown.add_column("method", no_wrap=True)
    columns = ("kept by layer, %", "kept, %", "discrepancy, %", "proven, %", "theorem, %", "accuracy, %", "tuned, %")
    for name in (*columns, "magnitude, %", "tuned, %", "certificate"):
        shown.add_column(name, justify="right", no_wrap=name != "kept by layer, %")
    for origin in summary.trained:
        shown.add_section()
        shown.add_row("", f"{origin.label}: trained", "100", "100", "0", "", "", f"{100 * origin.accuracy:.2f}", "", "", "", "")
        for result in summary.published:
            if result.series == origin.label:
                shown.add_row(*_published_row(result))
        for point in [p for p in summary.points if p.series == origin.label and not p.magnitude]:
            shown.add_row(*_row(point, _companion(point, summary.points)))
    return shown


def captions(summary: Summary) -> Iterator[str]:
    """What stands under the table: the state of the bounds, and what the published numbers are."""
    yield f"{summary.dataset}, {summary.samples:,} calibration images, seed {summary.seed}; accuracies on test images"
    for origin in summary.trained:
        yield f"{origin.label}: {origin.recipe['iterations']} iterations of training, {origin.tuning['steps'][-1]} of tuning"
    yield bounds_in_words(summary.holds, summary.theorems_hold, summary.smallest_slack, summary.largest_slack)
    if not summary.published:
        yield "no published numbers are at hand for this network and data: the paper shows curves only"
    for result in summary.published:
        yield f"published ({result.series}): {result.note}"


def bounds_in_words(holds: bool, theorems: bool, smallest: float | None, largest: float | None) -> str:
    """One line on the bounds of an experiment's Net-Trim results."""
    certificates = f"certificates {'hold' if holds else 'do NOT all hold'}"
    if smallest is None or largest is None:
        return f"{certificates}; no bound of layers or network applies"
    return (
        f"{certificates}; published bounds {'hold' if theorems else 'are EXCEEDED'}; bound / achieved from {smallest:.4g} to {largest:.4g}"
    )


def picture(summary: Summary) -> Figure:
    """Kept weights against the gain; discrepancy, and accuracy before and after tuning, against kept weights."""
    figure = Figure(figsize=(12.5, 9.6), layout="constrained")
    FigureCanvasAgg(figure)
    (kept, moved), (raw, tuned) = figure.subplots(2, 2)
    label = summary.trained[0].label
    points = [point for point in summary.points if point.series == label]
    _draw_kept(kept, points)
    _draw_moved(moved, points)
    dense = summary.trained[0].accuracy
    _draw_accuracy(raw, points, dense, lambda p: p.accuracy, "Without tuning")
    steps = summary.trained[0].tuning["steps"][-1]
    _draw_accuracy(tuned, points, dense, lambda p: p.tuned[-1][1], f"After {steps:,} iterations of fine-tuning, zeros kept")
    for result in summary.published:
        own = [p for p in summary.points if p.series == result.series]
        _draw_example(raw, own, result, lambda p: p.accuracy, result.accuracy)
        _draw_example(tuned, own, result, lambda p: p.tuned[-1][1], result.accuracy_tuned)
    # one legend below for all panels: inside, it would cover curves
    handles: dict[str, Artist] = {}
    for axes in (kept, moved, raw):
        handles |= {str(name): handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, fontsize=8.5)
    figure.suptitle(f"{summary.title}: {summary.samples:,} calibration images")
    return figure


def _row(point: Point, other: Point | None) -> list[str]:
    return [
        f"{point.gain:g}",
        NAMES[point.method],
        _shares([layer.nonzeros / layer.weights for layer in point.layers]),
        f"{100 * point.kept:.2f}",
        percent(point.discrepancy),
        percent(point.bound),
        percent(point.theorem),
        f"{100 * point.accuracy:.2f}",
        _tuned(point),
        "" if other is None else f"{100 * other.accuracy:.2f}",
        "" if other is None else _tuned(other),
        "holds" if point.holds else "does NOT hold",
    ]


def _published_row(result: Published) -> list[str]:
    shares = _shares([after / before for after, before in zip(result.nonzeros, result.nonzeros_before, strict=True)])
    accuracy = f"{100 * result.accuracy_before:.2f} → {100 * result.accuracy:.2f}"
    kept, tuned = f"{100 * result.kept:.2f}", f"{100 * result.accuracy_tuned:.2f}"
    return [f"{result.gain:g}", "as published", shares, kept, "", "", "", accuracy, tuned, "", "", ""]


def percent(share: float | None) -> str:
    """A share in percent, with as many digits as it can use; empty for ``None``."""
    if share is None:
        return ""
    return f"{100 * share:.1f}" if share < 100 else f"{100 * share:.1e}"


def _shares(shares: Sequence[float]) -> str:
    return " / ".join(f"{100 * share:.1f}" for share in shares)


def _tuned(point: Point) -> str:
    return " / ".join(f"{100 * value:.2f}" for _, value in point.tuned)


def _companion(point: Point, points: Sequence[Point]) -> Point | None:
    same = [p for p in points if (p.series, p.method, p.gain) == (point.series, MAGNITUDE + point.method, point.gain)]
    return same[0] if same else None


def _of(points: Sequence[Point], method: str) -> list[Point]:
    return sorted((p for p in points if p.method == method), key=lambda p: p.gain)


def _methods(points: Sequence[Point]) -> list[str]:
    return [method for method in NAMES if any(p.method == method for p in points)]


def _draw_kept(axes: Axes, points: Sequence[Point]) -> None:
    for method in _methods(points):
        own = _of(points, method)
        x = [p.gain for p in own]
        axes.plot(x, [100 * p.kept for p in own], color=_COLOURS[method], marker=_MARKERS[method], lw=2, label=NAMES[method])
        for index in range(len(own[0].layers)):
            share = [100 * p.layers[index].nonzeros / p.layers[index].weights for p in own]
            axes.plot(x, share, color=_COLOURS[method], lw=0.8, ls=_STYLES[index % len(_STYLES)], alpha=0.7)
    for index, layer in enumerate(next(p for p in points if not p.magnitude).layers):
        axes.plot([], [], color="#868e96", lw=0.8, ls=_STYLES[index % len(_STYLES)], label=f"layer {layer.name} alone (by colour)")
    axes.set(xscale="log", yscale="log", xlabel="gain: tolerance / norm of the layer's output", ylabel="weights kept (%)")
    axes.set_title("Weights kept, network and layers")
    _plain(axes, sorted({p.gain for p in points}))
    _plain_y(axes)
    axes.grid(True, which="major", lw=0.4, color="#ced4da")


_STYLES = (":", "--", "-.", (0, (6, 1, 1, 1, 1, 1)))


def _draw_moved(axes: Axes, points: Sequence[Point]) -> None:
    for method in _methods(points):
        own = _of(points, method)
        x = [100 * p.kept for p in own]
        colour = _COLOURS[method]
        axes.plot(x, [100 * p.discrepancy for p in own], color=colour, marker=_MARKERS[method], lw=2, label=NAMES[method])
        proven = [(k, 100 * p.bound) for k, p in zip(x, own, strict=True) if p.bound is not None]
        if proven:
            axes.plot(*zip(*proven, strict=True), color=colour, lw=1.2, ls="--")
        theorem = [(k, 100 * p.theorem) for k, p in zip(x, own, strict=True) if p.theorem is not None]
        if theorem:
            axes.plot(*zip(*theorem, strict=True), color=colour, lw=1.2, ls=":")
        like = _of(points, MAGNITUDE + method)
        axes.plot([100 * p.kept for p in like], [100 * p.discrepancy for p in like], color=colour, marker="x", lw=0.8, alpha=0.7)
    axes.plot([], [], color="#868e96", marker="x", lw=0.8, label="magnitude, as many weights (by colour)")
    if any(p.bound is not None for p in points):
        axes.plot([], [], color="#868e96", lw=1.2, ls="--", label="proven bound, spectral norms")
    if any(p.theorem is not None for p in points):
        axes.plot([], [], color="#868e96", lw=1.2, ls=":", label="published bound (Theorem 1)")
    axes.set(xscale="log", yscale="log", xlabel="weights kept (%)", ylabel="discrepancy of the logits, relative (%)")
    axes.set_title("Discrepancy on the calibration images")
    axes.grid(True, which="major", lw=0.4, color="#ced4da")
    _plain_x(axes)


def _draw_accuracy(axes: Axes, points: Sequence[Point], dense: float, value: Callable[[Point], float], title: str) -> None:
    for method in _methods(points):
        own, like = _of(points, method), _of(points, MAGNITUDE + method)
        colour = _COLOURS[method]
        axes.plot(
            [100 * p.kept for p in own], [100 * value(p) for p in own], color=colour, marker=_MARKERS[method], lw=2, label=NAMES[method]
        )
        axes.plot([100 * p.kept for p in like], [100 * value(p) for p in like], color=colour, marker="x", lw=0.8, alpha=0.7)
    axes.plot([], [], color="#868e96", marker="x", lw=0.8, label="magnitude, as many weights (by colour)")
    axes.axhline(100 * dense, color="#212529", lw=1, ls="--", label=f"trained network, {100 * dense:.2f} %")
    axes.set(xscale="log", xlabel="weights kept (%)", ylabel="test accuracy (%)", title=title)
    axes.grid(True, which="major", lw=0.4, color="#ced4da")
    _plain_x(axes)


def _draw_example(axes: Axes, own: Sequence[Point], result: Published, value: Callable[[Point], float], published: float) -> None:
    for method in _methods(own):
        for p in _of(own, method):
            colour, marker = _COLOURS[method], _MARKERS[method]
            label = f"{result.series}: {NAMES[method]}"
            axes.plot([100 * p.kept], [100 * value(p)], ms=9, ls="", color=colour, marker=marker, mec="#212529", label=label)
    axes.plot(
        [100 * result.kept],
        [100 * published],
        ls="",
        marker="*",
        ms=15,
        color="#f5b700",
        mec="#212529",
        label=f"{result.series}: as published",
    )


def _plain(axes: Axes, ticks: Sequence[float]) -> None:
    # neighbours closer than a quarter of an octave would print over each other
    shown: list[float] = []
    for tick in ticks:
        if not shown or tick / shown[-1] >= 1.3:
            shown.append(tick)
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _plain_x(axes: Axes) -> None:
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _plain_y(axes: Axes) -> None:
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
