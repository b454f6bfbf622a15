"""The layer program: rows, moments, standard coordinates."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from layer_programs import ACTIVATIONS, layer

from nettrim import program
from nettrim.preimage import IDENTITY, RELU
from nettrim.program import LayerProgram, Moments, dead_inputs, from_rows, standardise
from nettrim.status import InvalidInput


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def candidates(p: LayerProgram) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    out = [(p.weights, p.bias), (torch.zeros_like(p.weights), p.bias)]
    for seed, size in enumerate((1e-4, 0.1, 2.0)):
        b = None if p.bias is None else p.bias + size * normal(seed + 50, len(p.bias))
        out.append((p.weights + size * normal(seed, *p.weights.shape), b))
    return out


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["identity", "leaky"])
@pytest.mark.parametrize("kind", ["plain", "few rows", "one row", "dead inputs", "low rank", "large mean", "tiny scale"])
def test_moments_say_what_the_rows_say(kind: str, name: str, bias: bool) -> None:
    P, N, M = {"few rows": (5, 12, 3), "one row": (1, 4, 2)}.get(kind, (57, 9, 4))
    A = normal(1, P, N)
    if kind == "dead inputs":
        A[:, 0], A[:, 3], A[:, 5] = 0.0, 2.5, -1e-3
    if kind == "low rank":
        A = A[:, :3] @ normal(2, 3, N)
    if kind == "large mean":
        A = A + 30.0
    if kind == "tiny scale":
        A = A * 1e-5
    s = ACTIVATIONS[name]
    W, b = normal(3, N, M), normal(4, M) if bias else None
    Z = A @ W if b is None else A @ W + b
    Y = s.apply(Z + 0.1 * normal(5, P, M) * Z.std(unbiased=False))
    rows = from_rows(A, Y, s, W, b)
    moments = Moments(W, b)
    sizes = [1, 20, 3, 33] if P == 57 else [P]
    for a, y in zip(A.split(sizes), Y.split(sizes), strict=True):
        moments.add(a, s.box(y)[0], y)
    small = moments.program()
    assert small.rows == rows.rows == P
    assert small.shape[0] <= N + 1
    assert small.reference_norm == pytest.approx(rows.reference_norm, rel=1e-12)
    for W, b in candidates(rows):
        assert small.distance(W, b) == pytest.approx(rows.distance(W, b), rel=1e-6, abs=1e-7 * rows.reference_norm)


def test_moments_of_an_exact_reference_have_distance_zero() -> None:
    p = layer(50, 8, 3, "identity")
    moments = Moments(p.weights, p.bias)
    moments.add(p.inputs, p.lo, p.lo)
    assert moments.program().original_distance() <= 1e-10 * p.reference_norm


@pytest.mark.parametrize("bias", [True, False])
def test_moments_of_inputs_that_are_all_zero(bias: bool) -> None:
    W, b = normal(0, 4, 2), torch.ones(2).double() if bias else None
    moments = Moments(W, b)
    moments.add(torch.zeros(6, 4), torch.full((6, 2), 3.0), torch.full((6, 2), 3.0))
    p = moments.program()
    assert p.original_distance() == pytest.approx(math.sqrt(12) * (2 if bias else 3), rel=1e-12)
    assert standardise(p).U0.shape == (0, 2)


def test_moments_refuse() -> None:
    W = normal(0, 4, 2)
    with pytest.raises(InvalidInput, match="empty"):
        Moments(W, None).program()
    moments = Moments(W, None)
    moments.add(torch.full((3, 4), math.nan), torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(InvalidInput, match="NaN"):
        moments.program()


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("name", list(ACTIVATIONS))
@pytest.mark.parametrize("bias", [True, False])
def test_standard_coordinates_round_trip(bias: bool, name: str, power: float) -> None:
    p = layer(40, 10, 4, name, bias=bias, seed=3)
    A = p.inputs.clone()
    A[:, 2] = 0.0
    if bias:
        A[:, 7] = 1.5
    p = replace(p, inputs=A * torch.logspace(-2, 2, 10, dtype=torch.float64))
    s = standardise(p, power=power)
    assert dead_inputs(p) == 10 - int(s.live.sum()) == (2 if bias else 1)
    assert float(s.gram.diagonal().mean()) == pytest.approx(1.0)
    if power == 1.0:
        torch.testing.assert_close(s.gram.diagonal(), torch.ones_like(s.gram.diagonal()))
    torch.testing.assert_close(s.vectors * s.values @ s.vectors.T, s.gram)
    if s.e is not None:
        assert float((s.e @ s.A).abs().max()) < 1e-10
    for W, b in candidates(p):
        W = W * s.live[:, None]
        U, c = s.enter(W, b)
        back, b_back = s.restore(U, c)
        torch.testing.assert_close(back, W)
        if b is not None:
            torch.testing.assert_close(b_back, b)
        assert s.distance(U, c) == pytest.approx(p.distance(W, b), rel=1e-9)


def test_dead_inputs_cost_nothing() -> None:
    """Their weights become zero, and the bias takes over what they did."""
    p = layer(30, 6, 3)
    A = p.inputs.clone()
    A[:, 1] = 4.0
    p = replace(p, inputs=A)
    s = standardise(p)
    W, b = s.restore(s.U0, s.c0)
    assert bool((W[1] == 0).all()) and bool((W != 0).any())
    assert p.distance(W, b) == pytest.approx(p.original_distance(), rel=1e-9)


def test_working_dtype_follows_the_layer() -> None:
    p = layer(20, 5, 2)
    assert standardise(p).A.dtype == torch.float64
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        s = standardise(replace(p, dtype=dtype))
        assert s.A.dtype == torch.float32
        assert s.restore(s.U0, s.c0)[0].dtype == dtype
    assert standardise(p, torch.float32).A.dtype == torch.float32


def test_offset_shifts_the_box() -> None:
    p = layer(20, 5, 3)
    R = normal(9, 20, 3)
    Y = RELU.apply(p.preactivation(p.weights, p.bias) + R)
    shifted = from_rows(p.inputs, Y, RELU, p.weights, p.bias, offset=R)
    plain = from_rows(p.inputs, Y, RELU, p.weights, p.bias)
    W, b = p.weights + 0.2, p.bias
    Z = p.preactivation(W, b) + R
    assert shifted.distance(W, b) == pytest.approx(float((Z - torch.clamp(Z, plain.lo, plain.hi)).norm()), rel=1e-12)
    assert shifted.original_distance() <= 1e-12
    assert shifted.reference_norm == plain.reference_norm


def test_relu_distance_by_its_formula() -> None:
    p = layer(25, 6, 4)
    Y = p.hi.clamp(min=0)
    W = p.weights + 0.3
    Z = p.preactivation(W, p.bias)
    expected = ((Z - Y)[Y > 0].square().sum() + Z[Y == 0].clamp(min=0).square().sum()).sqrt()
    assert p.distance(W, p.bias) == pytest.approx(float(expected), rel=1e-12)


A, Y, W, b = torch.ones(4, 3), torch.ones(4, 2), torch.ones(3, 2), torch.ones(2)
NAN = torch.tensor(math.nan)


@pytest.mark.parametrize(
    "inputs, reference, weights, bias, words",
    [
        (A[:, :2], Y, W, b, "2 rows"),
        (A[:3], Y, W, b, "boxes"),
        (A, Y[:, :1], W, b, "boxes"),
        (A, Y, W, b[:1], "bias"),
        (A[0], Y, W, b, "matrices"),
        (A * NAN, Y, W, b, "NaN"),
        (A * math.inf, Y, W, b, "NaN or inf"),
        (A, Y * NAN, W, b, "box"),
        (A, Y * math.inf, W, b, "box"),
        (A, Y, W * NAN, b, "weights"),
        (A, Y, W, b * NAN, "bias"),
    ],
)
@pytest.mark.parametrize("activation", [RELU, IDENTITY])
def test_refusals(activation, inputs, reference, weights, bias, words) -> None:
    with pytest.raises(InvalidInput, match=words):
        from_rows(inputs, reference, activation, weights, bias)


def test_more_refusals() -> None:
    with pytest.raises(InvalidInput, match="offset"):
        from_rows(A, Y, RELU, W, b, offset=torch.ones(2))
    p = layer(5, 3, 2)
    with pytest.raises(InvalidInput, match="bias"):
        replace(p, bias=None)
    with pytest.raises(InvalidInput, match="lo <= hi"):
        replace(p, lo=p.hi + 1)


@pytest.mark.parametrize("bias", [True, False])
def test_compressed_distances_allow_for_what_was_dropped(bias: bool) -> None:
    """Weights far larger than the original ones: what cancels in the Gram matrix is added to the distance."""
    A = normal(1, 200, 30) @ torch.diag(10.0 ** -torch.arange(30, dtype=torch.float64).div(5))
    W, b = normal(2, 30, 4), normal(3, 4) if bias else None
    rows = from_rows(A, A @ W if b is None else A @ W + b, IDENTITY, W, b)
    moments = Moments(W, b)
    moments.add(A, rows.lo, rows.lo)
    small = moments.program()
    for scale in (1.0, 60.0, 1e4):
        V = W + scale * normal(4, 30, 4)
        assert small.distance(V, b) >= rows.distance(V, b) * (1 - 1e-14)
        assert small.distance(V, b) == pytest.approx(rows.distance(V, b), rel=1e-4)


def test_a_ridge_adds_the_distance_of_the_weights_and_leaves_dead_inputs_dead() -> None:
    p = layer(40, 6, 3, seed=2)
    s = standardise(p, torch.float64, ridge=0.01, shuffled=True, rough=True)
    centred = p.inputs - p.inputs.mean(0)
    weight = 0.01 * float(centred.square().sum(0).mean())
    V = p.weights + normal(5, 6, 3)
    expected = p.distance(V, p.bias) ** 2 + weight * float((V - p.weights).square().sum())
    assert s.distance(*s.enter(V, p.bias)) ** 2 == pytest.approx(expected)
    assert torch.allclose(torch.linalg.vector_norm(s.A, dim=0), torch.ones(6, dtype=torch.float64))
    inputs = p.inputs.clone()
    inputs[:, 2] = 3.0
    assert standardise(replace(p, inputs=inputs), ridge=0.01).live.tolist() == [True, True, False, True, True, True]


@pytest.mark.parametrize("rough", [True, False])
@pytest.mark.parametrize("shuffled", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 0.01])
@pytest.mark.parametrize("bias", [True, False])
def test_standardising_in_blocks_of_rows(bias: bool, ridge: float, shuffled: bool, rough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks give what one gives, and what the definitions give, rows apart, with a dead input and one that is nearly constant."""
    p = layer(150, 7, 4, bias=bias, seed=6)
    inputs = p.inputs.clone()
    inputs[:, 3] = 0.0
    inputs[:, 5] = 40.0 + 0.1 * inputs[:, 5]
    p = replace(p, inputs=inputs)
    whole = standardise(p, ridge=ridge, shuffled=shuffled, rough=rough)
    monkeypatch.setattr(program, "BLOCK_ENTRIES", 1)  # 64 rows at least
    s = standardise(p, ridge=ridge, shuffled=shuffled, rough=rough)
    for name in ("A", "lo", "hi", "scale", "gram", "U0", "values"):
        assert torch.allclose(getattr(s, name), getattr(whole, name), rtol=1e-12, atol=1e-12), name
    live = [0, 1, 2, 4, 5, 6]
    assert s.live.nonzero().flatten().tolist() == live
    A = inputs[:, live] - inputs[:, live].mean(0) if bias else inputs[:, live]
    weight = ridge * float(A.square().sum(0).mean())
    scale = (A.square().sum(0) + weight).sqrt()
    rows = torch.cat([A, weight**0.5 * torch.eye(6, dtype=torch.float64)]) if ridge else A
    wanted = torch.cat([rows / scale, torch.cat([p.lo, weight**0.5 * p.weights[live]]) if ridge else p.lo], 1)
    wanted[wanted == -math.inf] = -1e3
    own = torch.cat([s.A, s.lo], 1)
    own[own == -math.inf] = -1e3

    def ordered(values: torch.Tensor) -> torch.Tensor:
        return values[(values @ normal(7, values.shape[1])).argsort()]  # the ridge's rows have zeros in common

    assert torch.allclose(ordered(own), ordered(wanted), rtol=1e-12, atol=1e-12)
    assert torch.allclose(s.gram, (rows / scale).T @ (rows / scale), rtol=1e-12, atol=1e-12)
    assert torch.allclose(s.scale, scale)
