"""Methods to measure against."""

from __future__ import annotations

from dataclasses import dataclass

from ..program import LayerProgram
from ..prox import largest_mask
from ..solution import Solution, Watch
from ..status import Status
from .targets import PerLayer, check_target, kept_weights, target_for


@dataclass(frozen=True)
class Magnitude:
    """Keeps the weights of largest magnitude in each layer, unchanged; bias unchanged. ``sparsity`` is the fraction of zeros, in [0, 1)."""

    sparsity: PerLayer

    correction = 1.0
    kind = "sparsity"
    certified_program = ""
    program = "none"
    needs_cascade = ""

    def __post_init__(self) -> None:
        check_target("Magnitude", "sparsity", self.sparsity)

    @property
    def targets(self) -> PerLayer:
        """The sparsity: a number, or a mapping by layer."""
        return self.sparsity

    @property
    def layer_settings(self) -> dict[str, PerLayer]:
        """The sparsity, by its name."""
        return {"sparsity": self.sparsity}

    def describe(self) -> str:
        """One line for tables."""
        return "Magnitude"

    def target(self, layer: str) -> float | None:
        """The sparsity of that layer; ``None`` when a mapping does not name it."""
        return target_for(self.sparsity, layer)

    def solve(self, program: LayerProgram, target: float, watch: Watch | None = None) -> Solution:
        """Zeroes all but the largest weights."""
        own = program.weights if program.fold is None else program.fold.raw(program.weights)
        mask = largest_mask(own, kept_weights(own.numel(), target))
        kept, b = program.stored(program.weights * mask, program.bias)
        return Solution(kept, b, Status.CONVERGED, program.distance(kept, b), 0)
