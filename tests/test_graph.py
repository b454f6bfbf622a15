"""Which activation follows which layer, and how far the layers form one chain."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from verdicts import truthful

from nettrim import InvalidInput, NetTrim, preimage, prune
from nettrim.graph import Chain, Graph, Step, read
from nettrim.preimage import IDENTITY, RELU, Activation


class Net(nn.Module):
    """Two layers with whatever the test puts behind the first."""

    def __init__(self, rest: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.act = nn.ReLU()
        self.act_inplace = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(6)
        self.last = nn.Linear(6, 3)
        self.rest = rest

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rest(self, self.fc(x)))


def reading_of(rest: Callable[[Net, Tensor], Tensor]) -> Activation:
    return read(Net(rest).eval(), ["fc"]).readings["fc"].activation


MODULES: list[tuple[nn.Module, str]] = [
    (nn.ReLU(), "relu"),
    (nn.ReLU(inplace=True), "relu"),
    (nn.ReLU6(), "relu6"),
    (nn.Hardtanh(-2, 3), "hardtanh(-2.0, 3.0)"),
    (nn.LeakyReLU(0.2), "leaky_relu(0.2)"),
    (nn.LeakyReLU(0.0), "relu"),
    (nn.LeakyReLU(1.0), "identity"),
    (nn.ELU(0.5), "elu(0.5)"),
    (nn.GELU(), "gelu"),
    (nn.GELU(approximate="tanh"), "gelu"),
    (nn.SiLU(), "silu"),
    (nn.Mish(), "mish"),
    (nn.SELU(), "selu"),
    (nn.CELU(2.0), "celu"),
    (nn.Tanh(), "tanh"),
    (nn.Sigmoid(), "sigmoid"),
    (nn.Softplus(), "softplus"),
    (nn.Hardswish(), "hardswish"),
    (nn.Softmax(-1), "softmax"),
]


@pytest.mark.parametrize(("module", "name"), MODULES, ids=lambda value: value if isinstance(value, str) else "")
def test_modules(module: nn.Module, name: str) -> None:
    net = nn.Sequential(nn.Linear(3, 4), module, nn.Linear(4, 2)).eval()
    reading = read(net, ["0", "2"]).readings["0"]
    assert reading.activation.name == name
    assert reading.source == "graph"
    assert preimage.named(reading.activation.name) == reading.activation


FUNCTIONS: list[tuple[Callable[[Net, Tensor], Tensor], str]] = [
    (lambda net, h: F.relu(h), "relu"),
    (lambda net, h: F.relu(h, inplace=True), "relu"),
    (lambda net, h: torch.relu(h), "relu"),
    (lambda net, h: torch.relu_(h), "relu"),
    (lambda net, h: h.relu(), "relu"),
    (lambda net, h: h.relu_(), "relu"),
    (lambda net, h: net.act_inplace(h), "relu"),
    (lambda net, h: F.relu6(h), "relu6"),
    (lambda net, h: h.clamp(min=0), "relu"),
    (lambda net, h: h.clamp(0), "relu"),
    (lambda net, h: torch.clamp(h, 0.0), "relu"),
    (lambda net, h: torch.clip(h, min=0), "relu"),
    (lambda net, h: h.clamp_min(0), "relu"),
    (lambda net, h: torch.clamp_min(h, 0.0), "relu"),
    (lambda net, h: h.clamp_(-1, 2), "clamp(-1.0, 2.0)"),
    (lambda net, h: torch.clamp(h, max=1.5), "clamp(-inf, 1.5)"),
    (lambda net, h: torch.clamp_max(h, 1.5), "clamp(-inf, 1.5)"),
    (lambda net, h: h.clamp(2, 1), "identity"),
    (lambda net, h: F.hardtanh(h, -1, 2), "hardtanh(-1.0, 2.0)"),
    (lambda net, h: F.leaky_relu(h, 0.3), "leaky_relu(0.3)"),
    (lambda net, h: F.leaky_relu(h, negative_slope=0.3), "leaky_relu(0.3)"),
    (lambda net, h: F.leaky_relu(h, -0.3), "leaky_relu(-0.3)"),
    (lambda net, h: F.elu(h, 0.7), "elu(0.7)"),
    (lambda net, h: F.gelu(h), "gelu"),
    (lambda net, h: torch.tanh(h), "tanh"),
    (lambda net, h: h.sigmoid(), "sigmoid"),
    (lambda net, h: F.softmax(h, -1), "softmax"),
    # between the layer and its activation
    (lambda net, h: net.act(net.drop(h)), "relu"),
    (lambda net, h: F.relu(F.dropout(h, 0.5, training=net.training)), "relu"),
    (lambda net, h: F.relu(h.view(-1, 3, 2)).flatten(1), "relu"),
    (lambda net, h: F.relu(h.reshape(h.shape[0], 2, 3)).flatten(1), "relu"),
    (lambda net, h: F.relu(h.view(h.size(0), -1)), "relu"),
    (lambda net, h: F.relu(h.unsqueeze(1).transpose(1, 2).contiguous()).squeeze(-1), "relu"),
    # what is not followed
    (lambda net, h: h, "identity"),
    (lambda net, h: F.relu(net.norm(net.norm(h))), "identity"),
    (lambda net, h: F.relu(h) + h, "identity"),
    (lambda net, h: F.relu(h) + F.relu(h * 2), "identity"),
    (lambda net, h: F.relu(h + 1 + 1), "identity"),
    (lambda net, h: F.relu(F.dropout(h, 0.5)), "identity"),
    (lambda net, h: F.relu(-h), "identity"),
]


@pytest.mark.parametrize(("rest", "name"), FUNCTIONS, ids=[f"{i}-{name}" for i, (_, name) in enumerate(FUNCTIONS)])
def test_functions_and_methods(rest: Callable[[Net, Tensor], Tensor], name: str) -> None:
    assert reading_of(rest).name == name


def test_words_say_how_it_was_found() -> None:
    net = Net(lambda net, h: F.relu(h) + h).eval()
    readings = read(net, ["fc", "last"]).readings
    assert "read 2 times" in readings["fc"].words
    assert readings["last"].words == "it is the network's output"
    assert readings["fc"].activation == IDENTITY


def test_layer_whose_output_is_not_used() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.a(x)
            return self.b(x)

    assert read(Unused().eval(), ["a", "b"]).readings["a"].words == "its output is not used"


def test_two_consumers_with_an_inplace_activation_match_the_preactivation() -> None:
    def rest(net: Net, h: Tensor) -> Tensor:
        h.relu_()
        return h

    assert reading_of(rest) == IDENTITY


GRID = torch.linspace(-25, 25, 400_001, dtype=torch.float64)


@pytest.mark.parametrize("module", [module for module, _ in MODULES if not isinstance(module, nn.Softmax)], ids=str)
def test_lipschitz_constants_on_a_grid(module: nn.Module) -> None:
    if getattr(module, "inplace", False):
        module = nn.ReLU()
    activation = read(nn.Sequential(nn.Linear(3, 4), module).eval(), ["0"]).readings["0"].activation
    assert activation.lipschitz is not None
    y = module(GRID.clone())
    slopes = y.diff().abs() / GRID.diff()
    assert float(slopes.max()) <= activation.lipschitz * (1 + 1e-6)
    assert float(slopes.max()) >= activation.lipschitz * 0.995  # not needlessly large
    if activation.exact:
        torch.testing.assert_close(activation.apply(GRID), y)
    else:
        torch.testing.assert_close(activation.apply(GRID), GRID)


def test_softmax_is_one_lipschitz() -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, 2000, 5, generator=generator, dtype=torch.float64) * 3
    assert bool(((u.softmax(1) - v.softmax(1)).norm(dim=1) <= (u - v).norm(dim=1)).all())


@pytest.mark.parametrize("module", [nn.Softplus(threshold=1), nn.CELU(-1.0)], ids=str)
def test_activations_without_a_lipschitz_constant_end_the_chain(module: nn.Module) -> None:
    graph = read(nn.Sequential(nn.Linear(3, 4), module, nn.Linear(4, 2)).eval(), ["0", "2"])
    assert graph.readings["0"].activation.lipschitz is None
    assert graph.chain == Chain((Step("0"),), f"no Lipschitz constant is known for 1 ({type(module).__name__})")


def test_hooks_on_an_activation_are_not_trusted() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    net[1].register_forward_hook(lambda module, inputs, output: output + 5)
    graph = read(net, ["0", "2"])
    assert graph.readings["0"].activation == IDENTITY
    assert graph.chain.reason == "1 (ReLU) has hooks, whose effect is not known"


def test_subclass_of_an_activation_is_not_trusted() -> None:
    class Odd(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    assert read(nn.Sequential(nn.Linear(3, 4), Odd()).eval(), ["0"]).readings["0"].activation == IDENTITY


# --- models as users write them -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, scale: float | None = None, mask: Tensor | None = None) -> Tensor:
        h = F.relu(self.up(x))
        if scale is not None:
            h = h * scale
        if mask is not None:
            h = h * mask
        return x + self.down(h)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_nested_modules_with_residuals() -> None:
    names = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head"]
    graph = read(Nested().eval(), names)
    assert [graph.readings[name].activation for name in names] == [RELU, IDENTITY, RELU, IDENTITY, IDENTITY]
    assert graph.chain == Chain((Step("blocks.0.up"), Step("blocks.0.down")), "the path branches after add")


class ChangedInPlace(nn.Module):
    """Changes a layer's output by a call whose result is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h.mul_(10)
        return self.last(h)


