"""Export to C99: the coding of weights, the plan of memory, and files that compile strictly and compute what PyTorch does."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import nettrim
from nettrim.calibration import state_hash
from nettrim.deploy import c_check, export_c
from nettrim.deploy.c_coding import coded, decoded
from nettrim.deploy.c_memory import INPUT, OUTPUT, planned
from nettrim.deploy.c_steps import Add, Clip, Linear, Plan, Step
from nettrim.experiments import zoo
from nettrim.experiments.models import fully_connected
from nettrim.status import InvalidInput, NetTrimError

compiled = pytest.mark.skipif(c_check.compiler() is None, reason="there is no C compiler (cc, gcc or clang)")


@functools.cache
def sanitizers() -> tuple[str, ...]:
    """The compiler's checks of memory and arithmetic, where it has them."""
    found = c_check.compiler()
    options = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    assert found is not None
    made = subprocess.run([*found, *options, "-x", "c", "-", "-o", "/dev/null"], input=b"int main(void) { return 0; }", capture_output=True)
    return options if made.returncode == 0 else ()


def randomised(model: nn.Module, density: float = 1.0, seed: int = 0) -> nn.Module:
    """Random weights, biases and statistics, so that nothing is zero or one by chance; then zeros at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                for tensor in (module.running_mean, module.bias, module.weight):
                    tensor.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
            elif isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                bound = 2 / math.sqrt(module.weight[0].numel())
                module.weight.uniform_(-bound, bound, generator=generator)
                if module.bias is not None:
                    module.bias.normal_(generator=generator)
                module.weight *= torch.rand(module.weight.shape, generator=generator) < density
    return model.eval()


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same_in_c(model: nn.Module, folder: Path, *shape: int, options: tuple[str, ...] = ()) -> nettrim.Exported:
    """Exports, and runs the files by another build on samples that the export has not seen, one after the other."""
    made = nettrim.export(model, images(4, *shape), folder / "net.c")
    x = images(7, *shape, seed=9)
    with torch.no_grad():
        wanted = model.eval()(x).flatten(1)
    found = c_check.run(folder, "net", x, options)
    assert found.shape == wanted.shape and float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    assert made.difference is not None and made.difference <= 1e-5
    return made


@given(st.integers(0, 400), st.floats(0, 1) | st.sampled_from([0.0, 0.001, 0.01, 0.05, 0.2, 0.5, 1.0]), st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_coded_weights_come_back_and_no_other_form_is_smaller(size: int, density: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    flat = (rng.normal(size=size) * (rng.random(size) < density)).astype(np.float32)
    stored = coded(flat)
    assert np.array_equal(decoded(stored), flat)
    lengths = {}
    for width in range(1, 17):  # written out code by code
        zeros, codes = 0, 0
        for value in flat:
            if value:
                codes, zeros = codes + zeros // (2**width - 1) + 1, 0
            else:
                zeros += 1
        lengths[width] = math.ceil(codes * width / 8)
    assert stored.bytes == min(4 * size, 4 * np.count_nonzero(flat) + min(lengths.values()))
    assert len(stored.codes) == (lengths[stored.width] if stored.width else 0)


@pytest.mark.parametrize("density", [0.01, 0.05, 0.2])
def test_positions_take_little_more_than_their_entropy(density: float) -> None:
    """No code of independent positions can be shorter on average than the binary entropy."""
    rng = np.random.default_rng(0)
    weights = (rng.normal(size=(300, 784)) * (rng.random((300, 784)) < density)).astype(np.float32)
    entropy = -density * math.log2(density) - (1 - density) * math.log2(1 - density)
    assert coded(weights).codes.nbytes < 1.2 * entropy * weights.size / 8


def random_plan(sizes: list[int], seed: int) -> Plan:
    """Steps that read any earlier value: layers of other sizes, and elementwise steps and sums of equal ones."""
    rng = np.random.default_rng(seed)
    shapes: list[tuple[int, ...]] = [(5,)]
    steps: list[Step] = []
    for size in sizes:
        read = int(rng.integers(len(shapes)))
        equal = [value for value, shape in enumerate(shapes) if shape == shapes[read]]
        kind = rng.integers(3)
        if kind == 0:
            steps.append(Linear("", (read,), len(shapes), np.ones((size, *shapes[read])), None, 1))
        elif kind == 1:
            steps.append(Clip("", (read,), len(shapes), 0.0, 1.0))
        else:
            steps.append(Add("", (read, int(rng.choice(equal))), len(shapes)))
        shapes.append((size,) if kind == 0 else shapes[read])
    return Plan(tuple(steps), tuple(shapes), len(shapes) - 1)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=12), st.integers(0, 2**32 - 1))
@settings(max_examples=150)
def test_no_value_is_written_over_while_it_is_needed(sizes: list[int], seed: int) -> None:
    """Every entry of memory remembers who wrote it; every read must find its own value."""
    plan = random_plan(sizes, seed)
    memory = planned(plan)
    cells: dict[tuple[str, int], int] = {}

    def entries(value: int) -> list[tuple[str, int]]:
        place = memory.places[value]
        array, start = (place, 0) if isinstance(place, str) else ("work", place)
        return [(array, start + i) for i in range(plan.shapes[value][0])]

    for cell in entries(0):
        cells[cell] = 0
    for step in plan.steps:
        for value in step.inputs:
            assert all(cells[cell] == value for cell in entries(value))
        assert memory.places[step.output] != INPUT
        for cell in entries(step.output):
            assert step.elementwise or all(cell not in entries(value) for value in step.inputs)
            assert cell[0] != "work" or cell[1] < memory.size
            cells[cell] = step.output
    assert memory.places[plan.output] == OUTPUT and all(cells[cell] == plan.output for cell in entries(plan.output))


def test_memory_is_used_again() -> None:
    """A chain of layers needs two values at a time, however long it is."""
    steps = tuple(Linear("", (i,), i + 1, np.ones((8, 8)), None, 1) for i in range(9))
    assert planned(Plan(steps, ((8,),) * 10, 9)).size == 16


class Residual(nn.Module):
    """A sum whose branch is a batch-norm, and an input that is read twice."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x
        return self.relu(y) + x


