"""Fine-tuning a pruned model in any training loop: its zeros stay zero and, where asked for, all but its pruned layers stays still."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .attention import layers_of, opened
from .graph import read
from .layers import is_prunable
from .pruning import PruneResult
from .status import InvalidInput
from .trained import own_keys, state_key, zeroed_layers
from .wrappers import unwrapped


class _Kept:
    """Entries of one parameter that stay as they are: zero, or with ``values``, what those hold."""

    def __init__(self, parameter: nn.Parameter, still: Tensor, values: Tensor | None = None) -> None:
        self.parameter, self.still, self.values = parameter, still, values

    def apply(self) -> None:
        """Puts them back."""
        self.still = self.still.to(self.parameter.device)
        with torch.no_grad():
            if self.values is None:
                self.parameter.masked_fill_(self.still, 0)
            else:
                self.values = self.values.to(self.parameter)
                self.parameter.copy_(torch.where(self.still, self.values, self.parameter))

    def silence(self, gradient: Tensor) -> Tensor:
        """The gradient without their part, so that clipping, momentum and line searches see what can move."""
        return gradient.masked_fill(self.still.to(gradient.device), 0)


class ZeroKeeper:
    """Puts the zeros back after every step of an optimizer; see :func:`keep_zeros`."""

    def __init__(self, kept: Sequence[_Kept], optimizer: torch.optim.Optimizer) -> None:
        self._kept = kept
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.apply()

    def apply(self) -> None:
        """Sets every kept zero to zero now."""
        for kept in self._kept:
            kept.apply()

    def remove(self) -> None:
        """Stops keeping zeros."""
        self._handle.remove()

    def __enter__(self) -> ZeroKeeper:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


class _Still:
    """Stands in for the ``train`` method of a module that stays in eval mode; copies of the module have the method itself."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        module.training = False

    def __call__(self, mode: bool = True) -> nn.Module:
        for child in self.module.children():
            child.train(mode)
        return self.module

    def __reduce__(self) -> Any:
        return getattr, (self.module, "train")


class FineTuning:
    """A pruned model while it is fine-tuned; see :func:`finetuning`.

    ``model`` is what is trained, ``learned`` names the parameters that can change. It ends with :meth:`finish`, or with its ``with`` block.
    """

    def __init__(self, model: nn.Module, learned: Mapping[str, nn.Parameter], kept: Sequence[_Kept]) -> None:
        self.model, self.learned = model, tuple(learned)
        self._flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._modes = [(module, module.training) for module in model.modules()]
        self._norms = [module for module in model.modules() if getattr(module, "running_mean", None) is not None]
        able = {id(parameter) for parameter in learned.values()}
        self._learned, self._kept = dict(learned), [one for one in kept if id(one.parameter) in able]
        self._held = {id(one.parameter) for one in self._kept}
        for parameter, _ in self._flags:
            if id(parameter) not in able:
                parameter.requires_grad_(False)
                parameter.grad = None  # an optimizer would take a step with an old one
        for module in self._norms:
            module.train = _Still(module)  # type: ignore[method-assign]
        # the tensors' own hooks, and one for all optimizers: copies that are made of the model meanwhile are plain models
        self._handles = [
            *(one.parameter.register_hook(one.silence) for one in self._kept),  # type: ignore[no-untyped-call]
            register_optimizer_step_post_hook(self._after_step),
        ]

    def parameters(self) -> list[nn.Parameter]:
        """What can change, for an optimizer."""
        return list(self._learned.values())

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The same with names, for groups of their own learning rate or weight decay."""
        return list(self._learned.items())

    def finish(self) -> None:
        """Ends it: every parameter's ``requires_grad`` and every module's mode (training or not) is again what it was."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            self._put_back()
            for parameter, flag in self._flags:
                parameter.requires_grad_(flag)
            for module in self._norms:
                del module.train
            for module, mode in self._modes:
                module.training = mode
        self._handles = []

    def _put_back(self) -> None:
        for one in self._kept:
            one.apply()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if any(id(parameter) in self._held for group in optimizer.param_groups for parameter in group["params"]):
            self._put_back()

    def __enter__(self) -> FineTuning:
        return self

    def __exit__(self, *exception: object) -> None:
        self.finish()


