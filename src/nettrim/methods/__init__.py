"""The methods. Each is a small frozen dataclass of settings whose ``solve`` takes a layer's program to a solution."""

from __future__ import annotations

from typing import Protocol

from ..program import LayerProgram
from ..solution import Solution, Watch
from .baselines import Magnitude
from .nettrim import NetTrim
from .targets import PerLayer

__all__ = ["Magnitude", "Method", "NetTrim", "PerLayer"]


class Method(Protocol):
    """What ``prune`` asks of a method."""

    @property
    def kind(self) -> str:
        """``"epsilon"``, ``"sparsity"`` or ``"penalty"``."""

    @property
    def targets(self) -> PerLayer:
        """A number, or a mapping by layer."""

    @property
    def correction(self) -> float:
        """Where the cascade's target stands: 1 at the reference output."""

    @property
    def certified_program(self) -> str:
        """Which l1 program's duality gap the certificate recomputes: ``"epsilon"``, ``"penalty"`` or ``""``."""

    def describe(self) -> str:
        """One line for tables."""

    def target(self, layer: str) -> float | None:
        """The target of that layer; ``None`` leaves it as it is."""

    def solve(self, program: LayerProgram, target: float, watch: Watch | None = None) -> Solution:
        """Solves one layer's program."""