class Functional(nn.Module):
    """Functions and methods instead of modules; several kinds of reshaping; arguments that are not tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 4, 3), nn.Linear(4 * 9, 5)

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        y = F.max_pool2d(F.relu6(self.conv(x).clamp(min=-1.0)), 2)
        y = F.dropout(y, 0.5, self.training).view(x.size(0), -1)
        return F.hardtanh(self.fc(y.unsqueeze(1)).squeeze(1), -0.5, 0.75)


class Sizes(nn.Module):
    """Pooling by sizes that are read from a shape, and a sum of a value with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(self.conv(x), x.size(2) // 4, [])
        y = y + y
        return F.avg_pool2d(y, y.size()[2:], stride=y.shape[-1]).view(x.size(0), -1)


CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(13, 9), nn.ReLU(), nn.Linear(9, 4, bias=False)), (13,)),
    "linear on tokens": (lambda: nn.Sequential(nn.Linear(6, 5), nn.LeakyReLU(0.2), nn.Linear(5, 3)), (4, 6)),
    "norm of tokens": (lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(1)), (1, 6)),
    "norm without layer": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU6(), nn.Conv2d(3, 2, 1), nn.Flatten(), nn.BatchNorm1d(32)),
        (3, 4, 4),
    ),
    "norm behind linear": (lambda: nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.Hardtanh(-0.7, 0.3)), (6,)),
    "signals": (
        lambda: nn.Sequential(nn.Conv1d(3, 6, 4, 2, 3, 2, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.MaxPool1d(3, 2, 1), nn.AvgPool1d(2, 1, 1)),
        (3, 17),
    ),
    "strides": (lambda: nn.Sequential(nn.Conv2d(4, 6, (3, 2), (2, 3), (2, 1), (1, 2), 2), nn.Conv2d(6, 3, 1, 2)), (4, 9, 11)),
    "same": (lambda: nn.Sequential(nn.Conv2d(2, 3, (4, 2), padding="same"), nn.Conv2d(3, 2, 3, padding="valid")), (2, 6, 5)),
    "wide padding": (lambda: nn.Sequential(nn.Conv2d(1, 2, 2, 3, 4)), (1, 3, 3)),
    "max": (lambda: nn.Sequential(nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.MaxPool2d((2, 1), 1, 0, 2)), (2, 8, 9)),
    "average": (lambda: nn.Sequential(nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=True), nn.Identity()), (2, 8, 9)),
    "average without padding": (
        lambda: nn.Sequential(nn.AvgPool2d(3, 2, 1, True, False), nn.AvgPool2d(2, 1, divisor_override=3)),
        (2, 8, 9),
    ),
    "adaptive": (lambda: nn.Sequential(nn.AdaptiveAvgPool2d((3, 2)), nn.Flatten(2), nn.AdaptiveAvgPool1d(4)), (2, 7, 5)),
    "residual": (Residual, (3, 5, 5)),
    "functional": (Functional, (2, 8, 8)),
    "sizes": (Sizes, (2, 8, 8)),
    "nothing": (nn.Identity, (4,)),
    "activation of the input": (lambda: nn.Sequential(nn.Flatten(), nn.LeakyReLU(0.1), nn.ReLU(), nn.Dropout()), (2, 3)),
}


