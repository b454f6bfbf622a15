"""The table and the picture of ``mnist_lenet_fc``."""

from __future__ import annotations

from .curves_figures import picture, table

__all__ = ["picture", "table"]
