"""Follows the channels of a network through its graph.

The traced graph is run once on an example. Beside every tensor goes, for each of its channels, a label and the constant it holds, if any.
Additions make two labels one; what is not understood holds the labels that reach it in place.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn

from ..calibration import inputs_of
from ..nodes import activation_of, hooked, keeps_places, label, passes, reads_shape
from . import constants
from .channels import Channels, End, Flow, NotUnderstood
from .constants import Layer, Norm
from .moves import argument, averaged, moved, pooled, resized

Node = fx.Node
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

OUTPUT = "they reach the network's output"
COMES = "they come from "
"""Why classes stay, where what is said of them depends on it."""


def arguments(module: fx.GraphModule, batch: Any) -> tuple[Any, ...]:
    """The inputs of a batch in the order of the graph's."""
    inputs = inputs_of(batch)
    signature = inspect.signature(module.forward)
    bound = signature.bind(**inputs) if isinstance(inputs, Mapping) else signature.bind(inputs)
    bound.apply_defaults()
    return bound.args


def follow(model: nn.Module, traced: fx.Graph, batch: Any) -> Flow:
    """The flow of the channels of ``model``, in eval mode, whose graph is ``traced``, on an example."""
    module = fx.GraphModule(model, traced)
    reader = _Reader(module)
    with torch.no_grad():
        reader.run(*arguments(module, batch))
    return reader.flow(module)


@dataclass(eq=False)
class _Labels:
    """Labels that were given out, those that are the same, and those that stay."""

    count: int = 0
    same: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    held: list[tuple[Tensor, str]] = field(default_factory=list)

    def new(self, count: int) -> Tensor:
        self.count += count
        return torch.arange(self.count - count, self.count)

    def classes(self) -> tuple[int, Tensor]:
        """The number of classes, and the class of every label."""
        first = np.concatenate([a.numpy() for a, _ in self.same] + [np.zeros(0, np.int64)])
        second = np.concatenate([b.numpy() for _, b in self.same] + [np.zeros(0, np.int64)])
        graph = coo_array((np.ones(len(first), np.int8), (first, second)), shape=(self.count, self.count))
        count, found = connected_components(graph, directed=False)
        return int(count), torch.from_numpy(found.astype(np.int64))


