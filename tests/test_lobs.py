"""L-OBS on a layer and on a network: against its definition weight by weight, exact OBS, its own threshold; rounds with retraining."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from layer_programs import layer
from linear_problems import correlated, generator, on_support
from torch import Tensor, nn

import nettrim
from nettrim import LOBS, OBS, Magnitude, alternate, keep_zeros, prune
from nettrim.fold import Fold
from nettrim.methods import lobs
from nettrim.methods.lobs import Rows, Walk, advance, recursive_inverse
from nettrim.program import LayerProgram, Moments
from nettrim.status import InvalidInput, Status


def hessian(p: LayerProgram, damping: float = 1e-6) -> Tensor:
    """Psi from its definition, with a 1 behind every input."""
    y = torch.cat([p.inputs, torch.ones(len(p.inputs), 1, dtype=torch.float64)], 1)
    return y.T @ y / len(y) + damping * torch.eye(y.shape[1], dtype=torch.float64)


def by_definition(p: LayerProgram, kept: int, keep_bias: bool = False) -> Tensor:
    """Weights and biases (N + 1, M): every sensitivity once, then one weight after the other, zeros put back after each."""
    assert p.bias is not None
    G = torch.linalg.inv(hessian(p))
    V = torch.cat([p.weights, p.bias[None]])
    N, M = p.weights.shape
    cost = {(q, m): float(V[q, m] ** 2 / (2 * G[q, q])) for q in range(N + 1 - keep_bias) for m in range(M)}
    gate = torch.ones_like(V)
    for q, m in sorted(cost, key=lambda key: cost[key]):
        if int(gate[:N].sum()) == kept:
            break
        V[:, m] -= V[q, m] / G[q, q] * G[:, q]
        gate[q, m] = 0
        V *= gate
    return V


@pytest.mark.parametrize("keep_bias", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7, 0.95])
def test_the_published_form_by_its_definition(sparsity: float, keep_bias: bool) -> None:
    p = correlated(120, 9, 5, seed=1)
    solution = LOBS(sparsity=sparsity, keep_bias=keep_bias).solve(p, sparsity)
    expected = by_definition(p, round((1 - sparsity) * 45), keep_bias)
    torch.testing.assert_close(torch.cat([solution.weights, solution.bias[None]]), expected, rtol=1e-7, atol=1e-9)
    assert int((solution.weights != 0).sum()) == round((1 - sparsity) * 45)
    assert solution.distance == pytest.approx(p.distance(solution.weights, solution.bias), rel=1e-12)
    gone = int((solution.bias == 0).sum())
    assert gone == 0 if keep_bias or not sparsity else (f"{gone} of 5 biases" in solution.notes[0] if gone else not solution.notes)


def test_removals_of_one_output_are_a_sweep_of_gauss_seidel() -> None:
    """docs/lobs.md, Proposition 1: (D + L) lambda = w on what goes; more sweeps lead to exact OBS on the same weights."""
    p = correlated(100, 8, 1, seed=2)
    V = torch.cat([p.weights, p.bias[None]])
    G = torch.linalg.inv(hessian(p))
    gone = torch.tensor([3, 0, 5, 2])
    swept = advance(V, G, gone)[:, 0]
    block = G[gone][:, gone]
    multiplier = torch.linalg.solve_triangular(block.tril(), V[gone], upper=False)
    stay = torch.ones(9, dtype=torch.bool)
    stay[gone] = False
    torch.testing.assert_close(swept[stay], (V - G[:, gone] @ multiplier)[stay, 0])
    for _ in range(400):
        multiplier = torch.linalg.solve_triangular(block.tril(), V[gone] - block.triu(1) @ multiplier, upper=False)
    exact = on_support(hessian(p), V[:, 0], stay)
    torch.testing.assert_close((V - G[:, gone] @ multiplier)[:, 0] * stay, exact, rtol=1e-6, atol=1e-8)
    # inputs that do not see each other: the shortcut costs nothing
    apart = torch.diag(torch.arange(1.0, 10.0, dtype=torch.float64))
    torch.testing.assert_close(advance(V, apart, gone)[stay], V[stay])


def test_one_removal_is_exact() -> None:
    p = correlated(100, 7, 1, seed=3)
    V = torch.cat([p.weights, p.bias[None]])
    G = torch.linalg.inv(hessian(p))
    for q in range(7):
        stay = torch.arange(8) != q
        moved = advance(V, G, torch.tensor([q]))[:, 0]
        torch.testing.assert_close(moved, on_support(hessian(p), V[:, 0], stay))
        d = moved - V[:, 0]
        assert float(d @ hessian(p) @ d) / 2 == pytest.approx(float(V[q, 0] ** 2 / (2 * G[q, q])), rel=1e-6)


@pytest.mark.parametrize("keep_bias", [False, True])
def test_refitted_is_least_squares_on_the_published_choice(keep_bias: bool) -> None:
    p = correlated(120, 9, 5, seed=4)
    once, again = (LOBS(sparsity=0.6, form=form, keep_bias=keep_bias).solve(p, 0.6) for form in ("published", "refitted"))
    V = torch.cat([p.weights, p.bias[None]])
    mask = torch.cat([once.weights, once.bias[None]]) != 0
    expected = torch.stack([on_support(hessian(p), V[:, m], mask[:, m]) for m in range(5)], 1)
    torch.testing.assert_close(torch.cat([again.weights, again.bias[None]]), expected, rtol=1e-7, atol=1e-9)
    assert again.distance < once.distance


def test_greedy_is_exact_obs_on_centred_inputs() -> None:
    """With a bias that is always the best one, the weights see centred inputs only."""
    p = correlated(150, 10, 6, seed=5)
    solution = LOBS(sparsity=0.6, form="greedy", damping=1e-12).solve(p, 0.6)
    mean = p.inputs.mean(0)
    centred = replace(p, inputs=p.inputs - mean)
    other = OBS(sparsity=0.6, damping=1e-12).solve(centred, 0.6)
    torch.testing.assert_close(solution.weights, other.weights, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(solution.bias, p.bias + (p.weights - solution.weights).T @ mean, rtol=1e-6, atol=1e-9)
    assert solution.distance < OBS(sparsity=0.6, damping=1e-12).solve(p, 0.6).distance


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.9])
def test_each_form_costs_less_error_than_the_last(sparsity: float, seed: int) -> None:
    p = correlated(300, 30, 10, seed)
    found = [LOBS(sparsity=sparsity, form=form, keep_bias=True).solve(p, sparsity).distance for form in lobs.FORMS]
    assert found == sorted(found, reverse=True)
    assert found[-1] < Magnitude(sparsity=sparsity).solve(p, sparsity).distance


def test_both_inverses_are_the_inverse_of_the_damped_hessian() -> None:
    p = correlated(700, 12, 3, seed=6)  # more rows than one step takes in
    y = torch.cat([p.inputs, torch.ones(700, 1, dtype=torch.float64)], 1)
    expected = torch.linalg.inv(hessian(p, 1e-4))
    torch.testing.assert_close(recursive_inverse(y, 700, 1e-4), expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(Rows.of(p, 1e-4, "factorisation").G, expected, rtol=1e-7, atol=1e-7)
    one_by_one = torch.eye(13, dtype=torch.float64) / 1e-4  # as published
    for row in y:
        image = one_by_one @ row
        one_by_one = one_by_one - torch.outer(image, image) / (700 + row @ image)
    torch.testing.assert_close(recursive_inverse(y, 700, 1e-4), one_by_one, rtol=1e-7, atol=1e-7)
    first, second = (LOBS(sparsity=0.6, inverse=inverse).solve(p, 0.6) for inverse in ("factorisation", "recursion"))
    assert torch.equal(first.weights != 0, second.weights != 0)
    torch.testing.assert_close(first.weights, second.weights, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", lobs.FORMS)
@pytest.mark.parametrize("error", [0.0, 0.02, 0.2, 0.5])
def test_the_threshold_is_met_and_used(form: Any, error: float) -> None:
    p = correlated(150, 10, 6, seed=7)
    solution = LOBS(error=error, form=form).solve(p, error)
    assert solution.status is Status.CONVERGED and solution.tolerance is not None
    assert solution.tolerance == pytest.approx(error * p.reference_norm, rel=1e-9, abs=1e-9)
    assert solution.distance <= solution.tolerance * (1 + 1e-9) + 1e-9
    kept = int((solution.weights != 0).sum())
    assert 60 - kept == solution.iterations and kept > 0
    further = 1 - (kept - 1) / 60  # one more is too much
    assert LOBS(sparsity=further, form=form).solve(p, further).distance > solution.tolerance


def test_the_walk_stops_where_the_error_first_passes_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    p = correlated(150, 10, 6, seed=8)
    walk = Walk(Rows.of(p, 1e-6, "factorisation"), keep_bias=False)
    errors = [walk.layer.moved(walk.built(count)) for count in range(61)]
    for threshold in (0.0, 0.3 * errors[-1], 0.7 * errors[-1], 2 * max(errors)):
        first = next((count for count, error in enumerate(errors) if error > threshold), 61) - 1
        monkeypatch.setattr(lobs, "PARTS", 1000)  # weight by weight
        V, done = walk.while_it_fits(lambda V, count, t=threshold: walk.layer.moved(V) <= t)
        assert done == first
        torch.testing.assert_close(V, walk.built(done))


def test_weights_that_are_zero_stay_zero() -> None:
    p = correlated(120, 9, 5, seed=9)
    zero = torch.rand(9, 5, generator=generator(0)) < 0.5
    Z = p.inputs @ (p.weights * ~zero) + p.bias
    p = replace(p, weights=p.weights * ~zero, lo=Z, hi=Z)
    for form in lobs.FORMS:
        for method, target in (
            (LOBS(sparsity=0.2, form=form), 0.2),
            (LOBS(sparsity=0.8, form=form), 0.8),
            (LOBS(error=0.1, form=form), 0.1),
        ):
            assert bool((method.solve(p, target).weights[zero] == 0).all())


def test_compressed_programs_give_the_same_weights() -> None:
    p = correlated(200, 8, 4, seed=10)
    moments = Moments(p.weights, p.bias, torch.float64)
    moments.add(p.inputs, p.lo, p.lo)
    compressed = moments.program()
    for form in lobs.FORMS:
        own, other = (LOBS(sparsity=0.5, form=form).solve(q, 0.5) for q in (p, compressed))
        torch.testing.assert_close(own.weights, other.weights, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(own.bias, other.bias, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("home", ["layer", "norm", "none"])
def test_behind_batch_norm_the_layers_own_weights_are_seen(home: Any) -> None:
    p = correlated(120, 8, 4, seed=11)
    g = generator(1)
    scale = torch.rand(4, generator=g, dtype=torch.float64) + 0.5
    mean, beta = torch.randn(4, generator=g, dtype=torch.float64), torch.randn(4, generator=g, dtype=torch.float64)
    bias = p.bias if home == "layer" else torch.zeros(4, dtype=torch.float64)
    fold = Fold(scale, mean, beta, bias, home)
    Z = fold.apply(p.inputs @ p.weights + bias)
    column = p.bias_column if home != "none" else None
    offset = fold.offset if home != "none" else None
    shift = 0.0 if home != "none" else fold.offset
    folded = replace(p, weights=fold.weights(p.weights), bias=offset, bias_column=column, lo=Z - shift, hi=Z - shift, fold=fold)
    plain = p if home == "layer" else replace(p, bias=None, bias_column=None)
    for form in lobs.FORMS:
        own, inner = (LOBS(sparsity=0.5, form=form).solve(q, 0.5) for q in (plain, folded))
        torch.testing.assert_close(fold.raw(inner.weights), own.weights, rtol=1e-7, atol=1e-9)
        if home == "layer":
            torch.testing.assert_close(fold.own_offset(inner.bias), own.bias, rtol=1e-7, atol=1e-9)
        elif home == "norm":
            torch.testing.assert_close(inner.bias, fold.offset)
        error = LOBS(error=0.1, form=form).solve(folded, 0.1)
        assert error.distance <= error.tolerance * (1 + 1e-9)


def test_inputs_that_are_zero_throughout_go_first() -> None:
    p = layer(60, 8, 5, "identity", seed=12)
    A = p.inputs.clone()
    A[:, [1, 6]] = 0
    Z = A @ p.weights + p.bias
    p = replace(p, inputs=A, lo=Z, hi=Z)
    for form in lobs.FORMS:
        solution = LOBS(sparsity=0.25, form=form, keep_bias=True).solve(p, 0.25)
        assert not bool(solution.weights[[1, 6]].any()) and int((solution.weights != 0).sum()) == 30
        torch.testing.assert_close(solution.weights, p.weights * (A != 0).any(0)[:, None], rtol=1e-5, atol=1e-5)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "exactly one of sparsity and error; found none"),
    ({"sparsity": 0.5, "error": 0.1}, "found sparsity and error"),
    ({"sparsity": 1.0}, "fraction of zeros"),
    ({"error": -0.1}, "error must be >= 0"),
    ({"error": {"fc": math.nan}}, "error\\['fc'\\]"),
    ({"sparsity": 0.5, "form": "exact"}, "form must be one of 'published', 'refitted', 'greedy', found 'exact'"),
    ({"sparsity": 0.5, "inverse": "svd"}, "inverse must be one of"),
    ({"sparsity": 0.5, "damping": 0.0}, "damping must be a finite number above 0"),
    ({"sparsity": 0.5, "iterative": 3}, "iterative must be True or False"),
    ({"sparsity": 0.5, "keep_bias": None}, "keep_bias must be True or False"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        LOBS(**settings)


@pytest.mark.parametrize("inverse", lobs.INVERSES)
def test_a_hessian_without_inverse_is_refused(inverse: Any) -> None:
    p = layer(5, 8, 2, "identity", seed=13)
    p = replace(p, inputs=1e9 * p.inputs, name="fc")
    with pytest.raises(InvalidInput, match=r"layer 'fc': the Hessian .* raise damping"):
        LOBS(sparsity=0.5, inverse=inverse, damping=1e-9).solve(p, 0.5)
    assert torch.isfinite(LOBS(sparsity=0.5, inverse=inverse, damping=1e12).solve(p, 0.5).weights).all()


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def batches() -> list[Tensor]:
    return list((torch.randn(120, 12, generator=generator(3)) @ torch.randn(12, 12, generator=generator(4))).split(40))


@pytest.mark.parametrize("scheme", ["parallel", "cascade"])
def test_a_network_within_a_threshold(scheme: Any) -> None:
    model, state = network(), copy.deepcopy(network().state_dict())
    result = prune(model, batches(), LOBS(error={"0": 0.1, "4": 0.05}), scheme=scheme, progress=False)
    assert result.certificate.holds and result.report.density < 1
    assert [layer.name for layer in result.report.layers] == ["0", "4"]
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert result.report.method == "LOBS" and LOBS(sparsity=0.5, form="greedy", keep_bias=True).describe() == "LOBS, form greedy, keep bias"
    for own in result.certificate.layers:
        assert own.tolerance is not None and own.distance <= own.tolerance * (1 + 1e-9)
    if scheme == "parallel":
        assert result.certificate.network.bound is not None
        assert result.certificate.network.achieved <= result.certificate.network.bound
    with pytest.raises(nettrim.UnknownLayer, match=r"LOBS\.error"):
        prune(model, batches(), LOBS(error={"5": 0.1}), progress=False)


def tuned(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with keep_zeros(model, optimizer):
        for batch in batches():
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()


def test_rounds_with_retraining() -> None:
    model = network()
    state = copy.deepcopy(model.state_dict())
    done = alternate(model, batches(), LOBS(sparsity=0.84, iterative=True), tuned, rounds=2, progress=False)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert [round(result.report.density, 2) for result in done.rounds] == [0.4, 0.16]
    assert all(result.report.scheme == "parallel" for result in done.rounds)
    first, last = (result.model.state_dict() for result in done.rounds)
    for key, weight in done.model.state_dict().items():
        if key.endswith("weight"):
            assert bool((last[key][first[key] == 0] == 0).all())
            assert torch.equal(weight == 0, last[key] == 0) and not torch.equal(weight, last[key])
    again = alternate(model, batches(), LOBS(sparsity=0.84, iterative=True), tuned, rounds=2, progress=False)
    assert all(torch.equal(value, again.model.state_dict()[key]) for key, value in done.model.state_dict().items())
    within = alternate(model, batches(), LOBS(error={"0": 0.1}, iterative=True), tuned, rounds=2, progress=False)
    assert all(result.certificate.holds for result in within.rounds)
    assert within.rounds[1].report.density <= within.rounds[0].report.density


def test_what_rounds_refuse() -> None:
    model = network()
    with pytest.raises(InvalidInput, match=r"LOBS: iterative=True .* call nettrim.alternate"):
        prune(model, batches(), LOBS(sparsity=0.5, iterative=True), progress=False)
    for method in (LOBS(sparsity=0.5), OBS(sparsity=0.5)):
        with pytest.raises(InvalidInput, match="iterative=True"):
            alternate(model, batches(), method, tuned, progress=False)
    with pytest.raises(InvalidInput, match="rounds must be a whole number"):
        alternate(model, batches(), LOBS(sparsity=0.5, iterative=True), tuned, rounds=0)
    with pytest.raises(InvalidInput, match="retrain must be a function"):
        alternate(model, batches(), LOBS(sparsity=0.5, iterative=True), None)

    def forgets(pruned: nn.Module) -> None:
        with torch.no_grad():
            pruned[0].weight += 1

    with pytest.raises(InvalidInput, match=r"keep the zeros of '0.weight', and after round 1"):
        alternate(model, batches(), LOBS(sparsity=0.5, iterative=True), forgets, progress=False)

    def wraps(pruned: nn.Module) -> None:
        nn.utils.parametrizations.weight_norm(pruned[0])

    with pytest.raises(InvalidInput, match="layer '0': its weight is computed from other parameters"):
        alternate(model, batches(), LOBS(sparsity=0.5, iterative=True), wraps, progress=False)

    def replaces(pruned: nn.Module) -> None:
        pruned[0] = nn.Identity()

    with pytest.raises(InvalidInput, match="after round 1 '0' is another one"):
        alternate(model, batches(), LOBS(sparsity=0.5, iterative=True), replaces, progress=False)


class Shifted(nn.Module):
    """A parameter of no layer that starts at zero, and a layer with a zero that is not pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.first, self.last = nn.Parameter(torch.zeros(1, 6)), nn.Linear(6, 8), nn.Linear(8, 3)
        self.last.weight.data[0, 0] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x + self.shift)))


def test_zeros_that_pruning_did_not_make_may_learn() -> None:
    def learns(pruned: nn.Module) -> None:
        with torch.no_grad():
            pruned.shift += 1.0
            pruned.last.weight += 1.0

    x = torch.rand(30, 6, generator=torch.Generator().manual_seed(0))
    done = alternate(Shifted(), x, LOBS(sparsity=0.5, iterative=True), learns, rounds=2, layers=["first"], progress=False)
    assert len(done.rounds) == 2 and bool((done.model.shift == 2).all())