def finetuning(
    pruned: PruneResult | nn.Module, reference: nn.Module | None = None, *, learn: Literal["pruned", "all"] = "pruned"
) -> FineTuning:
    """Makes a pruned model ready for a training loop of your own, with labels and any optimizer of torch::

        with nettrim.finetuning(result) as tuning:
            optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-3)
            for x, y in loader:
                optimizer.zero_grad()
                loss(tuning.model(x), y).backward()
                optimizer.step()

    Until it is finished, every zero of the pruned layers stays zero through all steps, whatever the optimizer's momentum or weight decay;
    parameters that are not to be learned have ``requires_grad=False``; and normalisation layers compute with their running statistics,
    which stay as they are, also after ``model.train()``. Dropout is active in that mode, as always. Afterwards every flag is as it was
    before.

    :func:`nettrim.recertify` makes the certificate of what came out.

    Args:
        pruned: what :func:`nettrim.prune` returned; a copy of its model is trained (``.model``), so that the result stays what its
            certificate says. Or a pruned model, which is trained itself.
        reference: with a pruned model, the network it was pruned from: its layers that hold zeros of their own then do not count as pruned.
        learn: ``"pruned"``: weights and biases of the pruned layers, and the bias of a batch-norm behind one without bias, which holds its
            offset. ``"all"``: every parameter. Frozen parameters (``requires_grad=False``) stay frozen.

    Raises:
        InvalidInput: nothing in the model is pruned, or all of it is frozen.
    """
    if learn not in ("pruned", "all"):
        raise InvalidInput(f"finetuning: learn must be 'pruned' or 'all', found {learn!r}")
    if isinstance(pruned, PruneResult):
        if reference is not None:
            raise InvalidInput("finetuning: a result says itself which layers were pruned; leave reference out")
        model = copy.deepcopy(pruned.model)
        names = [layer.name for layer in pruned.report.layers]
        norms = {layer.name: layer.norm for layer in pruned.report.layers}
    elif isinstance(pruned, nn.Module):
        model, source = pruned, opened(unwrapped(pruned, "finetuning: pruned"))
        dense = None if reference is None else opened(unwrapped(reference, "finetuning: reference"))
        names = zeroed_layers(source, dense, "finetuning")
        norms = _norms(source, names)
    else:
        raise InvalidInput(f"finetuning: it needs what nettrim.prune returned, or a pruned model; found {type(pruned).__name__}")
    bare = unwrapped(model)  # whose tensors are the model's own
    return FineTuning(model, learnable(bare, names, norms, learn, "finetuning"), _kept_of(bare, names, learn))


def _norms(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """The batch-norm behind each layer, as far as the graph shows it without data."""
    if all(model.get_submodule(name).bias is not None for name in names):
        return {}
    return {name: reading.norm for name, reading in read(copy.deepcopy(model).eval(), names).readings.items()}


def learnable(model: nn.Module, names: Sequence[str], norms: Mapping[str, str], learn: str, what: str) -> dict[str, nn.Parameter]:
    """The parameters that fine-tuning may change, by name; ``names`` are the pruned layers, ``norms`` the batch-norm behind each.

    Raises:
        InvalidInput: all weights of the pruned layers are frozen; ``what`` is the function that says so.
    """
    own = own_keys(names, norms, dict(opened(model).named_modules()))
    weights = {state_key(name, "weight") for name in names}
    able: dict[int, bool] = {}  # whether a parameter is one of the pruned layers' weights
    for parameter, parts in _parameters(model):
        if parameter.requires_grad and (learn == "all" or own.intersection(parts)):
            able[id(parameter)] = able.get(id(parameter), False) or bool(weights.intersection(parts))
    if not any(able.values()):
        raise InvalidInput(
            f"{what}: all weights of the pruned layers ({', '.join(names[:6])}) are frozen (requires_grad=False), so nothing can learn; "
            "call requires_grad_(True) on a copy of the model"
        )
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in able}


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Parameter, list[str]]]:
    """Every module's own parameters, each with the keys that its parts have once attention is opened (:func:`nettrim.attention.opened`)."""
    for name, module in model.named_modules():
        for label, parameter in module._parameters.items():
            if parameter is not None:
                layers = layers_of(name, module, label)
                part = label if layers == [name] else "weight" if label.endswith("weight") else "bias"
                yield parameter, [state_key(layer, part) for layer in layers]


def _kept_of(model: nn.Module, names: Collection[str], learn: str) -> list[_Kept]:
    """What stays of the pruned layers' parameters: their zeros; and other layers' parts of a parameter, where those do not learn."""
    weights = {state_key(name, "weight") for name in names}
    own = weights | {state_key(name, "bias") for name in names}
    found = []
    for parameter, parts in _parameters(model):
        if not own.intersection(parts):
            continue
        still = torch.zeros_like(parameter, dtype=torch.bool)
        held = False
        for rows, values, part in zip(still.chunk(len(parts)), parameter.detach().chunk(len(parts)), parts, strict=True):
            if part in weights:
                rows.copy_(values == 0)
            elif part not in own and learn == "pruned":
                rows.fill_(True)
                held = True
        if bool(still.any()):
            found.append(_Kept(parameter, still, parameter.detach().clone() if held else None))
    return found


def keep_zeros(model: nn.Module, optimizer: torch.optim.Optimizer) -> ZeroKeeper:
    """Keeps every weight that is zero now at zero through all later steps of ``optimizer``, whatever its momentum or weight decay.

    Nothing is added to the model: parameters, state_dict keys and file size stay as they are. The keeper can be used as a context
    manager, or stopped with ``remove()``. :func:`finetuning` also keeps all else still.

    Raises:
        InvalidInput: the model has no zero weight, or the optimizer holds none of its weights (an optimizer made for another model).
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    kept = []
    for module in model.modules():
        for label in _weights_of(module):
            weight = module._parameters.get(label)
            if weight is not None and bool((zeros := weight.detach() == 0).any()):
                kept.append(_Kept(weight, zeros))
    if not kept:
        raise InvalidInput("keep_zeros: the model has no zero weights; prune it first")
    if not any(id(one.parameter) in held for one in kept):
        raise InvalidInput(
            "keep_zeros: the optimizer holds none of this model's pruned weights; make it from the pruned model's parameters"
        )
    return ZeroKeeper(kept, optimizer)


def _weights_of(module: nn.Module) -> tuple[str, ...]:
    """The parameters of a module that pruning makes zeros in."""
    if isinstance(module, nn.MultiheadAttention):
        return ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    return ("weight",) if is_prunable(module) else ()
