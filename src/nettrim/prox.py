"""Proximal steps of the weight penalties; each opens with the problem that it solves."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_threshold(V: Tensor, threshold: Tensor | float) -> Tensor:
    """``argmin_D  sum_ij threshold_ij |D_ij| + 1/2 ||D - V||_F^2`` (the l1 norm, weighted)."""
    return V - torch.clamp(V, -threshold, threshold) if isinstance(threshold, float) else V - V.clamp(-threshold, threshold)


def keep_largest(V: Tensor, k: int) -> Tensor:
    """``argmin_D  ||D - V||_F^2  subject to  ||D||_0 <= k``: the ``k`` entries of largest magnitude stay, exactly ``k`` of them.

    Ties are broken by position, so that the count is exact and the result the same every time.
    """
    return torch.where(largest_mask(V, k), V, torch.zeros_like(V))


def largest_mask(V: Tensor, k: int) -> Tensor:
    """Mask of the ``k`` entries of largest magnitude, ties broken by position. ``0 <= k <= V.numel()``."""
    count = V.numel()
    if k >= count:
        return torch.ones_like(V, dtype=torch.bool)
    if k <= 0:
        return torch.zeros_like(V, dtype=torch.bool)
    magnitude = V.abs().flatten()
    threshold = magnitude.kthvalue(count - k + 1).values
    mask = magnitude >= threshold
    surplus = int(mask.sum()) - k
    if surplus:  # equals of the smallest that stays: the last of them go
        mask[(magnitude == threshold).nonzero().flatten()[-surplus:]] = False
    return mask.view_as(V)


def ball_share(distance: float, radius: float) -> float:
    """``argmin_Z ||Z - V||_F  subject to  dist(Z, S) <= radius`` is ``T + share (V - T)``, with ``T`` the point of ``S`` nearest to ``V``.

    ``distance`` is ``||V - T||_F``; returns ``share``.
    """
    return 1.0 if distance <= radius else radius / distance


def squared_distance_share(rho: float) -> float:
    """``argmin_Z  1/2 dist(Z, S)^2 + rho/2 ||Z - V||_F^2`` is ``T + share (V - T)``; returns ``share``.

    ``T`` is the point of ``S`` nearest to ``V``.
    """
    return rho / (1.0 + rho)
