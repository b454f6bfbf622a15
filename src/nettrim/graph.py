"""What follows each layer in the model's graph (torch.fx), and whether the layers form a chain along which bounds multiply."""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import preimage
from .preimage import IDENTITY, Activation

Node = fx.Node


@dataclass(frozen=True)
class Reading:
    """The activation that follows a layer, in words how it was found or why it was not, and who says so.

    ``source`` is ``"graph"``, ``"stated"`` (by the user; the graph agrees or does not show it), ``"stated against the graph"`` or
    ``"not seen"`` (matched linearly).
    """

    activation: Activation
    words: str
    source: str = "graph"


@dataclass(frozen=True)
class Step:
    """One step of a chain: a layer (``layer`` is its name) or something between layers with a Lipschitz constant."""

    layer: str | None
    lipschitz: float = 1.0


@dataclass(frozen=True)
class Chain:
    """The steps from the input on, as far as the network is one path of layers and Lipschitz maps.

    ``reason`` says where and why the chain ends before the output; it is empty when the chain is the whole network.
    """

    steps: tuple[Step, ...]
    reason: str = ""


@dataclass(frozen=True)
class Graph:
    """The readings of all layers asked for, and the chain."""

    readings: Mapping[str, Reading]
    chain: Chain
    notice: str = ""


def _softplus(threshold: float, beta: float) -> Activation:
    """Softplus jumps to the identity at its threshold: by less than float32 resolves at the default of 20, by more at smaller ones."""
    return preimage.named("softplus") if threshold >= 20 and beta > 0 else Activation("softplus", exact=False, lipschitz=None)


def _celu(alpha: float) -> Activation:
    return preimage.named("celu") if alpha > 0 else Activation("celu", exact=False, lipschitz=None)


_MODULES: dict[type[nn.Module], Callable[[Any], Activation]] = {
    nn.ReLU: lambda m: preimage.RELU,
    nn.ReLU6: lambda m: preimage.named("relu6"),
    nn.Hardtanh: lambda m: preimage.clamp(m.min_val, m.max_val),
    nn.LeakyReLU: lambda m: preimage.leaky_relu(float(m.negative_slope)),
    nn.ELU: lambda m: preimage.elu(m.alpha),
    nn.CELU: lambda m: _celu(m.alpha),
    nn.Softmax: lambda m: preimage.named("softmax"),
    nn.Softplus: lambda m: _softplus(m.threshold, m.beta),
    **{
        kind: (lambda m, name=name: preimage.named(name))  # type: ignore[misc]
        for kind, name in (
            (nn.Sigmoid, "sigmoid"),
            (nn.Tanh, "tanh"),
            (nn.GELU, "gelu"),
            (nn.SiLU, "silu"),
            (nn.Mish, "mish"),
            (nn.Hardswish, "hardswish"),
            (nn.Hardsigmoid, "hardsigmoid"),
            (nn.SELU, "selu"),
            (nn.LogSigmoid, "logsigmoid"),
            (nn.Softsign, "softsign"),
            (nn.Tanhshrink, "tanhshrink"),
            (nn.Softshrink, "softshrink"),
        )
    },
}

_FUNCTION_NAMES: dict[Any, str] = {
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu: "relu",
    F.relu6: "relu6",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    torch.tanh: "tanh",
    F.tanh: "tanh",
    F.gelu: "gelu",
    F.silu: "silu",
    F.mish: "mish",
    F.hardswish: "hardswish",
    F.hardsigmoid: "hardsigmoid",
    F.selu: "selu",
    F.logsigmoid: "logsigmoid",
    F.softsign: "softsign",
    F.softmax: "softmax",
    torch.softmax: "softmax",
}
_METHOD_NAMES = {"relu": "relu", "relu_": "relu", "sigmoid": "sigmoid", "tanh": "tanh", "softmax": "softmax"}

# maps that change no value, so that an elementwise activation may stand behind them
_PASSING_MODULES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Flatten, nn.Unflatten)
_PASSING_FUNCTIONS = {F.dropout, torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, torch.transpose, torch.permute}
_PASSING_METHODS = {"view", "reshape", "flatten", "squeeze", "unsqueeze", "transpose", "permute", "contiguous", "clone", "unflatten"}


