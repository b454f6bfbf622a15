"""Where commands and progress print: names of foreign files may be shown there, and do not steer it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import IO

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

_MARK = "\N{REPLACEMENT CHARACTER}"


class Terminal(Console):
    """A console that passes on only what can be printed; rich's own colours and movements are apart from the text."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of what is shown, each character of a text that cannot be printed marked, or left out where it has no width."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.replace("\n", "").isprintable():
                yield segment
            else:
                yield Segment("".join(map(_printable, segment.text)), segment.style)

    def on_broken_pipe(self) -> None:
        """Whoever reads has seen enough: that ends what is shown, and not the work."""
        self.quiet = True
        discard(self.file)


def discard(file: IO[str]) -> None:
    """What is still to be written there goes nowhere; Python would try once more when it ends."""
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), file.fileno())


def _printable(character: str) -> str:
    if character == "\n" or character.isprintable():
        return character
    return _MARK if cell_len(character) else ""
