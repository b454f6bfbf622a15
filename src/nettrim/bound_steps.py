"""A traced network as the steps along which bounds travel (docs/bounds.md, section 1); refuses what has no known Lipschitz constant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from .bounds.propagation import Step
from .layers import is_prunable
from .nodes import activation_of, adds, adds_number, hooked, label, norm_lipschitz, norm_of, passes, pooling_lipschitz, reads_shape
from .status import InvalidInput

Node = fx.Node
_STACKS = {torch.cat, torch.concat, torch.concatenate}


@dataclass(frozen=True)
class Steps:
    """The steps of a network; ``layers`` are the layers on them, pruned or not, in order.

    ``not_uniform`` says why nothing can be said uniformly over inputs; empty where it can.
    """

    steps: tuple[Step, ...]
    layers: tuple[str, ...]
    not_uniform: str = ""


class _Shapes(fx.Interpreter):
    """Runs a graph and keeps the shape of every tensor, and the first pair (``stale``) of a node and one that reads what it gives after
    that has been changed in place."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[Node, torch.Size] = {}
        self.versions: dict[Node, int] = {}  # which torch counts up when a tensor, or a view of it, is written to
        self.stale: tuple[Node, Node] | None = None

    def run_node(self, n: Node) -> Any:
        for source in n.all_input_nodes:
            if source in self.versions and self.env[source]._version != self.versions[source] and not reads_shape(n):
                self.stale = self.stale or (source, n)
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = value.shape
            if not value.is_inference():  # those of torch.inference_mode count nothing; they can only be inputs here
                self.versions[n] = value._version
        return value


def steps_of(model: nn.Module, graph: fx.Graph, pruned: Iterable[str], folded: Mapping[str, str], inputs: tuple[Tensor, ...]) -> Steps:
    """The steps of a network in eval mode, from its traced graph.

    Args:
        pruned: names of the layers that may lose weights.
        folded: by name of such a layer, the batch-norm behind it that is part of its weights.
        inputs: one batch, in the order of the graph's placeholders: a sum needs terms of one shape.

    Raises:
        InvalidInput: a layer that is called more than once or has hooks, something behind pruned layers for which no bound is known, or a
            tensor that is changed in place before something else reads it.
    """
    run = _Shapes(fx.GraphModule(model, graph))
    with torch.no_grad():
        run.run(*inputs)
    modules = dict(model.named_modules())
    if run.stale is not None:
        changed, reader = (label(node, modules) for node in run.stale)
        raise InvalidInput(
            f"what {changed} gives is changed in place before {reader} reads it, which the graph does not show, so there is no bound: "
            "write the change as x = f(x), without a trailing underscore or inplace=True"
        )
    return _Reader(modules, set(pruned), dict(folded), run.shapes).read(run.module.graph)  # type: ignore[arg-type]


