"""Link normalisation: the normalised network, the exact way back, the published bounds as plain sums, and what is refused."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn

import nettrim
from nettrim import InvalidInput, NetTrim, NothingToPrune
from nettrim.link import LinkNormalised, normalise
from nettrim.tally import entry_norm


def network(
    seed: int = 0, sizes: tuple[int, ...] = (6, 9, 8, 7, 4), dtype: torch.dtype = torch.float32, bias: bool = True
) -> nn.Sequential:
    """Flatten, then Linear layers with ReLU, LeakyReLU, dropout and nothing between them."""
    between: list[nn.Module] = [nn.ReLU(), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Identity()]
    g = torch.Generator().manual_seed(seed)
    modules: list[nn.Module] = [nn.Flatten()]
    for i in range(len(sizes) - 1):
        layer = nn.Linear(sizes[i], sizes[i + 1], bias=bias)
        for parameter in layer.parameters():
            parameter.data = torch.randn(parameter.shape, generator=g) * (i + 1)
        modules += [layer, between[i % 4]]
    return nn.Sequential(*modules[:-1]).to(dtype).eval()


def samples(count: int = 40, inputs: int = 6, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(count, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def bits(model: nn.Module) -> dict[str, bytes]:
    return {
        name: tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in model.state_dict().items()
    }


def activations(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The input of every layer but the first, and the output."""
    seen: list[Tensor] = []
    handles = [layer.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0])) for layer in layers(model).values()]
    with torch.no_grad():
        out = model(x)
    for handle in handles:
        handle.remove()
    return [*seen[1:], out]


def discrepancies(reference: nn.Module, model: nn.Module, x: Tensor) -> list[float]:
    pairs = zip(activations(reference, x), activations(model, x), strict=True)
    return [float(torch.linalg.vector_norm(after - before) / torch.linalg.vector_norm(before)) for before, after in pairs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_the_normalised_network_is_the_network_divided(dtype: torch.dtype, bias: bool) -> None:
    model, x = network(dtype=dtype, bias=bias), samples(dtype=dtype)
    before = bits(model)
    link = normalise(model, x[:3])
    assert bits(model) == before
    assert all(parameter.dtype == torch.float64 for parameter in link.model.parameters())
    assert list(link.scales) == ["1", "3", "5", "7"]
    wide = copy.deepcopy(model).double()
    for name, layer in layers(link.model).items():
        assert entry_norm(layer.weight) == pytest.approx(1.0, abs=1e-12)
        assert link.scales[name] == pytest.approx(entry_norm(layers(wide)[name].weight), rel=1e-14)
    assert link.output_scale == pytest.approx(math.prod(link.scales.values()), rel=1e-14)
    for scale, own, original in zip(
        np.cumprod(list(link.scales.values())), activations(link.model, x.double()), activations(wide, x.double()), strict=True
    ):
        torch.testing.assert_close(own, original / scale, rtol=0.0, atol=1e-12 * float((original / scale).abs().max()))


def values(dtype: torch.dtype) -> st.SearchStrategy[float]:
    """Any finite number of that dtype, or near to it: subnormals, both zeros, the largest."""
    width = 16 if dtype == torch.float16 else 32
    largest = float(torch.finfo(dtype).max)
    smallest = float(torch.finfo(dtype).smallest_normal) * torch.finfo(dtype).eps  # the smallest subnormal
    special = st.sampled_from([0.0, -0.0, smallest, -3 * smallest, largest, -largest, 1.0, 1.0 - torch.finfo(dtype).eps / 2])
    return special | st.floats(-largest, largest, width=width, allow_subnormal=True)


@st.composite
def networks(draw: st.DrawFn, dtype: torch.dtype) -> nn.Sequential:
    sizes = draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
    modules: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layer = nn.Linear(inputs, outputs, bias=draw(st.booleans()))
        for parameter in layer.parameters():
            array = draw(arrays(np.float32, tuple(parameter.shape), elements=values(dtype).map(lambda v: float(np.float32(v)))))
            parameter.data = torch.from_numpy(array).to(dtype)
        if not bool((layer.weight != 0).any()):
            layer.weight.data[0, 0] = 1.0
        modules += [layer, nn.ReLU()]
    return nn.Sequential(*modules)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_way_back_is_exact_bit_by_bit(dtype: torch.dtype) -> None:
    seen = {"subnormal": 0, "zero": 0}

    @settings(max_examples=40)
    @given(networks(dtype))
    def check(model: nn.Sequential) -> None:
        link = normalise(model, torch.zeros(1, layers(model)["0"].in_features, dtype=dtype))
        back = link.restore(link.model)
        assert [p.dtype for p in back.parameters()] == [p.dtype for p in model.parameters()]
        assert bits(back) == bits(model)
        tiny = torch.finfo(dtype).smallest_normal
        for parameter in model.parameters():
            size = parameter.detach().double().abs()
            seen["subnormal"] += int(((size > 0) & (size < tiny)).sum())
            seen["zero"] += int((size == 0).sum())

    check()
    assert min(seen.values()) > 20


def test_the_way_back_is_exact_for_every_float16() -> None:
    every = torch.arange(-32768, 32768).to(torch.int16).view(torch.float16)
    every = every[torch.isfinite(every)]
    for scale in (1.0, 3.0, 1e-3, 7e4 / 3):
        first, second = nn.Linear(1, 1, bias=False).half(), nn.Linear(1, len(every)).half()
        first.weight.data.fill_(scale)
        second.weight.data.copy_(every[:, None])
        second.bias.data.copy_(every)
        model = nn.Sequential(first, nn.ReLU(), second)
        link = normalise(model, torch.zeros(1, 1, dtype=torch.float16))
        assert bits(link.restore(link.model)) == bits(model)


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.floats(-8, 8))
def test_float64_comes_back_within_one_unit_in_the_last_place(seed: int, power: float) -> None:
    model = network(seed, dtype=torch.float64)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64) * 10.0**power)
    link = normalise(model, samples(2, dtype=torch.float64))
    for own, back in zip(model.parameters(), link.restore(link.model).parameters(), strict=True):
        unit = torch.from_numpy(np.spacing(own.detach().abs().numpy()))
        assert bool(((back - own).abs() <= unit).all())


