"""Regions on sparse weights against the same layers of PyTorch: every kind of step, layout and size."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from nettrim.deploy import regions
from nettrim.deploy.sparse_chain import SparseChain
from nettrim.deploy.sparse_region import SparseRegion, Workspace
from nettrim.deploy.sparse_steps import Step, Window, sparse_weights, window_of
from nettrim.experiments import zoo
from nettrim.status import InvalidInput

pytest.importorskip("numba")


def sparse(model: nn.Module, share: float = 0.8, seed: int = 0) -> nn.Module:
    """Zeros at random in every layer, batch-norm statistics that are not those of a fresh network; frozen, eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.weight.mul_(torch.rand(module.weight.shape, generator=generator) >= share)
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
    return model.eval().requires_grad_(False)


def accelerated(model: nn.Module, *inputs: Tensor, chunk: int = 16) -> tuple[fx.GraphModule, list[regions.Placed]]:
    graph = fx.Tracer().trace(model)
    shapes = regions.shapes_of(regions.recorded(fx.GraphModule(model, graph), inputs))
    layers = [name for name, module in model.named_modules() if not regions.able(module)]
    return regions.rebuilt(model, graph, shapes, layers, lambda *parts: SparseRegion(*parts, chunk=chunk))


def close(found: Tensor, wanted: Tensor) -> bool:
    assert found.shape == wanted.shape and found.is_contiguous()
    return float((found - wanted).abs().max()) <= 3e-6 * float(wanted.abs().max()) + 1e-12


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60)
@given(
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    pad=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    groups=st.sampled_from([1, 2, 4]),
    size=st.tuples(st.integers(9, 20), st.integers(9, 20)),
    images=st.integers(1, 20),
    seed=st.integers(0, 1000),
)
def test_two_convolutions_of_any_form(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    pad: tuple[int, int],
    groups: int,
    size: tuple[int, int],
    images: int,
    seed: int,
) -> None:
    # the second reads what the first left in its borders; padding by more than the reach is refused elsewhere
    padding = [min(p, d * (k - 1) // 2) for p, d, k in zip(pad, dilation, kernel, strict=True)]
    first = nn.Conv2d(4, 8, kernel, stride, tuple(padding), dilation, groups)
    second = nn.Conv2d(8, 5, 3, padding=1)
    model = sparse(nn.Sequential(first, nn.ReLU(), second), share=0.5, seed=seed)
    x = draw(images, 4, *size, seed=seed)
    made, placed = accelerated(model, x)
    assert len(placed) == 1 and len(placed[0].module.steps) == 2
    for _ in range(2):  # the second time in memory that was used
        assert close(made(x), model(x))


@pytest.mark.parametrize("images", [1, 3, 8, 19])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding: str, images: int) -> None:
    model = sparse(nn.Sequential(nn.Conv2d(3, 6, (3, 5), padding=padding), nn.Conv2d(6, 4, 3, padding=padding)))
    x = draw(images, 3, 11, 12)
    assert close(accelerated(model, x)[0](x), model(x))


class Mixed(nn.Module):
    """Sums of several kinds, branches, poolings, functions that torch applies, a flatten that asks for the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.a = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.b = nn.Conv2d(8, 8, 1)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.side = nn.Conv2d(8, 12, 1, stride=2)
        self.silu = nn.SiLU()
        self.pool = nn.MaxPool2d(2)
        self.mean = nn.AvgPool2d(3, stride=2)
        self.fc = nn.Linear(12 * 2 * 2, 10)
        self.out = nn.Linear(10, 7)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu6(self.norm(self.stem(images)))
        y = x + self.a(x)  # read by two, so the sum ends no activation
        z = self.b(y) + torch.clamp(y, -0.5, 0.5)
        w = self.silu(self.down(z) + self.side(z))
        w = self.mean(self.pool(w))
        features = w.view(w.size(0), -1)
        hidden = torch.tanh(self.fc(features))
        return self.out(hidden), hidden


@pytest.mark.parametrize("images", [1, 2, 7, 16, 33])
def test_a_graph_with_all_kinds_of_steps(images: int) -> None:
    model = sparse(Mixed(), share=0.6)
    x = draw(images, 3, 24, 24)
    made, placed = accelerated(model, x)
    assert [len(place.inputs) for place in placed] == [1] and not any(hasattr(made, name) for name in ("stem", "fc", "norm"))
    kinds = {step.kind for step in placed[0].module.steps}
    assert kinds == {"conv", "linear", "pool", "sum", "apply"}
    for found, wanted in zip(made(x), model(x), strict=True):
        assert close(found, wanted)
    other = draw(images + 5, 3, 24, 24, seed=3)  # another batch size
    assert close(made(other)[0], model(other)[0])


@pytest.mark.parametrize("shape", [(1, 1), (6, 5), (7, 9), (16, 16), (19, 30)])
def test_another_image_size_than_at_tracing(shape: tuple[int, int]) -> None:
    model = sparse(zoo.resnet(in_channels=2, width=4, blocks=1))
    made, _ = accelerated(model, draw(2, 2, 12, 12))
    for images in (1, 5):
        x = draw(images, 2, *shape)
        assert close(made(x), model(x))


def test_what_the_steps_of_a_residual_block_merge() -> None:
    model = sparse(zoo.resnet(width=4, blocks=1))
    _, (placed,) = accelerated(model, draw(2, 1, 8, 8))
    steps = placed.module.steps
    assert [step.kind for step in steps] == ["conv"] * 9 + ["pool", "linear"]  # batch-norm, sums and activations are within
    assert sum(step.added is not None for step in steps) == 3
    assert sum(step.low == 0.0 for step in steps) == 7


@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 5), (2, 4, 5), (40, 5)])
@pytest.mark.parametrize("kind", ["direct", "csr"])
def test_linear_layers_on_any_leading_sizes(shape: tuple[int, ...], kind: str) -> None:
    model = sparse(nn.Sequential(nn.Linear(5, 33), nn.GELU(), nn.Linear(33, 9), nn.ReLU6(), nn.Linear(9, 2, bias=False)), share=0.5)
    steps = [
        Step("linear", 0, 1, layer="0"),
        Step("apply", 1, 2, function="gelu"),
        Step("linear", 2, 3, layer="2", low=0.0, high=6.0),
        Step("linear", 3, 4, layer="4"),
    ]
    weights = {name: sparse_weights(model.get_submodule(name)) for name in ("0", "2", "4")}  # type: ignore[arg-type]
    made = SparseRegion(steps, weights, [False], [4], chunk=16) if kind == "direct" else SparseChain(steps, weights, [4])
    x = draw(*shape)
    assert close(made(x), model(x))


def test_empty_layers_and_rows() -> None:
    model = sparse(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)), share=0.9)
    with torch.no_grad():
        model[0].weight.zero_()  # type: ignore[operator, union-attr]
        model[3].weight[1:3] = 0  # type: ignore[index]
    for images in (1, 9):
        x = draw(images, 2, 4, 4)
        assert close(accelerated(model, x)[0](x), model(x))


def test_nan_is_not_hidden_by_bounds_pooling_and_borders() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)).eval().requires_grad_(False)
    x = draw(2, 1, 8, 8)
    made, _ = accelerated(model, x)
    x[1, 0, 3, 3] = math.nan
    assert torch.equal(made(x).isnan(), model(x).isnan()) and bool(made(x).isnan().any())


def test_tensors_of_any_kind_of_memory() -> None:
    model = sparse(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)), share=0.3)
    x = draw(4, 3, 9, 10)
    made, _ = accelerated(model, x, chunk=3)
    wide = draw(4, 3, 9, 1).expand(4, 3, 9, 10)
    for view in (
        x.to(memory_format=torch.channels_last),
        wide,
        x.flip(0)[::2],
        torch._neg_view(x),
        draw(2, 3, 30, 31)[:, :, 3:12, 4:23:2],
    ):
        assert close(made(view), model(view))
    assert close(made(torch._efficientzerotensor(4, 3, 9, 10)), model(torch.zeros(4, 3, 9, 10)))
    with torch.device("meta"):  # where tensors are made by default: not here
        assert close(accelerated(model, x)[0](x), model(x))


def test_means_of_large_images_keep_their_digits() -> None:
    """Four million equal numbers, whose running sum in float32 would be rounded the same way each time."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        for parameter in model.eval().parameters():
            parameter.fill_(1.0).requires_grad_(False)
    made, _ = accelerated(model, torch.ones(1, 1, 8, 8))
    for images in (1, 2):
        found = made(torch.full((images, 1, 2048, 2048), 0.1))
        assert float((found - 0.1).abs().max()) <= 1e-8


class InPlace(nn.Module):
    """Changes in place what another name still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.same = nn.Dropout()
        self.accelerated0 = nn.Conv2d(8, 8, 1, padding=1)  # stays dense, under a name that regions use

    def forward(self, images: Tensor) -> Tensor:
        x = self.a(images)
        alias = self.same(x)
        y = F.relu(alias, inplace=True)
        y = self.b(y + x)
        y += x
        return self.accelerated0(F.relu(y, inplace=True)).relu_()


def test_changes_in_place_reach_all_who_read() -> None:
    model = sparse(InPlace(), share=0.3)
    x = draw(5, 3, 6, 7)
    made, placed = accelerated(model, x)
    assert close(made(x), model(x))
    assert [step.kind for place in placed for step in place.module.steps] == ["conv", "conv"]
    assert placed[1].module.steps[0].low == 0.0  # what nobody else holds is still merged


def test_nothing_is_read_or_written_outside_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arena in the middle of NaN: none may come in, and none may be overwritten."""
    guard, seen = 4096, []
    plain = torch.zeros

    def zeros(size: int, *, dtype: torch.dtype, device: str) -> Tensor:
        whole = torch.full((size + 2 * guard,), math.nan, dtype=dtype)
        whole[guard:-guard] = 0
        seen.append(whole)
        return whole[guard:-guard]

    model = sparse(nn.Sequential(nn.Conv2d(3, 4, 5, padding=2), nn.Conv2d(4, 3, 3, stride=2), nn.Conv2d(3, 3, 1)), share=0.3)
    for images in (1, 3, 16):
        x = draw(images, 3, 13, 14)
        made, (placed,) = accelerated(model, x)
        monkeypatch.setattr(torch, "zeros", zeros)
        found = made(x)
        monkeypatch.setattr(torch, "zeros", plain)
        assert close(found, model(x))
        assert isinstance(placed.module, SparseRegion)
        assert seen and all(bool(part.isnan().all()) for whole in seen for part in (whole[:guard], whole[-guard:]))


def test_threads_compute_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    from nettrim.deploy import kernels_team

    model = sparse(nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)), share=0.5)
    x = draw(8, 16, 16, 16)
    made, (placed,) = accelerated(model, x)
    alone: list[Tensor] = []
    for threads, openmp in ((1, True), (3, True), (3, False)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        if not openmp:
            monkeypatch.setattr(kernels_team, "_openmp", lambda: None)
        alone.append(made(x))
    assert torch.equal(alone[0], alone[1]) and torch.equal(alone[0], alone[2])
    workspace = placed.module.workspace([x])
    assert isinstance(workspace, Workspace) and placed.module.threads(workspace.plan.work) == 3


def _forms() -> list[tuple[Callable[[], nn.Module], str]]:
    return [
        (lambda: nn.Conv1d(2, 2, 3), "no sparse kernel"),
        (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), "not of zeros"),
        (lambda: nn.Conv2d(2, 2, 1, padding=1), "reach"),
        (lambda: nn.Linear(2, 2).double(), "float64"),
    ]


