"""From which sparsity on sparse execution pays: single layers and whole networks, accelerated against dense.

    python benchmarks/acceleration.py

Masks are random: only where zeros are counts for speed, not which network they come from. A row compares, in interleaved repeats, the
fastest of PyTorch's own dense forms (as given; batch-norm folded; folded and channels_last) with the model whose every layer is sparse
("sparse") and with what `nettrim.accelerate` keeps ("accelerated", the model as given where that is faster). Layers are
timed with the change of layout around them. Results go to benchmarks/results/acceleration.json after every row; rows that are there are
not run again unless ``--again`` is given. The picture is benchmarks/results/acceleration.png.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

import nettrim
from nettrim.deploy.sparse_chain import SparseChain
from nettrim.deploy.sparse_region import SparseRegion
from nettrim.deploy.sparse_steps import Step, sparse_weights, window_of
from nettrim.deploy.timing import side_by_side
from nettrim.experiments import zoo

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
LINEAR = ((4096, 4096), (1024, 1024), (784, 300))
CONVOLUTIONS = ((64, 32, 3), (128, 16, 3), (256, 8, 3), (512, 4, 3), (256, 14, 1), (16, 28, 3))
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)


def mnist() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def wide() -> nn.Module:
    """64-128-256-512 channels, two convolutions each, on 32 x 32 images with three channels."""
    parts: list[nn.Module] = []
    before = 3
    for channels in (64, 128, 256, 512):
        for _ in range(2):
            parts += [nn.Conv2d(before, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
            before = channels
        parts.append(nn.MaxPool2d(2))
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(2048, 10))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "MNIST 784-300-100-10": (mnist, (1, 28, 28), (1, 32, 256)),
    "VGG-like of the zoo": (zoo.vgg_like, (1, 28, 28), (1, 16)),
    "ResNet-20 of the zoo": (lambda: zoo.resnet(stem_stride=2), (1, 28, 28), (1, 16)),
    "VGG-like 64-512": (wide, (3, 32, 32), (1, 16)),
}


def masked(model: nn.Module, sparsity: float, last: float | None = None) -> nn.Module:
    """Random zeros in every layer; frozen. ``last``: the sparsity of the last layer."""
    generator = torch.Generator().manual_seed(0)
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    for layer in layers:
        share = last if last is not None and layer is layers[-1] else sparsity
        with torch.no_grad():
            layer.weight.mul_(torch.rand(layer.weight.shape, generator=generator) >= share)
    return model.eval().requires_grad_(False)


def dense_forms(model: nn.Module, x: Tensor) -> dict[str, Callable[[], Any]]:
    forms: dict[str, Callable[[], Any]] = {"dense": lambda: model(x)}
    if any(isinstance(layer, nn.Conv2d) for layer in model.modules()):
        folded = fuse(model) if any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules()) else model
        last = copy.deepcopy(folded).to(memory_format=torch.channels_last)
        y = x.contiguous(memory_format=torch.channels_last)
        forms |= {"folded": lambda: folded(x), "channels_last": lambda: last(y)}
    return forms


def layer_row(layer: nn.Linear | nn.Conv2d, shape: tuple[int, ...], budget: float) -> dict[str, Any]:
    """One layer by itself; the direct product also without the change of layout ("inside": as within a region)."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weights = {"layer": sparse_weights(layer)}
    image = isinstance(layer, nn.Conv2d)
    step = Step("conv" if image else "linear", 0, 1, layer="layer", window=window_of(layer) if image else None)
    candidates = dense_forms(layer, x)
    regions = {}
    for chunk in sorted({min(size, shape[0]) for size in (8, 16, 32, 64, 128)}):
        region = SparseRegion([step], weights, [image], [1], chunk=chunk)
        regions[f"direct{chunk}"] = region
        candidates[f"direct{chunk}"] = lambda region=region: region(x)
    if not image:
        chain = SparseChain([step], weights, [1])
        candidates["csr"] = lambda: chain(x)
    with torch.inference_mode():
        wanted = layer(x)
        assert float((regions[next(iter(regions))](x) - wanted).abs().max() / wanted.abs().max()) < 1e-5
    found = {name: passes.median for name, passes in side_by_side(candidates, budget).items()}
    direct = min(found[name] for name in regions)
    best = min(regions, key=lambda name: found[name])
    workspace, chunks = regions[best].workspace([x]), math.ceil(shape[0] / regions[best].chunk)
    single = workspace.single(regions[best].threads(workspace.plan.work), chunks)
    inside = side_by_side({"inside": single[0]}, budget)["inside"].median
    row = {name: seconds for name, seconds in found.items() if name not in regions}
    return {"seconds": {**row, "sparse": direct, "inside": inside}, "chunk": regions[best].chunk}


def network_row(model: nn.Module, shape: tuple[int, ...], budget: float) -> dict[str, Any]:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = nettrim.accelerate(model, x, budget=budget)
    candidates = {**dense_forms(model, x), "accelerated": lambda: made.model(x)}
    found = {name: passes.median for name, passes in side_by_side(candidates, 2 * budget).items()}
    regions = [part for part in made.model.modules() if isinstance(part, SparseRegion)]
    return {
        "seconds": found,
        "sparse over dense": made.seconds["dense"] / made.seconds.get("every layer sparse", float("inf")),
        "kept": made.kept,
        "difference": made.difference,
        "sparse layers": sum(choice.kind != "dense" for choice in made.choices),
        "layers": len(made.choices),
        "chunk": regions[0].chunk if regions else None,
    }


