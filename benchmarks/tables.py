"""The README's tables, as Markdown, from the results that the benchmarks wrote.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, first column left, the others right."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def whole_network() -> str:
    """Accuracy, agreement and guarantee of the whole network."""
    rows = [row for row in read("whole_network") if not row["label"].startswith("memory")]
    header = ("run", "kept by layer", "kept", "accuracy", "agreement", "discrepancy", "proven", "seconds")
    dense = rows[0]["accuracy_dense"]
    body = [("trained network", "100 %", "100 %", percent(dense, 2), "100 %", "0 %", "", "")]
    body += [
        (
            row["label"],
            " / ".join(percent(density, 1) for density in row["densities"]),
            percent(row["density"], 1),
            percent(row["accuracy"], 2),
            percent(row["agreement"], 2),
            percent(row["discrepancy"], 1),
            "" if row["bound"] is None else percent(row["bound"], 1),
            f"{row['seconds']:.0f}",
        )
        for row in rows
    ]
    return markdown(header, body)


def first_layer() -> str:
    """One layer against the published solver and CVXPY."""
    rows = read("first_layer")["rows"]
    published = {(row["samples"], row["outputs"]): row["seconds"] for row in rows if row["solver"] == "published ADMM"}
    header = (
        "solver",
        "samples x inputs x outputs",
        "seconds",
        "times faster",
        "l1 norm",
        "kept",
        "distance / tolerance",
        "gap",
        "violation",
    )
    body = [
        (
            row["solver"],
            f"{row['samples']} x {row['inputs']} x {row['outputs']}",
            f"{row['seconds']:.1f}",
            f"{published[row['samples'], row['outputs']] / row['seconds']:.1f}",
            f"{row['l1']:.1f}",
            percent(row["density"], 1),
            f"{row['distance_of_tolerance']:.4f}",
            "" if row["gap"] is None else percent(row["gap"], 2),
            "" if row.get("largest_violation") is None else f"{row['largest_violation']:.0e}",
        )
        for row in rows
    ]
    return markdown(header, body)


def memory() -> str:
    """Peak memory against the size of the calibration set."""
    rows = [row for row in read("whole_network") if row["label"].startswith("memory")]
    body = [(f"{row['samples']:,}", f"{row['extra_mebibytes']:.0f}", f"{row['seconds']:.1f}") for row in rows]
    return markdown(("calibration images (at most 4,096 rows kept)", "peak memory beyond the data, MiB", "seconds"), body)


def residual_network() -> str:
    """What each part of the program is worth on a residual network, with and without re-estimated batch-norm."""
    facts = read("residual_network")
    dense = facts["dense"]["accuracy"]
    header = ("run", "zeros", "accuracy", "loss", "re-estimated", "loss", "discrepancy", "unseen", "CPU seconds", "MiB")
    body = [
        ("trained network", "0 %", percent(dense, 2), "", percent(facts["dense"]["reestimated"]["accuracy"], 2), "", "0 %", "0 %", "", "")
    ]
    body += [
        (
            row["label"],
            percent(row["sparsity"], 0),
            percent(row["accuracy"], 2),
            f"{100 * (dense - row['accuracy']):.2f}",
            percent(row["reestimated"]["accuracy"], 2),
            f"{100 * (dense - row['reestimated']['accuracy']):.2f}",
            percent(row["discrepancy"], 1),
            percent(row["discrepancy_unseen"], 1),
            f"{row['cpu_seconds']:.0f}",
            "" if row["extra_mebibytes"] is None else f"{row['extra_mebibytes']:.0f}",
        )
        for row in facts["rows"]
    ]
    return markdown(header, body)


def patches() -> str:
    """Time and memory against the patches kept for a layer, and against the images."""
    header = ("images", "patches, at most", "seconds", "CPU seconds", "peak memory beyond the start, MiB", "accuracy")
    body = [
        (
            f"{row['images']:,}",
            f"{row['patches']:,}",
            f"{row['seconds']:.0f}",
            f"{row['cpu_seconds']:.0f}",
            "" if row["extra_mebibytes"] is None else f"{row['extra_mebibytes']:.0f}",
            percent(row["accuracy"], 2),
        )
        for row in read("patches")["rows"]
    ]
    return markdown(header, body)


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def percent(share: float, decimals: int) -> str:
    return f"{100 * share:.{decimals}f} %"


if __name__ == "__main__":
    print(whole_network(), first_layer(), memory(), residual_network(), patches(), sep="\n\n")
