"""Every number of a certificate, on random networks and by hand."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from numpy.typing import NDArray
from scipy.special import ndtr
from scipy.stats import binom, binomtest
from torch import Tensor, nn

from nettrim import Certificate, InvalidInput, Magnitude, NetTrim, PruneResult, Status, preimage, prune
from nettrim.calibration import Calibration
from nettrim.capture import Replica, reference_replica, replicate, scan
from nettrim.certificate import clopper_pearson_upper
from nettrim.graph import read
from nettrim.heldout import certify_heldout
from nettrim.tally import LayerTally, entry_norm, spectral_norm
from nettrim.verification import Claim, Setup, certify

CPU = torch.device("cpu")
ACTIVATIONS: dict[str, type[nn.Module] | None] = {
    "identity": None,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardtanh": nn.Hardtanh,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Sequential, Tensor]:
    """A random network, scaled so that its clamps saturate now and then, and random data."""
    depth = draw(st.integers(1, 4))
    widths = draw(st.lists(st.integers(1, 7), min_size=depth + 1, max_size=depth + 1))
    kinds = draw(st.lists(st.sampled_from(sorted(ACTIVATIONS)), min_size=depth, max_size=depth))
    bias, seed, rows = draw(st.booleans()), draw(st.integers(0, 10**6)), draw(st.integers(1, 25))
    generator = torch.Generator().manual_seed(seed)
    modules: list[nn.Module] = []
    for inputs, outputs, kind in zip(widths[:-1], widths[1:], kinds, strict=True):
        layer = nn.Linear(inputs, outputs, bias)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=2 / math.sqrt(inputs), generator=generator)
        modules.append(layer)
        if (activation := ACTIVATIONS[kind]) is not None:
            modules.append(activation())
    return nn.Sequential(*modules), torch.randn(rows, widths[0], generator=generator)


METHODS = [
    Magnitude(sparsity=0.3),
    Magnitude(sparsity=0.8),
    NetTrim(sparsity=0.5, max_iterations=5),
    NetTrim(epsilon=0.1, max_iterations=30),
    NetTrim(epsilon=0.3, norm="l0", max_iterations=5),
    NetTrim(penalty=0.2, max_iterations=30),
    NetTrim(sparsity=0.5, max_iterations=5, correction=0.5),
]


def _random_network(network: tuple[nn.Sequential, Tensor], method: Any, scheme: Any, cap: int) -> None:
    model, x = network
    result = prune(model, x, method, scheme=scheme, max_samples=cap, progress=False)
    with torch.no_grad():
        check(model, result, x, scheme)


DRAWN = given(
    network=networks(), method=st.sampled_from(METHODS), scheme=st.sampled_from(["cascade", "parallel"]), cap=st.sampled_from([7, 1000])
)
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=150, suppress_health_check=QUIET)
@DRAWN
def test_what_is_stated_holds_on_random_networks(network: tuple[nn.Sequential, Tensor], method: Any, scheme: Any, cap: int) -> None:
    _random_network(network, method, scheme, cap)


@pytest.mark.slow
@settings(max_examples=3000, suppress_health_check=QUIET)
@DRAWN
def test_what_is_stated_holds_on_many_random_networks(network: tuple[nn.Sequential, Tensor], method: Any, scheme: Any, cap: int) -> None:
    _random_network(network, method, scheme, cap)


def check(model: nn.Sequential, result: PruneResult, x: Tensor, scheme: str) -> None:
    """Recomputes all distances with code of its own and compares."""
    certificate = result.certificate
    assert certificate.sound
    assert certificate.holds or any(layer.status is Status.INFEASIBLE for layer in result.report.layers)
    before, after = _responses(model, x), _responses(result.model, x)
    allowed = 1 + 1e-9
    for layer in certificate.layers:
        inputs, z_before, y_before = before[layer.name]
        hat_inputs, z_after, y_after = after[layer.name]
        module: Any = result.model.get_submodule(layer.name)
        A = inputs if scheme == "parallel" else hat_inputs
        Z = A @ module.weight.double().T + (0 if module.bias is None else module.bias.double())
        activation = preimage.named(layer.activation)
        distance = _distance(Z, z_before, activation)
        moved = float(((y_after - y_before) if activation.exact else (z_after - z_before)).norm())
        size = float((y_before if activation.exact else z_before).norm())
        assert layer.distance_all_rows == pytest.approx(distance, rel=1e-9, abs=1e-9 * size)
        assert layer.discrepancy == pytest.approx(moved, rel=1e-9, abs=1e-9 * size)
        # Lemma 1, at the inputs where the distance was measured
        own = float((activation.apply(Z) - activation.apply(z_before)).norm())
        assert own <= distance * allowed + 1e-9 * size
        assert layer.bound is not None and moved <= layer.bound * allowed + 1e-9 * size
        if layer.rows == layer.rows_total:
            assert layer.reference_norm == pytest.approx(size, rel=1e-9, abs=1e-12)
            assert layer.distance == layer.distance_all_rows
    network = certificate.network
    final_before, final_after = _forward(model, x), _forward(result.model, x)
    assert network.achieved == pytest.approx(float((final_after - final_before).norm()), rel=1e-8, abs=1e-9 * network.reference_norm)
    slack = 1e-9 * network.reference_norm
    assert network.reason == ""
    for bound in (network.bound, network.bound_from_tolerances, network.bound_link_normalised):
        assert bound is None or network.achieved <= bound * allowed + slack
    assert network.bound is not None
    if network.bound_from_tolerances is not None:
        assert network.bound <= network.bound_from_tolerances * allowed + slack
        if network.bound_link_normalised is not None:
            assert network.bound_from_tolerances <= network.bound_link_normalised * allowed + slack


def _responses(model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Input, pre-activation and output after the activation of each layer, in float64."""
    value, found = x.double(), {}
    modules = list(model.named_children())
    for i, (name, module) in enumerate(modules):
        if isinstance(module, nn.Linear):
            z = value @ module.weight.double().T.detach() + (0 if module.bias is None else module.bias.detach().double())
            following = modules[i + 1][1] if i + 1 < len(modules) else nn.Identity()
            y = z if isinstance(following, nn.Linear) else following(z)
            found[name] = (value, z, y)
            value = y
    return found


