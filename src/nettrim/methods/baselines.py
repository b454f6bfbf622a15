"""Methods to measure against that only choose weights and leave the others as they are: magnitude, random, Wanda."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ..program import LayerProgram
from ..solution import Solution, Watch
from .linear import OneShot, check_whole, live_inputs, masked, own_weights
from .settings import settings


@settings
class Magnitude(OneShot):
    """Keeps the weights of largest magnitude in each layer, unchanged; bias unchanged.

    Args:
        sparsity: the fraction of zeros, in [0, 1).
        pattern: see :mod:`nettrim.patterns`; whole groups are chosen by the sum of their squares.

    Raises:
        InvalidInput: a setting outside its range.
    """

    def solve(self, program: LayerProgram, target: float, watch: Watch | None = None) -> Solution:
        """Zeroes all but the largest weights."""
        own = own_weights(program)
        return masked(program, self.chosen.mask(own, self.kept(program, target)))


@settings
class Random(OneShot):
    """Keeps weights drawn uniformly without replacement in each layer, unchanged; bias unchanged.

    Args:
        sparsity: the fraction of zeros, in [0, 1).
        pattern: see :mod:`nettrim.patterns`; whole groups are drawn.
        seed: whole number >= 0. The draw depends on it, on the layer's name and on its weights, so that layers of one shape, and groups
            of one convolution, do not share a mask.

    Raises:
        InvalidInput: a setting outside its range.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("Random", "seed", self.seed, 0)

    def solve(self, program: LayerProgram, target: float, watch: Watch | None = None) -> Solution:
        """Zeroes all but the weights drawn."""
        own = own_weights(program)
        generator = torch.Generator().manual_seed(_layer_seed(self.seed, program.name, own))
        mask = self.chosen.drawn(own.shape[0], own.shape[1], self.kept(program, target), generator)
        return masked(program, mask.to(own.device))


@settings
class Wanda(OneShot):
    """Keeps, for each output, the weights of largest ``|W_ij| * ||X_i||_2``, unchanged; bias unchanged (Sun, Liu, Bair, Kolter, ICLR 2024,
    arXiv 2306.11695).

    Every output keeps the same number of weights, up to one where the layer's exact count is no multiple of the number of outputs; the odd
    ones go to the outputs whose next weight scores highest. The published code rounds each output's zeros down instead. Weights of inputs
    that are always zero become zero, also when the count is not reached without them.

    Args:
        sparsity: the fraction of zeros, in [0, 1).
        pattern: see :mod:`nettrim.patterns`. N:M as published: the highest scores of each group. Whole groups are chosen by the sum of
            their squared scores, over all outputs together.

    Raises:
        InvalidInput: a setting outside its range.
    """

    def solve(self, program: LayerProgram, target: float, watch: Watch | None = None) -> Solution:
        """Zeroes all but the weights that score highest for their output."""
        own, live = own_weights(program), live_inputs(program)
        score = own.abs() * (torch.linalg.vector_norm(program.inputs, dim=0) * live)[:, None]
        kept = self.kept(program, target)
        if self.chosen.kind in ("rows", "columns", "RxC"):
            return masked(program, self.chosen.mask(score, kept) & live[:, None])
        if self.chosen.kind == "N:M":  # the same number of candidates for each output
            allowed = self.chosen.mask(score, own.numel())
            score, kept = torch.where(allowed, score, -1.0), min(kept, int(allowed.sum()))
        return masked(program, highest_by_output(score, kept) & live[:, None])


def highest_by_output(score: Tensor, k: int) -> Tensor:
    """Mask (N, M) of ``k`` entries of ``score``: the highest of each column, as many in each up to one; ties broken by position."""
    M = score.shape[1]
    each, odd = divmod(k, M) if M else (0, 0)
    order = score.argsort(dim=0, descending=True, stable=True)
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask.scatter_(0, order[:each], True)
    if odd:
        following = order[each]
        outputs = score.gather(0, following[None])[0].argsort(descending=True, stable=True)[:odd]
        mask[following[outputs], outputs] = True
    return mask


def _layer_seed(seed: int, name: str, weights: Tensor) -> int:
    digest = hashlib.sha256(f"{seed} {name} {tuple(weights.shape)}".encode())
    digest.update(weights.detach().cpu().contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest()[:7], "big")
