"""The one Gram-space ADMM loop that serves every method; only its proximal steps differ (design section 3).

The weights ``U`` meet a copy ``D`` that the penalty shapes (scaled dual ``V``), and the response ``A U + e c^T`` meets a target:

* *majorised*: the target is the nearest point ``T`` of the box, refreshed as ``D`` moves. ``1/2 ||A U + e c^T - T||^2`` lies
  above ``1/2 dist^2`` and touches it at the point where ``T`` was taken, so this descends on the distance itself;
* *split*: the response has a copy ``R`` of its own (scaled dual ``Y``), and ``dist <= eps`` or ``1/2 dist^2`` enters by its exact
  proximal step. It converges much faster to high accuracy on convex programs.

Either way the weight step is the same: ``(G + beta I) U = A^T target + beta (D - V)``, by the eigendecomposition of ``G``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..preimage import nearest_point
from ..program import StandardProgram
from ..prox import ball_of_box, squared_distance

Prox = Callable[[Tensor], Tensor]


class GramADMM:
    """State and steps of the loop, in scaled form. Drivers (``l1``, ``l0``) choose proximal steps, penalties and when to stop."""

    def __init__(self, program: StandardProgram, start: Tensor, *, relaxation: float = 1.6) -> None:
        self.program = program
        self.relaxation = relaxation
        self.U = start.clone()  # satisfies the data
        self.D = start.clone()  # satisfies the penalty
        self.V = torch.zeros_like(start)
        self.c = program.offset(nearest_point(program.response(start, program.c0), program.lo, program.hi))
        self.R: Tensor | None = None
        self.Y: Tensor | None = None
        self.cross: Tensor | None = None
        self.primal = float("inf")
        self.dual = float("inf")

    def _weight_step(self, cross: Tensor, beta: float, ridge: float) -> Tensor:
        """``(G + (ridge + beta) I) U = cross + ridge U0 + beta (D - V)``."""
        p = self.program
        right = torch.add(cross, self.D - self.V, alpha=beta)
        if ridge:
            right.add_(p.U0, alpha=ridge)
        return p.vectors @ ((p.vectors.T @ right) / (p.values + (ridge + beta))[:, None])

    def refresh(self) -> float:
        """Moves the majorised target to the nearest point of the present sparse weights; returns their distance."""
        p = self.program
        Z = p.response(self.D, self.c)
        T = nearest_point(Z, p.lo, p.hi)
        self.c = p.offset(T)
        self.cross = p.A.T @ T
        return float(torch.linalg.vector_norm(Z.sub_(T)))

    def majorised_step(self, prox: Prox, beta: float, ridge: float) -> None:
        """One iteration against the target of the last :meth:`refresh` (no over-relaxation: the penalty is not convex)."""
        assert self.cross is not None
        self.U = self._weight_step(self.cross, beta, ridge)
        self.V.add_(self.U)
        self.D = prox(self.V)
        self.V.sub_(self.D)

    def split_step(self, prox: Prox, beta: float, rho: float, radius: float | None) -> None:
        """One over-relaxed iteration with the response split off.

        ``rho`` weighs the response's copy, ``rho * beta`` the weights' copy. ``radius`` is the distance allowed; ``None`` stands for the
        penalised program, whose term is ``1/2 dist^2``.
        """
        p = self.program
        if self.R is None or self.Y is None:
            self.R = p.response(self.U, self.c)
            self.Y = torch.zeros_like(self.R)
        target = self.R - self.Y
        self.c = p.offset(target)
        self.U = self._weight_step(p.A.T @ target, beta, 0.0)
        a = self.relaxation
        Z = p.response(self.U, self.c)
        relaxed = torch.lerp(self.R, Z, a)
        V = relaxed + self.Y
        T = nearest_point(V, p.lo, p.hi)
        R = ball_of_box(V, T, radius) if radius is not None else squared_distance(V, T, rho)
        self.Y = V.sub_(R)
        relaxed_U = torch.lerp(self.D, self.U, a)
        V = relaxed_U + self.V
        D = prox(V)
        self.V = V.sub_(D)
        self.primal = float((torch.linalg.vector_norm(Z - R) ** 2 + beta * torch.linalg.vector_norm(self.U - D) ** 2).sqrt())
        self.dual = float((torch.linalg.vector_norm(R - self.R) ** 2 + beta * torch.linalg.vector_norm(D - self.D) ** 2).sqrt())
        self.R, self.D = R, D

    def rescale_duals(self, response: float, weights: float) -> None:
        """Keeps the unscaled duals when the penalties change: multiply by old / new."""
        if self.Y is not None:
            self.Y.mul_(response)
        self.V.mul_(weights)
