"""The section "Size and speed" of the report's page: what its template shows."""

from __future__ import annotations

from typing import Any

from ..deploy.bench_result import Bench, Form
from .bench_words import count_cell, difference_text, milliseconds, per_second, times
from .numbers import NONE, percent


def bench_section(bench: Bench) -> dict[str, Any]:
    """Rows and charts as text; pairs are a number and what stands below it in small print."""
    return {
        "baseline": bench.baseline,
        "sizes": [_size_row(bench, form) for form in bench.forms],
        "batches": [
            {"batch": f"{batch:,}", "rows": [_speed_row(bench, form, batch) for form in bench.forms]} for batch in bench.batch_sizes
        ],
        "charts": _charts(bench),
        "seconds": f"{bench.seconds:g}",
        "machine": str(bench.machine),
        "notes": bench.notes,
    }


def _size_row(bench: Bench, form: Form) -> dict[str, Any]:
    ratios = bench.ratios(form.name)

    def pair(name: str, count: int | None) -> tuple[str, str]:
        ratio = None if form.name == bench.baseline and name not in ("compressed_bytes", "nonzero_macs") else ratios[name]
        return count_cell(count, None), "" if ratio is None else f"{times(ratio)} \N{MULTIPLICATION SIGN}"

    return {
        "name": form.name,
        "made_from": f"from {form.made_from}" if form.made_from else "",
        "cells": [
            pair("parameters", form.parameters),
            pair("nonzeros", form.nonzeros),
            pair("bytes", form.bytes),
            pair("compressed_bytes", form.compressed_bytes),
            pair("macs", form.macs),
            pair("nonzero_macs", form.nonzero_macs),
        ],
        "difference": difference_text(form),
    }


def _speed_row(bench: Bench, form: Form, batch: int) -> dict[str, Any]:
    found = form.at(batch)
    if found is None:
        return {"name": form.name, "how": "", "median": NONE, "quartiles": "", "throughput": NONE, "times": NONE, "macs": NONE}
    return {
        "name": form.name,
        "how": found.how,
        "median": milliseconds(found.seconds),
        "quartiles": f"{milliseconds(found.lower)} to {milliseconds(found.upper)}",
        "throughput": per_second(found.throughput),
        "times": times(bench.ratios(form.name)["speed"][batch]),
        "macs": count_cell(found.macs, None),
    }


def _charts(bench: Bench) -> list[dict[str, Any]]:
    """Shares of the baseline: bytes of the compressed files, and seconds at each batch size."""
    base = bench.form(bench.baseline)
    values: list[tuple[str, list[tuple[str, float]]]] = []
    if base.bytes:
        sizes = [(form.name, form.compressed_bytes / base.bytes) for form in bench.forms if form.compressed_bytes is not None]
        values.append((f"Compressed file, as a share of the plain file of {base.name}", sizes))
    for batch in bench.batch_sizes:
        timed = [(form.name, form.at(batch), base.at(batch)) for form in bench.forms]
        shares = [(name, ours.seconds / theirs.seconds) for name, ours, theirs in timed if ours is not None and theirs is not None]
        values.append((f"Time of a batch of {batch:,}, as a share of {base.name}", shares))
    return [
        {
            "title": title,
            "note": "",
            "bars": [
                {
                    "label": name,
                    "fill": round(100.0 * share / max(1.0, *(s for _, s in shares)), 2),
                    "text": percent(share),
                    "mark": None,
                    "over": False,
                }
                for name, share in shares
            ],
        }
        for title, shares in values
        if shares
    ]
