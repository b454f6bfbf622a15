"""The arrangements of a model's layers that are worth timing as a whole, and what each layer takes alone."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..calibration import inputs_of, keywords_of
from ..capture import Replica
from ..graph import read
from ..nodes import hooked
from ..outputs import outputs_of
from ..progress import Advance, counted, silent
from ..status import first_line
from .regions import Placed, Shapes, able, rebuilt, recorded, shapes_of
from .sparse_chain import SparseChain, csr
from .sparse_module import SparseModule
from .sparse_region import SparseRegion
from .sparse_steps import SparseWeights, Step, sparse_weights, window_of
from .timing import side_by_side

CHUNKS = (8, 16, 32, 64, 128)
"""Rows of the batch computed at a time that are tried, beside the whole batch."""
SEARCHED = 5
"""Rounds in which parts are compared; whole models get `timing.ROUNDS`."""
_Runs = dict[str, dict[str, list[Callable[[], Any]]]]
"""By layer and kind, what runs each of its calls."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A module that computes what the model does; ``kinds`` of the layers that are not dense in it."""

    module: nn.Module
    kinds: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Found:
    """Candidates by name, seconds of layers alone by kind, why layers have no sparse kernel, and notes."""

    candidates: dict[str, Candidate]
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    unable: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that are reported: Linear and convolutions, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))}


def search(
    twin: Replica, example: Any, budget: float, native: bool, agrees: Callable[[nn.Module], bool], advance: Advance = silent
) -> Found:
    """All candidates on the CPU; ``native``: whether numba is there. ``agrees`` says whether a module computes what the model does."""
    found = Found({"dense": Candidate(twin.model, {})})
    for name, layer in layers_of(twin.model).items():
        reason = able(layer, native)
        if reason:
            found.unable[name] = reason
    if not native:
        found.notes.append('numba is not installed: convolutions stay dense (pip install "nettrim[fast]")')
    watched = [name for name, module in twin.model.named_modules() if hooked(module) and _opened(module, name)]
    if watched:  # a hook would meet the tracer's stand-ins, and not be called any more
        words = ", ".join(f"of {name}" if name else "of the model itself" for name in watched)
        found.notes.append(f"the hooks {words} would be lost in a traced graph: layers are accelerated one at a time")
        _one_by_one(twin, example, budget, native, found)
        return found
    inputs = inputs_of(example)
    graph = read(twin.model, (), given=keywords_of(example), agrees=agrees)
    if graph.traced is None or twin.model in layers_of(twin.model).values():
        if graph.traced is None:
            found.notes.append(f"{graph.notice.removesuffix(': matched linearly')}: layers are accelerated one at a time")
        _one_by_one(twin, example, budget, native, found)
    else:
        _Regions(twin, graph.traced, inputs, budget, native, found).search(advance)
    return found


def _opened(module: nn.Module, name: str) -> bool:
    """True for a module that tracing goes into; the model itself always is."""
    return not name or not fx.Tracer().is_leaf_module(module, name)


