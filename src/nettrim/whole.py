"""The whole model, not its pruned layers alone: how many of its parameters are zero, and which were not pruned and why."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from .layers import KINDS, is_prunable

OUTSIDE = "not chosen by layers=, or left out by ignore="
UNREACHED = "never called on the calibration data"
UNASKED = "the method was given no target for it"


@dataclass(frozen=True)
class LeftOut:
    """A module with parameters of two or more dimensions that were not pruned: its name and class, their number, and why."""

    name: str
    kind: str
    parameters: int
    reason: str

    def __str__(self) -> str:
        return f"{self.name or 'the model itself'} ({self.kind}, {self.parameters:,} parameters: {self.reason})"


@dataclass(frozen=True)
class WholeModel:
    """Counts over all of a model's parameters, shared ones once. ``vectors``: those in biases, norms and other vectors, which no method
    prunes. ``left_out``: all others that were not pruned, module by module."""

    parameters: int
    zeros: int
    vectors: int
    left_out: tuple[LeftOut, ...]

    @property
    def zero_share(self) -> float:
        """Zeros as a share of all parameters."""
        return self.zeros / self.parameters if self.parameters else 0.0

    def notes(self) -> list[str]:
        """What was left out in one sentence, with its share of all parameters; nothing where nothing was."""
        if not self.left_out:
            return []
        share = sum(left.parameters for left in self.left_out) / self.parameters
        named = ", ".join(f"{left.name or 'the model itself'} ({left.kind})" for left in self.left_out[:8])
        more = f" and {len(self.left_out) - 8} more" if len(self.left_out) > 8 else ""
        return [f"{share:.1%} of the model's parameters were not pruned: {named}{more}"]


def whole_model(model: nn.Module, pruned: Collection[str], reasons: Mapping[str, str]) -> WholeModel:
    """What became of a whole model.

    Args:
        model: the pruned model, with attention opened (:mod:`nettrim.attention`), so that its projections are layers.
        pruned: names of the layers that were pruned.
        reasons: by the name of a layer that nettrim could have pruned, why it was not.
    """
    seen: set[int] = set()
    total = zeros = vectors = 0
    left: list[LeftOut] = []
    for name, module in model.named_modules():
        count = 0
        for label, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            total += parameter.numel()
            zeros += int((parameter.detach() == 0).sum())
            if parameter.ndim < 2:
                vectors += parameter.numel()
            elif not (name in pruned and label == "weight"):
                count += parameter.numel()
        if count:
            reason = reasons.get(name, OUTSIDE) if is_prunable(module) else f"nettrim prunes {KINDS}"
            left.append(LeftOut(name, type(module).__name__, count, reason))
    return WholeModel(total, zeros, vectors, tuple(left))


def reasons_of(model: nn.Module, chosen: Collection[str], called: Collection[str]) -> dict[str, str]:
    """Why layers that could have been pruned were not: of those ``chosen``, the data ``called`` some, and the method asked for the rest."""
    names = [name for name, module in model.named_modules() if is_prunable(module)]
    return {name: OUTSIDE if name not in chosen else UNASKED if name in called else UNREACHED for name in names}
