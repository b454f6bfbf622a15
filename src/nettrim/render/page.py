"""One self-contained HTML page: what the template shows, gathered from the report, the certificate and the masks."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ..certificate import Certificate
from ..deploy.bench_result import Bench
from ..report import LayerReport, PruneReport
from ..status import InvalidInput
from .bench_page import bench_section
from .numbers import NONE, duration, number, percent, plural, seconds_text, share_of, share_over_all_rows
from .pictures import NEVER, RAMP, Mask, Picture, Profile, image_shape, input_profile, mask_picture, pixel_picture
from .tables import ComparisonRow
from .words import certificate_words, failures, headline, layer_remarks, left_out_words, verdict

if TYPE_CHECKING:
    import jinja2

_OPEN_CARDS = 12  # pictures of the layers after these are folded away
_LISTED = 24  # indices named one by one before "and ... more"
_BENCH = ("<!-- size and speed -->", "<!-- end of size and speed -->")  # the place of that section, in report.html.j2


def report_html(
    report: PruneReport,
    certificate: Certificate,
    masks: Mapping[str, Mask],
    title: str = "Pruning report",
    comparison: Sequence[ComparisonRow] = (),
    bench: Bench | None = None,
    files: Mapping[str, str] | None = None,
) -> str:
    """The report as one self-contained HTML page: no scripts, no requests, the same text for the same input.

    ``masks`` maps layer names to boolean matrices of shape (outputs, inputs), True where a weight is not zero. Layers without a
    mask are shown without pictures. ``bench`` adds the section on size and speed. ``files`` holds the SHA-256 of each file that the
    page was made from, by name.

    Raises:
        InvalidInput: a mask is not a matrix.
    """
    first = report.layers[0]
    image = image_shape(report.sample_shape, first.inputs)
    cards = [_card(layer, masks.get(layer.name), image if layer is first else None) for layer in report.layers]
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            headline=headline(report),
            holds=certificate.holds,
            verdict=certificate.verdict.value,
            meaning=verdict(certificate),
            failures=failures(certificate),
            tiles=_tiles(report, certificate),
            charts=[_density_chart(report), _distance_chart(report)],
            comparison=[row.cells() for row in comparison],
            comparison_charts=_comparison_charts(comparison),
            bench=None if bench is None else bench_section(bench),
            cards=cards[:_OPEN_CARDS],
            folded_cards=cards[_OPEN_CARDS:],
            layers=[_layer_row(layer) for layer in report.layers],
            total={
                "density": percent(report.density),
                "nonzeros": f"{report.nonzeros:,} of {report.weights:,}",
                "seconds": seconds_text(report.seconds),
            },
            left_out=left_out_words(report),
            words=certificate_words(certificate),
            certificate_rows=_certificate_rows(certificate),
            sampled=any(layer.rows != layer.rows_total for layer in certificate.layers),
            settings=_settings(report, certificate),
            notes=report.notes,
            versions=sorted(certificate.versions.items()),
            hashes=_hashes(certificate) | {f"{name} (file)": digest for name, digest in (files or {}).items()},
            files=files or {},
            ramp=", ".join(f"rgb{colour} {100 * stop:.0f}%" for stop, colour in RAMP),
            lightest=f"rgb{RAMP[0][1]}",
            darkest=f"rgb{RAMP[-1][1]}",
            never_colour=f"rgb{NEVER}",
        )
    )


def page_with_bench(html: str, bench: Bench) -> str | None:
    """A page of :func:`report_html` with this section on size and speed; None where the page has no place for one."""
    before, start, rest = html.partition(_BENCH[0])
    _, end, after = rest.partition(_BENCH[1])
    if not (start and end):
        return None
    section = _environment().get_template("_bench.html.j2").render(bench=bench_section(bench))
    return f"{before}{start}\n{section}{end}{after}"


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    import jinja2  # needed by pages only
    from markupsafe import Markup, escape

    def code(text: str) -> Markup:
        """Text with `backquoted` parts set as code."""
        return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nettrim.render", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = code
    return environment


# ------------------------------------------------------------------------------------------------- what each layer keeps


@dataclass(frozen=True)
class _Card:
    """What the mask of one layer shows: its inputs as pixels of an image where they are, as a profile where not."""

    name: str
    shape: str
    density: str
    mask: Picture | None = None
    pixels: Picture | None = None
    profile: Profile | None = None
    never: str = ""
    dead: str = ""


def _card(layer: LayerReport, mask: Mask | None, image: tuple[int, int, int] | None) -> _Card:
    shape = f"{layer.inputs:,} inputs \N{RIGHTWARDS ARROW} {layer.outputs:,} outputs"
    density = f"{percent(layer.density)} kept: {layer.nonzeros:,} of {layer.weights:,}"
    if mask is None:
        return _Card(layer.name, shape, density)
    if mask.ndim < 2 or 0 in mask.shape:
        raise InvalidInput(f"the mask of layer {layer.name!r} has shape {mask.shape}: give a boolean array with outputs first")
    kept = np.asarray(mask, dtype=np.bool_).reshape(len(mask), -1)
    if layer.kind == "Conv1D":  # transformers keep such weights as (inputs, outputs)
        kept = kept.T
    reads = kept.sum(axis=0, dtype=np.int64)
    as_image = image is not None and math.prod(image) == len(reads)
    return _Card(
        name=layer.name,
        shape=shape,
        density=density,
        mask=mask_picture(kept, layer.name),
        pixels=pixel_picture(reads, image) if image is not None and as_image else None,
        profile=None if as_image else input_profile(reads),
        never=_counted(reads == 0, "input", f" ({layer.dead_inputs:,} never vary on the calibration data)" if layer.dead_inputs else ""),
        dead=_counted(kept.sum(axis=1) == 0, "output"),
    )


def _counted(flags: Mask, noun: str, remark: str = "") -> str:
    """``2 of 300 outputs: 5, 9``."""
    found = np.flatnonzero(flags)
    words = f"{len(found):,} of {plural(len(flags), noun)}{remark}"
    if len(found):
        words += ": " + ", ".join(str(index) for index in found[:_LISTED])
    return words + (f" and {len(found) - _LISTED:,} more" if len(found) > _LISTED else "")


# ---------------------------------------------------------------------------------------------------------------- charts


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
    bars: Sequence[_Bar]
    note: str = ""


def _width(share: float | None, top: float) -> float:
    """A bar's length in percent of its track."""
    if share is None or not math.isfinite(share) or top <= 0:
        return 0.0
    return round(min(100.0, max(0.0, 100.0 * share / top)), 2)


