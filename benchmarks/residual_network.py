"""A residual network of 20 layers on Fashion-MNIST, its inner convolutions pruned in one shot: what each part of the program is worth.

    python benchmarks/residual_network.py --data DIR

Cascade where nothing else is said, uniform sparsity, no retraining. Each run has a child process of its own: its peak memory is beyond
what that process held before. The ablations replace parts of nettrim for the time of one run, in that process. Methods that nettrim
has not got are left out, and said so. Results go to benchmarks/results/residual_network.json after every run; ``--only`` repeats
some of them and keeps the others.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import nettrim
from nettrim import methods
from nettrim.experiments import datasets, zoo_training
from nettrim.experiments.datasets import Dataset
from nettrim.units import Call, Unit

RESULTS = Path(__file__).parent / "results"
NETWORK = "resnet20_b"
SPARSITIES = (0.7, 0.9, 0.95)
IMAGES, MORE_IMAGES, PATCHES = 500, 1000, 10_000
BATCH = 100  # divides the numbers of images: re-estimated statistics are means over batches, which must weigh the same
FULL, LINEAR, ALPS = "Net-Trim", "both off", "LinearADMM"  # the times of the first are compared with those of the others
OTHERS = ("Wanda", "OBS", "SparseGPT", "LinearADMM")


@contextmanager
def reference_branch() -> Iterator[None]:
    """The residual shift off: the box of a layer is made with the branch that the *reference* network adds, not the pruned one's.

    `capture.layer_task` asks a unit for the target of the reference's call and then for the shift of the pruned network's: the
    first is remembered and answers the second. The certificate asks for `Unit.branch` and stays as it is.
    """
    target, shift = Unit.target, Unit.shift
    last: list[Call] = []

    def remembering(self: Unit, reference: Call, own: Call | None = None, correction: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        last[:] = [reference]
        return target(self, reference, own, correction)

    def of_reference(self: Unit, call: Call) -> Tensor | None:
        return shift(self, last[0])

    Unit.target, Unit.shift = remembering, of_reference  # type: ignore[method-assign]
    try:
        yield
    finally:
        Unit.target, Unit.shift = target, shift  # type: ignore[method-assign]


LINEAR_MATCHING = {"re:.*": {"activation": "identity"}}  # activation awareness off: every box is a point
RAW = {"re:.*": {"norm": None, "branch": None, "activation": None}}  # the layer's own output, as the published methods see it


PROGRAMS: dict[str, Callable[[], AbstractContextManager[None]]] = {"full": nullcontext, "shift off": reference_branch}


@dataclass(frozen=True)
class Run:
    """One pruning run: what `nettrim.prune` is called with, and which program (see `PROGRAMS`) it solves."""

    label: str
    method: Any
    program: str = "full"
    images: int = IMAGES
    patches: int = PATCHES
    options: dict[str, Any] = field(default_factory=dict)


def runs(sparsity: float) -> list[Run]:
    """The runs at one sparsity; the two whose times are compared come one after the other."""
    ours = nettrim.NetTrim(sparsity=sparsity)
    found = [
        Run(FULL, ours),
        Run(LINEAR, ours, "shift off", options={"readings": LINEAR_MATCHING}),
        Run("shift off", ours, "shift off"),
        Run("activation off", ours, options={"readings": LINEAR_MATCHING}),
        Run("raw outputs", ours, options={"readings": RAW}),
        Run("parallel", ours, options={"scheme": "parallel"}),
        Run("Magnitude", nettrim.Magnitude(sparsity=sparsity)),
    ]
    found += [Run(name, getattr(methods, name)(sparsity=sparsity)) for name in OTHERS if hasattr(methods, name)]
    return [
        *found,
        Run(f"{FULL}, quick", nettrim.NetTrim(sparsity=sparsity, effort="quick")),
        Run(f"{FULL}, {MORE_IMAGES:,} images", ours, images=MORE_IMAGES),
        Run(f"{FULL}, one sweep", ours, options={"sweeps": 1}),
        Run(f"{FULL}, global", ours, options={"allocation": "global"}),
    ]


@dataclass(frozen=True)
class Measured:
    """What came of one run in a process of its own: the model as bytes, facts for JSON."""

    model: bytes
    facts: dict[str, Any]


def inner_convolutions(network: nn.Module) -> list[str]:
    """All convolutions but the first, which has nine weights a channel and sees the image."""
    return [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)][1:]


def measure(network: bytes, images: NDArray[np.float32], run: Run) -> Measured:
    """Prunes in this process. Seconds and CPU seconds are those of `nettrim.prune`, certificate included."""
    model = pickle.loads(network)
    batches = list(torch.split(torch.from_numpy(images), BATCH))
    with PROGRAMS[run.program]():
        before, started, cpu = peak_memory(), time.perf_counter(), time.process_time()
        options = {"layers": inner_convolutions(model)} | run.options
        result = nettrim.prune(model, batches, run.method, max_samples=run.patches, progress=False, **options)
        seconds, cpu_seconds, after = time.perf_counter() - started, time.process_time() - cpu, peak_memory()
    network_wide = result.certificate.network
    facts = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "layer_seconds": sum(layer.seconds for layer in result.report.layers),
        "extra_mebibytes": None if after is None or before is None else after - before,
        "density": result.report.density,
        "discrepancy_certified": network_wide.achieved / network_wide.reference_norm,
        "holds": result.certificate.holds,
        "proven": None if network_wide.bound is None else network_wide.bound / network_wide.reference_norm,
        "layers": {layer.name: [layer.density, layer.relative_distance, layer.rows] for layer in result.report.layers},
    }
    return Measured(pickle.dumps(result.model), facts)


def in_child(network: nn.Module, images: Tensor, run: Run) -> Measured:
    """`measure` in a new process. It gets the calibration images alone, so that loading the data set is in no peak."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (pickle.dumps(network), images[: run.images].numpy().copy(), run))


