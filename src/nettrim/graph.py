"""What follows each layer in the model's graph (torch.fx), and whether the layers form a chain along which bounds multiply."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import preimage
from .attention import AttentionLayers
from .nodes import (
    COUNTING,
    activation_of,
    adds,
    adds_number,
    hooked,
    keeps_places,
    label,
    norm_lipschitz,
    norm_of,
    passes,
    pool_of,
    pooling_lipschitz,
    reads_shape,
)
from .preimage import IDENTITY, Activation
from .quiet import unheard
from .reading import PARTS, Correction, Reading, corrected
from .status import first_line

Node = fx.Node


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
    """The readings of all layers asked for, the chain, and the graph itself where it could be traced.

    ``tail`` is the chain from the layer that is called last: all that a cascade needs for a bound of the output. ``plain`` are the layers
    that were read without batch-norm and added branches. ``constants`` are tensors that ``forward`` makes itself: tracing keeps them on the
    traced model alone.
    """

    readings: Mapping[str, Reading]
    chain: Chain
    notice: str = ""
    traced: fx.Graph | None = None
    tail: Chain = Chain((), "no layer is on the way to the output")
    plain: frozenset[str] = frozenset()
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    corrections: Mapping[str, Correction] = field(default_factory=dict)

    def feeding(self, name: str, among: Iterable[str]) -> set[str]:
        """Those ``among`` the layers that the sum of layer ``name`` depends on, itself left out; empty for one that is added to nothing."""
        total = self.readings[name].total
        if not total or self.traced is None:
            return set()
        found = _needed(node for node in self.traced.nodes if node.name == total)
        called = [str(node.target) for node in found if node.op == "call_module"]
        return {layer for layer in among if layer != name and any(_inside(layer, target) for target in called)}

    def corrected(self, model: nn.Module, corrections: Mapping[str, Correction]) -> Graph:
        """The same graph of ``model``, read as the user corrects it; ``corrections`` by layer.

        A correction that does not follow from what the graph shows is used, and ends every chain at its layer.
        """
        if not corrections:
            return self
        if self.traced is not None:
            return replace(_interpreted(self.traced, model, list(self.readings), corrections, self.plain), constants=self.constants)
        readings, chain = dict(self.readings), self.chain
        for name, correction in corrections.items():
            readings[name], kept = corrected(readings[name], correction)
            chain = Chain((), _contradicts(name)) if kept is None else chain
        return replace(self, readings=readings, chain=chain)

    def where_trained(self, model: nn.Module, keys: Collection[str]) -> Graph:
        """The same graph for a pruned network that differs from ``model`` in these keys of its state, besides its pruned layers.

        Readings stay. No chain passes what else differs, because bounds follow only what both networks compute alike. A batch-norm that is
        folded into a layer is part of that layer, in each network its own; what batch-norms count plays no part in eval mode.
        """
        modules = dict(model.named_modules())
        moved = [key for key in keys if not _is_counter(key, modules)]
        if not moved:
            return self
        if self.traced is not None:
            made = _interpreted(self.traced, model, list(self.readings), self.corrections, self.plain, moved)
            return replace(made, constants=self.constants)
        ended = Chain((), f"{moved[0]} was changed too, and belongs to no certified layer")
        return replace(self, chain=self.chain if self.chain.reason else ended, tail=self.tail if self.tail.reason else ended)


def read(
    model: nn.Module,
    names: Iterable[str],
    stated: Mapping[str, Activation] | None = None,
    *,
    given: Mapping[str, Any] | None = None,
    agrees: Callable[[nn.Module], bool] | None = None,
    plain: Iterable[str] = (),
) -> Graph:
    """Reads the model's graph.

    Args:
        model: in eval mode.
        names: the layers whose activations are wanted.
        stated: activations that go before what the graph says.
        given: the keyword arguments that ``model`` is called with: tensors may vary, plain values (``None``, numbers, texts) are held, and
            arguments that are not named keep their defaults. By default it is called with its first argument, and others that
            have no default.
        agrees: tells whether a module made from the graph computes what the model does. Tracing follows one side of tests such as
            ``x is None`` without notice, so a graph that does not agree is not used.
        plain: layers whose batch-norm and added branches are left out, because the tensors do not have the form that they need.
    """
    names, corrections = list(names), {name: Correction(frozenset({"activation"}), value) for name, value in (stated or {}).items()}
    if "" in names:  # the model is itself the layer
        whole = Graph({"": Reading(IDENTITY, "it is the network's output")}, Chain((Step(""),)))
        return whole.corrected(model, corrections)
    try:
        traced = _trace(model, given)
        if agrees is not None and not agrees(fx.GraphModule(model, traced)):
            raise ValueError("the traced graph computes something else than the model")
    except Exception as error:  # whatever a user's forward does under tracing: the reading is then linear, and says so
        words = f"the graph could not be traced ({first_line(error)}): matched linearly"
        readings = {name: Reading(preimage.as_linear("unknown"), words, "not seen") for name in names}
        hidden = Graph(readings, Chain((), "the graph could not be traced"), words)
        return hidden.corrected(model, {name: correction for name, correction in corrections.items() if name in readings})
    made = {str(node.target) for node in traced.nodes if node.op == "get_attr" and str(node.target).startswith("_tensor_constant")}
    graph = _interpreted(traced, model, names, corrections, frozenset(plain))
    return replace(graph, constants={name: getattr(model, name) for name in sorted(made)})


def _interpreted(
    traced: fx.Graph,
    model: nn.Module,
    names: list[str],
    corrections: Mapping[str, Correction],
    plain: frozenset[str],
    moved: Collection[str] = (),
) -> Graph:
    """Readings and chains of a graph that was traced; ``moved`` are keys of the model's state that differ besides the layers' own."""
    modules = dict(model.named_modules())
    calls: dict[str, list[Node]] = {}
    for node in traced.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    norms = {name: len(nodes) for name, nodes in calls.items()}
    readings: dict[str, Reading] = {}
    consumed: set[Node] = set()
    contradicted: set[str] = set()
    for name in names:
        reading, parts = _read_layer(name, calls.get(name, []), modules, norms, name in plain)
        kept: frozenset[str] | None = frozenset(PARTS)
        if name in corrections:
            reading, kept = corrected(reading, corrections[name])
        if kept is None:
            contradicted.add(name)
        consumed.update(node for part, node in parts if part in (kept or ()))  # what else really follows is still to be counted
        readings[name] = reading
    totals = {name: reading.total for name, reading in readings.items()}
    folded = tuple(f"{reading.norm}." for reading in readings.values() if reading.norm)
    apart = {node for node in traced.nodes if _differs(node, moved, folded)}
    chain, tail = (_chain(traced, modules, totals, consumed, contradicted, apart, last=last) for last in (False, True))
    return Graph(readings, chain, traced=traced, tail=tail, plain=plain, corrections=corrections)


def _contradicts(name: str) -> str:
    return f"what is stated of layer {name!r} is not what the graph shows"


def _trace(model: nn.Module, given: Mapping[str, Any] | None) -> fx.Graph:
    """The graph for the arguments that are given; all others keep their defaults, as they do when the model is called."""
    with unheard():
        return _Tracer(given).trace(model)


class _Tracer(fx.Tracer):
    """Calls the model as it is called with data, by name where ``given`` is a mapping, so that ``forward(**kwargs)`` finds its keys.

    It does not look into attention, whose masks and shapes decide what it does.
    """

    def __init__(self, given: Mapping[str, Any] | None) -> None:
        super().__init__()
        self.given = given

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: dict[str, Any] | tuple[Any, ...] | None = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """The function to trace, and what it is called with: one placeholder for each argument that is given."""
        order = inspect.signature(self.root.forward).parameters  # a module made from the graph takes them in this order
        if self.given is None:
            needed = [name for name, item in order.items() if item.kind is item.POSITIONAL_OR_KEYWORD and item.default is item.empty]
            names = list(dict.fromkeys([*list(order)[:1], *needed])) or ["input"]
            return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]
        values: dict[str, Any] = {}
        for name in [*(name for name in order if name in self.given), *(name for name in self.given if name not in order)]:
            value = self.given[name]
            values[name] = self.create_proxy("placeholder", name, (), {})
            if value is None or isinstance(value, (bool, int, float, str)):
                same = self.create_proxy("call_function", operator.is_ if value is None else operator.eq, (values[name], value), {})
                self.create_proxy("call_function", torch._assert, (same, f"{name} was {value!r} when the model was traced"), {})
                values[name] = value
        return lambda root: root_fn(root, **values), [self.root]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, AttentionLayers) or super().is_leaf_module(m, module_qualified_name)


def _read_layer(
    name: str, nodes: list[Node], modules: Mapping[str, nn.Module], norms: Mapping[str, int], plain: bool
) -> tuple[Reading, list[tuple[str, Node]]]:
    """The reading of one layer, over all its calls, and the nodes behind it that it speaks of, each with the part that it is."""
    if not nodes:
        return Reading(preimage.as_linear("unknown"), "its call is hidden from the graph: matched linearly", "not seen"), []
    found = [_follow(node, modules, norms, len(nodes), sums=len(nodes) == 1 and not plain, norm=not plain) for node in nodes]
    first, _ = found[0]
    if any(replace(reading, words="") != replace(first, words="") for reading, _ in found[1:]):
        words = f"its {len(nodes)} calls are followed by different things, so the pre-activation is matched"
        return Reading(IDENTITY, words), []
    if len(nodes) > 1:
        first = replace(first, words=first.words + f" (all {len(nodes)} calls)")
    return first, [node for _, consumed in found for node in consumed]


def _follow(
    node: Node, modules: Mapping[str, nn.Module], norms: Mapping[str, int], calls: int, *, sums: bool, norm: bool
) -> tuple[Reading, list[tuple[str, Node]]]:
    """What stands between a layer's call and the first thing that is not understood, and the nodes of it, each with the part it is."""
    current, in_place = node, True
    found = Reading(IDENTITY, "")
    seen: list[str] = []
    consumed: list[tuple[str, Node]] = []

    def end(words: str, activation: Activation = IDENTITY) -> tuple[Reading, list[tuple[str, Node]]]:
        return replace(found, activation=activation, words="; ".join([*seen, words])), consumed

    while True:
        users = [user for user in current.users if not reads_shape(user)]
        if len(users) != 1:
            if not users:
                return end("its output is not used")
            return end(f"its output is read {len(users)} times, so the pre-activation is matched")
        following = users[0]
        if following.op == "output":
            return end("it is the network's output")
        own_norm = norm_of(following, modules)
        if own_norm and norm and current is node and norms[own_norm] == calls:
            found, part = replace(found, norm=own_norm), "norm"
            seen.append(f"batch-norm {own_norm} folded in")
        elif sums and in_place and not found.total and found.pool is None and adds(following, current):
            found, part = replace(found, total=following.name), "branch"
            other = next(argument for argument in following.args if argument is not current)
            seen.append(f"added to {label(other, modules) if isinstance(other, Node) else other}")
        elif in_place and found.pool is None and (pool := pool_of(following, modules)) is not None:
            found, part = replace(found, pool=pool), "pool"
            seen.append(f"max-pooling {'x'.join(map(str, pool.kernel))}")
        elif (activation := activation_of(following, modules)) is not None:
            if not activation.exact:
                found = replace(found, pool=None)
                return end(f"{activation.name}, not piecewise linear, so the pre-activation is matched", activation)
            consumed.append(("activation", following))
            after = [user for user in following.users if not reads_shape(user)]
            pool = pool_of(after[0], modules) if len(after) == 1 and in_place and found.pool is None else None
            if pool is not None:
                consumed.append(("pool", after[0]))
                found = replace(found, pool=pool)
                return end(f"{activation.name} and max-pooling {'x'.join(map(str, pool.kernel))}, seen in the graph", activation)
            return end(f"{activation.name}, seen in the graph", activation)
        elif passes(following, modules):
            in_place = in_place and keeps_places(following, modules)
            current = following
            continue
        else:
            return end(f"followed by {label(following, modules)}, so the pre-activation is matched")
        consumed.append((part, following))
        current = following


