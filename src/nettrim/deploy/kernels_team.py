"""Runs a native function on a team of threads: torch's own OpenMP team where its runtime offers one, else a pool of Python threads.

torch's team is used because a second one would fight with it for the cores. Both may be called from several threads at once.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from ..status import InvalidInput

_Team = Callable[[int, int, int, int], None]
_lock = threading.Lock()


def run(function: int, argument: int, threads: int) -> None:
    """Calls the function at an address, ``void(int64)``, on up to ``threads`` threads, each with the same argument; returns when all have.

    The interpreter's lock is not held meanwhile. Raises InvalidInput in a process that was forked after the team had been used.
    """
    if threads <= 1:
        _callable(function)(argument)
        return
    global _used
    team = _openmp()
    if team is not None:
        if _lost:
            raise InvalidInput(
                f"this process was forked after its parent had run an accelerated model on several threads, and {threads} threads are "
                "wanted: PyTorch's threads are not inherited, and would be waited for without end; call torch.set_num_threads(1) in forked "
                "processes, or start them with the method 'spawn'"
            )
        _used = True
        team(function, argument, threads, 0)
        return
    call = _callable(function)
    others: list[Future[None]] = []
    try:
        for _ in range(threads - 1):
            others.append(_pool(threads - 1).submit(call, argument))
        call(argument)
    finally:
        _settle(others)


def _settle(others: list[Future[None]]) -> None:
    """Waits for helpers that run, Ctrl-C or not: one that went on later would meet memory that is in use again."""
    interrupted: KeyboardInterrupt | None = None
    for other in others:
        while not other.cancel() and not other.done():
            try:
                other.exception()
            except KeyboardInterrupt as error:
                interrupted = error
    if interrupted is not None:
        raise interrupted


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
_used = _lost = False  # the team: whether it ran, and whether it ran before this process was forked


def _begin_anew() -> None:
    """In a forked process, which inherits no threads."""
    global _lock, _lost
    _lost, _lock = _used, threading.Lock()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def _pool(threads: int) -> ThreadPoolExecutor:
    with _lock:
        if threads not in _pools:
            _pools[threads] = ThreadPoolExecutor(threads, thread_name_prefix="nettrim")
        return _pools[threads]
