"""The zoo's architectures through prune: exactness, guarantees, write-back, Lemma 1 with pooling and residual sums, nothing left behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from verdicts import truthful

from nettrim import Magnitude, NetTrim, prune
from nettrim.attention import opened
from nettrim.capture import Replica, hashes, read_graph, replicate
from nettrim.experiments import zoo
from nettrim.preimage import nearest_point
from nettrim.report import SOLVED
from nettrim.selection import select
from nettrim.status import Status

SMALL: dict[str, dict[str, Any]] = {
    "lenet5": {"width": 2},
    "vgg_like": {"width": 2},
    "resnet20_a": {"width": 3, "blocks": 1},
    "resnet20_b": {"width": 2, "blocks": 1},
    "depthwise_separable": {"width": 2},
    "transformer_encoder": {"width": 8, "heads": 2, "layers": 1},
}
SIDES = {"lenet5": 16}
NAMES = list(zoo.NETWORKS)
SCHEMES = st.sampled_from(["cascade", "parallel"])
SEEDS = st.integers(0, 10_000)
FEW = settings(max_examples=2, deadline=None)


def network(name: str, seed: int) -> nn.Module:
    """An untrained network of that architecture, small, whose batch-norms are what training makes of them: no identities."""
    entry = zoo.NETWORKS[name]
    entry = replace(entry, arguments={**entry.arguments, **SMALL[name]})
    model = entry.make(in_channels=1, classes=4, image_size=SIDES.get(name, 8), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
                module.weight.copy_(1 + 0.5 * torch.randn(module.weight.shape, generator=generator))  # negative factors too
                module.bias.copy_(0.3 * torch.randn(module.bias.shape, generator=generator))
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.copy_(0.3 * torch.randn(module.running_mean.shape, generator=generator))
                module.running_var.uniform_(0.3, 2.0, generator=generator)
    return model


def images(name: str, seed: int, count: int = 4) -> Tensor:
    side = SIDES.get(name, 8)
    return torch.randn(count, 1, side, side, generator=torch.Generator().manual_seed(seed + 1))


@pytest.mark.parametrize("name", NAMES)
@FEW
@given(SEEDS, SCHEMES, st.sampled_from([NetTrim(epsilon=0.0), NetTrim(sparsity=0.0), Magnitude(sparsity=0.0)]))
def test_without_pruning_the_network_is_the_same_function(name: str, seed: int, scheme: Any, method: Any) -> None:
    model, x = network(name, seed), images(name, seed)
    result = prune(model, x, method, scheme=scheme, max_samples=40, seed=seed, progress=False)
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), model(x), rtol=2e-4, atol=2e-4)
    assert truthful(result)
    assert result.certificate.network.achieved <= 1e-4 * result.certificate.network.reference_norm
    assert list(result.model.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("name", NAMES)
@FEW
@given(SEEDS, SCHEMES, st.sampled_from([NetTrim(epsilon=0.1, gap=0.3, max_iterations=150), NetTrim(sparsity=0.6, max_iterations=10)]))
def test_certificates_hold_and_stored_weights_keep_what_was_predicted(name: str, seed: int, scheme: Any, method: NetTrim) -> None:
    model, x = network(name, seed).train(), images(name, seed)  # as a user may leave it
    before, modes = hashes(model), [module.training for module in model.modules()]
    result = prune(model, x, method, scheme=scheme, max_samples=40, seed=seed, progress=False)
    # nothing is left behind on the user's model, or on the result
    assert hashes(model) == before and [module.training for module in model.modules()] == modes
    for left in (model, result.model):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in left.modules())
        assert [type(module) for module in left.modules()] == [type(module) for module in model.modules()]
    assert list(result.model.state_dict()) == list(model.state_dict())
    assert [p.requires_grad for p in result.model.parameters()] == [p.requires_grad for p in model.parameters()]
    certificate = result.certificate
    assert truthful(result)
    names = [layer.name for layer in result.report.layers]
    twin = opened(model)
    graph = read_graph(replicate(twin, torch.device("cpu"), torch.float64), names, {}, x)
    for place, (said, layer) in enumerate(zip(result.report.layers, certificate.layers, strict=True)):
        scale = 1e-6 * layer.reference_norm + 1e-12
        assert layer.bound is None or layer.discrepancy <= layer.bound + scale
        assert layer.tolerance is None or layer.distance <= layer.tolerance + scale or said.status is Status.INFEASIBLE
        if scheme == "parallel" or not graph.feeding(layer.name, names[place + 1 :]):  # nobody changed its sum later
            assert not any(SOLVED in note for note in said.notes)
        if method.kind == "sparsity" and said.status is not Status.ORIGINAL_KEPT:
            assert said.nonzeros <= round(0.4 * said.weights)
    with torch.no_grad():
        moved = float((result.model.eval()(x).double() - twin.eval()(x).double()).norm())
    assert moved == pytest.approx(certificate.network.achieved, rel=1e-3, abs=1e-4 * certificate.network.reference_norm)
    assert certificate.network.bound is None or certificate.network.achieved <= certificate.network.bound * (1 + 1e-6)


def replica(model: nn.Module) -> Replica:
    return replicate(model, torch.device("cpu"), torch.float64)


class Values(fx.Interpreter):
    """Runs a graph and keeps what its nodes give."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: list[Tensor] = []

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.seen.append(value.clone())
        return value