def pruned(link: LinkNormalised, scheme: str, **how: object) -> nettrim.PruneResult:
    method = NetTrim(epsilon=0.1, **how)  # type: ignore[arg-type]
    return nettrim.prune(link.model, samples(dtype=torch.float64), method, scheme=scheme, progress=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", ["parallel", "cascade"])
def test_relative_discrepancies_survive_the_way_back(scheme: str) -> None:
    model, x = network(dtype=torch.float64), samples(seed=9, dtype=torch.float64)
    link = normalise(model, x[:2])
    result = pruned(link, scheme)
    before = copy.deepcopy(result.model.state_dict())
    back = link.restore(result.model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in result.model.state_dict().items())
    own, restored = discrepancies(link.model, result.model, x), discrepancies(model, back, x)
    assert own == pytest.approx(restored, rel=1e-9)
    assert max(own) > 1e-3  # something was pruned
    for name, layer in layers(back).items():
        assert torch.equal(layer.weight == 0, layers(result.model)[name].weight == 0)
    assert any(bool((layer.weight == 0).any()) for layer in layers(back).values())


def test_a_float32_network_is_restored_to_float32_and_moves_by_its_rounding_only() -> None:
    model, x = network(), samples(seed=9)
    link = normalise(model, x[:2])
    result = pruned(link, "cascade")
    back = link.restore(result.model)
    assert all(parameter.dtype == torch.float32 for parameter in back.parameters())
    own = discrepancies(link.model, result.model, x.double())
    assert discrepancies(model.double(), back.double(), x.double()) == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize("program", ["preimage", "halfspace"])
def test_the_parallel_bound_is_the_published_sum(program: str) -> None:
    """Theorem 1: with every ||W_hat||_1 <= 1 the output moves by at most the sum of the layers' tolerances."""
    result = pruned(normalise(network(), samples(2)), "parallel", program=program)
    tolerances = [layer.tolerance for layer in result.certificate.layers if layer.tolerance is not None]
    norms = [entry_norm(layer.weight) for layer in layers(result.model).values()]
    bound = result.certificate.network.bound_link_normalised
    assert len(tolerances) == len(norms) == 4 and max(norms) <= 1.0
    assert bound is not None and result.certificate.network.achieved <= bound <= sum(tolerances) * (1 + 1e-12)
    assert bound == pytest.approx(sum(t * math.prod(norms[j + 1 :]) for j, t in enumerate(tolerances)), rel=1e-9)
    assert result.certificate.holds


@pytest.mark.parametrize("gamma", [1.1, 1.5])
def test_the_cascade_bound_is_the_published_product(gamma: float) -> None:
    """Theorem 2: eps_1 sqrt(prod gamma_j), the original weights having ||W||_1 = 1."""
    certificate = pruned(normalise(network(), samples(2)), "cascade", gamma=gamma).certificate
    first = certificate.layers[0].tolerance
    assert certificate.holds and first is not None
    assert certificate.network.bound_link_normalised == pytest.approx(first * gamma**1.5, rel=1e-9)


def test_the_model_is_left_alone_and_its_mode_kept() -> None:
    model = network().train()
    model.register_buffer("mean", torch.ones(3), persistent=False)
    model[1].weight.requires_grad_(False)
    link = normalise(model, samples(3))
    back = link.restore(link.model)
    for one in (link.model, back, model):
        assert one.training and not layers(one)["1"].weight.requires_grad and layers(one)["3"].weight.requires_grad
    assert back.get_buffer("mean").dtype == model.get_buffer("mean").dtype == torch.float32
    assert type(back) is type(model) and back is not link.model


def test_one_layer_and_keyword_inputs() -> None:
    layer = nn.Linear(6, 3)
    link = normalise(layer, samples(3))
    assert list(link.scales) == [""]
    assert entry_norm(link.model.weight) == pytest.approx(1.0, abs=1e-12)  # type: ignore[arg-type]
    assert bits(link.restore(link.model)) == bits(layer)

    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, pixels: Tensor) -> Tensor:
            h: Tensor = self.b(self.a(torch.tanh(pixels)).clamp(min=0))  # what comes before the first layer is free
            return h

    link = normalise(Keyword(), [{"pixels": samples(3)}])
    assert list(link.scales) == ["a", "b"]


