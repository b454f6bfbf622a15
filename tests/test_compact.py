"""Compaction: dead neurons go, the function stays."""

from __future__ import annotations

import copy
import itertools
import re
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nettrim.calibration import state_hash
from nettrim.capture import replicate
from nettrim.deploy import compact
from nettrim.deploy.compact import channel_flow
from nettrim.experiments.zoo import NETWORKS
from nettrim.solvers.reference import MissingExtra
from nettrim.status import InvalidInput

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(x)
    return found


def assert_same(before: nn.Module, after: nn.Module, *shape: int, seed: int = 5) -> None:
    """Equal to 1e-5 on inputs that compaction has not seen, of another batch size than the example's."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    wanted, found = outputs(before, x), outputs(after, x)
    assert float((wanted - found).abs().max()) <= 1e-5 * max(1.0, float(wanted.abs().max()))


def kill(model: nn.Module, share: float, seed: int, *, rows: bool = True, columns: bool = True) -> None:
    """Sets whole neurons' incoming weights, and whole inputs' outgoing weights, to zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.running_mean, module.bias, module.weight):
                    tensor.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
            if isinstance(module, LAYERS):
                if module.bias is not None:
                    module.bias.normal_(generator=generator)
                if rows:
                    module.weight[torch.rand(module.weight.shape[0], generator=generator) < share] = 0
                if columns and module.weight.shape[1] > 1:
                    module.weight[:, torch.rand(module.weight.shape[1], generator=generator) < share] = 0


def linear(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, size in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, size), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def test_a_neuron_without_readers_goes() -> None:
    model = linear(4, 6, 5, 3)
    with torch.no_grad():
        model[2].weight[:, [1, 4]] = 0
    result = compact(model, torch.randn(2, 4))
    assert model[0].out_features == 6 and result.model[0].out_features == 4 and result.model[2].in_features == 4
    kept = [0, 2, 3, 5]
    assert torch.equal(result.model[0].weight, model[0].weight[kept]) and torch.equal(result.model[2].weight, model[2].weight[:, kept])
    assert result.removed == 2 and result.parameters == (83, 83 - 2 * 5 - 2 * 5)
    assert_same(model, result.model, 7, 4)


@pytest.mark.parametrize("bias", [-0.5, 0.0, 0.7])
def test_a_constant_neuron_goes_into_the_next_bias(bias: float) -> None:
    model = linear(4, 6, 3)
    with torch.no_grad():
        model[0].weight[2] = 0
        model[0].bias[2] = bias
    result = compact(model, torch.randn(2, 4))
    assert result.model[0].out_features == 5
    wanted = model[2].bias + model[2].weight[:, 2] * max(bias, 0.0)
    torch.testing.assert_close(result.model[2].bias, wanted)
    assert_same(model, result.model, 7, 4)


def test_what_only_dead_neurons_read_goes_too() -> None:
    model = linear(4, 6, 5, 4, 3)
    with torch.no_grad():
        model[6].weight[:, 0] = 0  # neuron 0 of the third layer is not read
        model[4].weight[1:, 3] = 0  # neuron 3 of the second is read by that one only
        model[2].weight[[0, 1, 2, 4], 5] = 0  # neuron 5 of the first by that one only
    result = compact(model, torch.randn(2, 4))
    assert [layer.removed for layer in result.layers] == [1, 1, 1, 0]
    assert result.passes > 1
    assert_same(model, result.model, 7, 4)


def convolutions(padding: int, *, bias: bool, norm: bool, mode: str = "zeros") -> nn.Sequential:
    """Channels 1, 2 and 3 of the first convolution are constant, at 0.4, 0.9 and 0."""
    torch.manual_seed(1)
    behind: list[nn.Module] = [nn.BatchNorm2d(5)] if norm else []
    second = nn.Conv2d(6, 5, 3, padding=padding, padding_mode=mode, bias=bias)
    end = (nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 3))
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), second, *behind, *end).eval()
    with torch.no_grad():
        model[0].weight[1:4] = 0
        model[0].bias[1:4] = torch.tensor([0.4, 0.9, -0.3])
        if norm:
            model[3].running_mean.normal_()
            model[3].weight.normal_()
    return model


