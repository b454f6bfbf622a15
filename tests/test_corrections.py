"""What a user says of a layer's reading: parts taken out or named, checked on data, recorded, and never believed in a bound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from verdicts import truthful

import nettrim
from nettrim import InvalidInput, NetTrim, prune, verify
from nettrim.corrections import corrections_of
from nettrim.graph import Chain, Graph, Step, read
from nettrim.preimage import IDENTITY, RELU, Pool, leaky_relu
from nettrim.status import UnknownLayer

LAYERS = ["conv", "again", "head"]


def settle(model: nn.Module) -> nn.Module:
    """Weights of one seed, and batch-norms as after some training."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight += 1
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval()


class Traced(nn.Module):
    """conv, batch-norm, sum, relu; conv, batch-norm, relu, pooling; head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2)
        self.again, self.norm2 = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.pool, self.other, self.head = nn.MaxPool2d(2), nn.BatchNorm2d(4), nn.Linear(36, 3)
        settle(self)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(x)) + x)
        return self.head(self.pool(torch.relu(self.norm2(self.again(h)))).flatten(1))


class Hidden(Traced):
    """The same, for which torch.fx has no graph."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.sum()) > -1e9 else x


def images(count: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


def corrected(readings: dict[str, Any], model: nn.Module | None = None) -> Graph:
    model = model or Traced()
    made = corrections_of(readings, {}, LAYERS, dict(model.named_modules()))
    return read(model, LAYERS).corrected(model, made)


def test_the_graph_by_itself() -> None:
    graph = corrected({})
    first, second, _ = (graph.readings[name] for name in LAYERS)
    assert (first.norm, first.total, first.activation, first.pool) == ("norm", "add", RELU, None)
    assert (second.norm, second.total, second.activation, second.pool) == ("norm2", "", RELU, Pool((2, 2)))
    assert graph.tail == Chain((Step("head"),))


@pytest.mark.parametrize(
    ("layer", "parts", "left"),
    [
        ("conv", {"norm": None}, ("", "", IDENTITY, None)),
        ("conv", {"branch": None}, ("norm", "", IDENTITY, None)),
        ("conv", {"activation": None}, ("norm", "add", IDENTITY, None)),
        ("conv", {"pool": None}, ("norm", "add", RELU, None)),
        ("again", {"norm": None}, ("", "", IDENTITY, None)),
        ("again", {"activation": None}, ("norm2", "", IDENTITY, None)),
        ("again", {"pool": None}, ("norm2", "", RELU, None)),
        ("again", {"norm": None, "activation": None, "pool": None, "branch": None}, ("", "", IDENTITY, None)),
        ("again", {"norm": "norm2"}, ("norm2", "", RELU, Pool((2, 2)))),
    ],
)
def test_what_is_taken_out_takes_along_what_stands_behind_it(layer: str, parts: dict[str, Any], left: tuple[Any, ...]) -> None:
    graph = corrected({layer: parts})
    reading = graph.readings[layer]
    assert (reading.norm, reading.total, reading.activation, reading.pool) == left
    assert reading.source == ("stated" if "norm2" in parts.values() else "graph")
    assert reading.words.startswith("stated by the user: ")
    others = [name for name in LAYERS if name != layer]
    assert all(graph.readings[name] == corrected({}).readings[name] for name in others)


@pytest.mark.parametrize(
    ("layer", "parts", "left"),
    [
        ("again", {"norm": None, "activation": "relu"}, ("", "", RELU, None)),
        ("conv", {"branch": None, "activation": "relu"}, ("norm", "", RELU, None)),
        ("again", {"norm": "other"}, ("other", "", IDENTITY, None)),
        ("again", {"activation": "relu6"}, ("norm2", "", nettrim.preimage.named("relu6"), Pool((2, 2)))),
        ("head", {"activation": "relu"}, ("", "", RELU, None)),
        ("conv", {"pool": "pool"}, ("norm", "add", RELU, Pool((2, 2)))),
    ],
)
def test_what_does_not_follow_from_the_graph_ends_every_chain(layer: str, parts: dict[str, Any], left: tuple[Any, ...]) -> None:
    model = Traced()
    made = corrections_of({layer: parts}, {}, LAYERS, dict(model.named_modules()))
    for names in (LAYERS, [layer]):
        graph = read(model, names).corrected(model, made)
        reading = graph.readings[layer]
        assert (reading.norm, reading.total, reading.activation, reading.pool) == left
        assert reading.source == "stated against the graph"
        assert "the graph reads" in reading.words
        if graph.chain.steps == () or layer in [step.layer for step in graph.chain.steps] or names == [layer]:
            assert graph.chain.reason
        if names == [layer]:
            assert graph.tail == Chain((), f"what is stated of layer {layer!r} is not what the graph shows")


def test_parts_that_are_taken_out_become_steps_of_the_chain() -> None:
    net = settle(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.LeakyReLU(0.2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2)))

    def steps(parts: dict[str, Any]) -> list[str]:
        made = corrections_of({"0": parts}, {}, ["0", "5"], dict(net.named_modules()))
        chain = read(net, ["0", "5"]).corrected(net, made).chain
        assert chain.reason == ""
        factors = {"scale": nettrim.nodes.norm_lipschitz(net[1]), "": 1.0}
        assert all(step.lipschitz in factors.values() for step in chain.steps)
        return [step.layer or ("scale" if step.lipschitz != 1 else "one") for step in chain.steps]

    assert steps({"norm": "1"}) == ["0", "5"]
    assert steps({"norm": None}) == ["0", "scale", "one", "5"]
    assert steps({"activation": None}) == ["0", "one", "5"]
    assert steps({"activation": leaky_relu(0.3)}) == ["0", "one", "5"]  # a point box bounds the pre-activation, whatever follows
    assert steps({"pool": None}) == ["0", "one", "5"]