def _chain(
    graph: fx.Graph,
    modules: Mapping[str, nn.Module],
    layers: Mapping[str, str],
    consumed: set[Node],
    contradicted: set[str],
    apart: set[Node],
    *,
    last: bool,
) -> Chain:
    """Follows the one path from the first layer asked for (or the ``last`` one) to the output, as far as there is one.

    Nothing before the first matters: both networks agree there, and so do branches that depend on none of the layers. From the last
    one on, the sum that its reading names may hold other branches: its distance is that of the whole sum. ``layers`` maps each layer to
    that sum. ``apart`` are the nodes at which the two networks differ besides: no step of a chain speaks of them.
    """
    used = _used(graph)
    calls = [node for node in graph.nodes if node in used and _changes(node, layers)]
    if not calls:
        return Chain((), "no layer that can be pruned is on the way to the output")
    changed = _depending([*calls, *apart])
    steps: list[Step] = []
    seen: set[str] = set()
    waiting = ""  # the sum that the last layer's reading speaks of, until it is passed: a step speaks of the whole sum or not at all

    def ended(reason: str) -> Chain:
        return Chain(tuple(steps[:-1] if waiting else steps), reason)

    begin = node = calls[-1] if last else next(node for node in graph.nodes if node in calls or (node in used and node in apart))
    while True:
        if node in apart:
            return ended(f"{label(node, modules)} was changed too, and is no certified layer")
        name = str(node.target) if node.op == "call_module" else ""
        if node.op == "output":
            if node.args[0] not in changed:
                return ended("the output is more than one tensor")
            aside = [str(call.target) for call in calls if str(call.target) not in seen]
            return ended(f"layer {aside[0]!r} is on another path" if aside and not last else "")
        inputs = [argument for argument in node.all_input_nodes if argument in changed and not reads_shape(argument)]
        others = len(node.all_input_nodes) - len(inputs)  # a sum that a reading names was seen to have the layer's own shape
        whole = last and node.name == layers.get(str(begin.target))
        if node is not begin and not whole and (len(inputs) != 1 or (others and node not in consumed)):
            moved = next((other for other in graph.nodes if other in apart and not _depending([other]).isdisjoint(inputs)), None)
            also = "" if moved is None else f", and {label(moved, modules)} was changed too"
            return ended(f"{label(node, modules)} has more than one input{also}")
        if name and hooked(modules[name]):
            return ended(f"{label(node, modules)} has hooks, whose effect is not known")
        # a layer that is not pruned counts only when it is known to compute x W + b; those that are pruned were checked on data
        if name and (name in layers or type(modules[name]) in (nn.Linear, nn.Conv1d, nn.Conv2d)):
            if name in seen:
                return ended(f"layer {name!r} is called more than once")
            if name in contradicted:
                return ended(_contradicts(name))
            seen.add(name)
            steps.append(Step(name))
            waiting = layers.get(name, "")
        elif node in consumed or passes(node, modules) or adds_number(node):
            pass
        elif norm_of(node, modules) is not None:
            steps.append(Step(None, norm_lipschitz(modules[name])))
        elif (pooling := pooling_lipschitz(node, modules)) is not None:
            steps.append(Step(None, pooling))
        else:
            activation = activation_of(node, modules)
            if activation is None or activation.lipschitz is None:
                return ended(f"no Lipschitz constant is known for {label(node, modules)}")
            if activation.lipschitz != 1.0:
                steps.append(Step(None, activation.lipschitz))
        if node.name == waiting:
            waiting = ""
        readers = [user for user in node.users if not reads_shape(user)]
        users = [user for user in readers if user in used]
        if len(users) != 1:
            return ended(f"the path branches after {label(node, modules)}")
        if len(readers) > 1:  # what no result comes of may still change the tensor in place
            return ended(f"{label(node, modules)} is also read where nothing comes of it, perhaps to change it in place")
        node = users[0]


