"""How many calibration samples a network needs: accuracy and discrepancy on unseen data against the rows that its largest layer sees.

    python benchmarks/calibration_samples.py --data DIR [--quick]

A fully connected network on scikit-learn's digits and on MNIST, and a convolutional one (LeNet-5, whose layers see one row for each
position of each image) on MNIST, each at 90 % zeros in every layer but the last (80 %), with growing calibration sets. Rows are counted
for the layer that has fewest of them for each of its inputs. Results go to benchmarks/results/calibration_samples.json after every row;
rows that are there are not measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import nettrim
from nettrim.experiments import datasets, training, zoo_training
from nettrim.experiments.datasets import Dataset

RESULTS = Path(__file__).parent / "results"
SPARSITY, LAST = 0.9, 0.8
SAMPLES = (1, 10, 30, 100, 300, 1_000, 3_000, 10_000)
MOST_IMAGES = 1_000  # of the convolutional network, whose layers see many rows of each
METHODS = {"Net-Trim": nettrim.NetTrim, "magnitude": nettrim.Magnitude}


def networks(data: Path | None, quick: bool) -> Iterator[tuple[str, nn.Module, Dataset, int]]:
    """Label, trained network, data, and how many samples at most."""
    digits = datasets.load("digits")
    yield "64-300-100-10, digits", training.trained_network(digits), digits, len(digits.train_images)
    if not quick:
        mnist = datasets.load("mnist", data)
        yield "784-300-100-10, MNIST", training.trained_network(mnist, cache=RESULTS / "cache"), mnist, max(SAMPLES)
        yield "LeNet-5, MNIST", zoo_training.trained("lenet5", mnist, seed=0, cache=RESULTS / "cache"), mnist, MOST_IMAGES


def rows_for_each_input(model: nn.Module, images: Tensor) -> tuple[float, str]:
    """The fewest rows that a layer sees for each of its inputs, and that layer's name."""
    seen: dict[str, float] = {}

    def hook(name: str, layer: nn.Linear | nn.Conv2d) -> Any:
        def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = output[:, 0].numel() / layer.weight[0].numel()

        return layer.register_forward_hook(record)

    hooks = [hook(name, layer) for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    with torch.no_grad():
        model(images)
    for one in hooks:
        one.remove()
    return min((share, name) for name, share in seen.items())


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(batch).double() for batch in torch.split(images, 500)])


def discrepancy(model: nn.Module, pruned: nn.Module, images: Tensor) -> float:
    wanted = logits(model, images)
    return float(torch.linalg.matrix_norm(logits(pruned, images) - wanted) / torch.linalg.matrix_norm(wanted))


def measured(label: str, model: nn.Module, dataset: Dataset, count: int) -> dict[str, Any]:
    """All methods with the first ``count`` images."""
    images = dataset.train_images[:count]
    layers = [name for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    targets = dict.fromkeys(layers[:-1], SPARSITY) | {layers[-1]: LAST}
    rows, name = rows_for_each_input(model, images)
    row: dict[str, Any] = {"network": label, "samples": count, "rows_for_each_input": rows, "layer": name}
    row["accuracy"] = {"trained": float((logits(model, dataset.test_images).argmax(1) == dataset.test_labels).double().mean())}
    row |= {"seen": {}, "unseen": {}}
    for method, make in METHODS.items():
        pruned = nettrim.prune(model, list(torch.split(images, 250)), make(sparsity=targets), progress=False).model
        row["accuracy"][method] = float((logits(pruned, dataset.test_images).argmax(1) == dataset.test_labels).double().mean())
        row["seen"][method] = discrepancy(model, pruned, images)
        row["unseen"][method] = discrepancy(model, pruned, dataset.test_images)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="folder with the MNIST files")
    parser.add_argument("--quick", action="store_true", help="the digits with three sizes; nothing is written")
    options = parser.parse_args()
    path = RESULTS / "calibration_samples.json"
    known = json.loads(path.read_text())["rows"] if path.exists() and not options.quick else []
    rows = {(row["network"], row["samples"]): row for row in known}
    for label, model, dataset, most in networks(options.data, options.quick):
        for count in (1, 100, most) if options.quick else sorted({min(count, most) for count in SAMPLES}):
            if (label, count) not in rows:
                rows[label, count] = measured(label, model, dataset, count)
                Console(stderr=True, width=170).print(rows[label, count])
            if not options.quick:
                path.write_text(json.dumps({"sparsity": [SPARSITY, LAST], "rows": list(rows.values())}, indent=1) + "\n")


if __name__ == "__main__":
    main()