@compiled
@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's remark on how it computes that
@pytest.mark.parametrize("name", CASES)
def test_every_supported_kind_computes_the_same(name: str, tmp_path: Path) -> None:
    make, shape = CASES[name]
    for density in (1.0, 0.2) if name in ("linear", "strides") else (0.4,):
        model = randomised(make(), density)
        before = state_hash(model.state_dict())
        assert_same_in_c(model, tmp_path, *shape, options=sanitizers())
        assert state_hash(model.state_dict()) == before


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Sequential, tuple[int, ...]]:
    """Small convolutional networks of random kinds and sizes."""
    size = st.integers(1, 3)
    channels, side = draw(size), draw(st.integers(4, 7))
    shape, x = (channels, side, side + 1), torch.zeros(1, channels, side, side + 1)
    layers: list[nn.Module] = []
    for _ in range(draw(size)):
        groups = draw(st.sampled_from([1, channels]))
        out = groups * draw(size)
        kernel, dilation = draw(size), draw(st.integers(1, 2))
        padding = dilation * kernel // 2 + draw(st.integers(0, 1))  # so that the kernel fits
        layers.append(nn.Conv2d(channels, out, kernel, draw(size), padding, dilation, groups))
        layers += [nn.BatchNorm2d(out)] * draw(st.booleans())
        layers.append(draw(st.sampled_from([nn.ReLU(), nn.ReLU(True), nn.ReLU6(), nn.LeakyReLU(0.3), nn.Hardtanh(-1, 0.5)])))
        if min(nn.Sequential(*layers).eval()(x).shape[2:]) > 1:
            layers += draw(st.sampled_from([[], [nn.MaxPool2d(2)], [nn.AvgPool2d(2, 1)]]))
        channels = out
    features = nn.Sequential(*layers, nn.Flatten()).eval()(x).shape[1]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 3)), shape


