"""Removes channels for real, by the dependency graph of torch-pruning, which must agree with what the traced graph shows.

torch-pruning is optional (``pip install "nettrim[structured]"``) and imported on first use.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..calibration import forward
from ..outputs import outputs_of
from ..solvers.reference import MissingExtra
from ..status import first_line
from .channels import End, Flow


def library() -> ModuleType:
    """torch-pruning. Raises MissingExtra."""
    try:
        import torch_pruning
    except ImportError as error:
        raise MissingExtra('removing channels needs torch-pruning: pip install "nettrim[structured]"') from error
    return torch_pruning  # type: ignore[no-any-return]


class Dependencies:
    """torch-pruning's dependency graph of a model in eval mode; valid until something is removed."""

    def __init__(self, model: nn.Module, batch: Any, device: torch.device) -> None:
        self.modules = dict(model.named_modules())
        names = {id(module): name for name, module in self.modules.items()}
        self.names = names
        self.model = model
        self.failure = ""
        flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        try:
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.requires_grad_(True)  # torch-pruning reads the graph of the gradients
            with warnings.catch_warnings(), torch.enable_grad():
                warnings.simplefilter("ignore")  # about parameters of no layer: their channels are not removed
                self.graph = (
                    library()
                    .DependencyGraph()
                    .build_dependency(
                        model,
                        example_inputs=batch,
                        forward_fn=lambda module, data: forward(module, data, device, None),
                        output_transform=lambda output: list(outputs_of(output).scores.values()),
                    )
                )
        except Exception as error:  # it raises many kinds for graphs that it cannot read
            self.failure = f"torch-pruning cannot read the model's graph ({type(error).__name__}: {first_line(error)})"
        finally:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(flags[name])

    def places(self, name: str, channels: Iterable[int]) -> dict[End, list[int]] | None:
        """All that goes with some output channels of a layer; None where that is more than channels of modules."""
        module = self.modules[name]
        found: dict[End, set[int]] = {}
        if self.failure or module not in self.graph.module2node:
            return None
        pruner = self.graph.get_pruner_of_module(module)
        try:
            group = self.graph.get_pruning_group(module, pruner.prune_out_channels, idxs=sorted(channels))
        except Exception:  # as above
            return None
        for item in group:
            target = item.dep.target.module
            if isinstance(target, nn.PReLU) and target.num_parameters == 1:
                continue  # one slope for all channels
            if isinstance(target, nn.Parameter) or item.dep.target.type == library().ops.OPTYPE.OUTPUT:
                return None
            if id(target) in self.names:
                side = "in" if item.dep.handler.__name__ == "prune_in_channels" else "out"
                found.setdefault((self.names[id(target)], side), set()).update(item.idxs)
        return {end: sorted(places) for end, places in found.items()}

    def agreed(self, flow: Flow, classes: Iterable[int]) -> tuple[set[int], set[int]]:
        """Those of the classes whose places are the same here and in the traced graph, and the others."""
        groups: dict[str, set[int]] = {}
        waiting = set(classes)
        for (name, side), ids in flow.ends.items():
            if side == "out" and (name, "in") in flow.ends:  # a layer, not a batch-norm
                mine = waiting & set(ids.tolist())
                if mine:
                    groups[name] = mine
                    waiting -= mine
        good: set[int] = set()
        for name, group in groups.items():
            if self._agrees(flow, name, group):
                good |= group
            elif len(group) > 1:
                good |= {one for one in group if self._agrees(flow, name, {one})}
        return good, set(classes) - good

    def _agrees(self, flow: Flow, name: str, group: set[int]) -> bool:
        wanted = flow.places(group)
        return self.places(name, wanted[name, "out"]) == wanted

    def remove(self, places: dict[End, list[int]]) -> None:
        """Removes these channels, in place."""
        flags = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        with torch.no_grad():
            for (name, side), channels in places.items():
                module = self.modules[name]
                pruner = self.graph.get_pruner_of_module(module)
                (pruner.prune_in_channels if side == "in" else pruner.prune_out_channels)(module, channels)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(flags[name])