def test_no_bound_passes_what_may_have_been_changed_in_place() -> None:
    torch.manual_seed(0)
    graph = read(ChangedInPlace().eval(), ["first", "last"])
    assert graph.chain.steps == (Step("first"),) and "in place" in graph.chain.reason
    result = prune(ChangedInPlace(), [torch.randn(100, 6)], NetTrim(sparsity=0.3), scheme="parallel", progress=False)
    assert result.certificate.network.bound is None and truthful(result)


class MadeInForward(nn.Module):
    """Adds a tensor that forward makes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x) + torch.ones(6)))


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
def test_tensors_that_forward_makes_are_seen_in_every_copy(scheme: str) -> None:
    torch.manual_seed(0)
    model = MadeInForward()
    result = prune(model, [torch.randn(100, 6)], NetTrim(sparsity=0.3), scheme=scheme, progress=False)
    assert truthful(result) and result.report.layers[0].activation == "relu"
    assert not any(name.startswith("_tensor") for name in (*vars(model), *vars(result.model)))


def test_what_a_model_does_in_place_does_not_reach_the_data() -> None:
    x = torch.randn(100, 6, dtype=torch.float64)
    before = x.clone()
    prune(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 4).double()), [x], NetTrim(sparsity=0.3), progress=False)
    assert torch.equal(x, before)


def test_arguments_that_are_not_given_keep_their_defaults() -> None:
    assert read(Block().eval(), ["up"]).readings["up"].activation == RELU
    assert read(Block().eval(), ["up"], given={"x": torch.ones(1), "mask": torch.ones(1)}).readings["up"].activation == RELU


class Branching(nn.Module):
    """Control flow that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.last = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        if h.sum() > 1e9:
            h = h + 1
        return self.last(torch.relu(h))


