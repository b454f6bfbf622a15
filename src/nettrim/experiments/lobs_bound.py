"""The accumulated error of a network pruned layer by layer at the reference network's inputs (docs/lobs.md, 4)."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers import LayerView, is_prunable
from ..status import InvalidInput

_BATCH = 250


@dataclass(frozen=True)
class Accumulated:
    """All in units of one sample: norms over ``n`` samples divided by ``sqrt(n)``.

    ``errors`` are the layers' ``sqrt(E_k)``, of pre-activations at reference inputs; ``factors`` what a discrepancy of a layer's input can
    grow to in its pre-activation, by the Frobenius norm; ``bound`` the theorem's right side for the output, ``achieved`` its left side,
    ``reference`` the root mean square norm of the reference outputs.
    """

    errors: tuple[float, ...]
    factors: tuple[float, ...]
    bound: float
    achieved: float
    reference: float

    @property
    def holds(self) -> bool:
        """Whether the bound covers what was achieved (up to float64 rounding)."""
        return self.achieved <= self.bound * (1 + 1e-9) + 1e-9 * self.reference


def accumulate(errors: tuple[float, ...], factors: tuple[float, ...]) -> float:
    """``sum_k errors_k prod_(l > k) factors_l``: (4.1) of docs/lobs.md."""
    total = 0.0
    for error, factor in zip(errors, factors, strict=True):
        total = total * factor + error
    return total


def accumulated(reference: nn.Sequential, pruned: nn.Sequential, images: Tensor) -> Accumulated:
    """Measures the layers' errors on ``images`` (n, C, H, W) in float64, and what they add up to.

    Raises:
        InvalidInput: a module for which the bound is not proven: only layers, ReLU, flatten, and max-pooling over disjoint windows are.
    """
    before, after = (copy.deepcopy(model).double().eval() for model in (reference, pruned))
    for name, module in before.named_children():
        _check(name, module)
    layers = [name for name, module in before.named_children() if is_prunable(module)]
    squares = dict.fromkeys(layers, 0.0)
    gap = norm = 0.0
    with torch.no_grad():
        for batch in torch.split(images.double(), _BATCH):
            x, x_hat = batch, batch
            for (name, module), other in zip(before.named_children(), after.children(), strict=True):
                z = module(x)
                if name in squares:
                    squares[name] += float((other(x) - z).square().sum())
                x, x_hat = z, other(x_hat)
            gap += float((x_hat - x).square().sum())
            norm += float(x.square().sum())
    n = len(images)
    views = [LayerView(name, after.get_submodule(name)) for name in layers]
    errors = tuple(math.sqrt(squares[name] / n) for name in layers)
    factors = tuple(float(torch.linalg.matrix_norm(view.weights().detach())) * view.operator_factor() for view in views)
    return Accumulated(errors, factors, accumulate(errors, factors), math.sqrt(gap / n), math.sqrt(norm / n))


def _check(name: str, module: nn.Module) -> None:
    pooled = isinstance(module, nn.MaxPool2d) and module.kernel_size == module.stride and module.dilation == 1 and module.padding == 0
    if not (is_prunable(module) or pooled or isinstance(module, (nn.ReLU, nn.Flatten))):
        raise InvalidInput(
            f"accumulated error: module {name!r} must be a layer, ReLU, flatten or max-pooling over disjoint windows, "
            f"found {type(module).__name__}; the certificate's bound covers more"
        )
