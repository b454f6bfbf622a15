"""Small seeded linear layers that the tests of the one-shot baselines share."""

from __future__ import annotations

from dataclasses import replace

import torch
from layer_programs import layer
from torch import Tensor

from nettrim.methods.linear import gram, response_change
from nettrim.program import LayerProgram
from nettrim.solution import Solution


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(N: int, M: int, seed: int = 0, P: int | None = None) -> tuple[Tensor, Tensor]:
    """A positive definite Gram matrix of correlated inputs, and weights."""
    g = generator(seed)
    A = torch.randn(P or 3 * N, N, generator=g, dtype=torch.float64) @ torch.randn(N, N, generator=g, dtype=torch.float64)
    return A.T @ A / len(A), torch.randn(N, M, generator=g, dtype=torch.float64)


def correlated(P: int, N: int, M: int, seed: int) -> LayerProgram:
    """A linear layer whose inputs are rectified mixtures: correlated, not negative, of very different sizes."""
    p = layer(P, N, M, "identity", seed=seed)
    mixing = torch.randn(N, N, generator=generator(seed + 1), dtype=torch.float64) * torch.logspace(0, -2, N, dtype=torch.float64)[:, None]
    A = (p.inputs @ mixing).relu() + 0.02 * p.inputs.abs()
    Z = A @ p.weights + p.bias
    return replace(p, inputs=A, lo=Z, hi=Z)


def change(p: LayerProgram, solution: Solution) -> float:
    return response_change(gram(p), solution.weights.double() - p.weights)


def on_support(H: Tensor, w0: Tensor, stay: Tensor) -> Tensor:
    """Closed form: ``argmin (w - w0)^T H (w - w0)`` with zeros off ``stay``, by an explicit inverse."""
    w = torch.zeros_like(w0)
    w[stay] = torch.linalg.inv(H[stay][:, stay]) @ (H @ w0)[stay]
    return w
