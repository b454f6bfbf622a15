"""Attention with its projections as layers: nn.MultiheadAttention keeps three of them in one parameter, where no layer can be found.

``opened`` gives a model whose attention modules hold ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj`` as Linear layers and compute the
same; ``closed`` takes such a model's values back into the class and the state_dict keys that the model came with.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from .encoder import as_steps
from .layers import add_bias, can_take_bias


class AttentionLayers(nn.Module):
    """What nn.MultiheadAttention computes in eval mode, by four Linear layers. Arguments and results are those of that class."""

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.batch_first = source.num_heads, source.batch_first
        # nn.TransformerEncoderLayer asks for these, and then leaves its fused path, which calls no layer
        self.in_proj_bias, self._qkv_same_embed_dim = None, False
        biases = (None,) * 3 if source.in_proj_bias is None else source.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (_linear(w, b) for w, b in zip(_projections(source), biases, strict=True))
        self.out_proj = _linear(source.out_proj.weight, source.out_proj.bias)
        frozen = not _projections(source)[0].requires_grad
        for module, still in ((self.q_proj, frozen), (self.k_proj, frozen), (self.v_proj, frozen)):
            module.requires_grad_(not still)
        self.out_proj.requires_grad_(source.out_proj.weight.requires_grad)
        self.train(source.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,  # a hint only: the mask is given as well
    ) -> tuple[Tensor, Tensor | None]:
        """Output, and the attention weights where they are needed."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0 if self.batch_first else 1) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (
            torch.unflatten(project(x), -1, (self.num_heads, -1)).transpose(1, 2)
            for project, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, heads, L, S)
        if attn_mask is not None:
            if attn_mask.dim() == 3:
                attn_mask = torch.unflatten(attn_mask, 0, (-1, self.num_heads))
            scores = scores + _additive(attn_mask, scores)
        if key_padding_mask is not None:
            scores = scores + _additive(key_padding_mask[:, None, None], scores)
        weights = torch.softmax(scores, dim=-1)
        output = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        if not self.batch_first:
            output = output.transpose(0, 1)
        shown = weights.mean(1) if average_attn_weights else weights
        if not batched:
            output, shown = output.squeeze(0 if self.batch_first else 1), shown.squeeze(0)
        return output, shown if need_weights else None


def opened(model: nn.Module, *, encoders: bool = True) -> nn.Module:
    """The model itself when it holds no attention module that can be opened; otherwise a copy in which all of them are.

    With ``encoders``, torch's encoder layers around them become steps too (:mod:`nettrim.encoder`), which changes no name.
    """
    if not any(map(_can_open, model.modules())):
        return model
    twin = copy.deepcopy(model)
    made: dict[int, AttentionLayers] = {}
    if _can_open(twin):
        return AttentionLayers(cast(nn.MultiheadAttention, twin))
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if _can_open(child):
                setattr(module, name, made.setdefault(id(child), AttentionLayers(cast(nn.MultiheadAttention, child))))
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # nested tensors belong to the fused path
    return _in_steps(twin) if encoders else twin


def _in_steps(model: nn.Module) -> nn.Module:
    """The model with its encoder layers, and then its encoders, as steps; in place where they are not the model itself."""
    made: dict[int, nn.Module] = {}
    for kind in (nn.TransformerEncoderLayer, nn.TransformerEncoder):
        for module in list(model.modules()):
            for name, child in list(module._modules.items()):
                if isinstance(child, kind) and (steps := made.get(id(child)) or as_steps(child, AttentionLayers)) is not None:
                    module._modules[name] = made[id(child)] = steps
        if isinstance(model, kind):
            model = as_steps(model, AttentionLayers) or model
    return model


def closed(model: nn.Module, like: nn.Module) -> nn.Module:
    """The values of ``model``, which :func:`opened` made from ``like``, in a copy of ``like``; ``model`` itself when nothing was opened."""
    if type(model) is type(like) and not any(isinstance(module, AttentionLayers) for module in model.modules()):
        return model
    result = copy.deepcopy(like)
    result.zero_grad(set_to_none=True)
    state = model.state_dict()
    found = dict(model.named_modules())
    with torch.no_grad():
        for name, module in result.named_modules():
            layers = found.get(name)
            if not isinstance(layers, AttentionLayers):
                continue
            prefix = f"{name}." if name else ""
            assert isinstance(module, nn.MultiheadAttention)
            projections = (layers.q_proj, layers.k_proj, layers.v_proj)
            for part, layer in zip(_projections(module), projections, strict=True):
                part.copy_(layer.weight)
            if module.in_proj_bias is not None:
                module.in_proj_bias.copy_(torch.cat([layer.bias for layer in projections]))
            module.out_proj.weight.copy_(layers.out_proj.weight)
            if module.out_proj.bias is not None:
                module.out_proj.bias.copy_(layers.out_proj.bias)
            state = {key: value for key, value in state.items() if not key.startswith(prefix)}
    for name, module in result.named_modules():  # biases that pruning added outside attention
        if name in found and can_take_bias(module) and getattr(found[name], "bias", None) is not None:
            add_bias(module)
    own = result.state_dict()
    result.load_state_dict({key: state.get(key, value) for key, value in own.items()})
    return result


def layers_of(name: str, module: nn.Module, parameter: str) -> list[str]:
    """The layers that a module's own parameter belongs to once :func:`opened` has made layers of attention: the module itself elsewhere."""
    if not _can_open(module):
        return [name]
    parts = ("q", "k", "v") if parameter.startswith("in_proj") else (parameter[0],)
    return [f"{name}.{part}_proj" if name else f"{part}_proj" for part in parts]


def in_attention(model: nn.Module, name: str) -> bool:
    """Whether a layer of an opened model is a projection of attention."""
    return isinstance(model.get_submodule(name.rpartition(".")[0]), AttentionLayers)


def _can_open(module: nn.Module) -> bool:
    """Plain attention: no subclass, no added keys and values, parameters of its own with values."""
    if type(module) is not nn.MultiheadAttention or module._forward_hooks or module._forward_pre_hooks:
        return False
    plain = {"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"} <= set(module._parameters)
    plain = plain and "weight" in module.out_proj._parameters
    return plain and module.bias_k is None and module.bias_v is None and not module.add_zero_attn


def _projections(module: nn.MultiheadAttention) -> tuple[Tensor, Tensor, Tensor]:
    if module.in_proj_weight is not None:
        q, k, v = module.in_proj_weight.chunk(3)
        return q, k, v
    return cast(Tensor, module.q_proj_weight), cast(Tensor, module.k_proj_weight), cast(Tensor, module.v_proj_weight)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def _additive(mask: Tensor, scores: Tensor) -> Tensor:
    """A mask as what is added to the scores: minus infinity where a boolean one is true."""
    if mask.dtype != torch.bool:
        return mask.to(scores.dtype)
    return torch.zeros_like(mask, dtype=scores.dtype).masked_fill(mask, -float("inf"))