def test_untraceable_models_are_matched_linearly_and_say_so() -> None:
    graph = read(Branching().eval(), ["fc", "last"])
    assert all(not reading.activation.exact and reading.source == "not seen" for reading in graph.readings.values())
    assert "could not be traced" in graph.notice
    assert graph.chain == Chain((), "the graph could not be traced")
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    result = prune(Branching(), x, NetTrim(epsilon=0.1), progress=False)
    assert any("could not be traced" in note for note in result.report.notes)
    assert truthful(result)
    assert [layer.source for layer in result.certificate.layers] == ["not seen", "not seen"]


def test_a_trace_that_took_another_turn_is_not_used() -> None:
    class Typed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.last = nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x: object) -> Tensor:
            h = self.fc(x)
            return self.last(h.abs() if isinstance(x, Tensor) else torch.relu(h))  # a proxy is no Tensor

    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    result = prune(Typed(), x, NetTrim(epsilon=0.1), progress=False)
    assert any("computes something else" in note for note in result.report.notes)
    assert result.report.layers[0].activation == "unknown"


def test_stated_activations() -> None:
    net = Branching().eval()
    assert read(net, ["fc", "last"], {"fc": RELU}).readings["fc"].activation == RELU
    assert read(net, ["fc", "last"], {"fc": RELU}).readings["fc"].source == "stated"
    seen = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    agreeing = read(seen, ["0", "2"], {"0": RELU})
    assert agreeing.readings["0"].source == "stated"
    assert agreeing.chain.reason == ""


def test_a_statement_against_the_graph_is_said_and_ends_the_chain() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)).eval()
    graph = read(net, ["0", "2"], {"0": RELU})
    assert graph.readings["0"].source == "stated against the graph"
    assert "the graph reads gelu" in graph.readings["0"].words
    assert graph.chain == Chain((), "what is stated of layer '0' is not what the graph shows")
    # matching the pre-activation itself is sound whatever follows
    assert read(net, ["0", "2"], {"0": IDENTITY}).chain == Chain((Step("0"), Step(None, 1.129), Step("2")))


# --- the chain ----------------------------------------------------------------------------------------------------------------------


def chain_of(model: nn.Module, names: list[str]) -> Chain:
    return read(model.eval(), names).chain


def test_the_whole_chain() -> None:
    net = nn.Sequential(
        nn.Flatten(),
        nn.Linear(4, 6),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(6, 5),
        nn.GELU(),
        nn.Linear(5, 5),
        nn.Sigmoid(),
        nn.Identity(),
        nn.Linear(5, 3),
        nn.Softmax(-1),
    )
    expected = (Step("1"), Step("4"), Step(None, 1.129), Step("6"), Step(None, 0.25), Step("9"))
    assert chain_of(net, ["1", "4", "6", "9"]) == Chain(expected)


def test_layers_that_are_not_pruned_are_steps_too() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    assert chain_of(net, ["0"]) == Chain((Step("0"), Step("2")))
    assert chain_of(net, ["2"]) == Chain((Step("2"),))  # before it, both networks agree


