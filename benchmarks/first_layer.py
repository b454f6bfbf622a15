"""One layer: nettrim's l1 and l0, on its own and on the published program, against the published ADMM and CVXPY.

    python benchmarks/first_layer.py --data DIR

Times are single runs on whatever machine this is: compare them as ratios within one run. Results go to benchmarks/results/first_layer.json.
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

from nettrim.experiments import datasets, training
from nettrim.layers import view
from nettrim.methods import NetTrim
from nettrim.preimage import RELU
from nettrim.program import LayerProgram, from_rows
from nettrim.solvers.halfspace import published_admm
from nettrim.solvers.reference import preimage_l1

EPSILON = 0.05
L1, L0 = NetTrim(epsilon=EPSILON), NetTrim(epsilon=EPSILON, norm="l0")
HALFSPACE = NetTrim(epsilon=EPSILON, program="halfspace")
COARSE = NetTrim(epsilon=EPSILON, gap=0.2)  # already below the objective at which the published solver stops
RESULTS = Path(__file__).parent / "results"


def first_layer(data: Path | None, samples: int, seed: int, neurons: int | None = None) -> LayerProgram:
    """The program of the first layer of the trained 784-300-100-10 network on ``samples`` training images."""
    dataset = datasets.load("mnist", data)
    network = training.trained_network(dataset, cache=RESULTS / "cache", seed=seed)
    layer = view("1", dict(network.named_modules())["1"])
    chosen = torch.randperm(len(dataset.train_images), generator=torch.Generator().manual_seed(seed))[:samples]
    A = dataset.train_images[chosen].flatten(1).double()
    W, b = layer.weights().double()[:, :neurons], layer.bias().double()[:neurons]
    return from_rows(A, RELU.apply(A @ W + b), RELU, W, b)


def ours(label: str, program: LayerProgram, method: NetTrim) -> dict[str, Any]:
    """One of our solvers, with nothing prepared beforehand."""
    start = time.perf_counter()
    solution = method.solve(program, EPSILON)
    seconds = time.perf_counter() - start
    return row(label, program, seconds, solution.iterations, solution.weights, solution.distance, solution.gap) | {
        "largest_violation": solution.violation
    }


def published(program: LayerProgram, iterations: int) -> dict[str, Any]:
    """The published ADMM at the published settings (rho 100), float64."""
    Y = torch.where(torch.isinf(program.lo), torch.zeros_like(program.hi), program.hi)
    start = time.perf_counter()
    solution = published_admm(program.inputs, Y, EPSILON * program.reference_norm, rho=100.0, iterations=iterations)
    seconds = time.perf_counter() - start
    return row("published ADMM", program, seconds, solution.iterations, solution.weights, solution.distance, None) | {
        "largest_violation": solution.largest_violation,
        "converged": solution.converged,
    }


def cvxpy(program: LayerProgram) -> dict[str, Any]:
    """CVXPY with Clarabel on the preimage program."""
    start = time.perf_counter()
    solution = preimage_l1(program.inputs.numpy(), program.lo.numpy(), program.hi.numpy(), EPSILON * program.reference_norm)
    seconds = time.perf_counter() - start
    weights = torch.from_numpy(solution.weights)
    weights = torch.where(weights.abs() < 1e-6 * weights.abs().max(), 0.0, weights)  # an interior point method leaves no exact zeros
    return row("CVXPY (Clarabel)", program, seconds, 0, weights, solution.distance, None)


def row(
    name: str, program: LayerProgram, seconds: float, iterations: int, W: torch.Tensor, distance: float, gap: float | None
) -> dict[str, Any]:
    P, N, M = program.shape
    return {
        "solver": name,
        "samples": P,
        "inputs": N,
        "outputs": M,
        "seconds": seconds,
        "iterations": iterations,
        "l1": float(W.double().abs().sum()),
        "density": float((W != 0).double().mean()),
        "distance_of_tolerance": distance / (EPSILON * program.reference_norm),
        "gap": gap,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="folder with the MNIST files")
    parser.add_argument("--samples", type=int, nargs="+", default=[2000, 10000])
    parser.add_argument("--iterations", type=int, default=2000, help="of the published ADMM")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console = Console(width=140)
    rows: list[dict[str, Any]] = []
    small = first_layer(options.data, 400, options.seed, neurons=4)
    rows += [cvxpy(small), ours("nettrim l1", small, L1), published(small, options.iterations)]
    for samples in options.samples:
        console.print(f"{samples} samples")
        program = first_layer(options.data, samples, options.seed)
        rows += [ours("nettrim l1, gap 20 %", program, COARSE), ours("nettrim l1", program, L1), ours("nettrim l0", program, L0)]
        rows += [ours("published program, nettrim", program, HALFSPACE), published(program, options.iterations)]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "first_layer.json").write_text(
        json.dumps({"epsilon": EPSILON, "threads": torch.get_num_threads(), "rows": rows}, indent=1) + "\n"
    )
    console.print(table(rows))


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows, with each time as a share of the published ADMM's on the same program."""
    out = Table(title=f"first layer of 784-300-100-10 on MNIST, epsilon {EPSILON:.0%}")
    for name in (
        "solver",
        "samples x inputs x outputs",
        "seconds",
        "times faster",
        "iterations",
        "l1 norm",
        "density",
        "distance / tolerance",
        "gap",
        "violation",
    ):
        out.add_column(name, justify="left" if name == "solver" else "right", no_wrap=True)
    base = {(r["samples"], r["outputs"]): r["seconds"] for r in rows if r["solver"] == "published ADMM"}
    for r in rows:
        key = (r["samples"], r["outputs"])
        out.add_row(
            r["solver"],
            f"{r['samples']} x {r['inputs']} x {r['outputs']}",
            f"{r['seconds']:.2f}",
            f"{base[key] / r['seconds']:.1f}",
            str(r["iterations"] or "-"),
            f"{r['l1']:.1f}",
            f"{r['density']:.1%}",
            f"{r['distance_of_tolerance']:.5f}",
            "-" if r["gap"] is None else f"{r['gap']:.2%}",
            "-" if r.get("largest_violation") is None else f"{r['largest_violation']:.1e}",
        )
    return out


if __name__ == "__main__":
    main()
