"""How far pruning can move a network's output, before it is pruned: for every mask, for random ones, for the smallest weights.

The mathematics is in ``nettrim.bounds`` and docs/bounds.md; here a network becomes the numbers that it needs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import calibration as data_
from .attention import opened
from .bound_steps import Steps, steps_of
from .bounds.blocks import Block, Layer
from .bounds.masks import (
    BallTerms,
    DataTerms,
    ball_terms,
    check_rule,
    data_terms,
    exact_ball_terms,
    exact_data_terms,
)
from .bounds.propagation import at_most, lipschitz
from .bounds.tails import check_delta, check_positive, check_share
from .calibration import Batches, Calibration
from .capture import Replica, device_of, random_state_kept, read_graph, reference_replica, replicate, scan
from .methods.targets import PerLayer, check_target, target_for
from .outputs import outputs_of, square
from .progress import Advance, counted, shown
from .selection import resolve, select
from .status import InvalidInput
from .units import Call, Unit
from .wrappers import takes_models

Form = Literal["ball", "data"]
PATCH_ROWS = 1 << 16  # rows of patches in memory at a time
RESOLUTION = 1e-6  # of the largest share


@dataclass(frozen=True)
class LayerBound:
    """One layer of a bound: the share removed, ``discrepancy`` of its inputs and its response, at most.

    ``norm`` bounds the layer's operator norm, ``removed`` that of its removed part (ball form) or ``||X D||_F`` (data form).
    """

    name: str
    weights: int
    share: float
    norm: float
    removed: float
    discrepancy_before: float
    discrepancy: float


@dataclass(frozen=True)
class GapBound:
    """How far the output moves, at most.

    In the form "ball" ``value`` bounds ``sup over ||x|| <= radius of ||f_hat(x) - f(x)||_2``; in the form "data" ``||f_hat(X) - f(X)||_F``
    over the ``samples`` given, and ``relative`` divides by ``||f(X)||_F``. It holds with probability ``probability`` over what ``rule``
    leaves to chance.
    """

    value: float
    relative: float | None
    form: str
    rule: str
    delta: float | None
    radius: float | None
    samples: int | None
    layers: tuple[LayerBound, ...]

    @property
    def probability(self) -> float:
        """1 - delta; 1 where nothing is left to chance."""
        return 1.0 if self.delta is None else 1.0 - self.delta

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for JSON."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers], "probability": self.probability}

    def __str__(self) -> str:
        from .render.bounds import bound_text  # presentation stays in render

        return bound_text(self)

    __repr__ = __str__


class NetworkBounds:
    """The bounds of one network; made by :func:`network_bounds`, asked as often as wanted."""

    def __init__(
        self,
        reference: Replica,
        names: Sequence[str],
        path: Steps,
        layers: Mapping[str, Layer],
        radius: float | None,
        centre: Mapping[str, float],
        samples: int | None,
        output_norm: float,
    ) -> None:
        self._reference, self.names, self._path, self._layers = reference, tuple(names), path, layers
        self.radius, self.samples, self.output_norm = radius, samples, output_norm
        self._reach: dict[str, float] = {}
        if radius is not None:
            rates = lipschitz(path.steps, lambda name: layers[name].norm)
            self._reach = {name: centre[name] + radius * rate for name, rate in rates.items()}

    def __str__(self) -> str:
        from .render.bounds import bounds_text  # presentation stays in render

        return bounds_text(self)

    __repr__ = __str__

    @property
    def forms(self) -> tuple[Form, ...]:
        """The forms that can be asked for."""
        ball: tuple[Form, ...] = ("ball",) if self.radius is not None else ()
        return (*ball, "data") if self.samples is not None else ball

    def gap(self, share: PerLayer, delta: float = 0.05, *, rule: str = "random", form: Form | None = None) -> GapBound:
        """How far the output moves, at most, when the share ``share`` of each layer's weights is removed.

        Args:
            share: in [0, 1); or a mapping from layer name (or ``re:pattern``), the others being left alone.
            delta: in (0, 1): the probability over what ``rule`` leaves to chance with which the bound may fail.
            rule: "random" (exact counts, as nettrim.Random), "bernoulli", "magnitude" (under random signs), or "any" (every mask).
            form: "data" or "ball"; by default "data" where data were given.

        Raises:
            InvalidInput: a setting outside its range, or a form for which nothing was given.
        """
        rule, delta, form = check_rule(rule), check_delta(delta), self._form(form)
        shares = self._shares(share)
        each = delta / max(1, sum(own > 0 for own in shares.values()))
        ball = form == "ball"
        terms: dict[str, BallTerms | DataTerms] = {
            name: (ball_terms if ball else data_terms)(self._layers[name], rule, own, each) for name, own in shares.items()
        }
        return self._bound(terms, form, rule, None if rule == "any" or not any(shares.values()) else delta, shares)

    def largest_share(
        self, gap: float, delta: float = 0.05, *, rule: str = "random", form: Form | None = None, relative: bool = False
    ) -> float:
        """The largest share, one for all layers, whose bound is at most ``gap`` (of the output's norm on the data, when ``relative``).

        To 1e-6; 0.0 where no share is known to be safe. The bounds increase with the share (docs/bounds.md, 4.4), so bisection finds it.

        Raises:
            InvalidInput: a setting outside its range.
        """
        gap = check_positive("gap", gap, "the largest distance of the outputs")
        form = self._form(form)
        if relative and form != "data":
            raise InvalidInput("a relative gap needs data, to whose outputs it is relative: give data to network_bounds, or relative=False")
        limit = gap * self.output_norm if relative else gap
        low, high = 0.0, 1.0
        while high - low > RESOLUTION:
            middle = (low + high) / 2
            if self.gap(middle, delta, rule=rule, form=form).value <= limit:
                low = middle
            else:
                high = middle
        return low

    @takes_models("pruned")
    def of_pruned(self, pruned: nn.Module, *, form: Form | None = None) -> GapBound:
        """The bound for a pruned version in hand, whatever chose its weights: nothing is left to chance.

        Raises:
            InvalidInput: it is no version of this network whose chosen layers' weights alone differ, or holds NaN or inf.
        """
        form = self._form(form)
        twin = replicate(opened(pruned, encoders=False), self._reference.device, self._reference.dtype)
        self._check_same(twin)
        twin.graph = self._reference.graph
        units = twin.units(self.names)
        for name in self.names:
            if not bool(torch.isfinite(units[name].view.weights()).all()):
                raise InvalidInput(f"the pruned model's layer {name!r} holds NaN or inf, so nothing bounds what it does; prune it again")
        own = {name: _split(units[name], units[name].weights()) for name in self.names}
        exact = exact_ball_terms if form == "ball" else exact_data_terms
        terms: dict[str, BallTerms | DataTerms] = {name: exact(self._layers[name], own[name]) for name in self.names}
        shares = {
            name: sum(int(((W == 0) & (block.W != 0)).sum()) for W, block in zip(own[name], self._layers[name].blocks, strict=True))
            / max(1, self._layers[name].weights)
            for name in self.names
        }
        return self._bound(terms, form, "given", None, shares)

    def _bound(
        self, terms: Mapping[str, BallTerms | DataTerms], form: Form, rule: str, delta: float | None, shares: Mapping[str, float]
    ) -> GapBound:
        after: dict[str, float] = {}

        def moved(name: str, e: float) -> float:
            own = terms.get(name)
            if own is None:
                after[name] = self._layers[name].norm * e
            else:
                after[name] = own.moved(e, self._reach[name]) if isinstance(own, BallTerms) else own.moved(e)
            return after[name]

        value, before = at_most(self._path.steps, moved)
        layers = []
        for name in self._path.layers:
            if name in terms:
                own = terms[name]
                removed = own.removed if isinstance(own, BallTerms) else own.moved(0.0)
                layer = self._layers[name]
                layers.append(LayerBound(name, layer.weights, shares[name], layer.norm, removed, before[name], after[name]))
        on_data = form == "data"
        return GapBound(
            value=value,
            relative=value / self.output_norm if on_data and self.output_norm > 0 else None,
            form=form,
            rule=rule,
            delta=delta,
            radius=None if on_data else self.radius,
            samples=self.samples if on_data else None,
            layers=tuple(layers),
        )

    def _form(self, form: Form | None) -> Form:
        if form is None:
            return "data" if self.samples is not None else "ball"
        if form not in self.forms:
            known = {"ball": "a radius", "data": "data"}.get(form)
            if known is None:
                raise InvalidInput(f"form must be 'ball' or 'data', found {form!r}")
            raise InvalidInput(f"the form {form!r} needs {known}: pass {known.split()[-1]}= to network_bounds")
        return form

    def _shares(self, share: PerLayer) -> dict[str, float]:
        if isinstance(share, Mapping):
            check_target("bound", "sparsity", share)
            resolve(share, self.names, "share")
            return {name: target_for(share, name) or 0.0 for name in self.names}
        return dict.fromkeys(self.names, check_share(share))

    def _check_same(self, twin: Replica) -> None:
        own, other = self._reference.model.state_dict(), twin.model.state_dict()
        free = {f"{name}.weight" if name else "weight" for name in self.names}
        if own.keys() != other.keys() or any(own[key].shape != other[key].shape for key in own):
            raise InvalidInput(
                "the pruned model is another network than the one whose bounds these are: its state has other names or shapes"
            )
        changed = [key for key in own if key not in free and not torch.equal(own[key], other[key])]
        if changed:
            raise InvalidInput(
                f"the pruned model also differs in {', '.join(changed[:4])}; these bounds speak of removed weights only: use the "
                "certificate for methods that change biases, or add the layer to layers="
            )


@takes_models("model")
def network_bounds(
    model: nn.Module,
    data: Batches | None = None,
    *,
    radius: float | None = None,
    input_shape: Sequence[int] | None = None,
    layers: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    device: torch.device | str | None = None,
    progress: bool | Advance = True,
) -> NetworkBounds:
    """Reads a trained network for bounds of what pruning does to its output. ``model`` itself is left unchanged.

    Args:
        model: Linear and convolutional layers, each called once, with sums, batch-norm, pooling and Lipschitz activations between them.
        data: calibration batches as for :func:`nettrim.prune`: gives the form "data".
        radius: gives the form "ball", uniform over all inputs with ``||x||_2 <= radius`` (of one sample).
        input_shape: of one sample, for a radius without data.
        layers: which layers may be pruned; by default all (as for :func:`nettrim.prune`).
        ignore: the same, to leave out.
        progress: as for :func:`nettrim.prune`; a piece is a batch.

    Memory: 8 bytes * (N^2 + 3 N M) for each layer of M outputs of N inputs each, N^2 with data only.

    Raises:
        InvalidInput: an activation without a known Lipschitz constant, a layer called twice, neither data nor radius, and whatever
            :func:`nettrim.prune` refuses.
    """
    if data is None and radius is None:
        raise InvalidInput("a bound needs data=, or radius= for all inputs of at most that norm (or both): found neither")
    if radius is not None:
        radius = check_positive("radius", radius, "the largest norm of an input")
    if data is not None and input_shape is not None:
        raise InvalidInput(f"input_shape is for a radius without data, whose samples have a shape: leave it out, found {input_shape!r}")
    if data is None and not _is_shape(input_shape):
        raise InvalidInput(
            f"radius without data needs input_shape, the shape of one sample, found {input_shape!r}; for example (1, 28, 28)"
        )
    given, model = model, opened(model, encoders=False)
    names = select(model, layers, ignore, given)
    place = device_of(model, device)
    batches = Calibration([torch.zeros(1, *(input_shape or ()))] if data is None else data, "data")
    with random_state_kept(place), shown(progress) as advance:
        first = next(iter(batches))
        reference, _ = reference_replica(model, place, first)
        found = scan(reference, names, batches)
        names = list(found.order)
        if not names:
            raise InvalidInput("none of the layers that may be pruned is called on the data; choose others with layers=")
        reference.graph = read_graph(reference, names, {}, first)
        if reference.graph.traced is None:
            raise InvalidInput(
                f"{reference.graph.notice.partition(': matched')[0]}; bounds follow the graph: make the model traceable by torch.fx"
            )
        inputs = data_.inputs_of(first)
        if not isinstance(inputs, Tensor):
            raise InvalidInput(
                f"bounds need batches with one input tensor, found {type(inputs).__name__}; wrap the model in a module with one"
            )
        folded = {name: reading.norm for name, reading in reference.graph.readings.items() if reading.norm}
        batch = inputs.to(place, reference.dtype if inputs.is_floating_point() else None)
        path = steps_of(reference.model, reference.graph.traced, names, folded, (batch,))
        if radius is not None and path.not_uniform:
            raise InvalidInput(f"{path.not_uniform}, so nothing is known uniformly over inputs: leave radius= out and give data=")
        hidden = [name for name in names if name not in path.layers]
        if hidden:
            raise InvalidInput(
                f"the call of layer {hidden[0]!r} is hidden from the graph, so there is no bound: pass ignore=[{hidden[0]!r}]"
            )
        units = reference.units(names)
        grams, output_norm = ({}, 0.0) if data is None else _grams(reference, units, batches, advance)
        made = {name: _layer(units[name], grams.get(name)) for name in names}
        for name, view in reference.views([name for name in path.layers if name not in made]).items():
            made[name] = Layer(name, [Block(W) for W in view.weights().double().chunk(view.groups, dim=1)], view.operator_factor())
        for name, layer in made.items():
            if not math.isfinite(layer.factor):
                raise InvalidInput(
                    f"layer {name!r}: no bound is known for the operator norm of a convolution with its padding mode; use zeros"
                )
        centre = {} if radius is None else _at_zero(reference, path, inputs)
        return NetworkBounds(reference, names, path, made, radius, centre, None if data is None else found.samples, output_norm)


def _is_shape(found: object) -> bool:
    """Whether it is a sequence of whole numbers of at least 1."""
    return isinstance(found, Sequence) and all(not isinstance(n, bool) and isinstance(n, int) and n >= 1 for n in found)


def _split(unit: Unit, W: Tensor) -> list[Tensor]:
    """The weights (N, M) by group, without channels that batch-norm multiplies by zero: pruning leaves them out, too."""
    live = torch.ones(W.shape[1], dtype=torch.bool, device=W.device) if unit.fold is None else unit.fold.live
    return [part[:, own] for part, own in zip(W.chunk(unit.view.groups, dim=1), live.chunk(unit.view.groups), strict=True)]


def _layer(unit: Unit, grams: Sequence[Tensor] | None) -> Layer:
    parts = _split(unit, unit.weights())
    given = [None] * len(parts) if grams is None else grams
    blocks = [Block(W, G) for W, G in zip(parts, given, strict=True) if W.numel()]
    return Layer(unit.view.name, blocks, unit.view.operator_factor())


def _grams(reference: Replica, units: Mapping[str, Unit], batches: Calibration, advance: Advance) -> tuple[dict[str, list[Tensor]], float]:
    """``X^T X`` of every group of every layer over all rows, and ``||f(X)||_F``; one pass."""
    sums: dict[str, list[Tensor]] = {}
    squares = 0.0

    def receive(name: str, call: Call) -> None:
        view = units[name].view
        N, groups = view.shape[0], view.groups
        total = sums.setdefault(name, [torch.zeros(N, N, dtype=torch.float64, device=call.x.device) for _ in range(groups)])
        places = call.y.numel() // view.shape[1] // len(call.x) if view.convolution is not None else 1
        for part in torch.split(call.x, max(1, PATCH_ROWS // max(1, places))):
            rows = view.rows(part).double()
            for g, own in enumerate(total):
                block = rows[:, g * N : (g + 1) * N]
                own.addmm_(block.T, block)

    for batch in counted(batches, batches.count, advance, "reading the inputs of the layers"):
        output = reference.stream(batch, list(units), receive)
        squares += sum(square(value) for value in outputs_of(output).scores.values())
    return sums, math.sqrt(squares)


def _at_zero(reference: Replica, path: Steps, like: Tensor) -> dict[str, float]:
    """The norm of every layer's input at the input zero."""
    found: dict[str, float] = {}
    reference.stream(
        torch.zeros_like(like[:1]),
        list(path.layers),
        lambda name, call: found.update({name: float(torch.linalg.vector_norm(call.x.double()))}),
    )
    return found
