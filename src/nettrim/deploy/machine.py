"""What times were measured on: the processor, the threads and the versions that matter; nothing that names a person, a host or a place."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..records import build

_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Machine:
    """``cores`` are the logical ones that this process may use, ``threads`` those that torch uses.

    ``capability`` is the instruction set that torch's kernels use, such as AVX512. ``accelerator`` is None where models ran on the CPU.
    """

    cpu: str
    cores: int
    threads: int
    capability: str
    platform: str
    python: str
    torch: str
    numba: str | None
    accelerator: str | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Machine:
        """The inverse of ``to_dict``. Raises InvalidInput."""
        return build(cls, data)

    def __str__(self) -> str:
        ran = self.cpu if self.accelerator is None else f"{self.accelerator}; {self.cpu}"
        numba = "without numba" if self.numba is None else f"numba {self.numba}"
        return (
            f"{ran}, {self.cores} {'core' if self.cores == 1 else 'cores'}, {self.threads} {'thread' if self.threads == 1 else 'threads'}, "
            f"{self.capability}, {self.platform}, torch {self.torch}, {numba}, Python {self.python}"
        )


def this_machine(device: torch.device | str = "cpu") -> Machine:
    """The machine as it is now, for models that run on ``device``."""
    place = torch.device(device)
    return Machine(
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        capability=torch.backends.cpu.get_cpu_capability(),
        platform=f"{platform.system()} {platform.machine()}".strip(),
        python=platform.python_version(),
        torch=torch.__version__,
        numba=_version("numba"),
        accelerator=None if place.type == "cpu" else torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
    )


def _cpu() -> str:
    """The processor's own name; the kind of machine where nothing tells it."""
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no Linux
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip().lower() == "model name")
    return " ".join((next(named, "") or platform.processor() or platform.machine() or "unknown processor").split())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
