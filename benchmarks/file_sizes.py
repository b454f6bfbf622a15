"""How large pruned networks are on disk: dense, zipped, each coding of docs/files.md, and what `save(compressed=True)` writes.

    python benchmarks/file_sizes.py --data DIR --mnist DIR

784-300-100-10 on MNIST at 95/95/80 % zeros by Net-Trim, and the zoo's networks at 90 and 95 % by magnitude. Sizes are those of whole
safetensors files, headers and all that is not pruned included. LeNet-5 is on MNIST (``--mnist``), the rest of the zoo on
Fashion-MNIST (``--data``). "+0 only" is the same file after -0.0, which a product with a mask leaves, has become 0.0. Results go to
benchmarks/results/file_sizes.json.
"""

from __future__ import annotations

import argparse
import io
import json
import time
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import nettrim
from nettrim import checkpoint, packing
from nettrim.experiments import datasets, training, zoo_training

RESULTS = Path(__file__).parent / "results"
ZOO = ("lenet5", "resnet20_b", "vgg_like", "depthwise_separable", "transformer_encoder")
EVEN = {"1": 0.95, "3": 0.95, "5": 0.80}
IMAGES, ROWS = 200, 2_000  # magnitudes need no data; the certificates that come with them do


def deflated(data: bytes) -> int:
    """Bytes of a zip archive that holds ``data`` as one file, at the highest level."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as made:
        made.writestr("model.safetensors", data)
    return len(archive.getvalue())


def file_bytes(state: dict[str, Tensor], codings: tuple[str, ...] = packing.CODINGS) -> int:
    """Bytes of a file in which tensors are packed by these codings where that saves any."""
    stored, header = packing.pack(state, codings)
    return len(safetensors.torch.save(stored, {checkpoint.PACKING: header}))


def raw_bytes(state: dict[str, Tensor], coding: str) -> int:
    """Bytes of positions and values without zlib, headers not counted; dense where that is smaller."""
    total = 0
    for value in state.values():
        made = packing.packed(value, [coding])
        dense = value.numel() * value.dtype.itemsize
        total += dense if made is None else min(dense, sum(made[0].decoded))
    return total


def measured(label: str, model: nn.Module, folder: Path) -> dict[str, Any]:
    state = checkpoint.state_tensors(model)
    plain = safetensors.torch.save(state, {"format": "pt"})
    weights = [value for value in state.values() if value.is_floating_point() and value.ndim > 1]
    started = time.perf_counter()
    file = nettrim.save_weights(model, folder / "file_sizes.safetensors", compressed=True)
    saving, started = time.perf_counter() - started, time.perf_counter()
    back = checkpoint.read_weights(file)
    reading = time.perf_counter() - started
    size = checkpoint.weights_size(file)
    file.unlink()
    exact = all(torch.equal(back[key].reshape(-1).view(torch.uint8), state[key].reshape(-1).view(torch.uint8)) for key in state)
    _, entries = packing.read_header(packing.pack(state)[1])
    return {
        "network": label,
        "zeros": sum(int((value == 0).sum()) for value in weights) / sum(value.numel() for value in weights),
        "zeros_in_file": sum(int((value == 0).sum()) for value in state.values()) / sum(value.numel() for value in state.values()),
        "negative_zeros": sum(int((value.signbit() & (value == 0)).sum()) for value in weights),
        "dense": len(plain),
        "zipped": deflated(plain),
        "raw": {coding: raw_bytes(state, coding) for coding in ("bitmask", "gaps")},
        "coded": {coding: file_bytes(state, (coding,)) for coding in packing.CODINGS},
        "ours": size.stored_bytes,
        "positive_zeros": file_bytes({key: value + 0.0 if value.is_floating_point() else value for key, value in state.items()}),
        "tensors": size.tensors,
        "chosen": {coding: sum(entry.coding == coding for entry in entries.values()) for coding in packing.CODINGS},
        "exact": exact,
        "saving_seconds": saving,
        "reading_seconds": reading,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="folder with the Fashion-MNIST files")
    parser.add_argument("--mnist", type=Path, default=None, help="folder with the MNIST files")
    options = parser.parse_args()
    mnist, fashion = datasets.load("mnist", options.mnist), datasets.load("fashion-mnist", options.data)
    network = training.trained_network(mnist, cache=RESULTS / "cache")
    batches = list(torch.split(mnist.train_images[:4096], 256))
    made = nettrim.prune(network, batches, nettrim.NetTrim(sparsity=EVEN), progress=False)
    rows = [measured("784-300-100-10, 95/95/80 %, Net-Trim", made.model, RESULTS)]
    for name in ZOO:
        dataset = mnist if name == "lenet5" else fashion
        model = zoo_training.trained(name, dataset, seed=0, cache=RESULTS / "cache")
        for sparsity in (0.9, 0.95):
            method = nettrim.Magnitude(sparsity=sparsity)
            pruned = nettrim.prune(model, dataset.train_images[:IMAGES], method, max_samples=ROWS, progress=False).model
            rows.append(measured(f"{name}, {100 * sparsity:.0f} %, magnitude", pruned, RESULTS))
            Console(stderr=True).print(f"{rows[-1]['network']}: {rows[-1]['ours'] / rows[-1]['dense']:.1%}")
    (RESULTS / "file_sizes.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    Console(width=190).print(table(rows))


def table(rows: list[dict[str, Any]]) -> Table:
    out = Table(title="Bytes on disk, as shares of the dense safetensors file")
    names = (
        "network",
        "zeros",
        "dense",
        "zipped",
        "bitmask",
        "gaps",
        "bitmask, coded",
        "gaps, coded",
        "dense, coded",
        "ours",
        "of zipped",
        "+0 only",
        "ms",
    )
    for name in names:
        out.add_column(name, justify="left" if name == "network" else "right")
    for row in rows:
        sizes = (
            row["zipped"],
            row["raw"]["bitmask"],
            row["raw"]["gaps"],
            *(row["coded"][c] for c in ("bitmask", "gaps", "dense")),
            row["ours"],
        )
        out.add_row(
            row["network"],
            f"{row['zeros']:.1%}",
            f"{row['dense']:,}",
            *(f"{size / row['dense']:.2%}" for size in sizes),
            f"{row['ours'] / row['zipped']:.0%}",
            f"{row['positive_zeros'] / row['dense']:.2%}",
            f"{1000 * row['saving_seconds']:.0f} / {1000 * row['reading_seconds']:.0f}",
        )
    return out


if __name__ == "__main__":
    main()
