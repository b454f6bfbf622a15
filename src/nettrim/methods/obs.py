"""The optimal brain surgeon on a layer's linear response (Hassibi, Stork, 1992): exact greedy by output, and in one sweep (SparseGPT).

Removing weight ``j`` of one output at least cost, with ``G = H^-1``: the cost is ``w_j^2 / G_jj`` (times 1/2), the others move by
``-w_j / G_jj G_:j``, and ``G`` loses ``G_:j G_j: / G_jj``. Every step is the exact minimiser with the zeros so far, so that weights depend
on the zeros and not on their order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..patterns import UNSTRUCTURED, NofM, Pattern
from ..program import LayerProgram
from ..solution import Solution, Watch
from .linear import OneShot, check_positive, check_whole, finished, gram, live_inputs, own_weights
from .settings import settings

MEMORY = 128 * 2**20  # bytes for the inverses of the outputs that are worked on together
DEFERRED = 96  # removals that are gathered before they are taken out of the inverses


@settings
class OBS(OneShot):
    """Exact greedy OBS for each output, and the layer's budget shared by the costs (Optimal Brain Compression: Frantar, Singh, Alistarh,
    NeurIPS 2022, arXiv 2208.11580). Bias unchanged.

    Each output's weights are removed one by one, at least cost, down to none; then the removals of all outputs are taken in the order in
    which a heap of their next costs gives them, until the budget is met. The weights that stay are the least-squares solution on them.
    Weights of inputs that are always zero are removed first.

    Args:
        sparsity: the fraction of zeros, in [0, 1).
        pattern: ``"N:M"`` only, as in the paper: weights go from groups that still hold more than N, until none does. What a lower sparsity
            removes besides follows as without a pattern.
        damping: share of the mean diagonal of the Gram matrix that is added to its diagonal. The paper has none; without it, inputs that
            depend on each other have no inverse.

    Raises:
        InvalidInput: a setting outside its range.
    """

    damping: float = 1e-6

    takes: ClassVar[tuple[str, ...]] = ("N:M",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("OBS", "damping", self.damping)

    def solve(self, program: LayerProgram, target: float, watch: Watch | None = None) -> Solution:
        """Removes weights until the budget is met."""
        own, live = own_weights(program), live_inputs(program)
        H = _damped(gram(program)[live][:, live], self.damping)
        W = torch.zeros_like(own)
        kept = min(self.kept(program, target), self.chosen.capacity(live, own.shape[1]))
        if kept:
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
            pattern = self.chosen
            groups = Groups(live.nonzero()[:, 0] // pattern.of, pattern.most) if isinstance(pattern, NofM) else None
            order, cost = removal_order(H, inverse, own[live], groups)
            W[live] = least_squares(H, inverse, own[live], mask_by_cost(order, cost, kept))
        return finished(program, W, own.numel() - kept)


@settings
class SparseGPT(OneShot):
    """One sweep over the inputs with one inverse for all outputs (Frantar, Alistarh, ICML 2023, arXiv 2301.00774). Bias unchanged.

    Inputs are taken in order. Where a weight is removed, the weights of later inputs are moved as OBS would; earlier ones stay. Which
    weights go is chosen for ``block`` inputs at a time, over all outputs, by their costs when the block begins. Every block keeps the same
    share, so that the layer's count is exact (the published code removes one more in each block); what a block cannot keep, because its
    inputs are always zero, the others do.

    Args:
        sparsity: the fraction of zeros, in [0, 1).
        pattern: ``"N:M"`` only, as published: weights are chosen for M inputs at a time, when the sweep reaches them. With a sparsity too,
            every M inputs keep their share of the layer's count.
        damping: share of the mean diagonal of the Gram matrix that is added to its diagonal; inputs that are always zero are left out of
            that mean (the published code counts them as 1, which depends on the unit of the inputs).
        block: inputs for which weights are chosen together; with N:M it only sets how the work is cut.

    Raises:
        InvalidInput: a setting outside its range.
    """

    damping: float = 0.01
    block: int = 128

    takes: ClassVar[tuple[str, ...]] = ("N:M",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("SparseGPT", "damping", self.damping)
        check_whole("SparseGPT", "block", self.block, 1)

    def solve(self, program: LayerProgram, target: float, watch: Watch | None = None) -> Solution:
        """Sweeps over the inputs once."""
        own, live = own_weights(program), live_inputs(program)
        H = gram(program)
        H[~live] = 0.0
        H[:, ~live] = 0.0
        size = float(H.diagonal()[live].mean()) if bool(live.any()) else 1.0
        H.diagonal()[~live] = size
        pattern, kept = self.chosen, self.kept(program, target)
        together = pattern.of if isinstance(pattern, NofM) else self.block
        most = pattern.most if isinstance(pattern, NofM) else together
        budget = block_budgets(live, own.shape[1], together, kept, most)
        block = max(together, self.block // together * together)  # whole groups
        W = sweep(_damped(H, self.damping), own * live[:, None], block, budget, pattern=pattern, together=together)
        return finished(program, W, len(budget))


@dataclass(frozen=True)
class Groups:
    """The group of each input (N,), numbered upwards, and how many weights of each group and output stay at most."""

    of: Tensor
    most: int


def removal_order(H: Tensor, inverse: Tensor, W: Tensor, groups: Groups | None = None) -> tuple[Tensor, Tensor]:
    """For each output, the order in which exact greedy OBS removes its weights, and what each removal costs.

    Args:
        H: Gram matrix (N, N), float64, positive definite; ``inverse`` its inverse.
        W: weights (N, M).
        groups: weights of groups that hold too many are removed first. Their removal is no choice: its cost is given as -inf.

    Returns:
        order (M, N), the inputs in order of removal; cost (M, N), ``w_j^2 / G_jj``: by so much the squared change of the response grows.
    """
    N, M = W.shape
    order = torch.empty(M, N, dtype=torch.long, device=W.device)
    cost = W.new_empty(M, N)
    together = max(1, MEMORY // (2 * N * N * W.element_size()))  # the inverses before and after removals are taken out
    for start in range(0, M, together):
        rows = slice(start, start + together)
        order[rows], cost[rows] = _removals(H, inverse, W.T[rows].contiguous(), groups)
    return order, cost


def _removals(H: Tensor, inverse: Tensor, w: Tensor, groups: Groups | None) -> tuple[Tensor, Tensor]:
    """:func:`removal_order` of a few outputs, ``w`` (R, N).

    Removals change the inverses by ``-l^T l``. These are kept apart, ``DEFERRED`` of them, and then taken out in one product, together
    with the rows and columns of the inputs that have gone.
    """
    R, N = w.shape
    each = torch.arange(R, device=w.device)
    order = torch.empty(R, N, dtype=torch.long, device=w.device)
    cost = w.new_empty(R, N)
    G = inverse.expand(R, N, N)
    names = torch.arange(N, device=w.device).expand(R, N)
    least = (1 / H.diagonal()).expand(R, N)  # no diagonal entry of any of the inverses is smaller; keeps rounding from going below
    d = inverse.diagonal().repeat(R, 1)
    left = None if groups is None else groups.of.bincount().repeat(R, 1)
    forced = 0 if groups is None else int((groups.of.bincount() - groups.most).clamp(min=0).sum())
    for begin in range(0, N, DEFERRED):
        count, n = min(DEFERRED, N - begin), N - begin
        removed = w.new_zeros(R, count, n)
        gone = torch.zeros(R, n, dtype=torch.bool, device=w.device)
        for t in range(count):
            score = (w.square() / d).masked_fill_(gone, torch.inf)
            if groups is not None and left is not None and begin + t < forced:
                score.masked_fill_((left <= groups.most).gather(1, groups.of[names]), torch.inf)
            cost[:, begin + t], j = score.min(1)
            order[:, begin + t] = names[each, j]
            if groups is not None and left is not None and begin + t < forced:
                left[each, groups.of[order[:, begin + t]]] -= 1
                cost[:, begin + t] = -torch.inf
            row = G[each, j]
            if t:
                row = row.unsqueeze(1).baddbmm(removed[each, :t, j].unsqueeze(1), removed[:, :t], alpha=-1).squeeze(1)
            root = torch.maximum(row[each, j], least[each, j]).sqrt_()
            row = row / root[:, None]
            w = w.addcmul(row, (w[each, j] / root)[:, None], value=-1)
            d = torch.maximum(d.addcmul(row, row, value=-1), least)
            removed[:, t] = row
            gone[each, j] = True
        if count == n:
            break
        keep = (~gone).nonzero()[:, 1].view(R, n - count)
        w, d, least, names = w.gather(1, keep), d.gather(1, keep), least.gather(1, keep), names.gather(1, keep)
        removed = removed.gather(2, keep.unsqueeze(1).expand(R, count, n - count))
        G = G[each[:, None, None], keep.unsqueeze(2), keep.unsqueeze(1)].baddbmm_(removed.mT, removed, alpha=-1)
    return order, cost


def mask_by_cost(order: Tensor, cost: Tensor, kept: int) -> Tensor:
    """Mask (N, M) of the ``kept`` weights that stay when removals are taken, always the cheapest of the outputs' next ones.

    A removal can be cheaper than the one before it; it then follows at once. So the order is that of each output's highest cost so far.
    """
    M, N = order.shape
    taken = cost.cummax(1).values.flatten().argsort(stable=True)[: N * M - kept]
    mask = torch.ones(M, N, dtype=torch.bool, device=order.device)
    mask[taken // N, order.flatten()[taken]] = False
    return mask.T


def least_squares(H: Tensor, inverse: Tensor, W: Tensor, mask: Tensor) -> Tensor:
    """The weights (N, M) on ``mask`` whose response is nearest to that of ``W``: where OBS ends, whatever the order of removals."""
    result = torch.zeros_like(W)
    aim = H @ W
    for output in range(W.shape[1]):
        stay = mask[:, output].nonzero()[:, 0]
        go = (~mask[:, output]).nonzero()[:, 0]
        if len(stay) <= len(go):  # the smaller of the two systems
            result[stay, output] = _solve(H[stay[:, None], stay], aim[stay, output])
        else:
            multiplier = _solve(inverse[go[:, None], go], W[go, output])
            result[stay, output] = W[stay, output] - inverse[stay[:, None], go] @ multiplier
    return result


def block_budgets(live: Tensor, outputs: int, block: int, kept: int, most: int | None = None) -> list[int]:
    """How many weights each block of inputs keeps: the same share of all, no more than it has on live inputs, ``kept`` in all.

    ``most``: weights that each output may keep in a block; by default all.
    """
    most = block if most is None else most
    blocks = [live[start : start + block] for start in range(0, len(live), block)]
    room = [min(most, int(part.sum())) * outputs for part in blocks]
    sizes = [min(most, len(part)) * outputs for part in blocks]
    kept = min(kept, sum(room))
    shares = []
    for position, size in enumerate(sizes):
        fair = round(kept * size / max(sum(sizes[position:]), 1))
        share = min(room[position], max(fair, kept - sum(room[position + 1 :])))
        shares.append(share)
        kept -= share
    return shares


def sweep(
    H: Tensor,
    W: Tensor,
    block: int,
    budget: list[int] | None = None,
    mask: Tensor | None = None,
    pattern: Pattern = UNSTRUCTURED,
    together: int | None = None,
) -> Tensor:
    """SparseGPT's sweep over the inputs of ``W`` (N, M), with the Gram matrix ``H`` (N, N), damped.

    ``U^T U = H^-1`` with ``U`` upper triangular. With the inputs before ``i`` settled, row ``i`` of ``U``, times ``U_ii``, is row ``i`` of
    the inverse of what is left of ``H``: so one factor serves every step and every output. Exactly one of ``budget`` and ``mask`` (N, M) is
    given. ``budget`` says how many weights each group of ``together`` inputs keeps (a divisor of ``block``, by default all of it), chosen
    within ``pattern`` when the group's first input is reached.
    """
    if (budget is None) == (mask is None):
        raise ValueError("sweep: give exactly one of budget and mask")
    together = together or block
    if block % together:
        raise ValueError(f"sweep: together ({together}) must divide block ({block})")
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    W = W.clone()
    for start in range(0, len(W), block):
        end = min(start + block, len(W))
        V, factor = W[start:end], U[start:end, start:end]
        stay = torch.ones_like(V, dtype=torch.bool) if mask is None else mask[start:end]
        moved = torch.zeros_like(V)
        for i in range(end - start):
            if budget is not None and i % together == 0:
                group = slice(i, i + together)
                stay[group] = pattern.mask(V[group] / factor.diagonal()[group, None], budget[(start + i) // together])
            torch.div(V[i].masked_fill(stay[i], 0.0), factor[i, i], out=moved[i])
            V[i + 1 :].addr_(factor[i, i + 1 :], moved[i], alpha=-1)
        V.mul_(stay)
        W[end:].addmm_(U[start:end, end:].T, moved, alpha=-1)
    return W


def _damped(H: Tensor, share: float) -> Tensor:
    """``H`` with ``share`` of its mean diagonal added to its diagonal."""
    return H + share * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype, device=H.device) if len(H) else H


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """The solution of a positive definite system for one right-hand side."""
    return torch.cholesky_solve(right[:, None], torch.linalg.cholesky(matrix))[:, 0]
