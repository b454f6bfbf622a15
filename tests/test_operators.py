"""Linear maps of the published ADMM: adjoints, the Gram entry, and agreement with the matrix form on the unfolded matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nettrim.solvers.halfspace import HalfspaceSolution, published_admm
from nettrim.solvers.operators import ConvolutionMap, LinearMap, MatrixMap
from nettrim.status import InvalidInput


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def norm(Y: Tensor) -> float:
    return float(torch.linalg.vector_norm(Y))


def explicit(A: LinearMap) -> Tensor:
    """The matrix of a map, one column per weight, from its responses to single weights."""
    count = int(torch.tensor(A.weights_shape).prod())
    return torch.stack([A.apply(unit.reshape(A.weights_shape)).flatten() for unit in torch.eye(count, dtype=torch.float64)], dim=1)


def unfolded(A: ConvolutionMap, x: Tensor, kernel: tuple[int, int], **how: Any) -> Tensor:
    """The patches of ``x`` as rows (B * H' * W', C * kh * kw): for groups=1 the convolution is this matrix times the kernels."""
    patches = F.unfold(x, kernel, **how)
    assert patches.shape[2] == A.outputs_shape[2] * A.outputs_shape[3]
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def as_rows(Z: Tensor) -> Tensor:
    """(B, O, H', W') as (B * H' * W', O)."""
    return Z.permute(0, 2, 3, 1).reshape(-1, Z.shape[1])


class Counted:
    """A map that counts its applications: the steps of conjugate gradients show in them."""

    def __init__(self, A: LinearMap) -> None:
        self.A, self.applied = A, 0
        self.weights_shape, self.outputs_shape, self.device = A.weights_shape, A.outputs_shape, A.device

    def apply(self, W: Tensor) -> Tensor:
        self.applied += 1
        return self.A.apply(W)

    def adjoint(self, Z: Tensor) -> Tensor:
        return self.A.adjoint(Z)

    def largest_gram_entry(self) -> float:
        return self.A.largest_gram_entry()

    def split(self, W: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.A.split(W)


SIZES = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[ConvolutionMap, Tensor, dict[str, Any], tuple[int, ...]]:
    """A random convolution with its inputs and settings."""
    groups, own, out = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    kernel, height, width = draw(SIZES), draw(st.integers(1, 7)), draw(st.integers(1, 7))
    padding: Any = draw(st.one_of(st.sampled_from([0, 1, (2, 0), "valid"]), st.just("same")))
    how = {
        "stride": 1 if padding == "same" else draw(SIZES),
        "padding": padding,
        "dilation": draw(SIZES),
        "groups": groups,
    }
    pads = (0, 0) if padding == "valid" else (padding, padding) if isinstance(padding, int) else padding
    if padding != "same":
        assume(all(size + 2 * p > d * (k - 1) for size, p, d, k in zip((height, width), pads, how["dilation"], kernel, strict=True)))
    x = normal(draw(st.integers(0, 99)), draw(st.integers(1, 3)), groups * own, height, width)
    shape = (groups * out, own, *kernel)
    return ConvolutionMap(x, shape, bias=draw(st.booleans()), **how), x, how, shape


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")  # of the torch.conv2d it is compared with
@settings(max_examples=80)
@given(convolutions(), st.integers(0, 99))
def test_the_convolution_is_torchs_and_its_adjoint_is_one(made: Any, seed: int) -> None:
    A, x, how, shape = made
    assert isinstance(A, LinearMap)
    W, Z = normal(seed, *A.weights_shape), normal(seed + 1, *A.outputs_shape)
    kernel, bias = A.split(W)
    assert tuple(kernel.shape) == shape
    AW = A.apply(W)
    torch.testing.assert_close(AW, F.conv2d(x, kernel, bias, **how), rtol=1e-12, atol=1e-12)
    assert torch.equal(A.join(kernel, bias), W)
    back = A.adjoint(Z)
    assert tuple(back.shape) == A.weights_shape
    allowed = 1e-13 * (norm(AW) * norm(Z) + norm(W) * norm(back))
    assert abs(float((AW * Z).sum() - (W * back).sum())) <= allowed
    X = explicit(A)
    torch.testing.assert_close(back.flatten(), X.T @ Z.flatten(), rtol=1e-12, atol=1e-12)
    assert A.largest_gram_entry() == pytest.approx(float((X.T @ X).max()), rel=1e-12)  # over all entries, not the diagonal alone


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_a_matrix_map_has_its_adjoint_and_its_gram_entry(P: int, N: int, M: int, bias: bool, seed: int) -> None:
    A = MatrixMap(normal(seed, P, N), M, bias=bias)
    W, Z = normal(seed + 1, *A.weights_shape), normal(seed + 2, *A.outputs_shape)
    weights, b = A.split(W)
    torch.testing.assert_close(A.apply(W), normal(seed, P, N) @ weights + (0.0 if b is None else b))
    assert float((A.apply(W) * Z).sum()) == pytest.approx(float((W * A.adjoint(Z)).sum()), rel=1e-11, abs=1e-11)
    X = explicit(A)
    assert A.largest_gram_entry() == pytest.approx(float((X.T @ X).max()), rel=1e-12, abs=1e-300)


def layer(**how: Any) -> tuple[ConvolutionMap, Tensor, Tensor]:
    """A convolutional ReLU layer with half of its weights zero: map, inputs, outputs."""
    x = normal(0, 3, 2, 7, 6)
    A = ConvolutionMap(x, (4, 2 // how.get("groups", 1), 3, 2), **how)
    W = normal(1, *A.weights_shape) * (torch.rand(A.weights_shape, generator=torch.Generator().manual_seed(2)) < 0.5)
    return A, x, A.apply(W).clamp_min(0.0)


def check_recomputed(found: HalfspaceSolution, A: ConvolutionMap, Y: Tensor) -> None:
    """The stated numbers are those of the weights."""
    Z = A.apply(A.join(found.weights, found.bias))
    on = Y > 1e-6
    assert found.omega_residual == pytest.approx(norm((Z - Y)[on]), rel=1e-12)
    assert found.largest_violation == pytest.approx(max(0.0, float(Z[~on].max())), rel=1e-12, abs=1e-15)
    assert found.distance == pytest.approx(norm(torch.where(Y > 0, Z - Y, Z.clamp_min(0.0))), rel=1e-12)
    total = float(found.weights.abs().sum()) + (0.0 if found.bias is None else float(found.bias.abs().sum()))
    assert found.objective == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("how", [{}, {"stride": 2, "padding": 1}, {"padding": (2, 1), "dilation": (2, 3)}], ids=str)
def test_a_convolution_is_its_unfolded_matrix(how: dict[str, Any], bias: bool) -> None:
    """The same iterations as the matrix form: with many conjugate-gradient steps to 1e-8, with the published 10 nearly."""
    A, x, Y = layer(bias=bias, **how)
    rows = unfolded(A, x, (3, 2), **how)
    epsilon = 0.1 * norm(Y)
    matrix = published_admm(rows, as_rows(Y), epsilon, bias=bias, iterations=150, stop=0.0)
    exact = published_admm(A, Y, epsilon, iterations=150, stop=0.0, cg_steps=100)
    assert matrix.iterations == exact.iterations == 150
    assert exact.weights.shape == (4, 2, 3, 2)
    torch.testing.assert_close(exact.weights.flatten(1).T, matrix.weights, rtol=0.0, atol=1e-8)
    if bias:
        assert exact.bias is not None and matrix.bias is not None
        torch.testing.assert_close(exact.bias, matrix.bias, rtol=0.0, atol=1e-8)
    else:
        assert exact.bias is None
    for name in ("objective", "omega_residual", "largest_violation", "distance"):
        assert getattr(exact, name) == pytest.approx(getattr(matrix, name), rel=1e-8, abs=1e-8)
    published = published_admm(A, Y, epsilon, iterations=150, stop=0.0)
    assert norm(published.weights - exact.weights) <= 1e-3 * norm(exact.weights)
    check_recomputed(published, A, Y)


def test_groups_agree_with_the_explicit_matrix_with_one_epsilon_for_all() -> None:
    A, _, Y = layer(groups=2, padding="same")
    epsilon = 0.1 * norm(Y)
    found = published_admm(A, Y, epsilon, iterations=100, stop=0.0, cg_steps=100)
    matrix = published_admm(explicit(A), Y.reshape(-1, 1), epsilon, bias=False, iterations=100, stop=0.0)
    torch.testing.assert_close(A.join(found.weights, found.bias).reshape(-1, 1), matrix.weights, rtol=0.0, atol=1e-8)


def test_the_published_steps_end_near_the_optimum_of_the_program() -> None:
    """Ten steps solve step 5 only about; the iteration still ends within a thousandth of the optimum that CVXPY finds."""
    pytest.importorskip("cvxpy")
    from nettrim.solvers.reference import halfspace_l1

    A, x, Y = layer(stride=2)
    epsilon = 0.1 * norm(Y)
    found = published_admm(A, Y, epsilon, rho=20.0, iterations=3000, stop=1e-7)
    best = halfspace_l1(unfolded(A, x, (3, 2), stride=2).numpy(), as_rows(Y).numpy(), epsilon)
    assert found.converged
    assert found.objective == pytest.approx(best.objective, rel=1e-3)
    assert found.omega_residual <= epsilon * (1 + 1e-3)
    assert found.largest_violation <= 1e-3 * float(Y.max())


@pytest.mark.parametrize("bias", [True, False])
def test_a_wrapped_matrix_agrees_with_the_matrix(bias: bool) -> None:
    A = normal(3, 60, 10)
    Y = (A @ normal(4, 10, 4)).clamp_min(0.0)
    V = normal(5, 60, 4).abs()
    epsilon = 0.1 * norm(Y)
    matrix = published_admm(A, Y, epsilon, V=V, bias=bias, iterations=150)
    wrapped = published_admm(MatrixMap(A, 4, bias=bias), Y, epsilon, V=V, iterations=150, cg_steps=100)
    torch.testing.assert_close(wrapped.weights, matrix.weights, rtol=0.0, atol=1e-8)
    assert (wrapped.bias is None) == (matrix.bias is None) == (not bias)
    assert wrapped.distance == pytest.approx(matrix.distance, rel=1e-8)


def test_conjugate_gradient_steps_are_counted_and_start_from_zero() -> None:
    A, _, Y = layer()
    few, many = Counted(A), Counted(A)
    # an iteration applies A once per step and once for A(W3); besides, one check of the map and one solution at the end
    published_admm(few, Y, 0.1 * norm(Y), iterations=5, stop=0.0)
    published_admm(many, Y, 0.1 * norm(Y), iterations=5, stop=0.0, cg_steps=12)
    assert few.applied == 5 * (10 + 1) + 2
    assert many.applied == 5 * (12 + 1) + 2


def test_a_linear_convolution_takes_omega_and_cascade_bounds() -> None:
    A, _, Y = layer()
    Z = A.apply(normal(7, *A.weights_shape))
    linear = published_admm(A, Z, 0.1 * norm(Z), omega=torch.ones_like(Z, dtype=torch.bool), rho=20.0, iterations=500)
    assert linear.largest_violation == 0.0 and linear.distance == linear.omega_residual <= 0.1 * norm(Z) * (1 + 1e-3)
    V = torch.where(Y > 0, -100.0, 0.5 * torch.ones_like(Y))  # entries on Omega must not matter
    loose = published_admm(A, Y, 0.1 * norm(Y), V=V, rho=20.0, iterations=500)
    tight = published_admm(A, Y, 0.1 * norm(Y), rho=20.0, iterations=500)
    assert loose.objective < tight.objective * 0.999


def test_a_map_of_zeros_is_no_special_case() -> None:
    A = ConvolutionMap(torch.zeros(2, 1, 4, 4), (3, 1, 3, 3), bias=False)
    found = published_admm(A, torch.zeros(A.outputs_shape), 0.0)
    assert found.converged and found.objective == 0.0 and found.distance == 0.0


def test_inputs_are_left_alone_and_any_dtype_is_taken() -> None:
    x = torch.randn(2, 1, 5, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    A = ConvolutionMap(x, [2, 1, 2, 2], padding="same")
    assert A.inputs.dtype == torch.float64 and not A.inputs.requires_grad
    assert A.outputs_shape == (2, 2, 5, 5)
    found = published_admm(A, torch.ones(A.outputs_shape), 0.5, iterations=3)
    assert found.weights.dtype == torch.float64 and found.bias is not None and found.bias.shape == (2,)


# Refusals ----------------------------------------------------------------------------------------------------------------

IMAGES = torch.ones(2, 4, 5, 5)


class Wrong(Counted):
    """A map with one thing wrong."""

    def __init__(self, wrong: str) -> None:
        super().__init__(MatrixMap(normal(0, 5, 3), 2))
        self.wrong = wrong

    def apply(self, W: Tensor) -> Tensor:
        Z = super().apply(W)
        return {"shape": Z.T, "dtype": Z.float(), "nan": Z * float("nan")}.get(self.wrong, Z)

    def adjoint(self, Z: Tensor) -> Tensor:
        return super().adjoint(Z) * (1 + 1e-6 if self.wrong == "adjoint" else 1)

    def largest_gram_entry(self) -> float:
        return {"entry": -1.0, "infinite": float("inf")}.get(self.wrong, super().largest_gram_entry())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("shape", r"Wrong.apply must give a float64 tensor of shape \(5, 2\), found torch.float64 \(2, 5\)"),
        ("dtype", "Wrong.apply must give a float64 tensor"),
        ("nan", "Wrong.apply gives NaN"),
        ("adjoint", "Wrong.adjoint must satisfy"),
        ("entry", "largest_gram_entry must give a finite number"),
        ("infinite", "largest_gram_entry must give a finite number"),
    ],
)
def test_refuses_a_map_that_is_not_consistent(wrong: str, message: str) -> None:
    Y = torch.ones(5, 2)
    assert published_admm(Wrong("nothing"), Y, 1.0, iterations=1).iterations == 1
    with pytest.raises(InvalidInput, match=message):
        published_admm(Wrong(wrong), Y, 1.0)


CONVOLUTION = ConvolutionMap(IMAGES, (2, 4, 3, 3))
GOOD = torch.ones(2, 2, 3, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ConvolutionMap(IMAGES.numpy(), (2, 4, 3, 3)), "torch tensor"),  # type: ignore[arg-type]
        (lambda: ConvolutionMap(IMAGES[0], (2, 4, 3, 3)), r"images \(B, C, H, W\)"),
        (lambda: ConvolutionMap(IMAGES[:0], (2, 4, 3, 3)), "empty"),
        (lambda: ConvolutionMap(IMAGES * float("nan"), (2, 4, 3, 3)), "NaN"),
        (lambda: ConvolutionMap(IMAGES.to(torch.complex64), (2, 4, 3, 3)), "complex"),
        (lambda: ConvolutionMap(IMAGES, (2, 4, 3)), "kernel_shape must be"),
        (lambda: ConvolutionMap(IMAGES, (2, 4, 3, 0)), "every entry of kernel_shape"),
        (lambda: ConvolutionMap(IMAGES, (2, 3, 3, 3)), "3 input channels"),
        (lambda: ConvolutionMap(IMAGES, (3, 2, 3, 3), groups=2), "groups divides"),
        (lambda: ConvolutionMap(IMAGES, (2, 4, 3, 3), groups=0), "groups must be"),
        (lambda: ConvolutionMap(IMAGES, (2, 4, 3, 3), stride=0), "stride must be"),
        (lambda: ConvolutionMap(IMAGES, (2, 4, 3, 3), stride=(1, 2, 3)), "stride must be"),  # type: ignore[arg-type]
        (lambda: ConvolutionMap(IMAGES, (2, 4, 3, 3), padding=-1), "padding must be"),
        (lambda: ConvolutionMap(IMAGES, (2, 4, 3, 3), padding="same", stride=2), "'same' with stride 1"),
        (lambda: ConvolutionMap(IMAGES, (2, 4, 3, 3), padding="reflect"), "padding must be"),
        (lambda: ConvolutionMap(IMAGES, (2, 4, 3, 3), dilation=1.5), "dilation must be"),  # type: ignore[arg-type]
        (lambda: ConvolutionMap(IMAGES, (2, 4, 3, 3), dilation=3), "larger than the padded inputs"),
        (lambda: CONVOLUTION.join(torch.ones(2, 4, 3, 3), None), "bias=True; give the bias"),
        (lambda: MatrixMap(torch.ones(3), 2), "matrix"),
        (lambda: MatrixMap(torch.ones(3, 2), 0), "columns"),
        (lambda: published_admm(CONVOLUTION, GOOD, 1.0, bias=True), "an operator brings its own bias"),
        (lambda: published_admm(CONVOLUTION, torch.ones(2, 2), 1.0), "shape of A's outputs"),
        (lambda: published_admm(CONVOLUTION, torch.ones(2, 3, 3, 2), 1.0), "Y has shape"),
        (lambda: published_admm(CONVOLUTION, -GOOD, 1.0), "negative"),
        (lambda: published_admm(CONVOLUTION, GOOD, 1.0, V=torch.ones(2, 2)), "V has shape"),
        (lambda: published_admm(CONVOLUTION, GOOD, 1.0, V=0.0), "V must be a torch tensor"),  # type: ignore[arg-type]
        (lambda: published_admm(CONVOLUTION, GOOD, 1.0, omega=GOOD), "omega"),
        (lambda: published_admm(CONVOLUTION, GOOD, 1.0, cg_steps=0), "cg_steps"),
        (lambda: published_admm("A", GOOD, 1.0), "LinearMap"),  # type: ignore[arg-type]
    ],
)
def test_refuses_bad_input(call: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        call()
