"""The matrix view of every layer kind: rows times weights is the module's own output, and what is written back is what it computes."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nettrim.fold import Fold
from nettrim.graph import Reading
from nettrim.layers import LayerView, view
from nettrim.nodes import norm_scale
from nettrim.preimage import IDENTITY, RELU, Pool, clamp, distance, leaky_relu
from nettrim.units import Call, unit_of

F64 = torch.float64


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def product(layer: LayerView, x: Tensor) -> Tensor:
    """Rows times weights plus bias, group by group."""
    G, (N, M) = layer.groups, layer.shape
    rows = layer.rows(x)
    assert rows.shape[1] == G * N
    W = layer.weights()
    parts = [rows[:, g * N : (g + 1) * N] @ W[:, g * (M // G) : (g + 1) * (M // G)] for g in range(G)]
    b = layer.bias()
    return torch.cat(parts, dim=1) + (0.0 if b is None else b)


@settings(max_examples=60)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.one_of(st.tuples(st.integers(0, 2), st.integers(0, 2)), st.sampled_from(["same", "valid"])),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
)
def test_conv2d_is_its_matrix(kernel, stride, dilation, padding, mode, groups, bias) -> None:  # type: ignore[no-untyped-def]
    assume(padding != "same" or stride == (1, 1))
    conv = nn.Conv2d(4, 8, kernel, stride, padding, dilation, groups, bias, mode, dtype=F64)
    x = normal(0, 3, 4, 9, 10)
    warnings.filterwarnings("ignore", message="Using padding='same' with even kernel")  # torch copies its input then
    try:
        y = conv(x)
    except RuntimeError:  # the padded input is smaller than the kernel, or too small for its padding mode
        assume(False)
    layer = view("conv", conv)
    torch.testing.assert_close(product(layer, x), layer.outputs(y), rtol=1e-12, atol=1e-12)
    which = torch.tensor([0, 5, len(layer.outputs(y)) - 1])
    torch.testing.assert_close(layer.rows(x, which), layer.rows(x)[which])
    torch.testing.assert_close(layer.respond(x), y)


class Conv1D(nn.Module):
    """A stand-in with the name, module and layout of transformers' Conv1D: its weight is (inputs, outputs)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(normal(1, nx, nf))
        self.bias = nn.Parameter(normal(2, nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).reshape(*x.shape[:-1], self.nf)


Conv1D.__module__ = "transformers.pytorch_utils"

KINDS = {
    "linear": (lambda: nn.Linear(6, 5, dtype=F64), (7, 6)),
    "linear without bias, three dimensions": (lambda: nn.Linear(6, 5, bias=False, dtype=F64), (3, 4, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2, dtype=F64), (5, 4, 11)),
    "conv1d same": (lambda: nn.Conv1d(4, 6, 4, padding="same", padding_mode="replicate", dtype=F64), (5, 4, 11)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, dtype=F64), (2, 4, 6, 7)),
    "one image": (lambda: nn.Conv2d(4, 8, 3, dtype=F64), (4, 6, 7)),
    "transformers' Conv1D": (lambda: Conv1D(5, 6), (3, 4, 6)),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_is_its_matrix_and_takes_new_weights(kind: str) -> None:
    make, shape = KINDS[kind]
    module, x = make(), normal(3, *shape)
    layer = view("layer", module)
    torch.testing.assert_close(product(layer, x), layer.outputs(module(x)), rtol=1e-12, atol=1e-12)
    before = {name: (id(p), p.shape) for name, p in module.named_parameters()}
    W, b = normal(4, *layer.shape), None if layer.bias() is None else normal(5, layer.shape[1])
    layer.write(W, b)
    assert {name: (id(p), p.shape) for name, p in module.named_parameters()} == before
    torch.testing.assert_close(layer.weights(), W)
    torch.testing.assert_close(product(layer, x), layer.outputs(module(x)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "groups", "mode"),
    [
        (3, 1, 1, 1, "zeros"),
        (3, 2, 1, 1, "circular"),
        (3, 2, 1, 1, "zeros"),
        (5, 2, 2, 1, "zeros"),
        (3, 1, 1, 4, "zeros"),
        (2, 3, 1, 2, "zeros"),
        (3, 1, 1, 1, "circular"),
    ],
)
def test_the_operator_norm_of_a_convolution_is_bounded(kernel: int, stride: int, dilation: int, groups: int, mode: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, kernel, stride, padding=1, dilation=dilation, groups=groups, bias=False, padding_mode=mode, dtype=F64)
    layer = view("conv", conv)
    bound = layer.operator_factor() * max(float(torch.linalg.matrix_norm(W, 2)) for W in layer.weights().chunk(groups, dim=1))
    x = normal(0, 1, 4, 12, 12)
    for _ in range(200):  # power iteration on the convolution itself
        x = (x / x.norm()).requires_grad_()
        y = conv(x)
        (x,) = torch.autograd.grad(y.square().sum() / 2, x)
    exact = math.sqrt(float(x.norm()))
    assert exact <= bound * (1 + 1e-9)
    assert bound <= 3 * exact * math.sqrt(kernel * kernel)  # no arbitrary number


def test_padding_modes_that_repeat_entries_have_no_operator_bound() -> None:
    assert view("c", nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")).operator_factor() == math.inf
    assert view("c", nn.Conv2d(2, 2, 3, padding=2, padding_mode="circular")).operator_factor() == math.inf


# --- batch-norm -----------------------------------------------------------------------------------------------------------------------


def normed(bias: bool, affine: bool, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, bias=bias), nn.BatchNorm2d(6, affine=affine)).double().eval()
    norm = net[1]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.copy_(normal(seed + 1, 6))
    norm.running_var.copy_(normal(seed + 2, 6).square() + 0.1)
    if affine:
        with torch.no_grad():
            norm.weight.copy_(normal(seed + 3, 6))
            norm.bias.copy_(normal(seed + 4, 6))
            norm.weight[0], norm.weight[1] = 0.0, -0.7
    return net


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_is_folded_exactly(bias: bool, affine: bool) -> None:
    net = normed(bias, affine)
    unit = unit_of("0", dict(net.named_modules()), Reading(RELU, "", norm="1"))
    x = normal(9, 4, 3, 7, 7)
    rows = unit.view.rows(x)
    fixed = unit.fold.offset if unit.fold is not None and unit.fold.home == "none" else 0.0
    b = unit.bias()
    expected = unit.view.outputs(net(x))
    torch.testing.assert_close(rows @ unit.weights() + (fixed if b is None else b), expected)
    torch.testing.assert_close(unit.respond(x), expected)
    torch.testing.assert_close(unit.full(Call(x, net[0](x))), net(x))
    assert (b is None) == (not bias and not affine)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_new_folded_weights_are_what_the_network_computes(bias: bool, affine: bool) -> None:
    net = normed(bias, affine)
    keys = list(net.state_dict())
    unit = unit_of("0", dict(net.named_modules()), Reading(RELU, "", norm="1"))
    assert unit.fold is not None
    W = normal(11, *unit.view.shape) * unit.fold.live
    b = None if unit.bias() is None else torch.where(unit.fold.live, normal(12, 6), unit.fold.offset)
    unit.write(W, b)
    assert list(net.state_dict()) == keys
    x = normal(9, 4, 3, 7, 7)
    fixed = unit.fold.offset if b is None else b
    torch.testing.assert_close(unit.view.rows(x) @ W + fixed, unit.view.outputs(net(x)))


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), home=st.sampled_from(["layer", "norm", "none"]), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_stored_weights_are_stored_once(seed: int, home: str, dtype: torch.dtype) -> None:
    """What the solver hands over is already what the layer will hold, so that writing it changes nothing more."""
    scale = normal(seed, 5)
    scale[0] = 0.0
    bias = normal(seed + 1, 5) if home == "layer" else torch.zeros(5, dtype=F64)
    fold = Fold(scale, normal(seed + 2, 5), normal(seed + 3, 5), bias, home)  # type: ignore[arg-type]
    W, b = fold.stored(normal(seed + 4, 7, 5), fold.offset + normal(seed + 5, 5) * fold.live, dtype)
    again, c = fold.stored(W, b, dtype)
    torch.testing.assert_close(again, W, rtol=1e-13, atol=0)
    assert b is not None and c is not None
    torch.testing.assert_close(c, b, rtol=1e-10, atol=1e-10)
    assert torch.equal(fold.raw(W).to(dtype).double(), fold.raw(W)) or torch.allclose(
        fold.raw(W).to(dtype).double(), fold.raw(W), rtol=1e-14
    )


