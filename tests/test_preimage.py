"""Preimage boxes by definition, Lemma 1, and the names of activations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nettrim import preimage
from nettrim.preimage import IDENTITY, RELU, Activation, as_linear, clamp, distance, leaky_relu, named, nearest_point
from nettrim.status import InvalidInput

EXACT = [IDENTITY, RELU, clamp(0, 6, "relu6"), clamp(-1, 1), clamp(-0.5, 2.0), clamp(-math.inf, 1.0), leaky_relu(0.01), leaky_relu(0.7)]
ids = [a.name for a in EXACT]
GRID = torch.arange(-1600, 1601, dtype=torch.float64) / 200  # holds the corners of every activation above


@pytest.mark.parametrize("s", EXACT, ids=ids)
def test_the_box_is_exactly_what_maps_to_the_output(s: Activation) -> None:
    Y = s.apply(GRID)
    lo, hi = s.box(Y)
    assert bool((lo <= GRID + 1e-12).all() and (hi >= GRID - 1e-12).all())
    # every grid point against every box: inside exactly when it has the same output
    inside = (GRID[:, None] >= lo - 1e-12) & (GRID[:, None] <= hi + 1e-12)
    same = (Y[:, None] - Y[None]).abs() <= 1e-13
    assert torch.equal(inside, same)
    for T in (lo.clamp(min=-1e6), hi.clamp(max=1e6)):
        torch.testing.assert_close(s.apply(T), Y, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("s", EXACT, ids=ids)
def test_nondecreasing_and_1_lipschitz(s: Activation) -> None:
    steps = s.apply(GRID).diff()
    assert bool((steps >= 0).all()) and bool((steps <= GRID.diff() + 1e-12).all())
    assert s.exact and s.lipschitz == 1.0


def test_the_table_of_the_design() -> None:
    inf = math.inf
    assert [tuple(map(float, box)) for box in zip(*RELU.box(torch.tensor([2.0, 0.0])), strict=True)] == [(2, 2), (-inf, 0)]
    lo, hi = clamp(-1, 1).box(torch.tensor([-1.0, 0.25, 1.0]))
    assert lo.tolist() == [-inf, 0.25, 1.0] and hi.tolist() == [-1.0, 0.25, inf]
    lo, hi = leaky_relu(0.5).box(torch.tensor([-1.0, 3.0]))
    assert lo.tolist() == hi.tolist() == [-2.0, 3.0]


values = st.floats(-20, 20, allow_nan=False, width=64)


@pytest.mark.parametrize("s", EXACT, ids=ids)
@settings(max_examples=60)
@given(data=st.lists(st.tuples(values, values), min_size=1, max_size=12))
def test_lemma_1(s: Activation, data: list[tuple[float, float]]) -> None:
    Z, Z0 = torch.tensor(data, dtype=torch.float64).T
    Y = s.apply(Z0)
    lo, hi = s.box(Y)
    assert float((s.apply(Z) - Y).norm()) <= distance(Z, lo, hi) * (1 + 1e-12) + 1e-10
    assert distance(Z0, lo, hi) <= 1e-12


@settings(max_examples=60)
@given(z=values, a=values, b=values)
def test_nearest_point_is_in_the_box_and_nearest(z: float, a: float, b: float) -> None:
    lo, hi = sorted((a, b))
    t = float(nearest_point(*(torch.tensor(x, dtype=torch.float64) for x in (z, lo, hi))))
    assert lo <= t <= hi
    assert abs(z - t) == max(lo - z, z - hi, 0.0)


NAMES = ["identity", "linear", "relu", "ReLU", "relu6", "hardtanh", "leaky_relu", "leaky-relu", "elu", "unknown", "mixed"]
MADE = [*EXACT, clamp(-2, 3, "clamp"), clamp(0, 5, "relu6"), leaky_relu(0), leaky_relu(1), leaky_relu(2.5), preimage.elu(1.7)]


@pytest.mark.parametrize("activation", [*map(named, NAMES), *MADE, *map(as_linear, preimage._LIPSCHITZ)], ids=lambda a: a.name)
def test_names_lead_back(activation: Activation) -> None:
    again = named(activation.name)
    assert (again.low, again.high, again.slope, again.exact) == (activation.low, activation.high, activation.slope, activation.exact)
    assert again.lipschitz == activation.lipschitz


@pytest.mark.parametrize("activation", [*map(named, NAMES), *EXACT], ids=lambda a: a.name)
def test_named_is_equal(activation: Activation) -> None:
    assert named(activation.name) == activation


@pytest.mark.parametrize("wrong, near", [("rellu", "relu"), ("hardtan", "hardtanh"), ("sigmiod", "sigmoid"), ("leakyrelu", "leaky_relu")])
def test_unknown_names_are_refused_with_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(InvalidInput, match=f"did you mean '{near}'"):
        named(wrong)
    with pytest.raises(InvalidInput, match="known: identity"):
        named("qqqqqq")


@pytest.mark.parametrize("name", ["hardtanh(1)", "hardtanh(1, 0)", "hardtanh(a, b)", "leaky_relu()", "hardtanh(1, 1)", "relu(3)"])
def test_bad_parameters_are_refused(name: str) -> None:
    with pytest.raises(InvalidInput):
        named(name)


@pytest.mark.parametrize("low, high", [(1, 1), (2, 1), (math.nan, 1), (0, math.nan)])
def test_clamp_refuses_empty_ranges(low: float, high: float) -> None:
    with pytest.raises(InvalidInput, match="low must be below high"):
        clamp(low, high)


@pytest.mark.parametrize("slope", [-0.5, 1.5, 3.0])
def test_slopes_that_are_no_nondecreasing_contraction_are_matched_linearly(slope: float) -> None:
    s = leaky_relu(slope)
    assert not s.exact and s.is_point and s.lipschitz == max(1.0, abs(slope))


@pytest.mark.parametrize(
    "name, function",
    [
        ("gelu", torch.nn.functional.gelu),
        ("silu", torch.nn.functional.silu),
        ("mish", torch.nn.functional.mish),
        ("hardswish", torch.nn.functional.hardswish),
        ("selu", torch.nn.functional.selu),
        ("sigmoid", torch.sigmoid),
        ("hardsigmoid", torch.nn.functional.hardsigmoid),
        ("tanh", torch.tanh),
        ("softplus", torch.nn.functional.softplus),
        ("tanhshrink", torch.nn.functional.tanhshrink),
    ],
)
def test_lipschitz_constants_hold_and_are_not_far_above(name: str, function) -> None:
    z = torch.linspace(-12, 12, 240_001, dtype=torch.float64)
    largest = float((function(z).diff() / z.diff()).abs().max())
    constant = named(name).lipschitz
    assert constant is not None
    assert largest <= constant * (1 + 1e-9) and constant <= largest * 1.002
