"""Presentation: a pruning report and its certificate as tables, as plain sentences and as one self-contained page.

Nothing is computed here that a certificate could rest on; this module only rounds and words numbers that others measured.
Numbers that state an upper bound are rounded up, agreement is rounded down, so that no rounded sentence claims too much.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from textwrap import fill
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape
from rich.box import SIMPLE_HEAD, Box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from .certificate import Certificate, LayerCertificate
from .report import LayerReport, PruneReport
from .status import InvalidInput, Status

__all__ = [
    "ComparisonRow",
    "certificate_table",
    "certificate_words",
    "comparison_table",
    "report_html",
    "report_table",
    "report_text",
]

Mask = npt.NDArray[np.bool_]

_NONE = "-"
_PLAIN_BOX = Box("    \n    \n -- \n    \n    \n -- \n    \n    \n", ascii=True)
_OPEN_CARDS = 12  # pictures of the layers after these are folded away in the page
_LISTED = 24  # indices named one by one before "and ... more"
_MASK_ROWS, _MASK_COLUMNS = 300, 480  # the largest mask picture, in pixels; larger masks are averaged over blocks
_PROFILE_BINS = 240


@dataclass(frozen=True)
class ComparisonRow:
    """One network of a comparison. All but ``seconds`` and the texts are shares: 0.02 is shown as 2 %.

    ``discrepancy`` is the output's discrepancy from the reference network and ``bound`` its proven upper bound, both relative to
    the norm of the reference output. ``certificate`` is a short verdict such as ``"holds"``.
    """

    label: str
    densities: tuple[float, ...]
    density: float
    accuracy: float | None
    agreement: float | None
    discrepancy: float | None
    bound: float | None
    seconds: float | None
    certificate: str


# ---------------------------------------------------------------------------------------------------------------- numbers


def _decimals(percent: float) -> int:
    return 0 if percent >= 100 else 1 if percent >= 10 else 2 if percent >= 1 else 3


def _rounded(value: float, decimals: int, direction: int) -> float:
    """``value`` at ``decimals`` digits: down (-1), nearest (0) or up (+1); float noise below 1e-9 units does not count."""
    scaled = value * 10.0**decimals
    nearest = float(round(scaled))
    if direction and abs(scaled - nearest) > 1e-9 * max(1.0, abs(scaled)):
        nearest = float(math.ceil(scaled) if direction > 0 else math.floor(scaled))
    return nearest / 10.0**decimals


def _percent(share: float | None, direction: int = 0, decimals: int | None = None) -> str:
    """A share as a percentage with about three significant digits."""
    if share is None:
        return _NONE
    if not math.isfinite(share):
        return str(share)
    percent = 100.0 * share
    if percent == 0:
        return "0%"
    if decimals is None:
        if abs(percent) < 0.01:
            exponent = math.floor(math.log10(abs(percent)))
            mantissa = _rounded(percent / 10.0**exponent, 1, direction)
            return f"{mantissa * 10.0**exponent:.1e}%"
        decimals = _decimals(abs(percent))
    return f"{_rounded(percent, decimals, direction):,.{decimals}f}%"


def _number(value: float | None, direction: int = 0) -> str:
    """An absolute value with four significant digits."""
    if value is None:
        return _NONE
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    exponent = math.floor(math.log10(abs(value)))
    if -4 <= exponent < 9:
        decimals = max(0, 3 - exponent)
        return f"{_rounded(value, decimals, direction):,.{decimals}f}"
    return f"{_rounded(value / 10.0**exponent, 3, direction):.3f}e{exponent:+d}"


def _short(count: int) -> str:
    """A count in at most four characters: 7840, 29k, 4.2M."""
    if count < 10_000:
        return str(count)
    scaled = float(count)
    for suffix in ("k", "M", "G", "T"):
        scaled /= 1000.0
        if scaled < 999.5 or suffix == "T":
            break
    return f"{scaled:.1f}{suffix}" if scaled < 9.95 else f"{scaled:.0f}{suffix}"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return _NONE
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:.1f}" if seconds < 100 else f"{seconds:,.0f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{_seconds(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _clean(text: str) -> str:
    """Names come from users: anything that could steer a terminal is replaced."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _quoted(name: str) -> str:
    return f'"{_clean(name)}"'


def _listed(items: Sequence[str], limit: int = 6) -> str:
    """``a``, ``a and b``, ``a, b and c``, ``a, b and 7 more``."""
    shown = list(items[:limit])
    if len(items) > limit:
        shown.append(f"{len(items) - limit:,} more")
    return shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + " and " + shown[-1]


def _share(value: float | None, norm: float) -> float | None:
    return value / norm if value is not None and norm > 0 else None


def _row_share(value: float | None, layer: LayerCertificate) -> float | None:
    """A number over all rows as a share of the reference norm.

    The reference norm is taken over the rows of the layer's program. Where those are a part of all rows, the two are compared
    per row (root mean square), which is the plain quotient where they are the same rows.
    """
    share = _share(value, layer.reference_norm)
    return None if share is None else share * math.sqrt(layer.rows / layer.rows_total)


# ----------------------------------------------------------------------------------------------------------------- tables