def test_batch_norm_factors() -> None:
    norm = nn.BatchNorm2d(3).eval()
    assert norm.running_var is not None
    norm.running_var.copy_(torch.tensor([1.0, 4.0, 9.0]))
    torch.testing.assert_close(norm_scale(norm), torch.tensor([1.0, 0.5, 1 / 3], dtype=F64), rtol=1e-4, atol=0)


# --- pooling ---------------------------------------------------------------------------------------------------------------------------


ACTIVATIONS = {"relu": RELU, "identity": IDENTITY, "clamp": clamp(-0.5, 0.5), "leaky": leaky_relu(0.2)}


@pytest.mark.parametrize("name", list(ACTIVATIONS))
@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), kernel=st.sampled_from([(2, 2), (3, 2), (1, 4), (2,)]), size=st.sampled_from([6, 7, 8]))
def test_the_pooling_box(name: str, seed: int, kernel: tuple[int, ...], size: int) -> None:
    s, pool = ACTIVATIONS[name], Pool(kernel)
    Z = normal(seed, 2, 3, *(size,) * len(kernel))
    lo, hi, Y = pool.box(Z, s)
    pooled = pool.apply(s.apply(Z))
    module = nn.MaxPool2d(kernel) if len(kernel) == 2 else nn.MaxPool1d(kernel[0])
    torch.testing.assert_close(pooled, module(s.apply(Z)))
    assert distance(Z, lo, hi) <= 1e-12  # the reference itself is inside
    assert float(Y.square().sum()) == pytest.approx(float(pooled.square().sum()))
    # every point of the box gives the same output, and Lemma 1 holds around it
    drawn = normal(seed + 1, *Z.shape).mul(3)
    inside = torch.minimum(torch.maximum(drawn, lo), hi)
    torch.testing.assert_close(pool.apply(s.apply(inside)), pooled)
    moved = float((pool.apply(s.apply(drawn)) - pooled).norm())
    assert moved <= distance(drawn, lo, hi) * (1 + 1e-12) + 1e-12