@pytest.mark.parametrize(("make", "words"), _forms())
def test_layers_that_have_no_kernel(make: Callable[[], nn.Module], words: str) -> None:
    assert words in regions.able(make())


def test_inputs_that_are_refused() -> None:
    model = sparse(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3 * 4, 2)))
    made, _ = accelerated(model, draw(2, 2, 4, 4))
    for bad, words in (
        (draw(2, 4, 4), "images"),
        (draw(1, 3, 4, 4), "2 channels"),
        (draw(1, 2, 5, 5), "12 features"),
        (draw(1, 2, 2, 2), "larger images"),
        (draw(1, 2, 4, 4).double(), "float32"),
        (draw(0, 2, 4, 4), "empty"),
    ):
        with pytest.raises(InvalidInput, match=words):
            made(bad)


def test_windows_count_like_torch() -> None:
    for kernel, stride, padding, dilation in ((3, 2, 1, 1), (5, 1, 0, 2), (2, 3, 0, 1)):
        window = window_of(nn.Conv2d(1, 1, kernel, stride, padding, dilation))
        assert window is not None
        for size in range(1, 14):
            wanted = (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1
            assert window.out(size, 20)[0] == max(0, math.floor(wanted))
    assert Window((1, 1), (1, 1)).reach == 0


def test_blocks_are_vector_code() -> None:
    """The inner loop multiplies and adds whole registers: without that nothing here is fast."""
    from nettrim.deploy import kernels, kernels_vectors

    if not kernels_vectors.binding.get_host_cpu_features().get("fma"):
        pytest.skip("this processor has no fused multiply-add")
    assert kernels.work.address
    (code,) = kernels._runs.inspect_asm().values()
    fused = [line for line in code.splitlines() if "vfmadd" in line and "ps" in line]
    register = "zmm" if kernels.LANES == 16 else "ymm"
    assert sum(register in line and "(" in line for line in fused) >= 8  # with the input straight from memory
