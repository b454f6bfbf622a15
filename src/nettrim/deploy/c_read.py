"""Reads the steps of a C network from a model's traced graph; whatever has no C form is refused by name."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..calibration import keywords_of
from ..capture import Replica
from ..graph import read
from ..nodes import activation_of, has_statistics, hooked, label, norm_scale, passes, reads_shape
from ..outputs import largest_difference
from ..status import InvalidInput
from .c_steps import (
    AdaptivePool,
    Add,
    Affine,
    Array,
    AveragePool,
    Clip,
    Convolution,
    Copy,
    Leaky,
    Linear,
    MaxPool,
    Pair,
    Plan,
    Step,
    Window,
)
from .export_common import allowed, copied, ran, resized
from .follow import arguments
from .moves import argument

Node = fx.Node

SUPPORTED = (
    "Linear, Conv1d, Conv2d, BatchNorm1d, BatchNorm2d, ReLU, ReLU6, Hardtanh, LeakyReLU, max, average and adaptive average pooling, "
    "flattening and reshaping, the sum of two tensors, and dropout in eval mode"
)
SAMPLES = 3  # of the batch on which shapes are seen


def plan_of(twin: Replica, inputs: Any) -> Plan:
    """The steps of a model, in float32 and in eval mode, for one sample. Raises InvalidInput."""
    batch = _input_of(inputs)
    if type(twin.model) in _LAYERS:  # torch.fx shows a layer only as part of something
        twin = Replica(nn.Sequential(twin.model), twin.device, twin.dtype)
    shown = resized(inputs, SAMPLES)
    wanted = ran(twin, shown)

    def agrees(module: nn.Module) -> bool:
        return largest_difference(wanted, ran(Replica(module, twin.device, twin.dtype), shown)) <= allowed(twin.model, 1e-5)

    graph = read(twin.model, (), given=keywords_of(inputs), agrees=agrees)
    if graph.traced is None:
        raise InvalidInput(
            f"export: {graph.notice.removesuffix(': matched linearly')}; C needs a model that torch.fx can trace: "
            "take data-dependent branches out of forward"
        )
    module = fx.GraphModule(twin.model, graph.traced)
    reader = _Reader(module, tuple(batch.shape[1:]))
    with torch.no_grad():
        reader.run(*arguments(module, copied(shown)))
    return reader.plan()


def _input_of(inputs: Any) -> Tensor:
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)] if isinstance(inputs, Mapping) else [inputs]
    if len(tensors) != 1 or not tensors[0].is_floating_point() or tensors[0].ndim < 2:
        found = ", ".join(f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in tensors)
        raise InvalidInput(f"export: C needs a model with one floating-point input, samples along its first dimension; found {found}")
    return tensors[0]


class _Reader(fx.Interpreter):
    """Runs the graph on a batch, and writes down the step of every node."""

    def __init__(self, module: fx.GraphModule, shape: tuple[int, ...]) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.modules = dict(module.named_modules())
        self.values: dict[Node, int] = {}
        self.seen: dict[Node, tuple[int, ...]] = {}  # shapes as the graph has them: reshaping makes no new value
        self.shapes = [shape]
        self.steps: list[Step] = []
        self.overwritten: list[tuple[int, int, str]] = []
        self.result = -1

    def plan(self) -> Plan:
        """What was read."""
        for value, index, name in self.overwritten:
            later = [step.label for step in self.steps[index + 1 :] if value in step.inputs]
            if later or value == self.result:
                raise InvalidInput(
                    f"export: {name} changes its input in place while {', '.join(later) or 'the output'} reads it too; "
                    "take inplace=True (or the assignment) out"
                )
        if self.result == 0:
            self.steps.append(Copy("the input", (0,), self._new(self.shapes[0])))
            self.result = len(self.shapes) - 1
        return Plan(tuple(self.steps), tuple(self.shapes), self.result)

    def run_node(self, n: Node) -> Any:
        """The node's value; its step is kept."""
        value = super().run_node(n)
        if n.op == "output":
            result = n.args[0]
            if not isinstance(result, Node) or result not in self.values:
                raise InvalidInput("export: C needs a model whose output is one tensor; wrap it in a module that returns its scores")
            self.result = self.values[result]
        elif n.op == "placeholder":
            if isinstance(value, Tensor):
                self.values[n], self.seen[n] = 0, tuple(value.shape[1:])
        elif (
            n.op == "get_attr"
            or reads_shape(n)
            or not (isinstance(value, Tensor) or any(part in self.values for part in n.all_input_nodes))
        ):
            pass  # nothing that depends on the input's values: sizes, and arguments that keep their defaults
        else:
            if not isinstance(value, Tensor) or value.ndim < 2 or len(value) != SAMPLES:
                self._refuse(n)
            self.seen[n] = tuple(value.shape[1:])
            self._step(n, self.seen[n])
        return value

    def _refuse(self, node: Node, why: str = "") -> NoReturn:
        raise InvalidInput(
            f"export: {label(node, self.modules)} has no C form here{why and f' ({why})'}; there are {SUPPORTED}: "
            "take it out of the model, or export to onnx or pt2"
        )

    def _new(self, shape: tuple[int, ...]) -> int:
        self.shapes.append(shape)
        return len(self.shapes) - 1

    def _source(self, node: Node) -> tuple[Node, int]:
        """The one tensor that a node reads first."""
        source = node.args[0] if node.args else None
        if not isinstance(source, Node) or source not in self.values:
            self._refuse(node, "what it reads is not computed from the input alone")
        return source, self.values[source]

    def _step(self, node: Node, shape: tuple[int, ...]) -> None:
        if node.op == "call_module" and hooked(self.modules[str(node.target)]):
            self._refuse(node, "hooks may change what it gives")
        if _adds(node):
            self._add(node, shape)
            return
        source, read_from = self._source(node)
        before, name = self.seen[source], label(node, self.modules)
        if _moves_nothing(node, self.modules):
            if math.prod(before) != math.prod(shape):
                self._refuse(node)
            self.values[node] = read_from
            return
        if any(other in self.values and other is not source for other in node.all_input_nodes):
            self._refuse(node)
        module = self.modules[str(node.target)] if node.op == "call_module" else None
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            self._normalise(node, module, source, shape)
            return
        step = _layer(module, name, read_from, before, shape) if module is not None else None
        step = step or self._pool(node, name, read_from, before, shape)
        if step is None:
            found = activation_of(node, self.modules)
            if found is None or not found.exact:
                self._refuse(node)
            if found.slope != 1.0:
                step = Leaky(name, (read_from,), 0, found.slope)
            elif found.is_point:
                self.values[node] = read_from
                return
            else:
                step = Clip(name, (read_from,), 0, found.low, found.high)
            if _in_place(node, module):
                self.overwritten.append((read_from, len(self.steps), name))
        self._append(node, step, shape)

    def _append(self, node: Node, step: Step, shape: tuple[int, ...]) -> None:
        self.values[node] = self._new(shape)
        self.steps.append(replace(step, output=self.values[node]))

    def _add(self, node: Node, shape: tuple[int, ...]) -> None:
        terms = [term for term in node.args if isinstance(term, Node)]
        if len(terms) != 2 or any(self.seen.get(term) != shape for term in terms):
            self._refuse(node, "only two tensors of one shape are added")
        name = " + ".join(label(term, self.modules) for term in terms)
        read_from = tuple(self.values[term] for term in terms)
        if node.target is operator.iadd or str(node.target) == "add_":
            self.overwritten.append((read_from[0], len(self.steps), name))
        self._append(node, Add(name, read_from, 0), shape)

    def _normalise(self, node: Node, module: nn.BatchNorm1d | nn.BatchNorm2d, source: Node, shape: tuple[int, ...]) -> None:
        """A batch-norm: taken into the layer before it where nothing else reads that, else a step of its own."""
        if not has_statistics(module) or module.training:
            self._refuse(node, "it has no running statistics")
        assert module.running_mean is not None
        scale = norm_scale(module)
        beta = torch.zeros_like(scale) if module.bias is None else module.bias.detach().double()
        shift = beta - scale * module.running_mean.double()
        factor, offset = scale.numpy(), shift.numpy()
        last = self.steps[-1] if self.steps else None
        name = label(node, self.modules)
        layer = source.op == "call_module" and len(source.users) == 1 and type(self.modules[str(source.target)]) in _LAYERS
        same = isinstance(last, Convolution) or len(shape) == 1  # the norm's channels are the layer's outputs
        if layer and same and isinstance(last, (Linear, Convolution)) and last.output == self.values[source]:
            weight: Array = last.weight * factor.reshape(-1, *(1,) * (last.weight.ndim - 1))
            bias: Array = offset if last.bias is None else last.bias * factor + offset
            self.steps[-1] = replace(last, label=f"{last.label} with {name}", weight=weight, bias=bias)
            self.values[node] = last.output
            return
        step = Affine(name, (self.values[source],), 0, factor, offset, math.prod(shape[1:]))
        self._append(node, step, shape)

    def _pool(self, node: Node, name: str, read_from: int, before: tuple[int, ...], after: tuple[int, ...]) -> Step | None:
        """The step of a pooling over the last one or two dimensions; None for anything else."""
        module: Any = self.modules[str(node.target)] if node.op == "call_module" else None
        key = type(module) if module is not None else node.target if node.op == "call_function" else None
        found = _POOLS.get(key)
        if found is None:
            return None
        kind, dims = found
        if len(before) != dims + 1:
            self._refuse(node, "it pools a tensor of another number of dimensions")
        places = (read_from,)
        one, two = _spatial(before), _spatial(after)
        if kind == "adaptive":
            return AdaptivePool(name, places, 0, one, two)

        def setting(position: int, key: str, default: Any) -> Any:
            if module is not None:
                return getattr(module, key, default)
            return self.map_nodes_to_values(argument(node, position, key, default), node)  # sizes may be read from a shape

        kernel, stride = setting(1, "kernel_size", None), setting(2, "stride", None)
        stride = kernel if stride is None or stride in ((), []) else stride
        padding = setting(3, "padding", 0)
        if kind == "max":
            if setting(6, "return_indices", False):
                self._refuse(node, "it returns places too")
            window = _window(kernel, stride, padding, setting(4, "dilation", 1), dims)
            return MaxPool(name, places, 0, window, one, two)
        divisor = setting(6, "divisor_override", None)
        return AveragePool(
            name,
            places,
            0,
            _window(kernel, stride, padding, 1, dims),
            one,
            two,
            bool(setting(5, "count_include_pad", True)),
            int(divisor or 0),
        )


