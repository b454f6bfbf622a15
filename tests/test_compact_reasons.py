"""Compaction with many kinds of operations between two layers: dead channels go, or a note says which stay and because of what."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nettrim import bench, compact
from nettrim.deploy import removal
from nettrim.status import InvalidInput, NetTrimError

C, DEAD = 16, 6
Function = Callable[[Tensor], Tensor]


class Between(nn.Module):
    """A layer with dead channels, something behind it, and a layer that reads it."""

    def __init__(self, middle: nn.Module | Function, second: nn.Module, first: nn.Module | None = None) -> None:
        super().__init__()
        self.first = first or nn.Conv2d(3, C, 3, padding=1)
        self.middle, self.second = middle, second

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.middle(self.first(x)))
        return found


def between(middle: nn.Module | Function, second: nn.Module | None = None, first: nn.Module | None = None) -> Between:
    torch.manual_seed(0)
    model = Between(middle, second or nn.Conv2d(C, 4, 1), first).eval()
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.PReLU)) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.2, 0.8)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            nn.init.normal_(module.running_mean)
    with torch.no_grad():
        weight = model.first.weight.transpose(0, 1) if isinstance(model.first, nn.ConvTranspose2d) else model.first.weight
        weight[:DEAD] = 0
    return model


def said(notes: tuple[str, ...], name: str) -> int:
    """How many dead outputs of a layer the notes give."""
    return sum(int(found) for note in notes for found in re.findall(rf"(?:^|, ){re.escape(name)}: (\d+)(?=[, ])(?!.*inputs that)", note))


def assert_same(model: nn.Module, made: nn.Module, *shape: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted, found = model(x), made(x)
    assert float((wanted - found).abs().max()) <= 1e-5 * max(1.0, float(wanted.abs().max()))


GOING: dict[str, tuple[nn.Module | Function, nn.Module | None]] = {
    "nothing": (nn.Identity(), None),
    "PReLU of channels": (nn.PReLU(C), None),
    "PReLU": (nn.PReLU(), None),
    "SyncBatchNorm": (nn.SyncBatchNorm(C), None),
    "BatchNorm2d": (nn.BatchNorm2d(C), None),
    "BatchNorm2d without weights": (nn.BatchNorm2d(C, affine=False), None),
    "Hardshrink": (nn.Hardshrink(0.1), None),
    "Threshold": (nn.Threshold(0.1, 0.3), None),
    "LogSigmoid": (nn.LogSigmoid(), None),
    "Softplus": (nn.Softplus(), None),
    "a quotient": (lambda x: x / 3.0, None),
    "a square": (lambda x: x.pow(2), None),
    "exp": (torch.exp, None),
    "the absolute value": (lambda x: -abs(x.abs()), None),
    "Upsample": (nn.Upsample(scale_factor=2), None),
    "interpolation": (lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False), None),
    "reflection": (nn.ReflectionPad2d(1), None),
    "AvgPool2d": (nn.AvgPool2d(2), None),
    "ConvTranspose2d": (nn.ReLU(), nn.ConvTranspose2d(C, 4, 2, 2)),
    "flatten": (nn.Flatten(), nn.Linear(C * 64, 4)),
}
STAYING: dict[str, tuple[nn.Module | Function, nn.Module | None, str]] = {
    "GroupNorm": (nn.GroupNorm(4, C), None, r"middle \(GroupNorm\)"),
    "InstanceNorm": (nn.InstanceNorm2d(C, affine=True), None, r"middle \(InstanceNorm2d\)"),
    "BatchNorm2d of the batch": (nn.BatchNorm2d(C, track_running_stats=False), None, r"middle \(BatchNorm2d\).*by the batch"),
    "LocalResponseNorm": (nn.LocalResponseNorm(3), None, "LocalResponseNorm"),
    "PixelShuffle": (nn.PixelShuffle(2), nn.Conv2d(C // 4, 4, 1), "PixelShuffle"),
    "ChannelShuffle": (nn.ChannelShuffle(4), None, "ChannelShuffle"),
    "a shuffle by views": (lambda x: x.view(x.size(0), 4, C // 4, 8, 8).transpose(1, 2).reshape(x.size(0), C, 8, 8), None, "view"),
    "chunks": (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), None, "chunk"),
    "GLU": (nn.GLU(1), nn.Conv2d(C // 2, 4, 1), "GLU"),
    "softmax": (nn.Softmax(1), None, "Softmax"),
    "a tensor that is added": (lambda x: x + torch.full((1, C, 1, 1), 0.5), None, "add.*not followed"),
    "groups": (nn.Conv2d(C, C, 1, groups=4), None, r"middle \(Conv2d\), a convolution in groups"),
    "a mean over channels": (lambda x: x.mean(1, keepdim=True), nn.Conv2d(1, 4, 1), "mean"),
    "slices": (lambda x: x[:, : C // 2], nn.Conv2d(C // 2, 4, 1), "getitem"),
}


@pytest.mark.parametrize("kind", list(GOING))
def test_dead_channels_go(kind: str) -> None:
    middle, second = GOING[kind]
    model = between(middle, second)
    made = compact(model, torch.randn(2, 3, 8, 8))
    carried = said(made.notes, "first")
    assert made.model.first.out_channels == C - DEAD + carried and carried <= 1
    assert_same(model, made.model, 3, 3, 8, 8)


@pytest.mark.parametrize("kind", list(STAYING))
def test_a_note_says_why_they_stay(kind: str) -> None:
    middle, second, words = STAYING[kind]
    model = between(middle, second)
    made = compact(model, torch.randn(2, 3, 8, 8))
    assert said(made.notes, "first") == DEAD and made.model.first.out_channels == C
    (note,) = [note for note in made.notes if note.startswith("first: ")]
    assert re.search(words, note) and note in " ".join(str(made).split())
    assert_same(model, made.model, 3, 3, 8, 8)


POOLS = [
    nn.AvgPool2d(3, 1, 1),
    nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    nn.AvgPool2d(2, divisor_override=3),
    nn.Sequential(nn.ReLU(), nn.AvgPool2d(3, 1, 1)),
    nn.ZeroPad2d(1),
    nn.ConstantPad2d(1, 0.5),
    nn.MaxPool2d(3, 1, 1),
]


@pytest.mark.parametrize("pool", POOLS, ids=repr)
@pytest.mark.parametrize("bias", [True, False])
def test_padded_pooling(pool: nn.Module, bias: bool) -> None:
    """Zeros stay zero behind padding with zeros; other constants vary at the border. Neither ends in an error."""
    model = between(pool, first=nn.Conv2d(3, C, 3, bias=bias))
    with torch.no_grad():
        model.second.weight[:, -2:] = 0  # not read
    made = compact(model, torch.randn(2, 3, 12, 12))
    assert C - made.model.first.out_channels + said(made.notes, "first") == DEAD + 2
    assert_same(model, made.model, 3, 3, 12, 12)


@pytest.mark.parametrize("bias", [0.0, 0.7])
def test_transposed_convolutions_lose_outputs_and_inputs(bias: float) -> None:
    model = between(nn.ReLU(), nn.ConvTranspose2d(C, 5, 3, 2, 1, 1), nn.ConvTranspose2d(3, C, 2, 2))
    with torch.no_grad():
        model.first.bias[:DEAD] = bias
        model.second.weight[-3:] = 0  # three inputs that it does not read
    made = compact(model, torch.randn(2, 3, 6, 6))
    # a constant other than zero is seen by other taps at every position: one of them carries it
    assert made.model.first.out_channels == C - DEAD - 3 + (bias > 0) == made.model.second.in_channels
    assert_same(model, made.model, 3, 3, 6, 6)


class Branches(nn.Module):
    """Two layers are added; a third is called twice, a fourth has a hook, a fifth is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.twice, self.hooked, self.idle = (nn.Linear(8, 8) for _ in range(5))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x) + self.b(x))
        x = torch.relu(self.twice(torch.relu(self.twice(x))))
        found: Tensor = self.out(torch.relu(self.hooked(x)))
        return found