def peak_memory() -> float | None:
    """Peak resident memory of this process, MiB; ``None`` where the system does not say.

    Not ``ru_maxrss``: on Linux a child's starts at what its parent held when it was made.
    """
    status = Path("/proc/self/status")
    found = [line.split()[1] for line in (status.read_text().splitlines() if status.exists() else []) if line.startswith("VmHWM:")]
    return int(found[0]) / 1024 if found else None


def reestimated(model: nn.Module, images: Tensor) -> nn.Module:
    """A copy whose batch-norms hold the statistics that ``images`` give it: means over batches, weights fixed."""
    twin = copy.deepcopy(model).eval()
    norms = [module for module in twin.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all batches
        norm.train()
    with torch.no_grad():
        for batch in torch.split(images, BATCH):
            twin(batch)
    return twin.eval()


class Judge:
    """Holds the trained network's logits on the test images and on the first training images."""

    def __init__(self, network: nn.Module, dataset: Dataset) -> None:
        self.dataset = dataset
        self.unseen = logits(network, dataset.test_images)
        self.seen = logits(network, dataset.train_images[: max(IMAGES, MORE_IMAGES)])
        self.accuracy = self.correct(self.unseen)

    def correct(self, unseen: Tensor) -> float:
        return float((unseen.argmax(1) == self.dataset.test_labels).double().mean())

    def __call__(self, model: nn.Module, images: int) -> dict[str, float]:
        """Accuracy on the test images, and how far the logits moved, relative to their norm: on the first training images and on the
        test images."""
        unseen = logits(model, self.dataset.test_images)
        seen = logits(model, self.dataset.train_images[:images])
        return {
            "accuracy": self.correct(unseen),
            "discrepancy": relative(seen, self.seen[:images]),
            "discrepancy_unseen": relative(unseen, self.unseen),
        }


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(batch).double() for batch in torch.split(images, 500)])


def relative(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.matrix_norm(found - expected) / torch.linalg.matrix_norm(expected))


def row(sparsity: float, run: Run, measured: Measured, judge: Judge) -> dict[str, Any]:
    """The JSON row of one run, with and without re-estimated batch-norm."""
    model = pickle.loads(measured.model)
    return {
        "label": run.label,
        "sparsity": sparsity,
        "images": run.images,
        "patches": run.patches,
        **judge(model, run.images),
        **measured.facts,
        "reestimated": judge(reestimated(model, judge.dataset.train_images[: run.images]), run.images),
    }


def repeated(network: nn.Module, images: Tensor, run: Run, times: int) -> Measured:
    """The run, ``times`` times: the shortest times of all, the largest memory. A result that is not the same each time is an error."""
    found = [in_child(network, images, run) for _ in range(times)]
    first = pickle.loads(found[0].model).state_dict()
    for other in found[1:]:
        if any(not torch.equal(value, first[key]) for key, value in pickle.loads(other.model).state_dict().items()):
            raise RuntimeError(f"{run.label}: two runs with the same seed gave different weights")
    shortest = {key: min(one.facts[key] for one in found) for key in ("seconds", "cpu_seconds", "layer_seconds")}
    peaks = [one.facts["extra_mebibytes"] for one in found]
    return Measured(found[0].model, found[0].facts | shortest | {"extra_mebibytes": None if None in peaks else max(peaks)})


