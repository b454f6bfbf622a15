"""Removes what has become dead, exactly: the function stays, the network gets smaller."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..calibration import check_batch, inputs_of, keywords_of
from ..capture import Replica, device_of, random_state_kept, replicate
from ..diagnosis import must_run
from ..graph import read
from ..layers import without_values
from ..outputs import Outputs, largest_difference, outputs_of
from ..status import InvalidInput, NetTrimError, first_line
from ..wrappers import check_module, takes_models
from . import constants
from .channels import Flow
from .constants import Layer, Norm
from .follow import follow
from .removal import Dependencies, library
from .staying import Step, staying

EXACT = 1e-5
"""By how much the outputs may differ, relative to the largest; more only where the dtype itself is coarser."""


@dataclass(frozen=True)
class Shrunk:
    """What a layer lost: outputs (neurons, channels), inputs and parameters, before and after."""

    name: str
    outputs: tuple[int, int]
    inputs: tuple[int, int]
    parameters: tuple[int, int]

    @property
    def removed(self) -> int:
        """Outputs that vanished."""
        return self.outputs[0] - self.outputs[1]


@dataclass(frozen=True, eq=False)
class Compacted:
    """What :func:`compact` made. ``parameters`` of the whole model, before and after; ``notes`` say what stayed although it was dead."""

    model: nn.Module
    layers: tuple[Shrunk, ...]
    parameters: tuple[int, int]
    difference: float
    passes: int
    notes: tuple[str, ...]

    @property
    def removed(self) -> int:
        """Neurons and channels that vanished, of all layers."""
        return sum(layer.removed for layer in self.layers)

    @property
    def ratio(self) -> float:
        """How many times fewer parameters."""
        return self.parameters[0] / self.parameters[1]

    def __str__(self) -> str:
        from ..render.deploy_words import compacted_text  # presentation stays in render

        return compacted_text(self)

    __repr__ = __str__


@takes_models("model")
def compact(model: nn.Module, example: Any, *, device: torch.device | str | None = None) -> Compacted:
    """A copy of ``model`` without its dead neurons and channels; in eval mode it computes the same, to 1e-5 of the largest output.

    Removed are neurons that nothing reads (all outgoing weights are zero) and neurons that always put out one value (all incoming
    weights are zero): that value goes into the bias of the layers behind, or into the mean of a batch-norm behind. Where a convolution
    pads with zeros, or has neither bias nor batch-norm behind it, a constant cannot be folded; all such constants of a layer are then
    carried by one neuron. This is repeated until nothing more vanishes. Removal goes through flattening, pooling, batch-norm,
    concatenation, additions and depthwise convolutions; whatever else reads a channel keeps it. Every layer keeps at least one neuron.

    The model's class and the names in its state_dict stay, and so do its train or eval mode and what is frozen.

    Args:
        example: a batch on which the model runs: a tensor, a tuple whose first item is the input, or a mapping of keyword inputs.
        device: where the work is done; by default where the model is.

    Raises:
        InvalidInput: the model cannot be copied, run or traced, or holds NaN or inf.
        MissingExtra: torch-pruning is not installed.
    """
    library()
    check(model, example, "compact")
    place = device_of(model, device)
    with random_state_kept(place):
        twin = replicate(model, place, None)
        reference = outputs(twin, example, "compact")
        before = _sizes(twin.model)
        passes = 0
        while (step := _step(twin, example)).gone:
            _remove(step, twin, example)
            passes += 1
        difference = largest_difference(reference, outputs(twin, example, "compact"))
    _refuse_changed(twin.model, difference)
    after = _sizes(twin.model)
    home = next((parameter.device for parameter in model.parameters()), place)
    made = twin.model.to(home)
    for name, module in model.named_modules():
        made.get_submodule(name).training = module.training
    layers = tuple(Shrunk(name, *zip(old, after[name], strict=True)) for name, old in before.items())
    return Compacted(made, layers, (_count(model), _count(made)), difference, passes, (*staying(step), *reference.notes))


def check_example(example: Any, what: str) -> None:
    """Refuses what is not one batch."""
    several = isinstance(example, (tuple, list)) and len(example) > 0 and isinstance(example[0], (tuple, list))
    if several and isinstance(inputs_of(example[0]), (Tensor, Mapping)):
        raise InvalidInput(f"{what}: example is one batch, found a {type(example).__name__} of them; give the first of it, data[0]")
    if isinstance(example, (DataLoader, Iterable)) and not isinstance(example, (Tensor, tuple, list, Mapping, str, bytes, np.ndarray)):
        raise InvalidInput(f"{what}: example is one batch, found a {type(example).__name__}; give the first of it, next(iter(data))")
    check_batch(example, 1, f"{what}: example")


def check(model: object, example: Any, what: str) -> None:
    """Refuses what is not a model with finite values, and an example that is none."""
    check_module(model, f"{what}: model")
    assert isinstance(model, nn.Module)
    check_example(example, what)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if without_values(tensor):
            raise InvalidInput(f"{what}: {name} holds no values yet (a lazy module, or the meta device); run or load the model first")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InvalidInput(f"{what}: {name} holds NaN or inf; repair or prune it again")


def outputs(twin: Replica, example: Any, what: str) -> Outputs:
    """The network's outputs on the example. Raises InvalidInput."""
    with must_run(twin.model, twin.run, example, f"{what}: the model cannot run on the example"):
        return outputs_of(twin.run(example))