class _Reader(fx.Interpreter):
    """Runs the graph, and says beside every node what its channels are."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.modules = dict(module.named_modules())
        self.labels = _Labels()
        self.lost: dict[Node, str] = {}
        self.unknown: dict[tuple[Node, int], Channels] = {}
        self.outside: dict[str, str] = {}
        self.foreign: list[Tensor] = []
        self.states: dict[Node, Channels | None] = {}
        self.shapes: dict[Node, tuple[int, ...]] = {}
        self.ends: dict[End, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}
        self.norms: dict[str, str] = {}
        self.rectified: dict[str, tuple[int, Tensor]] = {}
        graph = module.graph
        self.calls = Counter(id(self.modules[str(node.target)]) for node in graph.nodes if node.op == "call_module")
        self.shared = _shared(module, graph)
        self.overwritten = _overwritten(graph, self.modules)

    def run_node(self, n: Node) -> Any:
        """The node's value; what its channels are is kept beside."""
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
        if n.op == "output":
            self._hold(n.all_input_nodes, OUTPUT)
            return value
        try:
            state = self._state(n, value)
        except NotUnderstood as error:
            state = None
            words = label(n, self.modules) + (f", {error}" if str(error) else "")
            self._hold(n.all_input_nodes, f"they are read by {words}")
            self.lost[n] = words
            if n.op == "call_module" and constants.is_layer(self.modules[str(n.target)]):
                self.outside[str(n.target)] = str(error)
        if state is None and n not in self.lost:
            before = [self.lost[source] for source in n.all_input_nodes if source in self.lost]
            self.lost |= {n: before[0]} if before else {}
        if state is not None and n in self.overwritten:
            self.labels.held.append((state.labels, "they are changed in place while something else reads them"))
            state = Channels(state.dim, state.labels, torch.full_like(state.values, torch.nan))
        self.states[n] = state
        return value

    def flow(self, module: fx.GraphModule) -> Flow:
        """What was found."""
        count, classes = self.labels.classes()
        held = sorted(self.labels.held, key=lambda pair: pair[1] != OUTPUT)  # of several reasons, one that says more
        fixed = {c: reason for labels, reason in held for c in set(classes[labels].tolist())}
        rectified = {name: (dim, classes[ids]) for name, (dim, ids) in self.rectified.items()}
        ends = {end: classes[ids] for end, ids in self.ends.items()}
        foreign = {c for labels in self.foreign for c in classes[labels].tolist()}
        return Flow(count, ends, self.inputs, self.norms, fixed, rectified, self.outside, foreign, module)

    def _hold(self, nodes: Iterable[Node], reason: str) -> None:
        for node in nodes:
            state = self.states.get(node)
            if state is not None:
                self.labels.held.append((state.labels, reason))

    def _state(self, node: Node, value: Any) -> Channels | None:
        if node.op in ("placeholder", "get_attr") or reads_shape(node):
            return None
        if not isinstance(value, Tensor):
            raise NotUnderstood
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            if constants.is_layer(module) or isinstance(module, (*NORMS, nn.PReLU)):
                return self._layer(node, str(node.target), module)
        if node.target in (torch.cat, torch.concat, torch.concatenate):
            return self._concatenated(node)
        tensors = [source for source in node.all_input_nodes if source in self.shapes]
        if node.target in _BINARY or (node.op == "call_method" and node.target in _BINARY_METHODS):
            return self._combined(node, tensors)
        if not tensors or tensors[0] is not node.args[0] or len(tensors) > 1:
            raise NotUnderstood
        state, before = self.states[tensors[0]], self.shapes[tensors[0]]
        if state is None:
            return None
        activation = activation_of(node, self.modules)
        if (activation is not None and activation.name != "softmax") or _is_elementwise(node, self.modules):
            if activation is not None and activation.name in ("relu", "relu6"):
                self.rectified[node.name] = (state.dim, state.labels)
            return Channels(state.dim, state.labels, _where_known(state.values, lambda values: _applied(node, self.modules, values)))
        if keeps_places(node, self.modules) and passes(node, self.modules):
            return state
        size = len(before)
        found = pooled(node, self.modules, state, size) or averaged(node, state, size) or resized(node, self.modules, state, size)
        return found or moved(node, self.modules, state, before, self.shapes[node])

    def _layer(self, node: Node, name: str, module: nn.Module) -> Channels:
        """Behind a layer, a batch-norm or a PReLU with parameters for each channel."""
        source = node.args[0] if node.args else None
        if not isinstance(source, Node) or len(node.all_input_nodes) != 1:
            raise NotUnderstood("which takes other inputs too")
        state, size = self.states.get(source), len(self.shapes[source])
        if self.calls[id(module)] > 1:
            raise NotUnderstood("which is called more than once")
        if name in self.shared:
            raise NotUnderstood("whose parameters are used elsewhere too")
        if hooked(module):
            raise NotUnderstood("which has hooks")
        if not constants.is_layer(module):
            return self._each(name, module, state)
        if type(module) not in LAYERS:
            raise NotUnderstood
        layer = cast(Layer, module)
        dim = size - 1 if isinstance(layer, nn.Linear) else 1
        if dim == 1 and size != layer.weight.ndim and not isinstance(layer, nn.Linear):
            raise NotUnderstood("called on a sample without batch dimension")
        if state is not None and state.dim != dim:
            raise NotUnderstood("which reads another dimension")
        if state is None:  # the network's input, or something whose channels are not known
            state = self._unlabelled(dim, self.shapes[source][dim], source)
        if constants.is_depthwise(layer):
            self.ends[name, "out"] = state.labels
            return Channels(dim, state.labels, constants.outputs(layer, state.values))
        if not isinstance(layer, nn.Linear) and layer.groups > 1:
            raise NotUnderstood("a convolution in groups")
        behind = [str(user.target) for user in node.users if user.op == "call_module"]
        if len(behind) == len(node.users) == 1 and dim == 1 and self._foldable(behind[0]):
            self.norms[name] = behind[0]
        self.ends[name, "in"], self.inputs[name] = state.labels, state.values
        own = self.ends[name, "out"] = self.labels.new(len(constants.by_output(layer)))
        return Channels(dim, own, constants.outputs(layer, state.values))

    def _each(self, name: str, module: nn.Module, state: Channels | None) -> Channels:
        """Behind a batch-norm or PReLU, which treats each channel by itself."""
        if state is None or state.dim != 1:
            raise NotUnderstood("which reads another dimension" if state is not None else "")
        if isinstance(module, nn.PReLU):
            slopes = module.weight.detach().double().cpu()
            if len(slopes) > 1:
                self.ends[name, "out"] = state.labels
            return Channels(1, state.labels, torch.where(state.values > 0, state.values, state.values * slopes))
        if module.training or not _is_still(module):
            raise NotUnderstood("which normalises by the batch")
        self.ends[name, "out"] = state.labels
        return Channels(1, state.labels, constants.normed(cast(Norm, module), state.values))

    def _foldable(self, name: str) -> bool:
        """Whether a module is a batch-norm of one layer, whose mean can take over constants."""
        module = self.modules[name]
        return _is_still(module) and not module.training and self.calls[id(module)] == 1 and name not in self.shared

    def _combined(self, node: Node, tensors: list[Node]) -> Channels | None:
        """Sums, differences and products, entry by entry."""
        if node.kwargs or len(node.args) != 2:
            raise NotUnderstood
        kind = _BINARY_METHODS[str(node.target)] if node.op == "call_method" else _BINARY[node.target]
        if all(self.states.get(term) is None for term in tensors):
            return None
        parts: list[Channels | float] = []
        for term in node.args:
            state = self.states.get(term) if isinstance(term, Node) else None
            if state is not None:
                parts.append(state)
            elif isinstance(term, (int, float)):
                parts.append(float(term))
            else:
                raise NotUnderstood("with a tensor whose channels are not followed")
        states = [part for part in parts if isinstance(part, Channels)]
        if len(states) == 2:
            sizes = [len(self.shapes[term]) for term in node.args if isinstance(term, Node)]
            if states[0].dim != states[1].dim or sizes[0] != sizes[1] or len(states[0].labels) != len(states[1].labels):
                raise NotUnderstood
            self.labels.same.append((states[0].labels, states[1].labels))
        first, second = (part.values if isinstance(part, Channels) else torch.tensor(part, dtype=torch.float64) for part in parts)
        values = kind(first, second)
        return Channels(states[0].dim, states[0].labels, values.where(values.isfinite(), torch.nan))

    def _concatenated(self, node: Node) -> Channels | None:
        pieces = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = argument(node, 1, "dim", 0)
        if not isinstance(pieces, (tuple, list)) or not isinstance(dim, int) or any(not isinstance(piece, Node) for piece in pieces):
            raise NotUnderstood
        nodes = [piece for piece in pieces if isinstance(piece, Node)]
        found = [state for piece in nodes if (state := self.states[piece]) is not None]
        if not found:
            return None
        dim %= len(self.shapes[nodes[0]])
        if any(state.dim != found[0].dim for state in found):
            raise NotUnderstood
        if dim == found[0].dim:
            states = [self.states[piece] or self._unlabelled(dim, self.shapes[piece][dim], piece) for piece in nodes]
            return Channels(dim, torch.cat([s.labels for s in states]), torch.cat([s.values for s in states]))
        if len(found) < len(nodes):
            raise NotUnderstood
        for state in found[1:]:
            self.labels.same.append((found[0].labels, state.labels))
        values = found[0].values
        for state in found[1:]:
            values = torch.where(values == state.values, values, torch.nan)
        return Channels(found[0].dim, found[0].labels, values)

    def _unlabelled(self, dim: int, count: int, source: Node) -> Channels:
        """Channels that stay, because they are not a layer's or where they come from cannot be followed."""
        if (source, dim) not in self.unknown:
            state = Channels(dim, self.labels.new(count), torch.full((count,), torch.nan, dtype=torch.float64))
            layers = all(user.op == "call_module" and constants.is_layer(self.modules[str(user.target)]) for user in source.users)
            self.labels.held.append((state.labels, COMES + self.lost.get(source, "the network's input")))
            self.unknown[source, dim] = state
            if layers and source in self.lost:
                self.foreign.append(state.labels)
        return self.unknown[source, dim]


