"""What one-shot methods share: settings with one sparsity, and a layer as they see it, a linear map with the Gram matrix of its inputs.

They match the layer's own linear response ``A W0 + 1 b^T`` on the inputs at hand, with the bias as it is, and know of nothing behind
the layer: neither its activation nor the reference network's output. Batch-norm that a program has folded in is taken out again, because
the published methods see the layer's own weights.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, fields
from typing import ClassVar

import torch
from torch import Tensor

from ..patterns import Pattern, parse
from ..program import LayerProgram
from ..solution import Solution, Watch
from ..status import InvalidInput, Status
from .settings import settings
from .targets import PerLayer, check_target, target_for, weights_kept

DEAD = 1e-10  # inputs of norm below this share of the largest are rounding (the rows of compressed programs carry some)


@settings
class OneShot:
    """A method whose target is ``sparsity``: the fraction of zeros, in [0, 1), as a number or a mapping from layer name.

    ``pattern`` says which sets of weights may stay (:mod:`nettrim.patterns`): ``"N:M"``, ``"rows"``, ``"columns"``, ``"RxC"``. N:M implies
    a sparsity of 1 - N/M; with both, both hold.
    """

    sparsity: PerLayer | None = None
    pattern: str | None = None

    takes: ClassVar[tuple[str, ...]] = ("N:M", "rows", "columns", "RxC")  # kinds of patterns
    correction = 1.0
    kind = "sparsity"
    certified_program = ""
    program = "none"
    needs_cascade = ""
    weighs_outputs = False

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.chosen.kind and self.chosen.kind not in self.takes:
            raise InvalidInput(
                f"{name} takes pattern {' or '.join(self.takes)}, or none; found {self.pattern!r}, which NetTrim, LinearADMM, Magnitude, "
                "Wanda and Random take"
            )
        if self.sparsity is not None:
            check_target(name, "sparsity", self.sparsity)
        elif self.chosen.sparsity is None:
            found = "neither" if self.pattern is None else f"pattern {self.pattern!r} alone"
            raise InvalidInput(f"{name} needs a sparsity, or a pattern 'N:M', which implies one; found {found}")

    @property
    def chosen(self) -> Pattern:
        """The pattern."""
        return parse(self.pattern, type(self).__name__)

    def kept(self, program: LayerProgram, target: float) -> int:
        """How many weights of the layer may stay."""
        own = None if self.sparsity is None else target
        return weights_kept(type(self).__name__, self.chosen, own, program.name, *program.weights.shape)

    @property
    def targets(self) -> PerLayer:
        """The sparsity, or the one that the pattern implies: a number, or a mapping by layer."""
        implied = self.chosen.sparsity
        if self.sparsity is not None:
            return self.sparsity
        assert implied is not None
        return implied

    @property
    def layer_settings(self) -> dict[str, PerLayer]:
        """The sparsity, by its name."""
        return {"sparsity": self.targets}

    def describe(self) -> str:
        """One line for tables: the method, and the settings that are not its defaults."""
        changed = [
            f"{item.name} {getattr(self, item.name):g}"
            for item in fields(self)
            if item.name not in ("sparsity", "pattern") and item.default is not MISSING and getattr(self, item.name) != item.default
        ]
        pattern = [] if self.pattern is None else [f"pattern {self.pattern}"]
        return ", ".join([type(self).__name__, *pattern, *changed])

    def target(self, layer: str) -> float | None:
        """The sparsity of that layer; ``None`` when a mapping does not name it."""
        return target_for(self.targets, layer)

    def solve(self, program: LayerProgram, target: float, watch: Watch | None = None) -> Solution:
        """Solves one layer's program."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it solves a layer")


def check_positive(method: str, name: str, value: object) -> None:
    """Refuses what is not a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise InvalidInput(f"{method}: {name} must be a finite number above 0, found {value!r}; leave it out for the published value")


def check_whole(method: str, name: str, value: object, least: int) -> None:
    """Refuses what is not a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidInput(f"{method}: {name} must be a whole number of at least {least}, found {value!r}; leave it out for the default")


def own_weights(program: LayerProgram) -> Tensor:
    """The layer's own weights (N, M), float64, without batch-norm."""
    return program.weights if program.fold is None else program.fold.raw(program.weights)


def live_inputs(program: LayerProgram) -> Tensor:
    """(N,), bool: inputs that are not zero throughout. No weight of the others has any effect."""
    norm: Tensor = torch.linalg.vector_norm(program.inputs, dim=0)
    return norm > DEAD * norm.max() if len(norm) else norm > 0


def gram(program: LayerProgram) -> Tensor:
    """``A^T A`` (N, N), float64: the Hessian of half the squared change of each output's response, for every output the same."""
    H: Tensor = program.inputs.T @ program.inputs
    return H


def response_change(H: Tensor, change: Tensor) -> float:
    """``||A D||_F``, by which the response moves when the weights move by ``D`` (N, M), from ``H = A^T A``."""
    return math.sqrt(max(0.0, float((change * (H @ change)).sum())))


def masked(program: LayerProgram, mask: Tensor) -> Solution:
    """The solution that keeps the weights on ``mask`` (N, M), and the bias, as they were."""
    W, b = program.stored(program.weights * mask, program.bias)
    return Solution(W, b, Status.CONVERGED, program.distance(W, b), 0)


def finished(program: LayerProgram, W: Tensor, iterations: int = 0, status: Status = Status.CONVERGED) -> Solution:
    """The solution with the layer's own weights ``W`` (N, M), as they will be stored, and the bias as it was."""
    W, b = program.stored(W if program.fold is None else program.fold.weights(W), program.bias)
    return Solution(W, b, status, program.distance(W, b), iterations)
