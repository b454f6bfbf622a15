"""Convolutional, batch-normalised, pooled and residual networks through prune: exactness, guarantees, readings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from verdicts import truthful

import nettrim
from nettrim import Magnitude, NetTrim, prune
from nettrim.graph import read
from nettrim.report import SOLVED
from nettrim.status import Status


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, inplace: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.short = nn.Sequential() if same else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU(inplace=inplace)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.inplace:
            y += self.short(x)
        else:
            y = self.short(x) + y
        return self.relu(y)


class Residual(nn.Module):
    """Stem with pooling, two residual blocks (identity and projection), depthwise and pointwise, a linear head."""

    def __init__(self, seed: int = 0, inplace: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.norm, self.pool = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.MaxPool2d(2)
        self.one, self.two = Block(4, 4, 1, inplace), Block(4, 6, 2, inplace)
        self.depth, self.depth_norm = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6)
        self.point = nn.Conv2d(6, 8, 1)
        self.drop, self.head = nn.Dropout(), nn.Linear(8, 5)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.3, 2.0)
                nn.init.normal_(module.weight, mean=0.8, std=0.6)
                nn.init.normal_(module.bias, std=0.3)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.norm(self.stem(x))))
        x = self.two(self.one(x))
        x = F.relu6(self.depth_norm(self.depth(x)))
        x = F.leaky_relu(self.point(x), 0.1)
        return self.head(self.drop(x.mean((2, 3))))


def images(count: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


LAYERS = ["stem", "one.conv1", "one.conv2", "two.conv1", "two.conv2", "two.short.0", "depth", "point", "head"]


def test_readings_say_what_was_seen() -> None:
    model = Residual()
    readings = read(model, LAYERS).readings
    assert readings["stem"].words == "batch-norm norm folded in; relu and max-pooling 2x2, seen in the graph"
    assert "added to pool (MaxPool2d)" in readings["one.conv2"].words and readings["one.conv2"].activation.name == "relu"
    assert "added to" in readings["two.conv2"].words and "added to" in readings["two.short.0"].words
    assert readings["two.short.0"].total == readings["two.conv2"].total
    assert readings["depth"].activation.name == "relu6" and readings["depth"].norm == "depth_norm"
    assert readings["point"].activation.name == "leaky_relu(0.1)"
    assert readings["head"].words == "it is the network's output"


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
@pytest.mark.parametrize(
    "method", [NetTrim(epsilon=0.0), NetTrim(sparsity=0.0), Magnitude(sparsity=0.0)], ids=lambda m: f"{m.describe()} {m.kind}"
)
def test_without_pruning_the_network_is_the_same_function(method: Any, scheme: Any, inplace: bool) -> None:
    model = Residual(inplace=inplace)
    result = prune(model, images(), method, scheme=scheme, progress=False)
    assert [type(m) for m in result.model.modules()] == [type(m) for m in model.modules()]
    assert list(result.model.state_dict()) == list(model.state_dict())
    x = images(8, 1)
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-5, atol=1e-5)
    assert truthful(result)
    assert [layer.name for layer in result.report.layers] == LAYERS


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
@settings(max_examples=3)
@given(seed=st.integers(0, 10_000), epsilon=st.sampled_from([0.1, 0.4]), inplace=st.booleans())
def test_layers_stay_within_their_tolerance(scheme: Any, seed: int, epsilon: float, inplace: bool) -> None:
    """Lemma 1 with pooling and added branches, on random networks: what moved is at most the distance, which the solver foresaw."""
    model = Residual(seed, inplace)
    result = prune(model, images(12, seed), NetTrim(epsilon=epsilon, gap=0.1, max_iterations=400), scheme=scheme, progress=False)
    assert truthful(result)
    for layer, report in zip(result.certificate.layers, result.report.layers, strict=True):
        if scheme == "cascade" and layer.name == "two.conv2":  # the other branch is pruned after it
            assert layer.tolerance is None and "two.short.0, pruned after it" in " ".join(report.notes)
            continue
        assert not any(SOLVED in note for note in report.notes)
        assert layer.tolerance is not None
        assert report.status is Status.INFEASIBLE or layer.distance <= layer.tolerance * (1 + 1e-9)
        if scheme == "cascade":
            assert layer.discrepancy <= layer.distance_all_rows * (1 + 1e-9)


def test_discrepancies_are_those_of_the_network() -> None:
    model, x = Residual().double(), images().double()
    result = prune(model, x, NetTrim(epsilon=0.2), progress=False)
    found = {layer.name: layer.discrepancy for layer in result.certificate.layers}

    def after(net: nn.Module) -> dict[str, Tensor]:
        assert isinstance(net, Residual)
        with torch.no_grad():
            stem = net.pool(torch.relu(net.norm(net.stem(x))))
            one = net.one(stem)
            two = net.two(one)
            depth = F.relu6(net.depth_norm(net.depth(two)))
            return {"stem": stem, "one.conv2": one, "two.conv2": two, "two.short.0": two, "depth": depth, "head": net(x)}

    before, now = after(model), after(result.model)
    for name, value in before.items():
        assert found[name] == pytest.approx(float((now[name] - value).norm()), rel=1e-9)
    assert result.certificate.network.achieved == pytest.approx(found["head"], rel=1e-9)


def test_the_second_branch_corrects_the_first() -> None:
    """In the cascade the box of the branch that is pruned last is shifted by what the other branch has become."""
    model, x = Residual(), images(40)
    result = prune(model, x, NetTrim(sparsity={"one.conv1": 0.6, "one.conv2": 0.3}), progress=False)
    blind = prune(model, x, NetTrim(sparsity={"one.conv1": 0.6, "one.conv2": 0.3}), scheme="parallel", progress=False)
    moved, uncorrected = (r.certificate.layers[1].discrepancy for r in (result, blind))
    assert moved < uncorrected


@pytest.mark.parametrize("method", [NetTrim(epsilon=0.3), NetTrim(sparsity=0.6), NetTrim(epsilon=0.3, program="halfspace")])
def test_saved_results_verify(method: NetTrim, tmp_path: Path) -> None:
    model, x = Residual(), images()
    folder = prune(model, x.split(10), method, max_samples=300, progress=False).save(tmp_path / "pruned")
    nettrim.verify(folder, model, x.split(10))
    again = nettrim.load(folder, Residual(seed=5))
    other = {name: value for name, value in again.state_dict().items() if "running" in name}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.items())


def test_a_changed_batch_norm_is_found(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, x = Residual(), images()
    folder = prune(model, x, NetTrim(sparsity=0.5), layers=["one.conv1"], progress=False).save(tmp_path / "pruned")
    state = load_file(folder / "model.safetensors")
    state["one.norm2.bias"] = state["one.norm2.bias"] + 1
    save_file(state, folder / "model.safetensors")
    with pytest.raises(nettrim.CertificateError, match=r"one\.norm2\.bias differs"):
        nettrim.verify(folder, model, x)


def test_channels_that_batch_norm_silences_lose_their_weights_and_nothing_else() -> None:
    model = Residual()
    with torch.no_grad():
        model.one.norm1.weight[1] = 0.0
    count = model.one.conv1.weight.numel()
    result = prune(model, images(), Magnitude(sparsity=1 / count), layers=["one.conv1"], progress=False)
    weight = result.model.get_parameter("one.conv1.weight")
    changed = weight != model.one.conv1.weight
    assert not bool(weight[1].any()) and int(changed.sum()) <= weight[1].numel() + 1


@pytest.mark.parametrize("sparsity", [0.5, 0.77, 0.9])
def test_budgets_are_exact_for_grouped_convolutions_too(sparsity: float) -> None:
    model = Residual()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # no channel is silent: weights of inputs that never vary are zero whatever the budget
            module.weight.data.abs_().add_(0.2)
            module.bias.data.add_(1.0)
    result = prune(model, images(), NetTrim(sparsity=sparsity), progress=False)
    for layer in result.report.layers:
        assert abs(layer.nonzeros - (1 - sparsity) * layer.weights) <= 1, layer.name


def test_patches_are_sampled_with_a_seed_over_images_and_places() -> None:
    model, x = Residual(), images(40)
    runs = [
        prune(model, list(x.split(size)), NetTrim(sparsity=0.5), max_samples=200, seed=seed, progress=False)
        for size, seed in ((40, 0), (7, 0), (40, 1))
    ]
    states = [run.model.state_dict()["one.conv1.weight"] for run in runs]
    assert [layer.rows for layer in runs[0].report.layers][:3] == [200, 200, 200]
    torch.testing.assert_close(states[0], states[1])
    assert not torch.allclose(states[0], states[2])


class Odd(nn.Module):
    """Concatenation, a shared convolution, a branch of another shape, a batch-norm that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.shared = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.scale = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([F.relu(self.norm(self.a(x))), F.relu(self.norm(self.b(x)))], dim=1)
        x = F.relu(self.shared(F.relu(self.shared(x))))
        x = F.relu(self.scale(x) + x.mean((2, 3), keepdim=True))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
