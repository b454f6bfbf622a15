"""The tables of README.md and docs/, written between their markers from the results that the benchmarks left in benchmarks/results.

    python benchmarks/tables.py            # writes them
    python benchmarks/tables.py --check    # says which of them differ from the results; exit code 1 if any does

A table stands between ``<!-- table NAME -->`` and ``<!-- end of table -->``; NAME is a function below.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(?<=<!-- table )(\w+)( -->\n)(.*?)(?=<!-- end of table -->)", re.DOTALL)
TABLES: dict[str, Callable[[], str]] = {}


def table(make: Callable[[], str]) -> Callable[[], str]:
    """A function of a table, known by its name."""
    TABLES[make.__name__] = make
    return make


# ------------------------------------------------------------------------------------------------------------ whole networks


@table
def summary() -> str:
    """Five networks, the methods side by side: accuracy without retraining."""
    methods = ("Net-Trim", "OBS", "SparseGPT", "Magnitude")
    mnist = {row["label"]: row for row in read("whole_network")}
    names = ("Net-Trim l0", "OBS", "SparseGPT", "magnitude")
    own = [mnist[f"95/95/80 %, {name}"] for name in names]
    dense = own[0]["accuracy_dense"]
    body = [
        ("784-300-100-10, MNIST", "95/95/80 % zeros", percent(dense, 2), *(percent(row["accuracy"], 2) for row in own), "whole_network")
    ]
    residual = read("residual_network")
    found = {(row["sparsity"], row["label"]): row for row in residual["rows"]}
    cells = [percent(found[0.9, name]["accuracy"], 2) for name in methods]
    body.append(("ResNet-20, Fashion-MNIST", "90 % zeros", percent(residual["dense"]["accuracy"], 2), *cells, "residual_network"))
    zoo = read("patterns_zoo")
    patterned = {(row["network"], row["pattern"], row["label"]): row for row in zoo["rows"]}
    for network, label in (
        ("resnet20_a", "ResNet-20 (option A), Fashion-MNIST"),
        ("depthwise_separable", "depthwise separable, Fashion-MNIST"),
        ("transformer_encoder", "transformer, Fashion-MNIST"),
    ):
        cells = [percent(patterned[network, "2:4", name]["accuracy"], 2) for name in methods]
        body.append((label, "2:4", percent(zoo["dense"][network]["accuracy"], 2), *cells, "patterns_zoo"))
    header = ("network", "pruned to", "trained", "Net-Trim", "OBS", "SparseGPT", "magnitude", "`python benchmarks/`...")
    return markdown(header, [(*row[:-1], f"`{row[-1]}.py`") for row in body], left=(0, 1, 7))


@table
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


@table
def memory() -> str:
    """Peak memory against the size of the calibration set."""
    rows = [row for row in read("whole_network") if row["label"].startswith("memory")]
    body = [(f"{row['samples']:,}", f"{row['extra_mebibytes']:.0f}", f"{row['seconds']:.1f}") for row in rows]
    return markdown(("calibration images (at most 4,096 rows kept)", "peak memory beyond the data, MiB", "seconds"), body)


@table
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


@table
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


@table
def calibration_samples() -> str:
    """Net-Trim against the rows that a layer sees for each input, and magnitude pruning beside it."""
    body = []
    for row in read("calibration_samples")["rows"]:
        network = row["network"] if not body or all(row["network"] != old for old, *_ in body) else ""
        accuracy, unseen = row["accuracy"], row["unseen"]["Net-Trim"]
        cells = (percent(accuracy[name], 2) for name in ("trained", "Net-Trim", "magnitude"))
        moved = (percent(share, 1) for share in (row["seen"]["Net-Trim"], unseen))
        body.append((network, f"{row['samples']:,}", f"{row['rows_for_each_input']:.2g}", *cells, *moved))
    return markdown(("network", "samples", "rows for each input", "trained", "Net-Trim", "magnitude", "moved, seen", "unseen"), body)


@table
def patterns_zoo() -> str:
    """Accuracy and discrepancy on test images under N:M, method by method."""
    facts = read("patterns_zoo")
    methods, free = ("Net-Trim", "LinearADMM", "OBS", "SparseGPT", "Wanda", "Magnitude"), "Net-Trim, no pattern"
    found = {(row["network"], row["pattern"], row["label"]): row for row in facts["rows"]}
    halves = {row["network"]: row for row in facts["rows"] if row["label"] == free and row["sparsity"] == 0.5}  # of 2:4 and 4:8 alike

    def cell(row: dict[str, Any] | None) -> str:
        return "not run" if row is None else f"{percent(row['accuracy'], 2)} ({percent(row['discrepancy_unseen'], 1)})"

    body = [
        (
            f"{network} ({percent(facts['dense'][network]['accuracy'], 2)})",
            pattern,
            *(cell(found.get((network, pattern, method))) for method in methods),
            cell(halves.get(network)),
        )
        for network, pattern in dict.fromkeys((row["network"], row["pattern"]) for row in facts["rows"])
    ]
    return markdown(("network (dense)", "pattern", *methods, free), body, left=(0, 1))


# ------------------------------------------------------------------------------------------------------------- single layers


@table
def first_layer() -> str:
    """One layer against the published solver and CVXPY."""
    rows = read("first_layer")["rows"]
    published = {(row["samples"], row["outputs"]): row["seconds"] for row in rows if row["solver"] == "published ADMM"}
    size, ratio = "samples x inputs x outputs", "distance / tolerance"
    header = ("solver", size, "seconds", "times faster", "l1 norm", "kept", ratio, "gap", "violation")
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


@table
def single_layers() -> str:
    """Errors and CPU times as shares of LinearADMM's, over all layers and sparsities."""
    rows = read("single_layers")["rows"]
    programs = {
        "points": ("points `A W0`, bias as it is: LinearADMM's own problem", "linear"),
        "points, bias": ("points, bias fitted", "linear"),
        "quick": ('boxes of the ReLU, `effort="quick"`', "output"),
        "activation": ("boxes of the ReLU", "output"),
    }

    def ratios(run: str, what: str) -> list[float]:
        return sorted(row["runs"][run][what] / row["runs"]["LinearADMM"][what] for row in rows)

    def spread(values: Sequence[float], decimals: int) -> str:
        return ", ".join(f"{value:.{decimals}f}" for value in (values[0], statistics.median(values), values[-1]))

    body = []
    for run, (label, what) in programs.items():
        errors, times = ratios(run, what), ratios(run, "cpu_seconds")
        below = sum(error <= 1 + 1e-4 for error in errors)  # weights are stored in float32
        twice = sum(time <= 2 for time in times)
        error = "linear" if what == "linear" else "after the ReLU"
        body.append((label, error, f"{below} of {len(rows)}", spread(errors, 4), spread(times, 2), f"{twice} of {len(rows)}"))
    three = "least, median, largest"
    header = (
        "Net-Trim's program",
        "error",
        "cases at or below LinearADMM's",
        f"its share of LinearADMM's: {three}",
        f"CPU time, in LinearADMM's: {three}",
        "cases within twice",
    )
    return markdown(header, body, left=(0, 1))