def _layer(module: nn.Module, name: str, read_from: int, before: tuple[int, ...], after: tuple[int, ...]) -> Step | None:
    """The step of a Linear or a convolution; None for anything else."""
    if type(module) is nn.Linear:
        offset = None if module.bias is None else _array(module.bias)
        return Linear(name, (read_from,), 0, _array(module.weight), offset, math.prod(after[:-1]))
    if type(module) not in (nn.Conv1d, nn.Conv2d):
        return None
    own: Any = module
    dims = own.weight.ndim - 2
    if own.padding_mode != "zeros" or len(before) != dims + 1:
        return None
    sizes = [_pair(value, dims) for value in (own.kernel_size, own.stride, own.dilation)]
    if own.padding == "valid":
        padding: Any = (0, 0)
    elif own.padding == "same":  # of an odd number of zeros, torch puts one more behind; the end is seen from the output's shape
        padding = tuple(d * (k - 1) // 2 for k, d in zip(sizes[0], sizes[2], strict=True))
    else:
        padding = _pair(own.padding, dims, 0)
    weight = _array(own.weight).reshape(own.weight.shape[0], own.weight.shape[1], *sizes[0])
    window = Window(sizes[0], sizes[1], padding, sizes[2])
    bias = None if own.bias is None else _array(own.bias)
    return Convolution(name, (read_from,), 0, weight, bias, own.groups, window, _spatial(before), _spatial(after))


def _array(tensor: Tensor) -> Array:
    found: Array = tensor.detach().double().numpy()
    return found


def _spatial(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Channels, height and width; signals have height 1."""
    return (shape[0], 1, shape[1]) if len(shape) == 2 else (shape[0], shape[1], shape[2])


def _pair(value: Any, dims: int, other: int = 1) -> Pair:
    sizes = tuple(int(n) for n in (value if isinstance(value, (tuple, list)) else (value,) * dims))
    sizes = sizes * dims if len(sizes) == 1 else sizes
    return (other, sizes[0]) if dims == 1 else (sizes[0], sizes[1])


def _window(kernel: Any, stride: Any, padding: Any, dilation: Any, dims: int) -> Window:
    return Window(_pair(kernel, dims), _pair(stride, dims), _pair(padding, dims, 0), _pair(dilation, dims))


def _moves_nothing(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    """True for what leaves all values in their order in memory: the identity, dropout, reshaping."""
    return passes(node, modules) and str(getattr(node.target, "__name__", node.target)) not in ("transpose", "permute")


def _adds(node: Node) -> bool:
    """True for the plain sum of a tensor and something else, or of a tensor and itself."""
    named = node.target in _SUMS if node.op == "call_function" else node.op == "call_method" and node.target in ("add", "add_")
    return named and len(node.args) == 2 and not node.kwargs and isinstance(node.args[0], Node)


def _in_place(node: Node, module: nn.Module | None) -> bool:
    if module is not None:
        return bool(getattr(module, "inplace", False))
    name = str(getattr(node.target, "__name__", node.target))
    return name.endswith("_") or bool(node.kwargs.get("inplace")) or any(value is True for value in node.args[1:])


_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
_SUMS = (operator.add, operator.iadd, torch.add)
_POOLS: dict[Any, tuple[str, int]] = {
    nn.MaxPool1d: ("max", 1),
    nn.MaxPool2d: ("max", 2),
    nn.AvgPool1d: ("average", 1),
    nn.AvgPool2d: ("average", 2),
    nn.AdaptiveAvgPool1d: ("adaptive", 1),
    nn.AdaptiveAvgPool2d: ("adaptive", 2),
    **dict.fromkeys((F.max_pool1d, torch.max_pool1d), ("max", 1)),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), ("max", 2)),
    F.avg_pool1d: ("average", 1),
    F.avg_pool2d: ("average", 2),
    **dict.fromkeys((F.adaptive_avg_pool1d, torch.adaptive_avg_pool1d), ("adaptive", 1)),
    F.adaptive_avg_pool2d: ("adaptive", 2),
}