def _is_still(module: nn.Module) -> bool:
    """True for a batch-norm that is a fixed affine map per channel in eval mode."""
    return type(module) in NORMS and not hooked(module) and getattr(module, "running_mean", None) is not None


def _where_known(values: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    found = function(values.nan_to_num(0.0))
    return found.where(found.isfinite() & ~values.isnan(), torch.nan)


def _is_elementwise(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    """True for functions of one number, applied entry by entry with settings that are numbers, beside the activations."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return type(module) in _ELEMENTWISE_MODULES and not hooked(module)
    named = node.target in _ELEMENTWISE if node.op == "call_function" else str(node.target).removesuffix("_") in _ELEMENTWISE_METHODS
    settings = (*node.args[1:], *node.kwargs.values())
    return named and all(isinstance(value, (int, float, bool)) for value in settings)


def _applied(node: Node, modules: Mapping[str, nn.Module], values: Tensor) -> Tensor:
    """An activation's node, applied to other values; ``values`` may be overwritten."""
    if node.op == "call_module":
        return cast(Tensor, modules[str(node.target)](values))
    if node.op == "call_method":
        return cast(Tensor, getattr(values, str(node.target))(*node.args[1:], **node.kwargs))
    return cast(Tensor, cast(Callable[..., Any], node.target)(values, *node.args[1:], **node.kwargs))


def _shared(module: nn.Module, graph: fx.Graph) -> set[str]:
    """Modules with a parameter or buffer that another module has too, or that the graph reads by itself."""
    owners: dict[int, list[str]] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None and tensor.numel():
                owners.setdefault(tensor.data_ptr(), []).append(name)
    found = {name for names in owners.values() if len(names) > 1 for name in names}
    return found | {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}


def _overwritten(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> set[Node]:
    """Nodes whose tensor is changed in place by one of several that read it."""
    found: set[Node] = set()
    for node in graph.nodes:
        if not _in_place(node, modules) or not node.args or not isinstance(node.args[0], Node):
            continue
        chain, current = [node.args[0]], node.args[0]
        # what only moves values about may hand on the same memory
        while passes(current, modules) and isinstance(current.args[0], Node):
            current = current.args[0]
            chain.append(current)
        if any(len(part.users) > 1 for part in chain):
            found.update(chain)
    return found


def _in_place(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    name = getattr(node.target, "__name__", "")
    return bool(node.kwargs.get("inplace")) or True in node.args[1:] or name.endswith("_") or node.target in _ASSIGNING


_ASSIGNING = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
_BINARY: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add), torch.add),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub), torch.sub),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul), torch.mul),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div), torch.div),
}
_BINARY_METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **dict.fromkeys(("add", "add_"), torch.add),
    **dict.fromkeys(("sub", "sub_"), torch.sub),
    **dict.fromkeys(("mul", "mul_"), torch.mul),
    **dict.fromkeys(("div", "div_"), torch.div),
}
_ELEMENTWISE_MODULES = (nn.Hardshrink, nn.Threshold, nn.RReLU)
_ELEMENTWISE_METHODS = {"abs", "exp", "neg", "pow", "sqrt", "square", "sin", "cos", "sign", "erf", "log1p", "expm1"}
_ELEMENTWISE = {
    *(getattr(torch, name) for name in _ELEMENTWISE_METHODS),
    *(operator.neg, operator.abs, abs, operator.pow, F.hardshrink, F.threshold, F.softshrink, F.tanhshrink),
}
