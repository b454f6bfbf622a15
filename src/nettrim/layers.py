"""The one matrix view of a prunable layer: inputs as rows, weights (N, M), bias (M,), and the write-back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .status import InvalidInput

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LayerView:
    """A named ``Linear`` layer as a matrix: ``Z = A W + 1 b^T`` with ``W`` the transpose of the module's weight.

    Made by :func:`view`, which checks the layer; made directly where it has been checked before.
    """

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
    """The matrix view of a layer, after checking that it can be pruned as it is.

    Raises:
        InvalidInput: its weight is not a plain, dense, finite parameter; the message says what to do.
    """
    if not isinstance(module, nn.Linear):
        raise InvalidInput(f"layer {name!r} is a {type(module).__name__}; nettrim prunes Linear layers")
    for label in ("weight", "bias"):
        tensor = getattr(module, label)
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
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidInput(f"layer {name!r}: its {label} holds NaN or inf; repair or retrain the model before pruning it")
    return LayerView(name, module)


def without_values(tensor: Tensor) -> bool:
    """True for tensors of lazy modules that have not run yet, and for tensors on the meta device."""
    return is_lazy(tensor) or tensor.is_meta
