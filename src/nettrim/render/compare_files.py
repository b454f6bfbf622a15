"""The files of a comparison of methods: all numbers as JSON, and the picture."""

from __future__ import annotations

import json
from pathlib import Path

from .. import staging
from ..compare import JOURNAL, Comparison
from ..records import plain
from .compare_picture import compare_picture
from .compare_table import compare_table

__all__ = ["check_folder", "compare_table", "write"]

FILES = ("compare.json", "compare.png", "compare.svg")


def check_folder(folder: Path, inputs: list[Path]) -> Path:
    """Refuses a folder that cannot be written to, or holds files of others under the names that are written, before any work.

    Raises:
        InvalidInput: with the name of the file.
    """
    path = staging.check_writable(folder)
    staging.settle(path)
    staging.check([path / name for name in FILES], "comparison", inputs=inputs)
    staging.check([path / JOURNAL], "journal", inputs=inputs)
    return path


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Writes compare.json, compare.png and compare.svg into ``folder``, all of them or none; returns them."""
    figure = compare_picture(comparison)
    with staging.writing(folder, FILES, "comparison") as hidden:
        numbers, png, svg = (hidden / name for name in FILES)
        data = staging.mark("comparison") | plain(comparison.to_dict())[0]
        numbers.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        figure.savefig(png, dpi=150, metadata={"Software": "nettrim comparison"})
        figure.savefig(svg, metadata={"Creator": "nettrim comparison", "Date": None})
    return [folder / name for name in FILES]
