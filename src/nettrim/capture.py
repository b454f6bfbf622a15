"""Layer inputs and outputs on calibration data. Works on copies in eval mode, and removes its hooks whatever happens."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from . import calibration as data
from .arithmetic import full_float32
from .calibration import Calibration
from .diagnosis import check_first, must_run
from .graph import Graph, calls_layer, read
from .layers import LayerView, widened
from .outputs import disagreement, outputs_of
from .preimage import Activation
from .status import InvalidInput, first_line
from .tasks import LayerTask, TaskBuilder
from .units import Call, Unit, unit_of

LARGEST = 1e100  # of values whose squares are summed: with weights of any float32 size between them, nothing leaves float64's range


class _LastCall(BaseException):
    """Ends a forward pass once the last call that is wanted has been seen; a model's own ``except Exception`` does not stop it."""


@dataclass
class Replica:
    """A copy of a model for calibration passes: eval mode, on ``device``, in float64 where the model allows it.

    ``dtype`` is the arithmetic of the passes (``None``: the model's own; what the layers themselves put out is then computed in float64
    beside it, see :class:`nettrim.units.Call`). ``graph`` says what follows each layer, once it is known.
    """

    model: nn.Module
    device: torch.device
    dtype: torch.dtype | None
    graph: Graph | None = None
    _tapped: fx.GraphModule | None = None

    @property
    def precision(self) -> float:
        """The unit of rounding of its passes."""
        if self.dtype is not None:
            return torch.finfo(self.dtype).eps
        return max(
            (torch.finfo(p.dtype).eps for p in self.model.parameters() if p.is_floating_point()), default=torch.finfo(torch.float32).eps
        )

    def views(self, names: Sequence[str]) -> dict[str, LayerView]:
        """The matrix views of its layers, which were checked when they were selected; to be read, in float64 where its passes are not."""
        modules = self._modules(names)
        return {name: LayerView(name, modules[name]) for name in names}

    def _modules(self, names: Sequence[str]) -> dict[str, nn.Module]:
        modules = dict(self.model.named_modules())
        return modules if self.dtype is not None else modules | {name: widened(modules[name]) for name in names}

    def units(self, names: Sequence[str]) -> dict[str, Unit]:
        """Its layers with what follows them, as :meth:`views`."""
        assert self.graph is not None
        modules = self._modules(names)
        return {name: unit_of(name, modules, self.graph.readings[name]) for name in names}

    def run(self, batch: Any) -> Any:
        """One forward pass without gradients."""
        return self._forward(self.model, batch)

    def _forward(self, module: nn.Module, batch: Any) -> Any:
        with torch.no_grad(), full_float32():
            return data.forward(module, batch, self.device, self.dtype)

    def stream(self, batch: Any, names: Sequence[str], receive: Callable[[str, Call], None], expected: int | None = None) -> Any:
        """One forward pass; every call of the named layers goes to ``receive`` as soon as all of it is known. Returns the output.

        With ``expected``, the pass ends after that many calls and the output is ``None``.
        """
        readings = {} if self.graph is None else self.graph.readings
        summed = [name for name in names if name in readings and readings[name].total]
        wide = self.views(names) if self.dtype is None else {}
        waiting: dict[str, Call] = {}
        count = 0

        def done(name: str, call: Call) -> None:
            nonlocal count
            receive(name, call)
            count += 1
            if expected is not None and count >= expected:
                raise _LastCall

        def keep(name: str, x: Tensor, y: Tensor) -> None:
            # copies: what comes later in the pass may change either in place (an activation with inplace=True, a residual +=)
            x, y = x.clone(), y.clone()
            call = Call(x, y) if name not in wide else Call(x.double(), wide[name].respond(x.double()), seen=y)
            if name in summed:
                waiting[name] = call
            else:
                done(name, call)

        def add(name: str, branch: Any) -> None:
            call = waiting.pop(name)
            done(name, replace(call, branch=branch.clone() if isinstance(branch, Tensor) else torch.full_like(call.y, branch)))

        with _hooks(self.model, names, keep), self._taps(summed, add) as module:
            try:
                return self._forward(module, batch)
            except _LastCall:
                return None

    def calls(self, batch: Any, names: Sequence[str], expected: int | None = None) -> tuple[dict[str, list[Call]], Any]:
        """One forward pass; every call of the named layers, and the network's output. ``expected`` as in :meth:`stream`."""
        seen: dict[str, list[Call]] = {name: [] for name in names}
        output = self.stream(batch, names, lambda name, call: seen[name].append(call), expected)
        return seen, output

    @contextmanager
    def _taps(self, summed: Sequence[str], receive: Callable[[str, Any], None]) -> Iterator[nn.Module]:
        """The module to run: the model itself, or one made from its graph that also hands out what is added to these layers."""
        if not summed:
            yield self.model
            return
        if self._tapped is None:
            self._tapped = self._made_from_graph()
        taps = {name: cast(_Tap, self._tapped.get_submodule(_tap_name(name))) for name in summed}
        try:
            for name, tap in taps.items():
                tap.receive = partial(receive, name)
            yield self._tapped
        finally:
            for tap in taps.values():
                tap.receive = None

    def _made_from_graph(self) -> fx.GraphModule:
        """The traced graph over this model's own modules, with a tap on what goes into every sum that a reading names."""
        assert self.graph is not None and self.graph.traced is not None
        for name, constant in self.graph.constants.items():
            setattr(self.model, name, constant.to(self.device))
        made = fx.GraphModule(self.model, copy.deepcopy(self.graph.traced))
        nodes = {node.name: node for node in made.graph.nodes}
        for name, reading in self.graph.readings.items():
            if reading.total:
                made.add_submodule(_tap_name(name), _Tap())
                total = nodes[reading.total]
                (branch,) = (term for term in total.args if not (isinstance(term, fx.Node) and calls_layer(term, name)))
                with made.graph.inserting_before(total):
                    made.graph.call_module(_tap_name(name), (branch,))
        made.recompile()
        return made