CORRECTED: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "named where nothing is traced": (
        Hidden,
        {"conv": {"norm": "norm"}, "again": {"norm": "norm2", "activation": "relu", "pool": "pool"}, "re:he.*": {"activation": None}},
    ),
    "taken out": (Traced, {"conv": {"branch": None}, "again": {"norm": None}}),
    "without pooling": (Traced, {"again": {"pool": None}}),
    "against the graph": (Traced, {"head": {"activation": "relu"}, "again": {"norm": "norm2", "activation": "relu6"}}),
}


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
@pytest.mark.parametrize("kind", CORRECTED)
def test_corrected_layers_are_certified_recorded_and_verified(kind: str, scheme: Any, tmp_path: Path) -> None:
    make, readings = CORRECTED[kind]
    model, x = make(), images()
    result = prune(model, x, NetTrim(epsilon=0.1), scheme=scheme, readings=readings, progress=False)
    assert truthful(result)
    assert all(layer.distance <= (layer.tolerance or 0) * 1.000001 for layer in result.report.layers)
    record = result.report.settings["readings"]
    assert record["again"] == readings["again"] and json.loads(json.dumps(record)) == record
    by_name = {layer.name: layer for layer in result.report.layers}
    assert by_name["again"].reading.startswith("stated by the user: ")
    network = result.certificate.network
    if kind in ("against the graph", "named where nothing is traced"):
        assert network.bound is None and network.reason
    assert network.bound is None or network.achieved <= network.bound
    folder = result.save(tmp_path / "out")
    again = verify(folder, make(), x)
    assert [(layer.activation, layer.source) for layer in again.layers] == [
        (layer.activation, layer.source) for layer in result.certificate.layers
    ]

    def forget(name: str) -> None:
        content = json.loads((folder / "report.json").read_text())
        del content["settings"]["readings"][name]
        (folder / "report.json").write_text(json.dumps(content))

    forget("again")
    with pytest.raises(nettrim.CertificateError, match="again: "):
        verify(folder, make(), x)


def test_a_named_batch_norm_and_pooling_say_what_the_graph_would_have_said() -> None:
    """With every part named, a model that cannot be traced is pruned exactly like its twin that can."""
    readings = {
        "conv": {"norm": None},
        "again": {"norm": "norm2", "activation": "relu", "pool": "pool"},
        "head": {"activation": "identity"},
    }
    first, second = (
        prune(
            make(),
            images(),
            NetTrim(epsilon=0.1),
            ignore=["conv"],
            readings={k: v for k, v in readings.items() if k != "conv"},
            progress=False,
        )
        for make in (Traced, Hidden)
    )
    assert all(torch.equal(a, b) for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True))
    assert [layer.source for layer in second.certificate.layers] == ["stated", "stated"]


