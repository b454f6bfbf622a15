"""Silence, for a time, for what libraries log, print or warn beside what is told here in other words."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """The logger of that name tells only errors, then what it told before; also after an exception."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def unheard() -> Iterator[None]:
    """Nothing that is printed, written to standard error or warned of is shown: for a pass over stand-ins of tensors, whose words mean
    nothing to a user. What a model prints itself is still shown in its passes over data."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextmanager
def gradients() -> Iterator[None]:
    """For backward passes: on a GPU the thread in which PyTorch runs the first one warns that it had no CUDA context yet, and makes it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attempting to run cuBLAS, but there was no current CUDA context")
        yield
