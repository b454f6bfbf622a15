"""Fine-tuning a pruned model while its zeros stay zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .layers import is_prunable
from .status import InvalidInput


class ZeroKeeper:
    """Puts the zeros back after every step of an optimizer; see :func:`keep_zeros`."""

    def __init__(self, masks: dict[str, tuple[nn.Parameter, Tensor]], optimizer: torch.optim.Optimizer) -> None:
        self._masks = masks
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.apply()

    def apply(self) -> None:
        """Sets every kept zero to zero now."""
        with torch.no_grad():
            for parameter, zeros in self._masks.values():
                parameter.masked_fill_(zeros.to(parameter.device), 0)

    def remove(self) -> None:
        """Stops keeping zeros."""
        self._handle.remove()

    def __enter__(self) -> ZeroKeeper:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def _weights_of(module: nn.Module) -> tuple[str, ...]:
    """The parameters of a module that pruning makes zeros in."""
    if isinstance(module, nn.MultiheadAttention):
        return ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    return ("weight",) if is_prunable(module) else ()


def keep_zeros(model: nn.Module, optimizer: torch.optim.Optimizer) -> ZeroKeeper:
    """Keeps every weight that is zero now at zero through all later steps of ``optimizer``, whatever its momentum or weight decay.

    Nothing is added to the model: parameters, state_dict keys and file size stay as they are. The keeper can be used as a context
    manager, or stopped with ``remove()``.

    Raises:
        InvalidInput: the model has no zero weight, or the optimizer holds none of its weights (an optimizer made for another model).
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    masks: dict[str, tuple[nn.Parameter, Tensor]] = {}
    for name, module in model.named_modules():
        for label in _weights_of(module):
            weight = module._parameters.get(label)
            if weight is not None and bool((zeros := weight.detach() == 0).any()):
                masks[f"{name}.{label}"] = (weight, zeros)
    if not masks:
        raise InvalidInput("keep_zeros: the model has no zero weights; prune it first")
    if not any(id(parameter) in held for parameter, _ in masks.values()):
        raise InvalidInput(
            "keep_zeros: the optimizer holds none of this model's pruned weights; make it from the pruned model's parameters"
        )
    return ZeroKeeper(masks, optimizer)
