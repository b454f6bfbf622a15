"""Which state of a network belongs to its pruned layers, and what else of it differs from the reference network's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .layers import is_prunable
from .status import InvalidInput


def state_key(module: str, label: str) -> str:
    """The state-dict key of a module's own entry."""
    return f"{module}.{label}" if module else label


def own_keys(names: Iterable[str], norms: Mapping[str, str], modules: Mapping[str, nn.Module]) -> set[str]:
    """State-dict keys of what the programs of the pruned layers choose.

    Their weights and biases; and where a layer has no bias, the bias of the batch-norm behind it, which holds its offset.
    ``norms`` names that batch-norm by layer; ``modules`` are the pruned network's.
    """
    found = set()
    for name in names:
        found |= {state_key(name, "weight"), state_key(name, "bias")}
        if norms.get(name) and modules[name].bias is None:
            found.add(state_key(norms[name], "bias"))
    return found


def differing(reference: nn.Module, other: nn.Module, own: set[str]) -> tuple[str, ...]:
    """Keys of the reference network's state that are not ``own`` and hold other values in the other network, in its order."""
    before, after = reference.state_dict(), other.state_dict()
    storages = {before[name].data_ptr() for name in own if name in before}  # a module that is registered twice has several keys
    return tuple(
        name
        for name, value in before.items()
        if name not in own and isinstance(value, Tensor) and value.data_ptr() not in storages and not _same(value, after[name])
    )


def _same(value: Tensor, other: object) -> bool:
    """Whether two entries hold the same values, wherever they are; NaN is the same as NaN."""
    if not isinstance(other, Tensor) or value.shape != other.shape or value.dtype != other.dtype:
        return False
    a, b = value.detach().cpu(), other.detach().cpu()
    return torch.equal(a, b) or (
        a.is_floating_point() and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
    )


def zeroed_layers(model: nn.Module, reference: nn.Module | None, what: str) -> list[str]:
    """Names of the layers that hold zeros and, with a reference network, other weights than it, which may hold zeros too.

    ``what`` is the function that asks, for messages.

    Raises:
        InvalidInput: there is none, or a parameter holds NaN or inf.
    """
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise InvalidInput(f"{what}: {name} of the pruned model holds NaN or inf; prune it again")
    found = [name for name, module in model.named_modules() if is_prunable(module) and bool((module.weight == 0).any())]
    if not found:
        raise InvalidInput(f"{what}: the pruned model has no zero weights; prune it first, or train it in the ordinary way")
    if reference is None:
        return found
    modules, theirs = dict(model.named_modules()), dict(reference.named_modules())
    changed = [name for name in found if not _same_weight(modules[name], theirs.get(name))]
    if not changed:
        raise InvalidInput(
            f"{what}: the layers that hold zeros ({', '.join(found[:6])}) are those of the reference network: nothing was pruned; "
            "give the network as it was before"
        )
    return changed


def _same_weight(layer: nn.Module, other: nn.Module | None) -> bool:
    weight, theirs = layer.weight, getattr(other, "weight", None)
    return isinstance(weight, Tensor) and isinstance(theirs, Tensor) and torch.equal(weight.cpu(), theirs.to("cpu", weight.dtype))