def _forward(model: nn.Module, x: Tensor) -> Tensor:
    return list(_responses(model, x).values())[-1][2]


def _distance(Z: Tensor, z_reference: Tensor, activation: preimage.Activation) -> float:
    """By cases: where the reference is saturated only the side beyond counts, elsewhere the difference of pre-activations."""
    difference = Z - z_reference
    low, high = z_reference <= activation.low, z_reference >= activation.high
    difference = torch.where(low, (Z - activation.low).clamp(min=0), difference)
    difference = torch.where(high, (Z - activation.high).clamp(max=0), difference)
    return float(difference.norm())


# --- one network by hand ------------------------------------------------------------------------------------------------------------

Array = NDArray[np.float64]


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
def test_one_network_by_hand(scheme: Any) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.GELU(), nn.Linear(6, 4))
    x = torch.randn(30, 5)
    result = prune(model, x, NetTrim(epsilon=0.15), scheme=scheme, progress=False)
    certificate = result.certificate

    def arrays(name: str, source: nn.Module) -> tuple[Array, Array]:
        module = source.get_submodule(name)
        return module.weight.detach().numpy().T.astype(float), module.bias.detach().numpy().astype(float)  # type: ignore[operator, union-attr]

    def gelu(z: Array) -> Array:
        return z * ndtr(z)

    X = x.numpy().astype(float)
    (W1, b1), (W2, b2), (W3, b3) = (arrays(name, model) for name in "024")
    (V1, c1), (V2, c2), (V3, c3) = (arrays(name, result.model) for name in "024")
    Z1 = X @ W1 + b1
    Y1 = np.maximum(Z1, 0)
    Z2 = Y1 @ W2 + b2
    Y2 = gelu(Z2)
    Z3 = Y2 @ W3 + b3
    H1 = np.maximum(X @ V1 + c1, 0)
    H2 = gelu(H1 @ V2 + c2)
    H3 = H2 @ V3 + c3
    A2, A3 = (H1, H2) if scheme == "cascade" else (Y1, Y2)
    D1 = X @ V1 + c1 - Y1
    D1[(Y1 == 0) & (D1 < 0)] = 0
    distances = [np.linalg.norm(D1), np.linalg.norm(A2 @ V2 + c2 - Z2), np.linalg.norm(A3 @ V3 + c3 - Z3)]
    norms = [np.linalg.norm(Y1), np.linalg.norm(Z2), np.linalg.norm(Z3)]
    moved = [np.linalg.norm(H1 - Y1), np.linalg.norm(H1 @ V2 + c2 - Z2), np.linalg.norm(H3 - Z3)]
    assert [layer.distance for layer in certificate.layers] == pytest.approx(distances, rel=1e-10)
    assert [layer.reference_norm for layer in certificate.layers] == pytest.approx(norms, rel=1e-10)
    assert [layer.discrepancy for layer in certificate.layers] == pytest.approx(moved, rel=1e-10)
    assert [layer.tolerance for layer in certificate.layers] == pytest.approx([0.15 * norm for norm in norms], rel=1e-6)

    network = certificate.network
    assert network.achieved == pytest.approx(moved[2], rel=1e-10)
    assert network.agreement == np.mean(H3.argmax(1) == Z3.argmax(1))
    tolerances = [layer.tolerance or 0.0 for layer in certificate.layers]
    gelu_slope = 1.129
    spectral = [np.linalg.norm(V, 2) for V in (V1, V2, V3)]
    entries = [np.abs(V).sum() for V in (V1, V2, V3)]
    if scheme == "parallel":

        def unrolled(steps: list[float], factors: list[Any]) -> float:
            first = steps[1] + factors[1] * steps[0]
            return steps[2] + factors[2] * gelu_slope * first

        assert network.bound == pytest.approx(unrolled([float(d) for d in distances], spectral), rel=1e-10)
        assert network.bound_from_tolerances == pytest.approx(unrolled(tolerances, spectral), rel=1e-10)
        assert network.bound_link_normalised == pytest.approx(unrolled(tolerances, entries), rel=1e-10)
        assert certificate.layers[1].bound == pytest.approx(distances[1] + spectral[1] * distances[0], rel=1e-10)
    else:
        assert network.bound == pytest.approx(distances[2], rel=1e-10)
        assert network.bound_from_tolerances == pytest.approx(tolerances[2], rel=1e-10)
        originals = [np.linalg.norm(A2 @ W2 + b2 - Z2), np.linalg.norm(A3 @ W3 + b3 - Z3)]
        assert [layer.original_distance for layer in certificate.layers[1:]] == pytest.approx(originals, rel=1e-10)
        ratios = [tolerances[1] / originals[0], tolerances[2] / originals[1]]  # roots of gamma (docs/theory.md, 4.5)
        link = tolerances[0] * ratios[0] * np.abs(W2).sum() * gelu_slope * ratios[1] * np.abs(W3).sum()
        assert network.bound_link_normalised == pytest.approx(link, rel=1e-10)


