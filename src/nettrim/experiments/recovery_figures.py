"""The recovery experiment as a table and a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.table import Table

from ..render.fitting import FittingTable
from .recovery import PROBABILITY, Summary, Trial

Array = NDArray[np.float64]


def table(summary: Summary) -> Table:
    """The transitions as a table for a terminal; the fits and the certificates stand under it."""
    shown = FittingTable(
        title="Samples P at which a share of s-sparse ReLU neurons is recovered exactly", caption="\n".join(_captions(summary)), keys=2
    )
    for name in ("N", "s", "trials", "10 %", "50 %", "90 %", "all", "predicted", f"Thm 3, {PROBABILITY:.0%}", "ratio"):
        shown.add_column(name, justify="right", no_wrap=True)
    last = None
    for t in summary.transitions:
        if last is not None and t.inputs != last:
            shown.add_section()
        last = t.inputs
        counts = (t.low, t.half, t.high, t.largest, round(t.expected), t.theorem)
        shown.add_row(str(t.inputs), str(t.sparsity), str(t.trials), *(f"{c:,}" for c in counts), f"{t.theorem / t.half:.1f}")
    return shown


def picture(summary: Summary, trials: Sequence[Trial]) -> Figure:
    """Left: the success map over (P, s) for ``summary.size``, with Theorem 3's line. Right: the half-way points of all N."""
    figure = Figure(figsize=(12.5, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.12, 1))
    _draw_map(left, summary, trials)
    _draw_scaling(right, summary)
    return figure


def _captions(summary: Summary) -> Iterator[str]:
    for fit in summary.fits:
        parts = [f"{c:+.3g} {t}".strip() for c, t in zip(fit.coefficients, fit.terms, strict=True)]
        formula = " ".join(parts).removeprefix("+")
        yield f"{fit.name}: {fit.of} = {formula}, R² = {fit.r_squared:.4f} ({fit.points} points)"
    above = "above every trial's threshold" if summary.theorem_above else "NOT above every trial's threshold"
    yield f"Theorem 3's line is {above}; at least {summary.smallest_ratio:.1f} times P50"
    if summary.certified:
        yield (
            f"certificates: {summary.unique} of {summary.certified} unique at the threshold, "
            f"{summary.refuted} of {summary.certified} refuted one sample before"
        )


def _draw_map(axes: Axes, summary: Summary, trials: Sequence[Trial]) -> None:
    own = [t for t in summary.transitions if t.inputs == summary.size]
    s = np.array([t.sparsity for t in own], dtype=float)
    top = max(t.theorem for t in own)
    measured = max(t.largest for t in own) * 1.25
    levels = np.geomspace(max(2.0, min(t.low for t in own) / 2.5), measured, 60)
    share = np.array(
        [[np.mean([t.threshold <= P for t in trials if (t.inputs, t.sparsity) == (summary.size, o.sparsity)]) for o in own] for P in levels]
    )
    edges = _edges(s)
    mesh = axes.pcolormesh(edges, _edges(levels), share, cmap="Blues", vmin=0, vmax=1, rasterized=True)
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.02)
    bar.set_label("share of trials recovered")
    # Above the largest threshold measured, every trial is recovered because more samples never hurt.
    axes.fill_between([edges[0], edges[-1]], measured, top * 2, color=mesh.cmap(1.0), lw=0)
    axes.plot(s, [t.half for t in own], "o-", color="#f5b700", mec="#4a3800", ms=5.5, lw=1.6, label="measured, half of the trials")
    axes.plot(s, [t.expected for t in own], ":", color="#d9480f", lw=2.2, label="predicted, 2 × statistical dimension")
    fit = summary.fits[0]
    axes.plot(
        s,
        fit.coefficients[0] * s * math.log(summary.size),
        "--",
        color="#2b8a3e",
        lw=1.8,
        label=f"fit {fit.coefficients[0]:.2f} s log N, s ≤ N/10, all N",
    )
    law = next(f.coefficients[0] for f in summary.fits if f.terms == ("s log(e N/s)",))
    axes.plot(s, law * s * np.log(math.e * summary.size / s), "-.", color="#862e9c", lw=1.6, label=f"fit {law:.2f} s log(e N/s), all N")
    axes.plot(s, [t.theorem for t in own], "-", color="#ffffff", lw=4.5)
    axes.plot(s, [t.theorem for t in own], "-", color="#c2255c", lw=2.4, label=f"Theorem 3, probability {PROBABILITY:.0%}")
    axes.set(xscale="log", yscale="log", xlim=(edges[0], edges[-1]), ylim=(levels[0], top * 1.6))
    axes.set(xlabel="nonzero weights s", ylabel="samples P", title=f"Recovery of a neuron of N = {summary.size} inputs")
    _plain_ticks(axes, s)
    axes.legend(loc="lower right", fontsize=8.5, framealpha=0.95)


def _draw_scaling(axes: Axes, summary: Summary) -> None:
    colours = ("#1864ab", "#e8590c", "#2b8a3e", "#862e9c", "#495057", "#c92a2a")
    markers = ("o", "s", "^", "D", "v", "P")
    longest = max(t.sparsity * math.log(t.inputs) for t in summary.transitions)
    for index, size in enumerate(sorted({t.inputs for t in summary.transitions})):
        own = [t for t in summary.transitions if t.inputs == size]
        x = [t.sparsity * math.log(size) for t in own]
        colour = colours[index % len(colours)]
        axes.errorbar(
            x,
            [t.half for t in own],
            yerr=[[t.half - t.low for t in own], [t.high - t.half for t in own]],
            fmt=markers[index % len(markers)],
            color=colour,
            ms=5,
            lw=1,
            capsize=2,
            label=f"N = {size}",
        )
        axes.plot(x, [t.expected for t in own], ":", color=colour, lw=1.4)
        axes.plot(x, [t.theorem for t in own], "-", color=colour, lw=1.4)
    fit = summary.fits[0]
    line = np.geomspace(min(math.log(t.inputs) * t.sparsity for t in summary.transitions), longest, 50)
    label = f"{fit.coefficients[0]:.2f} s log N (s ≤ N/10, R² = {fit.r_squared:.3f})"
    axes.plot(line, fit.coefficients[0] * line, "--", color="#212529", lw=1.4, label=label)
    axes.plot([], [], "-", color="#868e96", lw=1.4, label=f"Theorem 3, {PROBABILITY:.0%}, by N")
    axes.plot([], [], ":", color="#868e96", lw=1.4, label="predicted, 2 × statistical dimension, by N")
    axes.set(xscale="log", yscale="log", xlabel="s log N", ylabel="samples P at half of the trials (bars: 10 % to 90 %)")
    axes.set_title("The transition against s log N")
    axes.grid(True, which="major", lw=0.4, color="#ced4da")
    axes.set_ylim(top=12 * max(t.theorem for t in summary.transitions))  # room for the legend
    axes.legend(loc="upper left", fontsize=8.5, ncols=2)


def _plain_ticks(axes: Axes, s: Array) -> None:
    axes.set_xticks(s, [f"{value:g}" for value in s])
    axes.minorticks_off()


def _edges(values: Array) -> Array:
    """Cell edges half-way between values on a logarithmic axis."""
    if values.size == 1:
        return np.array([values[0] / 1.5, values[0] * 1.5])
    inner = np.sqrt(values[1:] * values[:-1])
    return np.concatenate([[values[0] ** 2 / inner[0]], inner, [values[-1] ** 2 / inner[-1]]])
