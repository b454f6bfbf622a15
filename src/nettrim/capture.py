"""Layer inputs and outputs on calibration data. Works on copies in eval mode, and removes its hooks whatever happens."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import calibration as data
from .calibration import Calibration
from .layers import LayerView, view
from .preimage import Activation
from .program import LayerProgram, Moments, from_rows
from .status import InvalidInput


class _LastCall(Exception):
    """Ends a forward pass once the last call that is wanted has been seen."""


@dataclass
class Replica:
    """A copy of a model for calibration passes: eval mode, on ``device``, in float64 where the model allows it.

    ``dtype`` is the arithmetic of the passes (``None``: the model's own).
    """

    model: nn.Module
    device: torch.device
    dtype: torch.dtype | None

    def views(self, names: Sequence[str]) -> dict[str, LayerView]:
        """The matrix views of its layers."""
        modules = dict(self.model.named_modules())
        return {name: view(name, modules[name]) for name in names}

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

        with _hooks(self.model, names) as record:

            def keep(name: str, x: Tensor, y: Tensor) -> None:
                layer = views[name]
                seen[name].append((layer.rows(x), layer.outputs(y)))
                if expected is not None and sum(map(len, seen.values())) >= expected:
                    raise _LastCall

            record.append(keep)
            try:
                output = self.run(batch)
            except _LastCall:
                output = None
        return seen, output


@contextmanager
def _hooks(model: nn.Module, names: Sequence[str]) -> Iterator[list[Any]]:
    """Forward hooks on the named layers that call the receivers in the list that is yielded; always removed."""
    receivers: list[Any] = []
    modules = dict(model.named_modules())
    handles = []
    try:
        for name in names:

            def hook(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any, name: str = name) -> None:
                x = inputs[0] if inputs else keywords["input"]
                for receiver in receivers:
                    receiver(name, x, output)

            handles.append(modules[name].register_forward_hook(hook, with_kwargs=True))
        yield receivers
    finally:
        for handle in handles:
            handle.remove()


def device_of(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """The device given, or that of the model's first parameter."""
    if device is not None:
        return torch.device(device)
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def replicate(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> Replica:
    """A deep copy in eval mode; ``dtype`` float64 or ``None`` for the model's own."""
    try:
        twin = copy.deepcopy(model)
    except Exception as error:
        raise InvalidInput(f"the model ({type(model).__name__}) cannot be copied with copy.deepcopy: {error}") from error
    twin = twin.to(device).eval()
    return Replica(twin.double() if dtype == torch.float64 else twin, device, dtype)


def reference_replica(model: nn.Module, device: torch.device, first_batch: Any) -> tuple[Replica, str]:
    """The reference network in float64, or in its own dtype when it does not run in float64; with a notice in that case."""
    native = replicate(model, device, None)
    try:
        native.run(first_batch)
    except Exception as error:
        raise InvalidInput(f"the model cannot run on the first batch of the calibration data: {error}") from error
    if device.type == "mps":
        return native, "the device has no float64: calibration passes ran in the model's own dtype"
    wide = replicate(model, device, torch.float64)
    try:
        wide.run(first_batch)
    except Exception as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return native, f"the model does not run in float64 ({cause}): calibration passes ran in its own dtype"
    return wide, ""


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
    """The first pass: refuses bad batches and NaN or inf inside the network, counts rows, hashes the data."""
    result = Scan()
    digest = hashlib.sha256()
    for number, batch in enumerate(batches, 1):
        data.check_batch(batch, number, batches.what)
        data.update_hash(digest, batch)
        try:
            seen, output = reference.calls(batch, names)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise InvalidInput(f"{batches.what}: the model cannot run on batch {number}: {error}") from error
        for name, calls in seen.items():
            for x, y in calls:
                if not bool(torch.isfinite(y).all()):
                    raise InvalidInput(f"{batches.what}: batch {number} makes layer {name!r} put out NaN or inf; check its weights and the data")
                result.rows[name] = result.rows.get(name, 0) + len(x)
            if calls:
                result.calls[name] = max(result.calls.get(name, 0), len(calls))
        if isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
            raise InvalidInput(f"{batches.what}: the network puts out NaN or inf on batch {number}")
        if number == 1:
            result.order = _first_calls(reference, batch, [name for name, calls in seen.items() if calls])
            result.sample_shape = data.sample_shape(batch)
        result.order += [name for name, calls in seen.items() if calls and name not in result.order]
        result.samples += data.samples(batch)
    result.data_hash = digest.hexdigest()
    return result


def _first_calls(replica: Replica, batch: Any, names: Sequence[str]) -> list[str]:
    """The names in the order of their first calls."""
    order: list[str] = []
    with _hooks(replica.model, names) as receivers:
        receivers.append(lambda name, x, y: order.append(name))
        replica.run(batch)
    return list(dict.fromkeys(order))


class Selection:
    """At most ``limit`` of ``total`` rows, chosen with ``seed``; the same rows for every layer with that many."""

    def __init__(self, total: int, limit: int, seed: int) -> None:
        self.total, self.count = total, min(total, limit)
        self.everything = total <= limit
        chosen = np.arange(0) if self.everything else np.random.default_rng([seed, total]).choice(total, limit, replace=False, shuffle=False)
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
        for (_, z), (x, own) in zip(expected, given, strict=True):
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
        return moments.program()
    assert kept_inputs is not None and kept_reference is not None
    return from_rows(kept_inputs, kept_reference, activation, W, b, dtype=dtype)


def hashes(model: nn.Module) -> str:
    """SHA-256 of a model's state dict."""
    state: Mapping[str, Tensor] = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    return data.state_hash(state)