def test_norms() -> None:
    W = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    exact = np.linalg.svd(W.numpy().astype(float), compute_uv=False)[0]
    assert exact <= spectral_norm(W) <= exact * (1 + 1e-11)
    assert entry_norm(W) == pytest.approx(np.abs(W.numpy().astype(float)).sum())
    assert spectral_norm(torch.zeros(0, 3)) == 0.0


# --- batches ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[50], [49, 1], [1] * 50, [20, 20, 10]])
@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
def test_any_batches_give_the_same_certificate(sizes: list[int], scheme: Any) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4), nn.Hardtanh(), nn.Linear(4, 3))
    x = torch.randn(50, 5)
    result = prune(model, x, NetTrim(epsilon=0.2), scheme=scheme, max_samples=30, progress=False)
    again = certified(model, result, Calibration(list(x.split(sizes))), scheme)
    for stored, new in zip(result.certificate.layers, again.layers, strict=True):
        assert (new.rows, new.rows_total, new.holds) == (stored.rows, stored.rows_total, True)
        for name in ("distance", "distance_all_rows", "discrepancy", "reference_norm", "bound", "original_distance", "gap"):
            assert getattr(new, name) == pytest.approx(getattr(stored, name), rel=1e-9, abs=1e-12), name
    assert again.network.achieved == pytest.approx(result.certificate.network.achieved, rel=1e-9)
    assert again.network.bound == pytest.approx(result.certificate.network.bound, rel=1e-9)