class _Reader:
    def __init__(self, modules: dict[str, nn.Module], pruned: set[str], folded: dict[str, str], shapes: Mapping[Node, torch.Size]) -> None:
        self.modules, self.pruned, self.folded, self.shapes = modules, pruned, folded, shapes
        self.steps: list[Step] = []
        self.at: dict[Node, int] = {}
        self.moved: set[Node] = set()  # nodes that pruning can change
        self.layers: list[str] = []
        self.not_uniform = ""
        self.sources = 0

    def read(self, graph: fx.Graph) -> Steps:
        for node in graph.nodes:
            if node.op == "output":
                break
            if reads_shape(node) or (node.op == "placeholder" and not node.users):
                continue
            self._node(node)
        (result,) = (node.args[0] for node in graph.nodes if node.op == "output")
        if not isinstance(result, Node) or result not in self.at:
            raise InvalidInput("the network's output must be one tensor for a bound; wrap the model in a module that returns its scores")
        if self.at[result] != len(self.steps) - 1:
            self.steps.append(Step("map", (self.at[result],)))
        if result not in self.moved:
            raise InvalidInput("no layer that may be pruned is on the way to the output; choose others with layers=")
        return Steps(tuple(self.steps), tuple(self.layers), self.not_uniform)

    def _node(self, node: Node) -> None:
        given = [argument for argument in node.all_input_nodes if argument in self.at]
        if any(argument in self.moved for argument in given):
            self.moved.add(node)
        name = str(node.target) if node.op == "call_module" else ""
        if name and is_prunable(self.modules[name]):
            self._layer(node, name, given)
        elif node.op == "placeholder":
            self.sources += 1
            if self.sources > 1:
                self.not_uniform = "the network has more than one input"
            self._add(node, Step("input"))
        elif node.op == "get_attr":
            owner = str(node.target).rpartition(".")[0]
            if owner in self.pruned:
                raise InvalidInput(
                    f"the network reads parameters of layer {owner!r} outside its call; no bound is known: pass ignore=[{owner!r}]"
                )
            self._add(node, Step("constant"))
        elif all(self.steps[self.at[argument]].kind == "constant" for argument in given):
            self._add(node, Step("constant"))
        else:
            self._map(node, name, given)

    def _layer(self, node: Node, name: str, given: list[Node]) -> None:
        if name in self.layers:
            self._refuse(node, f"layer {name!r} is called more than once, so its mask and its inputs are not independent")
        if len(given) != 1 or node.all_input_nodes != given:
            self._refuse(node, f"layer {name!r} is called with more than one tensor")
        if hooked(self.modules[name]):
            self._refuse(node, f"layer {name!r} has hooks, whose effect is not known; remove them")
        self.layers.append(name)
        if name in self.pruned:
            self.moved.add(node)
        self._add(node, Step("layer", (self.at[given[0]],), name=name))

    def _map(self, node: Node, name: str, given: list[Node]) -> None:
        inputs = tuple(self.at[argument] for argument in given)
        summed = node.op != "call_module" and len(given) == 2 and len(node.args) == 2 and adds(node, given[0])
        if summed and len({self.shapes.get(n) for n in (node, *given)}) == 1:
            self._add(node, Step("sum", inputs))
            return
        if node.op == "call_function" and node.target in _STACKS:
            # every piece counts, one that is given twice, too
            pieces = node.args[0] if node.args else node.kwargs.get("tensors")
            if isinstance(pieces, (tuple, list)):
                self._add(node, Step("stack", tuple(self.at[piece] for piece in pieces if isinstance(piece, Node) and piece in self.at)))
                return
        factor = self._lipschitz(node, name, given)
        if factor is not None:
            self._add(node, Step("map", inputs, lipschitz=factor))
            return
        where = label(node, self.modules)
        if node in self.moved:
            raise InvalidInput(
                f"no Lipschitz constant is known for {where}, which comes after layers that may be pruned, so there is no bound behind it; "
                "known are ReLU, LeakyReLU, Hardtanh, Sigmoid, Tanh, GELU, SiLU, batch-norm in eval mode, pooling, sums and reshaping: use "
                "one of these, or prune only layers behind it (layers=)"
            )
        self.not_uniform = f"no Lipschitz constant is known for {where}"
        self._add(node, Step("constant"))

    def _lipschitz(self, node: Node, name: str, given: list[Node]) -> float | None:
        if len(given) != 1 or (name and hooked(self.modules[name])):
            return None
        if passes(node, self.modules) or adds_number(node):
            return 1.0
        if norm_of(node, self.modules) is not None:
            before = str(given[0].target) if given[0].op == "call_module" else ""
            return 1.0 if self.folded.get(before) == name else norm_lipschitz(self.modules[name])
        if (pooling := pooling_lipschitz(node, self.modules)) is not None:
            return pooling
        activation = activation_of(node, self.modules)
        return None if activation is None else activation.lipschitz

    def _refuse(self, node: Node, reason: str) -> NoReturn:
        raise InvalidInput(f"{reason}: no bound is known at {label(node, self.modules)}; bounds need each layer to be called once")

    def _add(self, node: Node, step: Step) -> None:
        self.at[node] = len(self.steps)
        self.steps.append(step)
