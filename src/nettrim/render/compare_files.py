"""The files of a comparison of methods: all numbers as JSON, and the picture."""

from __future__ import annotations

import json
from pathlib import Path

from ..checkpoint import check_writable
from ..compare import Comparison
from .compare_picture import compare_picture
from .compare_table import compare_table

__all__ = ["compare_table", "write"]


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Writes compare.json, compare.png and compare.svg into ``folder``; returns them."""
    path = check_writable(folder)
    numbers, *pictures = (path / f"compare.{ending}" for ending in ("json", "png", "svg"))
    numbers.write_text(json.dumps(comparison.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    figure = compare_picture(comparison)
    figure.savefig(pictures[0], dpi=150, metadata={"Software": None})
    figure.savefig(pictures[1], metadata={"Date": None})
    return [numbers, *pictures]
