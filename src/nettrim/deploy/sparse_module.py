"""What modules on sparse weights have in common: where the weights lie, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..status import InvalidInput
from .sparse_steps import SparseWeights, Step


class SparseModule(nn.Module):
    """Runs ``steps`` on sparse weights; tensors 0, 1, ... are its inputs, ``outputs`` those that it returns.

    Values and biases are frozen parameters, where the values stand are buffers.
    """

    def __init__(self, steps: Sequence[Step], weights: Mapping[str, SparseWeights], outputs: Sequence[int]) -> None:
        super().__init__()
        self.steps, self.outputs = tuple(steps), tuple(outputs)
        self.shapes: dict[str, tuple[tuple[int, ...], int]] = {}
        for number, (name, found) in enumerate(weights.items()):
            self.shapes[name] = (found.shape, found.groups)
            for part in ("values", "bias"):
                self.register_parameter(f"layer{number}_{part}", nn.Parameter(getattr(found, part).clone(), requires_grad=False))
            for part in ("columns", "rows"):
                self.register_buffer(f"layer{number}_{part}", getattr(found, part).clone())
        self.eval()
        self._forget()

    @property
    def weights(self) -> dict[str, SparseWeights]:
        """The layers' sparse weights, by name."""
        found = {}
        for number, (name, (shape, groups)) in enumerate(self.shapes.items()):
            values, columns, rows, bias = (
                getattr(self, f"layer{number}_{part}").detach().contiguous() for part in ("values", "columns", "rows", "bias")
            )
            found[name] = SparseWeights(values, columns, rows, bias, shape, groups)
        return found

    def extra_repr(self) -> str:
        """The layers and their densities."""
        return ", ".join(f"{name}: {found.density:.1%}" for name, found in self.weights.items())

    def refuse(self, tensors: Sequence[Tensor]) -> None:
        """Refuses what would not compute what the model does in eval mode. Raises InvalidInput."""
        if self.training:
            raise InvalidInput("an accelerated model runs in eval mode only: call .eval(), or train the model that it was made from")
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*tensors, *self._parameters.values())):
            raise InvalidInput(
                "an accelerated model has no gradients: run it under torch.no_grad() or torch.inference_mode(), leave it frozen, or take "
                "gradients of the model that it was made from"
            )
        for tensor in tensors:
            if tensor.device.type != "cpu" or tensor.dtype != torch.float32:
                raise InvalidInput(
                    f"an accelerated model runs on float32 tensors on the CPU, found {tensor.dtype} on {tensor.device}; move the input, or "
                    "use the model that it was made from"
                )

    def refuse_broken(self) -> None:
        """Refuses weights that were moved or converted, and places outside the layer: native code reads there. Raises InvalidInput."""
        for tensor, dtype in (*((x, torch.float32) for x in self.parameters()), *((x, torch.int32) for x in self.buffers())):
            if tensor.device.type != "cpu" or tensor.dtype != dtype:
                raise InvalidInput(
                    f"an accelerated model stays float32 on the CPU, found weights of {tensor.dtype} on {tensor.device}; convert or move "
                    "the model first, then accelerate it"
                )

        for name, found in self.weights.items():
            rows, columns = found.rows.long(), found.columns
            ordered = len(rows) == found.shape[0] + 1 and int(rows[0]) == 0 and int(rows[-1]) == len(columns) == len(found.values)
            inside = not len(columns) or (int(columns.min()) >= 0 and int(columns.max()) < math.prod(found.shape[1:]))
            if not (ordered and inside and bool((rows.diff() >= 0).all()) and len(found.bias) == found.shape[0]):
                raise InvalidInput(
                    f"an accelerated model's layer {name} holds rows and columns that are not those of {found.shape} weights; load a "
                    "state_dict of this very model, all of it"
                )

    def _forget(self) -> None:
        """Drops what depends on where weights lie and which they are."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> SparseModule:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._forget()
        return self

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        self._forget()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._forget()
