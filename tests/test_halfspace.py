"""The published ADMM against CVXPY on the same program, and the published program against the preimage program."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nettrim.solvers.halfspace import HalfspaceSolution, published_admm
from nettrim.status import InvalidInput


def relu_layer(seed: int, P: int = 60, N: int = 10, M: int = 4, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of a random ReLU layer with half of its weights zero; ``scale`` sets the units of the inputs."""
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(P, N, generator=g, dtype=torch.float64)
    W = torch.randn(N, M, generator=g, dtype=torch.float64) * (torch.rand(N, M, generator=g) < 0.5)
    b = 0.3 * torch.randn(M, generator=g, dtype=torch.float64)
    return scale * A, (scale * (A @ W + b)).clamp_min(0.0)


def norm(Y: Tensor) -> float:
    return float(torch.linalg.vector_norm(Y))


@pytest.mark.parametrize(
    ("seed", "gain", "bias", "scale"),
    [(0, 0.05, True, 1.0), (1, 0.1, True, 1.0), (2, 0.1, False, 1.0), (3, 0.3, True, 20.0), (4, 0.02, True, 0.1)],
)
def test_reaches_the_optimum_of_the_published_program(seed: int, gain: float, bias: bool, scale: float) -> None:
    pytest.importorskip("cvxpy")
    from nettrim.solvers.reference import halfspace_l1

    A, Y = relu_layer(seed, scale=scale)
    if not bias:
        A = A[:, :-1]
        Y = (A @ torch.ones(A.shape[1], 2, dtype=torch.float64)).clamp_min(0.0)
    eps = gain * norm(Y)
    found = published_admm(A, Y, eps, bias=bias, rho=20.0, iterations=20000, stop=1e-9)
    best = halfspace_l1(A.numpy(), Y.numpy(), eps, bias=bias)
    assert found.converged
    assert found.objective == pytest.approx(best.objective, rel=1e-3)
    assert found.omega_residual <= eps * (1 + 1e-3)
    assert found.largest_violation <= 1e-3 * float(Y.max())
    np.testing.assert_allclose(found.weights.numpy(), best.weights, atol=2e-2)


def test_bounds_V_are_respected() -> None:
    pytest.importorskip("cvxpy")
    from nettrim.solvers.reference import halfspace_l1

    A, Y = relu_layer(5)
    V = torch.rand(Y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64) - 0.1
    V = torch.where(Y > 0, -100.0, V)  # entries on Omega must not matter
    eps = 0.1 * norm(Y)
    found = published_admm(A, Y, eps, V=V, rho=20.0, iterations=20000, stop=1e-9)
    best = halfspace_l1(A.numpy(), Y.numpy(), eps, V=V.numpy())
    assert found.objective == pytest.approx(best.objective, rel=1e-3)
    assert found.largest_violation <= 1e-3 * float(Y.max())
    assert found.objective != pytest.approx(published_admm(A, Y, eps, rho=20.0, iterations=20000, stop=1e-9).objective, rel=1e-3)


