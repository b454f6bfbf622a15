"""The one style of tables: as narrow as the terminal, long names folded, numbers never cut."""

from __future__ import annotations

import copy
import io
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from rich.box import SIMPLE_HEAD, Box
from rich.console import Console, ConsoleOptions, ConsoleRenderable, JustifyMethod, RenderResult
from rich.measure import Measurement
from rich.table import Column as RichColumn
from rich.table import Table
from rich.text import Text

from .numbers import clean

PLAIN_BOX = Box("    \n    \n -- \n    \n    \n -- \n    \n    \n", ascii=True)
WIDTH = 80
"""Columns of plain text."""


@dataclass(frozen=True)
class Column:
    """A column: its cells and what stands below them in the last, bold row. With ``fold`` (a least width) long texts are folded."""

    header: str
    cells: Iterable[str | Text]
    last: str | Text = ""
    fold: int = 0
    justify: JustifyMethod = "right"


class FittingTable(Table):
    """A table whose columns move together where the console is too narrow for it, before anything is folded.

    Where its columns do not fit even so, it is shown in parts below each other, each with the first ``keys`` columns again.
    """

    def __init__(self, title: str | None = None, caption: str | None = None, *, box: Box = SIMPLE_HEAD, keys: int = 1) -> None:
        super().__init__(
            title=title,
            caption=caption,
            box=box,
            title_justify="left",
            caption_justify="left",
            title_style="bold",
            caption_style="dim",
            header_style="bold",
            show_edge=False,
            pad_edge=False,
            collapse_padding=True,
        )
        self.keys = keys

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        parts = self._parts(console, options)
        for number, columns in enumerate(parts):
            shown = copy.copy(self)
            shown.columns = [replace(column, _index=place) for place, column in enumerate(columns)]
            shown.title = self.title if number == 0 else None
            shown.caption = self.caption if number == len(parts) - 1 else None
            shown.padding = (0, 1, 0, 0)
            if Measurement.get(console, options.update(max_width=10_000), shown).maximum > options.max_width:
                shown.padding = (0, 0, 0, 0)
            yield from Table.__rich_console__(shown, console, options)

    def _parts(self, console: Console, options: ConsoleOptions) -> list[list[RichColumn]]:
        """The columns of each part: as many as fit, at least one beside the keys."""
        keys, others = self.columns[: self.keys], self.columns[self.keys :]
        widths = {id(column): self._least(console, options, column) + 1 for column in self.columns}
        room = options.max_width + 1 - sum(widths[id(column)] for column in keys)  # one between columns, none behind the last
        parts: list[list[RichColumn]] = [[]]
        for column in others:
            if parts[-1] and sum(widths[id(other)] for other in (*parts[-1], column)) > room:
                parts.append([])
            parts[-1].append(column)
        return [[*keys, *part] for part in parts]

    @staticmethod
    def _least(console: Console, options: ConsoleOptions, column: RichColumn) -> int:
        """The width without which something would be cut."""
        if column.overflow == "fold":
            return column.min_width or 1
        found = [Measurement.get(console, options.update(max_width=10_000), cell) for cell in (column.header, *column.cells)]
        return max(cell.maximum if column.no_wrap else cell.minimum for cell in found)


def fitting_table(
    columns: Sequence[Column],
    caption: str,
    title: str | None = None,
    box: Box = SIMPLE_HEAD,
    last_row: bool = True,
    *,
    keys: int = 1,
    sections: Iterable[int] = (),
) -> Table:
    """A table; ``sections`` number the rows before which a line is drawn."""
    table = FittingTable(title, caption or None, box=box, keys=keys)
    for column in columns:
        if column.fold:
            table.add_column(column.header, overflow="fold", min_width=column.fold)
        else:
            table.add_column(column.header, justify=column.justify, no_wrap=True)
    lines = set(sections)
    for number, row in enumerate(zip(*(column.cells for column in columns), strict=True)):
        if number in lines:
            table.add_section()
        table.add_row(*map(_text, row))
    if last_row:
        table.add_section()
        table.add_row(*(_text(column.last) for column in columns), style="bold")
    return table


def _text(cell: str | Text) -> Text:
    return Text(clean(cell)) if isinstance(cell, str) else cell


def plain_text(*shown: ConsoleRenderable | str, width: int = WIDTH) -> str:
    """Tables, and paragraphs folded, as text without control codes."""
    console = Console(
        file=io.StringIO(), width=width, color_system=None, force_terminal=False, force_jupyter=False, no_color=True, legacy_windows=False
    )
    lines: list[str] = []
    for part in shown:
        if isinstance(part, str):
            lines += folded(part, width)
        else:
            with console.capture() as capture:
                console.print(part)
            lines += [line.rstrip() for line in capture.get().splitlines()]
    return "\n".join(lines)


def folded(text: str, width: int = WIDTH) -> list[str]:
    """One paragraph in lines, those behind the first indented by two more than the first; words (paths, names) are never broken."""
    text = text.rstrip()
    indent = " " * (len(text) - len(text.lstrip()))
    wrapped = textwrap.wrap(
        clean(text), width, initial_indent=indent, subsequent_indent=indent + "  ", break_long_words=False, break_on_hyphens=False
    )
    return wrapped or [""]