@compiled
@given(networks(), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_random_networks_compute_the_same(tmp_path: Path, network: tuple[nn.Sequential, tuple[int, ...]], density: float) -> None:
    assert_same_in_c(randomised(network[0], density), tmp_path, *network[1])


@compiled
@pytest.mark.parametrize(
    ("make", "side"),
    [(zoo.lenet5, 20), (zoo.vgg_like, 16), (functools.partial(zoo.resnet, blocks=1), 12), (zoo.depthwise_separable, 12)],
)
def test_networks_of_the_zoo(make: Any, side: int, tmp_path: Path) -> None:
    made = assert_same_in_c(randomised(make(width=4, image_size=side), 0.2), tmp_path, 1, side, side)
    assert made.sizes is not None and made.sizes.model < 0.5 * made.sizes.dense


@compiled
def test_sizes_are_those_of_the_arrays(tmp_path: Path) -> None:
    model = randomised(fully_connected((784, 300, 10), seed=0), 0.05)
    made = nettrim.export(model, images(3, 784), tmp_path / "small.c")
    assert made.sizes is not None and made.format == "c" and not made.dynamic and made.checked == (3,)
    weights = [model[1].weight, model[3].weight]
    assert made.sizes.weights == sum(4 * int((w != 0).sum()) for w in weights) and made.sizes.dense == sum(4 * w.numel() for w in weights)
    assert made.sizes.positions == sum(coded(w.detach().numpy()).codes.nbytes for w in weights)
    assert made.sizes.biases == 4 * (300 + 10) and made.sizes.work == 4 * 300 and made.sizes.model < made.sizes.dense / 12
    text = (tmp_path / "small.c").read_text()
    assert f"static float work[{made.sizes.work // 4}]" in text and "malloc" not in text
    assert made.bytes == sum(file.stat().st_size for file in made.files) == len(text) + len((tmp_path / "small.h").read_text())
    assert str(made).count("bytes") and made.to_dict()["sizes"]["weights"] == made.sizes.weights
    found = c_check.compiler()
    assert found is not None
    subprocess.run([*found, "-std=c99", "-c", "small.c", "-o", "small.o"], cwd=tmp_path, check=True)
    if made.sizes.code is not None:
        assert 100 < made.sizes.code < 3000
        listing = subprocess.run(["size", "-A", "small.o"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
        constants = sum(int(line.split()[1]) for line in listing.splitlines() if line.startswith(".rodata"))
        assert 0 <= constants - made.sizes.model - made.sizes.biases < 200  # alignment


@compiled
def test_the_same_model_makes_the_same_files_and_one_array_for_equal_weights(tmp_path: Path) -> None:
    layer = nn.Linear(8, 8)
    model = randomised(nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), layer))
    first = assert_same_in_c(model, tmp_path, 8)
    texts = [file.read_bytes() for file in first.files]
    second = nettrim.export(copy.deepcopy(model).train(), images(4, 8), tmp_path / "net.c")
    assert [file.read_bytes() for file in second.files] == texts and second.sizes == first.sizes
    assert first.sizes is not None and first.sizes.weights == 4 * 64


@compiled
def test_other_dtypes_become_float32_and_mappings_work(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 2)

        def forward(self, pixels: Tensor, double: bool = False) -> Tensor:
            return self.fc(pixels)

    model = randomised(Named()).double()
    made = nettrim.export(model, {"pixels": images(3, 6).double()}, tmp_path / "named.c")
    assert made.notes == ("the model's torch.float64 became float32",) and made.difference is not None


@compiled
def test_nan_goes_on_and_the_example_stays(tmp_path: Path) -> None:
    """What broke before the network must not come out as a number; a model may change its input in place."""
    model, example = nn.Sequential(nn.ReLU6(inplace=True), nn.MaxPool1d(2), nn.Hardtanh(-0.5, 0.5)), images(4, 2, 6)
    nettrim.export(model, example, tmp_path / "net.c")
    assert torch.equal(example, images(4, 2, 6))
    x = images(5, 2, 6, seed=3)
    x[:, 0, 2], x[:, 1, 5] = float("nan"), float("nan")
    found, wanted = c_check.run(tmp_path, "net", x), model(x).flatten(1)
    assert torch.equal(found.isnan(), wanted.isnan()) and wanted.isnan().sum() == 10
    assert torch.equal(found.nan_to_num(), wanted.nan_to_num())


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


class Changed(nn.Module):
    """Reads a value again after it was changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.relu = nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        z = self.relu(y.view(-1, 2, 2))
        return y + z.flatten(1)


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Mixing(nn.Module):
    """Puts samples beside each other, which a function of one sample cannot."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 2)


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.GELU()), "1 (GELU) has no C form"),
        (nn.Sequential(nn.Linear(4, 4), nn.Softmax(1)), "1 (Softmax)"),
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), "1 (LayerNorm)"),
        (nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(2.0)), "1 (LeakyReLU)"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)), "no running statistics"),
        (nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Conv1d(2, 1, 1, padding_mode="circular")), "1 (Conv1d)"),
        (hooked(), "hooks"),
        (Branching(), "torch.fx can trace"),
        (Changed(), "in place"),
        (Two(), "one tensor"),
        (Mixing(), "reshape"),
    ],
)
def test_what_has_no_c_form_is_refused_by_name_and_nothing_is_written(model: nn.Module, words: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        nettrim.export(model.eval(), images(5, 4), tmp_path / "net.c")
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["my-net.c", "9.c", "float.c", "math.c", "n.t.c", "net.h", "net"])
def test_names_that_c_does_not_take(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"must end in \.c|cannot be its name|format"):
        nettrim.export(nn.Linear(4, 4), images(2, 4), tmp_path / name, format=None if name == "net" else "c")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_place_of_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.h").mkdir()
    monkeypatch.setattr(export_c, "start", lambda *given: pytest.fail("work was done"))
    with pytest.raises(InvalidInput, match=r"the header .*net\.h' is a folder"):
        nettrim.export(nn.Linear(4, 4), images(2, 4), tmp_path / "net.c")