def test_a_linear_last_layer_is_omega_everywhere() -> None:
    """With Omega everywhere the program is min ||W||_1 subject to ||A W - Y||_F <= epsilon: a box of points."""
    pytest.importorskip("cvxpy")
    from nettrim.solvers.reference import preimage_l1

    A, _ = relu_layer(6)
    Y = A @ torch.randn(A.shape[1], 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    eps = 0.1 * norm(Y)
    found = published_admm(A, Y, eps, omega=torch.ones_like(Y, dtype=torch.bool), bias=False, rho=20.0, iterations=20000, stop=1e-9)
    best = preimage_l1(A.numpy(), Y.numpy(), Y.numpy(), eps, bias=False)
    assert found.objective == pytest.approx(best.objective, rel=1e-3)
    assert found.distance == pytest.approx(eps, rel=1e-3)
    assert found.largest_violation == 0.0


@pytest.mark.parametrize("gain", [1.0, 3.0])
def test_large_epsilon_gives_zero_weights(gain: float) -> None:
    A, Y = relu_layer(0)
    found = published_admm(A, Y, gain * norm(Y))
    assert found.converged
    assert float(found.weights.abs().max()) == 0.0
    assert found.bias is not None and float(found.bias.abs().max()) == 0.0
    assert found.objective == 0.0
    assert found.distance == pytest.approx(norm(Y))


def test_all_zero_inputs_and_outputs_are_no_special_case() -> None:
    found = published_admm(torch.zeros(4, 3), torch.zeros(4, 2), 0.0, bias=False)
    assert found.converged and found.objective == 0.0 and found.distance == 0.0


def test_the_program_does_not_depend_on_the_units() -> None:
    """Scaling inputs and outputs together by a power of two changes no iterate: that is what c0 is for."""
    A, Y = relu_layer(7)
    small = published_admm(A, Y, 0.1 * norm(Y), bias=False, iterations=300)
    large = published_admm(1024 * A, 1024 * Y, 1024 * 0.1 * norm(Y), bias=False, iterations=300)
    torch.testing.assert_close(small.weights, large.weights, rtol=1e-9, atol=1e-12)
    assert large.distance == pytest.approx(1024 * small.distance)


def test_numbers_are_recomputed_from_the_weights_in_the_original_units() -> None:
    A, Y = relu_layer(8, scale=5.0)
    found = published_admm(A, Y, 0.1 * norm(Y), iterations=20)  # far from converged: nothing is small
    assert not found.converged and found.iterations == 20
    assert found.bias is not None
    Z = A @ found.weights + found.bias
    on = Y > 0
    assert found.omega_residual == pytest.approx(norm((Z - Y)[on]))
    assert found.largest_violation == pytest.approx(max(0.0, float(Z[~on].max())))
    assert found.distance == pytest.approx(norm(torch.where(on, Z - Y, Z.clamp_min(0.0))))
    assert found.objective == pytest.approx(float(found.weights.abs().sum() + found.bias.abs().sum()))
    assert norm(Z.clamp_min(0.0) - Y) <= found.distance  # Lemma 1


def test_outputs_too_small_for_omega_still_count_in_the_distance() -> None:
    A = torch.eye(2)
    Y = torch.tensor([[1.0], [1e-7]])
    found = published_admm(A, Y, 0.0, bias=False, iterations=5000)
    assert found.distance >= 0.99e-7


def test_inputs_are_left_alone_and_any_dtype_is_taken() -> None:
    A, Y = (value.float().requires_grad_() for value in relu_layer(9))
    before = A.detach().clone()
    found = published_admm(A, Y, 0.1 * norm(Y.detach()), iterations=10)
    assert torch.equal(A.detach(), before)
    assert found.weights.dtype == torch.float64 and not found.weights.requires_grad
    assert found.weights.shape == (10, 4) and found.bias is not None and found.bias.shape == (4,)


def test_callback_sees_the_iterates() -> None:
    A, Y = relu_layer(0)
    seen: list[tuple[int, HalfspaceSolution]] = []
    found = published_admm(A, Y, 0.1 * norm(Y), iterations=100, callback=lambda k, s: seen.append((k, s)), callback_every=25)
    assert [k for k, _ in seen] == [25, 50, 75, 100] == [s.iterations for _, s in seen]
    assert seen[-1][1].objective == found.objective
    assert seen[-1][1].distance == found.distance


# Against the preimage program (docs/theory.md section 2) ------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["none", "free"])
@pytest.mark.parametrize("seed", range(4))
def test_preimage_optimum_is_never_above(seed: int, bias: str) -> None:
    """The same treatment of the bias, V = 0: docs/theory.md (2.3)."""
    pytest.importorskip("cvxpy")
    from nettrim.solvers.reference import halfspace_l1, preimage_l1

    A, Y = (value.numpy() for value in relu_layer(seed, P=40, N=8, M=3))
    if bias == "none":
        A = np.hstack([A, np.ones((len(A), 1))])
    eps = [0.05, 0.2][seed % 2] * float(np.linalg.norm(Y))
    preimage = preimage_l1(A, np.where(Y > 0, Y, -np.inf), Y, eps, bias=bias == "free")
    published = halfspace_l1(A, Y, eps, bias=bias == "free", penalise_bias=False)
    assert preimage.objective <= published.objective * (1 + 1e-7)
    assert published.distance <= eps * (1 + 1e-7)  # feasible there, feasible here
    # Both guarantee the same: the layer's output moves by at most epsilon.
    for found in (preimage, published):
        Z = A @ found.weights + (0.0 if found.bias is None else found.bias)
        assert np.linalg.norm(np.maximum(Z, 0.0) - Y) <= eps * (1 + 1e-7)


def test_preimage_with_a_free_bias_is_below_the_published_weights_however_their_bias_is_charged() -> None:
    pytest.importorskip("cvxpy")
    from nettrim.solvers.reference import halfspace_l1, preimage_l1

    A, Y = (value.numpy() for value in relu_layer(1))
    eps = 0.1 * float(np.linalg.norm(Y))
    preimage = preimage_l1(A, np.where(Y > 0, Y, -np.inf), Y, eps)
    assert preimage.objective <= np.abs(halfspace_l1(A, Y, eps).weights).sum() * (1 + 1e-7)


def test_published_cascade_is_inside_the_preimage_program_with_the_same_gamma() -> None:
    """Inputs differ from the reference's, V is the original response to them: docs/theory.md (2.4)."""
    pytest.importorskip("cvxpy")
    from nettrim.solvers.reference import halfspace_l1, preimage_l1

    g = torch.Generator().manual_seed(11)
    A = torch.randn(50, 8, generator=g, dtype=torch.float64).numpy()
    W = torch.randn(8, 3, generator=g, dtype=torch.float64).numpy()
    Y = np.maximum(A @ W, 0.0)
    A_hat = A + 0.1 * torch.randn(50, 8, generator=g, dtype=torch.float64).numpy()
    V, lo = A_hat @ W, np.where(Y > 0, Y, -np.inf)
    gamma = 1.1
    eps = float(np.sqrt(gamma) * np.linalg.norm((V - Y)[Y > 0]))
    published = halfspace_l1(A_hat, Y, eps, V=V, bias=False)
    allowed = float(np.sqrt(gamma) * np.linalg.norm(V - np.clip(V, lo, Y)))
    assert published.distance <= allowed * (1 + 1e-7)
    assert preimage_l1(A_hat, lo, Y, allowed, bias=False).objective <= published.objective * (1 + 1e-7)


# Refusals ----------------------------------------------------------------------------------------------------------------

GOOD = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: published_admm(np.ones((3, 2)), GOOD, 1.0), "torch tensor"),  # type: ignore[arg-type]
        (lambda: published_admm(torch.ones(3), GOOD, 1.0), "matrix"),
        (lambda: published_admm(torch.ones(4, 2), GOOD, 1.0), "rows"),
        (lambda: published_admm(torch.ones(0, 2), torch.ones(0, 2), 1.0), "empty"),
        (lambda: published_admm(torch.ones(3, 0), GOOD, 1.0), "empty"),
        (lambda: published_admm(GOOD * float("nan"), GOOD, 1.0), "NaN"),
        (lambda: published_admm(GOOD, GOOD * float("inf"), 1.0), "infinite"),
        (lambda: published_admm(GOOD.to(torch.complex64), GOOD, 1.0), "complex"),
        (lambda: published_admm(GOOD, -GOOD, 1.0), "negative"),
        (lambda: published_admm(GOOD, GOOD, 1.0, V=torch.ones(3, 1)), "V has shape"),
        (lambda: published_admm(GOOD, GOOD, 1.0, omega=GOOD), "omega"),
        (lambda: published_admm(GOOD, GOOD, -1.0), "epsilon"),
        (lambda: published_admm(GOOD, GOOD, float("nan")), "epsilon"),
        (lambda: published_admm(GOOD, GOOD, 1.0, rho=0.0), "rho"),
        (lambda: published_admm(GOOD, GOOD, 1.0, stop=-1.0), "stop"),
        (lambda: published_admm(GOOD, GOOD, 1.0, iterations=0), "iterations"),
        (lambda: published_admm(GOOD, GOOD, 1.0, callback_every=0), "iterations"),
    ],
)
def test_refuses_bad_input(call: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        call()
