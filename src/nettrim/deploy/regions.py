"""Finds the parts of a traced graph that can run features-first on sparse weights, and puts one module in the place of each."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..nodes import activation_of, adds, hooked, keeps_places, norm_of, pool_of, reads_shape
from .sparse_steps import FUNCTIONS, MOVES_ZERO, SparseWeights, Step, Window, sparse_weights, window_of

Node = fx.Node
Shapes = Mapping[Node, tuple[int, ...]]
MakeRegion = Callable[[Sequence[Step], Mapping[str, SparseWeights], Sequence[bool], Sequence[int]], nn.Module]


class _Unsupported(Exception):
    """A node that cannot be in the region it was put into."""

    def __init__(self, node: Node) -> None:
        super().__init__(node.name)
        self.node = node


@dataclass(frozen=True)
class Placed:
    """A region in a graph: its module's name, the nodes that it reads, and for each of its steps the nodes that the step replaces."""

    name: str
    module: nn.Module
    inputs: tuple[Node, ...]
    members: tuple[tuple[Node, ...], ...]


def recorded(module: fx.GraphModule, arguments: Sequence[Any]) -> dict[Node, Any]:
    """What every node of the graph gives on one input."""
    values: dict[Node, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    with torch.no_grad():
        Recorder(module, garbage_collect_values=False).run(*arguments)
    return values


def shapes_of(values: Mapping[Node, Any]) -> dict[Node, tuple[int, ...]]:
    """The shapes of the nodes that give a float32 tensor on the CPU."""
    return {
        node: tuple(value.shape)
        for node, value in values.items()
        if isinstance(value, Tensor) and value.dtype == torch.float32 and value.device.type == "cpu" and value.layout == torch.strided
    }


def able(module: nn.Module, convolutions: bool = True) -> str:
    """Why a Linear or Conv2d cannot run on sparse weights; empty when it can."""
    if type(module) not in (nn.Linear, nn.Conv2d):
        return f"{type(module).__name__} has no sparse kernel"
    if hooked(module):
        return "its hooks would be lost"
    if "forward" in vars(module):
        return "its forward is not that of its class"
    assert isinstance(module, (nn.Linear, nn.Conv2d))
    if module.weight.dtype != torch.float32:
        return f"its weights are {module.weight.dtype}, the kernels take float32"
    if isinstance(module, nn.Conv2d) and window_of(module) is None:
        return "its padding is not of zeros within the kernel's reach"
    if isinstance(module, nn.Conv2d) and not convolutions:
        return "numba is not installed"
    return ""


def rebuilt(
    model: nn.Module, graph: fx.Graph, shapes: Shapes, layers: Collection[str], make: MakeRegion, images: bool = True
) -> tuple[fx.GraphModule, list[Placed]]:
    """A module that computes what the graph of ``model`` does, with the named layers and what lies between them in regions.

    ``make`` builds a region's module; without ``images`` regions hold no convolutions and pooling.
    """
    modules = dict(model.named_modules())
    varying = _varying(graph)
    shapes = {node: shape for node, shape in shapes.items() if node in varying}  # what is the same for any batch has not its leading sizes
    refused: set[Node] = set()
    while True:
        try:
            segments = _segments(graph, modules, shapes, layers, refused, images)
            lowered = [_Lowering(segment, modules, shapes, segments) for segment in segments]
            break
        except _Unsupported as error:
            refused.add(error.node)
    placed = []
    whole = copy.copy(model)  # shares the tensors, holds modules of its own: the model itself gets none
    whole._modules = dict(model._modules)
    for number, low in enumerate(lowered):
        module = make(low.steps, low.weights, [len(shapes[node]) == 4 for node in low.inputs], [low.ids[node] for node in low.outputs])
        name = f"accelerated{number}"
        while hasattr(whole, name):
            name += "_"
        whole.add_module(name, module)
        placed.append(Placed(name, module, tuple(low.inputs), tuple(tuple(nodes) for nodes in low.members)))
    new = fx.Graph()
    env: dict[Node, Node] = {}
    inside = {node: number for number, segment in enumerate(segments) for node in segment}
    spent = _spent(graph, inside)
    for node in graph.nodes:
        if node in inside:
            low = lowered[inside[node]]
            if node is low.nodes[0]:
                call = new.call_module(placed[inside[node]].name, tuple(env[source] for source in low.inputs))
                for index, output in enumerate(low.outputs):
                    env[output] = call if len(low.outputs) == 1 else new.call_function(operator.getitem, (call, index))
        elif node not in spent:
            env[node] = new.node_copy(node, lambda old: env[old])
    new.lint()
    return fx.GraphModule(whole, new, type(model).__name__).eval(), placed


def _lead(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:1] if len(shape) == 4 else shape[:-1]


def _segments(
    graph: fx.Graph, modules: Mapping[str, nn.Module], shapes: Shapes, layers: Collection[str], refused: set[Node], images: bool
) -> list[list[Node]]:
    """Runs of nodes in the graph's order that regions can hold: what lies together in that order has nothing of others in between."""
    found: list[list[Node]] = [[]]
    for node in graph.nodes:
        kind = "" if node in refused else _kind(node, modules, shapes, layers, images)
        if not kind:
            if not (reads_shape(node) and all(_flattens(user, modules) or reads_shape(user) for user in node.users)):
                found.append([])
        else:
            if found[-1] and _lead(shapes[found[-1][0]]) != _lead(shapes[node]):
                found.append([])
            found[-1].append(node)
    kept = []
    for segment in (part for whole in found for part in _parts(whole)):
        kinds = [_kind(node, modules, shapes, layers, images) for node in segment]
        while kinds and kinds[0] not in ("layer", "flatten"):
            segment, kinds = segment[1:], kinds[1:]
        while kinds and kinds[-1] in ("flatten", "same"):
            segment, kinds = segment[:-1], kinds[:-1]
        if "layer" in kinds:
            kept.append(segment)
    return kept


def _parts(segment: list[Node]) -> list[list[Node]]:
    """Those that share no tensor apart, so that regions ask only inputs that meet for equal leading sizes."""
    parts: list[tuple[set[Node], list[Node]]] = []
    for node in segment:
        tensors = {node, *(source for source in node.all_input_nodes if not reads_shape(source))}
        met = [part for part in parts if part[0] & tensors]
        parts = [part for part in parts if not part[0] & tensors]
        parts.append((tensors.union(*(part[0] for part in met)), [*(other for part in met for other in part[1]), node]))
    order = {node: number for number, node in enumerate(segment)}
    return [sorted(nodes, key=lambda node: order[node]) for _, nodes in parts]


def _varying(graph: fx.Graph) -> set[Node]:
    """The nodes whose values come from the inputs, not only their sizes."""
    found: set[Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or (not reads_shape(node) and any(source in found for source in node.all_input_nodes)):
            found.add(node)
    return found


def _kind(node: Node, modules: Mapping[str, nn.Module], shapes: Shapes, layers: Collection[str], images: bool) -> str:
    """What a node is to a region: layer, norm, clamp, apply, sum, pool, flatten, same; empty for anything else."""
    sources = node.all_input_nodes
    if node not in shapes or not sources or node.args[:1] != (sources[0],) or sources[0] not in shapes:
        return ""
    shape, before = shapes[node], shapes[sources[0]]
    if not shape or not before or (len(before) == 4 and not images and not _flattens(node, modules)):
        return ""
    module = modules[str(node.target)] if node.op == "call_module" else None
    if module is not None and "forward" in vars(module):  # of its own, not that of its class
        return ""
    if module is not None and str(node.target) in layers:
        fits = len(before) == 4 if isinstance(module, nn.Conv2d) else len(before) != 4
        return "layer" if fits and not able(module) and len(node.args) == 1 and not node.kwargs else ""
    if _flattens(node, modules) and len(before) == 4 and shape == (before[0], math.prod(before[1:])):
        return "flatten" if images else ""
    if _overwrites(node, module) and not _private(sources[0], modules, shapes, layers, images):
        return ""
    if len(shape) == len(before) == 4 and norm_of(node, modules) is not None:
        return "norm"
    if keeps_places(node, modules) and not (module is not None and hooked(module)):
        return "same"
    if adds(node, sources[0]):
        other = next(argument for argument in node.args if argument is not sources[0])
        return "sum" if isinstance(other, Node) and shapes.get(other) == before else ""
    if _function(node, modules, len(before) == 4) is not None:
        return "apply"
    if _bounds(node, modules) is not None:
        return "clamp"
    return "pool" if len(before) == 4 and _pooling(node, modules) is not None else ""


def _private(node: Node, modules: Mapping[str, nn.Module], shapes: Shapes, layers: Collection[str], images: bool) -> bool:
    """True where a change of a node's value is seen by its one reader only: no other holds the same memory."""
    while sum(not reads_shape(user) for user in node.users) == 1:
        kind = _kind(node, modules, shapes, layers, images)
        if kind not in ("same", "flatten"):
            return bool(kind)
        node = node.all_input_nodes[0]
    return False


def _overwrites(node: Node, module: nn.Module | None) -> bool:
    """True for what works in place: it also changes what others read."""
    if module is not None:
        return bool(getattr(module, "inplace", False))
    name = str(getattr(node.target, "__name__", node.target))
    return bool(node.kwargs.get("inplace")) or name.endswith("_") or node.target is operator.iadd or True in node.args[1:]


def _flattens(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    """True for what may turn (B, C, H, W) into (B, C H W) for every B."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return type(module) is nn.Flatten and not hooked(module) and module.start_dim == 1 and module.end_dim in (-1, 3)
    if not node.args or not isinstance(node.args[0], Node):
        return False
    if node.target is torch.flatten or node.target == "flatten":
        start = node.kwargs.get("start_dim", node.args[1] if len(node.args) > 1 else 0)
        return bool(start == 1 and node.kwargs.get("end_dim", node.args[2] if len(node.args) > 2 else -1) in (-1, 3))
    if node.target is not torch.reshape and node.target not in ("view", "reshape"):
        return False
    sizes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
    return bool(len(sizes) == 2 and (isinstance(sizes[0], Node) or sizes[0] == -1))  # a number there would hold for one batch size only


def _bounds(node: Node, modules: Mapping[str, nn.Module]) -> tuple[float, float] | None:
    """The bounds of an activation that is a clamp."""
    found = activation_of(node, modules)
    return (found.low, found.high) if found is not None and found.exact and found.slope == 1.0 else None


_MODULE_FUNCTIONS: dict[type[nn.Module], Callable[[Any], tuple[str, dict[str, Any]]]] = {
    nn.GELU: lambda m: ("gelu", {"approximate": m.approximate}),
    nn.LeakyReLU: lambda m: ("leaky_relu", {"negative_slope": m.negative_slope}),
    nn.SiLU: lambda m: ("silu", {}),
    nn.Tanh: lambda m: ("tanh", {}),
    nn.Sigmoid: lambda m: ("sigmoid", {}),
    nn.Hardswish: lambda m: ("hardswish", {}),
    nn.Mish: lambda m: ("mish", {}),
    nn.Softsign: lambda m: ("softsign", {}),
}
_PLAIN = {
    F.gelu: "gelu",
    F.silu: "silu",
    F.tanh: "tanh",
    torch.tanh: "tanh",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    F.mish: "mish",
}


def _function(node: Node, modules: Mapping[str, nn.Module], image: bool) -> tuple[str, dict[str, Any]] | None:
    """An elementwise function that torch applies, with its options."""
    found: tuple[str, dict[str, Any]] | None = None
    if node.op == "call_module":
        module = modules[str(node.target)]
        make = _MODULE_FUNCTIONS.get(type(module))
        found = make(module) if make is not None and not hooked(module) else None
    elif len(node.args) == 1 and not node.kwargs:
        if node.op == "call_function" and node.target in _PLAIN:
            found = (_PLAIN[node.target], {})
        elif node.op == "call_method" and node.target in ("tanh", "sigmoid"):
            found = (str(node.target), {})
    return None if found is None or (image and found[0] in MOVES_ZERO) else found


def _pooling(node: Node, modules: Mapping[str, nn.Module]) -> tuple[Window | None, bool] | None:
    """The window of a pooling (``None``: the whole image), and whether it is a mean."""
    largest = pool_of(node, modules)
    if largest is not None:
        kernel = largest.kernel
        return (Window((kernel[0], kernel[1]), (kernel[0], kernel[1])), False) if len(kernel) == 2 else None
    if node.op != "call_module" or hooked(modules[str(node.target)]):
        if node.target is F.adaptive_avg_pool2d and len(node.args) == 2 and node.args[1] in (1, (1, 1), [1, 1]):
            return None, True
        return None
    module = modules[str(node.target)]
    if type(module) is nn.AdaptiveAvgPool2d:
        return (None, True) if module.output_size in (1, (1, 1)) else None
    if type(module) is not nn.AvgPool2d or module.ceil_mode or module.divisor_override is not None:
        return None
    kernel, stride, padding = (
        value if isinstance(value, tuple) else (value, value) for value in (module.kernel_size, module.stride, module.padding)
    )
    return (Window((kernel[0], kernel[1]), (stride[0], stride[1])), True) if padding == (0, 0) else None


def _spent(graph: fx.Graph, inside: Collection[Node]) -> set[Node]:
    """Nodes that only read sizes for what regions hold."""
    spent: set[Node] = set()
    for node in reversed(graph.nodes):
        if reads_shape(node) and node.users and all(user in inside or user in spent for user in node.users):
            spent.add(node)
    return spent


class _Lowering:
    """The steps of one segment. ``members``: for each step the nodes that it computes."""

    def __init__(self, nodes: list[Node], modules: Mapping[str, nn.Module], shapes: Shapes, segments: list[list[Node]]) -> None:
        self.nodes, self.modules, self.shapes = nodes, modules, shapes
        self.inside = set(nodes)
        spent = _spent(nodes[0].graph, {node for segment in segments for node in segment})
        self.inputs = list(dict.fromkeys(node for member in nodes for node in self._tensors(member) if node not in self.inside))
        self.outputs = [node for node in nodes if any(user not in self.inside and user not in spent for user in node.users)]
        self.ids: dict[Node, int] = {node: number for number, node in enumerate(self.inputs)}
        self.flat: set[Node] = set()
        self.steps: list[Step] = []
        self.members: list[list[Node]] = []
        self.weights: dict[str, SparseWeights] = {}
        self.made_by: dict[int, int] = {}
        for node in nodes:
            if node not in self.ids:
                self._lower(node)
        for node in self.outputs:
            if node in self.flat:
                raise _Unsupported(node)

    def _tensors(self, node: Node) -> list[Node]:
        """The tensors that a node reads, sizes left out."""
        return [argument for argument in node.all_input_nodes if not reads_shape(argument)]

    def _lower(self, node: Node) -> None:
        sources = self._tensors(node)
        source = self.ids[sources[0]]
        module = self.modules[str(node.target)] if node.op == "call_module" else None
        if _flattens_to_rows(node, self.modules, self.shapes):
            self.ids[node] = source
            self.flat.add(node)
        elif keeps_places(node, self.modules):
            self.ids[node] = source
            if sources[0] in self.flat:
                self.flat.add(node)
        elif type(module) is nn.Linear:
            self._emit(node, Step("linear", source, self._new(), layer=self._layer(node, None)))
        elif any(argument in self.flat for argument in sources):
            raise _Unsupported(node)
        elif type(module) is nn.Conv2d:
            users = list(node.users)
            norm = users[0] if len(users) == 1 and users[0] in self.inside and norm_of(users[0], self.modules) is not None else None
            self._emit(node, Step("conv", source, self._new(), layer=self._layer(node, norm), window=window_of(module)))
            if norm is not None:
                self._join(norm, self.ids[node])
        elif norm_of(node, self.modules) is not None:
            raise _Unsupported(node)
        elif len(sources) == 2:
            self._sum(node, *sources)
        elif (function := _function(node, self.modules, len(self.shapes[node]) == 4)) is not None:
            name, options = function
            assert name in FUNCTIONS
            self._emit(node, Step("apply", source, self._new(), function=name, options=tuple(options.items())))
        elif (bounds := _bounds(node, self.modules)) is not None:
            number = self._open(sources[0])
            if number is not None:
                self.steps[number] = replace(self.steps[number], low=bounds[0], high=bounds[1])
                self._join(node, source)
            else:
                self._emit(node, Step("sum", source, self._new(), low=bounds[0], high=bounds[1]))
        else:
            found = _pooling(node, self.modules)
            assert found is not None
            self._emit(node, Step("pool", source, self._new(), window=found[0], mean=found[1], whole=found[0] is None))

    def _new(self) -> int:
        return len(self.inputs) + len(self.steps)

    def _emit(self, node: Node, step: Step) -> None:
        self.made_by[step.target] = len(self.steps)
        self.ids[node] = step.target
        self.steps.append(step)
        self.members.append([node])

    def _join(self, node: Node, tensor: int) -> None:
        """The node's value is what the step of that tensor now ends with."""
        self.ids[node] = tensor
        self.members[self.made_by[tensor]].append(node)

    def _layer(self, node: Node, norm: Node | None) -> str:
        name = key = str(node.target)
        while key in self.weights:  # called again, or with another batch-norm behind
            key += "'"
        layer = self.modules[name]
        assert isinstance(layer, (nn.Linear, nn.Conv2d))
        self.weights[key] = sparse_weights(layer, None if norm is None else self.modules[str(norm.target)])
        return key

    def _open(self, node: Node) -> int | None:
        """The step that puts this tensor out, when a bound can still be put behind it because nobody else reads it."""
        tensor = self.ids[node]
        number = self.made_by.get(tensor)
        if number is None or self.steps[number].kind not in ("conv", "linear", "sum"):
            return None
        names = [other for other, known in self.ids.items() if known == tensor]
        plain = (self.steps[number].low, self.steps[number].high) == (-math.inf, math.inf)
        return number if plain and all(len(other.users) == 1 for other in names) else None

    def _sum(self, node: Node, a: Node, b: Node) -> None:
        """Adds in the step that comes last of the two, if it is a layer; else by itself."""
        steps = {other: self._open(other) for other in (a, b)}
        able = [x for x, n in steps.items() if n is not None and self.steps[n].kind != "sum" and self.steps[n].added is None]
        able.sort(key=lambda x: -self.made_by[self.ids[x]])
        for last in able:
            other = self.ids[b if last is a else a]
            number = self.made_by[self.ids[last]]
            if self.made_by.get(other, -1) < number:
                self.steps[number] = replace(self.steps[number], added=other)
                self._join(node, self.ids[last])
                return
        self._emit(node, Step("sum", self.ids[a], self._new(), added=self.ids[b]))


def _flattens_to_rows(node: Node, modules: Mapping[str, nn.Module], shapes: Shapes) -> bool:
    return len(shapes[node.all_input_nodes[0]]) == 4 and len(shapes[node]) == 2 and _flattens(node, modules)
