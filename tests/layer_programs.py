"""Small seeded layer programs that the mathematical tests share."""

from __future__ import annotations

import torch

from nettrim.preimage import IDENTITY, RELU, Activation, clamp, leaky_relu
from nettrim.program import LayerProgram, from_rows

ACTIVATIONS: dict[str, Activation] = {"relu": RELU, "identity": IDENTITY, "hardtanh": clamp(-1.0, 1.0), "leaky": leaky_relu(0.1)}


def layer(
    P: int,
    N: int,
    M: int,
    activation: str = "relu",
    *,
    bias: bool = True,
    seed: int = 0,
    rank: int | None = None,
    noise: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> LayerProgram:
    """A random layer at its own response (the parallel scheme); with ``noise``, at a reference that it does not reach (a cascade)."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    A = normal(P, N) if rank is None else normal(P, rank) @ normal(rank, N) / rank**0.5
    W = (normal(N, M) / N**0.5).to(dtype)
    b = (0.3 * normal(M)).to(dtype) if bias else None
    s = ACTIVATIONS[activation]
    Z = A @ W.double()
    if b is not None:
        Z = Z + b.double()
    return from_rows(A, s.apply(Z + noise * normal(P, M)), s, W, b, dtype=dtype)
