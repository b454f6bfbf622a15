"""Batch-norm channels with a factor of zero: the program of a layer and its certificate count the same entries, whatever is silenced."""

from __future__ import annotations

import math
import tempfile
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

import nettrim
from nettrim import LOBS, OBS, LinearADMM, Magnitude, NetTrim, Random, SparseGPT, Wanda, prune, verify
from nettrim.preimage import RELU, nearest_point
from nettrim.status import Status
from nettrim.tally import LayerTally

WIDTH = 6
METHODS: list[Any] = [
    NetTrim(sparsity=0.5, max_iterations=10),
    NetTrim(sparsity=0.0),
    NetTrim(sparsity=0.5, effort="quick"),
    NetTrim(sparsity=0.5, norm="l1", max_iterations=50),
    NetTrim(epsilon=0.1, gap=0.1, max_iterations=300),
    NetTrim(epsilon=0.0),
    NetTrim(epsilon=0.2, norm="l0", max_iterations=10),
    NetTrim(epsilon=0.1, gamma=1.2, gap=0.1, max_iterations=300),
    NetTrim(epsilon=0.1, gamma=1.1, kappa=0.8, gap=0.1, max_iterations=300),
    NetTrim(epsilon=0.2, program="halfspace", gap=0.1, max_iterations=300),
    NetTrim(penalty=0.3, max_iterations=50),
    NetTrim(penalty=0.3, norm="l0", max_iterations=5),
    NetTrim(penalty=0.3, program="halfspace", max_iterations=50),
    NetTrim(pattern="2:4", max_iterations=10),
    Magnitude(sparsity=0.5),
    Random(sparsity=0.5),
    Wanda(sparsity=0.5),
    OBS(sparsity=0.5),
    SparseGPT(sparsity=0.5),
    LinearADMM(sparsity=0.5),
    LOBS(sparsity=0.3, damping=1.0),
]


class Sum(nn.Module):
    """A sum of two branches behind batch-norms, then a linear layer; offsets go into the layer, into the norm, or nowhere."""

    def __init__(self, convolution: bool, groups: int, bias: bool, affine: bool, activation: nn.Module) -> None:
        super().__init__()
        if convolution:
            self.a = nn.Conv2d(2, WIDTH, 3, padding=1, bias=bias)
            self.b = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=groups, bias=bias)
            self.na, self.nb = nn.BatchNorm2d(WIDTH), nn.BatchNorm2d(WIDTH)
        else:
            self.a, self.b = nn.Linear(2, WIDTH, bias), nn.Linear(WIDTH, WIDTH, bias)
            self.na, self.nb = nn.BatchNorm1d(WIDTH), nn.BatchNorm1d(WIDTH)
        if not affine:
            self.nb.bias = None
        self.activation, self.c = activation, nn.Linear(WIDTH, 3)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()) if convolution else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.na(self.a(x)))
        h = self.activation(self.nb(self.b(h)) + h)
        return self.c(self.pool(h))


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    convolution = draw(st.booleans())
    seed = draw(st.integers(0, 10**6))
    torch.manual_seed(seed)
    activation = draw(st.sampled_from([nn.ReLU(), nn.LeakyReLU(0.2), nn.GELU(), nn.ReLU6(), nn.Identity()]))
    net = Sum(convolution, draw(st.sampled_from([1, 2, 3, 6])), draw(st.booleans()), draw(st.booleans()), activation)
    with torch.no_grad():
        for norm in (net.na, net.nb):
            for value in (norm.weight, norm.bias, norm.running_mean):
                if value is not None:
                    value.normal_()
            assert norm.running_var is not None
            norm.running_var.uniform_(0.3, 2.0)
            silent = draw(st.sets(st.integers(0, WIDTH - 1))) if draw(st.booleans()) else set(range(draw(st.sampled_from([3, WIDTH]))))
            for channel in silent:
                norm.weight[channel] = 0.0
    return net.eval(), torch.randn(draw(st.integers(1, 12)), *((2, 3, 3) if convolution else (2,)))


