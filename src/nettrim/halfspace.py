"""The published program of a layer, made from its preimage program: Omega, V, and the bias as one more penalised weight.

Source: Aghasi et al., NIPS 2017 and SIAM J. Math. Data Science 2020 (docs/theory.md, (2.2) and section 2.1)::

    minimise ||U||_1   subject to   ||(X U - Y)_Omega||_F <= epsilon,   X U <= V off Omega

with the bias in the last row of ``U`` and a column of ones (for compressed rows: their bias column) in ``X``. Entries whose box is
a point form Omega; the papers' ``Y > 0``. Off Omega ``V`` is the box's own bound while the layer sees the reference network's
inputs, and the response of its original weights once the pruning before it has changed them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .program import LayerProgram


@dataclass(frozen=True)
class HalfspaceProgram:
    """``program``: hard, without a bias of its own, inputs (P, N + 1) and weights (N + 1, M) when the layer has one.

    ``slack`` (P, M) is how far ``V`` lies outside the preimage box: weights that meet the program are within the root of
    ``epsilon^2 + ||slack||^2`` of the preimage. ``original_residual`` is what the original weights miss on Omega; they meet ``V``.
    """

    program: LayerProgram
    slack: Tensor
    original_residual: float
    has_bias: bool

    @property
    def slack_norm(self) -> float:
        """``||slack||_F``."""
        return float(torch.linalg.vector_norm(self.slack))

    def split(self, U: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights (N, M) and bias (M,) from the program's weights."""
        return (U[:-1], U[-1]) if self.has_bias else (U, None)


def published_program(program: LayerProgram, *, moved: bool) -> HalfspaceProgram:
    """The published program of the same layer; ``moved`` says that its inputs are not the reference network's any more.

    The papers treat ReLU, whose boxes off Omega have an upper bound only. A lower bound (ReLU6 and Hardtanh at their upper end) is
    treated in the same way.
    """
    lo, hi = program.lo, program.hi
    off = lo != hi
    Z0 = program.preactivation(program.weights, program.bias)
    slack = torch.zeros_like(Z0)
    if moved:
        upper, lower = off & torch.isinf(lo), off & torch.isinf(hi)
        slack = torch.where(upper, (Z0 - hi).clamp(min=0), torch.where(lower, (lo - Z0).clamp(min=0), 0.0))
        hi, lo = torch.where(upper & ~lower, Z0, hi), torch.where(lower & ~upper, Z0, lo)
    X, U0 = program.inputs, program.weights
    if program.bias is not None and program.bias_column is not None:
        X = torch.cat([X, program.bias_column[:, None]], dim=1)
        U0 = torch.cat([U0, program.bias[None]])
    made = replace(program, inputs=X, lo=lo, hi=hi, weights=U0, bias=None, bias_column=None, hard=True, fold=None)
    residual = math.hypot(float(torch.linalg.vector_norm((Z0 - lo)[~off])), math.sqrt(program.unreachable))
    return HalfspaceProgram(made, slack, residual, program.bias is not None)