class ByKeyword(nn.Module):
    """A batch-norm that gets its input by name, in a model without a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last, self.other = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2), nn.BatchNorm1d(2)
        settle(self)

    def forward(self, x: Tensor) -> Tensor:
        self.other(input=x[:, :2])
        x = self.first(x) if float(x.sum()) > -1e9 else x
        return self.last(torch.relu(self.norm(input=x)))


def test_a_module_that_gets_its_input_by_name_is_checked_too() -> None:
    x = torch.rand(20, 4, generator=torch.Generator().manual_seed(0))
    readings = {"first": {"norm": "norm", "activation": "relu"}}
    result = prune(ByKeyword(), x, NetTrim(epsilon=0.1), readings=readings, progress=False)
    assert truthful(result) and "norm norm, activation relu" in result.report.layers[0].reading
    with pytest.raises(InvalidInput, match="does not get what layer 'last' gives"):
        prune(ByKeyword(), x, NetTrim(epsilon=0.1), layers=["last"], readings={"last": {"norm": "other"}}, progress=False)


def test_stated_activations_are_short_for_readings() -> None:
    first = prune(Traced(), images(), NetTrim(epsilon=0.1), activations={"again": "relu6"}, progress=False)
    second = prune(Traced(), images(), NetTrim(epsilon=0.1), readings={"again": {"activation": "relu6"}}, progress=False)
    assert first.certificate == second.certificate
    assert first.report.settings["readings"] == {"again": {"activation": "relu6"}}
    both = corrections_of({"again": {"pool": None}}, {"re:a.*": "relu6"}, LAYERS, dict(Traced().named_modules()))
    assert both["again"].record() == {"activation": "relu6", "pool": None}


def test_layers_that_are_left_alone_are_steps_of_their_own() -> None:
    """A layer that gets no target is no unit: its batch-norm counts by itself, and what is said of it changes nothing."""
    net = settle(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)))
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(3))
    method = NetTrim(epsilon={"0": 0.1, "5": 0.1})
    with torch.no_grad():
        net[3].weight *= 50
    result = prune(net, x, method, scheme="parallel", activations={"2": "relu6"}, progress=False)
    network = result.certificate.network
    assert network.bound is not None and network.achieved <= network.bound
    assert result.report.settings["readings"] == {}


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"readings": {"agian": {"norm": None}}}, UnknownLayer, "readings: no layer fits 'agian'; the nearest is 'again'"),
    ({"readings": {"again": {"nrom": None}}}, InvalidInput, "there is no part 'nrom'; did you mean 'norm'"),
    ({"readings": {"again": {}}}, InvalidInput, "must name at least one of the parts"),
    ({"readings": {"again": "relu"}}, InvalidInput, "must name at least one of the parts"),
    ({"readings": ["again"]}, InvalidInput, "readings must be a mapping"),
    ({"readings": {3: {"norm": None}}}, InvalidInput, "found the key 3; names are strings"),
    ({"readings": {"again": {"activation": 3}}}, InvalidInput, "must be the name of an activation"),
    ({"readings": {"again": {"activation": "rellu"}}}, InvalidInput, "did you mean 'relu'"),
    ({"readings": {"again": {"norm": True}}}, InvalidInput, "norm must be the name of a module, or None"),
    ({"readings": {"again": {"norm": "norm3"}}}, UnknownLayer, "no module 'norm3'; the nearest is 'norm"),
    ({"readings": {"again": {"norm": "pool"}}}, InvalidInput, "must name a BatchNorm1d or BatchNorm2d"),
    ({"readings": {"again": {"norm": "norm"}}}, InvalidInput, "4 outputs, batch-norm 'norm' 2 channels"),
    ({"readings": {"again": {"norm": "other"}}}, InvalidInput, "'other' does not get what layer 'again' gives"),
    ({"readings": {"again": {"pool": "norm"}}}, InvalidInput, "must name a MaxPool1d or MaxPool2d"),
    ({"readings": {"conv": {"pool": "pool"}}}, InvalidInput, "'pool' does not get what layer 'conv' gives"),
    ({"readings": {"head": {"pool": "pool"}}}, InvalidInput, "puts out no maps"),
    ({"readings": {"again": {"branch": "norm"}}}, InvalidInput, "a branch can only be taken out"),
    ({"readings": {"again": {"activation": "relu"}}, "activations": {"again": "relu"}}, InvalidInput, "leave one of them out"),
]


@pytest.mark.parametrize(("settings", "kind", "message"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_refused_corrections(settings: dict[str, Any], kind: type[Exception], message: str) -> None:
    model = Traced()
    with pytest.raises(kind, match=message):
        prune(model, images(), NetTrim(epsilon=0.1), progress=False, **settings)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_pooling_needs_a_known_activation() -> None:
    with pytest.raises(InvalidInput, match="state its activation too"):
        prune(Hidden(), images(), NetTrim(epsilon=0.1), readings={"again": {"norm": "norm2", "pool": "pool"}}, progress=False)


def test_one_batch_norm_belongs_to_one_layer() -> None:
    class Shared(nn.Module):
        """The same batch-norm behind two layers: folded into neither, unless each is said to own it."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)
            settle(self)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.b(self.norm(self.a(x))))

    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(1))
    assert [reading.norm for reading in read(Shared(), ["a", "b"]).readings.values()] == ["", ""]
    with pytest.raises(InvalidInput, match="does not get what layer 'a' gives"):  # it is called twice
        prune(Shared(), x, NetTrim(epsilon=0.1), readings={"a": {"norm": "norm"}}, progress=False)
    with pytest.raises(InvalidInput, match="would be folded into 'a' and into 'b'"):
        prune(Shared(), x, NetTrim(epsilon=0.1), readings={"re:a|b": {"norm": "norm"}}, progress=False)