def _largest(values: Sequence[float | None]) -> float:
    return max((value for value in values if value is not None and math.isfinite(value)), default=0.0)


def _density_chart(report: PruneReport) -> _Chart:
    bars = [_Bar(layer.name, _width(layer.density, 1.0), percent(layer.density)) for layer in report.layers]
    return _Chart("Density of each layer", bars, "Share of the layer's weights that are not zero; the full track is 100%.")


def _distance_chart(report: PruneReport) -> _Chart:
    top = 1.08 * _largest([value for layer in report.layers for value in (layer.relative_distance, layer.relative_tolerance)])
    bars = []
    for layer in report.layers:
        distance, allowed = layer.relative_distance, layer.relative_tolerance
        if allowed is None or layer.tolerance is None:
            bars.append(_Bar(layer.name, _width(distance, top), percent(distance)))
        else:
            over = layer.distance > layer.tolerance
            text = f"{percent(distance)}{', over' if over else ' of'} {percent(allowed)}"
            bars.append(_Bar(layer.name, _width(distance, top), text, _width(allowed, top), over))
    if any(bar.mark is not None for bar in bars):
        note = "Bar: distance achieved. Upright line: tolerance. Both as a share of the norm of the layer's reference output."
        return _Chart("Distance achieved and tolerance", bars, note)
    return _Chart("Distance of each layer", bars, "Share of the norm of the layer's reference output; no tolerance was asked for.")


def _comparison_charts(rows: Sequence[ComparisonRow]) -> list[_Chart]:
    """One chart for each figure that any of the networks has."""
    top = _largest([row.discrepancy for row in rows])
    figures = (
        ("Density", 1.0, [(row.label, row.density, percent(row.density)) for row in rows]),
        ("Accuracy", 1.0, [(row.label, row.accuracy, percent(row.accuracy, decimals=2)) for row in rows]),
        ("Agreement with the reference", 1.0, [(row.label, row.agreement, percent(row.agreement, -1, decimals=2)) for row in rows]),
        ("Discrepancy of the output", top, [(row.label, row.discrepancy, percent(row.discrepancy)) for row in rows]),
    )
    return [
        _Chart(title, [_Bar(label, _width(value, full), text) for label, value, text in values])
        for title, full, values in figures
        if any(value is not None for _, value, _ in values)
    ]


# ------------------------------------------------------------------------------------------------------ figures and tables


