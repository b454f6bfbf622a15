"""The CVXPY twins against problems solved by hand, optimality conditions and the duality of docs/theory.md section 3."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest

from nettrim.status import InvalidInput

pytest.importorskip("cvxpy")
pytest.importorskip("clarabel")

from nettrim.solvers import reference
from nettrim.solvers.reference import MissingExtra, SolverFailed, halfspace_l1, nearest, preimage_l1, preimage_penalty

INF = np.inf


def relu_layer(seed: int, P: int = 30, N: int = 6, M: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, ReLU outputs and the outputs' preimage box of a random layer."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((P, N))
    Y = np.maximum(A @ rng.standard_normal((N, M)) + 0.3 * rng.standard_normal(M), 0.0)
    return A, Y, np.where(Y > 0, Y, -INF), Y


def column(*values: float) -> np.ndarray:
    return np.array(values, dtype=float)[:, None]


# Solved by hand -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_one_weight_l1(scale: float) -> None:
    """min |w| subject to sqrt(5) |w - scale| <= eps has w = scale - eps / sqrt(5), in every unit of the outputs."""
    eps = 0.5 * scale
    found = preimage_l1(column(1, 2), scale * column(1, 2), scale * column(1, 2), eps, bias=False)
    assert found.weights[0, 0] == pytest.approx(scale - eps / np.sqrt(5), rel=1e-7)
    assert found.objective == pytest.approx(abs(found.weights[0, 0]))
    assert found.distance == pytest.approx(eps, rel=1e-7)
    assert found.bias is None and found.status == "optimal"


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
def test_one_weight_penalty(scale: float) -> None:
    """min 1/2 5 scale^2 (w - 1)^2 + penalty |w| has w = 1 - penalty / (5 scale^2): both units enter the scaling."""
    penalty = 2.0 * scale**2
    found = preimage_penalty(scale * column(1, 2), scale * column(1, 2), scale * column(1, 2), penalty, bias=False)
    assert found.weights[0, 0] == pytest.approx(0.6, rel=1e-6)
    assert found.objective == pytest.approx(0.5 * 5 * scale**2 * 0.16 + 0.6 * penalty, rel=1e-8)


@pytest.mark.parametrize(
    ("lo", "hi", "eps", "weight"),
    [
        (-INF, -1.0, 0.25, -0.75),  # below a finite upper side
        (2.0, INF, 0.25, 1.75),  # above a finite lower side
        (2.0, 3.0, 0.5, 1.5),  # both sides finite: the nearer one binds
        (-3.0, -2.0, 0.0, -2.0),
        (-1.0, 1.0, 0.0, 0.0),
    ],
)
def test_one_sided_and_two_sided_boxes(lo: float, hi: float, eps: float, weight: float) -> None:
    found = preimage_l1(column(1), column(lo), column(hi), eps, bias=False)
    assert found.weights[0, 0] == pytest.approx(weight, abs=1e-7)
    assert found.distance == pytest.approx(eps, abs=1e-7)


def test_exact_and_invertible_gives_the_inverse() -> None:
    rng = np.random.default_rng(0)
    A, W = rng.standard_normal((4, 4)) + 4 * np.eye(4), rng.standard_normal((4, 2))
    found = preimage_l1(A, A @ W, A @ W, 0.0, bias=False)
    np.testing.assert_allclose(found.weights, W, atol=1e-8)
    assert found.objective == pytest.approx(np.abs(W).sum(), rel=1e-8)


def test_bias_is_free() -> None:
    """A constant target costs nothing: the bias meets it, and no weight is used."""
    A = np.random.default_rng(1).standard_normal((5, 3))
    target = np.tile([[7.0, -2.0]], (5, 1))
    found = preimage_l1(A, target, target, 0.0)
    assert found.objective == pytest.approx(0.0, abs=1e-7)
    np.testing.assert_allclose(found.bias, [7.0, -2.0], atol=1e-7)


@pytest.mark.parametrize("bias", [False, True])
def test_boxes_without_finite_sides_give_zero_weights(bias: bool) -> None:
    A = np.random.default_rng(2).standard_normal((4, 3))
    lo, hi = np.full((4, 2), -INF), np.full((4, 2), INF)
    for found in (
        preimage_l1(A, lo, hi, 0.1, bias=bias),
        preimage_l1(A, lo, hi, 0.0, bias=bias),
        preimage_penalty(A, lo, hi, 1.0, bias=bias),
    ):
        np.testing.assert_allclose(found.weights, 0.0, atol=1e-8)
        assert found.distance == 0.0
    assert nearest(A, lo, hi, bias).objective == 0.0


def test_halfspace_by_hand() -> None:
    """One weight: w = 1 - eps by the first sample; the second, off Omega, only asks -w <= V."""
    A, Y = column(1, -1), column(1, 0)
    assert halfspace_l1(A, Y, 0.5, bias=False).weights[0, 0] == pytest.approx(0.5, abs=1e-7)
    tight = halfspace_l1(A, Y, 0.5, V=column(0, -0.8), bias=False)
    assert tight.weights[0, 0] == pytest.approx(0.8, abs=1e-7)


def test_halfspace_bias_penalised_or_not() -> None:
    """2 w + b = 1: penalised, the weight is the cheaper (1/2 against 1); free, the bias does it all. Units as given."""
    for scale in (1.0, 100.0):
        A, Y = column(2 * scale), column(1)
        found = halfspace_l1(A, Y, 0.0)
        assert found.weights[0, 0] == pytest.approx(0.5 / scale, rel=1e-6)
        assert found.objective == pytest.approx(0.5 / scale, rel=1e-6)
        assert found.bias is not None and found.bias[0] == pytest.approx(0.0, abs=1e-7)
        free = halfspace_l1(A, Y, 0.0, penalise_bias=False)
        assert free.objective == pytest.approx(0.0, abs=1e-7)
        assert free.bias is not None and free.bias[0] == pytest.approx(1.0, abs=1e-7)
    cheaper = halfspace_l1(column(0.5), column(1), 0.0)
    assert cheaper.bias is not None and cheaper.bias[0] == pytest.approx(1.0, abs=1e-7)


def test_nearest_is_least_squares_for_points_and_less_for_boxes() -> None:
    A, Y, _, _ = relu_layer(3)
    Y = Y + 0.1 * np.random.default_rng(3).standard_normal(Y.shape)  # out of reach
    ones = np.hstack([A, np.ones((len(A), 1))])
    residual = Y - ones @ np.linalg.lstsq(ones, Y, rcond=None)[0]
    assert nearest(A, Y, Y, True).objective == pytest.approx(np.linalg.norm(residual), rel=1e-8)
    assert nearest(A, np.where(Y > 0, Y, -INF), np.maximum(Y, 0.0)).distance < np.linalg.norm(residual)
    assert nearest(column(1, 1), column(0, 2), column(0, 2), False).objective == pytest.approx(np.sqrt(2))


# Optimality conditions and duality --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_penalty_optimality_conditions(seed: int, bias: bool) -> None:
    """With D = Z - T: A^T D = -penalty sign(W) on the support, |A^T D| <= penalty off it, columns of D sum to zero."""
    A, _, lo, hi = relu_layer(seed)
    penalty = 3.0
    found = preimage_penalty(A, lo, hi, penalty, bias=bias)
    Z = A @ found.weights + (found.bias if found.bias is not None else 0.0)
    D = Z - np.clip(Z, lo, hi)
    pull = A.T @ D
    support = np.abs(found.weights) > 1e-6
    assert support.any() and not support.all()
    np.testing.assert_allclose(pull[support], -penalty * np.sign(found.weights[support]), atol=1e-5)
    assert np.abs(pull).max() <= penalty + 1e-5
    if bias:
        np.testing.assert_allclose(D.sum(axis=0), 0.0, atol=1e-5)
    assert found.objective == pytest.approx(0.5 * np.linalg.norm(D) ** 2 + penalty * np.abs(found.weights).sum())


def balanced(D: np.ndarray, bias: bool) -> np.ndarray:
    """docs/theory.md (3.5): positive and negative parts rescaled so that each column sums to zero."""
    if not bias:
        return D
    plus, minus = np.maximum(D, 0), np.maximum(-D, 0)
    p, m = plus.sum(axis=0), minus.sum(axis=0)
    least = np.minimum(p, m)
    return plus * np.divide(least, p, out=np.zeros_like(p), where=p > 0) - minus * np.divide(least, m, out=np.zeros_like(m), where=m > 0)


def support_function(Theta: np.ndarray, lo: np.ndarray, hi: np.ndarray) -> float:
    """sup over the box of <Theta, T>; entries where Theta is 0 count 0."""
    sides = np.where(Theta > 0, hi, lo)
    return float(np.multiply(Theta, sides, out=np.zeros_like(Theta), where=Theta != 0).sum())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_dual_bound_is_valid_and_tight(bias: bool, noise: float) -> None:
    """docs/theory.md (3.2), (3.5), (3.6): below the optimum for every t and from every point, equal to it at the optimum."""
    A, Y, lo, hi = relu_layer(4)
    eps = 0.1 * float(np.linalg.norm(Y))
    found = preimage_l1(A, lo, hi, eps, bias=bias)
    W = found.weights + noise * np.random.default_rng(4).standard_normal(found.weights.shape)
    Z = A @ W + (found.bias if found.bias is not None else 0.0)
    D = balanced(Z - np.clip(Z, lo, hi), bias)
    limit = 1.0 / np.abs(A.T @ D).max(axis=0)
    bounds = []
    for t in np.geomspace(1e-3, 1e3, 4000) * limit.max():
        Theta = D * np.minimum(t, limit)
        assert np.abs(A.T @ Theta).max() <= 1 + 1e-12
        bounds.append(-support_function(Theta, lo, hi) - eps * float(np.linalg.norm(Theta)))
    assert max(bounds) <= found.objective * (1 + 1e-8)
    if noise == 0.0:
        assert max(bounds) >= found.objective * (1 - 5e-3)


@pytest.mark.parametrize("bias", [False, True])
def test_dual_bound_of_the_penalised_program(bias: bool) -> None:
    """docs/theory.md (3.8), (3.9): the best factor of each column is closed form, and the gap at the optimum is zero."""
    A, _, lo, hi = relu_layer(5)
    penalty = 2.0
    found = preimage_penalty(A, lo, hi, penalty, bias=bias)
    Z = A @ found.weights + (found.bias if found.bias is not None else 0.0)
    D = balanced(Z - np.clip(Z, lo, hi), bias)
    bound = 0.0
    for m in range(D.shape[1]):
        d = D[:, m : m + 1]
        sup = support_function(d, lo[:, m : m + 1], hi[:, m : m + 1])
        square = float((d**2).sum())
        tau = float(np.clip(-sup / square, 0.0, penalty / np.abs(A.T @ d).max()))
        bound += -tau * sup - 0.5 * tau**2 * square
    assert bound <= found.objective * (1 + 1e-8)
    assert bound >= found.objective * (1 - 1e-5)


# Refusals ----------------------------------------------------------------------------------------------------------------


def test_out_of_reach_is_an_error_and_not_a_solution() -> None:
    with pytest.raises(SolverFailed, match="infeasible"):
        preimage_l1(column(1, 1), column(0, 2), column(0, 2), 1.0, bias=False)


def test_missing_cvxpy_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "cvxpy":
            raise ImportError("no cvxpy")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtra, match=r"nettrim\[reference\]"):
        reference._cvxpy()


GOOD = np.ones((3, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: preimage_l1(np.ones(3), GOOD, GOOD, 1.0), "matrix"),
        (lambda: preimage_l1(np.ones((0, 2)), GOOD, GOOD, 1.0), "empty"),
        (lambda: preimage_l1(np.ones((4, 2)), GOOD, GOOD, 1.0), "rows"),
        (lambda: preimage_l1(GOOD * np.nan, GOOD, GOOD, 1.0), "NaN"),
        (lambda: preimage_l1(GOOD * INF, GOOD, GOOD, 1.0), "infinite"),
        (lambda: preimage_l1(GOOD, GOOD * np.nan, GOOD, 1.0), "NaN"),
        (lambda: preimage_l1(GOOD, GOOD[:, :1], GOOD, 1.0), "agree"),
        (lambda: preimage_l1(GOOD, 2 * GOOD, GOOD, 1.0), "box is empty"),
        (lambda: preimage_l1(GOOD, GOOD * INF, GOOD * INF, 1.0), "box is empty"),
        (lambda: preimage_l1(GOOD, GOOD, GOOD, -1.0), "epsilon"),
        (lambda: preimage_l1(GOOD, GOOD, GOOD, float("nan")), "epsilon"),
        (lambda: preimage_penalty(GOOD, GOOD, GOOD, -1.0), "penalty"),
        (lambda: halfspace_l1(GOOD, -GOOD, 1.0), "negative"),
        (lambda: halfspace_l1(GOOD, GOOD, 1.0, V=GOOD[:, :1]), "V has shape"),
        (lambda: halfspace_l1(GOOD, GOOD, -1.0), "epsilon"),
    ],
)
def test_refuses_bad_input(call: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        call()
