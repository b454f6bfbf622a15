"""How much smaller and faster pruned networks are: dense, pruned, compacted and accelerated at batch sizes 1, 32 and 256.

    python benchmarks/deployment.py --data DIR --mnist DIR [--networks mnist_fc resnet20_b ...] [--threads 1 2]

784-300-100-10 on MNIST at 95/95/80 % zeros by Net-Trim, and the zoo's networks at 90 and 95 % by magnitude (which weights stay hardly
matters for size and speed). LeNet-5 is on MNIST (``--mnist``), the rest of the zoo on Fashion-MNIST (``--data``). Each row is what
`nettrim.bench` measured, ended rows are kept, and rows measured again replace earlier ones: benchmarks/results/deployment.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import nettrim
from nettrim.experiments import datasets, training, zoo_training
from nettrim.experiments.datasets import Dataset
from nettrim.render.bench_table import bench_tables

RESULTS = Path(__file__).parent / "results"
FULLY_CONNECTED = "mnist_fc"
ZOO = ("lenet5", "resnet20_b", "vgg_like", "depthwise_separable", "transformer_encoder")
EVEN = {"1": 0.95, "3": 0.95, "5": 0.80}
IMAGES, ROWS = 200, 2_000  # magnitudes need no data; the certificates that come with them do


def networks(options: argparse.Namespace) -> Iterator[tuple[str, nn.Module, nn.Module, Dataset]]:
    """Label, trained network, pruned network, data."""
    for name in options.networks:
        dataset = (
            datasets.load("mnist", options.mnist) if name in (FULLY_CONNECTED, "lenet5") else datasets.load("fashion-mnist", options.data)
        )
        if name == FULLY_CONNECTED:
            model: nn.Module = training.trained_network(dataset, cache=RESULTS / "cache")
            batches = list(torch.split(dataset.train_images[:4096], 256))
            made = nettrim.prune(model, batches, nettrim.NetTrim(sparsity=EVEN), progress=False)
            yield "784-300-100-10, 95/95/80 %, Net-Trim", model, made.model, dataset
            continue
        model = zoo_training.trained(name, dataset, seed=0, cache=RESULTS / "cache")
        for sparsity in options.sparsity:
            method = nettrim.Magnitude(sparsity=sparsity)
            made = nettrim.prune(model, dataset.train_images[:IMAGES], method, max_samples=ROWS, progress=False)
            yield f"{name}, {100 * sparsity:.0f} %, magnitude", model, made.model, dataset


def table(rows: list[dict[str, Any]], batches: list[str]) -> Table:
    """Times smaller and faster than the trained network, of every form."""
    out = Table(title="Times smaller and faster than the trained network, in the same run")
    names = ("network", "threads", "form", "bytes", "compressed", "multiply-adds", "without zeros", *(f"speed at {n}" for n in batches))
    for name in names:
        out.add_column(name, justify="left" if name in ("network", "form") else "right")
    for row in rows:
        out.add_section()
        for form in row["forms"][1:]:
            ratios = form["ratios"]
            sizes = [ratios[key] for key in ("bytes", "compressed_bytes", "macs", "nonzero_macs")]
            cells = ["-" if ratio is None else f"{ratio:.2f}" for ratio in (*sizes, *(ratios["speed"].get(n) for n in batches))]
            out.add_row(row["network"], str(row["threads"]), form["name"], *cells)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="folder with the Fashion-MNIST files")
    parser.add_argument("--mnist", type=Path, default=None, help="folder with the MNIST files")
    parser.add_argument("--networks", nargs="+", choices=(FULLY_CONNECTED, *ZOO), default=(FULLY_CONNECTED, *ZOO))
    parser.add_argument("--sparsity", nargs="+", type=float, default=(0.9, 0.95), help="of the zoo's networks")
    parser.add_argument("--threads", nargs="+", type=int, default=(1,))
    parser.add_argument("--seconds", type=float, default=1.0, help="measured at least for each form and batch size")
    options = parser.parse_args()
    console, path = Console(width=170), RESULTS / "deployment.json"
    rows = {(row["network"], row["threads"]): row for row in json.loads(path.read_text())["rows"]} if path.is_file() else {}
    for label, trained, pruned, dataset in networks(options):
        for threads in options.threads:
            made = nettrim.bench(pruned, dataset.test_images[:256], reference=trained, threads=threads, seconds=options.seconds)
            rows[label, threads] = {"network": label, "threads": threads, **made.to_dict()}
            path.write_text(json.dumps({"rows": list(rows.values())}, indent=1, allow_nan=False) + "\n")
            console.print(f"[bold]{label}[/], {made.machine}", *bench_tables(made), *(f"note: {note}" for note in made.notes), sep="\n")
    console.print(table(list(rows.values()), ["1", "32", "256"]))


if __name__ == "__main__":
    main()