def read(
    model: nn.Module,
    names: Iterable[str],
    stated: Mapping[str, Activation] | None = None,
    *,
    given: Iterable[str] | None = None,
    agrees: Callable[[nn.Module], bool] | None = None,
) -> Graph:
    """Reads the model's graph.

    Args:
        model: in eval mode.
        names: the layers whose activations are wanted.
        stated: activations that go before what the graph says.
        given: names of the arguments that ``model`` is called with; the others keep their defaults. By default the first one.
        agrees: tells whether a module made from the graph computes what the model does. Tracing follows one side of tests such as
            ``x is None`` without notice, so a graph that does not agree is not used.
    """
    stated = stated or {}
    names = list(names)
    if "" in names:  # the model is itself the layer
        return Graph({"": Reading(IDENTITY, "it is the network's output")}, Chain((Step(""),)))
    try:
        traced = _trace(model, given)
        if agrees is not None and not agrees(fx.GraphModule(model, traced)):
            raise ValueError("the traced graph computes something else than the model")
    except Exception as error:  # whatever a user's forward does under tracing: the reading is then linear, and says so
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        words = f"the graph could not be traced ({cause}): matched linearly"
        readings = {name: Reading(preimage.as_linear("unknown"), words, "not seen") for name in names}
        readings |= {name: Reading(activation, "stated by the user", "stated") for name, activation in stated.items() if name in readings}
        return Graph(readings, Chain((), "the graph could not be traced"), words)
    modules = dict(model.named_modules())
    calls: dict[str, list[Node]] = {}
    for node in traced.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    readings, consumed, contradicted = {}, set(), set()
    for name in names:
        reading, nodes = _read_layer(name, calls.get(name, []), modules)
        if name in stated:
            reading = _state(reading, stated[name])
            if reading.source == "stated against the graph":
                nodes = []  # what really follows is still to be counted
                if not reading.activation.is_point:  # a point box matches the pre-activation, which is sound whatever follows
                    contradicted.add(name)
        if reading.activation.exact:
            consumed.update(nodes)
        readings[name] = reading
    return Graph(readings, _chain(traced, modules, set(names), consumed, contradicted))


