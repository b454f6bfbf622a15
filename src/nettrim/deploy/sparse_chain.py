"""Consecutive Linear layers on PyTorch's CSR product, activations kept features-first in between: what needs no compiler.

``W_csr @ x.T`` is several times faster than ``F.linear(x, W_csr)`` from a few samples on, because the product wants features-first inputs.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from ..status import InvalidInput
from .sparse_module import SparseModule
from .sparse_steps import FUNCTIONS, SparseWeights


def csr(weights: SparseWeights) -> Tensor:
    """The (outputs, inputs) matrix of a Linear layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls CSR tensors beta once a process
        return torch.sparse_csr_tensor(weights.rows, weights.columns, weights.values, size=weights.shape, device="cpu")


class SparseChain(SparseModule):
    """Runs ``steps`` (linear, sum, apply) with PyTorch's CSR product, on inputs (..., features)."""

    _matrices: dict[str, tuple[Tensor, Tensor]]

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The chain's outputs."""
        self.refuse(tensors)
        lead = tensors[0].shape[:-1]
        if any(tensor.shape[:-1] != lead for tensor in tensors) or not math.prod(lead):
            raise InvalidInput(
                f"accelerated layers: inputs must have the same leading sizes and hold samples, found {[tuple(t.shape) for t in tensors]}"
            )
        values = {number: tensor.reshape(-1, tensor.shape[-1]).t().contiguous() for number, tensor in enumerate(tensors)}
        matrices = self._csr()
        for step in self.steps:
            x = values[step.source]
            if step.kind == "apply":
                values[step.target] = FUNCTIONS[step.function](x, **dict(step.options))
                continue
            if step.kind == "linear":
                matrix, bias = matrices[step.layer]
                if len(x) != matrix.shape[1]:
                    raise InvalidInput(f"accelerated layer {step.layer}: takes {matrix.shape[1]} features, found {len(x)}")
                x = torch.addmm(bias, matrix, x)
            if step.added is not None:
                x = x + values[step.added]
            bounded = (step.low, step.high) != (-math.inf, math.inf)
            values[step.target] = x.clamp(step.low, step.high) if bounded else x
        results = [values[number].t().reshape(*lead, -1).contiguous() for number in self.outputs]
        return results[0] if len(results) == 1 else tuple(results)

    def _csr(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Matrix and bias (outputs, 1) by layer; made on first use from the buffers, whose memory the matrices share."""
        found = self._matrices
        if not found:
            self.refuse_broken()
            with torch.inference_mode(False):
                found = {name: (csr(weights), weights.bias[:, None]) for name, weights in self.weights.items()}
            self._matrices = found
        return found

    def _forget(self) -> None:
        self._matrices = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_matrices"}