class _Tap(nn.Module):
    """Hands on what passes."""

    receive: Callable[[Any], None] | None = None

    def forward(self, x: Any) -> None:
        if self.receive is not None:
            self.receive(x)


def _tap_name(layer: str) -> str:
    return "nettrim_tap_" + layer.replace(".", "_")


@contextmanager
def _hooks(model: nn.Module, names: Sequence[str], receive: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Forward hooks on the named layers that pass name, input and output on to ``receive``; always removed."""
    modules = dict(model.named_modules())
    handles = []
    try:
        for name in names:

            def hook(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any, name: str = name) -> None:
                receive(name, inputs[0] if inputs else next(iter(keywords.values())), output)

            handles.append(modules[name].register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def random_state_kept(place: torch.device) -> Iterator[None]:
    """Leaves torch's random state as it was: a DataLoader draws from it in every pass, shuffled or not, and ``torch.manual_seed`` sets that
    of every GPU."""
    used = place.type == "cuda" or torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if used else []):
        yield


def device_of(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """Where the work is done: on the device given, or on that of the model's first parameter; on the CPU when that has no float64.

    Raises:
        InvalidInput: no such device.
    """
    first = next(model.parameters(), None)
    try:
        place = torch.device(device) if device is not None else torch.device("cpu") if first is None else first.device
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError, TypeError) as error:
        there = ", ".join(repr(name) for name in ("cpu", *accelerators()))
        raise InvalidInput(f"device {device!r} cannot be used here; on this machine there is {there} ({first_line(error)})") from error
    return torch.device("cpu") if place.type == "mps" else place


def accelerators() -> list[str]:
    """The devices beside the CPU that torch finds here."""
    found = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return found + (["mps"] if torch.backends.mps.is_available() else [])


def replicate(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> Replica:
    """A deep copy in eval mode; ``dtype`` float64 or ``None`` for the model's own."""
    try:
        twin = copy.deepcopy(model)
    except Exception as error:
        raise InvalidInput(
            f"the model ({type(model).__name__}) cannot be copied with copy.deepcopy ({first_line(error)}); detach or remove tensors that "
            "it keeps from earlier passes, and make wrapped weights plain (torch.nn.utils.prune.remove, remove_weight_norm)"
        ) from error
    twin = twin.to(device).eval()
    return Replica(twin.double() if dtype == torch.float64 else twin, device, dtype)


def reference_replica(model: nn.Module, device: torch.device, first_batch: Any) -> tuple[Replica, str]:
    """The reference network in float64, or in its own dtype when it does not run in float64; with a notice in that case.

    Raises:
        InvalidInput: the model does not run on the batch, puts out nothing that can be compared, or is not deterministic.
    """
    native = replicate(model, device, None)
    with must_run(native.model, native.run, first_batch, "the model cannot run on the first batch of the calibration data"):
        output = check_first(native.model, native.run, first_batch)
    outputs_of(output)
    wide, notice = replicate(model, device, torch.float64), ""
    try:
        output = wide.run(first_batch)
    except Exception as error:
        wide = native
        notice = f"the model does not run in float64 ({first_line(error)}): calibration passes ran in its own dtype"
    other = disagreement(output, wide.run(first_batch), wide.precision)
    if other:
        raise InvalidInput(
            f"the model gives two different outputs for one batch in eval mode ({other}); what is guaranteed needs a model without "
            "randomness or memory: take out sampling, dropout with training=True, counters and clocks"
        )
    return wide, notice


def read_graph(reference: Replica, names: Sequence[str], stated: Mapping[str, Activation], batch: Any) -> Graph:
    """Reads the reference network's graph for calls like that of ``batch``, and checks on it that the graph computes the same."""
    given = data.keywords_of(batch)

    def agrees(module: nn.Module) -> bool:
        traced = Replica(module, reference.device, reference.dtype)
        return not disagreement(reference.run(batch), traced.run(batch), reference.precision)

    graph = read(reference.model, names, stated, given=given, agrees=agrees)
    misfits = _misfits(replace(reference, graph=graph), batch)
    return read(reference.model, names, stated, given=given, agrees=agrees, plain=misfits) if misfits else graph


def _misfits(reference: Replica, batch: Any) -> list[str]:
    """Layers whose sum has another shape than their output, or whose batch-norm runs over another dimension than their outputs."""
    assert reference.graph is not None
    wanted = [name for name, reading in reference.graph.readings.items() if reading.total or reading.norm or reading.pool]
    views = reference.views(wanted)
    found: list[str] = []

    def check(name: str, call: Call) -> None:
        moved = call.branch is not None and np.broadcast_shapes(call.branch.shape, call.y.shape) != call.y.shape
        reading = reference.graph.readings[name]  # type: ignore[union-attr]
        if moved or ((reading.norm or reading.pool) and views[name].convolution is None and call.y.ndim != 2):
            found.append(name)

    if wanted:
        reference.stream(batch, wanted, check)
    return found


@dataclass
class Scan:
    """What one pass over the calibration data found: called layers in order, rows and calls of each, samples, data hash."""

    order: list[str] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    samples: int = 0
    sample_shape: tuple[int, ...] = ()
    data_hash: str = ""


def scan(reference: Replica, names: Sequence[str], batches: Calibration, largest: float = LARGEST) -> Scan:
    """The first pass: refuses NaN or inf inside the network, values above ``largest``, and layers that do not compute ``x W + b``; counts
    rows, hashes the data."""
    result = Scan()
    views = reference.views(names)
    digest = hashlib.sha256()
    for number, batch in enumerate(batches, 1):
        data.update_hash(digest, batch)
        counts = dict.fromkeys(names, 0)
        order: list[str] = []

        def receive(name: str, call: Call, counts: dict[str, int] = counts, order: list[str] = order, number: int = number) -> None:
            call = call.native()
            if not bool(torch.isfinite(call.y).all()):
                raise InvalidInput(
                    f"{batches.what}: batch {number} makes layer {name!r} put out NaN or inf; check its weights and the data"
                )
            _refuse_too_large((call.x, call.y), largest, f"{batches.what}: batch {number}: the inputs and outputs of layer {name!r}")
            rows = call.y.numel() // views[name].shape[1]
            if rows and not result.rows.get(name):
                _check_affine(views[name], call, reference.precision)
            result.rows[name] = result.rows.get(name, 0) + rows
            counts[name] += 1
            if rows:  # a layer that is only ever called with nothing is not reached by the data
                order.append(name)

        with must_run(reference.model, reference.run, batch, f"{batches.what}: the model cannot run on batch {number}"):
            output = reference.stream(batch, names, receive)
        for name in dict.fromkeys(order):
            result.calls[name] = max(result.calls.get(name, 0), counts[name])
        for path, value in outputs_of(output).scores.items():
            if not bool(torch.isfinite(value).all()):
                where = f" in {path!r}" if path else ""
                raise InvalidInput(
                    f"{batches.what}: the network puts out NaN or inf on batch {number}{where}; check its weights and the data"
                )
            _refuse_too_large([value], largest, f"{batches.what}: batch {number}: the network's outputs")
        if number == 1:
            result.sample_shape = data.sample_shape(batch)
        result.order += [name for name in dict.fromkeys(order) if name not in result.order]
        result.samples += data.samples(batch)
    result.data_hash = digest.hexdigest()
    return result


def _refuse_too_large(tensors: Iterable[Tensor], largest: float, what: str) -> None:
    """Refuses values whose squares cannot be summed in float64."""
    found = max((float(tensor.abs().max()) for tensor in tensors if tensor.numel()), default=0.0)
    if found > largest:
        raise InvalidInput(f"{what} must be at most {largest:g} in size, found {found:.3g}; scale the weights or the data")


def _check_affine(layer: LayerView, call: Call, precision: float) -> None:
    """Refuses a layer whose output is not its input times its weight plus bias (a subclass with its own forward, a hook)."""
    b = layer.bias()
    y = layer.outputs(call.y).double()
    some = torch.arange(0, len(y), max(1, len(y) // 256), device=y.device)
    W = layer.weights().double()
    blocks = layer.rows(call.x, some).double().reshape(len(some), layer.groups, -1)
    columns = W.reshape(len(W), layer.groups, -1)
    own = torch.einsum("pgn,ngm->pgm", blocks, columns).reshape(len(some), -1) + (0.0 if b is None else b.double())
    size = torch.einsum("pgn,ngm->pgm", blocks.abs(), columns.abs()).max() + (0.0 if b is None else b.double().abs().max())
    if float((own - y[some]).abs().max()) > min(1e3 * precision, 1e-3 + 16 * precision) * float(size):
        raise InvalidInput(
            f"layer {layer.name!r} ({layer.kind}) does not put out its input times its weight plus its bias: a forward of its own, or a "
            f"hook, changes that; merge or remove it, or pass ignore=[{layer.name!r}]"
        )


class Selection:
    """At most ``limit`` of ``total`` rows, chosen with ``seed``; the same rows for every layer with that many."""

    def __init__(self, total: int, limit: int, seed: int) -> None:
        self.total, self.count = total, min(total, limit)
        self.everything = total <= limit
        chosen = (
            np.arange(0) if self.everything else np.random.default_rng([seed, total]).choice(total, limit, replace=False, shuffle=False)
        )
        self.chosen = np.sort(chosen)

    def within(self, start: int, length: int) -> Tensor | slice:
        """Which rows of the block ``[start, start + length)`` are chosen, relative to its start."""
        if self.everything:
            return slice(None)
        first, last = np.searchsorted(self.chosen, (start, start + length))
        return torch.from_numpy(self.chosen[first:last] - start)


def selection_for(unit: Unit, rows: int, max_samples: int, seed: int) -> Selection:
    """The rows that a layer's program uses: all of them where moments say everything and rows are cheap, otherwise a sample."""
    return Selection(rows, rows if unit.uses_moments and unit.view.convolution is None else max_samples, seed)


def layer_task(
    name: str,
    reference: Replica,
    pruned: Replica | None,
    batches: Calibration,
    found: Scan,
    *,
    max_samples: int,
    seed: int,
    correction: float = 1.0,
    dtype: torch.dtype,
    importance: Tensor | None = None,
) -> LayerTask:
    """The programs of one layer: inputs from ``pruned`` (cascade) or, when that is ``None``, from ``reference`` (parallel).

    Programs whose boxes are points are accumulated as moments. Others keep at most ``max_samples`` rows, at 8 bytes * rows * (N + 3 M)
    and half as much again while they are solved.
    """
    unit = reference.units([name])[name]
    selection = selection_for(unit, found.rows[name], max_samples, seed)
    standing = unit if pruned is None else pruned.units([name])[name]  # its offset may have changed in an earlier sweep
    task = TaskBuilder(unit, selection.count, dtype, name)
    start = 0
    for batch in batches:
        expected = reference.calls(batch, [name], found.calls[name])[0][name]
        given = expected if pruned is None else pruned.calls(batch, [name], found.calls[name])[0][name]
        for before, own in paired(name, expected, given):
            lo, hi, Y = unit.target(before, own if correction < 1 and pruned is not None else None, correction)
            rows = selection.within(start, len(Y))
            shift = standing.shift(own)
            if shift is not None:
                lo, hi = lo - shift, hi - shift
            task.add(unit.view.rows(own.x, rows), lo[rows], hi[rows], Y[rows])
            start += len(Y)
    return task.build(importance)


def paired(name: str, before: Sequence[Call], after: Sequence[Call]) -> Iterator[tuple[Call, Call]]:
    """The calls of a layer in the reference and in the pruned network, one by one.

    Raises:
        InvalidInput: the two networks call the layer a different number of times or with different rows.
    """
    if [call.x.shape for call in before] != [call.x.shape for call in after]:
        raise InvalidInput(
            f"layer {name!r} sees other rows in the pruned network than in the reference network, since the model chooses by its data what "
            f"goes where; they cannot be compared: pass ignore=[{name!r}]"
        )
    return zip(before, after, strict=True)


def hashes(model: nn.Module) -> str:
    """SHA-256 of a model's state dict."""
    state: Mapping[str, Tensor] = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    return data.state_hash(state)