def certified(model: nn.Module, result: PruneResult, batches: Calibration, scheme: str) -> Certificate:
    stored = result.certificate
    reference, pruned = reference_replica(model, CPU, next(iter(batches)))[0], replicate(result.model, CPU, torch.float64)
    names = [layer.name for layer in stored.layers]
    graph = reference.graph = pruned.graph = read(reference.model, names)
    claims = [
        Claim(layer.name, graph.readings[layer.name].activation, layer.tolerance, layer.gap_kind, layer.gap_level)
        for layer in stored.layers
    ]
    setup = Setup("", "preimage", scheme, "float64", stored.max_samples, stored.seed, "", "")
    return certify(reference, pruned, claims, graph, batches, scan(reference, names, batches), setup)


def test_altered_weights_do_not_hold() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4))
    x = torch.randn(50, 5)
    for scheme in ("cascade", "parallel"):
        result = prune(model, x, NetTrim(epsilon=0.1), scheme=scheme, progress=False)  # type: ignore[arg-type]
        assert certified(model, result, Calibration(x), scheme).holds
        with torch.no_grad():
            result.model.get_parameter("0.weight")[0, 0] += 1.0
        assert not certified(model, result, Calibration(x), scheme).holds


def test_a_tally_with_nan_does_not_hold() -> None:
    W = torch.full((2, 2), float("nan"))
    tally = LayerTally(W, False, preimage.RELU)
    x = torch.ones(3, 2, dtype=torch.float64)
    tally.add((x, x), x, x @ W.double(), x, 0.0, slice(None), lambda rows: x[rows])
    assert not tally.certificate("fc", 1.0, None, "").holds


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
def test_gaps_are_recomputed(scheme: Any) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(120, 8)
    for method in (NetTrim(epsilon=0.1, gap=0.005), NetTrim(penalty=1.0, gap=0.005)):
        result = prune(model, x, method, scheme=scheme, progress=False)
        for layer, report in zip(result.certificate.layers, result.report.layers, strict=True):
            assert layer.gap_kind == method.kind
            assert layer.gap is not None and report.gap is not None
            assert 0 <= layer.gap <= 0.03
    assert all(layer.gap is None for layer in prune(model, x, Magnitude(sparsity=0.5), progress=False).certificate.layers)


# --- held-out statements ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize(("events", "samples"), [(0, 1), (0, 10), (1, 1), (3, 10), (10, 10), (0, 100_000), (17, 1000), (999, 1000)])
def test_clopper_pearson(events: int, samples: int, confidence: float) -> None:
    bound = clopper_pearson_upper(events, samples, confidence)
    # one-sided: half of what a two-sided interval leaves out
    two_sided = (
        binomtest(events, samples).proportion_ci(confidence_level=2 * confidence - 1, method="exact").high if confidence > 0.5 else None
    )
    assert two_sided is None or bound == pytest.approx(two_sided, rel=1e-9)
    one_sided = binomtest(events, samples, alternative="less").proportion_ci(confidence_level=confidence, method="exact").high
    assert bound == pytest.approx(one_sided, rel=1e-9)
    if events < samples:
        assert binom.cdf(events, samples, bound) == pytest.approx(1 - confidence, rel=1e-6)
    else:
        assert bound == 1.0