def channel_flow(twin: Replica, example: Any, what: str) -> Flow:
    """Where the channels go. Raises InvalidInput where the model's graph cannot be traced."""
    inputs = inputs_of(example)

    def agrees(module: nn.Module) -> bool:
        traced = Replica(module, twin.device, twin.dtype)
        return largest_difference(outputs(twin, example, what), outputs(traced, example, what)) <= allowed_difference(twin.model)

    graph = read(twin.model, (), given=keywords_of(example), agrees=agrees)
    if graph.traced is None:
        raise InvalidInput(
            f"{what}: {graph.notice.removesuffix(': matched linearly')}; channels can be removed only where torch.fx shows who reads them: "
            "take data-dependent branches out of forward, or wrap what is not traced in a module of its own"
        )
    moved = tuple(inputs.values()) if isinstance(inputs, Mapping) else (inputs,)
    placed = [value.to(twin.device) if isinstance(value, Tensor) else value for value in moved]
    return follow(twin.model, graph.traced, dict(zip(inputs, placed, strict=True)) if isinstance(inputs, Mapping) else placed[0])


def _step(twin: Replica, example: Any) -> Step:
    """What can go now."""
    flow = channel_flow(twin, example, "compact")
    modules = dict(twin.model.named_modules())
    dead, carriers, read = _dead(flow, modules)
    if not dead:
        return Step(flow, modules, dead, set(), carriers, {}, read, None)
    dependencies = Dependencies(twin.model, example, twin.device)
    agreed, others = dependencies.agreed(flow, dead)
    why = dependencies.failure or "torch-pruning and the traced graph do not agree on what goes with them"
    return Step(flow, modules, dead, _leave_one(flow, agreed), carriers, dict.fromkeys(others, why), read, dependencies)


def _remove(step: Step, twin: Replica, example: Any) -> None:
    """Takes out what can go, its constants folded into what stays. Raises NetTrimError where what is left does not run."""
    flow = step.flow
    removed = flow.places(step.gone)
    for name, values in flow.inputs.items():
        layer = cast(Layer, step.modules[name])
        lost = torch.zeros(len(values), dtype=torch.bool)
        lost[removed.get((name, "in"), [])] = True
        norm = cast(Norm, step.modules[flow.norms[name]]) if name in flow.norms else None
        able = constants.foldable(layer, values, layer.bias is not None or norm is not None)
        carrier = step.carriers.get(name)
        for i in torch.nonzero(lost & ~able).flatten().tolist():
            assert carrier is not None
            constants.merge(layer, i, carrier, float(values[i] / values[carrier]))
        constants.fold(layer, norm, values, lost & able)
    assert step.dependencies is not None
    try:
        step.dependencies.remove(removed)
        twin.run(example)
    except Exception as error:  # torch-pruning raises many kinds, and so does a forward that counts on sizes
        raise NetTrimError(
            f"compact: the model does not run without its dead channels ({type(error).__name__}: {first_line(error)}): nothing is made; "
            "take sizes that are written as numbers out of forward"
        ) from error


def _dead(flow: Flow, modules: Mapping[str, nn.Module]) -> tuple[set[int], dict[str, int], dict[int, str]]:
    """Classes that can go without changing the function; the input that carries the others' constants, by layer; classes that are read."""
    movable = torch.ones(flow.count, dtype=torch.bool)
    movable[list(flow.fixed)] = False
    folding: dict[str, Tensor] = {}  # inputs that can go by themselves
    needed: dict[int, str] = {}
    for name, values in flow.inputs.items():
        layer = cast(Layer, modules[name])
        folding[name] = constants.foldable(layer, values, layer.bias is not None or name in flow.norms)
        read = flow.ends[name, "in"][~folding[name] & values.isnan()]
        movable[read] = False
        needed |= dict.fromkeys(read.tolist(), name)
    carriers: dict[str, int] = {}
    # what is left are constants that cannot be folded: the largest of a layer stays and carries the others
    for name, values in flow.inputs.items():
        ids = flow.ends[name, "in"]
        hard = ~folding[name] & movable[ids]
        if not bool(hard.any()):
            continue
        carrier = int(torch.where(hard, values.abs(), 0.0).argmax())
        carriers[name] = carrier
        movable[ids[carrier]] = False
    return {int(c) for c in torch.nonzero(movable).flatten()}, carriers, needed


def _leave_one(flow: Flow, classes: set[int]) -> set[int]:
    """The classes but for one of every module that would be left without channels."""
    gone = torch.zeros(flow.count, dtype=torch.bool)
    gone[list(classes)] = True
    for ids in flow.ends.values():
        if bool(gone[ids].all()):
            gone[ids[0]] = False
    return {int(c) for c in torch.nonzero(gone).flatten()}


def _sizes(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Outputs, inputs and parameters of every Linear and convolution."""
    return {name: (*_width(cast(Layer, module)), _count(module)) for name, module in model.named_modules() if constants.is_layer(module)}


def _width(layer: Layer) -> tuple[int, int]:
    """Outputs and inputs."""
    return (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else (layer.out_channels, layer.in_channels)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def allowed_difference(model: nn.Module) -> float:
    """By how much the outputs of a copy may differ, relative to the largest: as much as the model's dtype makes plausible."""
    coarse = max((torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()), default=0.0)
    return max(EXACT, 50 * coarse if coarse > 1e-6 else 0.0)


def _refuse_changed(model: nn.Module, difference: float) -> None:
    if not difference <= allowed_difference(model):
        raise NetTrimError(
            f"compact: the smaller network's output differs by {difference:.2g} of the largest output, more than "
            f"{allowed_difference(model):.0e}: nothing is returned; please report the model's structure"
        )