def jobs(budget: float) -> Iterator[tuple[str, str, float, int, Callable[[], dict[str, Any]]]]:
    """Kind, name, sparsity, batch and what measures it."""
    for name, (make, shape, batches) in NETWORKS.items():
        for sparsity in SPARSITIES:
            for batch in batches:
                last = min(sparsity, 0.8) if name.startswith("MNIST") else None
                yield (
                    "network",
                    name,
                    sparsity,
                    batch,
                    lambda m=make, s=sparsity, b=batch, e=shape, t=last: network_row(masked(m(), s, t), (b, *e), budget),
                )
    for inputs, outputs in LINEAR:
        for sparsity in SPARSITIES[2:]:
            for batch in (1, 32, 256):
                yield (
                    "linear",
                    f"{outputs}x{inputs}",
                    sparsity,
                    batch,
                    lambda i=inputs, o=outputs, s=sparsity, b=batch: layer_row(masked(nn.Linear(i, o), s), (b, i), budget / 2),
                )
    for channels, size, kernel in CONVOLUTIONS:
        for sparsity in SPARSITIES:
            for batch in (1, 16):
                name = f"{channels} channels, {kernel}x{kernel}, {size}x{size}"
                yield (
                    "convolution",
                    name,
                    sparsity,
                    batch,
                    lambda c=channels, h=size, k=kernel, s=sparsity, b=batch: layer_row(
                        masked(nn.Conv2d(c, c, k, padding=k // 2), s), (b, c, h, h), budget / 2
                    ),
                )


def times(row: dict[str, Any]) -> float:
    """How many times faster than the fastest dense form."""
    seconds = row["seconds"]
    dense = min(seconds[name] for name in ("dense", "folded", "channels_last") if name in seconds)
    return float(dense / seconds["accelerated" if row["kind"] == "network" else "sparse"])


def table(rows: list[dict[str, Any]], threads: int) -> Table:
    out = Table(title=f"Times faster than the fastest dense form, {threads} threads")
    out.add_column("layer or network")
    out.add_column("batch", justify="right")
    for sparsity in SPARSITIES:
        out.add_column(f"{sparsity:.0%}", justify="right")
    found = {(row["name"], row["batch"], row["sparsity"]): times(row) for row in rows if row["threads"] == threads}
    for name, batch in dict.fromkeys((row["name"], row["batch"]) for row in rows if row["threads"] == threads):
        cells = [found.get((name, batch, sparsity)) for sparsity in SPARSITIES]
        out.add_row(name, str(batch), *["" if cell is None else f"{cell:.2f}" for cell in cells])
    return out


def picture(rows: list[dict[str, Any]], threads: int, path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.5), sharey=True)
    for axis, kind in zip(axes, ("network", "convolution", "linear"), strict=True):
        lines: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for row in rows:
            if row["kind"] == kind and row["threads"] == threads:
                lines.setdefault((row["name"], row["batch"]), []).append((100 * row["sparsity"], times(row)))
        colours = {name: f"C{number}" for number, name in enumerate(dict.fromkeys(name for name, _ in lines))}
        batches = sorted({batch for _, batch in lines})
        for (name, batch), points in lines.items():
            style = ("-", "--", ":")[batches.index(batch) % 3]
            axis.plot(*zip(*sorted(points), strict=True), style, color=colours[name], marker=".", label=f"{name}, batch {batch}")
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(yscale="log", xlabel="zeros, %", title=f"{kind}s" if kind != "linear" else "Linear layers")
        if lines:
            axis.legend(fontsize=6)
    axes[0].set_ylabel("times faster than dense")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--budget", type=float, default=0.3, help="seconds for each candidate")
    parser.add_argument("--kinds", nargs="+", default=["network", "linear", "convolution"])
    parser.add_argument("--again", action="store_true", help="measure rows that are there already")
    options = parser.parse_args()
    console, path = Console(stderr=True), RESULTS / "acceleration.json"
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = {(row["kind"], row["name"], row["sparsity"], row["batch"], row["threads"]): row for row in known}
    for threads in options.threads:
        torch.set_num_threads(threads)
        for kind, name, sparsity, batch, measure in jobs(options.budget):
            key = (kind, name, sparsity, batch, threads)
            if kind not in options.kinds or (key in rows and not options.again):
                continue
            rows[key] = {"kind": kind, "name": name, "sparsity": sparsity, "batch": batch, "threads": threads, **measure()}
            path.write_text(json.dumps({"torch": torch.__version__, "rows": list(rows.values())}, indent=1) + "\n")
            console.print(f"{name}, {sparsity:.0%}, batch {batch}, {threads} threads: {times(rows[key]):.2f} times")
    measured = list(rows.values())
    for threads in sorted({row["threads"] for row in measured}):
        Console(width=140).print(table(measured, threads))
    picture(measured, max(row["threads"] for row in measured), RESULTS / "acceleration.png")


if __name__ == "__main__":
    main()
