"""Pictures and words of cascade against parallel on nested spirals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .spiral_schemes import SpiralPoint, compare, means

_COLOURS = ("#1864ab", "#2b8a3e", "#e8590c", "#862e9c", "#495057")


def draw(axes: Axes, points: Sequence[SpiralPoint], *, layer: int = 3) -> None:
    """Mean nonzeros of one layer (1, 2 or 3) against rd: one colour a width, solid for the cascade and dashed for the parallel scheme."""
    curves = means(points)
    for index, hidden in enumerate(sorted({p.hidden for p in curves})):
        colour = _COLOURS[index % len(_COLOURS)]
        for scheme, style, marker in (("parallel", "--", "o"), ("cascade", "-", "^")):
            own = sorted((p for p in curves if (p.hidden, p.scheme) == (hidden, scheme)), key=lambda p: p.rd)
            axes.plot(
                [100 * p.rd for p in own],
                [p.nonzeros[layer - 1] for p in own],
                color=colour,
                ls=style,
                marker=marker,
                ms=5,
                lw=1.5,
                label=f"{hidden}-{hidden}, {scheme}",
            )
    repeats = max((p.repeats for p in curves), default=0)
    axes.set(xscale="log", yscale="log", xlabel="relative discrepancy rd of the outputs (%)", ylabel=f"nonzero weights of layer {layer}")
    axes.set_title(f"spirals, layer {layer}, mean of {repeats} training{'s' if repeats != 1 else ''}")
    counts = [p.nonzeros[layer - 1] for p in curves]
    narrow = bool(counts) and max(counts) < 5 * min(counts)
    if narrow:  # too few ticks on a logarithmic axis
        axes.set_yscale("linear")
        axes.set_ylim(0, 1.1 * max(counts))
    for axis in (axes.xaxis,) if narrow else (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    axes.grid(True, which="major", lw=0.4, color="#ced4da")


def picture(points: Sequence[SpiralPoint]) -> Figure:
    """One panel a layer."""
    figure = Figure(figsize=(14, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    row = list(figure.subplots(1, 3, squeeze=False)[0])
    for layer, axes in enumerate(row, start=1):
        draw(axes, points, layer=layer)
    handles, labels = row[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(labels) // 2), fontsize=9)
    return figure


def words(points: Sequence[SpiralPoint]) -> list[str]:
    """What the comparison says, line by line, beside the published statement; then the certificates."""
    comparisons = compare(points)
    lines = [
        "published (a picture, without numbers at hand): the cascade is sparser at equal discrepancy, most in layer 3; layer 1 stays dense"
    ]
    for c in comparisons:
        counts = ", ".join(
            f"layer {i} {a:.0f} against {b:.0f}" for i, (a, b) in enumerate(zip(c.cascade, c.parallel, strict=True), start=1)
        )
        lines.append(f"{c.hidden}-{c.hidden} at rd {c.rd:.0%}, cascade against parallel: {counts}")
    if comparisons:
        sparser = sum(c.ratios[2] < 1 for c in comparisons)
        ratios = (_geometric([c.ratios[i] for c in comparisons]) for i in range(3))
        lines.append(
            f"the cascade is sparser in layer 3 at {sparser} of {len(comparisons)} comparisons; "
            "its weights per weight of the parallel scheme, by layer: " + ", ".join(f"{ratio:.2f}" for ratio in ratios)
        )
    else:
        lines.append("the curves of the two schemes share no discrepancy of the comparison")
    holds = all(p.pruned.holds for p in points)
    theorems = all(p.pruned.theorems_hold for p in points)
    lines.append(
        f"{len(points)} prunings: {'every certificate holds' if holds else 'NOT every certificate holds'}, "
        f"{'no published bound is exceeded' if theorems else 'a published bound is EXCEEDED'}"
    )
    for name, slacks in (
        ("proven", [s for p in points for s in p.pruned.slacks]),
        ("published", [s for p in points for s in p.pruned.theorem_slacks]),
    ):
        if slacks:
            lines.append(f"{name} bound / achieved: from {min(slacks):.4g} to {max(slacks):.4g}, median {statistics.median(slacks):.4g}")
    return lines


def _geometric(ratios: Sequence[float]) -> float:
    usable = [ratio for ratio in ratios if 0 < ratio < math.inf]
    return math.exp(statistics.fmean(map(math.log, usable))) if usable else math.nan
