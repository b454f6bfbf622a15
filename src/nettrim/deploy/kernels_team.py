"""Runs a native function on a team of threads: torch's own OpenMP team where its runtime offers one, else a pool of Python threads.

torch's team is used because a second one would fight with it for the cores. Both may be called from several threads at once.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

_Team = Callable[[int, int, int, int], None]
_lock = threading.Lock()


def run(function: int, argument: int, threads: int) -> None:
    """Calls the function at an address, ``void(int64)``, on up to ``threads`` threads, each with the same argument; returns when all have.

    The interpreter's lock is not held meanwhile.
    """
    if threads <= 1:
        _callable(function)(argument)
        return
    team = _openmp()
    if team is not None:
        team(function, argument, threads, 0)
        return
    call = _callable(function)
    others: list[Future[None]] = [_pool(threads - 1).submit(call, argument) for _ in range(threads - 1)]
    call(argument)
    for other in others:
        other.result()


@cache
def _callable(function: int) -> Callable[[int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_int64)(function)


@cache
def _openmp() -> _Team | None:
    """``GOMP_parallel`` of the OpenMP runtime that torch itself has loaded, where it is shipped with torch."""
    root = Path(torch.__file__).parent
    for folder in (root / "lib", root.parent / "torch.libs"):
        for name in ("libgomp*.so*", "libiomp5.so*", "libomp.so*"):
            for path in sorted(folder.glob(name)):
                found = getattr(ctypes.CDLL(str(path)), "GOMP_parallel", None)
                if found is not None:
                    found.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
                    found.restype = None
                    return found  # type: ignore[no-any-return]
    return None


_pools: dict[int, ThreadPoolExecutor] = {}


def _pool(threads: int) -> ThreadPoolExecutor:
    with _lock:
        if threads not in _pools:
            _pools[threads] = ThreadPoolExecutor(threads, thread_name_prefix="nettrim")
        return _pools[threads]
