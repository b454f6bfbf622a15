"""What a running prune shows: a live display on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from .report import LayerReport


class Observer(Protocol):
    """Receives what happens while layers are solved; used as a context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def begin(self, name: str, index: int, count: int) -> None:
        """Layer ``name`` is the ``index``-th of ``count``."""

    def update(self, name: str, iteration: int, distance: float, density: float) -> None:
        """Its present distance (relative to the reference norm) and density."""

    def end(self, report: LayerReport) -> None:
        """It is done."""

    def message(self, text: str) -> None:
        """Something else is being done."""


class Silent:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def begin(self, name: str, index: int, count: int) -> None:
        return None

    def update(self, name: str, iteration: int, distance: float, density: float) -> None:
        return None

    def end(self, report: LayerReport) -> None:
        return None

    def message(self, text: str) -> None:
        return None


class PlainLines(Silent):
    """One line a layer, for logs."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def end(self, report: LayerReport) -> None:
        self.console.print(done_line(report), highlight=False, markup=False, soft_wrap=True)

    def message(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class LiveBar(Silent):
    """A bar over the layers with the present distance and density of the one being solved."""

    def __init__(self, console: Console) -> None:
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self.task: TaskID | None = None

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def begin(self, name: str, index: int, count: int) -> None:
        if self.task is None:
            self.task = self.bar.add_task("", total=count, detail="")
        self.bar.update(self.task, description=f"pruning {name}", completed=index, detail="reading inputs")

    def update(self, name: str, iteration: int, distance: float, density: float) -> None:
        assert self.task is not None
        self.bar.update(self.task, detail=f"step {iteration}, distance {distance:.2%}, density {density:.1%}")

    def end(self, report: LayerReport) -> None:
        assert self.task is not None
        self.bar.advance(self.task)
        self.bar.console.print(done_line(report), highlight=False, markup=False)

    def message(self, text: str) -> None:
        if self.task is None:
            self.bar.console.print(text, highlight=False, markup=False)
        else:
            self.bar.update(self.task, description=text, detail="")


class CountBar:
    """A bar over counted pieces of work on a terminal; a line now and then elsewhere; nothing when ``silent``."""

    def __init__(self, console: Console, *, silent: bool = False) -> None:
        self.console, self.silent = console, silent
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, console=console, transient=True, disable=silent or not console.is_terminal)
        self.task: TaskID | None = None
        self.last = 0

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def advance(self, done: int, total: int, what: str) -> None:
        """``done`` of ``total`` pieces are finished; ``what`` is the present one."""
        if self.task is None:
            self.task = self.bar.add_task("", total=total)
        self.bar.update(self.task, completed=done, total=total, description=what)
        if not self.silent and not self.console.is_terminal and (done == total or done >= self.last + max(1, total // 10)):
            self.last = done
            self.console.print(f"{done} of {total}: {what}", highlight=False, markup=False, soft_wrap=True)


def done_line(report: LayerReport) -> str:
    """A layer's result in one line."""
    allowed = "" if report.relative_tolerance is None else f" (allowed {report.relative_tolerance:.2%})"
    return (
        f"{report.name}: {report.density:.1%} of {report.weights} weights kept, distance {report.relative_distance:.2%}{allowed}, "
        f"{report.status.value}, {report.seconds:.1f} s"
    )


def observer(progress: bool | Observer) -> Observer:
    """``True``: a live bar on a terminal and plain lines elsewhere, both on standard error; ``False``: nothing."""
    if not isinstance(progress, bool):
        return progress
    if not progress:
        return Silent()
    console = Console(stderr=True)
    return LiveBar(console) if console.is_terminal else PlainLines(console)
