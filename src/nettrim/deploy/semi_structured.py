"""Linear layers with 2:4 zeros on a GPU whose tensor cores skip them (PyTorch's semi-structured sparse tensors)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import Replica
from ..status import first_line
from .sparse_candidates import SEARCHED, Candidate, Found, inputs_seen, layers_of
from .timing import side_by_side


def search(twin: Replica, example: Any, budget: float) -> Found:
    """The dense model, and the one in which every Linear with 2:4 zeros that is faster so runs semi-structured."""
    found = Found({"dense": Candidate(twin.model, {})}, notes=["on CUDA only Linear layers with 2:4 zeros are tried"])
    replaced = copy.deepcopy(twin.model)
    seen = inputs_seen(twin, example, layers_of(twin.model))
    for name, layer in layers_of(twin.model).items():
        reason = unable(layer, twin.device)
        if not reason and name not in seen:
            reason = "the model did not call it"
        if not reason:
            assert isinstance(layer, nn.Linear)
            try:
                _compress(replaced.get_submodule(name), layer.weight.detach(), seen[name])
            except (RuntimeError, NotImplementedError, ValueError) as error:
                reason = f"a device without the kernel, or a size it does not take: {first_line(error)}"
        if reason:
            found.unable[name] = reason
            continue
        compared = {"dense": layer, "semi-structured": replaced.get_submodule(name)}
        taken = side_by_side({kind: _finished(module, seen[name]) for kind, module in compared.items()}, budget, SEARCHED)
        found.seconds[name] = {kind: passes.median for kind, passes in taken.items()}
    wins = [name for name, seconds in found.seconds.items() if seconds["semi-structured"] < seconds["dense"]]
    if wins:
        made = copy.deepcopy(twin.model)
        for name in wins:
            made.get_submodule(name).weight = replaced.get_submodule(name).weight
        found.candidates["2:4 where faster alone"] = Candidate(made, dict.fromkeys(wins, "semi-structured"))
    return found


def _compress(layer: nn.Module, weight: Tensor, x: Tensor) -> None:
    """Gives a Linear its weight (M, N) in semi-structured form, and one pass: what the kernel does not take shows there."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that these tensors are a prototype
        layer.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(weight), requires_grad=False)
        _finished(layer, x)()


def _finished(module: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        module(x)
        torch.cuda.synchronize(x.device)

    return run


def unable(layer: nn.Module, device: torch.device) -> str:
    """Why a layer has no semi-structured product; empty when it may have one."""
    if type(layer) is not nn.Linear:
        return f"{type(layer).__name__} has no semi-structured kernel"
    if device.type != "cuda":
        return f"{device} is a device without the kernel"
    if layer.weight.dtype not in (torch.float16, torch.bfloat16):
        return f"its weights are {layer.weight.dtype}, the kernel takes float16 or bfloat16"
    if layer.in_features % 4 or bool(((layer.weight.detach() != 0).view(-1, 4).sum(1) > 2).any()):
        return "its weights are not 2:4 sparse"
    return ""
