"""N:M patterns on the zoo's networks (Fashion-MNIST, lenet5: MNIST): what each method loses when at most N of every M weights stay.

    python benchmarks/patterns_zoo.py --data DIR --mnist DIR

All layers but the first and the last (of vgg_like and resnet20_b: all convolutions but the first), cascade, no retraining; judge and
child processes are those of residual_network.py. "No pattern" is Net-Trim with the same number of zeros wherever they do least harm:
what the pattern costs. Results go to benchmarks/results/patterns_zoo.json after every run; ``--only`` repeats some and keeps the others.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from residual_network import FULL, RESULTS, Judge, Run, in_child, reestimated, row
from rich.console import Console
from rich.table import Table
from torch import nn

import nettrim
from nettrim.experiments import datasets, zoo_training

CONVOLUTIONS = ("vgg_like", "resnet20_b")
ON_MNIST = ("lenet5",)
NETWORKS = (*CONVOLUTIONS, "resnet20_a", "depthwise_separable", "transformer_encoder", *ON_MNIST)
PATTERNS = ("2:4", "4:8")
IMAGES, PATCHES = 1_000, 10_000
FREE = f"{FULL}, no pattern"
OTHERS = (nettrim.Magnitude, nettrim.Wanda, nettrim.OBS, nettrim.SparseGPT, nettrim.LinearADMM)


def runs(name: str, network: nn.Module, pattern: str) -> list[Run]:
    """The runs with one pattern."""
    layers = [layer for layer, module in network.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    options = {} if name in CONVOLUTIONS else {"layers": layers[1:-1]}
    ours = nettrim.NetTrim(pattern=pattern)
    methods = {FULL: ours, FREE: nettrim.NetTrim(sparsity=ours.targets)} | {method.__name__: method(pattern=pattern) for method in OTHERS}
    return [Run(label, method, images=IMAGES, patches=PATCHES, options=options) for label, method in methods.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="folder with the Fashion-MNIST files")
    parser.add_argument("--mnist", type=Path, default=None, help="folder with the MNIST files")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS), metavar="N:M")
    parser.add_argument("--only", nargs="+", default=None, metavar="RUN", help="names of the runs to make; the others' results are kept")
    options = parser.parse_args()
    console = Console(stderr=True)
    path = RESULTS / "patterns_zoo.json"
    facts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"dense": {}, "rows": []}
    rows = {(old["network"], old["pattern"], old["label"]): old for old in facts["rows"]}
    for name in options.networks:
        dataset = datasets.load("mnist", options.mnist) if name in ON_MNIST else datasets.load("fashion-mnist", options.data)
        network = zoo_training.trained(name, dataset, seed=0, cache=RESULTS / "cache")
        judge = Judge(network, dataset)
        again = judge(reestimated(network, dataset.train_images[:IMAGES]), IMAGES)
        facts["dense"][name] = {"accuracy": judge.accuracy, "reestimated": again}
        for pattern in options.patterns:
            for run in runs(name, network, pattern):
                if options.only and run.label not in options.only:
                    continue
                made = row(run.method.targets, run, in_child(network, dataset.train_images, run), judge)
                rows[name, pattern, run.label] = {"network": name, "pattern": pattern} | made
                facts |= {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "rows": list(rows.values())}
                path.write_text(json.dumps(facts, indent=1) + "\n")
                console.print(f"{name} {pattern} {run.label}: {made['accuracy']:.2%}, {made['seconds']:.1f} s")
    Console(width=170).print(table(facts))


def table(facts: dict[str, Any]) -> Table:
    out = Table(title="N:M, no retraining")
    columns = ("network", "pattern", "run", "kept", "accuracy", "loss", "re-estimated", "discrepancy", "unseen", "seconds", "holds")
    for name in columns:
        out.add_column(name, justify="left" if name in ("network", "run") else "right")
    for one in facts["rows"]:
        out.add_row(
            one["network"],
            one["pattern"],
            one["label"],
            f"{one['density']:.1%}",
            f"{one['accuracy']:.2%}",
            f"{100 * (facts['dense'][one['network']]['accuracy'] - one['accuracy']):.2f}",
            f"{one['reestimated']['accuracy']:.2%}",
            f"{one['discrepancy']:.1%}",
            f"{one['discrepancy_unseen']:.1%}",
            f"{one['seconds']:.1f}",
            "yes" if one["holds"] else "no",
        )
    return out


if __name__ == "__main__":
    main()