def test_a_linear_subclass_that_is_not_pruned_ends_the_chain() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    net = nn.Sequential(nn.Linear(4, 4), Doubled(4, 6), nn.ReLU(), nn.Linear(6, 3))
    assert chain_of(net, ["0"]).steps == (Step("0"),)
    assert chain_of(net, ["0"]).reason
    assert chain_of(net, ["3"]) == Chain((Step("3"),))


def test_ends_of_chains() -> None:
    assert "branches" in chain_of(Net(lambda net, h: F.relu(h) + h), ["fc", "last"]).reason
    assert "LayerNorm" in chain_of(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)), ["0", "2"]).reason
    assert chain_of(Net(lambda net, h: torch.sin(h)), ["fc", "last"]) == Chain((Step("fc"),), "no Lipschitz constant is known for sin")

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.fc(x)))

    assert chain_of(Twice(), ["fc"]).reason == "layer 'fc' is called more than once"
    assert "followed by different things" in read(Twice().eval(), ["fc"]).readings["fc"].words

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.fc(x), y

    assert chain_of(Two(), ["fc"]).reason == "the output is more than one tensor"

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (self.fc(x),)

    assert chain_of(Pair(), ["fc"]) == Chain((Step("fc"),), "the output is more than one tensor")


def test_a_layer_hidden_in_another_module() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.last = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.encoder(x))

    graph: Graph = read(Hidden().eval(), ["encoder.linear1", "last"])
    assert graph.readings["encoder.linear1"].source == "not seen"
    assert "hidden" in graph.readings["encoder.linear1"].words
    assert math.isfinite(graph.readings["last"].activation.lipschitz or math.inf)


def test_a_model_that_is_one_layer() -> None:
    assert read(nn.Linear(3, 2).eval(), [""]).chain == Chain((Step(""),))
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    result = prune(nn.Linear(3, 2), x, NetTrim(epsilon=0.1), progress=False)
    assert truthful(result)
    assert result.certificate.network.bound is not None


class ByName(nn.Module):
    """Takes whatever it is called with, and looks for names in it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, **kwargs: Any) -> dict[str, Tensor]:
        print("seen", type(kwargs["x"]).__name__)
        y = self.up(kwargs["x"])
        y = torch.relu(y) if kwargs.get("gate") is None else y * kwargs["gate"]
        out = {"logits": self.down(y)}
        if kwargs.get("labels") is not None:
            out["loss"] = out["logits"].sum() * kwargs["labels"]
        return out if kwargs.get("whole", True) else {"logits": out["logits"]}


class Passing(nn.Module):
    """A decorator's forward, which hands on all it is given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("wrap", [lambda model: model, Passing], ids=["itself", "wrapped"])
@pytest.mark.parametrize("extra", [{}, {"gate": None}, {"whole": False}, {"gate": 2.0}, {"whole": True, "labels": 3}], ids=str)
def test_a_model_called_by_name_is_traced_with_the_names_it_is_called_with(
    extra: dict[str, Any], wrap: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    result = prune(wrap(ByName()), [{"x": x, **extra}], sparsity=0.5, progress=False)
    first, last = result.report.layers
    assert first.activation == ("relu" if extra.get("gate") is None else "identity")
    assert "labels" in extra or last.reading == "it is the network's output"
    assert not result.report.notes
    printed = capfd.readouterr()
    assert printed.err == "" and set(printed.out.splitlines()) <= {"seen Tensor", "seen Parameter"}  # the user's own words, about data


@pytest.mark.parametrize("wrap", [lambda model: model, Passing], ids=["itself", "wrapped"])
def test_a_trace_that_fails_is_said_in_the_report_alone(wrap: Any, capfd: pytest.CaptureFixture[str]) -> None:
    class Turning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, *, x: Tensor, y: Tensor | None = None) -> Tensor:
            x = self.last(torch.relu(self.fc(x)))
            if not isinstance(x, Tensor):  # a stand-in takes another turn, which ends in an error when it is run
                return x + x.new_zeros(7)
            return x

    result = prune(wrap(Turning()), [{"x": torch.randn(12, 3)}], sparsity=0.5, progress=False)
    assert "could not be traced" in result.report.notes[0]
    assert capfd.readouterr() == ("", "")


def test_batches_that_call_a_model_in_different_ways_are_refused() -> None:
    x = torch.randn(12, 3)
    for second in ({"x": x, "gate": x}, {"x": x, "whole": False}):
        with pytest.raises(InvalidInput, match=r"batch 2 gives x, .*; every batch must call the model in the same way"):
            prune(ByName(), [{"x": x, "whole": True} if "whole" in second else {"x": x}, second], sparsity=0.5, progress=False)