def test_concatenation_shared_modules_and_broadcast_branches(scheme: Any) -> None:
    model = Odd().eval()
    result = prune(model, images(), NetTrim(epsilon=0.2), scheme=scheme, progress=False)
    assert truthful(result) or scheme == "cascade"  # a shared layer feeds itself: its tolerance is checked, not guaranteed
    words = {layer.name: layer.reading for layer in result.report.layers}
    assert "all 2 calls" in words["shared"]
    assert "BatchNorm2d" in words["a"] and "pre-activation is matched" in words["a"]
    assert words["scale"].startswith("added to mean")  # the sum has the layer's own shape
    same = prune(model, images(), NetTrim(epsilon=0.0), scheme=scheme, progress=False).model
    torch.testing.assert_close(same(images(5, 1)), model(images(5, 1)), rtol=1e-5, atol=1e-5)


def test_a_sum_of_another_shape_is_not_taken_for_the_pre_activation() -> None:
    class Broadcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 8)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.conv(x) + torch.ones(3, 4, 4)).flatten(1)

    result = prune(Broadcast(), images(), NetTrim(epsilon=0.2), progress=False)
    assert "followed by add" in result.report.layers[0].reading
    assert truthful(result)


def test_models_that_cannot_be_traced_are_matched_linearly() -> None:
    class Hidden(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.sum()) > -1e9 else x

    result = prune(Hidden(), images(), NetTrim(epsilon=0.2), progress=False)
    assert truthful(result)
    assert all("could not be traced" in layer.reading for layer in result.report.layers)