DRAWN = given(
    network=networks(), method=st.sampled_from(METHODS), scheme=st.sampled_from(["cascade", "parallel"]), cap=st.sampled_from([20, 1000])
)
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]


def check(network: tuple[nn.Module, Tensor], method: Any, scheme: Any, cap: int) -> None:
    model, x = network
    if method.needs_cascade:
        scheme = "cascade"
    result = prune(model, [x], method, scheme=scheme, max_samples=cap, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        result.save(folder)
        verify(folder, model, [x])
    for said, layer in zip(result.report.layers, result.certificate.layers, strict=True):
        assert said.reference_norm == pytest.approx(layer.reference_norm, rel=1e-9)
        if said.status is Status.CONVERGED and said.tolerance is not None and layer.tolerance is not None:
            assert layer.distance <= said.tolerance * (1 + 1e-9) + 1e-9 * layer.reference_norm
        if said.gap is not None and layer.gap is not None and said.gap < 1:
            assert layer.gap <= said.gap + 1e-6


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=QUIET)
@DRAWN
def test_what_is_saved_verifies(network: tuple[nn.Module, Tensor], method: Any, scheme: Any, cap: int) -> None:
    check(network, method, scheme, cap)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None, derandomize=True, suppress_health_check=QUIET)
@DRAWN
def test_what_is_saved_verifies_on_many_networks(network: tuple[nn.Module, Tensor], method: Any, scheme: Any, cap: int) -> None:
    check(network, method, scheme, cap)