@table
def full_or_quick() -> str:
    """Full and quick effort on networks: accuracy, and discrepancy on calibration data and on unseen data."""
    mnist = {row["label"]: row for row in read("whole_network")}
    found = {(row["sparsity"], row["label"]): row for row in read("residual_network")["rows"]}
    body = []
    for zeros in ("95/95/80 %", "98/95/80 %"):
        pair = (mnist[f"{zeros}, Net-Trim l0"], mnist[f"{zeros}, Net-Trim l0, quick"])
        body.append((f"MNIST, {zeros}", *(f"{percent(row['accuracy'], 2)} ({percent(row['discrepancy'], 1)})" for row in pair)))
    for sparsity in sorted({sparsity for sparsity, label in found if label == "Net-Trim, quick"}):
        pair = (found[sparsity, "Net-Trim"], found[sparsity, "Net-Trim, quick"])
        cells = (
            f"{percent(row['accuracy'], 2)} ({percent(row['discrepancy'], 1)}, {percent(row['discrepancy_unseen'], 1)})" for row in pair
        )
        body.append((f"resnet20_b, {percent(sparsity, 0)}", *cells))
    return markdown(("network", "full: accuracy (discrepancy, unseen)", "quick"), body)


@table
def solver_study() -> str:
    """The budget solver's choices, one at a time."""
    facts = read("solver_study")["summary"]
    sparsities = [key for key in facts[0]["above_best_at"] if key != "0.9"]

    def above(share: float) -> str:
        return percent(share, 2) if share < 10 else f"{1 + share:.0e} x"

    body, group = [], ""
    for one in facts:
        label = one["group"] if one["group"] != group else ""
        group = one["group"]
        shares = (one["above_best"], *(one["above_best_at"][sparsity] for sparsity in sparsities), one["worst"])
        numbers = (f"{one['unseen']:.3f}", f"{one['iterations']:.0f}", f"{one['time']:.2f}")
        body.append((label.replace('effort="quick"', '`effort="quick"`'), one["variant"], *map(above, shares), *numbers))
    at = tuple(f"at {percent(float(sparsity), 0)}" for sparsity in sparsities)
    return markdown(("choice", "value", "above best", *at, "worst", "held out", "steps", "time"), body, left=(0, 1))


