"""The trained 784-300-100-10 MNIST network, pruned as a whole: accuracy, agreement, time, and memory against the calibration set's size.

    python benchmarks/whole_network.py --data DIR

Peak memory is that of a child process for each run. Results go to benchmarks/results/whole_network.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import nettrim
from nettrim.experiments import datasets, training
from nettrim.experiments.demo import comparison

RESULTS = Path(__file__).parent / "results"
BUDGET = {"1": 0.98, "3": 0.95, "5": 0.80}
EVEN = {"1": 0.95, "3": 0.95, "5": 0.80}
OVERALL = 1 - (4704 + 1500 + 200) / 266_200  # as many zeros as BUDGET gives
RUNS: dict[str, dict[str, Any]] = {
    "98/95/80 %, Net-Trim l0": {"method": nettrim.NetTrim(sparsity=BUDGET)},
    "98/95/80 %, Net-Trim l0, quick": {"method": nettrim.NetTrim(sparsity=BUDGET, effort="quick")},
    "98/95/80 %, Net-Trim l0, parallel": {"method": nettrim.NetTrim(sparsity=BUDGET), "scheme": "parallel"},
    "98/95/80 %, Net-Trim l0, outputs alike": {"method": nettrim.NetTrim(sparsity=BUDGET, importance="uniform")},
    "98/95/80 %, Net-Trim l0, 3 sweeps": {"method": nettrim.NetTrim(sparsity=BUDGET), "sweeps": 3},
    "98/95/80 %, Net-Trim l0, 3 sweeps, fine-tuned": {"method": nettrim.NetTrim(sparsity=BUDGET), "sweeps": 3, "loss": "kl"},
    "97.6 % in all, Net-Trim l0, global": {"method": nettrim.NetTrim(sparsity=OVERALL), "allocation": "global"},
    "97.6 % in all, Net-Trim l0, global, 3 sweeps": {"method": nettrim.NetTrim(sparsity=OVERALL), "allocation": "global", "sweeps": 3},
    "97.6 % in all, Net-Trim l0, quick, global": {"method": nettrim.NetTrim(sparsity=OVERALL, effort="quick"), "allocation": "global"},
    "97.6 % in all, magnitude, global": {"method": nettrim.Magnitude(sparsity=OVERALL), "allocation": "global"},
    "95/95/80 %, Net-Trim l0": {"method": nettrim.NetTrim(sparsity=EVEN)},
    "95/95/80 %, Net-Trim l0, quick": {"method": nettrim.NetTrim(sparsity=EVEN, effort="quick")},
    "95/95/80 %, Net-Trim l0, 3 sweeps": {"method": nettrim.NetTrim(sparsity=EVEN), "sweeps": 3},
    "95/95/80 %, Net-Trim l0, fine-tuned": {"method": nettrim.NetTrim(sparsity=EVEN), "loss": "mse"},
    "95/95/80 %, Net-Trim l0, 3 sweeps, fine-tuned": {"method": nettrim.NetTrim(sparsity=EVEN), "sweeps": 3, "loss": "kl"},
    "95/95/80 %, linear ADMM": {"method": nettrim.LinearADMM(sparsity=EVEN)},
    "95/95/80 %, OBS": {"method": nettrim.OBS(sparsity=EVEN)},
    "95/95/80 %, SparseGPT": {"method": nettrim.SparseGPT(sparsity=EVEN)},
    "95/95/80 %, Wanda": {"method": nettrim.Wanda(sparsity=EVEN)},
    "95/95/80 %, magnitude": {"method": nettrim.Magnitude(sparsity=EVEN)},
    "98/95/80 %, linear ADMM": {"method": nettrim.LinearADMM(sparsity=BUDGET)},
    "98/95/80 %, magnitude": {"method": nettrim.Magnitude(sparsity=BUDGET)},
    "epsilon 5 %, l1": {"method": nettrim.NetTrim(epsilon=0.05)},
    "epsilon 5 %, l1, polished": {"method": nettrim.NetTrim(epsilon=0.05, polish=True)},
    "epsilon 5 %, l1, parallel": {"method": nettrim.NetTrim(epsilon=0.05), "scheme": "parallel"},
    "epsilon 5 %, l0": {"method": nettrim.NetTrim(epsilon=0.05, norm="l0")},
    "epsilon 5 %, l1, 10,000 images": {"method": nettrim.NetTrim(epsilon=0.05), "samples": 10_000},
}
MEMORY = (5_000, 20_000, 60_000)  # calibration images at a cap of 4,096 rows


def run(
    label: str,
    data: Path | None,
    seed: int,
    method: Any,
    scheme: str = "cascade",
    samples: int = 4096,
    cap: int = 20_000,
    loss: str = "",
    **options: Any,
) -> dict[str, Any]:
    """One pruning run in this process, with its peak memory beyond what loading the data took."""
    dataset = datasets.load("mnist", data)
    network = training.trained_network(dataset, cache=RESULTS / "cache", seed=seed)
    heldout = list(zip(torch.split(dataset.test_images, 500), torch.split(dataset.test_labels, 500), strict=True))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    batches = list(torch.split(dataset.train_images[:samples], 256))
    result = nettrim.prune(
        network,
        batches,
        method,
        scheme="parallel" if scheme == "parallel" else "cascade",
        heldout=heldout,
        max_samples=cap,
        progress=False,
        **options,
    )
    if loss:
        tuned = nettrim.distill(result.model, network, batches, loss="kl" if loss == "kl" else "mse", progress=False)
        result = nettrim.recertify(result, tuned.model, network, batches, heldout=heldout)
    seconds = time.perf_counter() - start
    row = comparison(label, result)
    unseen = result.certificate.heldout
    return {
        "label": label,
        "samples": samples,
        "densities": list(row.densities),
        "density": row.density,
        "accuracy_dense": None if unseen is None else unseen.accuracy_before,
        "accuracy": row.accuracy,
        "agreement": row.agreement,
        "discrepancy": row.discrepancy,
        "bound": row.bound,
        "holds": result.certificate.holds,
        "class_change_bound": None if unseen is None else unseen.class_change_bound,
        "seconds": seconds,
        "extra_mebibytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }


def child(arguments: tuple[str, Path | None, int, dict[str, Any]]) -> dict[str, Any]:
    label, data, seed, settings = arguments
    return run(label, data, seed, **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="folder with the MNIST files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=None, metavar="RUN", help="names of the runs to make; the others' results are kept")
    options = parser.parse_args()
    dataset = datasets.load("mnist", options.data)
    training.trained_network(dataset, cache=RESULTS / "cache", seed=options.seed)  # trained once, here
    runs = dict(RUNS)
    for samples in MEMORY:
        settings = {"method": nettrim.NetTrim(epsilon=0.1), "samples": samples, "cap": 4096}
        runs[f"memory: {samples} images, 4,096 rows kept"] = settings
    path = RESULTS / "whole_network.json"
    made = {row["label"]: row for row in json.loads(path.read_text())} if options.only and path.exists() else {}
    context = multiprocessing.get_context("spawn")
    for label, settings in runs.items():
        if options.only and label not in options.only:
            continue
        with context.Pool(1) as pool:
            made[label] = pool.apply(child, ((label, options.data, options.seed, settings),))
        Console(stderr=True).print(f"{label}: {made[label]['seconds']:.1f} s")
    rows = [made[label] for label in runs if label in made]
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")
    Console(width=150).print(table(rows))


def table(rows: list[dict[str, Any]]) -> Table:
    out = Table(title="784-300-100-10 on MNIST")
    for name in ("run", "density by layer", "density", "accuracy", "agreement", "discrepancy", "bound", "seconds", "extra MiB"):
        out.add_column(name, justify="left" if name == "run" else "right")
    for r in rows:
        out.add_row(
            r["label"],
            " / ".join(f"{d:.1%}" for d in r["densities"]),
            f"{r['density']:.1%}",
            f"{r['accuracy']:.2%} of {r['accuracy_dense']:.2%}",
            f"{r['agreement']:.2%}",
            f"{r['discrepancy']:.2%}",
            "-" if r["bound"] is None else f"{r['bound']:.2%}",
            f"{r['seconds']:.1f}",
            f"{r['extra_mebibytes']:.0f}",
        )
    return out


if __name__ == "__main__":
    main()
