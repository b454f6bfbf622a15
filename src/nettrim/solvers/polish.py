"""Least distance on a fixed support: convex, only lowers the distance, and keeps the zeros."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..preimage import nearest_point
from ..program import StandardProgram


def polish(
    program: StandardProgram,
    U: Tensor,
    c: Tensor | None,
    *,
    support: Tensor | None = None,
    rounds: int = 6,
    steps: int = 15,
    tolerance: float = 1e-4,
) -> tuple[Tensor, Tensor | None, float]:
    """Minimises ``dist(A U + e c^T, [lo, hi])`` over the weights on ``support`` (by default the nonzeros of ``U``) and ``c``.

    Each round takes a semismooth Newton direction, by conjugate gradients for all columns at once: entries strictly inside their box
    have no curvature, all others have that of least squares. A full step that does not lower the distance is halved. Ends
    when a round gains less than ``tolerance`` of the distance. Returns ``(U, c, distance)``.
    """
    p = program
    mask = (U != 0 if support is None else support).to(U.dtype)
    U = U * mask
    Z = p.response(U, c)
    residual = Z - nearest_point(Z, p.lo, p.hi)
    best = float(torch.linalg.vector_norm(residual))
    for _ in range(rounds):
        if best == 0.0:
            break
        # entries on or outside their box carry curvature; a point box always does
        curved = ((residual != 0) | (p.lo == p.hi)).to(U.dtype)
        dU, dc, dZ = _newton_direction(p, mask, curved, residual, steps)
        length = 1.0
        for _ in range(6):
            trial = torch.add(Z, dZ, alpha=length)
            trial_residual = trial - nearest_point(trial, p.lo, p.hi)
            value = float(torch.linalg.vector_norm(trial_residual))
            if value < best:
                break
            length /= 2
        else:
            break
        U = torch.add(U, dU, alpha=length)
        c = None if c is None or dc is None else torch.add(c, dc, alpha=length)
        Z, residual, gained, best = trial, trial_residual, (best - value) / best, value
        if gained < tolerance:
            break
    return U, c, math.hypot(best, math.sqrt(p.unreachable))


def _newton_direction(
    p: StandardProgram, mask: Tensor, curved: Tensor, residual: Tensor, steps: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Conjugate gradients on ``(J^T J) d = -J^T residual`` with ``J`` the curved rows of ``[A e]`` on the support; also ``A dU + e dc^T``.

    Preconditioned by the columns' square norms, so that their scaling does not matter.
    """
    inverse = (1.0 / p.gram.diagonal())[:, None]
    tiny = torch.finfo(residual.dtype).tiny
    rU = -(p.A.T @ residual) * mask
    rc = None if p.e is None else -(p.e @ residual) / p.e_square**0.5
    e = None if p.e is None else p.e / p.e_square**0.5  # unit norm, as the other columns are after preconditioning
    dU, dZ = torch.zeros_like(rU), torch.zeros_like(residual)
    dc = None if rc is None else torch.zeros_like(rc)
    pU, pc = rU * inverse, None if rc is None else rc.clone()
    square = _column_square(rU, rc, inverse)
    start = square.clone()
    for step in range(steps):
        q = p.A @ pU
        if e is not None and pc is not None:
            q = torch.addr(q, e, pc)
        qc = q * curved
        curvature = (q * qc).sum(0)
        # a column that has converged (or whose direction has no curvature) stands still
        alpha = torch.where(curvature > 1e-12 * square, square / curvature.clamp(min=tiny), 0.0)
        alpha = torch.where(square > 1e-12 * start, alpha, 0.0)
        dU.addcmul_(pU, alpha)
        dZ.addcmul_(q, alpha)
        if dc is not None and pc is not None:
            dc.addcmul_(pc, alpha)
        if step == steps - 1:
            break
        rU = torch.addcmul(rU, (p.A.T @ qc) * mask, alpha, value=-1)
        if rc is not None and e is not None:
            rc = torch.addcmul(rc, e @ qc, alpha, value=-1)
        new = _column_square(rU, rc, inverse)
        ratio = torch.where(alpha > 0, new / square.clamp(min=tiny), 0.0)
        pU = torch.addcmul(rU * inverse, pU, ratio)
        if rc is not None and pc is not None:
            pc = torch.addcmul(rc, pc, ratio)
        square = new
        if bool((square <= 1e-12 * start).all()):
            break
    return dU, None if dc is None else dc / p.e_square**0.5, dZ


def _column_square(rU: Tensor, rc: Tensor | None, inverse: Tensor) -> Tensor:
    square = (rU.square() * inverse).sum(0)
    return square if rc is None else square + rc.square()