def test_every_layer_with_dead_neurons_is_named() -> None:
    torch.manual_seed(1)
    model = Branches().eval()
    model.hooked.register_forward_hook(lambda module, inputs, output: output * 1.0)
    with torch.no_grad():
        for name, count in (("a", 2), ("twice", 3), ("hooked", 4), ("idle", 5), ("out", 1)):
            model.get_submodule(name).weight[:count] = 0
    made = compact(model, torch.randn(2, 8))
    assert {name: said(made.notes, name) for name in ("a", "twice", "hooked", "idle", "out")} == {
        "a": 2,
        "twice": 3,
        "hooked": 4,
        "idle": 5,
        "out": 0,  # the network's output
    }
    text = " ".join(made.notes)
    assert "called more than once" in text and "hooks" in text and "not seen in the graph" in text


def test_inputs_that_nobody_reads_behind_something_that_is_not_followed() -> None:
    model = between(nn.GroupNorm(4, C))
    with torch.no_grad():
        model.first.weight.normal_()
        model.second.weight[:, :3] = 0
    made = compact(model, torch.randn(2, 3, 8, 8))
    assert made.notes == ("second: 3 inputs that no layer reads stay: they come from middle (GroupNorm)",)


def test_the_dependency_graph_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever torch-pruning raises, dead channels then stay and the note says so; a removal that fails returns nothing."""
    model = between(nn.ReLU())
    graph = removal.library().DependencyGraph

    def broken(*arguments: object, **settings: object) -> None:
        raise ZeroDivisionError("division by zero")

    with monkeypatch.context() as patch:
        patch.setattr(graph, "get_pruning_group", broken)
        made = compact(model, torch.randn(2, 3, 8, 8))
        assert made.removed == 0 and said(made.notes, "first") == DEAD and "do not agree" in made.notes[0]
    with monkeypatch.context() as patch:
        patch.setattr(graph, "build_dependency", broken)
        made = compact(model, torch.randn(2, 3, 8, 8))
        assert made.removed == 0 and "ZeroDivisionError: division by zero" in made.notes[0]
    with monkeypatch.context() as patch:
        patch.setattr(removal.Dependencies, "remove", broken)
        with pytest.raises(NetTrimError, match=r"does not run without its dead channels \(ZeroDivisionError.*nothing is made"):
            compact(model, torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("error", [AssertionError("odd"), KeyError("missing"), ZeroDivisionError(), AttributeError("gone")])
def test_what_a_forward_raises_is_told_as_bad_input(error: Exception) -> None:
    class Raising(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise error

    with pytest.raises(InvalidInput, match="compact: the model cannot run on the example"):
        compact(Raising(4, 3), torch.randn(2, 4))


def test_a_bench_says_it_too() -> None:
    made = bench(between(nn.GroupNorm(4, C)), torch.randn(2, 3, 8, 8), batch_sizes=[1], seconds=0.01)
    assert any("first: 6 dead channels stay: they are read by middle (GroupNorm)" in note for note in made.notes)