def load(data: Path | None) -> tuple[Dataset, nn.Module]:
    dataset = datasets.load("fashion-mnist", data)
    return dataset, zoo_training.trained(NETWORK, dataset, seed=0, cache=RESULTS / "cache")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="folder with the Fashion-MNIST files")
    parser.add_argument("--sparsity", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument("--only", nargs="+", default=None, metavar="RUN", help="names of the runs to make; the others' results are kept")
    parser.add_argument("--repeats", type=int, default=2, help="of the runs whose times are compared")
    options = parser.parse_args()
    console = Console(stderr=True)
    for name in OTHERS:
        if not hasattr(methods, name):
            console.print(f"{name}: nettrim has no such method; left out")
    dataset, network = load(options.data)
    path = RESULTS / "residual_network.json"
    kept = json.loads(path.read_text())["rows"] if options.only and path.exists() else []
    rows = {(old["sparsity"], old["label"]): old for old in kept}
    judge = Judge(network, dataset)
    dense = {"accuracy": judge.accuracy, "reestimated": judge(reestimated(network, dataset.train_images[:IMAGES]), IMAGES)}
    for sparsity in options.sparsity:
        for run in runs(sparsity):
            if options.only and run.label not in options.only:
                continue
            measured = repeated(network, dataset.train_images, run, options.repeats if run.label in (FULL, LINEAR, ALPS) else 1)
            rows[sparsity, run.label] = found = row(sparsity, run, measured, judge)
            order = sorted(rows.values(), key=lambda made: made["sparsity"])
            facts = {"network": NETWORK, "threads": torch.get_num_threads(), "cores": os.cpu_count(), "dense": dense, "rows": order}
            path.write_text(json.dumps(facts, indent=1) + "\n")
            console.print(f"{sparsity:.0%} {run.label}: {found['accuracy']:.2%}, {found['seconds']:.1f} s")
    facts = json.loads(path.read_text())
    Console(width=170).print(table(facts))
    for other in (ALPS, LINEAR):
        for sparsity, ratio in ratios(facts["rows"], other).items():
            print(f"time of {FULL} / {other} at {sparsity:.0%}: {ratio['seconds']:.2f} (CPU {ratio['cpu_seconds']:.2f})")


def ratios(rows: list[dict[str, Any]], other: str = LINEAR) -> dict[float, dict[str, float]]:
    """By sparsity: times of the full program over those of another run."""
    times = {(one["sparsity"], one["label"]): one for one in rows}
    return {
        sparsity: {key: times[sparsity, FULL][key] / times[sparsity, other][key] for key in ("seconds", "cpu_seconds", "layer_seconds")}
        for sparsity in dict.fromkeys(one["sparsity"] for one in rows)
        if {(sparsity, FULL), (sparsity, other)} <= times.keys()
    }


def table(facts: dict[str, Any]) -> Table:
    dense = facts["dense"]["accuracy"]
    out = Table(title=f"{facts['network']} on Fashion-MNIST ({dense:.2%}), inner convolutions, no retraining")
    columns = ("sparsity", "run", "accuracy", "loss", "re-estimated", "loss", "discrepancy", "unseen", "seconds", "CPU s", "MiB", "holds")
    for name in columns:
        out.add_column(name, justify="left" if name == "run" else "right")
    for one in facts["rows"]:
        again = one["reestimated"]
        out.add_row(
            f"{one['sparsity']:.0%}",
            one["label"],
            f"{one['accuracy']:.2%}",
            f"{100 * (dense - one['accuracy']):.2f}",
            f"{again['accuracy']:.2%}",
            f"{100 * (dense - again['accuracy']):.2f}",
            f"{one['discrepancy']:.1%}",
            f"{one['discrepancy_unseen']:.1%}",
            f"{one['seconds']:.1f}",
            f"{one['cpu_seconds']:.1f}",
            "-" if one["extra_mebibytes"] is None else f"{one['extra_mebibytes']:.0f}",
            "yes" if one["holds"] else "no",
        )
    return out


if __name__ == "__main__":
    main()
