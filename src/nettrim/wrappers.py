"""Modules that only wrap another one (``torch.compile``, ``nn.DataParallel``): the inner one is worked on, results come back wrapped."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import fx, nn

from .layers import without_values
from .status import InvalidInput

Given = ParamSpec("Given")
R = TypeVar("R")

INNER = {"OptimizedModule": "_orig_mod", "DataParallel": "module"}
"""Wrappers by the name of their class, and where each keeps its module."""
PREFIXES = ("_orig_mod.", "module.")
"""What they put before the names in a state dict (``module.`` is also that of distributed training)."""
TOGETHER = ("DistributedDataParallel", "FullyShardedDataParallel")


def takes_models(
    *names: str, first: Callable[[Mapping[str, Any]], None] | None = None
) -> Callable[[Callable[Given, R]], Callable[Given, R]]:
    """For a function whose arguments ``names`` are models: each is checked and unwrapped, and the model that comes back, if one does (the
    result itself, or its field ``model``), is wrapped as the first of them was. Gradients can be taken inside, whatever mode the caller is
    in. ``first`` sees the arguments by name before all that."""

    def decorate(function: Callable[Given, R]) -> Callable[Given, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def with_bare_models(*args: Given.args, **kwargs: Given.kwargs) -> R:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{function.__name__}() {error}") from None
            if first is not None:
                first(bound.arguments)
            like = bound.arguments.get(names[0])
            for name in names:
                if name in bound.arguments and (bound.arguments[name] is not None or signature.parameters[name].default is not None):
                    bound.arguments[name] = unwrapped(bound.arguments[name], f"{function.__name__}: {name}")
            with torch.inference_mode(False), torch.enable_grad():
                for name in names:
                    if isinstance(model := bound.arguments.get(name), nn.Module):
                        bound.arguments[name] = _for_gradients(model)
                return _with_wrapper(function(*bound.args, **bound.kwargs), like)

        return with_bare_models

    return decorate


def unwrapped(model: Any, what: str = "model") -> nn.Module:
    """The module itself: without the wrappers around it, and around modules inside it. It shares its tensors with ``model``.

    Raises:
        InvalidInput: no module, or one of a kind that cannot be pruned; the message begins with ``what``.
    """
    check_module(model, what)
    inner = _innermost(model)
    inside = [module for _, module in _wrappers(inner)]
    if not inside:
        return inner
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*inner.parameters(), *inner.buffers())}
    for module in inside:
        memo[id(module)] = unwrapped(module, what)
    return copy.deepcopy(inner, memo)


def bare_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of ``model`` themselves, by their names without wrappers."""
    found: dict[str, nn.Module] = {}

    def add(name: str, module: nn.Module) -> None:
        found[name] = module = _innermost(module)
        for label, child in module._modules.items():
            if child is not None:
                add(f"{name}.{label}" if name else label, child)

    add("", model)
    return found


def wrapped_as(result: nn.Module, like: nn.Module) -> nn.Module:
    """A bare module, changed where wrappers stood inside ``like``, within new wrappers of the kinds and settings of those of ``like``."""
    inner = _innermost(like)
    if not isinstance(result, fx.GraphModule):  # one that was made from a graph calls parts of its modules by their names
        for path, wrapper in _wrappers(inner):
            parent, _, last = path.rpartition(".")
            place = result.get_submodule(parent)
            place._modules[last] = wrapped_as(cast(nn.Module, place._modules[last]), wrapper)
    return result if inner is like else copy.deepcopy(like, {id(inner): result})


def check_module(model: Any, what: str) -> None:
    """Refuses what is no module with layers of its own, and says what to give instead."""
    kind = type(model).__name__
    if isinstance(model, type):
        raise InvalidInput(f"{what} must be an nn.Module, found the class {model.__name__}; make one: {model.__name__}(...)")
    if not isinstance(model, nn.Module):
        remedy = ""
        if isinstance(model, Mapping):
            remedy = "; if it is a state dict, load it into the model: model.load_state_dict(...)"
        elif isinstance(model, (str, Path)):
            remedy = "; make the model, and load its weights into it: model.load_state_dict(torch.load(path, weights_only=True))"
        elif isinstance(getattr(model, "model", None), nn.Module):
            remedy = "; give the network in it, its .model"
        elif kind == "ExportedProgram":
            remedy = "; give the module that it was exported from, or its .pt2 file on the command line"
        raise InvalidInput(f"{what} must be an nn.Module, found {kind}{remedy}")
    if isinstance(model, torch.jit.ScriptModule):
        raise InvalidInput(
            f"{what} is a TorchScript program ({kind}), whose layers cannot be read or replaced; give the nn.Module that it was made from "
            "and load these weights into it (their names are the same), or a .pt2 program of torch.export on the command line"
        )
    together = next((name for name in _kinds(model) if name in TOGETHER), "")
    if together:
        raise InvalidInput(
            f"{what} is a {together}, which holds a model for several processes; give its .module in one process, and wrap the result again"
        )


def without_prefix(state: Mapping[str, torch.Tensor], wanted: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], str]:
    """A state dict whose names are the ``wanted`` ones but for what a wrapper put before them, without that; and what was taken off."""
    found, taken = dict(state), ""
    while not set(found) & set(wanted):
        prefix = next((each for each in PREFIXES if found and all(name.startswith(each) for name in found)), None)
        if prefix is None:
            break
        found, taken = {name.removeprefix(prefix): value for name, value in found.items()}, taken + prefix
    return (found, taken) if taken and set(found) & set(wanted) else (dict(state), "")


def _for_gradients(model: nn.Module) -> nn.Module:
    """The model, or a copy of one that was made in inference mode, whose tensors know no gradients."""
    if any(not without_values(tensor) and tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        return copy.deepcopy(model)
    return model


def _kinds(model: nn.Module) -> list[str]:
    return [kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("torch.")]


def _inner(model: nn.Module) -> nn.Module | None:
    """The module that a wrapper holds; ``None`` for one that is no wrapper."""
    place = next((INNER[kind] for kind in _kinds(model) if kind in INNER), None)
    return None if place is None else cast(nn.Module, model._modules[place])


def _innermost(model: nn.Module) -> nn.Module:
    while (inner := _inner(model)) is not None:
        model = inner
    return model


def _wrappers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost wrappers inside a module that is none itself, by name."""
    for name, module in model._modules.items():
        if module is None:
            continue
        if _inner(module) is not None:
            yield name, module
        else:
            yield from ((f"{name}.{path}", wrapper) for path, wrapper in _wrappers(module))


def _with_wrapper(result: R, like: Any) -> R:
    if not isinstance(like, nn.Module):
        return result
    if isinstance(result, nn.Module):
        return cast(R, wrapped_as(result, like))
    made = getattr(result, "model", None)
    if not is_dataclass(result) or not isinstance(made, nn.Module):
        return result
    whole = wrapped_as(made, like)
    return result if whole is made else replace(cast(Any, result), model=whole)
