"""Attention whose projections are layers: the same function, pruned and written back into nn.MultiheadAttention."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from verdicts import truthful

import nettrim
from nettrim import NetTrim, prune
from nettrim.attention import AttentionLayers, closed, opened

F64 = torch.float64


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def masks(kind: str, batch: int, target: int, source: int, heads: int) -> dict[str, Tensor]:
    causal = torch.ones(target, source, dtype=torch.bool).triu(1)
    padding = torch.zeros(batch, source, dtype=torch.bool)
    padding[0, -2:] = True
    return {
        "none": {},
        "causal": {"attn_mask": causal},
        "added": {"attn_mask": normal(9, target, source)},
        "by head": {"attn_mask": normal(9, batch * heads, target, source)},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": causal, "key_padding_mask": padding},
    }[kind]


@pytest.mark.parametrize("kind", ["none", "causal", "added", "by head", "padding", "both"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"kdim": 6, "vdim": 5}])
def test_the_projections_as_layers_compute_the_same(kind: str, batch_first: bool, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, dtype=F64, **settings).eval()
    if attention.in_proj_bias is not None:
        nn.init.normal_(attention.in_proj_bias)
    query, key, value = normal(1, 3, 4, 8), normal(2, 3, 5, settings.get("kdim", 8)), normal(3, 3, 5, settings.get("vdim", 8))
    if not batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    layers = AttentionLayers(attention)
    given = masks(kind, 3, 4, 5, 2)
    for more in ({}, {"average_attn_weights": False}):
        expected, found = attention(query, key, value, **given, **more), layers(query, key, value, **given, **more)
        torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1])
    assert layers(query, key, value, need_weights=False)[1] is None


def test_unbatched_inputs() -> None:
    attention = nn.MultiheadAttention(8, 2, dtype=F64).eval()
    x = normal(1, 4, 8)
    torch.testing.assert_close(AttentionLayers(attention)(x, x, x), attention(x, x, x))


class Encoder(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, **settings)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.own = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        return self.head((x + self.own(x, x, x, need_weights=False)[0]).mean(1))


def tokens(count: int = 40) -> Tensor:
    return torch.randn(count, 5, 8, generator=torch.Generator().manual_seed(1))


def test_opened_and_closed_again_nothing_has_changed() -> None:
    model, x = Encoder(), tokens()
    model.own.in_proj_weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    twin = opened(model)
    torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, nn.MultiheadAttention) for module in twin.modules())
    again = closed(twin, model)
    assert list(again.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in again.state_dict().items())
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    plain = nn.Sequential(nn.Linear(3, 2))
    assert opened(plain) is plain and closed(plain, plain) is plain


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
@pytest.mark.parametrize("method", [NetTrim(epsilon=0.1), NetTrim(sparsity=0.5, max_iterations=60)], ids=["epsilon", "sparsity"])
def test_attention_is_pruned_written_back_and_verified(method: NetTrim, scheme: Any, tmp_path: Path) -> None:
    model, x = Encoder(), tokens()
    result = prune(model, x, method, scheme=scheme, progress=False)
    assert type(result.model.own) is nn.MultiheadAttention and list(result.model.state_dict()) == list(model.state_dict())
    names = [layer.name for layer in result.report.layers]
    assert {"own.q_proj", "own.k_proj", "own.v_proj", "own.out_proj", "encoder.layers.1.self_attn.q_proj"} <= set(names)
    assert truthful(result)
    network = result.certificate.network
    moved = float((result.model(x) - model(x)).detach().norm())
    assert moved == pytest.approx(network.achieved, rel=1e-3, abs=1e-5)
    zeros = int((result.model.get_parameter("own.in_proj_weight") == 0).sum())
    by_name = {layer.name: layer for layer in result.report.layers}
    assert zeros == sum(by_name[f"own.{part}_proj"].weights - by_name[f"own.{part}_proj"].nonzeros for part in "qkv")
    assert result.masks()["own.k_proj"].shape == (8, 8)
    folder = result.save(tmp_path / "pruned")
    nettrim.verify(folder, model, x)
    nettrim.load(folder, Encoder())


def test_the_page_of_a_saved_result_is_made_again(tmp_path: Path) -> None:
    from nettrim import checkpoint

    folder = prune(Encoder(), tokens(), NetTrim(epsilon=0.2), layers=["own"], progress=False).save(tmp_path / "pruned")
    state = checkpoint.read_weights(folder / "model.safetensors")
    assert checkpoint.weight_of(state, "own.v_proj").shape == (8, 8)
    torch.testing.assert_close(checkpoint.weight_of(state, "own.v_proj"), state["own.in_proj_weight"][16:])
    with pytest.raises(nettrim.InvalidInput, match=r"no 'other\.weight'"):
        checkpoint.weight_of(state, "other")


def test_zeros_of_attention_are_kept_in_fine_tuning() -> None:
    model = prune(Encoder(), tokens(), NetTrim(sparsity=0.5, max_iterations=30), layers=["own"], progress=False).model
    weight = model.get_parameter("own.in_proj_weight")
    zeros = weight.detach() == 0
    assert 90 <= int(zeros.sum()) <= 102
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with nettrim.keep_zeros(model, optimizer):
        model(tokens()).square().sum().backward()
        optimizer.step()
    assert bool((weight[zeros] == 0).all()) and bool((weight[~zeros] != 0).all())


def test_attention_with_added_keys_stays_as_it_is() -> None:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.head = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.own(x, x, x, need_weights=False)[0].mean(1))

    torch.manual_seed(0)
    result = prune(Added().eval(), tokens(), NetTrim(epsilon=0.1), progress=False)
    assert [layer.name for layer in result.report.layers] == ["head"]
    assert any(left.name == "own.out_proj" and "never called" in left.reason for left in result.report.model.left_out)


def tied(kind: str) -> nn.Module:
    model = Encoder()
    if kind == "to a linear layer":
        model.head = nn.Linear(8, 24)
        model.head.weight = model.own.in_proj_weight
    elif kind == "between attentions":
        model.own.in_proj_weight = model.encoder.layers[0].self_attn.in_proj_weight
    elif kind == "of the output":
        model.own.out_proj.weight = model.encoder.layers[1].self_attn.out_proj.weight
    elif kind == "of biases":
        model.own.in_proj_bias = model.encoder.layers[1].self_attn.in_proj_bias
    else:
        model.own = nn.MultiheadAttention(8, 2, kdim=8, vdim=6, batch_first=True).eval()
        model.own.k_proj_weight = model.own.q_proj_weight
    return model


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("to a linear layer", "'own', 'head' share one parameter: pruning 'own.q_proj'"),
        ("between attentions", "'encoder.layers.0.self_attn', 'own' share one parameter"),
        ("of the output", "'encoder.layers.1.self_attn.out_proj', 'own.out_proj' share one parameter"),
        ("of biases", "'encoder.layers.1.self_attn', 'own' share one parameter"),
        ("inside", "'own.q_proj', 'own.k_proj' share one parameter"),
    ],
)
def test_tied_attention_is_refused(kind: str, names: str) -> None:
    with pytest.raises(nettrim.InvalidInput, match=names):
        prune(tied(kind), tokens(), NetTrim(epsilon=0.1), progress=False)


def test_what_is_tied_may_be_left_alone() -> None:
    model = tied("between attentions")
    result = prune(model, tokens(), NetTrim(epsilon=0.1), ignore=["own", "encoder.layers.0.self_attn"], progress=False)
    assert result.model.own.in_proj_weight is result.model.encoder.layers[0].self_attn.in_proj_weight
    assert truthful(result)
    with pytest.raises(nettrim.InvalidInput, match=r"pruning 'head' would .* ignore=\['head'\]"):
        prune(tied("to a linear layer"), tokens(), NetTrim(epsilon=0.1), layers=["head"], progress=False)
