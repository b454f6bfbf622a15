"""Layer inputs and outputs on calibration data. Works on copies in eval mode, and removes its hooks whatever happens."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from . import calibration as data
from .calibration import Calibration
from .graph import Graph, read
from .layers import LayerView
from .preimage import Activation
from .program import LayerProgram, Moments, from_rows
from .status import InvalidInput


class _LastCall(BaseException):
    """Ends a forward pass once the last call that is wanted has been seen; a model's own ``except Exception`` does not stop it."""


@dataclass
class Replica:
    """A copy of a model for calibration passes: eval mode, on ``device``, in float64 where the model allows it.

    ``dtype`` is the arithmetic of the passes (``None``: the model's own).
    """

    model: nn.Module
    device: torch.device
    dtype: torch.dtype | None

    @property
    def precision(self) -> float:
        """The unit of rounding of its passes."""
        if self.dtype is not None:
            return torch.finfo(self.dtype).eps
        return max(
            (torch.finfo(p.dtype).eps for p in self.model.parameters() if p.is_floating_point()), default=torch.finfo(torch.float32).eps
        )

    def views(self, names: Sequence[str]) -> dict[str, LayerView]:
        """The matrix views of its layers, which were checked when they were selected."""
        modules = dict(self.model.named_modules())
        return {name: LayerView(name, cast(nn.Linear, modules[name])) for name in names}

    def run(self, batch: Any) -> Any:
        """One forward pass without gradients."""
        with torch.no_grad():
            return data.forward(self.model, batch, self.device, self.dtype)

    def calls(self, batch: Any, names: Sequence[str], expected: int | None = None) -> tuple[dict[str, list[tuple[Tensor, Tensor]]], Any]:
        """One forward pass; the (input, output) of every call of the named layers as rows, and the network's output.

        With ``expected``, the pass ends after that many calls and the output is ``None``.
        """
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
        views = self.views(names)

        def keep(name: str, x: Tensor, y: Tensor) -> None:
            layer = views[name]
            # copies: what comes later in the pass may change either in place (an activation with inplace=True, a residual +=)
            seen[name].append((layer.rows(x).clone(), layer.outputs(y).clone()))
            if expected is not None and sum(map(len, seen.values())) >= expected:
                raise _LastCall

        with _hooks(self.model, names, keep):
            try:
                output = self.run(batch)
            except _LastCall:
                output = None
        return seen, output


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
    """Leaves torch's random state as it was: a DataLoader draws from it in every pass, shuffled or not."""
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
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
        raise InvalidInput(f"device {device!r} cannot be used here: {_first_line(error)}") from error
    return torch.device("cpu") if place.type == "mps" else place