def test_clopper_pearson_covers() -> None:
    generator = np.random.default_rng(0)
    for p, n in ((0.01, 50), (0.2, 40), (0.5, 7)):
        table = [clopper_pearson_upper(k, n, 0.9) for k in range(n + 1)]
        covered = np.mean([table[k] >= p for k in generator.binomial(n, p, size=4000)])
        assert covered >= 0.9 - 3 * math.sqrt(0.09 / 4000)


@pytest.mark.parametrize(("events", "samples", "confidence"), [(0, 0, 0.95), (-1, 5, 0.95), (6, 5, 0.95), (1, 5, 0.0), (1, 5, 1.0)])
def test_clopper_pearson_refuses(events: int, samples: int, confidence: float) -> None:
    with pytest.raises(InvalidInput):
        clopper_pearson_upper(events, samples, confidence)


def heldout(model: nn.Module, pruned: nn.Module, batches: Any, **keywords: Any) -> Any:
    calibration = Calibration(torch.randn(20, 4, generator=torch.Generator().manual_seed(9)))
    reference, other = (Replica(m.double().eval(), CPU, torch.float64) for m in (model, pruned))
    return certify_heldout(reference, other, Calibration(batches, "heldout"), calibration, **keywords)


def test_heldout_counts_by_hand() -> None:
    torch.manual_seed(0)
    model, other = nn.Linear(4, 3), nn.Linear(4, 3)
    other.load_state_dict({key: value + 0.1 * torch.randn_like(value) for key, value in model.state_dict().items()})
    x, labels = torch.randn(70, 4), torch.randint(0, 3, (70,))
    statement = heldout(model, other, list(zip(x.split(32), labels.split(32), strict=True)), level=0.2, confidence=0.9)
    with torch.no_grad():
        Y, X = model(x.double()), other(x.double())
    exceed = int(((X - Y).norm(dim=1) / Y.norm(dim=1) > 0.2).sum())
    changes = int((X.argmax(1) != Y.argmax(1)).sum())
    assert 0 < exceed < 70 and 0 < changes < 70
    assert (statement.samples, statement.exceed, statement.class_changes) == (70, exceed, changes)
    assert statement.exceed_bound == clopper_pearson_upper(exceed, 70, 0.9)
    assert statement.class_change_bound == clopper_pearson_upper(changes, 70, 0.9)
    assert statement.accuracy_before == pytest.approx(float((Y.argmax(1) == labels).double().mean()))
    assert statement.accuracy_after == pytest.approx(float((X.argmax(1) == labels).double().mean()))


def test_heldout_counts_what_is_not_finite_as_events() -> None:
    class Broken(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x[:, :1] > 0, float("nan"), super().forward(x))

    torch.manual_seed(0)
    model, broken = nn.Linear(4, 3), Broken(4, 3)
    broken.load_state_dict(model.state_dict())
    x = torch.randn(50, 4)
    statement = heldout(model, broken, x)
    assert statement.exceed == statement.class_changes == int((x[:, 0] > 0).sum())


def test_heldout_settings_are_checked() -> None:
    model, x = nn.Linear(4, 3), torch.randn(10, 4)
    for keywords in ({"confidence": 1.0}, {"level": -0.1}, {"level": float("nan")}):
        with pytest.raises(InvalidInput):
            heldout(model, model, x, **keywords)
    calibration = torch.randn(20, 4, generator=torch.Generator().manual_seed(9))
    with pytest.raises(InvalidInput, match="all of these samples are calibration data"):
        heldout(model, model, calibration[5:10])
