"""What a method returns for one layer's program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .status import Status

Watch = Callable[[int, float, float], None]
"""Called now and then while a layer is solved, with ``(iteration, distance, density)``."""


@dataclass(frozen=True)
class Solution:
    """Weights (N, M) and bias (M,) in the layer's own dtype, and how they were found.

    ``tolerance`` is the absolute tolerance that was asked for (``None`` for other targets) and ``tolerance_used`` the one that was
    solved for, which is larger only when the first is out of reach (``Status.INFEASIBLE``). ``penalty`` is lambda for penalised targets.
    ``distance`` and ``gap`` are recomputed in float64 from the weights as returned (the gap of the published program is the solver's own:
    its constraints have multipliers that no residual shows). ``violation`` is the most by which a constraint of the published
    program is missed; ``None`` for programs without constraints. ``inflation`` is the factor on the original weights' distance that gave
    the tolerance, where gamma did. ``kept``: these are the original weights and bias, which the layer is to keep to the last bit.
    """

    weights: Tensor
    bias: Tensor | None
    status: Status
    distance: float
    iterations: int
    tolerance: float | None = None
    tolerance_used: float | None = None
    penalty: float | None = None
    gap: float | None = None
    violation: float | None = None
    inflation: float | None = None
    notes: tuple[str, ...] = ()
    kept: bool = False