@pytest.mark.parametrize(
    ("padding", "bias", "norm", "mode", "kept"),
    [
        (0, True, False, "zeros", 3),
        (1, True, False, "zeros", 4),  # one carries both constants through the border
        (1, True, False, "reflect", 3),
        (1, True, False, "circular", 3),
        (0, False, True, "zeros", 3),  # into the running mean
        (1, False, True, "zeros", 4),
        (0, False, False, "zeros", 4),  # no place for a constant
    ],
)
def test_constants_and_padding(padding: int, bias: bool, norm: bool, mode: str, kept: int) -> None:
    model = convolutions(padding, bias=bias, norm=norm, mode=mode)
    result = compact(model, torch.randn(2, 2, 8, 8))
    assert result.model[0].out_channels == kept
    assert result.model.state_dict().keys() == model.state_dict().keys()
    assert_same(model, result.model, 4, 2, 8, 8)
    assert compact(result.model, torch.randn(2, 2, 8, 8)).passes == 0


def test_a_layer_keeps_one_neuron() -> None:
    model = linear(4, 6, 3)
    with torch.no_grad():
        model[0].weight.zero_()
    result = compact(model, torch.randn(2, 4))
    assert result.model[0].out_features == 1
    assert_same(model, result.model, 7, 4)


class Branches(nn.Module):
    """Two branches are added, a third is concatenated; a depthwise convolution, poolings and ``view`` stand behind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.a = nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(6, 8, 1)
        self.c = nn.Conv2d(6, 4, 3, padding=1)
        self.deep = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.point = nn.Conv2d(12, 5, 1)
        self.fc = nn.Linear(5 * 9, 7)
        self.out = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        total = torch.relu(self.bn(self.a(x)) + self.b(x))
        x = F.relu6(self.deep(torch.cat([total, F.relu(self.c(x))], dim=1)))
        x = F.max_pool2d(self.point(x).relu(), 2)
        x = F.relu(self.fc(x.view(x.size(0), -1)))
        out: Tensor = self.out(x)
        return out


def test_branches() -> None:
    torch.manual_seed(2)
    model = Branches().eval()
    with torch.no_grad():
        model.a.weight[3], model.b.weight[3], model.deep.weight[3], model.deep.bias[3] = 0, 0, 0, 0.5  # constant in the sum
        model.a.weight[4] = 0  # constant in one term only
        model.point.weight[:, [0, 9]] = 0  # nobody reads these of the concatenation
        model.fc.weight[:, 9:18] = 0  # the second channel behind the pooling
    result = compact(model, torch.randn(2, 1, 6, 6))
    sizes = {layer.name: layer.outputs for layer in result.layers}
    assert sizes["a"] == sizes["b"] == (8, 6) and sizes["c"] == (4, 3) and sizes["deep"] == (12, 9) and sizes["point"] == (5, 4)
    assert result.model.fc.in_features == 4 * 9 and result.model.deep.groups == 9
    assert_same(model, result.model, 5, 1, 6, 6)


class Random(nn.Module):
    """A random network of convolutions whose tensors are added, concatenated, pooled; drawn from a seed."""

    def __init__(self, steps: list[str], flat: bool, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.steps, self.flat = steps, flat
        self.layers = nn.ModuleList()
        count, side = [3], [8]
        for step in steps:
            last, size = count[-1], side[-1]
            if step == "pool" and size >= 4:
                self.layers.append(nn.MaxPool2d(2))
                count, side = [last], [size // 2]
            elif step == "add":
                self.layers.append(nn.Conv2d(count[0], last, 1))
                count.append(last), side.append(size)
            elif step == "cat":
                self.layers.append(nn.Identity())
                count.append(last + count[0]), side.append(size)
            elif step == "deep":
                self.layers.append(nn.Conv2d(last, last, 3, padding=1, groups=last))
                count.append(last), side.append(size)
            else:
                bare = step == "norm"
                layer = nn.Conv2d(last, 4 + len(count), 3, padding=1, bias=not bare)
                self.layers.append(nn.Sequential(layer, nn.BatchNorm2d(4 + len(count))) if bare else layer)
                count.append(4 + len(count)), side.append(size)
        self.hidden = nn.Linear(count[-1] * (side[-1] ** 2 if flat else 1), 6)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for step, layer in zip(self.steps, self.layers, strict=True):
            if isinstance(layer, nn.MaxPool2d):
                seen = [layer(seen[-1])]
            elif step == "add":
                seen.append(F.relu(seen[-1] + layer(seen[0])))
            elif step == "cat":
                seen.append(torch.cat([layer(seen[-1]), seen[0]], dim=1))
            elif step == "act":
                seen.append(torch.sigmoid(layer(seen[-1])))
            else:
                seen.append(F.relu(layer(seen[-1])))
        x = torch.flatten(seen[-1], 1) if self.flat else seen[-1].mean((2, 3))
        out: Tensor = self.out(F.relu(self.hidden(x)))
        return out


@settings(max_examples=25)
@given(
    st.lists(st.sampled_from(["conv", "norm", "act", "add", "cat", "deep", "pool"]), min_size=1, max_size=7),
    st.booleans(),
    st.integers(0, 10_000),
    st.sampled_from([0.2, 0.5, 0.8]),
)
def test_random_graphs(steps: list[str], flat: bool, seed: int, share: float) -> None:
    model = Random(steps, flat, seed).eval()
    kill(model, share, seed)
    twin = copy.deepcopy(model)
    result = compact(model, torch.randn(2, 3, 8, 8))
    assert state_hash(model.state_dict()) == state_hash(twin.state_dict())
    assert_same(model, result.model, 3, 3, 8, 8)
    assert result.parameters[1] <= result.parameters[0]
    assert compact(result.model, torch.randn(2, 3, 8, 8)).removed == 0


@pytest.mark.parametrize("name", list(NETWORKS))
def test_the_zoo(name: str) -> None:
    model = NETWORKS[name].make(in_channels=1, classes=10, image_size=28, seed=0)
    kill(model, 0.3, 1)
    result = compact(model, torch.randn(2, 1, 28, 28))
    assert type(result.model) is type(model) and result.model.state_dict().keys() == model.state_dict().keys()
    assert result.removed > 20
    assert_same(model, result.model, 5, 1, 28, 28)
    # every neuron that still is dead is accounted for, but for the network's outputs
    *hidden, _ = [name for name, module in result.model.named_modules() if isinstance(module, LAYERS)]
    for name in hidden:
        dead = int((result.model.get_submodule(name).weight.flatten(1) == 0).all(1).sum())
        said = [int(n) for note in result.notes for n in re.findall(rf"(?:^|, ){re.escape(name)}: (\d+)(?=[, ])(?!.*inputs that)", note)]
        assert sum(said) >= dead, name


def test_constants_are_what_the_channels_hold() -> None:
    """Every channel that the flow calls constant is, in a real pass on other data."""
    model = NETWORKS["resnet20_b"].make(in_channels=1, classes=10, image_size=12, seed=0)
    kill(model, 0.6, 2)
    flow = channel_flow(replicate(model, torch.device("cpu"), None), torch.randn(2, 1, 12, 12), "test")
    seen: dict[str, Tensor] = {}

    def kept(name: str) -> Any:
        return lambda module, inputs: seen.update({name: inputs[0]})

    handles = [model.get_submodule(name).register_forward_pre_hook(kept(name)) for name in flow.inputs]
    outputs(model, torch.randn(3, 1, 12, 12))
    for handle in handles:
        handle.remove()
    found = 0
    for name, values in flow.inputs.items():
        known = ~values.isnan()
        found += int(known.sum())
        channels = seen[name].transpose(0, 1).flatten(1)[known].double()
        assert float((channels - values[known][:, None]).abs().max() if known.any() else 0) < 1e-4
    assert found > 100


class Reader(nn.Module):
    """Its hidden channels are also read by something else."""

    def __init__(self, other: str) -> None:
        super().__init__()
        self.first, self.second, self.other = nn.Linear(4, 6), nn.Linear(6, 3), other
        self.norm = nn.LayerNorm(6)
        self.shift = nn.Parameter(torch.randn(6))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        if self.other == "norm":
            return self.second(self.norm(x))
        if self.other == "parameter":
            return self.second(x + self.shift)
        if self.other == "output":
            return self.second(x), x
        if self.other == "weight":
            return self.second(x) + self.first.weight.sum()
        if self.other == "softmax":
            return self.second(x.softmax(-1))
        if self.other == "twice":
            return self.second(x) + self.second(2 * x)
        if self.other == "view":
            return self.second(x.view(-1, 6))
        if self.other == "slice":
            return self.second(torch.cat([x[:, 3:], x[:, :3]], dim=1))
        y = self.relu(x)  # in place: x is changed too
        return self.second(x + 0 * y)


@pytest.mark.parametrize("other", ["norm", "parameter", "output", "weight", "softmax", "twice", "view", "slice", "in place"])
def test_what_else_reads_a_channel_keeps_it(other: str) -> None:
    torch.manual_seed(3)
    model = Reader(other).eval()
    with torch.no_grad():
        model.first.weight[1] = 0
        model.second.weight[:, 2] = 0
    x = torch.randn(3, 4)
    result = compact(model, x)
    assert result.removed == 0
    wanted, found = model(x), result.model(x)
    for a, b in zip(*((v if isinstance(v, tuple) else (v,)) for v in (wanted, found)), strict=True):
        torch.testing.assert_close(a, b)


def test_tied_and_hooked_layers_stay() -> None:
    model = linear(4, 4, 4, 3)
    model[2].weight = model[0].weight
    with torch.no_grad():
        model[0].weight[1] = 0
    assert compact(model, torch.randn(2, 4)).removed == 0
    model = linear(4, 6, 3)
    with torch.no_grad():
        model[2].weight[:, 1] = 0
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    assert compact(model, torch.randn(2, 4)).removed == 0


def test_modes_freezing_and_the_model_itself_are_kept() -> None:
    model = NETWORKS["vgg_like"].make(in_channels=1, classes=10, image_size=16, seed=0)
    kill(model, 0.3, 1)
    model.train()
    model.get_submodule("bn1_1").eval()
    model.get_submodule("conv2_1").requires_grad_(False)
    before = state_hash(model.state_dict())
    result = compact(model, torch.randn(2, 1, 16, 16))
    assert state_hash(model.state_dict()) == before
    assert result.model.training and not result.model.get_submodule("bn1_1").training
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in result.model.named_parameters()} == flags
    assert "conv1_2" in str(result) and f"{result.ratio:.2f}" in str(result)


def test_inputs_by_keyword_and_unused_layers() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.unused = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(2, 2)

        def forward(self, x: Tensor, *, scale: float = 1.0, mask: Tensor | None = None) -> dict[str, Tensor]:
            return {"scores": self.second(torch.relu(self.first(x if mask is None else x * mask)))}

    model = Keywords().eval()
    with torch.no_grad():
        model.second.weight[:, :2] = 0
    batch = {"x": torch.randn(3, 4), "mask": torch.ones(3, 4)}
    result = compact(model, batch)
    assert result.removed == 2
    torch.testing.assert_close(result.model(**batch)["scores"], model(**batch)["scores"])


def test_bad_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = linear(4, 6, 3)
    with pytest.raises(InvalidInput, match=r"model must be an nn\.Module, found str"):
        compact("model", torch.randn(2, 4))  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="compact: example: batch 1 holds NaN"):
        compact(model, torch.full((2, 4), torch.nan))
    with pytest.raises(InvalidInput, match="cannot run on the example"):
        compact(model, torch.randn(2, 5))
    with torch.no_grad():
        model[0].bias[0] = torch.inf
    with pytest.raises(InvalidInput, match=r"0\.bias holds NaN or inf"):
        compact(model, torch.randn(2, 4))

    class Untraceable(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if float(x.sum()) > 0 else -x)

    with pytest.raises(InvalidInput, match="could not be traced"):
        compact(Untraceable(4, 3), torch.randn(2, 4))

    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(MissingExtra, match=r"pip install \"nettrim\[structured\]\""):
        compact(linear(4, 3), torch.randn(2, 4))