class _Regions:
    """Candidates in which layers that follow each other run in one region."""

    def __init__(self, twin: Replica, graph: fx.Graph, inputs: Any, budget: float, native: bool, found: Found) -> None:
        self.model, self.graph, self.budget, self.native, self.found = twin.model, graph, budget, native, found
        self.modules = dict(twin.model.named_modules())
        moved = {name: value.to(twin.device) if isinstance(value, Tensor) else value for name, value in _named(graph, inputs).items()}
        self.arguments = list(moved.values())
        self.values = recorded(fx.GraphModule(twin.model, graph), self.arguments)
        self.shapes: Shapes = shapes_of(self.values)

    def search(self, advance: Advance) -> None:
        called = {str(node.target) for node in self.graph.nodes if node.op == "call_module"}
        for name in layers_of(self.model):
            if name not in called:
                self.found.unable.setdefault(name, "its call is hidden from the graph")
        layers = [name for name in layers_of(self.model) if name not in self.found.unable]
        if not layers:
            return
        linear = [name for name in layers if isinstance(self.modules[name], nn.Linear)]
        csr_model, placed = self._made(linear, SparseChain, images=False)
        runs = self._runs(placed, "csr")
        if self.native:
            everything, placed = self._made(layers, SparseRegion)
            self._chunk(everything, placed)
            for name, kinds in self._runs(placed, "direct").items():
                runs[name] = {**runs.get(name, {}), **kinds}
        for name, kinds in counted(runs.items(), len(runs), advance, "timing layers"):
            self.found.seconds[name] = _seconds({kind: _all_of(calls) for kind, calls in kinds.items()}, self.budget / 5)
        faster = [name for name in linear if self._wins(name, "csr")]
        if self.native:
            inside = _layers_in(placed)
            if inside:
                self.found.candidates["every layer sparse"] = Candidate(everything, dict.fromkeys(inside, "direct"))
            wins = [name for name in inside if self._wins(name, "direct")]
            if wins and len(wins) < len(inside):
                some, placed = self._made(wins, SparseRegion)
                self._chunk(some, placed)
                self.found.candidates["sparse where faster alone"] = Candidate(some, dict.fromkeys(_layers_in(placed), "direct"))
            if not any(self.found.seconds[name]["csr"] < self.found.seconds[name].get("direct", math.inf) for name in faster):
                return
        if faster:
            if len(faster) < len(linear):
                csr_model, placed = self._made(faster, SparseChain, images=False)
            self.found.candidates["CSR where faster alone"] = Candidate(csr_model, dict.fromkeys(faster, "csr"))

    def _wins(self, name: str, kind: str) -> bool:
        seconds = self.found.seconds.get(name, {})
        return kind in seconds and seconds[kind] < seconds["dense"]

    def _made(self, layers: Collection[str], kind: type[nn.Module], images: bool = True) -> tuple[nn.Module, list[Placed]]:
        def make(steps: Sequence[Step], weights: Mapping[str, SparseWeights], image: Sequence[bool], outputs: Sequence[int]) -> nn.Module:
            if kind is SparseChain:
                return SparseChain(steps, weights, outputs)
            return SparseRegion(steps, weights, image, outputs)

        return rebuilt(self.model, self.graph, self.shapes, layers, make, images)

    def _chunk(self, module: nn.Module, placed: Sequence[Placed]) -> None:
        """Sets the chunk of the regions to the fastest, for the module as a whole."""
        regions = [place.module for place in placed if isinstance(place.module, SparseRegion)]
        if not regions:
            return
        rows = max(_rows(self.shapes[node]) for place in placed for node in place.inputs)
        sizes = [size for size in CHUNKS if size < rows] + ([rows] if rows <= 4 * CHUNKS[-1] else [])

        def under(size: int, alone: float | None) -> Callable[[], Any]:
            def run() -> None:
                for region, own in zip(regions, standard, strict=True):
                    region.chunk, region.alone = size, own if alone is None else alone
                module(*self.arguments)

            return run

        standard = [region.alone for region in regions]
        best = sizes[0] if sizes else 16
        if len(sizes) > 1:
            taken = _seconds({size: under(size, None) for size in sizes}, self.budget / 3)
            best = min(sizes, key=lambda size: taken[size])
        under(best, None)()
        if torch.get_num_threads() > 1:
            both = _seconds({alone: under(best, alone) for alone in (0.0, math.inf)}, self.budget / 3)
            single = both[math.inf] < both[0.0]
            under(best, None)()
            for place, region in zip(placed, regions, strict=True):
                work = region.workspace([self.values[node] for node in place.inputs]).plan.work
                # what was measured holds for about as much work, at other batch sizes too
                region.alone = max(region.alone, 1.5 * work) if single else min(region.alone, 0.5 * work)

    def _runs(self, placed: Sequence[Placed], kind: str) -> _Runs:
        """Every layer with what it is merged with: dense as it is, and sparse without the change of layout around its region."""
        found: _Runs = {}
        for place in placed:
            assert isinstance(place.module, (SparseRegion, SparseChain))
            native: dict[int, Callable[[], None]] = {}
            if isinstance(place.module, SparseRegion):
                workspace = place.module.workspace([self.values[node] for node in place.inputs])
                rows = _rows(self.shapes[place.inputs[0]])
                chunks = math.ceil(rows / min(rows, place.module.chunk))
                native = workspace.single(place.module.threads(workspace.plan.work), chunks)
            for number, (step, nodes) in enumerate(_steps(place)):
                if not step.layer:
                    continue
                calls = found.setdefault(str(nodes[0].target), {"dense": [], kind: []})
                calls["dense"].append(self._dense(nodes))
                calls[kind].append(native[number] if native else self._csr(step, place.module.weights[step.layer], nodes))
        return found

    def _dense(self, nodes: Sequence[fx.Node]) -> Callable[[], Any]:
        calls = []
        for node in nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda other: self.values[other])
            calls.append((self._function(node), args, kwargs))

        def run() -> None:
            for function, args, kwargs in calls:
                function(*args, **kwargs)

        return run

    def _function(self, node: fx.Node) -> Callable[..., Any]:
        function: Any = node.target
        if node.op == "call_module":
            function = self.modules[str(node.target)]
        elif node.op == "call_method":
            function = getattr(torch.Tensor, str(node.target))
        return lambda *args, **kwargs: function(*args, **kwargs)

    def _csr(self, step: Step, weights: SparseWeights, nodes: Sequence[fx.Node]) -> Callable[[], Any]:
        def features(node: fx.Node) -> Tensor:
            x: Tensor = self.values[node]
            return x.reshape(-1, x.shape[-1]).t().contiguous()

        matrix, bias, source = csr(weights), weights.bias[:, None], nodes[0].all_input_nodes[0]
        x = features(source)
        added = [features(other) for node in nodes[1:] for other in node.all_input_nodes if other not in nodes and other in self.shapes]

        def run() -> None:
            y = torch.addmm(bias, matrix, x)
            for other in added:
                y = y + other
            if (step.low, step.high) != (-math.inf, math.inf):
                y.clamp(step.low, step.high)

        return run


