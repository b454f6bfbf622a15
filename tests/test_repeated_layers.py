"""Layers that a pass calls more than once: every bound that is stated of them, and around them, is true."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from nettrim import Magnitude, NetTrim, prune, verify

WIDTH = 5


class Walk(nn.Module):
    """Calls its layers in a given order, some of them more than once, with or without ReLU, and one module under two names."""

    def __init__(self, order: list[int], relu: bool, twin: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        if twin:
            self.again = self.layers[1]
        self.order, self.relu = order, relu

    def forward(self, x: Tensor) -> Tensor:
        for index in self.order:
            x = self.layers[index](x)
            x = torch.relu(x) if self.relu else x
        return x


@st.composite
def walks(draw: st.DrawFn) -> tuple[Walk, Tensor]:
    order = draw(st.lists(st.integers(0, 2), min_size=2, max_size=6))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    net = Walk(order, draw(st.booleans()), draw(st.booleans())).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(draw(st.sampled_from([0.5, 1.0, 3.0])))
    return net, torch.randn(draw(st.integers(1, 15)), WIDTH)


METHODS = [Magnitude(sparsity=0.4), NetTrim(sparsity=0.5, max_iterations=5), NetTrim(epsilon=0.2, gap=0.1, max_iterations=100)]


def outputs(net: Walk, x: Tensor) -> dict[str, list[Tensor]]:
    """What each layer's calls give in float64, after the activation."""
    found: dict[str, list[Tensor]] = {}
    value = x.double()
    for index in net.order:
        layer = net.layers[index]
        assert isinstance(layer, nn.Linear)
        value = value @ layer.weight.detach().double().T + layer.bias.detach().double()
        value = value.clamp(min=0) if net.relu else value
        found.setdefault(f"layers.{index}", []).append(value)
    return found | {"output": [value]}


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(walk=walks(), method=st.sampled_from(METHODS), scheme=st.sampled_from(["cascade", "parallel"]))
def test_every_stated_bound_is_true(walk: tuple[Walk, Tensor], method: Any, scheme: Any) -> None:
    net, x = walk
    result = prune(net, [x], method, scheme=scheme, progress=False)
    certificate = result.certificate
    assert certificate.sound
    before, after = outputs(net, x), outputs(result.model, x)
    for layer in certificate.layers:
        calls = before[layer.name]
        moved = float(torch.cat([new - old for old, new in zip(calls, after[layer.name], strict=True)]).norm())
        slack = 1e-9 * float(torch.cat(calls).norm())
        for bound in (layer.bound, layer.theorem):
            assert bound is None or moved <= bound * (1 + 1e-9) + slack
        if len(calls) > 1:
            assert layer.theorem is None
            if scheme == "parallel":  # its later calls see what the earlier ones have changed: nothing bounds that
                assert layer.bound is None and f"called {len(calls)} times" in layer.reason
    (last, moved_last) = before["output"][0], float((after["output"][0] - before["output"][0]).norm())
    network = certificate.network
    for bound in (network.bound, network.bound_from_tolerances, network.bound_link_normalised):
        assert bound is None or moved_last <= bound * (1 + 1e-9) + 1e-9 * float(last.norm())


@pytest.mark.parametrize("program", ["preimage", "halfspace"])
def test_a_multiple_of_a_distance_that_moves_is_not_claimed(program: Any, tmp_path: Any) -> None:
    """In a cascade, how far a repeated layer's original weights are off depends on what the layer has become."""
    torch.manual_seed(0)
    net, x = Walk([0, 1, 1, 2], True, False).eval(), torch.randn(30, WIDTH)
    result = prune(net, [x], NetTrim(epsilon=0.2, gamma=1.1, program=program, gap=0.05), progress=False)
    repeated, last = result.certificate.layers[1], result.certificate.layers[2]
    assert repeated.name == "layers.1" and repeated.tolerance is None and last.tolerance is not None
    assert any("the distance that gamma multiplies moved" in note for note in result.report.layers[1].notes)
    verify(result.save(tmp_path), net, [x])


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
def test_a_layer_that_is_called_twice_is_saved_and_verified(scheme: Any, tmp_path: Any) -> None:
    torch.manual_seed(0)
    net, x = Walk([0, 1, 1, 2], True, True).eval(), torch.randn(30, WIDTH)
    result = prune(net, [x], NetTrim(epsilon=0.3), scheme=scheme, progress=False)
    verify(result.save(tmp_path), net, [x])
