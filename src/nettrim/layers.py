"""The one matrix view of a prunable layer: inputs as rows, weights (N, M), bias (M,), and the write-back.

A convolution's rows are its patches, one for each output position. With ``G`` groups, output ``m`` reads the inputs of its group only:
the view then has ``G`` row blocks of the same width, and column ``m`` of ``W`` speaks of the block ``m // (M / G)``.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .status import InvalidInput

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
KINDS = "Linear, Conv1d, Conv2d and transformers' Conv1D"


def is_transposed_linear(module: nn.Module) -> bool:
    """True for the ``Conv1D`` of transformers: a linear layer whose weight is stored as (N, M)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def is_prunable(module: nn.Module) -> bool:
    """True for the module kinds that have a matrix view."""
    return isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) or is_transposed_linear(module)


@dataclass(frozen=True)
class LayerView:
    """A named layer as a matrix: ``Z = A W + 1 b^T``.

    Made by :func:`view`, which checks the layer; made directly where it has been checked before.
    """

    name: str
    module: nn.Module

    @property
    def kind(self) -> str:
        """The module's class name, for reports."""
        return type(self.module).__name__

    @property
    def convolution(self) -> nn.Conv1d | nn.Conv2d | None:
        """The module, when it is a convolution."""
        return self.module if isinstance(self.module, (nn.Conv1d, nn.Conv2d)) else None

    @property
    def groups(self) -> int:
        """``G``: 1 for all but grouped convolutions."""
        conv = self.convolution
        return 1 if conv is None else conv.groups

    @property
    def weight(self) -> nn.Parameter:
        """The module's weight, as it is stored."""
        return cast(nn.Parameter, self.module.weight)

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, M)``: the inputs that one output reads, and outputs."""
        weight = self.weight
        if is_transposed_linear(self.module):
            return weight.shape[0], weight.shape[1]
        return weight[0].numel(), weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the layer stores its weights."""
        return self.weight.dtype

    def weights(self) -> Tensor:
        """``W`` (N, M), a view of the module's weight; read only."""
        weight = self.weight.detach()
        return weight if is_transposed_linear(self.module) else weight.reshape(len(weight), -1).T

    def bias(self) -> Tensor | None:
        """``b`` (M,), or ``None`` for a layer without bias."""
        bias = self.module.bias
        return None if bias is None else cast(Tensor, bias).detach()

    def respond(self, x: Tensor) -> Tensor:
        """The layer's output for the input ``x``, without the hooks that may sit on the module."""
        return cast(Tensor, self.module.forward(x))

    def rows(self, x: Tensor, which: Tensor | slice = slice(None)) -> Tensor:
        """The layer's input as rows (P, G N), or some of them: patches in the order of :meth:`outputs`, group after group."""
        conv = self.convolution
        if conv is None:
            return x.reshape(-1, self.shape[0])[which]
        patches = _patches(conv, _batched(conv, x))
        B, _, *places = patches.shape[: 2 + len(conv.kernel_size)]
        if isinstance(which, slice):
            which = torch.arange(B * math.prod(places), device=x.device)[which]
        image, *place = torch.unravel_index(which.to(x.device), (B, *places))
        picked: Any = (image, slice(None), *place)
        return patches[picked].flatten(1)  # also where there is none

    def outputs(self, y: Tensor) -> Tensor:
        """A map of the form of the layer's output as rows (P, M)."""
        conv = self.convolution
        return y.reshape(-1, self.shape[1]) if conv is None else _batched(conv, y).movedim(1, -1).reshape(-1, self.shape[1])

    def operator_factor(self) -> float:
        """``sqrt(kappa)``: how much larger than ``||W||_2`` the layer's operator norm can be (docs/theory.md, (4.7)); inf when unknown."""
        conv = self.convolution
        if conv is None:
            return 1.0
        steps = list(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True))
        if conv.padding_mode == "zeros":
            return math.sqrt(math.prod(math.ceil(k * math.gcd(s, d) / s) for k, s, d in steps))
        amounts = _padding(conv)[::-1]  # first axis first
        short = all(sum(amounts[2 * i : 2 * i + 2]) <= d * (k - 1) for i, (k, _, d) in enumerate(steps))
        if conv.padding_mode == "circular" and short:  # each tap then reads an entry at most once
            return math.sqrt(math.prod(conv.kernel_size))
        return math.inf  # entries of the input are repeated

    def write(self, W: Tensor, b: Tensor | None) -> None:
        """Writes weights (N, M) and bias (M,) back in place, keeping the parameters themselves (names, flags, dtype, device)."""
        with torch.no_grad():
            W = W + 0.0  # a product with a mask leaves -0.0, which costs a bit in compressed files
            self.weight.copy_(W if is_transposed_linear(self.module) else W.T.reshape(self.weight.shape))
            if b is not None:
                cast(nn.Parameter, self.module.bias).copy_(b)