def _all_of(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """Several calls of a layer as one."""

    def run() -> None:
        for call in calls:
            call()

    return calls[0] if len(calls) == 1 else run


def _seconds(runs: Mapping[Any, Callable[[], Any]], budget: float) -> dict[Any, float]:
    """Medians of parts, on the clock of whole models."""
    return {key: passes.median for key, passes in side_by_side(runs, budget, SEARCHED).items()}


def _named(graph: fx.Graph, inputs: Any) -> dict[str, Any]:
    """The model's arguments by the names of the graph, those that keep their defaults left out."""
    names = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
    if not isinstance(inputs, Mapping):
        return {names[0]: inputs}
    return {name: inputs[name] for name in names if name in inputs}


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 4 else math.prod(shape[:-1])


def _layers_in(placed: Sequence[Placed]) -> list[str]:
    return [str(nodes[0].target) for place in placed for step, nodes in _steps(place) if step.layer]


def _steps(place: Placed) -> list[tuple[Step, tuple[fx.Node, ...]]]:
    assert isinstance(place.module, SparseModule)
    return list(zip(place.module.steps, place.members, strict=True))


def inputs_seen(twin: Replica, example: Any, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """What each layer is called with first in one pass over the example."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and isinstance(inputs[0], Tensor):
                seen.setdefault(name, inputs[0].detach().clone())

        return hook

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    try:
        twin.run(example)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _one_by_one(twin: Replica, example: Any, budget: float, native: bool, found: Found) -> None:
    """Candidate of a model whose graph is not known: each layer that is faster by itself, conversions included, is replaced."""
    layers = {name: layer for name, layer in layers_of(twin.model).items() if name not in found.unable}
    seen = inputs_seen(twin, example, layers)
    best: dict[str, tuple[str, nn.Module]] = {}
    for name, layer in layers.items():
        x = seen.get(name)
        if x is None or (isinstance(layer, nn.Conv2d) and x.ndim != 4) or not x.numel():
            found.unable[name] = (
                "the model did not call it on a batch of images" if isinstance(layer, nn.Conv2d) else "the model did not call it"
            )
            continue
        options = {kind: module.eval() for kind, module in _single(layer, native, len(x) if x.ndim == 4 else _rows(tuple(x.shape))).items()}
        seconds = found.seconds[name] = _seconds({kind: functools.partial(module, x) for kind, module in options.items()}, budget / 3)
        fastest = min(seconds, key=lambda kind: seconds[kind])
        if fastest != "dense":
            best[name] = (fastest, options[fastest])
    if not best:
        return
    if "" in best:  # the model is itself the layer
        found.candidates["sparse where faster alone"] = Candidate(best[""][1], {"": best[""][0]})
        return
    made = copy.deepcopy(twin.model)
    for name, (_, module) in best.items():
        made.set_submodule(name, module)
    try:
        outputs_of(Replica(made, twin.device, None).run(example))
    except Exception as error:  # a forward that reads its layers' weights, for one
        found.notes.append(f"the model does not run with its layers replaced ({first_line(error)}): it stays dense")
        return
    found.candidates["sparse where faster alone"] = Candidate(made, {name: kind for name, (kind, _) in best.items()})


def _single(layer: nn.Module, native: bool, rows: int) -> dict[str, nn.Module]:
    """The layer itself and modules that can take its place, by kind."""
    options: dict[str, nn.Module] = {"dense": layer}
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    weights = {"layer": sparse_weights(layer)}
    if isinstance(layer, nn.Conv2d):
        step = Step("conv", 0, 1, layer="layer", window=window_of(layer))
    else:
        step = Step("linear", 0, 1, layer="layer")
        options["csr"] = SparseChain([step], weights, [1])
    if native:
        options["direct"] = SparseRegion([step], weights, [isinstance(layer, nn.Conv2d)], [1], chunk=max(1, min(rows, 32)))
    return options