def replicate(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> Replica:
    """A deep copy in eval mode; ``dtype`` float64 or ``None`` for the model's own."""
    try:
        twin = copy.deepcopy(model)
    except Exception as error:
        raise InvalidInput(
            f"the model ({type(model).__name__}) cannot be copied with copy.deepcopy ({_first_line(error)}); detach or remove tensors that "
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
    try:
        output = native.run(first_batch)
    except Exception as error:
        raise InvalidInput(f"the model cannot run on the first batch of the calibration data: {_first_line(error)}") from error
    data.output_tensors(output)
    wide, notice = replicate(model, device, torch.float64), ""
    try:
        output = wide.run(first_batch)
    except Exception as error:
        wide = native
        notice = f"the model does not run in float64 ({_first_line(error)}): calibration passes ran in its own dtype"
    if not _same_output(output, wide.run(first_batch), wide.precision):
        raise InvalidInput(
            "the model gives two different outputs for one batch in eval mode; what is guaranteed needs a model without randomness "
            "or memory: take out sampling, dropout with training=True and counters"
        )
    return wide, notice


def _same_output(before: Any, after: Any, precision: float) -> bool:
    """Whether two outputs agree up to rounding; NaN and inf, refused elsewhere, agree with themselves."""
    first, second = data.output_tensors(before), data.output_tensors(after)
    return first.keys() == second.keys() and all(
        Y.shape == second[key].shape
        and torch.allclose(second[key], Y, rtol=0.0, atol=1e4 * precision * float(Y.abs().nan_to_num(0, 0).max()), equal_nan=True)
        for key, Y in first.items()
        if Y.numel()
    )


def read_graph(reference: Replica, names: Sequence[str], stated: Mapping[str, Activation], batch: Any) -> Graph:
    """Reads the reference network's graph for calls like that of ``batch``, and checks on it that the graph computes the same."""
    inputs = data.inputs_of(batch)

    def agrees(module: nn.Module) -> bool:
        traced = Replica(module, reference.device, reference.dtype)
        return _same_output(reference.run(batch), traced.run(batch), reference.precision)

    return read(reference.model, names, stated, given=list(inputs) if isinstance(inputs, Mapping) else None, agrees=agrees)


@dataclass
class Scan:
    """What one pass over the calibration data found: called layers in order, rows and calls of each, samples, data hash."""

    order: list[str] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    samples: int = 0
    sample_shape: tuple[int, ...] = ()
    data_hash: str = ""


def scan(reference: Replica, names: Sequence[str], batches: Calibration) -> Scan:
    """The first pass: refuses NaN or inf inside the network and layers that do not compute ``x W + b``, counts rows, hashes the data."""
    result = Scan()
    digest = hashlib.sha256()
    for number, batch in enumerate(batches, 1):
        data.update_hash(digest, batch)
        try:
            seen, output = reference.calls(batch, names)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise InvalidInput(f"{batches.what}: the model cannot run on batch {number}: {_first_line(error)}") from error
        for name, calls in seen.items():
            for x, y in calls:
                if not bool(torch.isfinite(y).all()):
                    raise InvalidInput(
                        f"{batches.what}: batch {number} makes layer {name!r} put out NaN or inf; check its weights and the data"
                    )
                result.rows[name] = result.rows.get(name, 0) + len(x)
            if calls:
                if name not in result.calls:
                    _check_affine(reference.views([name])[name], *calls[0], reference.precision)
                result.calls[name] = max(result.calls.get(name, 0), len(calls))
        for value in data.output_tensors(output).values():
            if not bool(torch.isfinite(value).all()):
                raise InvalidInput(f"{batches.what}: the network puts out NaN or inf on batch {number}; check its weights and the data")
        if number == 1:
            result.order = _first_calls(reference, batch, [name for name, calls in seen.items() if calls])
            result.sample_shape = data.sample_shape(batch)
        result.order += [name for name, calls in seen.items() if calls and name not in result.order]
        result.samples += data.samples(batch)
    result.data_hash = digest.hexdigest()
    return result


def _check_affine(layer: LayerView, x: Tensor, y: Tensor, precision: float) -> None:
    """Refuses a layer whose output is not its input times its weight plus bias (a subclass with its own forward, a hook)."""
    b = layer.bias()
    own = x.double() @ layer.weights().double() + (0.0 if b is None else b.double())
    size = (x.double().abs() @ layer.weights().double().abs()).max() + (0.0 if b is None else b.double().abs().max())
    if float((own - y.double()).abs().max()) > 1e3 * precision * float(size):
        raise InvalidInput(
            f"layer {layer.name!r} ({layer.kind}) does not put out its input times its weight plus its bias: a forward of its own, or a "
            f"hook, changes that; merge or remove it, or pass ignore=[{layer.name!r}]"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _first_calls(replica: Replica, batch: Any, names: Sequence[str]) -> list[str]:
    """The names in the order of their first calls."""
    order: list[str] = []
    with _hooks(replica.model, names, lambda name, x, y: order.append(name)):
        replica.run(batch)
    return list(dict.fromkeys(order))


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


def layer_program(
    name: str,
    activation: Activation,
    reference: Replica,
    pruned: Replica | None,
    batches: Calibration,
    found: Scan,
    *,
    max_samples: int,
    seed: int,
    correction: float = 1.0,
    dtype: torch.dtype,
) -> LayerProgram:
    """The program of one layer: inputs from ``pruned`` (cascade) or, when that is ``None``, from ``reference`` (parallel).

    Programs whose boxes are points are accumulated as moments over all rows. Others keep at most ``max_samples`` rows, at
    8 bytes * rows * (N + 3 M) and half as much again while they are solved.
    """
    source = reference if pruned is None else pruned
    layer = reference.views([name])[name]
    W, b = layer.weights(), layer.bias()
    N, M = layer.shape
    moments = Moments(W, b, activation, dtype) if activation.is_point else None
    selection = Selection(found.rows[name], max_samples, seed)
    device = W.device
    kept_inputs = kept_reference = None
    if moments is None:
        kept_inputs = torch.empty(selection.count, N, dtype=torch.float64, device=device)
        kept_reference = torch.empty(selection.count, M, dtype=torch.float64, device=device)
    start = filled = 0
    for batch in batches:
        expected = reference.calls(batch, [name], found.calls[name])[0][name]
        given = expected if pruned is None else source.calls(batch, [name], found.calls[name])[0][name]
        for (_, z), (x, own) in paired(name, expected, given):
            Y = activation.apply(z.double())
            if pruned is not None and correction < 1:
                Y = torch.lerp(activation.apply(own.double()), Y, correction)
            if moments is not None:
                moments.add(x, Y)
                continue
            assert kept_inputs is not None and kept_reference is not None
            rows = selection.within(start, len(x))
            chosen = x[rows]
            kept_inputs[filled : filled + len(chosen)] = chosen
            kept_reference[filled : filled + len(chosen)] = Y[rows]
            start += len(x)
            filled += len(chosen)
    if moments is not None:
        return replace(moments.program(), name=name)
    assert kept_inputs is not None and kept_reference is not None
    return replace(from_rows(kept_inputs, kept_reference, activation, W, b, dtype=dtype), name=name)


def paired(
    name: str, before: Sequence[tuple[Tensor, Tensor]], after: Sequence[tuple[Tensor, Tensor]]
) -> Iterator[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """The calls of a layer in the reference and in the pruned network, one by one.

    Raises:
        InvalidInput: the two networks call the layer a different number of times or with different rows.
    """
    if [x.shape for x, _ in before] != [x.shape for x, _ in after]:
        raise InvalidInput(
            f"layer {name!r} sees other rows in the pruned network than in the reference network, since the model chooses by its data what "
            f"goes where; they cannot be compared: pass ignore=[{name!r}]"
        )
    return zip(before, after, strict=True)


def hashes(model: nn.Module) -> str:
    """SHA-256 of a model's state dict."""
    state: Mapping[str, Tensor] = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    return data.state_hash(state)