def _batched(conv: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    return x if x.ndim == 2 + len(conv.kernel_size) else x[None]


def _patches(conv: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """A view (B, C, *places, *kernel) of the padded input: no patch is copied before it is picked."""
    if isinstance(conv.padding, str) or any(conv.padding) or conv.padding_mode != "zeros":
        amounts = _padding(conv)
        x = F.pad(x, amounts) if conv.padding_mode == "zeros" else F.pad(x, amounts, mode=conv.padding_mode)
    dims = len(conv.kernel_size)
    sizes = x.shape[2:]
    strides = x.stride()
    places = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(sizes, conv.kernel_size, conv.stride, conv.dilation, strict=True)]
    return x.as_strided(
        (*x.shape[:2], *places, *conv.kernel_size),
        (
            *strides[:2],
            *(strides[2 + i] * conv.stride[i] for i in range(dims)),
            *(strides[2 + i] * conv.dilation[i] for i in range(dims)),
        ),
        x.storage_offset(),
    )


def _padding(conv: nn.Conv1d | nn.Conv2d) -> list[int]:
    """Padding before and after each axis, last axis first, as F.pad wants it."""
    amounts: list[int] = []
    for axis in reversed(range(len(conv.kernel_size))):
        if conv.padding == "same":
            total = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
            amounts += [total // 2, total - total // 2]
        elif conv.padding == "valid":
            amounts += [0, 0]
        else:
            amounts += [int(cast(Any, conv.padding)[axis])] * 2
    return amounts


def view(name: str, module: nn.Module) -> LayerView:
    """The matrix view of a layer, after checking that it can be pruned as it is.

    Raises:
        InvalidInput: its weight is not a plain, dense, finite parameter; the message says what to do.
    """
    if not is_prunable(module):
        raise InvalidInput(f"layer {name!r} is a {type(module).__name__}; nettrim prunes {KINDS} layers")
    for label in ("weight", "bias"):
        tensor = cast("Tensor | None", getattr(module, label))
        if tensor is None:
            continue
        if label not in module._parameters:  # what is written there would be overwritten in the next forward pass
            raise InvalidInput(
                f"layer {name!r}: its {label} is computed from other parameters; make it plain first with "
                f"torch.nn.utils.prune.remove(module, {label!r}), torch.nn.utils.remove_weight_norm(module) or "
                f"torch.nn.utils.parametrize.remove_parametrizations(module, {label!r}), as it was made"
            )
        if without_values(tensor):
            raise InvalidInput(f"layer {name!r}: its {label} holds no values yet; run or load the model before pruning it")
        if not tensor.numel():
            raise InvalidInput(f"layer {name!r}: its {label} is empty (shape {tuple(tensor.shape)}); pass ignore=[{name!r}]")
        if tensor.layout != torch.strided:
            raise InvalidInput(f"layer {name!r}: its {label} must be dense, found layout {tensor.layout}; call .to_dense() first")
        if tensor.dtype not in DTYPES:
            known = ", ".join(str(dtype) for dtype in DTYPES)
            raise InvalidInput(
                f"layer {name!r}: its {label} must be one of {known}, found {tensor.dtype}; convert the model with .to(dtype)"
            )
        if tensor.is_inference():
            raise InvalidInput(
                f"layer {name!r}: its {label} was made in inference mode and cannot be changed; make the model outside of "
                "torch.inference_mode(), and load its state dict there"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidInput(f"layer {name!r}: its {label} holds NaN or inf; repair or retrain the model before pruning it")
    return LayerView(name, module)


def widened(module: nn.Module) -> nn.Module:
    """A layer of the same kind whose parameters are float64 copies; it shares everything else, and is only read."""
    twin = copy.copy(module)
    wide = {key: None if value is None else nn.Parameter(value.detach().double(), False) for key, value in module._parameters.items()}
    twin.__dict__["_parameters"] = wide
    return twin


def can_take_bias(module: nn.Module) -> bool:
    """True for a Linear, Conv1d or Conv2d without bias whose forward pass would use one: that of its class."""
    kind = next((kind for kind in (nn.Linear, nn.Conv1d, nn.Conv2d) if isinstance(module, kind)), None)
    if kind is None or "bias" not in module._parameters or module._parameters["bias"] is not None:
        return False
    own = type(module)
    return own.forward is kind.forward and getattr(own, "_conv_forward", None) is getattr(kind, "_conv_forward", None)


def add_bias(module: nn.Module) -> None:
    """Gives such a module a bias of zero, as trainable as its weight; what it computes stays the same."""
    weight = cast(nn.Parameter, module.weight)
    module.bias = nn.Parameter(torch.zeros(len(weight), dtype=weight.dtype, device=weight.device), requires_grad=weight.requires_grad)


def without_values(tensor: Tensor) -> bool:
    """True for tensors of lazy modules that have not run yet, and for tensors on the meta device."""
    return is_lazy(tensor) or tensor.is_meta