def block(silent: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = Sum(False, 1, True, True, nn.ReLU()).eval()
    with torch.no_grad():
        net.nb.weight[:silent] = 0.0
    return net


@pytest.mark.parametrize("silent", [0, 1, 3, WIDTH])
def test_a_branch_in_silent_channels_counts_in_the_distance(silent: int) -> None:
    """What pruning the first layer does to the sum in silent channels, no weights of the second can take back."""
    net, x = block(silent), torch.randn(200, 2)
    result = prune(net, [x], NetTrim(epsilon={"a": 0.3, "b": 0.01}), progress=False)
    said, layer = result.report.layers[1], result.certificate.layers[1]
    with torch.no_grad():
        before, after = (torch.relu(m.na(m.a(x))).double() + m.nb.bias.double() for m in (net, result.model))
        lo, hi = RELU.box(RELU.apply(before))
        silenced = float((after - nearest_point(after, lo, hi))[:, :silent].norm())
    assert said.distance == pytest.approx(layer.distance, rel=1e-6)
    assert silent == 0 or silenced > 0.01
    assert layer.distance >= silenced * (1 - 1e-5)
    if silent == WIDTH:
        assert layer.distance == pytest.approx(silenced, rel=1e-5)
        assert said.status is Status.INFEASIBLE and any("batch-norm multiplies all outputs by zero" in note for note in said.notes)
        assert said.nonzeros == 0 and said.distance == pytest.approx(said.original_distance)


def test_the_constant_is_part_of_the_reference_norm() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        net[1].weight[0], net[1].bias[0] = 0.0, 5.0
    x = torch.randn(50, 3)
    layer = prune(net, [x], NetTrim(epsilon=0.1), progress=False).report.layers[0]
    with torch.no_grad():
        assert layer.reference_norm == pytest.approx(float(net[:3](x).norm()), rel=1e-6)
    assert layer.tolerance == pytest.approx(0.1 * layer.reference_norm)


def test_the_gap_of_a_certificate_leaves_silent_outputs_out() -> None:
    """They are a fixed amount of the program: its gap is that of the program of the others with what they leave of the tolerance."""
    generator = torch.Generator().manual_seed(0)
    A, W = torch.randn(30, 4, generator=generator).double(), torch.randn(4, 3, generator=generator).double()
    live = torch.tensor([True, False, True])
    Z0 = A @ W
    W_hat = 0.9 * W * live
    Z = A @ W_hat
    Z[:, 1] = 0.5
    target = Z0.clone()
    target[:, 1] = 0.3
    whole = LayerTally(W_hat, False, RELU, "epsilon", 5.0, 1, live)
    whole.add((target, target), target, Z, Z, 0.0, slice(None), lambda rows: A[rows])
    fixed = 30 * 0.2**2
    part = LayerTally(W_hat[:, live], False, RELU, "epsilon", math.sqrt(25 - fixed))
    box = target[:, live]
    part.add((box, box), box, Z[:, live], Z[:, live], 0.0, slice(None), lambda rows: A[rows])
    assert whole.gap() == pytest.approx(part.gap())
    assert whole.distance == pytest.approx(part.distance + fixed)


class Two(nn.Module):
    """Two layers without bias, each behind a batch-norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.na, self.nb = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.nb(self.b(torch.relu(self.na(self.a(x)))))


def test_a_batch_norm_bias_that_is_read_twice_is_refused() -> None:
    torch.manual_seed(0)
    net = Two().eval()
    net.nb.bias = net.na.bias
    x = torch.randn(20, 4)
    with pytest.raises(nettrim.InvalidInput, match=r"'a' has no bias.*'na.bias', 'nb.bias' are one parameter.*ignore=\['a'\]"):
        prune(net, [x], NetTrim(epsilon=0.1), progress=False)
    with pytest.raises(nettrim.InvalidInput, match="one parameter"):  # shared memory is shared, whatever the object
        net.nb.bias = nn.Parameter(net.na.bias.data)
        prune(net, [x], NetTrim(epsilon=0.1), layers=["b"], progress=False)


def test_what_is_only_read_of_a_batch_norm_may_be_shared(tmp_path: Any) -> None:
    torch.manual_seed(0)
    net = Two().eval()
    net.nb.weight, net.nb.running_mean, net.nb.running_var = net.na.weight, net.na.running_mean, net.na.running_var
    x = torch.randn(20, 4)
    result = prune(net, [x], NetTrim(epsilon=0.1), progress=False)
    verify(result.save(tmp_path), net, [x])
    with_bias = Two().eval()
    with_bias.a, with_bias.b = nn.Linear(4, 4), nn.Linear(4, 4)
    with_bias.nb.bias = with_bias.na.bias  # offsets go into the layers
    result = prune(with_bias, [x], NetTrim(epsilon=0.1), progress=False)
    assert result.certificate.holds and torch.equal(result.model.na.bias, with_bias.na.bias)


class OneNorm(nn.Module):
    """One batch-norm module behind two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.n = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.b(torch.relu(self.n(self.a(x)))))


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
def test_a_batch_norm_behind_two_layers_belongs_to_neither(scheme: Any, tmp_path: Any) -> None:
    torch.manual_seed(0)
    net = OneNorm().eval()
    with torch.no_grad():
        net.n.bias.normal_()
        net.n.weight.normal_()
    x = torch.randn(20, 4)
    result = prune(net, [x], NetTrim(epsilon=0.1), scheme=scheme, progress=False)
    assert torch.equal(result.model.n.bias, net.n.bias) and result.certificate.holds
    verify(result.save(tmp_path), net, [x])


def test_what_is_asked_of_a_grouped_layer_is_asked_of_it_as_a_whole(tmp_path: Any) -> None:
    """Whether pruning has moved a layer's inputs decides its tolerance under gamma: not for one group so and for another otherwise."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 4, 1), nn.ReLU(), nn.Conv1d(4, 4, 1, groups=2)).eval()
    with torch.no_grad():
        net[0].weight[2:] = 0.0  # the second group sees constants, which pruning leaves
        net[0].bias[2:] = 1.0
    x = torch.randn(8, 2, 10)
    result = prune(net, [x], NetTrim(epsilon=0.2, gamma=1.3), progress=False)
    said, layer = result.report.layers[1], result.certificate.layers[1]
    assert said.target.startswith("inflation") and layer.tolerance == pytest.approx(1.3**0.5 * layer.original_distance, rel=1e-5)
    verify(result.save(tmp_path), net, [x])
