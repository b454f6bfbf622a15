"""Into how many parts the budget solver can split a layer's rows before a part is no fair sample of them.

    OMP_NUM_THREADS=1 python benchmarks/solver_curvature.py --mnist DIR --fashion DIR

For several numbers of parts: the largest curvature of a part in that of all rows, and the distance that the solver then reaches. The layers
are those of single_layers.py, the loop is that of solver_study.py. Results go to benchmarks/results/solver_curvature.json; what follows
from them is in docs/solver_study.md.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from single_layers import CONVOLUTIONS, RESULTS, convolutions
from solver_study import Loop, Polish, finish, iterate, mnist_programs

from nettrim.methods import NetTrim
from nettrim.program import LayerProgram, StandardProgram, standardise
from nettrim.solvers import l0

PARTS = (1, 2, 3, 4, 8)
ROWS = 10_000
CALM = 0.005  # the last stage of the schedule
BASE = Loop()


def curvature(p: StandardProgram, parts: int, steps: int = 15) -> float:
    """The largest eigenvalue of ``(G + d)^-1/2 (parts * A_q^T A_q) (G + d)^-1/2`` over the parts ``A_q`` of the rows, by the power method.

    ``d`` is the damping of the first weight step. Where boxes are points, a step on part ``q`` shrinks the error by ``1 - `` these
    eigenvalues: above 2 it grows along some direction.
    """
    damping = BASE.schedule.start + BASE.weight_ridge
    root, source = (p.values + damping).rsqrt(), torch.Generator().manual_seed(0)
    start = torch.randn(len(root), generator=source, dtype=root.dtype)
    largest, P = 0.0, len(p.A)
    for part in range(parts):
        A = p.A[part * P // parts : (part + 1) * P // parts]
        x, size = start, 1.0
        for _ in range(steps):
            x = x / torch.linalg.vector_norm(x)
            x = root * (p.vectors.T @ (A.T @ (A @ (p.vectors @ (root * x))))) * (P / len(A))
            size = float(torch.linalg.vector_norm(x))
        largest = max(largest, size)
    return largest


def curvatures(layer: LayerProgram, name: str, sparsity: float = 0.9) -> list[dict[str, Any]]:
    """Curvature and distance reached, for several numbers of parts whatever their rows."""
    p = standardise(layer, power=1.0, ridge=NetTrim.ridge, shuffled=True, rough=True)
    found: list[dict[str, Any]] = []
    for parts in PARTS:
        settings = Loop(most_parts=parts, rows_per_input=0, curvature=math.inf, relaxation=1.0, still=CALM)
        loop = iterate(p, round((1 - sparsity) * layer.weights.numel()), settings)
        W, b, _ = finish(p, loop, Polish())
        one = {
            "layer": name,
            "shape": list(layer.shape),
            "parts": parts,
            "used_now": l0.row_parts(p).count,
            "curvature": curvature(p, parts),
        }
        found.append(one | {"distance": layer.distance(W, b), "iterations": loop.iterations})
    return found


def curvature_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Curvature, and the distance reached in that with all rows, for each number of parts."""
    out = Table(title="a part of the rows as a sample: curvature | distance, that with all rows being 1")
    for name in ("layer", "rows x inputs x outputs", "parts now", *(f"{parts} parts" for parts in PARTS)):
        out.add_column(name, justify="left" if name == "layer" else "right", no_wrap=True)
    for name in dict.fromkeys(row["layer"] for row in rows):
        own = [row for row in rows if row["layer"] == name]
        cells = [f"{row['curvature']:.2f} | {row['distance'] / own[0]['distance']:.4g}" for row in own]
        out.add_row(name, " x ".join(map(str, own[0]["shape"])), str(own[0]["used_now"]), *cells)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, default=None, help="folder with the MNIST files")
    parser.add_argument("--fashion", type=Path, default=None, help="folder with the Fashion-MNIST files")
    parser.add_argument("--quick", action="store_true", help="the MNIST network with 3,000 images; nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    made = [(layer.name, layer.seen) for layer in mnist_programs(options.mnist, 3_000 if options.quick else ROWS)]
    if not options.quick:
        made += [(one.name, one.program) for name, layers in CONVOLUTIONS.items() for one in convolutions(name, layers, options.fashion)]
    found = [row for name, program in made for row in curvatures(program, name)]
    if not options.quick:
        (RESULTS / "solver_curvature.json").write_text(json.dumps(found, indent=1) + "\n")
    Console(width=170).print(curvature_table(found))


if __name__ == "__main__":
    main()
