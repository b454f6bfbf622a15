"""torch's encoder layers taken apart: the same function, readings of what is inside, and a check of it on the data."""

from __future__ import annotations

import copy
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from verdicts import truthful

import nettrim
from nettrim import NetTrim, prune, verify
from nettrim.attention import AttentionLayers, closed, opened
from nettrim.encoder import EncoderLayerSteps, EncoderSteps
from nettrim.graph import read
from nettrim.opening import HIDDEN, OTHER, how_opened

F64 = torch.float64
CPU = torch.device("cpu")


def tokens(count: int = 24, length: int = 4) -> Tensor:
    return torch.randn(count, length, 8, generator=torch.Generator().manual_seed(1))


def layer(**settings: Any) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    made = nn.TransformerEncoderLayer(8, 2, 12, **{"batch_first": True} | settings)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made.eval()


SETTINGS: list[dict[str, Any]] = [
    {},
    {"norm_first": True},
    {"activation": "gelu"},
    {"activation": nn.LeakyReLU(0.1), "norm_first": True},
    {"activation": torch.tanh},
    {"batch_first": False},
    {"bias": False},
]


def in_words(settings: dict[str, Any]) -> str:
    return " ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in settings.items()) or "default"


@pytest.mark.parametrize("settings", SETTINGS, ids=in_words)
@pytest.mark.parametrize("masked", [False, True])
def test_steps_compute_what_the_layer_computes(settings: dict[str, Any], masked: bool) -> None:
    given = layer(dtype=F64, **settings)
    x = tokens().to(F64)
    x = x if settings.get("batch_first", True) else x.transpose(0, 1).contiguous()
    padding = torch.zeros(24, 4, dtype=torch.bool)
    padding[::3, 3] = True
    masks = {"src_mask": torch.ones(4, 4, dtype=torch.bool).triu(1), "src_key_padding_mask": padding} if masked else {}
    steps = opened(given)
    assert isinstance(steps, EncoderLayerSteps) and isinstance(steps.self_attn, AttentionLayers)
    with torch.enable_grad():  # the fused path is off while gradients are wanted
        torch.testing.assert_close(steps(x, **masks), given(x, **masks))
    assert [name for name, _ in steps.named_modules() if "_proj" not in name] == [
        name for name, _ in given.named_modules() if "_proj" not in name
    ]


@pytest.mark.parametrize("norm", [False, True])
def test_a_whole_encoder(norm: bool) -> None:
    final = nn.LayerNorm(8, dtype=F64) if norm else None
    given = nn.TransformerEncoder(layer(dtype=F64), 3, norm=final, enable_nested_tensor=False).eval()
    before = copy.deepcopy(given.state_dict())
    steps, x = opened(given), tokens().to(F64)
    assert isinstance(steps, EncoderSteps)
    causal = nn.Transformer.generate_square_subsequent_mask(4, dtype=F64)
    torch.testing.assert_close(steps(x), given(x))
    torch.testing.assert_close(steps(x, mask=causal, is_causal=True), given(x, mask=causal, is_causal=True))
    again = closed(steps, given)
    assert type(again) is nn.TransformerEncoder and list(again.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in again.state_dict().items())


class Classifier(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        encoder = layer(**settings)
        self.encoder, self.head = nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False), nn.Linear(8, 3)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(
    ("activation", "name"), [("relu", "relu"), ("gelu", "gelu"), (nn.Hardtanh(), "hardtanh(-1.0, 1.0)"), (F.silu, "silu")]
)
def test_what_follows_the_layers_inside_is_read(activation: Any, name: str, norm_first: bool) -> None:
    model = opened(Classifier(activation=activation, norm_first=norm_first))
    readings = read(model, [f"encoder.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]).readings
    assert [reading.activation.name for reading in readings.values()] == [name, "identity"] * 2
    assert [bool(reading.total) for reading in readings.values()] == [False, True] * 2
    assert all(reading.source == "graph" for reading in readings.values())


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
def test_encoders_are_pruned_written_back_and_verified(scheme: Any, tmp_path: Path) -> None:
    model, x = Classifier(norm_first=True), tokens()
    result = prune(model, x, NetTrim(epsilon=0.1), scheme=scheme, progress=False)
    assert truthful(result) and not result.report.notes
    assert [type(module) for module in result.model.modules()] == [type(module) for module in model.modules()]
    assert list(result.model.state_dict()) == list(model.state_dict())
    by_name = {row.name: row for row in result.report.layers}
    assert by_name["encoder.layers.0.linear1"].activation == "relu"
    assert by_name["encoder.layers.1.linear2"].reading.startswith("added to ")
    moved = float((result.model(x) - model(x)).detach().norm())
    assert moved == pytest.approx(result.certificate.network.achieved, rel=1e-3)
    verify(result.save(tmp_path / "out"), Classifier(norm_first=True), x)


def test_hooks_and_subclasses_are_left_as_they_are() -> None:
    class Own(nn.TransformerEncoderLayer):
        pass

    for encoder in (Own(8, 2, 12, batch_first=True).eval(), layer()):
        if type(encoder) is nn.TransformerEncoderLayer:
            encoder.register_forward_hook(lambda module, inputs, output: 2 * output)
        model = nn.Sequential(encoder, nn.Linear(8, 3)).eval()
        twin = opened(model)
        assert type(twin[0]) is type(encoder) and isinstance(twin[0].self_attn, AttentionLayers)
        assert how_opened(model, CPU, tokens()) == (True, "")
        torch.testing.assert_close(twin(tokens()), model(tokens()), rtol=1e-4, atol=1e-5)


def test_a_layer_that_computes_something_else_stays_hidden_with_a_notice(tmp_path: Path) -> None:
    def model() -> Classifier:
        """Feeds forward twice as much as its type says: an instance with a method of its own."""
        made = Classifier(activation=torch.tanh)
        inner = made.encoder.layers[0]
        inner._ff_block = MethodType(lambda self, x: 2 * nn.TransformerEncoderLayer._ff_block(self, x), inner)
        return made

    given, x = model(), tokens()
    assert how_opened(Classifier(activation=torch.tanh), CPU, x) == (True, "")
    assert how_opened(given, CPU, x) == (False, HIDDEN)
    result = prune(given, x, NetTrim(epsilon=0.1), progress=False)
    assert HIDDEN in result.report.notes and truthful(result)
    sources = {layer.name: layer.source for layer in result.certificate.layers}
    assert sources["encoder.layers.0.linear1"] == "not seen"
    moved = float((result.model(x) - given(x)).detach().norm())
    assert moved == pytest.approx(result.certificate.network.achieved, rel=1e-3)
    verify(result.save(tmp_path / "out"), model(), x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padding_of_the_fused_path_is_said() -> None:
    class Padded(nn.Module):
        """Puts out padded places, which the fused path sets to zero."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(layer(), 1, enable_nested_tensor=True)
            self.eval()

        def forward(self, x: Tensor) -> Tensor:
            padding = torch.zeros(x.shape[:2], dtype=torch.bool)
            padding[:, -1] = True
            return self.encoder(x, src_key_padding_mask=padding)

    model, x = Padded(), tokens()
    with torch.no_grad():
        fused = model(x)
    assert bool((fused.shape[1] < 4) or (fused[:, -1] == 0).all())
    assert how_opened(model, CPU, x) == (True, OTHER)
    result = prune(model, x, NetTrim(epsilon=0.2), progress=False)
    assert OTHER in result.report.notes
    assert nettrim.render.report_text(result.report)