def test_batch_norm_in_training_mode_statistics_is_left_alone() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU(), nn.Flatten(), nn.Linear(108, 2)
    ).eval()
    reading = read(model, ["0"]).readings["0"]
    assert not reading.norm and "BatchNorm2d" in reading.words


def test_chains_of_convolutions_have_network_bounds() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(6, 3),
    ).eval()  # fmt: skip
    for scheme in ("parallel", "cascade"):
        certificate = prune(model, images(), NetTrim(epsilon=0.1), scheme=scheme, progress=False).certificate  # type: ignore[arg-type]
        assert certificate.network.bound is not None and certificate.network.achieved <= certificate.network.bound
        assert all(layer.theorem is not None and layer.discrepancy <= layer.theorem for layer in certificate.layers)
        assert certificate.holds


def test_conv1d_and_infeasible_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3, stride=2), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(15, 2)
    )
    x = torch.randn(20, 2, 25)
    result = prune(model, x, NetTrim(epsilon=0.1), progress=False)
    assert truthful(result) and [layer.kind for layer in result.report.layers] == ["Conv1d", "Conv1d", "Linear"]
    assert all(layer.status is not Status.ITERATION_LIMIT for layer in result.report.layers)


def test_residual_networks_have_an_output_bound_in_the_cascade() -> None:
    """One path leads from the last pruned layer to the output, whatever branches before it; the head may be pruned or not."""
    model, x = Residual(), images()
    for layers in (None, ["one", "two.conv1", "two.conv2", "two.short"]):
        network = prune(model, x, NetTrim(epsilon=0.2), layers=layers, progress=False).certificate.network
        assert network.bound is not None and network.achieved <= network.bound * (1 + 1e-9)
        assert layers is not None or network.bound == pytest.approx(network.achieved, rel=1e-9)
    parallel = prune(model, x, NetTrim(epsilon=0.2), scheme="parallel", progress=False).certificate.network
    assert parallel.bound is None and parallel.reason


def test_a_sum_that_belongs_to_an_earlier_layer_ends_the_tail() -> None:
    class Crossed(nn.Module):
        """The last layer reaches the output only through the sum of an earlier one."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            first = self.a(x)
            return F.relu(first + torch.tanh(self.b(x)))

    result = prune(Crossed(), torch.randn(50, 6), NetTrim(epsilon=0.3), progress=False)
    network = result.certificate.network
    assert network.bound is None and network.reason


class Hiding(nn.Module):
    """A layer inside a module that the graph does not look into, or one whose weight is used without calling it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
        self.a, self.head, self.how = nn.Linear(6, 6), nn.Linear(6, 3), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "hidden":
            return self.head(self.a(x) + self.inner(x))
        h = torch.relu(self.a(x))
        return self.head(F.linear(h, self.a.weight))


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
@pytest.mark.parametrize("how", ["hidden", "borrowed"])
def test_bounds_know_of_layers_that_the_graph_does_not_call(how: str, scheme: Any) -> None:
    x = torch.randn(60, 4, 6, generator=torch.Generator().manual_seed(0))
    result = prune(Hiding(how).eval(), x, NetTrim(epsilon=0.3, gap=0.1), scheme=scheme, progress=False)
    assert truthful(result)
    network = result.certificate.network
    if scheme == "parallel":
        assert network.bound is None and network.reason
    else:
        assert network.bound == pytest.approx(network.achieved)  # the head sees what really comes