def test_integers_are_no_input(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="one floating-point input"):
        nettrim.export(nn.Embedding(5, 3), torch.arange(4)[:, None], tmp_path / "net.c")


def test_without_a_compiler_a_note_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c_check, "compiler", lambda: None)
    made = nettrim.export(randomised(nn.Linear(4, 3)), images(2, 4), tmp_path / "net.c")
    assert made.difference is None and made.checked == () and "no C compiler" in made.notes[0]
    assert made.sizes is not None and made.sizes.code is None and (tmp_path / "net.c").is_file()


@pytest.mark.parametrize("command", ["no-such-compiler -O2", '"unclosed'])
def test_a_compiler_that_is_stated_and_missing(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one in its place would check something else than was asked for."""
    monkeypatch.setenv("CC", command)
    with pytest.raises(InvalidInput, match=r"CC=.* must name a C compiler"):
        nettrim.export(nn.Linear(4, 3), images(2, 4), tmp_path / "net.c")
    assert list(tmp_path.iterdir()) == []


@compiled
def test_a_wrong_file_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = "/* net: written by nettrim export. */"
    (tmp_path / "net.c").write_text(earlier)
    right = export_c.source_of

    def wrong(plan: Plan, name: str) -> Any:
        made = right(plan, name)
        return type(made)(made.header, made.source.replace("+=", "-="), made.sizes)

    monkeypatch.setattr(export_c, "source_of", wrong)
    with pytest.raises(NetTrimError, match="differ"):
        nettrim.export(randomised(nn.Linear(4, 3)), images(2, 4), tmp_path / "net.c")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("net.c", earlier)]


@compiled
def test_a_header_serves_two_networks_in_one_program(tmp_path: Path) -> None:
    """Nothing but the two functions is visible outside, and the headers can be read twice."""
    models = [randomised(fully_connected((5, 6, 3), seed=seed), 0.5) for seed in (0, 1)]
    for name, model in zip("ab", models, strict=True):
        nettrim.export(model, images(2, 5), tmp_path / f"{name}.c")
    main = "".join(f'#include "{name}.h"\n' for name in "abab") + "#include <stdio.h>\n"
    main += "int main(void) { float x[5] = {1, -2, 3, -4, 5}, y[3]; int i; "
    main += "".join(f'{name}_run(x, y); for (i = 0; i < 3; ++i) printf("%.9g ", (double)y[i]); ' for name in "ab") + "return 0; }\n"
    (tmp_path / "main.c").write_text(main)
    found = c_check.compiler()
    assert found is not None
    subprocess.run([*found, *c_check.STRICT, "main.c", "a.c", "b.c", "-o", "both"], cwd=tmp_path, check=True)
    printed = subprocess.run([str(tmp_path / "both")], check=True, capture_output=True, text=True).stdout.split()
    x = torch.tensor([[1.0, -2.0, 3.0, -4.0, 5.0]])
    with torch.no_grad():
        wanted = list(itertools.chain.from_iterable(model(x)[0].tolist() for model in models))
    assert [float(text) for text in printed] == pytest.approx(wanted, rel=1e-5, abs=1e-5)
