"""Lower bounds: never above the optimum, whatever the weights; tight at the optimum."""

from __future__ import annotations

import pytest
import torch
from layer_programs import layer

from nettrim.duality import DualPoint, relative_gap
from nettrim.program import LayerProgram, Moments
from nettrim.solvers.l1 import dual_gap
from nettrim.solvers.reference import preimage_l1, preimage_penalty

pytest.importorskip("clarabel")

CASES = [
    (40, 10, 4, "relu", True),
    (40, 10, 4, "relu", False),
    (10, 20, 3, "relu", True),
    (40, 8, 4, "identity", True),
    (12, 20, 3, "identity", False),
    (40, 8, 4, "hardtanh", True),
    (30, 8, 3, "leaky", True),
]


def dual(p: LayerProgram, W: torch.Tensor, b: torch.Tensor | None) -> DualPoint:
    _, N, M = p.shape
    point = DualPoint(N, M, p.bias_column is not None, W.device)
    point.add(p.inputs, p.preactivation(W, b), p.lo, p.hi, p.bias_column)
    return point


def arrays(p: LayerProgram) -> tuple:
    return p.inputs.numpy(), p.lo.numpy(), p.hi.numpy()


def tries(p: LayerProgram, best: tuple, seed: int) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Weights of every quality: the optimum's neighbourhood, the original's, zero, and plain noise."""
    g = torch.Generator().manual_seed(seed)
    W, b = torch.from_numpy(best[0]), None if best[1] is None else torch.from_numpy(best[1])
    out = [(torch.zeros_like(W), b), (p.weights, p.bias)]
    for size in (1e-6, 1e-3, 0.03, 0.3, 3.0):
        for start in (W, p.weights):
            step = size * torch.randn(W.shape, generator=g, dtype=torch.float64)
            out.append((start + step, None if b is None else b + size * torch.randn(b.shape, generator=g, dtype=torch.float64)))
    return out


@pytest.mark.parametrize("relative", [0.02, 0.2, 0.6])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_constrained_bound(case: int, relative: float) -> None:
    P, N, M, activation, bias = CASES[case]
    p = layer(P, N, M, activation, bias=bias, seed=case)
    epsilon = relative * p.reference_norm
    best = preimage_l1(*arrays(p), epsilon, bias=bias)
    bounds = [dual(p, W, b).constrained(epsilon) for W, b in tries(p, (best.weights, best.bias), case)]
    assert max(bounds) <= best.objective * (1 + 1e-7) + 1e-9
    W, b = torch.from_numpy(best.weights), None if best.bias is None else torch.from_numpy(best.bias)
    assert dual(p, W, b).constrained(epsilon) >= best.objective * (1 - 2e-4)
    assert dual_gap(p, W, b, epsilon=epsilon) <= 2e-4


@pytest.mark.parametrize("share", [0.01, 0.2])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_penalised_bound(case: int, share: float) -> None:
    P, N, M, activation, bias = CASES[case]
    p = layer(P, N, M, activation, bias=bias, seed=case)
    penalty = share * p.reference_norm**2 / float(p.weights.abs().sum())
    best = preimage_penalty(*arrays(p), penalty, bias=bias)
    bounds = [dual(p, W, b).penalised(penalty) for W, b in tries(p, (best.weights, best.bias), case)]
    assert max(bounds) <= best.objective * (1 + 1e-7) + 1e-9
    W, b = torch.from_numpy(best.weights), None if best.bias is None else torch.from_numpy(best.bias)
    assert dual_gap(p, W, b, penalty=penalty) <= 2e-4


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [50, 6])
def test_compressed_bound(rows: int, bias: bool) -> None:
    """The compressed program bounds the full one, and is as tight at its optimum."""
    p = layer(rows, 9, 3, "identity", bias=bias, seed=rows, noise=0.3)
    moments = Moments(p.weights, p.bias, torch.float64)
    moments.add(p.inputs, p.lo, p.lo)
    small = moments.program()
    epsilon = 0.6 * p.reference_norm
    best = preimage_l1(*arrays(p), epsilon, bias=bias)
    for W, b in tries(p, (best.weights, best.bias), 1):
        assert dual(small, W, b).constrained(epsilon, small.unreachable) <= best.objective * (1 + 1e-7) + 1e-9
    W, b = torch.from_numpy(best.weights), None if best.bias is None else torch.from_numpy(best.bias)
    assert dual_gap(small, W, b, epsilon=epsilon) <= 2e-4


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", "identity", "hardtanh"])
def test_batches_add_up(activation: str, bias: bool) -> None:
    p = layer(41, 7, 3, activation, bias=bias, seed=4)
    W = p.weights + 0.1
    Z = p.preactivation(W, p.bias)
    whole, parts = (DualPoint(7, 3, bias, W.device) for _ in range(2))
    whole.add(p.inputs, Z, p.lo, p.hi)
    for rows in torch.arange(41).split(10):
        parts.add(p.inputs[rows], Z[rows], p.lo[rows], p.hi[rows])
    assert parts.constrained(0.3) == pytest.approx(whole.constrained(0.3), rel=1e-12)
    assert parts.penalised(0.3) == pytest.approx(whole.penalised(0.3), rel=1e-12)


def test_zero_residual_and_no_inputs_give_the_trivial_bound() -> None:
    p = layer(20, 5, 2)
    assert dual(p, p.weights, p.bias).constrained(0.1) == pytest.approx(0.0, abs=1e-9)
    point = DualPoint(0, 2, True, torch.device("cpu"))
    point.add(torch.zeros(4, 0, dtype=torch.float64), torch.ones(4, 2).double(), torch.zeros(4, 2).double(), torch.zeros(4, 2).double())
    assert point.constrained(0.1) == 0.0


def test_relative_gap() -> None:
    assert relative_gap(2.0, 1.0) == 0.5
    assert relative_gap(0.0, 0.0) == 0.0
    assert relative_gap(1.0, 1.0 + 1e-12) == 0.0
