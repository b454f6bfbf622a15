"""The optimal brain surgeon on a layer's linear response (Hassibi, Stork, 1992): exact greedy by output, and in one sweep (SparseGPT).

Removing weight ``j`` of one output at least cost, with ``G = H^-1``: the cost is ``w_j^2 / G_jj`` (times 1/2), the others move by
``-w_j / G_jj G_:j``, and ``G`` loses ``G_:j G_j: / G_jj``. Every step is the exact minimiser with the zeros so far, so that weights depend
on the zeros and not on their order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..program import LayerProgram
from ..prox import largest_mask
from ..solution import Solution, Watch
from .linear import OneShot, check_positive, check_whole, finished, gram, live_inputs, own_weights
from .targets import kept_weights

MEMORY = 128 * 2**20  # bytes for the inverses of the outputs that are worked on together
DEFERRED = 96  # removals that are gathered before they are taken out of the inverses


@dataclass(frozen=True)
class OBS(OneShot):
    """Exact greedy OBS for each output, and the layer's budget shared by the costs (Optimal Brain Compression: Frantar, Singh, Alistarh,
    NeurIPS 2022, arXiv 2208.11580). Bias unchanged.

    Each output's weights are removed one by one, at least cost, down to none; then the removals of all outputs are taken in the order in
    which a heap of their next costs gives them, until the budget is met. The weights that stay are the least-squares solution on them.
    Weights of inputs that are always zero are removed first.

    Args:
        sparsity: the fraction of zeros, in [0, 1).
        damping: share of the mean diagonal of the Gram matrix that is added to its diagonal. The paper has none; without it, inputs that
            depend on each other have no inverse.

    Raises:
        InvalidInput: a setting outside its range.
    """

    damping: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("OBS", "damping", self.damping)

    def solve(self, program: LayerProgram, target: float, watch: Watch | None = None) -> Solution:
        """Removes weights until the budget is met."""
        own, live = own_weights(program), live_inputs(program)
        H = _damped(gram(program)[live][:, live], self.damping)
        W = torch.zeros_like(own)
        kept = min(kept_weights(own.numel(), target), H.shape[0] * own.shape[1])
        if kept:
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
            order, cost = removal_order(H, inverse, own[live])
            W[live] = least_squares(H, inverse, own[live], mask_by_cost(order, cost, kept))
        return finished(program, W, own.numel() - kept)


@dataclass(frozen=True)
class SparseGPT(OneShot):
    """One sweep over the inputs with one inverse for all outputs (Frantar, Alistarh, ICML 2023, arXiv 2301.00774). Bias unchanged.

    Inputs are taken in order. Where a weight is removed, the weights of later inputs are moved as OBS would; earlier ones stay. Which
    weights go is chosen for ``block`` inputs at a time, over all outputs, by their costs when the block begins. Every block keeps the same
    share, so that the layer's count is exact (the published code removes one more in each block); what a block cannot keep, because its
    inputs are always zero, the others do.

    Args:
        sparsity: the fraction of zeros, in [0, 1).
        damping: share of the mean diagonal of the Gram matrix that is added to its diagonal; inputs that are always zero are left out of
            that mean (the published code counts them as 1, which depends on the unit of the inputs).
        block: inputs for which weights are chosen together.

    Raises:
        InvalidInput: a setting outside its range.
    """

    damping: float = 0.01
    block: int = 128

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
        budget = block_budgets(live, own.shape[1], self.block, kept_weights(own.numel(), target))
        W = sweep(_damped(H, self.damping), own * live[:, None], self.block, budget)
        return finished(program, W, len(budget))


def removal_order(H: Tensor, inverse: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """For each output, the order in which exact greedy OBS removes its weights, and what each removal costs.

    Args:
        H: Gram matrix (N, N), float64, positive definite; ``inverse`` its inverse.
        W: weights (N, M).

    Returns:
        order (M, N), the inputs in order of removal; cost (M, N), ``w_j^2 / G_jj``: by so much the squared change of the response grows.
    """
    N, M = W.shape
    order = torch.empty(M, N, dtype=torch.long, device=W.device)
    cost = W.new_empty(M, N)
    together = max(1, MEMORY // (2 * N * N * W.element_size()))  # the inverses before and after removals are taken out
    for start in range(0, M, together):
        rows = slice(start, start + together)
        order[rows], cost[rows] = _removals(H, inverse, W.T[rows].contiguous())
    return order, cost


def _removals(H: Tensor, inverse: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
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
    for begin in range(0, N, DEFERRED):
        count, n = min(DEFERRED, N - begin), N - begin
        removed = w.new_zeros(R, count, n)
        gone = torch.zeros(R, n, dtype=torch.bool, device=w.device)
        for t in range(count):
            score = (w.square() / d).masked_fill_(gone, torch.inf)
            cost[:, begin + t], j = score.min(1)
            order[:, begin + t] = names[each, j]
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


def block_budgets(live: Tensor, outputs: int, block: int, kept: int) -> list[int]:
    """How many weights each block of inputs keeps: the same share of all, no more than it has on live inputs, ``kept`` in all."""
    blocks = [live[start : start + block] for start in range(0, len(live), block)]
    room = [int(part.sum()) * outputs for part in blocks]
    sizes = [len(part) * outputs for part in blocks]
    kept = min(kept, sum(room))
    shares = []
    for position, size in enumerate(sizes):
        fair = round(kept * size / max(sum(sizes[position:]), 1))
        share = min(room[position], max(fair, kept - sum(room[position + 1 :])))
        shares.append(share)
        kept -= share
    return shares


def sweep(H: Tensor, W: Tensor, block: int, budget: list[int] | None = None, mask: Tensor | None = None) -> Tensor:
    """SparseGPT's sweep over the inputs of ``W`` (N, M), with the Gram matrix ``H`` (N, N), damped.

    ``U^T U = H^-1`` with ``U`` upper triangular. With the inputs before ``i`` settled, row ``i`` of ``U``, times ``U_ii``, is row ``i`` of
    the inverse of what is left of ``H``: so one factor serves every step and every output. Exactly one of ``budget`` (weights that each
    block keeps) and ``mask`` (N, M) is given.
    """
    if (budget is None) == (mask is None):
        raise ValueError("sweep: give exactly one of budget and mask")
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    W = W.clone()
    for number, start in enumerate(range(0, len(W), block)):
        end = min(start + block, len(W))
        V, factor = W[start:end], U[start:end, start:end]
        if budget is not None:
            stay = largest_mask(V / factor.diagonal()[:, None], budget[number])
        else:
            assert mask is not None
            stay = mask[start:end]
        moved = torch.zeros_like(V)
        for i in range(end - start):
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