def calls_layer(node: Node, layer: str) -> bool:
    """Whether a node's values, and not only their shape, depend on a call of that layer."""
    return any(found.op == "call_module" and found.target == layer for found in _needed([node], shapes=False))


def _inside(layer: str, module: str) -> bool:
    """Whether a layer is that module or lies in it."""
    return layer == module or layer.startswith(module + ".")


def _changes(node: Node, layers: Iterable[str]) -> bool:
    """Whether pruning changes what a node gives: it calls a layer, or a module that hides one, or reads a layer's parameters."""
    if node.op == "call_module":
        return any(_inside(layer, str(node.target)) for layer in layers)
    return node.op == "get_attr" and any(str(node.target).startswith(layer + ".") for layer in layers)


def _is_counter(key: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether an entry of the state is a batch-norm's count of batches, which is read in training only."""
    owner, _, entry = key.rpartition(".")
    return entry == "num_batches_tracked" and type(modules.get(owner)) in COUNTING


def _differs(node: Node, moved: Collection[str], folded: tuple[str, ...]) -> bool:
    """Whether a node calls or reads what differs; a batch-norm that is ``folded`` into a layer is called as a part of it."""
    target = str(node.target)
    if node.op == "call_module":
        return any(key.startswith(f"{target}.") and not key.startswith(folded) for key in moved)
    return node.op == "get_attr" and any(key == target or key.startswith(f"{target}.") for key in moved)


def _depending(nodes: Iterable[Node]) -> set[Node]:
    """These nodes and all that depend on them."""
    found: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.users
    return found


def _used(graph: fx.Graph) -> set[Node]:
    """The nodes that the output depends on."""
    return _needed(node for node in graph.nodes if node.op == "output")


def _needed(nodes: Iterable[Node], *, shapes: bool = True) -> set[Node]:
    """These nodes and all that they depend on; without ``shapes``, leaving out what only a shape is read of."""
    found: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes if shapes or not reads_shape(node) else []
    return found