@table
def solver_curvature() -> str:
    """Curvature of a part of the rows, and the distance reached in that with all rows."""
    rows = read("solver_curvature")
    parts = [count for count in dict.fromkeys(row["parts"] for row in rows) if count > 1]
    body = []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        own = {row["parts"]: row for row in rows if row["layer"] == layer}
        cells = (f"{own[count]['curvature']:.2f}: {own[count]['distance'] / own[1]['distance']:.4g}" for count in parts)
        body.append((layer, " x ".join(map(str, own[1]["shape"])), str(own[1]["used_now"]), *cells))
    header = ("layer", "rows x inputs x outputs", "parts now", *(f"{count} parts" for count in parts))
    return markdown(header, body, left=(0, 1))


# ------------------------------------------------------------------------------------------------------------ size and speed


@table
def acceleration_one_thread() -> str:
    return acceleration(1)


@table
def acceleration_two_threads() -> str:
    return acceleration(2)


def acceleration(threads: int) -> str:
    """Times faster than the fastest of the dense forms, for layers and networks at several sparsities."""
    rows = [row for row in read("acceleration")["rows"] if row["threads"] == threads]

    def times(row: dict[str, Any]) -> float:
        seconds = row["seconds"]
        dense = min(seconds[name] for name in ("dense", "folded", "channels_last") if name in seconds)
        return float(dense / seconds["accelerated" if row["kind"] == "network" else "sparse"])

    sparsities = sorted({row["sparsity"] for row in rows})
    found = {(row["name"], row["batch"], row["sparsity"]): f"{times(row):.1f}" for row in rows}
    body = [
        (name, str(batch), *(found.get((name, batch, sparsity), "") for sparsity in sparsities))
        for name, batch in dict.fromkeys((row["name"], row["batch"]) for row in rows)
    ]
    return markdown(("layer or network", "batch", *(percent(sparsity, 0) for sparsity in sparsities)), body)


