"""Which layers of a model are pruned, and which are refused or left alone, with the reason."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import cast

from torch import nn

from .attention import layers_of
from .layers import KINDS, is_prunable, view, without_values
from .methods import Method
from .methods.targets import check_room
from .status import InvalidInput, NothingToPrune, UnknownLayer
from .trained import state_key


def select(model: nn.Module, layers: Sequence[str] | None, ignore: Sequence[str], given: nn.Module | None = None) -> list[str]:
    """Names of the layers to prune, in the model's order.

    ``given`` is the model that ``model`` was opened from (:mod:`nettrim.attention`): opening copies parameters, and with them what is tied.
    ``layers`` and ``ignore`` hold names of layers, names of modules that contain layers, or ``re:pattern`` (matched against whole names).

    Raises:
        UnknownLayer: a name or pattern that fits nothing; the message gives the nearest name.
        NothingToPrune: no layer is left.
        InvalidInput: a chosen layer cannot be pruned as it is (tied, wrapped, no values, NaN or inf).
    """
    modules = dict(model.named_modules())
    _refuse_without_values(model)
    prunable = [name for name, module in modules.items() if is_prunable(module)]
    if not prunable:
        raise NothingToPrune(f"the model ({type(model).__name__}) has no layer that nettrim can prune: {KINDS}")
    chosen = prunable
    if layers is not None:
        wanted = set(_matches(layers, prunable, modules, "layers", must_prune=True))
        chosen = [name for name in prunable if name in wanted]
    dropped = set(_matches(ignore, prunable, modules, "ignore", must_prune=False))
    chosen = [name for name in chosen if name not in dropped]
    if not chosen:
        raise NothingToPrune(f"every prunable layer was excluded ({', '.join(prunable[:8])}); loosen layers= or ignore=")
    _refuse_ties(model if given is None else given, chosen)
    for name in chosen:
        view(name, modules[name])
    return chosen


def resolve(given: Iterable[str], names: Sequence[str], what: str) -> None:
    """Refuses keys of a per-layer mapping that fit none of ``names``."""
    for key in given:
        if key.startswith("re:"):
            if not any(_pattern(key, what).fullmatch(name) for name in names):
                raise UnknownLayer(f"{what}: pattern {key!r} fits none of the layers {', '.join(names)}")
        elif key not in names:
            raise UnknownLayer(_unknown(key, names, what))


def check_targets(method: Method, names: Sequence[str], modules: Mapping[str, nn.Module]) -> None:
    """Refuses settings by layer that fit none of ``names``, and a sparsity that leaves a layer's pattern no room. Raises InvalidInput."""
    for setting, value in method.layer_settings.items():
        if isinstance(value, Mapping):
            resolve(value, names, f"{type(method).__name__}.{setting}")
    for name in names:
        if method.kind == "sparsity" and (asked := method.target(name)) is not None:
            layer = view(name, modules[name])
            check_room(type(method).__name__, method.chosen, asked, name, *layer.shape, layer.groups)


def _matches(given: Sequence[str], prunable: Sequence[str], modules: Mapping[str, nn.Module], what: str, *, must_prune: bool) -> list[str]:
    if isinstance(given, str):
        raise InvalidInput(f"{what} must be a list of layer names, found the string {given!r}; write [{given!r}]")
    found: list[str] = []
    for key in given:
        if key.startswith("re:"):
            pattern = _pattern(key, what)
            fits = [name for name in modules if name and pattern.fullmatch(name)]
        else:
            fits = [key] if key in (modules if key else prunable) else []  # a model may be the layer itself
        if not fits:
            raise UnknownLayer(_unknown(key, [name for name in (prunable if must_prune else modules) if name], what))
        below = [name for name in prunable if any(name == fit or name.startswith(fit + ".") for fit in fits)]
        if must_prune and not below:
            raise InvalidInput(f"{what}: {key!r} is a {type(modules[fits[0]]).__name__} and holds no layer that nettrim prunes: {KINDS}")
        found += below
    return found


def _pattern(key: str, what: str) -> re.Pattern[str]:
    try:
        return re.compile(key[3:])
    except re.error as error:
        raise InvalidInput(f"{what}: {key!r} is not a valid pattern: {error}") from error


def _unknown(key: str, names: Iterable[str], what: str) -> str:
    names = list(names)
    near = get_close_matches(key, names, n=1, cutoff=0.0)
    hint = f"the nearest is {near[0]!r}" if near else "the model has none"
    return f"{what}: no layer fits {key!r}; {hint} (layers: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''})"


def _refuse_without_values(model: nn.Module) -> None:
    """Lazy or meta tensors anywhere would get random values, or none, when the model is copied and run."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if without_values(tensor):
            raise InvalidInput(f"{name} holds no values yet (a lazy module, or the meta device); run or load the model before pruning it")


def refuse_shared_norms(model: nn.Module, holders: Mapping[str, str]) -> None:
    """Refuses layers whose offset goes into the bias of a batch-norm (``holders``: its name by layer's) that something else reads too.

    Raises:
        InvalidInput: names the layer and all owners of the parameter.
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for label, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(parameter.data_ptr() or id(parameter), []).append(state_key(name, label))
    for layer, norm in holders.items():
        bias = cast(nn.Parameter, model.get_submodule(norm).bias)
        shared = owners[bias.data_ptr() or id(bias)]
        if len(shared) > 1:
            raise InvalidInput(
                f"layer {layer!r} has no bias, so its offset goes into {norm}.bias, but {', '.join(map(repr, shared))} are one parameter: "
                f"pruning {layer!r} would change the others too; give each its own copy, or pass ignore=[{layer!r}]"
            )


def _refuse_ties(model: nn.Module, chosen: Sequence[str]) -> None:
    """A weight that two modules share cannot be pruned for one of them without changing the other."""
    owners: dict[int, list[tuple[str, list[str]]]] = {}  # of each parameter: the module, and the layers that it is of
    for name, module in model.named_modules():
        for label, parameter in module._parameters.items():
            if parameter is not None:
                layers = layers_of(name, module, label)
                owners.setdefault(parameter.data_ptr() or id(parameter), []).append((name, layers))
    for found in owners.values():
        tied = [layer for _, layers in found for layer in layers if layer in chosen]
        if len(found) > 1 and tied:
            names = dict.fromkeys(name for name, _ in found)
            who = ", ".join(repr(name) if name else "the model itself" for name in names) if len(names) > 1 else ", ".join(map(repr, tied))
            raise InvalidInput(
                f"{who} share one parameter: pruning {tied[0]!r} would "
                f"change the others too; untie them (give each its own copy) or pass ignore={tied!r}"
            )
