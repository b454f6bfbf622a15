"""What an experiment leaves in its folder: its numbers as JSON and its picture, beside its journal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import staging
from ..records import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def begin(folder: Path, name: str) -> Path:
    """The folder, made where it is missing. An experiment continues and renews its own files.

    Raises:
        InvalidInput: it cannot be written to, or a file that nettrim did not write has one of the names, before any work.
    """
    path = staging.check_writable(folder)
    staging.settle(path)
    staging.check([path / file for file in _files(name)], "experiment")
    staging.check([path / f"{name}.jsonl"], "journal")
    return path


def write(folder: Path, name: str, numbers: Mapping[str, Any], figure: Figure) -> None:
    """Writes NAME.json, NAME.png and NAME.svg, all of them or none. Raises InvalidInput."""
    with staging.writing(folder, _files(name), "experiment") as hidden:
        data, png, svg = (hidden / file for file in _files(name))
        text = json.dumps(staging.mark("experiment") | plain(numbers)[0], indent=1, allow_nan=False)
        data.write_text(text + "\n", encoding="utf-8")
        figure.savefig(png, dpi=150, metadata={"Software": "nettrim experiment"})
        figure.savefig(svg, metadata={"Creator": "nettrim experiment", "Date": None})


def _files(name: str) -> tuple[str, str, str]:
    return f"{name}.json", f"{name}.png", f"{name}.svg"