def _trace(model: nn.Module, given: Iterable[str] | None) -> fx.Graph:
    """The graph for the arguments that are given; all others keep their defaults, as they do when the model is called."""
    parameters = inspect.signature(model.forward).parameters
    first = list(parameters)[:1] if given is None else list(given)
    defaults = {
        name: parameter.default for name, parameter in parameters.items() if name not in first and parameter.default is not parameter.empty
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about defaults that fx cannot assert
        return fx.Tracer().trace(model, concrete_args=defaults or None)


def _state(reading: Reading, stated: Activation) -> Reading:
    """The user's statement about a layer, beside what the graph says."""
    if reading.activation == stated or reading.source == "not seen":
        return Reading(stated, "stated by the user", "stated")
    return Reading(stated, f"stated by the user (the graph reads {reading.activation.name}: {reading.words})", "stated against the graph")


def _read_layer(name: str, nodes: list[Node], modules: Mapping[str, nn.Module]) -> tuple[Reading, list[Node]]:
    """The reading of one layer, over all its calls, and the activation nodes that it speaks of."""
    if not nodes:
        return Reading(preimage.as_linear("unknown"), "its call is hidden from the graph: matched linearly", "not seen"), []
    found = [_follow(node, modules) for node in nodes]
    first, words, _ = found[0]
    if any(activation != first for activation, _, _ in found[1:]):
        return Reading(IDENTITY, f"its {len(nodes)} calls are followed by different activations, so the pre-activation is matched"), []
    if len(nodes) > 1:
        words += f" (all {len(nodes)} calls)"
    return Reading(first, words), [end for _, _, end in found if end is not None]


def _follow(node: Node, modules: Mapping[str, nn.Module]) -> tuple[Activation, str, Node | None]:
    current = node
    while True:
        users = [user for user in current.users if not _reads_shape(user)]
        if len(users) != 1:
            if not users:
                return IDENTITY, "its output is not used", None
            return IDENTITY, f"its output is read {len(users)} times, so the pre-activation is matched", None
        following = users[0]
        if following.op == "output":
            return IDENTITY, "it is the network's output", None
        activation = activation_of(following, modules)
        if activation is not None:
            how = "seen in the graph" if activation.exact else "not piecewise linear, so the pre-activation is matched"
            return activation, f"{activation.name}, {how}", following
        if not _passes(following, modules):
            return IDENTITY, f"followed by {_label(following, modules)}, so the pre-activation is matched", None
        current = following


def activation_of(node: Node, modules: Mapping[str, nn.Module]) -> Activation | None:
    """The activation that a graph node computes from its first argument, or ``None``."""
    try:
        return _activation_of(node, modules)
    except (TypeError, ValueError):  # a parameter that is computed in the graph, or one that the activation does not allow
        return None


def _activation_of(node: Node, modules: Mapping[str, nn.Module]) -> Activation | None:
    if node.op == "call_module":
        module = modules[str(node.target)]
        make = _MODULES.get(type(module))
        return make(module) if make and not _hooked(module) else None
    if not node.args or not isinstance(node.args[0], Node):
        return None
    if node.op == "call_function":
        if node.target in (F.leaky_relu,):
            return preimage.leaky_relu(float(_argument(node, 1, "negative_slope", 0.01)))
        if node.target is F.hardtanh:
            return preimage.clamp(float(_argument(node, 1, "min_val", -1.0)), float(_argument(node, 2, "max_val", 1.0)))
        if node.target is F.softplus:
            return _softplus(float(_argument(node, 2, "threshold", 20.0)), float(_argument(node, 1, "beta", 1.0)))
        if node.target is F.elu:
            return preimage.elu(float(_argument(node, 1, "alpha", 1.0)))
        if node.target in (torch.clamp, torch.clip):
            return _clamp(node)
        if node.target in (torch.clamp_min, torch.clamp_max):
            return _clamp(node, str(node.target.__name__))
        name = _FUNCTION_NAMES.get(node.target)
        return preimage.named(name) if name else None
    if node.op == "call_method":
        if node.target in ("clamp", "clip", "clamp_", "clip_"):
            return _clamp(node)
        if node.target in ("clamp_min", "clamp_max", "clamp_min_", "clamp_max_"):
            return _clamp(node, str(node.target).rstrip("_"))
        name = _METHOD_NAMES.get(str(node.target))
        return preimage.named(name) if name else None
    return None


def _clamp(node: Node, kind: str = "clamp") -> Activation | None:
    low = None if kind == "clamp_max" else _argument(node, 1, "min", None)
    high = None if kind == "clamp_min" else _argument(node, 2 if kind == "clamp" else 1, "max", None)
    if isinstance(low, (Node, Tensor)) or isinstance(high, (Node, Tensor)) or (low is None and high is None):
        return None
    low = -float("inf") if low is None else float(low)
    high = float("inf") if high is None else float(high)
    if low == 0.0 and high == float("inf"):
        return preimage.RELU
    return preimage.clamp(low, high, "clamp") if low < high else None


def _argument(node: Node, position: int, name: str, default: Any) -> Any:
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else default


def _passes(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    """True for maps that only move values about: the identity, dropout in eval mode, reshaping."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return type(module) in _PASSING_MODULES and not _hooked(module)
    if node.op == "call_function":
        if node.target is F.dropout:
            return _argument(node, 2, "training", True) is False
        return node.target in _PASSING_FUNCTIONS
    return node.op == "call_method" and str(node.target) in _PASSING_METHODS


def _chain(graph: fx.Graph, modules: Mapping[str, nn.Module], layers: set[str], consumed: set[Node], contradicted: set[str]) -> Chain:
    """Follows the one path from the input to the output, as far as there is one."""
    used = _used(graph)
    inputs = [node for node in graph.nodes if node.op == "placeholder" and node in used]
    if len(inputs) != 1:
        return Chain((), f"the model has {len(inputs)} inputs")
    steps: list[Step] = []
    seen: set[str] = set()
    current = inputs[0]
    while True:
        users = [user for user in current.users if not _reads_shape(user)]
        if len(users) != 1:
            return Chain(tuple(steps), f"the path branches after {_label(current, modules)}")
        node = users[0]
        if node.op == "output":
            whole = node.args[0] is current
            return Chain(tuple(steps), "" if whole else "the output is more than one tensor")
        if sum(1 for argument in node.all_input_nodes if not _reads_shape(argument)) != 1:
            return Chain(tuple(steps), f"{_label(node, modules)} has more than one input")
        name = str(node.target) if node.op == "call_module" else ""
        if name and _hooked(modules[name]):
            return Chain(tuple(steps), f"{_label(node, modules)} has hooks, whose effect is not known")
        # a layer that is not pruned counts only when it is known to compute x W + b; those that are pruned were checked on data
        if name and (name in layers or type(modules[name]) is nn.Linear):
            if name in seen:
                return Chain(tuple(steps), f"layer {name!r} is called more than once")
            if name in contradicted:
                return Chain(tuple(steps), f"the activation stated for layer {name!r} is not the one in the graph")
            seen.add(name)
            steps.append(Step(name))
        elif node in consumed or _passes(node, modules):
            pass
        else:
            activation = activation_of(node, modules)
            if activation is None or activation.lipschitz is None:
                return Chain(tuple(steps), f"no Lipschitz constant is known for {_label(node, modules)}")
            if activation.lipschitz != 1.0:
                steps.append(Step(None, activation.lipschitz))
        current = node


def _used(graph: fx.Graph) -> set[Node]:
    """The nodes that the output depends on."""
    used: set[Node] = set()
    waiting = [node for node in graph.nodes if node.op == "output"]
    while waiting:
        node = waiting.pop()
        if node not in used:
            used.add(node)
            waiting += node.all_input_nodes
    return used


def _hooked(module: nn.Module) -> bool:
    """True when hooks may change what the module gives; tracing does not see them."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _reads_shape(node: Node) -> bool:
    """True for nodes that only ask for sizes, which no weight changes."""
    if node.op == "call_method" and node.target in ("size", "dim", "numel"):
        return True
    if node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "ndim", "device", "dtype"):
        return True
    if node.op == "call_function" and node.target in (operator.getitem, operator.mul, operator.floordiv):
        return all(_reads_shape(argument) for argument in node.all_input_nodes) and bool(node.all_input_nodes)
    return False


def _label(node: Node, modules: Mapping[str, nn.Module]) -> str:
    if node.op == "call_module":
        return f"{node.target} ({type(modules[str(node.target)]).__name__})"
    if node.op == "placeholder":
        return "the input"
    return str(getattr(node.target, "__name__", node.target))