def _tiles(report: PruneReport, certificate: Certificate) -> list[tuple[str, str, str]]:
    """The figures at the top: label, value, detail."""
    fewer = f", {report.weights / report.nonzeros:.1f} times fewer" if report.nonzeros else ""
    whole, layers = report.model, plural(len(report.layers), "pruned layer")
    tiles = [
        ("Zeros in the whole model", percent(whole.zero_share), f"{whole.zeros:,} of {whole.parameters:,} parameters"),
        ("Weights that remain", percent(report.density), f"{report.nonzeros:,} of {report.weights:,} in {layers}{fewer}"),
    ]
    heldout, network = certificate.heldout, certificate.network
    if heldout is not None and heldout.accuracy_before is not None and heldout.accuracy_after is not None:
        before, after = (percent(value, decimals=2) for value in (heldout.accuracy_before, heldout.accuracy_after))
        tiles.insert(0, ("Accuracy after pruning", after, f"{before} before, on {heldout.labelled_words}"))
    if heldout is not None and heldout.class_changes is not None:
        same = percent(1.0 - heldout.class_changes / heldout.counted, -1, decimals=2)
        tiles.append((f"Same {heldout.predicted_words}", same, f"of {heldout.units_words}; {heldout.class_changes:,} changed"))
    elif network.agreement is not None:
        same = percent(network.agreement, -1, decimals=2)
        words = "predicted class" if heldout is not None and heldout.accuracy_before is not None else "largest entry"
        tiles.append((f"Same {words}", same, f"of {plural(network.rows, 'calibration row')}"))
    achieved, bound = share_of(network.achieved, network.reference_norm), share_of(network.bound, network.reference_norm)
    detail = "no bound proven" if bound is None else f"proven: at most {percent(bound, +1)}"
    tiles.append(("Discrepancy of the output", percent(achieved), f"{detail}; calibration rows"))
    tiles.append(("Time", duration(report.seconds), f"{plural(report.samples, 'calibration sample')}, {report.scheme} scheme"))
    return tiles


def _layer_row(layer: LayerReport) -> dict[str, Any]:
    return {
        "name": layer.name,
        "shape": f"{layer.kind}, {layer.inputs:,} \N{RIGHTWARDS ARROW} {layer.outputs:,}",
        "activation": layer.activation,
        "reading": layer.reading,
        "target": layer.target,
        "density": percent(layer.density),
        "nonzeros": f"{layer.nonzeros:,} of {layer.weights:,}",
        "distance": percent(layer.relative_distance),
        "original": percent(share_of(layer.original_distance, layer.reference_norm)),
        "tolerance": percent(layer.relative_tolerance),
        "gap": percent(layer.gap, +1),
        "status": layer.status.value,
        "ok": layer.status.ok,
        "seconds": seconds_text(layer.seconds),
        "iterations": f"{layer.iterations:,}",
        "remarks": layer_remarks(layer),
    }


def _certificate_rows(certificate: Certificate) -> list[dict[str, Any]]:
    """One row per layer, then the network's output; pairs are the share of the reference norm and the norm itself."""
    rows: list[dict[str, Any]] = [
        {
            "name": layer.name,
            "rows": f"{layer.rows:,}" if layer.rows == layer.rows_total else f"{layer.rows:,} of {layer.rows_total:,}",
            "norm": number(layer.reference_norm),
            "distance": (percent(share_of(layer.distance, layer.reference_norm)), number(layer.distance)),
            "tolerance": (percent(share_of(layer.tolerance, layer.reference_norm)), number(layer.tolerance)),
            "discrepancy": (percent(share_over_all_rows(layer.discrepancy, layer)), number(layer.discrepancy)),
            "bound": (percent(share_over_all_rows(layer.bound, layer), +1), number(layer.bound, +1)),
            "gap": percent(layer.gap, +1),
            "holds": layer.holds,
        }
        for layer in certificate.layers
    ]
    network = certificate.network
    norm = network.reference_norm
    last = {
        "name": "network output",
        "rows": f"{network.rows:,}",
        "norm": number(norm),
        "distance": (NONE, NONE),
        "tolerance": (NONE, NONE),
        "discrepancy": (percent(share_of(network.achieved, norm)), number(network.achieved)),
        "bound": (percent(share_of(network.bound, norm), +1), number(network.bound, +1)),
        "gap": NONE,
        "holds": network.holds,
    }
    return [*rows, last]


def _settings(report: PruneReport, certificate: Certificate) -> dict[str, str]:
    """What the run was asked for; what the report's own settings repeat is stated once."""
    known = {
        "method": report.method,
        "program": certificate.program,
        "scheme": report.scheme,
        "calibration samples": f"{report.samples:,}",
        "sample shape": " x ".join(str(size) for size in report.sample_shape) or "not known",
        "rows per layer at most": f"{certificate.max_samples:,}",
        "seed": str(report.seed),
    }
    asked = {
        name: value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str) for name, value in report.settings.items()
    }
    return known | asked | known  # in this order, and what is known wins


def _hashes(certificate: Certificate) -> dict[str, str]:
    hashes = {
        "calibration data": certificate.calibration_hash,
        "reference weights": certificate.reference_hash,
        "pruned weights": certificate.weights_hash,
    }
    if certificate.heldout is not None:
        hashes["held-out data"] = certificate.heldout.data_hash
    return hashes
