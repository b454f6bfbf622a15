"""NetTrim and Magnitude on one layer: settings, statuses, degenerate layers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from layer_programs import layer

from nettrim.methods import Magnitude, NetTrim
from nettrim.methods.targets import kept_weights
from nettrim.preimage import RELU
from nettrim.program import LayerProgram, from_rows
from nettrim.solution import Solution
from nettrim.solvers.reference import nearest, preimage_l1
from nettrim.status import InvalidInput, Status


def count(solution: Solution) -> int:
    return int((solution.weights != 0).sum())


def check(p: LayerProgram, solution: Solution) -> None:
    """What every solution must be, whatever the layer."""
    assert solution.weights.shape == p.weights.shape and solution.weights.dtype == p.dtype
    assert bool(torch.isfinite(solution.weights).all())
    assert (solution.bias is None) == (p.bias is None)
    if solution.bias is not None:
        assert solution.bias.dtype == p.dtype and bool(torch.isfinite(solution.bias).all())
    assert solution.distance == pytest.approx(p.distance(solution.weights, solution.bias), rel=1e-12, abs=1e-300)
    if solution.tolerance_used is not None:
        assert solution.tolerance is not None
        assert solution.distance <= solution.tolerance_used
        assert solution.tolerance_used >= solution.tolerance
        if solution.status is Status.CONVERGED:
            assert solution.distance <= solution.tolerance
    assert solution.gap is None or solution.gap >= 0
    assert solution.status.remedy


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "exactly one of epsilon, sparsity and penalty; found none"),
    ({"epsilon": 0.1, "sparsity": 0.5}, "found epsilon and sparsity"),
    ({"epsilon": 0.1, "penalty": 1.0, "sparsity": 0.1}, "found epsilon and sparsity and penalty"),
    ({"epsilon": -0.1}, "epsilon must be >= 0"),
    ({"epsilon": math.nan}, "finite"),
    ({"epsilon": math.inf}, "finite"),
    ({"epsilon": True}, "finite number"),
    ({"epsilon": "0.1"}, "finite number"),
    ({"epsilon": {}}, "empty mapping"),
    ({"epsilon": {"a": -1.0}}, "epsilon\\['a'\\]"),
    ({"sparsity": 1.0}, "fraction of zeros"),
    ({"sparsity": -0.1}, "fraction of zeros"),
    ({"sparsity": {"a": 0.5, "b": 95}}, "sparsity\\['b'\\]"),
    ({"penalty": -1.0}, "penalty must be >= 0"),
    ({"epsilon": 0.1, "norm": "l2"}, "norm must be"),
    ({"epsilon": 0.1, "correction": 1.5}, "correction"),
    ({"epsilon": 0.1, "correction": math.nan}, "correction"),
    ({"epsilon": 0.1, "ridge": -1.0}, "ridge"),
    ({"epsilon": 0.1, "ridge": math.inf}, "ridge"),
    ({"epsilon": 0.1, "gap": 0.0}, "gap"),
    ({"epsilon": 0.1, "gap": 1.0}, "gap"),
    ({"epsilon": 0.1, "max_iterations": 0}, "max_iterations"),
    ({"sparsity": 0.1, "effort": "hasty"}, "effort must be 'full' or 'quick', found 'hasty'"),
    ({"epsilon": 0.1, "effort": "quick"}, "effort='quick' needs norm='l0'"),
    ({"epsilon": 0.1, "program": "halfspace", "effort": "quick"}, "effort='quick' needs norm='l0'"),
]


@pytest.mark.parametrize("settings, words", REFUSED, ids=[str(s) for s, _ in REFUSED])
def test_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        NetTrim(**settings)


def test_kinds_and_norms() -> None:
    assert [(m.kind, m.chosen_norm, m.certified_program) for m in (NetTrim(epsilon=0.1), NetTrim(penalty=1), NetTrim(sparsity=0.5))] == [
        ("epsilon", "l1", "epsilon"),
        ("penalty", "l1", "penalty"),
        ("sparsity", "l0", ""),
    ]
    assert NetTrim(epsilon=0.1, norm="l0").certified_program == ""
    assert NetTrim(sparsity=0.1, norm="l1").certified_program == ""
    assert "l1" in NetTrim(epsilon=0.1).describe()


def test_targets_by_layer() -> None:
    m = NetTrim(epsilon={"fc1": 0.1, "re:fc.*": 0.2, "re:block\\..*": 0.3})
    assert [m.target(name) for name in ("fc1", "fc2", "block.0", "other", "xfc1")] == [0.1, 0.2, 0.3, None, None]
    assert NetTrim(epsilon=0.1).target("anything") == 0.1
    assert m.targets == m.epsilon
    assert Magnitude(sparsity={"a": 0.5}).target("b") is None


def test_magnitude_by_definition() -> None:
    p = layer(20, 6, 5, seed=1, dtype=torch.float32)
    solution = Magnitude(sparsity=0.7).solve(p, 0.7)
    check(p, solution)
    assert count(solution) == kept_weights(30, 0.7) == 9
    kept = solution.weights != 0
    assert torch.equal(solution.weights[kept], p.weights.float()[kept])
    assert float(p.weights[kept].abs().min()) >= float(p.weights[~kept].abs().max())
    assert torch.equal(solution.bias, p.bias.float())
    with pytest.raises(InvalidInput, match="Magnitude"):
        Magnitude(sparsity=1.0)


@pytest.mark.parametrize("norm", ["l1", "l0"])
@pytest.mark.parametrize("activation", ["relu", "identity", "hardtanh", "leaky"])
def test_tolerance(activation: str, norm: Any) -> None:
    p = layer(80, 15, 6, activation, seed=2, dtype=torch.float32)
    solution = NetTrim(epsilon=0.1, norm=norm).solve(p, 0.1)
    check(p, solution)
    assert solution.status is Status.CONVERGED and solution.tolerance == pytest.approx(0.1 * p.reference_norm)
    assert 0 < count(solution) < 90
    if norm == "l1":
        optimum = preimage_l1(p.inputs.numpy(), p.lo.numpy(), p.hi.numpy(), 0.1 * p.reference_norm).objective
        assert solution.gap is not None and solution.gap <= 0.01
        assert float(solution.weights.double().abs().sum()) <= 1.01 * optimum
    else:
        assert solution.gap is None


QUICK: list[dict[str, Any]] = [{"sparsity": 0.6}, {"pattern": "2:4"}, {"epsilon": 0.2, "norm": "l0"}, {"penalty": 0.3, "norm": "l0"}]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("target", QUICK, ids=[str(one) for one in QUICK])
@pytest.mark.parametrize("activation", ["relu", "identity", "hardtanh", "leaky"])
def test_a_quick_effort_meets_every_target(activation: str, target: dict[str, Any], bias: bool) -> None:
    p = layer(120, 16, 6, activation, bias=bias, seed=2, dtype=torch.float32)
    full, quick = NetTrim(**target), NetTrim(**target, effort="quick")
    a, b = (method.solve(p, float(method.targets)) for method in (full, quick))
    check(p, b)
    assert b.iterations < a.iterations
    if full.kind == "sparsity":
        assert count(b) == count(a) and b.distance <= 1.25 * a.distance
    elif full.kind == "epsilon":
        assert b.status is Status.CONVERGED and b.distance <= 0.2 * p.reference_norm and count(b) <= 1.15 * count(a)
    else:
        value, least = (s.distance**2 / 2 + 0.3 * count(s) for s in (b, a))
        assert value <= 1.1 * least
    assert "quick" in quick.describe() and "quick" not in full.describe()


def test_polish_lowers_the_distance_on_the_same_support() -> None:
    p = layer(80, 15, 6, seed=2, dtype=torch.float32)
    plain, polished = (NetTrim(epsilon=0.2, polish=on).solve(p, 0.2) for on in (False, True))
    assert torch.equal(plain.weights != 0, polished.weights != 0)
    assert polished.distance < plain.distance
    bare, good = (NetTrim(sparsity=0.6, polish=on).solve(p, 0.6) for on in (False, None))
    assert count(bare) == count(good) == 36 and good.distance < bare.distance


@pytest.mark.parametrize("norm", ["l1", "l0"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 0.99])
def test_budget(sparsity: float, norm: Any) -> None:
    p = layer(60, 12, 5, seed=4, dtype=torch.float32)
    solution = NetTrim(sparsity=sparsity, norm=norm).solve(p, sparsity)
    check(p, solution)
    assert count(solution) <= kept_weights(60, sparsity)
    if norm == "l0":
        assert count(solution) == kept_weights(60, sparsity)
        assert solution.distance <= Magnitude(sparsity=sparsity).solve(p, sparsity).distance + 1e-6 * p.reference_norm


@pytest.mark.parametrize("norm", ["l1", "l0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_epsilon_zero_keeps_the_function(bias: bool, dtype: torch.dtype, norm: Any) -> None:
    p = layer(40, 8, 3, bias=bias, seed=5, dtype=dtype)
    solution = NetTrim(epsilon=0.0, norm=norm).solve(p, 0.0)
    check(p, solution)
    assert solution.distance <= 1e-6 * p.reference_norm
    if solution.status is Status.ORIGINAL_KEPT:
        assert torch.equal(solution.weights, p.weights.to(dtype))


@pytest.mark.parametrize("norm", ["l1", "l0"])
@pytest.mark.parametrize("activation", ["relu", "identity", "hardtanh"])
def test_out_of_reach_reports_the_best(activation: str, norm: Any) -> None:
    p = layer(60, 8, 4, activation, seed=6, noise=1.0, dtype=torch.float32)
    best = nearest(p.inputs.numpy(), p.lo.numpy(), p.hi.numpy()).distance
    epsilon = 0.5 * best / p.reference_norm
    solution = NetTrim(epsilon=epsilon, norm=norm).solve(p, epsilon)
    check(p, solution)
    assert solution.status is Status.INFEASIBLE and not solution.status.ok
    assert "out of reach" in solution.notes[0] and f"{best / p.reference_norm:.3g}"[:4] in solution.notes[0]
    assert best * (1 - 1e-6) <= solution.distance <= 1.0101 * best
    assert solution.tolerance_used == pytest.approx(1.01 * best, rel=1e-3)


@pytest.mark.parametrize("norm", ["l1", "l0"])
def test_penalty(norm: Any) -> None:
    p = layer(60, 12, 5, seed=7, dtype=torch.float32)
    unit = 0.002 * p.reference_norm**2
    counts = []
    for penalty in (unit, 10 * unit, 1e6 * unit):
        solution = NetTrim(penalty=penalty, norm=norm).solve(p, penalty)
        check(p, solution)
        assert solution.penalty == penalty
        counts.append(count(solution))
    assert counts[0] >= counts[1] >= counts[2] == 0


def test_penalty_zero_is_least_distance() -> None:
    p = layer(40, 8, 3, seed=8, noise=0.5, dtype=torch.float32)
    best = nearest(p.inputs.numpy(), p.lo.numpy(), p.hi.numpy()).distance
    assert NetTrim(penalty=0.0).solve(p, 0.0).distance == pytest.approx(best, rel=1e-5)
    exact = layer(40, 8, 3, seed=8, dtype=torch.float32)
    assert NetTrim(penalty=0.0).solve(exact, 0.0).distance <= 1e-6 * exact.reference_norm


def degenerate(kind: str) -> LayerProgram:
    p = layer(30, 8, 3, seed=9, dtype=torch.float32)
    if kind == "zero weights":
        return replace(p, weights=torch.zeros_like(p.weights))
    if kind == "zero weights and reference":
        zero = torch.zeros_like(p.weights)
        return from_rows(p.inputs, torch.zeros(30, 3), RELU, zero, p.bias.clamp(max=0))
    if kind == "zero reference":
        return from_rows(p.inputs, torch.zeros(30, 3), RELU, p.weights, p.bias - 100)
    if kind == "zero reference, no bias":
        return from_rows(-p.inputs.abs(), torch.zeros(30, 3), RELU, p.weights.abs(), None)
    if kind == "dead inputs":
        A = torch.full_like(p.inputs, 0.5)
        return from_rows(A, (A @ p.weights + p.bias).relu(), RELU, p.weights, p.bias)
    if kind == "zero inputs, no bias":
        A = torch.zeros_like(p.inputs)
        return from_rows(A, torch.zeros(30, 3), RELU, p.weights, None)
    if kind == "free boxes":
        return replace(p, lo=torch.full_like(p.lo, -math.inf), hi=torch.full_like(p.hi, math.inf))
    P, N, M, bias = {
        "one neuron": (30, 8, 1, True),
        "one input": (30, 1, 4, True),
        "one row": (1, 8, 3, True),
        "one row, no bias": (1, 8, 3, False),
        "one of each": (1, 1, 1, False),
    }.get(kind, (30, 8, 3, True))
    dtype = getattr(torch, kind) if kind.startswith(("float", "bfloat")) else torch.float32
    return layer(P, N, M, bias=bias, seed=9, dtype=dtype)


KINDS = [
    "zero weights",
    "zero weights and reference",
    "zero reference",
    "zero reference, no bias",
    "dead inputs",
    "zero inputs, no bias",
    "free boxes",
    "one neuron",
    "one input",
    "one row",
    "one row, no bias",
    "one of each",
    "float64",
    "float16",
    "bfloat16",
]
METHODS = [
    NetTrim(epsilon=0.05),
    NetTrim(epsilon=0.05, norm="l0"),
    NetTrim(epsilon=0.0),
    NetTrim(epsilon=0.05, polish=True),
    NetTrim(penalty=0.5),
    NetTrim(penalty=0.5, norm="l0"),
    NetTrim(penalty=0.5, polish=True),
    NetTrim(penalty=0.0),
    NetTrim(sparsity=0.5),
    NetTrim(sparsity=0.5, norm="l1"),
    NetTrim(sparsity=0.0),
    Magnitude(sparsity=0.5),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.kind} {m.targets} {getattr(m, 'norm', '')} {getattr(m, 'polish', '')}")
@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_layers(kind: str, method: Any) -> None:
    p = degenerate(kind)
    solution = method.solve(p, method.target("layer"))
    check(p, solution)
    if method.kind == "sparsity":
        assert count(solution) <= kept_weights(p.weights.numel(), method.sparsity)
    if kind in ("zero reference", "zero weights and reference", "zero inputs, no bias") and isinstance(method, NetTrim):
        assert solution.distance == 0.0
    if kind in ("zero reference", "dead inputs") and method.kind == "epsilon":
        assert count(solution) == 0  # nothing is needed, at any tolerance
