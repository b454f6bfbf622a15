"""The pruned 784-300-100-10 MNIST network as a C file: its bytes, and its outputs on all test images against PyTorch's.

    python benchmarks/c_export.py --data DIR

The trained network loses 95/95/80 % of its weights by Net-Trim (4,096 calibration images, no retraining), is exported as it is and after
`nettrim.compact`, compiled, and run on the 10,000 test images. Needs a C compiler. Results go to benchmarks/results/c_export.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import nettrim
from nettrim.deploy import c_check
from nettrim.experiments import datasets, training

RESULTS = Path(__file__).parent / "results"
BUDGET = {"1": 0.95, "3": 0.95, "5": 0.80}
IMAGES = 4096
GOAL = 60 * 1024  # bytes of weights and positions


def measured(label: str, model: nn.Module, dataset: datasets.Dataset) -> dict[str, Any]:
    """Sizes of one export, and its outputs on every test image."""
    images = dataset.test_images
    with tempfile.TemporaryDirectory() as folder:
        made = nettrim.export(model, images[:8], Path(folder) / "mnist.c")
        started = time.perf_counter()
        found = c_check.run(Path(folder), "mnist", images, ("-O2",))
        seconds = time.perf_counter() - started
    with torch.no_grad():
        wanted = model(images)
    assert made.sizes is not None
    dense = [int(parameter.numel()) for parameter in model.parameters()]
    return {
        "label": label,
        "parameters": sum(dense),
        "nonzeros": sum(int((parameter != 0).sum()) for name, parameter in model.named_parameters() if name.endswith("weight")),
        "sizes": made.sizes.__dict__ | {"model": made.sizes.model},
        "difference": float((found - wanted).abs().max() / wanted.abs().max()),
        "same_class": int((found.argmax(1) == wanted.argmax(1)).sum()),
        "images": len(images),
        "accuracy": float((found.argmax(1) == dataset.test_labels).double().mean()),
        "seconds_with_compilation": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="folder with the MNIST files")
    options = parser.parse_args()
    dataset = datasets.load("mnist", options.data)
    network = training.trained_network(dataset, cache=RESULTS / "cache", seed=0)
    batches = list(torch.split(dataset.train_images[:IMAGES], 256))
    pruned = nettrim.prune(network, batches, nettrim.NetTrim(sparsity=BUDGET), progress=False).model
    small = nettrim.compact(pruned, dataset.test_images[:8]).model
    rows = [
        measured("trained network", network, dataset),
        measured("95/95/80 % zeros", pruned, dataset),
        measured("95/95/80 % zeros, compacted", small, dataset),
    ]
    RESULTS.mkdir(parents=True, exist_ok=True)
    facts = {"images": IMAGES, "sparsity": BUDGET, "goal_bytes": GOAL, "rows": rows}
    (RESULTS / "c_export.json").write_text(json.dumps(facts, indent=1) + "\n")
    Console(width=150).print(table(rows))


def table(rows: list[dict[str, Any]]) -> Table:
    out = Table(title=f"784-300-100-10 on MNIST as C: bytes (goal: at most {GOAL:,} of weights and positions)")
    for name in ("network", "nonzeros", "weights", "positions", "both", "biases", "work", "code", "same class", "difference", "accuracy"):
        out.add_column(name, justify="left" if name == "network" else "right")
    for row in rows:
        sizes = row["sizes"]
        out.add_row(
            row["label"],
            f"{row['nonzeros']:,}",
            *(f"{sizes[part]:,}" for part in ("weights", "positions", "model", "biases", "work")),
            "-" if sizes["code"] is None else f"{sizes['code']:,}",
            f"{row['same_class']:,} of {row['images']:,}",
            f"{row['difference']:.1e}",
            f"{row['accuracy']:.2%}",
        )
    return out


if __name__ == "__main__":
    main()
