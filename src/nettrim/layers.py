"""The one matrix view of a prunable layer: inputs as rows, weights (N, M), bias (M,), and the write-back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .status import InvalidInput


@dataclass(frozen=True)
class LayerView:
    """A named ``Linear`` layer as a matrix: ``Z = A W + 1 b^T`` with ``W`` the transpose of the module's weight."""

    name: str
    module: nn.Linear

    @property
    def kind(self) -> str:
        """The module's class name, for reports."""
        return type(self.module).__name__

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, M)``: inputs and outputs."""
        return self.module.in_features, self.module.out_features

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the layer stores its weights."""
        return self.module.weight.dtype

    def weights(self) -> Tensor:
        """``W`` (N, M), a view of the module's weight; read only."""
        return self.module.weight.detach().T

    def bias(self) -> Tensor | None:
        """``b`` (M,), or ``None`` for a layer without bias."""
        return None if self.module.bias is None else self.module.bias.detach()

    def rows(self, x: Tensor) -> Tensor:
        """The layer's input (..., N) as rows (P, N)."""
        return x.reshape(-1, self.module.in_features)

    def outputs(self, x: Tensor) -> Tensor:
        """The layer's output (..., M) as rows (P, M)."""
        return x.reshape(-1, self.module.out_features)

    def write(self, W: Tensor, b: Tensor | None) -> None:
        """Writes weights (N, M) and bias (M,) back in place, keeping the parameters themselves (names, flags, dtype, device)."""
        with torch.no_grad():
            self.module.weight.copy_(W.T)
            if b is not None:
                self.module.bias.copy_(b)


def is_prunable(module: nn.Module) -> bool:
    """True for the module kinds that have a matrix view."""
    return isinstance(module, nn.Linear)


def view(name: str, module: nn.Module) -> LayerView:
    """The matrix view of a layer.

    Raises:
        InvalidInput: its weight is not a plain, dense, finite parameter; the message says what to do.
    """
    if not isinstance(module, nn.Linear):
        raise InvalidInput(f"layer {name!r} is a {type(module).__name__}; nettrim prunes Linear layers")
    if parametrize.is_parametrized(module) or "weight_orig" in dict(module.named_parameters(recurse=False)):
        raise InvalidInput(
            f"layer {name!r}: its weight is computed from other parameters; make it plain first with "
            "torch.nn.utils.prune.remove(module, 'weight') or parametrize.remove_parametrizations(module, 'weight')"
        )
    if not isinstance(module.weight, nn.Parameter):
        raise InvalidInput(f"layer {name!r}: its weight must be an nn.Parameter, found {type(module.weight).__name__}")
    for label, tensor in (("weight", module.weight), ("bias", module.bias)):
        if tensor is None:
            continue
        if isinstance(tensor, nn.parameter.UninitializedTensorMixin) or tensor.is_meta:
            raise InvalidInput(f"layer {name!r}: its {label} holds no values yet; run or load the model before pruning it")
        if tensor.layout != torch.strided:
            raise InvalidInput(f"layer {name!r}: its {label} must be dense, found layout {tensor.layout}; call .to_dense() first")
        if not tensor.dtype.is_floating_point:
            raise InvalidInput(f"layer {name!r}: its {label} must be real floating point, found {tensor.dtype}")
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidInput(f"layer {name!r}: its {label} holds NaN or inf; repair or retrain the model before pruning it")
    return LayerView(name, module)