@table
def deployment() -> str:
    """Times smaller and faster than the trained network."""
    rows = read("deployment")["rows"]
    batches = [str(batch) for batch in rows[0]["batch_sizes"]]
    body = []
    for row in rows:
        for place, form in enumerate(form for form in row["forms"] if form["name"] != row["baseline"]):
            ratios = form["ratios"]
            sizes = (f"{ratios['bytes']:.2f}", *(f"{ratios[key]:.1f}" for key in ("compressed_bytes", "nonzero_macs")))
            own = (row["network"], str(row["threads"])) if not place else ("", "")
            body.append((*own, form["name"], *sizes, *(f"{ratios['speed'][batch]:.2f}" for batch in batches)))
    speeds = (f"batch of {batches[0]}", *batches[1:])
    header = ("network", "threads", "form", "bytes", "compressed", "multiply-adds without zeros", *speeds)
    return markdown(header, body, left=(0, 2))


@table
def file_sizes() -> str:
    """Bytes of files as shares of the dense one."""
    body = []
    for row in read("file_sizes")["rows"]:
        codings = [row["coded"][coding] for coding in ("bitmask", "gaps", "dense")]
        sizes = (row["zipped"], row["raw"]["bitmask"], row["raw"]["gaps"], *codings)
        shares = [percent(size / row["dense"], 1) for size in sizes]
        body.append(
            (row["network"], percent(row["zeros"], 1), f"{row['dense']:,}", *shares, f"**{percent(row['ours'] / row['dense'], 1)}**")
        )
    kinds = ("bitmask, raw", "gaps, raw", "bitmask", "gaps", "dense coding", "**compressed**")
    return markdown(("network", "zeros", "dense, bytes", "zipped", *kinds), body)


@table
def c_export() -> str:
    """Bytes of a network as C, and its outputs against PyTorch's."""
    body = []
    for row in read("c_export")["rows"]:
        sizes = [f"{row['sizes'][part]:,}" for part in ("weights", "positions", "model", "biases", "work", "code")]
        same = f"{row['same_class']:,} of {row['images']:,}"
        cells = (f"{row['nonzeros']:,}", *sizes, same, f"{row['difference']:.1e}", percent(row["accuracy"], 2))
        body.append((row["label"], *cells))
    parts = ("weights", "positions", "both", "biases", "work", "code")
    return markdown(("network", "nonzeros", *parts, "same class", "largest difference", "accuracy"), body)


@table
def compaction() -> str:
    """What compaction removes after unstructured pruning."""
    body = []
    for row in read("compaction")["rows"]:
        (neurons, left), (before, after) = row["neurons"], row["parameters"]
        body.append(
            (
                row["network"],
                row["method"],
                f"{neurons} -> {left}",
                percent(1 - left / neurons, 0),
                f"{before:,} -> {after:,}",
                f"{before / after:.2f}",
                ", ".join(percent(value, 2) for value in row["accuracy"]),
                f"{row['difference']:.0e}" if row["difference"] else "0",
            )
        )
    accuracy = "accuracy: dense, pruned, compacted"
    header = ("network", "method", "neurons", "vanished", "parameters", "times fewer", accuracy, "difference")
    return markdown(header, body, left=(0, 1))


# ------------------------------------------------------------------------------------------------------------------ the pages


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """A Markdown table, the columns of ``left`` to the left, the others to the right."""
    rule = "|" + "|".join("---" if place in left else "---:" for place in range(len(header))) + "|"
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def percent(share: float, decimals: int) -> str:
    return f"{100 * share:.{decimals}f} %"


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def written(text: str) -> str:
    """A page with each of its tables as the results have it. Raises KeyError for a name that no function here has."""
    return BLOCK.sub(lambda found: found[1] + found[2] + TABLES[found[1]](), text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    different = 0
    for page in pages():
        text = page.read_text(encoding="utf-8")
        made = written(text)
        if made == text:
            continue
        different += 1
        old = {found[1]: found[3] for found in BLOCK.finditer(text)}
        names = [found[1] for found in BLOCK.finditer(made) if found[3] != old[found[1]]]
        print(f"{page.relative_to(ROOT)}: {', '.join(names)} {'differs' if options.check else 'written'}")
        if not options.check:
            page.write_text(made, encoding="utf-8")
    return int(options.check and different > 0)


if __name__ == "__main__":
    sys.exit(main())
