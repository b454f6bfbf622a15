"""How long pruning takes on a GPU and on the CPU of the same machine: ``python benchmarks/cuda.py``.

Random networks and data: the time of a prune hangs on sizes far more than on values. Each pair runs in one process, GPU first, each after
a small run that warms its device up. Certificates are part of the time, as in every call.
"""

from __future__ import annotations

import copy
import os
import time

import torch
from torch import Tensor, nn

import nettrim

METHODS = {"sparsity 0.9": nettrim.NetTrim(sparsity=0.9), "epsilon 0.05": nettrim.NetTrim(epsilon=0.05)}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    before = 3
    for width in (32, 64, 128):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        before = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 10)).eval()


def seconds(model: nn.Module, x: Tensor, method: nettrim.NetTrim, device: str) -> tuple[float, nettrim.PruneResult]:
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    model = copy.deepcopy(model).to(device)
    nettrim.prune(model, x[:64], method, layers=names, progress=False)
    started = time.perf_counter()
    result = nettrim.prune(model, x, method, layers=names, max_samples=20_000, progress=False)
    return time.perf_counter() - started, result


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print(f"{torch.cuda.get_device_name()} against {torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    cases = [("mlp 784-1024-1024-10", mlp(), torch.rand(20_000, 784)), ("vgg 3x32x32", vgg(), torch.rand(1024, 3, 32, 32))]
    for name, model, x in cases:
        for label, method in METHODS.items():
            gpu, there = seconds(model, x, method, "cuda")
            cpu, here = seconds(model, x, method, "cpu")
            distances = [result.certificate.network.share(result.certificate.network.achieved) for result in (there, here)]
            print(f"{name}, {label}: GPU {gpu:.2f} s, CPU {cpu:.2f} s, {cpu / gpu:.1f} times; outputs moved {distances}", flush=True)


if __name__ == "__main__":
    main()
