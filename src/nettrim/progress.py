"""What long work shows: a bar with the time left on a terminal, a line now and then elsewhere, nothing for short work.

Work tells how far it is by calling ``advance(done, total, what)``; ``done`` may be a fraction where a piece is itself made of pieces
(`within`). Nobody waits for a display: it only notes what it is told, and times that are measured are not taken while it draws (`still`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from .terminal import Terminal

Advance = Callable[[float, float, str], None]
"""Told the pieces that are done, all pieces, and what is being done."""

SHORT = 2.0
"""Seconds up to which work shows nothing."""
PAUSE = 10.0
"""Seconds between two plain lines at least; a tenth of the time that has passed where that is more."""
Clock = Callable[[], float]
NOTHING_KEPT = "nothing of it is kept, and all files are as they were"


def silent(done: float, total: float, what: str) -> None:
    """Shows nothing."""


def within(advance: Advance, done: float, total: float, what: str = "", share: float = 1.0) -> Advance:
    """What a piece of larger work tells: it is ``share`` pieces long and begins when ``done`` of ``total`` are done."""

    def tell(part: float, whole: float, words: str) -> None:
        own = ", ".join(text for text in (what, words) if text)
        advance(done + share * min(1.0, part / whole if whole else 0.0), total, own)

    return tell


def counted(items: Iterable[Any], total: int, advance: Advance, what: str) -> Iterator[Any]:
    """The items, each told of as it begins; ``total`` may be less than there are, where the number is not known before."""
    number = 0
    for number, item in enumerate(items, 1):
        advance(number - 1, max(total, number), what)
        yield item
    advance(number, max(total, number), what)


@contextmanager
def shown(progress: bool | Advance, *, still: bool = False, pieces: str = "parts", kept: str = NOTHING_KEPT) -> Iterator[Advance]:
    """What to call with (done, total, what): the caller's own function, or what draws on standard error, or nothing for ``False``.

    A KeyboardInterrupt inside says how many ``pieces`` were finished, and what of them is ``kept``.
    """
    far = Estimate(time.monotonic)

    def noted(advance: Advance) -> Advance:
        def tell(done: float, total: float, what: str) -> None:
            far.update(done, total)
            advance(done, total, what)

        return tell

    with interruptible(lambda: f"after {_pieces(far.done, far.total)} {pieces}", kept):
        if callable(progress):
            yield noted(progress)
        elif not progress:
            yield noted(silent)
        else:
            with Display(Terminal(stderr=True), still=still) as display:
                yield noted(display.advance)


@contextmanager
def interruptible(far: Callable[[], str], kept: str = NOTHING_KEPT) -> Iterator[None]:
    """A KeyboardInterrupt inside says how far the work was, and what of it is kept; that of the outermost work counts."""
    begun = time.monotonic()
    try:
        yield
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"{far()} ({duration(time.monotonic() - begun)}): {kept}") from stop


class Estimate:
    """When work will be done, from what is done of it since it began."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.begun = clock, clock()
        self.first: float | None = None
        self.done = self.total = 0.0
        self.told = self.begun

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return self.clock() - self.begun

    def update(self, done: float, total: float) -> None:
        """``done`` of ``total`` pieces; what is done at the first call was done before."""
        if self.first is None:
            self.first = done
        if done != self.done or total != self.total:
            self.told = self.clock()
        self.done, self.total = done, total

    @property
    def left(self) -> float | None:
        """Seconds that are left if the rest goes as what was done; None where nothing is done yet, or no whole second of that is left."""
        made = self.done - (self.first or 0.0)
        if made <= 0:
            return None
        found = (self.told - self.begun) * (self.total - self.done) / made - (self.clock() - self.told)
        return found if round(found) > 0 else None


class Display:
    """A bar on a terminal, plain lines elsewhere, also while a long piece tells nothing. ``still``: it draws only when it is told
    something, so that nothing runs beside."""

    def __init__(self, console: Console, *, still: bool = False, clock: Clock = time.monotonic) -> None:
        self.console, self.still, self.clock = console, still, clock
        self.estimate = Estimate(clock)
        self.lines = 0
        self.last = float("-inf")
        self.what = ""
        self.bar: _Bar | None = None
        self.pulse: _Pulse | None = None

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self.bar = _Bar(self.console, self.estimate, self.still)
            if not self.still:
                self.bar.start()
        elif not self.still:
            self.pulse = _Pulse(self.beat)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self.pulse is not None:
            self.pulse.stop()
        if self.bar is not None:
            self.bar.stop()
        elif self.lines and kind is None:
            self._print(f"done in {duration(self.estimate.elapsed)}")

    def advance(self, done: float, total: float, what: str) -> None:
        """``done`` of ``total`` pieces are finished; ``what`` is the present one."""
        estimate = self.estimate
        estimate.update(done, total)
        self.what = what
        if self.bar is not None:
            self.bar.update(self.bar.only, completed=done, total=total, description=what)
            if self.still and estimate.elapsed >= SHORT:
                self.bar.start()
                self.bar.refresh()
        else:
            self.line()

    def line(self) -> None:
        """A plain line of how far it is, where one is due."""
        estimate, done, total = self.estimate, self.estimate.done, self.estimate.total
        if estimate.elapsed >= SHORT and self.clock() - self.last >= max(PAUSE, estimate.elapsed / 10) and done < total:
            self.last = self.clock()
            left = "" if estimate.left is None else f", about {duration(estimate.left)} left"
            self._print(f"{_pieces(done, total)}: {self.what} ({duration(estimate.elapsed)}{left})")

    def beat(self) -> None:
        """What shows beside the work that it lives, where the work itself has long told nothing."""
        if self.estimate.elapsed >= PAUSE:
            self.line()

    def _print(self, text: str) -> None:
        self.lines += 1
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class _Pulse:
    """Calls ``beat`` every second, in a thread beside the work."""

    def __init__(self, beat: Callable[[], None]) -> None:
        self.beat, self.ended = beat, threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while not self.ended.wait(1.0):
            self.beat()

    def stop(self) -> None:
        """It has ended when this returns."""
        self.ended.set()
        self.thread.join()


class _Bar(Progress):
    """Description, bar, pieces, time passed and time left; empty while the work is short."""

    def __init__(self, console: Console, estimate: Estimate, still: bool) -> None:
        self.estimate = estimate
        super().__init__(
            # the description gives way where the terminal is narrow
            TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=16),
            _Words(lambda task: _pieces(task.completed, task.total or 0)),
            _Words(lambda task: duration(estimate.elapsed)),
            _Words(lambda task: "" if estimate.left is None else f"about {duration(estimate.left)} left"),
            console=console,
            transient=True,
            auto_refresh=not still,
            expand=True,
        )
        self.only = self.add_task("", total=1)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Nothing at first: work that is soon done flashes no bar."""
        if self.estimate.elapsed >= SHORT:
            yield from super().get_renderables()


class _Words(ProgressColumn):
    """A column of words."""

    def __init__(self, words: Callable[[Task], str]) -> None:
        self.words = words
        super().__init__(Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        return Text(self.words(task), style="progress.remaining")


def _pieces(done: float, total: float) -> str:
    return f"{int(done):,} of {int(total):,}"


def duration(seconds: float) -> str:
    """A time in whole seconds, minutes or hours: 5 s, 3 min 5 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
