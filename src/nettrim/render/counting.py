"""A count of finished pieces of work, shown as it grows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from ..progress import CountBar

Advance = Callable[[int, int, str], None]


@contextmanager
def counted(progress: bool | Advance) -> Iterator[Advance]:
    """What to call with (done, total, what). ``True``: a bar on a terminal, lines elsewhere, on standard error; ``False``: nothing."""
    if not isinstance(progress, bool):
        yield progress
        return
    with CountBar(Console(stderr=True), silent=not progress) as bar:
        yield bar.advance