class _FittingTable(Table):
    """A table whose columns move together where the console is too narrow for it, before anything is folded."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.padding = (0, 1, 0, 0)
        if Measurement.get(console, options.update(max_width=10_000), self).maximum > options.max_width:
            self.padding = (0, 0, 0, 0)
        yield from super().__rich_console__(console, options)


def _table(title: str, box: Box, caption: str) -> Table:
    return _FittingTable(
        title=title or None,
        caption=caption or None,
        box=box,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        caption_style="dim",
        header_style="bold",
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        collapse_padding=True,
    )


def _number_column(table: Table, header: str) -> None:
    table.add_column(header, justify="right", no_wrap=True, vertical="top")


def _text_column(table: Table, header: str, min_width: int) -> None:
    table.add_column(header, overflow="fold", min_width=min_width, vertical="top")


def _status_style(status: Status) -> str:
    return "green" if status is Status.CONVERGED else "dim" if status.ok else "bold yellow"


def _layer_table(report: PruneReport, box: Box) -> Table:
    tolerances = any(layer.tolerance is not None for layer in report.layers)
    gaps = any(layer.gap is not None for layer in report.layers)
    what = "distance and tolerance" if tolerances else "distance"
    table = _table("", box, f"{what}: share of the norm of the layer's reference output")
    _text_column(table, "layer", 6)
    _number_column(table, "shape")
    _text_column(table, "activ-\nation", 6)
    _number_column(table, "density")
    _number_column(table, "nonzeros/\nweights")
    _number_column(table, "dis-\ntance")
    if tolerances:
        _number_column(table, "toler-\nance")
    if gaps:
        _number_column(table, "gap")
    table.add_column("status", no_wrap=True, vertical="top")
    _number_column(table, "s")

    for index, layer in enumerate(report.layers):
        cells = [
            Text(_clean(layer.name)),
            Text(f"{layer.inputs}->{layer.outputs}"),
            Text(_clean(layer.activation)),
            Text(_percent(layer.density)),
            Text(f"{_short(layer.nonzeros)}/{_short(layer.weights)}"),
            Text(_percent(layer.relative_distance)),
        ]
        if tolerances:
            cells.append(Text(_percent(layer.relative_tolerance)))
        if gaps:
            cells.append(Text(_percent(layer.gap, +1)))
        cells += [Text(fill(layer.status.value, 9), style=_status_style(layer.status)), Text(_seconds(layer.seconds))]
        table.add_row(*cells, end_section=index == len(report.layers) - 1)

    unmet = sum(not layer.status.ok for layer in report.layers)
    total = [
        Text("total"),
        Text(""),
        Text(""),
        Text(_percent(report.density)),
        Text(f"{_short(report.nonzeros)}/{_short(report.weights)}"),
        Text(""),
    ]
    total += [Text("")] * (tolerances + gaps)
    total += [Text("all met" if unmet == 0 else f"{unmet:,} not"), Text(_seconds(report.seconds))]
    table.add_row(*total, style="bold")
    return table


def report_table(report: PruneReport) -> Table:
    """The report as a table: one row per layer, then a total. Columns that no layer fills (tolerance, gap) are left out."""
    return _layer_table(report, SIMPLE_HEAD)


def _plain(renderable: Table, width: int) -> str:
    console = Console(
        file=io.StringIO(), width=width, color_system=None, force_terminal=False, force_jupyter=False, no_color=True, legacy_windows=False
    )
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _headline(report: PruneReport) -> str:
    return (
        f"{_clean(report.method)}, {_clean(report.scheme)} scheme, {_plural(report.samples, 'calibration sample')}: "
        f"{report.nonzeros:,} of {report.weights:,} weights remain ({_percent(report.density)})"
    )


def _layer_remarks(layer: LayerReport) -> list[str]:
    remarks = [] if layer.status.ok else [f"{layer.status.value}: {layer.status.remedy}"]
    return remarks + [_clean(note) for note in layer.notes]


def report_text(report: PruneReport) -> str:
    """The report as plain ASCII-framed text without control codes: headline, table, what to do, notes."""
    lines = [_headline(report), "", _plain(_layer_table(report, _PLAIN_BOX), 110)]
    remarks = [f"  {_clean(layer.name)}: {remark}" for layer in report.layers for remark in _layer_remarks(layer)]
    notes = [f"  {_clean(note)}" for note in report.notes]
    if remarks or notes:
        lines += ["", "notes", *remarks, *notes]
    return "\n".join(lines)


def certificate_table(certificate: Certificate) -> Table:
    """The certificate as a table: one row per layer, then the network's output, as shares of the reference output's norm."""
    verdict = "certificate: holds" if certificate.holds else "certificate: DOES NOT HOLD"
    tolerances = any(layer.tolerance is not None for layer in certificate.layers)
    gaps = any(layer.gap is not None for layer in certificate.layers)
    sampled = any(layer.rows != layer.rows_total for layer in certificate.layers)
    caption = "shares of the norm of the reference output" + ("; over sampled rows compared per row" if sampled else "")
    table = _table(verdict, SIMPLE_HEAD, caption)
    _text_column(table, "layer", 8)
    _number_column(table, "rows")
    _number_column(table, "distance")
    if tolerances:
        _number_column(table, "tolerance")
    _number_column(table, "discrep-\nancy")
    _number_column(table, "proven\nbound")
    if gaps:
        _number_column(table, "gap")
    _number_column(table, "holds")

    for index, layer in enumerate(certificate.layers):
        rows = f"{layer.rows:,}" if layer.rows == layer.rows_total else f"{_short(layer.rows)}/{_short(layer.rows_total)}"
        cells = [Text(_clean(layer.name)), Text(rows), Text(_percent(_share(layer.distance, layer.reference_norm)))]
        if tolerances:
            cells.append(Text(_percent(_share(layer.tolerance, layer.reference_norm))))
        cells += [Text(_percent(_row_share(layer.discrepancy, layer))), Text(_percent(_row_share(layer.bound, layer), +1))]
        if gaps:
            cells.append(Text(_percent(layer.gap, +1)))
        cells.append(_yes_no(layer.holds))
        table.add_row(*cells, end_section=index == len(certificate.layers) - 1)

    network = certificate.network
    last = [Text("network output"), Text(f"{network.rows:,}"), Text("")] + [Text("")] * tolerances
    last += [
        Text(_percent(_share(network.achieved, network.reference_norm))),
        Text(_percent(_share(network.bound, network.reference_norm), +1)),
    ]
    last += [Text("")] * gaps
    table.add_row(*last, _yes_no(network.holds), style="bold")
    return table


def _yes_no(holds: bool) -> Text:
    return Text("yes", style="green") if holds else Text("NO", style="bold red")


def _density_list(densities: Sequence[float]) -> str:
    shown = [_percent(density) for density in densities]
    if len(shown) > 6:
        shown = [*shown[:3], "...", *shown[-2:]]
    return " / ".join(shown) or _NONE


def comparison_table(rows: Sequence[ComparisonRow]) -> Table:
    """Several networks side by side: densities, accuracy, agreement with the reference, output discrepancy, bound, time, verdict."""
    table = _table("", SIMPLE_HEAD, "discrepancy and bound: share of the norm of the reference network's output")
    _text_column(table, "network", 10)
    _text_column(table, "density by layer", 12)
    for header in ("density", "accuracy", "agree-\nment", "discrep-\nancy", "proven\nbound", "s"):
        _number_column(table, header)
    _text_column(table, "certi-\nficate", 6)
    for row in rows:
        table.add_row(
            Text(_clean(row.label)),
            Text(_density_list(row.densities)),
            Text(_percent(row.density)),
            Text(_percent(row.accuracy, decimals=2)),
            Text(_percent(row.agreement, -1, decimals=2)),
            Text(_percent(row.discrepancy)),
            Text(_percent(row.bound, +1)),
            Text(_seconds(row.seconds)),
            Text(_clean(row.certificate)),
        )
    return table


# ------------------------------------------------------------------------------------------------------------------ words


def _measured(value: float, norm: float, direction: int = 0) -> str:
    """``12.34 (1.98% of the norm of the reference output)``, without the share where the norm is zero."""
    share = _share(value, norm)
    tail = "" if share is None else f" ({_percent(share, direction)} of the norm of the reference output)"
    return _number(value, direction) + tail


def _failures(certificate: Certificate) -> list[str]:
    words = []
    for layer in certificate.layers:
        if layer.holds:
            continue
        causes = []
        if layer.tolerance is not None and layer.distance > layer.tolerance:
            share = _share(layer.distance, layer.reference_norm)
            allowed = _share(layer.tolerance, layer.reference_norm)
            relative = "" if share is None else f" ({_percent(share)} of the norm of its reference output, {_percent(allowed)} allowed)"
            causes.append(f"its distance {layer.distance:.7g} is above its tolerance {layer.tolerance:.7g}{relative}")
        if layer.bound is not None and layer.discrepancy > layer.bound:
            causes.append(f"its discrepancy {layer.discrepancy:.7g} is above its stated bound {layer.bound:.7g}: one of them is wrong")
        words.append(f"Not met: layer {_quoted(layer.name)}: {' and '.join(causes) or 'a stated number could not be confirmed'}.")
    network = certificate.network
    if not network.holds:
        cause = "a stated number of the network's output could not be confirmed"
        if network.bound is not None and network.achieved > network.bound:
            cause = f"its discrepancy {network.achieved:.7g} is above its stated bound {network.bound:.7g}: one of them is wrong"
        words.append(f"Not met: network output: {cause}.")
    return words


def _layer_words(certificate: Certificate) -> list[str]:
    cascade = certificate.scheme == "cascade"
    inputs = "the pruned network's own inputs" if cascade else "the reference network's inputs"
    bounded = [layer for layer in certificate.layers if layer.tolerance is not None]
    confirmed = [layer for layer in bounded if layer.holds]
    words = []
    if bounded and not confirmed:
        words.append("No layer with a tolerance is confirmed to meet it.")
    elif bounded:
        who = "Each layer with a tolerance meets it"
        if len(confirmed) < len(bounded):
            who = (
                f"Of {len(bounded)} layers with a tolerance, {len(confirmed)} {'is' if len(confirmed) == 1 else 'are'} confirmed to meet it"
            )
        words.append(
            f"{who}: on the calibration rows of its program and {inputs}, the pruned layer's pre-activations lie within the tolerance of "
            "the set that the activation maps to the reference output. The activation (with the pooling that belongs to it) cannot enlarge "
            "a distance, so on those inputs the layer's output differs from the reference output by no more than that, in the Frobenius "
            "norm (Lemma 1)."
        )
        tight = [layer for layer in confirmed if layer.tolerance]
        if tight:
            worst = max(tight, key=lambda layer: layer.distance / (layer.tolerance or math.inf))
            words.append(
                f"Closest to its tolerance is layer {_quoted(worst.name)}: distance {_number(worst.distance)} where "
                f"{_number(worst.tolerance)} is allowed ({_percent(_share(worst.distance, worst.tolerance or 0.0))} of it)."
            )
    else:
        words.append(
            "No layer was given a tolerance (its target was a sparsity or a penalty), so the certificate states how far each layer "
            f"moved. On the calibration rows and {inputs}, a layer's output differs from the reference output by no more than the "
            "distance of its pre-activations to the set that the activation maps to the reference output, in the Frobenius norm (Lemma 1)."
        )
    sampled = [layer for layer in certificate.layers if layer.rows < layer.rows_total]
    if sampled:
        names = _listed([f"{_quoted(layer.name)} ({layer.rows:,} of {layer.rows_total:,})" for layer in sampled])
        words.append(
            f"The programs of these layers used a part of the calibration rows: {names}. Their distances and tolerances speak of those "
            "rows; their discrepancies and proven bounds speak of all calibration rows."
        )
    return words


def _scheme_words(certificate: Certificate) -> list[str]:
    if certificate.scheme == "cascade":
        words = [
            "Cascade scheme: every layer was pruned on what the pruned layers before it really pass on, and its target stayed the "
            "reference network's output. So the discrepancy of each layer inside the pruned network is bounded by that layer's own "
            "distance on the calibration rows, whatever happened before it: nothing accumulates from layer to layer."
        ]
    elif certificate.scheme == "parallel":
        words = [
            "Parallel scheme: every layer was pruned on the reference network's inputs, so discrepancies add up along the network. The "
            "bound follows them layer by layer: a layer's discrepancy is at most its own distance plus the spectral norm of its pruned "
            "weights (or a proven upper bound of it) times the discrepancy of its input."
        ]
    else:
        words = [f'Scheme "{_clean(certificate.scheme)}": the bounds are those stated in the table.']
    without: dict[str, list[str]] = {}
    for layer in certificate.layers:
        if layer.bound is None:
            without.setdefault(layer.reason, []).append(_quoted(layer.name))
    for reason, names in without.items():
        because = f": {_sentence_end(reason)}" if reason else "."
        words.append(f"No bound is proven inside the network for {'layer' if len(names) == 1 else 'layers'} {_listed(names)}{because}")
    return words


def _sentence_end(text: str) -> str:
    text = _clean(text).strip()
    return text if text.endswith((".", "!", "?")) else text + "."


def _network_words(certificate: Certificate) -> list[str]:
    network = certificate.network
    where = f"Network output (layer {_quoted(network.output_layer)}, {_plural(network.rows, 'calibration row')})"
    achieved = f"achieved is {_measured(network.achieved, network.reference_norm)}"
    if network.bound is None:
        reason = f" ({_clean(network.reason).rstrip('.')})" if network.reason else ""
        words = [f"{where}: no bound of its discrepancy from the reference output is proven{reason}; {achieved}."]
    else:
        bound = _measured(network.bound, network.reference_norm, +1)
        words = [f"{where}: its discrepancy from the reference output is proven to be at most {bound}; {achieved}."]
    others = []
    if network.bound_from_tolerances is not None:
        others.append(f"from the tolerances alone, where they are met, {_number(network.bound_from_tolerances, +1)}")
    if network.bound_link_normalised is not None:
        others.append(f"in the published link-normalised form {_number(network.bound_link_normalised, +1)}")
    if others:
        words.append(f"The bound stated in other ways: {'; '.join(others)}.")
    if network.agreement is not None:
        words.append(
            f"On {_percent(network.agreement, -1, decimals=2)} of these rows both networks predict the same class (counted, not a bound)."
        )
    return words


def _gap_words(certificate: Certificate) -> list[str]:
    gaps: dict[str, list[LayerCertificate]] = {}
    for layer in certificate.layers:
        if layer.gap is not None:
            gaps.setdefault(layer.gap_kind, []).append(layer)
    words = []
    for kind, layers in gaps.items():
        worst = max(layers, key=lambda layer: layer.gap or 0.0)
        of_kind = f" ({_clean(kind)})" if kind else ""
        words.append(
            f"Optimality{of_kind}: the l1 norm of a layer's stored weights is at most (1 + gap) times the smallest possible in its "
            f"program, by duality; the largest gap of {_plural(len(layers), 'layer')} is {_percent(worst.gap, +1)} "
            f"(layer {_quoted(worst.name)})."
        )
    return words


def _heldout_words(certificate: Certificate) -> list[str]:
    heldout = certificate.heldout
    if heldout is None:
        return [
            "Other inputs: no held-out samples were given, so all of this speaks of the calibration rows only and says nothing about "
            "any other input."
        ]
    count = _plural(heldout.samples, "held-out sample")
    confidence = _percent(heldout.confidence, -1)
    claims = []
    if heldout.class_change_bound is not None:
        seen = "" if heldout.class_changes is None else f" (seen: {heldout.class_changes:,} of {heldout.samples:,})"
        claims.append(f"the predicted class changes with probability at most {_percent(heldout.class_change_bound, +1)}{seen}")
    claims.append(
        f"the relative discrepancy of the output exceeds {_percent(heldout.level)} with probability at most "
        f"{_percent(heldout.exceed_bound, +1)} (seen: {heldout.exceed:,} of {heldout.samples:,})"
    )
    each = "each of these statements holds with confidence" if len(claims) > 1 else "with confidence"
    words = [f"Other inputs: from {count}, {each} {confidence} (exact binomial, Clopper-Pearson): {'; '.join(claims)}."]
    words.append(
        "This is valid only for inputs drawn, independently, like the held-out samples, and because those samples were not used for "
        "pruning."
    )
    if heldout.accuracy_before is not None and heldout.accuracy_after is not None:
        words.append(
            f"Accuracy on the held-out samples: {_percent(heldout.accuracy_before, decimals=2)} before, "
            f"{_percent(heldout.accuracy_after, decimals=2)} after pruning."
        )
    return words


def certificate_words(certificate: Certificate) -> list[str]:
    """The certificate in sentences. What does not hold comes first; the first sentence is always the verdict."""
    arithmetic = _clean(certificate.arithmetic)
    if certificate.holds:
        words = [
            "The certificate holds: every stated tolerance and every stated bound is met by the weights as stored "
            f"(arithmetic: {arithmetic})."
        ]
    else:
        words = [
            "The certificate does NOT hold: not every stated tolerance or bound is met by the weights as stored "
            f"(arithmetic: {arithmetic}).",
            *_failures(certificate),
        ]
    words += _layer_words(certificate)
    words += _scheme_words(certificate)
    words += _network_words(certificate)
    words += _gap_words(certificate)
    words += _heldout_words(certificate)
    words.append(
        "To check it yourself, run `nettrim verify DIR ...` with the reference network and the same calibration data: it recomputes every "
        "number from the files, compares the hashes of data and weights, and fails when a number does not hold."
    )
    return words


# --------------------------------------------------------------------------------------------------------------- pictures

_RAMP = ((0.0, (246, 248, 252)), (0.35, (139, 176, 235)), (0.7, (37, 89, 196)), (1.0, (11, 30, 84)))
_NEVER = (231, 222, 205)  # inputs that nobody reads: sand, outside the ramp


def _ramp(values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Values in [0, 1] as RGB, light to dark (so that it survives grey print and every kind of colour vision)."""
    stops = [stop for stop, _ in _RAMP]
    channels = [np.interp(values, stops, [colour[channel] for _, colour in _RAMP]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def _png(pixels: npt.NDArray[np.uint8]) -> str:
    """RGB pixels as a PNG data address."""
    from matplotlib.image import imsave  # writes through the object interface; only pages need it

    buffer = io.BytesIO()
    nameless: dict[str, Any] = {"Software": None}
    imsave(buffer, pixels, format="png", metadata=nameless, pil_kwargs={"optimize": True})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _blocks(values: npt.NDArray[Any], rows: int, columns: int) -> npt.NDArray[np.float64]:
    """``values`` averaged over a grid of at most ``rows`` x ``columns`` nearly equal blocks."""
    result: npt.NDArray[Any] = values
    for axis, limit in ((0, rows), (1, columns)):
        size = result.shape[axis]
        if size > limit:
            edges = np.linspace(0, size, limit + 1).astype(np.int64)
            sums = np.add.reduceat(result, edges[:-1], axis=axis, dtype=np.float64)
            counts = np.diff(edges).astype(np.float64)
            result = sums / (counts[:, None] if axis == 0 else counts[None, :])
    return result.astype(np.float64)


@dataclass(frozen=True)
class _Picture:
    """A raster of the page: its address, the size at which it is drawn and how to read its colours."""

    source: str
    width: int
    height: int
    low: str
    high: str
    alt: str
    shades: bool = True


def _mask_picture(mask: Mask, name: str) -> _Picture:
    """Outputs downwards, inputs to the right; cells stretched to whole pixels so that thin matrices stay readable."""
    outputs, inputs = mask.shape
    blocks = _blocks(mask, _MASK_ROWS, _MASK_COLUMNS)
    top = float(blocks.max()) or 1.0
    rows, columns = blocks.shape
    across = max(1, _MASK_COLUMNS // columns)
    down = max(1, _MASK_ROWS // rows)
    across, down = min(across, 4 * down, 16), min(down, 4 * across, 16)
    averaged = blocks.shape != mask.shape
    return _Picture(
        source=_png(_ramp(blocks / top)),
        width=columns * across,
        height=rows * down,
        low="0% of a block" if averaged else "zero",
        high=f"{_percent(top)} of a block" if averaged else "nonzero",
        alt=f"Where the {outputs} x {inputs} weights of layer {_clean(name)} are not zero",
        shades=averaged,
    )


def _image_shape(report: PruneReport) -> tuple[int, int, int] | None:
    """Channels, height and width of a sample where it is an image whose entries are the first layer's inputs; else nothing."""
    shape = report.sample_shape
    if len(shape) == 2:
        shape = (1, *shape)
    if len(shape) != 3 or shape[0] not in (1, 3) or min(shape[1:]) < 2 or math.prod(shape) != report.layers[0].inputs:
        return None
    return shape[0], shape[1], shape[2]


def _reads_picture(reads: npt.NDArray[np.int64], image: tuple[int, int, int]) -> _Picture:
    pixels = reads.reshape(image).sum(axis=0)
    top = int(pixels.max())
    shades = _ramp(0.12 + 0.88 * pixels / max(top, 1))
    shades[pixels == 0] = _NEVER
    height, width = pixels.shape
    cell = max(1, min(32, 288 // max(height, width)))
    return _Picture(
        source=_png(shades),
        width=width * cell,
        height=height * cell,
        low="1",
        high=f"{top:,}",
        alt=f"How many nonzero weights read each of the {height} x {width} pixels",
    )


def _profile(reads: npt.NDArray[np.int64]) -> tuple[str, str]:
    """The counts as a step-shaped area in a unit-free 1000 x 100 drawing, averaged over neighbours where there are many; its top."""
    bins = _blocks(reads[None, :], 1, _PROFILE_BINS)[0]
    top = float(bins.max())
    points = ["M0 100"]
    for index, value in enumerate(bins):
        level = f"{100 - 100 * value / (top or 1.0):.2f}"
        points.append(f"L{1000 * index / len(bins):.2f} {level}L{1000 * (index + 1) / len(bins):.2f} {level}")
    return "".join([*points, "L1000 100Z"]), f"{top:,.0f}" if top == round(top) else f"{top:,.1f}"


# ------------------------------------------------------------------------------------------------------------------- page


@dataclass(frozen=True)
class _Bar:
    """One bar: ``fill`` and ``mark`` are positions in percent of the track, ``over`` says that the fill passes the mark."""

    label: str
    fill: float
    text: str
    mark: float | None = None
    over: bool = False


@dataclass(frozen=True)
class _Chart:
    title: str
    bars: tuple[_Bar, ...]
    note: str = ""


@dataclass(frozen=True)
class _Card:
    """What the mask of one layer shows."""

    name: str
    shape: str
    density: str
    mask: _Picture | None
    reads: _Picture | None
    profile: str
    reads_top: str
    reads_mean: str
    last_input: int
    averaged: bool
    never: str
    dead: str


@dataclass(frozen=True)
class _Tile:
    label: str
    value: str
    detail: str


def _width(share: float, top: float) -> float:
    """A bar's length in percent of its track."""
    return round(min(100.0, max(0.0, 100.0 * share / top)), 2) if top > 0 and math.isfinite(share) and math.isfinite(top) else 0.0


def _indices(flags: npt.NDArray[np.bool_]) -> str:
    found = np.flatnonzero(flags)
    shown = ", ".join(str(index) for index in found[:_LISTED])
    return shown + (f" and {len(found) - _LISTED:,} more" if len(found) > _LISTED else "")


def _card(layer: LayerReport, mask: Mask | None, image: tuple[int, int, int] | None) -> _Card:
    shape = f"{layer.inputs:,} inputs \N{RIGHTWARDS ARROW} {layer.outputs:,} outputs"
    density = f"{_percent(layer.density)} kept: {layer.nonzeros:,} of {layer.weights:,}"
    if mask is None:
        return _Card(layer.name, shape, density, None, None, "", "", "", 0, False, "", "")
    if mask.ndim != 2 or 0 in mask.shape:
        raise InvalidInput(f"the mask of layer {layer.name!r} has shape {mask.shape}: give a boolean matrix of shape (outputs, inputs)")
    kept = np.asarray(mask, dtype=np.bool_)
    reads = kept.sum(axis=0, dtype=np.int64)
    unread = reads == 0
    profile, top = _profile(reads)
    dead = kept.sum(axis=1, dtype=np.int64) == 0
    never = f"{int(unread.sum()):,} of {_plural(kept.shape[1], 'input')}"
    if layer.dead_inputs:
        never += f" ({layer.dead_inputs:,} never vary on the calibration data)"
    if unread.any():
        never += f": {_indices(unread)}"
    rows = f"{int(dead.sum()):,} of {_plural(kept.shape[0], 'output')}" + (f": {_indices(dead)}" if dead.any() else "")
    return _Card(
        name=layer.name,
        shape=shape,
        density=density,
        mask=_mask_picture(kept, layer.name),
        reads=_reads_picture(reads, image) if image is not None and math.prod(image) == kept.shape[1] else None,
        profile=profile,
        reads_top=top,
        reads_mean=f"{float(reads.mean()):.1f}",
        last_input=kept.shape[1] - 1,
        averaged=kept.shape[1] > _PROFILE_BINS,
        never=never,
        dead=rows,
    )


def _density_chart(report: PruneReport) -> _Chart:
    bars = [_Bar(layer.name, _width(layer.density, 1.0), _percent(layer.density)) for layer in report.layers]
    return _Chart("Density of each layer", tuple(bars), "Share of the layer's weights that are not zero; the full track is 100%.")


def _distance_chart(report: PruneReport) -> _Chart:
    finite = [
        value
        for layer in report.layers
        for value in (layer.relative_distance, layer.relative_tolerance)
        if value is not None and math.isfinite(value)
    ]
    top = 1.08 * max(finite, default=0.0)
    bars = []
    for layer in report.layers:
        allowed = layer.relative_tolerance
        over = layer.tolerance is not None and layer.distance > layer.tolerance
        text = _percent(layer.relative_distance)
        if allowed is not None:
            text += f"{', over' if over else ' of'} {_percent(allowed)}"
        mark = None if allowed is None else _width(allowed, top)
        bars.append(_Bar(layer.name, _width(layer.relative_distance, top), text, mark, over))
    if any(layer.tolerance is not None for layer in report.layers):
        note = "Bar: distance achieved. Upright line: tolerance. Both as a share of the norm of the layer's reference output."
        return _Chart("Distance achieved and tolerance", tuple(bars), note)
    return _Chart("Distance of each layer", tuple(bars), "Share of the norm of the layer's reference output; no tolerance was asked for.")


def _comparison_charts(rows: Sequence[ComparisonRow]) -> list[_Chart]:
    charts = [_Chart("Density", tuple(_Bar(row.label, _width(row.density, 1.0), _percent(row.density)) for row in rows))]
    for title, values, direction in (
        ("Accuracy", [row.accuracy for row in rows], 0),
        ("Agreement with the reference", [row.agreement for row in rows], -1),
    ):
        if any(value is not None for value in values):
            bars = [
                _Bar(row.label, _width(value or 0.0, 1.0), _percent(value, direction, decimals=2))
                for row, value in zip(rows, values, strict=True)
            ]
            charts.append(_Chart(title, tuple(bars)))
    discrepancies = [row.discrepancy for row in rows if row.discrepancy is not None and math.isfinite(row.discrepancy)]
    if discrepancies:
        top = max(discrepancies)
        bars = [_Bar(row.label, _width(row.discrepancy or 0.0, top), _percent(row.discrepancy)) for row in rows]
        charts.append(_Chart("Discrepancy of the output", tuple(bars)))
    return charts


def _tiles(report: PruneReport, certificate: Certificate) -> list[_Tile]:
    zeros = report.weights - report.nonzeros
    fewer = f", {report.weights / report.nonzeros:.1f} times fewer" if report.nonzeros else ""
    tiles = [
        _Tile("Weights that remain", _percent(report.density), f"{report.nonzeros:,} of {report.weights:,}{fewer}"),
        _Tile("Weights that are now zero", f"{zeros:,}", f"in {_plural(len(report.layers), 'layer')}"),
    ]
    heldout, network = certificate.heldout, certificate.network
    if heldout is not None and heldout.accuracy_before is not None and heldout.accuracy_after is not None:
        before, after = (_percent(value, decimals=2) for value in (heldout.accuracy_before, heldout.accuracy_after))
        tiles.append(_Tile("Accuracy after pruning", after, f"{before} before, on {_plural(heldout.samples, 'held-out sample')}"))
    if heldout is not None and heldout.class_changes is not None and heldout.samples:
        agreement = 1.0 - heldout.class_changes / heldout.samples
        detail = f"of {_plural(heldout.samples, 'held-out sample')}; {heldout.class_changes:,} changed"
        tiles.append(_Tile("Same predicted class", _percent(agreement, -1, decimals=2), detail))
    elif network.agreement is not None:
        detail = f"of {_plural(network.rows, 'calibration row')}"
        tiles.append(_Tile("Same predicted class", _percent(network.agreement, -1, decimals=2), detail))
    achieved, bound = _share(network.achieved, network.reference_norm), _share(network.bound, network.reference_norm)
    detail = "no bound proven" if bound is None else f"proven: at most {_percent(bound, +1)}"
    tiles.append(_Tile("Discrepancy of the output", _percent(achieved), f"{detail}; calibration rows"))
    tiles.append(_Tile("Time", _duration(report.seconds), f"{_plural(report.samples, 'calibration sample')}, {report.scheme} scheme"))
    return tiles


def _certificate_rows(certificate: Certificate) -> list[dict[str, Any]]:
    rows = []
    for layer in certificate.layers:
        norm = layer.reference_norm
        rows.append(
            {
                "name": layer.name,
                "rows": f"{layer.rows:,}" if layer.rows == layer.rows_total else f"{layer.rows:,} of {layer.rows_total:,}",
                "norm": _number(norm),
                "distance": (_percent(_share(layer.distance, norm)), _number(layer.distance)),
                "tolerance": (_percent(_share(layer.tolerance, norm)), _number(layer.tolerance)),
                "discrepancy": (_percent(_row_share(layer.discrepancy, layer)), _number(layer.discrepancy)),
                "bound": (_percent(_row_share(layer.bound, layer), +1), _number(layer.bound, +1)),
                "gap": _percent(layer.gap, +1),
                "holds": layer.holds,
            }
        )
    network = certificate.network
    norm = network.reference_norm
    rows.append(
        {
            "name": f"network output ({network.output_layer})",
            "rows": f"{network.rows:,}",
            "norm": _number(norm),
            "distance": (_NONE, _NONE),
            "tolerance": (_NONE, _NONE),
            "discrepancy": (_percent(_share(network.achieved, norm)), _number(network.achieved)),
            "bound": (_percent(_share(network.bound, norm), +1), _number(network.bound, +1)),
            "gap": _NONE,
            "holds": network.holds,
        }
    )
    return rows


def _layer_rows(report: PruneReport) -> list[dict[str, Any]]:
    return [
        {
            "name": layer.name,
            "kind": layer.kind,
            "shape": f"{layer.inputs:,} \N{RIGHTWARDS ARROW} {layer.outputs:,}",
            "activation": layer.activation,
            "reading": layer.reading,
            "target": layer.target,
            "density": _percent(layer.density),
            "nonzeros": f"{layer.nonzeros:,} of {layer.weights:,}",
            "distance": _percent(layer.relative_distance),
            "tolerance": _percent(layer.relative_tolerance),
            "original": _percent(_share(layer.original_distance, layer.reference_norm)),
            "gap": _percent(layer.gap, +1),
            "status": layer.status.value,
            "ok": layer.status.ok,
            "iterations": f"{layer.iterations:,}",
            "seconds": _seconds(layer.seconds),
            "remarks": _layer_remarks(layer),
        }
        for layer in report.layers
    ]


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _settings(report: PruneReport, certificate: Certificate) -> list[tuple[str, str]]:
    known = [
        ("method", report.method),
        ("program", certificate.program),
        ("scheme", report.scheme),
        ("calibration samples", f"{report.samples:,}"),
        ("sample shape", " x ".join(str(size) for size in report.sample_shape) or "not known"),
        ("rows per layer at most", f"{certificate.max_samples:,}"),
        ("seed", str(report.seed)),
    ]
    taken = {name for name, _ in known}
    return known + [(str(key), _setting(value)) for key, value in report.settings.items() if str(key) not in taken]


def _code(text: str) -> Markup:
    """Text with `backquoted` parts set as code; everything else escaped."""
    parts = re.split(r"`([^`]+)`", text)
    pieces: Iterable[Markup] = (
        Markup("<code>{}</code>").format(part) if position % 2 else escape(part) for position, part in enumerate(parts)
    )
    return Markup("").join(pieces)


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nettrim", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = _code
    return environment


def report_html(
    report: PruneReport,
    certificate: Certificate,
    masks: Mapping[str, Mask],
    title: str = "Pruning report",
    comparison: Sequence[ComparisonRow] = (),
) -> str:
    """The report as one self-contained HTML page: no scripts, no requests, the same text for the same input.

    ``masks`` maps layer names to boolean matrices of shape (outputs, inputs), True where a weight is not zero. Layers without a
    mask are shown without pictures.
    """
    image = _image_shape(report)
    cards = [_card(layer, masks.get(layer.name), image if index == 0 else None) for index, layer in enumerate(report.layers)]
    ramp = ", ".join(f"rgb{colour} {100 * stop:.0f}%" for stop, colour in _RAMP)
    heldout = certificate.heldout
    hashes = [
        ("calibration data", certificate.calibration_hash),
        ("reference weights", certificate.reference_hash),
        ("pruned weights", certificate.weights_hash),
    ]
    if heldout is not None:
        hashes.append(("held-out data", heldout.data_hash))
    words = certificate_words(certificate)
    verdict = words[0].split(": ", 1)[1]
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            headline=_headline(report),
            holds=certificate.holds,
            verdict=verdict[0].upper() + verdict[1:],
            failures=_failures(certificate),
            tiles=_tiles(report, certificate),
            charts=[_density_chart(report), _distance_chart(report)],
            comparison=[
                {
                    "label": row.label,
                    "densities": _density_list(row.densities),
                    "density": _percent(row.density),
                    "accuracy": _percent(row.accuracy, decimals=2),
                    "agreement": _percent(row.agreement, -1, decimals=2),
                    "discrepancy": _percent(row.discrepancy),
                    "bound": _percent(row.bound, +1),
                    "seconds": _seconds(row.seconds),
                    "certificate": row.certificate,
                }
                for row in comparison
            ],
            comparison_charts=_comparison_charts(comparison) if comparison else [],
            cards=cards[:_OPEN_CARDS],
            folded_cards=cards[_OPEN_CARDS:],
            layers=_layer_rows(report),
            total={
                "density": _percent(report.density),
                "nonzeros": f"{report.nonzeros:,} of {report.weights:,}",
                "seconds": _seconds(report.seconds),
            },
            words=words,
            certificate_rows=_certificate_rows(certificate),
            sampled=any(layer.rows != layer.rows_total for layer in certificate.layers),
            settings=_settings(report, certificate),
            notes=report.notes,
            versions=sorted(certificate.versions.items()),
            hashes=hashes,
            ramp=Markup(ramp),
            lightest=Markup(f"rgb{_RAMP[0][1]}"),
            darkest=Markup(f"rgb{_RAMP[-1][1]}"),
            never_colour=Markup(f"rgb{_NEVER}"),
        )
    )
