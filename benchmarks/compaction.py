"""Compaction after unstructured pruning at 98 %: how many neurons and parameters of the zoo's networks vanish, the function being kept.

    python benchmarks/compaction.py --data DIR

All prunable layers but the first and the last lose 98 % of their weights, in the cascade, without retraining: by Net-Trim, and
by magnitude.
Then `nettrim.compact` removes what has become dead. LeNet-5 is on MNIST (``--mnist``), the others on Fashion-MNIST (``--data``).
Results go to benchmarks/results/compaction.json after every run; ``--networks`` repeats some and keeps the others.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import nettrim
from nettrim.experiments import datasets, zoo, zoo_training
from nettrim.experiments.training import accuracy
from nettrim.layers import is_prunable

RESULTS = Path(__file__).parent / "results"
IMAGES, ROWS, SPARSITY = 500, 5_000, 0.98


def inner_layers(model: nn.Module) -> list[str]:
    """All prunable layers but the first and the last; attention's projections as `prune` names them are left out."""
    names = [name for name, module in model.named_modules() if is_prunable(module) and "attention" not in name]
    return names[1:-1]


def measured(name: str, method: Any, model: nn.Module, dataset: datasets.Dataset) -> dict[str, Any]:
    """One network pruned by one method, then compacted."""
    started = time.perf_counter()
    pruned = nettrim.prune(model, dataset.train_images[:IMAGES], method, layers=inner_layers(model), max_samples=ROWS, progress=False).model
    seconds, started = time.perf_counter() - started, time.perf_counter()
    small = nettrim.compact(pruned, dataset.test_images[:8])
    compacting = time.perf_counter() - started
    with torch.no_grad():
        wanted, found = pruned(dataset.test_images[:2000]), small.model(dataset.test_images[:2000])
    hidden = [layer for layer in small.layers if layer.name != small.layers[-1].name]
    nonzeros = sum(int((parameter != 0).sum()) for parameter in pruned.parameters())
    return {
        "network": name,
        "method": type(method).__name__,
        "neurons": [sum(layer.outputs[0] for layer in hidden), sum(layer.outputs[1] for layer in hidden)],
        "parameters": list(small.parameters),
        "nonzeros": [nonzeros, sum(int((parameter != 0).sum()) for parameter in small.model.parameters())],
        "difference": float((wanted - found).abs().max() / wanted.abs().max()),
        "accuracy": [accuracy(one, dataset.test_images, dataset.test_labels) for one in (model, pruned, small.model)],
        "passes": small.passes,
        "notes": list(small.notes),
        "seconds": [seconds, compacting],
        "layers": {layer.name: [*layer.outputs] for layer in small.layers if layer.removed},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="folder with the Fashion-MNIST files")
    parser.add_argument("--mnist", type=Path, default=None, help="folder with the MNIST files")
    parser.add_argument("--networks", nargs="+", default=list(zoo.NETWORKS), choices=list(zoo.NETWORKS))
    options = parser.parse_args()
    console = Console(stderr=True)
    path = RESULTS / "compaction.json"
    rows = {(row["network"], row["method"]): row for row in (json.loads(path.read_text())["rows"] if path.exists() else [])}
    for name in options.networks:
        dataset = datasets.load("mnist", options.mnist) if name == "lenet5" else datasets.load("fashion-mnist", options.data)
        model = zoo_training.trained(name, dataset, seed=0, cache=RESULTS / "cache")
        for method in (nettrim.NetTrim(sparsity=SPARSITY), nettrim.Magnitude(sparsity=SPARSITY)):
            row = measured(name, method, model, dataset)
            rows[name, row["method"]] = row
            facts = {"sparsity": SPARSITY, "images": IMAGES, "rows": list(rows.values())}
            path.write_text(json.dumps(facts, indent=1) + "\n")
            console.print(f"{name}, {row['method']}: {row['neurons'][0]} -> {row['neurons'][1]} neurons, {row['seconds'][0]:.0f} s")
    Console(width=170).print(table(list(rows.values())))


def table(rows: list[dict[str, Any]]) -> Table:
    out = Table(title="Compaction after 98 % unstructured sparsity in all inner layers")
    for column in (
        "network",
        "method",
        "neurons",
        "vanished",
        "parameters",
        "times fewer",
        "nonzeros",
        "accuracy",
        "difference",
        "seconds",
    ):
        out.add_column(column, justify="left" if column in ("network", "method") else "right")
    for row in rows:
        (neurons, left), (before, after) = row["neurons"], row["parameters"]
        out.add_row(
            row["network"],
            row["method"],
            f"{neurons} -> {left}",
            f"{1 - left / neurons:.0%}",
            f"{before:,} -> {after:,}",
            f"{before / after:.2f}",
            f"{row['nonzeros'][0]:,} -> {row['nonzeros'][1]:,}",
            " -> ".join(f"{value:.2%}" for value in row["accuracy"]),
            f"{row['difference']:.1e}",
            f"{row['seconds'][1]:.1f}",
        )
    return out


if __name__ == "__main__":
    main()
