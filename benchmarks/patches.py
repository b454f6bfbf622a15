"""Time and peak memory of pruning a residual network's inner convolutions, against the patches kept for a layer and against the images.

    python benchmarks/patches.py --data DIR

The network, the layers and the child processes are those of residual_network.py. ``max_samples`` bounds the rows of a layer's program: a
layer with fewer output positions on all images uses what there is. Results go to benchmarks/results/patches.json and patches.png.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from residual_network import BATCH, NETWORK, RESULTS, Judge, Run, in_child, load, row
from rich.console import Console
from rich.table import Table

import nettrim

SPARSITY = 0.9
PATCHES, IMAGES_FOR_PATCHES = (1_000, 3_000, 10_000, 30_000), 500
IMAGES, PATCHES_FOR_IMAGES = (100, 300, 1_000), 10_000
KEPT = ("images", "patches", "accuracy", "discrepancy", "discrepancy_unseen", "seconds", "cpu_seconds", "extra_mebibytes", "holds")
TIME, MEMORY = "#1f5fa8", "#b4541a"


def points() -> list[tuple[int, int]]:
    """All pairs of images and patches, once each."""
    varied = [(IMAGES_FOR_PATCHES, patches) for patches in PATCHES] + [(images, PATCHES_FOR_IMAGES) for images in IMAGES]
    return list(dict.fromkeys(varied))


def series(rows: list[dict[str, Any]], axis: str) -> list[dict[str, Any]]:
    """The rows along ``"patches"`` or along ``"images"``, in its order."""
    other, fixed = ("images", IMAGES_FOR_PATCHES) if axis == "patches" else ("patches", PATCHES_FOR_IMAGES)
    return sorted((one for one in rows if one[other] == fixed), key=lambda one: one[axis])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="folder with the Fashion-MNIST files")
    options = parser.parse_args()
    console = Console(stderr=True)
    dataset, network = load(options.data)
    judge = Judge(network, dataset)
    rows = []
    for images, patches in points():
        run = Run(f"{images} images, {patches} patches", nettrim.NetTrim(sparsity=SPARSITY), images=images, patches=patches)
        made = row(SPARSITY, run, in_child(network, dataset.train_images, run), judge)
        used = [rows_used for _, _, rows_used in made["layers"].values()]
        rows.append({key: made[key] for key in KEPT} | {"rows_used": [min(used), max(used)]})
        console.print(f"{run.label}: {made['seconds']:.1f} s, {made['accuracy']:.2%}")
        facts = {"network": NETWORK, "sparsity": SPARSITY, "batch": BATCH, "threads": torch.get_num_threads(), "cores": os.cpu_count()}
        (RESULTS / "patches.json").write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    figure(rows).savefig(RESULTS / "patches.png", dpi=150)
    Console(width=120).print(table(rows))


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Two panels, against patches and against images; in each, time on the left axis and peak memory on the right one."""
    matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False})
    out = Figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = out.subplots(1, 2)
    panel(left, series(rows, "patches"), "patches", f"patches kept for a layer, at most ({IMAGES_FOR_PATCHES} images)")
    panel(right, series(rows, "images"), "images", f"calibration images (at most {PATCHES_FOR_IMAGES:,} patches)")
    out.suptitle(f"{NETWORK} on Fashion-MNIST: 20 convolutions to {SPARSITY:.0%} zeros, {torch.get_num_threads()} threads")
    return out


def panel(axes: Axes, rows: list[dict[str, Any]], key: str, label: str) -> None:
    places = [one[key] for one in rows]
    axes.plot(places, [one["seconds"] for one in rows], "o-", color=TIME, label="time")
    axes.plot(places, [one["cpu_seconds"] for one in rows], "o:", color=TIME, alpha=0.6, label="CPU time")
    axes.set_xscale("log")
    axes.set_xticks(places, [f"{place:,}" for place in places])
    axes.set_xticks([], minor=True)
    axes.set_ylim(0, 1.35 * axes.get_ylim()[1])  # room for the legend
    axes.set_xlabel(label)
    axes.set_ylabel("seconds", color=TIME)
    axes.grid(axis="y", alpha=0.3)
    lines = list(axes.lines)
    if all(one["extra_mebibytes"] is not None for one in rows):  # some systems do not say
        memory = axes.twinx()
        lines += memory.plot(places, [one["extra_mebibytes"] for one in rows], "s--", color=MEMORY, label="peak memory")
        memory.set_ylim(0, 1.35 * memory.get_ylim()[1])
        memory.set_ylabel("peak memory beyond the start, MiB", color=MEMORY)
    axes.legend(handles=lines, frameon=False, loc="upper left")


def table(rows: list[dict[str, Any]]) -> Table:
    out = Table(title=f"{NETWORK}, inner convolutions to {SPARSITY:.0%} zeros")
    for name in ("images", "patches, at most", "rows used", "seconds", "CPU s", "extra MiB", "accuracy", "discrepancy", "unseen"):
        out.add_column(name, justify="right")
    for one in rows:
        out.add_row(
            f"{one['images']:,}",
            f"{one['patches']:,}",
            " to ".join(f"{count:,}" for count in one["rows_used"]),
            f"{one['seconds']:.1f}",
            f"{one['cpu_seconds']:.1f}",
            "-" if one["extra_mebibytes"] is None else f"{one['extra_mebibytes']:.0f}",
            f"{one['accuracy']:.2%}",
            f"{one['discrepancy']:.1%}",
            f"{one['discrepancy_unseen']:.1%}",
        )
    return out


if __name__ == "__main__":
    main()