# Refusals ----------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two layers, with whatever the test puts between and behind."""

    def __init__(
        self, between: Callable[[Net, Tensor], Tensor] = lambda n, h: F.relu(h), behind: Callable[[Tensor], Tensor] = lambda z: z
    ) -> None:
        super().__init__()
        self.fc, self.last = nn.Linear(6, 5), nn.Linear(5, 3)
        self.square = nn.Linear(5, 5)
        self.norm = nn.BatchNorm1d(5)
        self.between, self.behind = between, behind

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.last(self.between(self, self.square(self.fc(x)))))


@pytest.mark.parametrize(
    "between",
    [
        lambda n, h: F.relu(h),
        lambda n, h: F.leaky_relu(h, 0.5),
        lambda n, h: h.clamp(min=0),
        lambda n, h: F.relu(torch.flatten(h, 1)),
        lambda n, h: F.relu(F.leaky_relu(h, 0.3)),
        lambda n, h: h.clamp(max=0),
        lambda n, h: F.dropout(F.relu(h), 0.5, training=False),
    ],
)
def test_homogeneous_maps_are_taken(between: Callable[[Net, Tensor], Tensor]) -> None:
    model = Net(between)
    del model.norm
    link = normalise(model, samples(4))
    with torch.no_grad():
        expected = model.double()(samples(7).double()) / link.output_scale
        torch.testing.assert_close(link.model(samples(7).double()), expected, rtol=0.0, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("between", "message"),
    [
        (lambda n, h: F.relu6(h), "layer 'square' is followed by relu6"),
        (lambda n, h: torch.tanh(h), "layer 'square' is followed by tanh"),
        (lambda n, h: F.leaky_relu(h, 2.0), "layer 'square' is followed by leaky_relu"),
        (lambda n, h: h.clamp(-1, 1), "layer 'square' is followed by clamp"),
        (lambda n, h: h.clamp(min=0.5), "layer 'square' is followed by clamp"),
        (lambda n, h: torch.sigmoid(F.relu(h)), "step 'sigmoid' behind layer 'square' is sigmoid"),
        (lambda n, h: F.relu6(F.leaky_relu(h)), "step 'relu6' behind layer 'square' is relu6"),
        (lambda n, h: F.elu(h), "layer 'square' is followed by elu"),
        (lambda n, h: h + n.square(h), "square|branches"),
        (lambda n, h: F.relu(h) + 1, "add"),
        (lambda n, h: n.norm(h), r"norm \(BatchNorm1d\)"),
        (lambda n, h: F.relu(n.square(F.relu(h))), "layer 'square' is called more than once"),
        (lambda n, h: F.relu(h) if h.sum() > 0 else h, "traced"),
    ],
)
def test_other_maps_are_refused_by_name(between: Callable[[Net, Tensor], Tensor], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        normalise(Net(between), samples(4))


def without(change: Callable[[nn.Sequential], object], dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """The network with something done to it."""
    model = network(dtype=dtype)
    with torch.no_grad():
        change(model)
    return model


def tie(model: nn.Sequential) -> None:
    model[3] = nn.Linear(9, 9)
    model[5] = nn.Linear(9, 9)
    model[5].weight = model[3].weight
    model[7] = nn.Linear(9, 4)


class Unused(nn.Module):
    """A layer that no input reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.spare = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (without(lambda m: m[3].weight.zero_()), "layer '3': its weights must not all be zero"),
        (without(tie), r"'3.weight' and '5.weight' are one parameter"),
        (without(lambda m: m[3].weight[0, 0].fill_(math.nan)), "layer '3': its weight holds NaN"),
        (without(lambda m: m.append(nn.Softmax(-1))), "layer '7' is followed by softmax"),
        (without(lambda m: m.append(nn.ReLU6())), "layer '7' is followed by relu6"),
        (Unused(), "layer 'spare' is never called"),
        ("a model", "must be an nn.Module, found str"),
    ],
    ids=str,
)
def test_other_models_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        normalise(model, samples(4))


def test_convolutions_and_pooling_are_homogeneous_too() -> None:
    torch.manual_seed(0)
    front = (nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool1d(2))
    model = nn.Sequential(*front, nn.Conv1d(4, 3, 2), nn.LeakyReLU(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(3, 2))
    x = samples(10)
    made = normalise(model, x)
    expected = copy.deepcopy(model).double()(x.double())
    torch.testing.assert_close(made.model(x.double()) * made.output_scale, expected, rtol=1e-12, atol=1e-12)
    weights = [made.model.get_parameter(f"{name}.weight").detach() for name in made.scales]
    assert [float(weight.abs().sum()) for weight in weights] == pytest.approx([1.0] * 3, rel=1e-12)
    for key, value in made.restore(made.model).state_dict().items():
        assert torch.equal(value, model.state_dict()[key])


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(NothingToPrune):
        normalise(nn.Sequential(nn.ReLU()), samples(4))


def test_entries_that_float64_cannot_hold_divided_are_refused() -> None:
    def tiny(model: nn.Sequential) -> None:
        model[3].weight[0, 0] = 1e-310

    with pytest.raises(InvalidInput, match="layer '3': its weight divided by"):
        normalise(without(tiny, torch.float64), samples(4, dtype=torch.float64))

    def far(model: nn.Sequential) -> None:
        model[1].weight.fill_(1e200)
        model[1].bias.zero_()
        model[3].weight.fill_(1e-200)
        model[3].bias.fill_(1e-200)

    with pytest.raises(InvalidInput, match="layer '1': its bias divided by the product"):
        normalise(without(lambda m: (far(m), m[1].bias.fill_(1e-200)), torch.float64), samples(4, dtype=torch.float64))
    assert bits(normalise(without(lambda m: m[1].bias.zero_(), torch.float64), samples(4, dtype=torch.float64)).model)

    def small(model: nn.Sequential) -> None:
        for layer in layers(model).values():
            layer.weight.fill_(1e-120)
            layer.bias.zero_()

    with pytest.raises(InvalidInput, match=r"layer '5': .* product of all up to here"):
        normalise(without(small, torch.float64), samples(4, dtype=torch.float64))


def test_restore_refuses_another_model() -> None:
    link = normalise(network(), samples(4))
    with pytest.raises(InvalidInput, match=r"must be an nn\.Module"):
        link.restore("a model")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"under '1.weight' it must hold a tensor of shape \(9, 6\), found .* \(8, 6\)"):
        link.restore(network(sizes=(6, 8, 8, 7, 4)))
    with pytest.raises(InvalidInput, match=r"under '1.bias' it must hold .*, found nothing"):
        link.restore(network(bias=False))
    with pytest.raises(InvalidInput, match=r"under '9.weight' it must hold nothing"):
        link.restore(network(sizes=(6, 9, 8, 7, 4, 2)))
    damaged = copy.deepcopy(link.model)
    layers(damaged)["3"].weight.data[0, 0] = math.inf
    with pytest.raises(InvalidInput, match="layer '3': its weight holds NaN or inf"):
        link.restore(damaged)


def test_restore_refuses_what_does_not_fit_the_dtype() -> None:
    model = network(dtype=torch.float16)
    link = normalise(model, samples(4, dtype=torch.float16))
    with torch.no_grad():
        layers(link.model)["5"].bias.fill_(1e3)
    with pytest.raises(InvalidInput, match=r"layer '5': its restored bias must fit into torch\.float16"):
        link.restore(link.model)
