"""The methods. Each is a small frozen dataclass of settings whose ``solve`` takes a layer's program to a solution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ..patterns import Pattern
from ..program import LayerProgram
from ..solution import Solution, Watch
from .baselines import Magnitude, Random, Wanda
from .linear_admm import LinearADMM
from .lobs import LOBS
from .nettrim import NetTrim
from .obs import OBS, SparseGPT
from .targets import PerLayer

__all__ = ["LOBS", "OBS", "LinearADMM", "Magnitude", "Method", "NetTrim", "PerLayer", "Random", "SparseGPT", "Wanda"]


class Method(Protocol):
    """What ``prune`` asks of a method."""

    @property
    def kind(self) -> str:
        """``"epsilon"``, ``"sparsity"`` or ``"penalty"``."""

    @property
    def targets(self) -> PerLayer:
        """A number, or a mapping by layer."""

    @property
    def sparsity(self) -> PerLayer | None:
        """The sparsity that was given; ``None`` where another target was, or a pattern that implies one."""

    @property
    def layer_settings(self) -> Mapping[str, PerLayer]:
        """Every setting that may differ by layer, the target among them, by name."""

    @property
    def correction(self) -> float:
        """Where the cascade's target stands: 1 at the reference output."""

    @property
    def program(self) -> str:
        """Which program of a layer is solved: ``"preimage"``, ``"halfspace"``, or ``"none"``."""

    @property
    def needs_cascade(self) -> str:
        """The name of a setting that only the cascade can honour, if one was given; otherwise empty."""

    @property
    def certified_program(self) -> str:
        """Which l1 program's duality gap the certificate recomputes: ``"epsilon"``, ``"penalty"`` or ``""``."""

    @property
    def chosen(self) -> Pattern:
        """Which sets of weights may stay."""

    @property
    def weighs_outputs(self) -> bool:
        """Whether ``solve`` uses the importance of outputs, where a program knows it."""

    def describe(self) -> str:
        """One line for tables."""

    def target(self, layer: str) -> float | None:
        """The target of that layer; ``None`` leaves it as it is."""

    def solve(self, program: LayerProgram, target: float, watch: Watch | None = None) -> Solution:
        """Solves one layer's program."""