@pytest.mark.parametrize("name", NAMES)
@FEW
@given(SEEDS, st.sampled_from([0.02, 0.5]), st.booleans())
@torch.no_grad()
def test_lemma_1_with_pooling_and_branches(name: str, seed: int, size: float, cascade: bool) -> None:
    """Whatever the weights are, a layer's output moves by at most the distance of its part to the shifted box."""
    model, x = opened(network(name, seed)), images(name, seed, 4)
    names = select(model, None, ())
    reference, changed = replica(model), replica(model)
    generator = torch.Generator().manual_seed(seed + 2)
    for layer in names:
        weight = changed.model.get_parameter(f"{layer}.weight")
        weight += size * weight.std() * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    reference.graph = changed.graph = graph = read_graph(reference, names, {}, x)
    assert graph.traced is not None
    values = Values(fx.GraphModule(reference.model, graph.traced))
    values.run(x.double())
    before, after = reference.units(names), changed.units(names)
    expected, found = reference.calls(x, names)[0], changed.calls(x, names)[0]
    for layer in names:
        (old,), (new,) = expected[layer], found[layer]
        output = before[layer].output(before[layer].full(old))
        if graph.readings[layer].source == "graph":  # what the unit says stands in the network, does
            assert any(value.shape == output.shape and torch.allclose(value, output, rtol=0, atol=1e-9) for value in values.seen)
        lo, hi, _ = before[layer].target(old)
        if cascade:
            own, branch = after[layer].own(new.y), after[layer].branch(new)
            moved = after[layer].output(after[layer].full(new)) - output
        else:  # the new weights on the reference network's inputs and branch
            own, branch = after[layer].respond(old.x), before[layer].branch(old)
            rows = own if branch is None else own + branch
            full = before[layer].full(old)
            shape = full.movedim(1, -1).shape if before[layer].view.convolution is not None else full.shape
            whole = rows.reshape(shape)
            moved = before[layer].output(whole.movedim(-1, 1) if before[layer].view.convolution is not None else whole) - output
        if branch is not None:
            lo, hi = lo - branch, hi - branch
        distance = float((own - nearest_point(own, lo, hi)).norm())
        assert float(moved.norm()) <= distance * (1 + 1e-9) + 1e-9
        if size == 0.5 and before[layer].uses_moments and before[layer].reading.activation.slope == 1:
            assert float(moved.norm()) == pytest.approx(distance)  # a point is missed by all that moves


def test_the_small_networks_have_what_the_lemma_speaks_of() -> None:
    seen: set[str] = set()
    for name in NAMES:
        model = opened(network(name, 0))
        names = select(model, None, ())
        for reading in read_graph(replica(model), names, {}, images(name, 0)).readings.values():
            seen |= {reading.activation.name, *(part for part in ("norm", "total", "pool") if getattr(reading, part))}
    assert {"relu", "relu6", "gelu", "identity", "norm", "total", "pool"} <= seen
