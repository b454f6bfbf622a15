"""Why a model does not run on a batch, in words that say what to change: what is suggested was tried on the model first."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .calibration import inputs_of
from .status import InvalidInput, NetTrimError, first_line

Run = Callable[[Any], Any]
"""Runs the model on a batch."""

CONVOLUTIONS = {nn.Conv1d: ("length",), nn.Conv2d: ("height", "width"), nn.Conv3d: ("depth", "height", "width")}
SAMPLES = 4  # enough to see whether a changed input runs


def cannot_run(model: nn.Module, run: Run, batch: Any, error: BaseException) -> str:
    """What is wrong with a batch on which ``run`` raised ``error``, and what to give instead."""
    torch_says = first_line(error)
    inputs = inputs_of(batch)
    if isinstance(inputs, Mapping):
        words = _wrong_names(model, inputs)
    else:
        words = _too_few(model, batch) or _swapped(run, batch) or _repaired(model, run, inputs)
    words = words or _at_layer(model, run, batch)
    return f"{words} ({torch_says})" if words else torch_says


@contextmanager
def must_run(model: nn.Module, run: Run, batch: Any, what: str) -> Iterator[None]:
    """Inside, the model runs on a batch. Where it does not, InvalidInput begins with ``what`` and says what to give instead."""
    try:
        yield
    except NetTrimError:
        raise
    except Exception as error:  # a user's forward may raise anything
        raise InvalidInput(f"{what}: {cannot_run(model, run, batch, error)}") from error


def check_first(model: nn.Module, run: Run, batch: Any) -> Any:
    """The model's output on the first batch.

    Raises:
        InvalidInput: a tuple of which it is not clear what is an input, or an input without a dimension of samples.
    """
    inputs = inputs_of(batch)
    positional = _positional(model)
    if isinstance(batch, (tuple, list)) and len(batch) > 2 and len(positional) > 1:
        raise InvalidInput(
            f"a batch is a tuple of {len(batch)} items, of which the first is the input and the second the label, but forward takes "
            f"{', '.join(positional)}; {_by_name(positional, batch)}"
            + (", or keep two: [(b[0], b[-1]) for b in data]" if len(_needed(model)) < 2 else "")
        )
    if not isinstance(inputs, Tensor) or inputs.ndim > 4:
        return run(batch)
    seen: list[tuple[str, nn.Module, Tensor]] = []
    with _watched(model, lambda *call: seen.append(call) if not seen else None):
        output = run(batch)
    if seen and seen[0][2].shape == inputs.shape and seen[0][2].ndim == _unbatched(seen[0][1]):
        name, layer, x = seen[0]
        raise InvalidInput(
            f"the input has shape {tuple(x.shape)}, which layer {name!r} ({type(layer).__name__}) takes as one sample without a dimension "
            f"of samples; it takes {_takes(layer)}: give x[None] for one sample, torch.stack(samples) for a list of them, or a DataLoader"
        )
    return output


def _positional(model: nn.Module) -> list[str]:
    return [
        name
        for name, item in inspect.signature(model.forward).parameters.items()
        if item.kind in (item.POSITIONAL_ONLY, item.POSITIONAL_OR_KEYWORD)
    ]


def _needed(model: nn.Module) -> list[str]:
    parameters = inspect.signature(model.forward).parameters
    return [name for name in _positional(model) if parameters[name].default is inspect.Parameter.empty]


def _by_name(names: list[str], batch: Any) -> str:
    """How to write tuples of several inputs as mappings; items beyond the inputs are labels."""
    count = len(batch)
    named = names[: count if count <= len(names) and count < 3 else count - 1]
    inputs = "{" + ", ".join(f"{name!r}: b[{index}]" for index, name in enumerate(named)) + "}"
    return f"give the inputs by name: [{f'({inputs}, b[-1])' if count > len(named) else inputs} for b in data]"


def _wrong_names(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """Keyword inputs that forward does not take, or that are missing."""
    parameters = inspect.signature(model.forward).parameters
    named = [name for name, item in parameters.items() if item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD)]
    extra = [] if any(item.kind is item.VAR_KEYWORD for item in parameters.values()) else [key for key in inputs if key not in named]
    missing = [name for name in named if parameters[name].default is inspect.Parameter.empty and name not in inputs]
    takes = f"forward takes {', '.join(named) or 'nothing by name'}"
    if extra and not missing:
        left = f"key not in {tuple(extra)}" if len(extra) > 1 else f"key != {extra[0]!r}"
        return (
            f"the batch gives {', '.join(map(repr, extra))}, but {takes}; drop {'them' if len(extra) > 1 else 'it'}: "
            f"[{{key: value for key, value in batch.items() if {left}}} for batch in data]"
        )
    if missing:
        return f"the batch gives {', '.join(map(repr, inputs))}, but {takes}: {', '.join(map(repr, missing))} is missing"
    return ""


def _too_few(model: nn.Module, batch: Any) -> str:
    """A model with several inputs, given a tuple."""
    needed = _needed(model)
    if len(needed) < 2:
        return ""
    several = isinstance(batch, (tuple, list))
    gives = "the first item of a tuple alone" if several else "one"
    remedy = _by_name(needed, batch) if several else "give mappings from name to tensor"
    return f"forward needs {len(needed)} inputs ({', '.join(needed)}), and a batch gives {gives}; {remedy}"


def _swapped(run: Run, batch: Any) -> str:
    """Labels in the first place."""
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        return ""
    first, second = batch[0], batch[1]
    if not isinstance(first, Tensor) or not isinstance(second, Tensor) or second.ndim < first.ndim:
        return ""
    # a second item of as many dimensions may be labels as well: it is the inputs where the model runs on it as it is
    repair = "" if _runs(run, second[:SAMPLES]) else _repair(run, second) if second.ndim > first.ndim else None
    if repair is None:
        return ""
    given = repair or "x"
    return (
        f"the first item of the batch has shape {tuple(first.shape)} ({_dtype(first)}) and the second {tuple(second.shape)} "
        f"({_dtype(second)}): the second item looks like the inputs; give [({given}, y) for y, x in data]"
    )


def _repaired(model: nn.Module, run: Run, inputs: Any) -> str:
    repair = _repair(run, inputs) if isinstance(inputs, Tensor) else None
    if repair is None:
        return ""
    seen = _calls(model, run, inputs)
    wanted = f", and layer {seen[0][0]!r} ({type(seen[0][1]).__name__}) takes {_takes(seen[0][1])}{_of_dtype(seen[0][1])}" if seen else ""
    return f"the input x has shape {tuple(inputs.shape)} and dtype {_dtype(inputs)}{wanted}; the model runs on {repair}"


def _repair(run: Run, x: Tensor) -> str | None:
    """The smallest change of the input on which the model runs, as it would be written; ``None`` where none of those known does."""
    for shape, rearranged in (Change("{}", lambda x: x), *_shapes(x)):
        part = x if "[None]" in shape else x[:SAMPLES]
        for dtype, converted in _dtypes(x):
            text = dtype.format(shape.format("x"))
            if text != "x" and _runs(run, converted(rearranged(part))):
                return text
    return None


class Change(NamedTuple):
    """A change of a tensor: how it is written, with ``{}`` for the tensor, and what does it."""

    text: str
    make: Callable[[Tensor], Tensor]


def _dtypes(x: Tensor) -> Iterator[Change]:
    """The dtypes that the input might be meant in, its own first."""
    yield Change("{}", lambda x: x)
    if x.dtype == torch.uint8:
        yield Change("{}.float() / 255", lambda x: x.float() / 255)
    elif x.dtype != torch.float32:
        yield Change("{}.float()", Tensor.float)
    if x.dtype != torch.int64:
        yield Change("{}.long()", Tensor.long)
    if x.is_floating_point():
        yield from (Change("{}.half()", Tensor.half), Change("{}.bfloat16()", Tensor.bfloat16), Change("{}.double()", Tensor.double))


def _shapes(x: Tensor) -> Iterator[Change]:
    """Other arrangements of the same values: channels moved, a dimension added, flattened or made an image."""
    if x.ndim == 4:
        yield Change("{}.permute(0, 3, 1, 2)", lambda x: x.permute(0, 3, 1, 2))
    if x.ndim in (2, 3):
        yield Change("{}.unsqueeze(1)", lambda x: x.unsqueeze(1))
    if x.ndim == 3:
        yield Change("{}.permute(2, 0, 1)[None]", lambda x: x.permute(2, 0, 1)[None])
        yield Change("{}.transpose(1, 2)", lambda x: x.transpose(1, 2))
    for channels in (1, 3, 4) if x.ndim == 2 else ():
        side = math.isqrt(x.shape[1] // channels)
        if side > 1 and channels * side * side == x.shape[1]:
            size = (-1, channels, side, side)
            yield Change(f"{{}}.reshape{size}", lambda x, size=size: x.reshape(size))  # type: ignore[misc]
    if x.ndim > 2:
        yield Change("{}.flatten(1)", lambda x: x.flatten(1))
    if x.ndim < 4:
        yield Change("{}[None]", lambda x: x[None])


def _runs(run: Run, x: Tensor) -> bool:
    try:
        run(x)
    except Exception:  # a user's forward may raise anything
        return False
    return True


def _calls(model: nn.Module, run: Run, batch: Any) -> list[tuple[str, nn.Module, Tensor]]:
    """The layers that a pass reaches, which may end in an error."""
    seen: list[tuple[str, nn.Module, Tensor]] = []
    with _watched(model, lambda *call: seen.append(call)), suppress(Exception):
        run(batch)
    return seen


def _of_dtype(layer: nn.Module) -> str:
    weight = getattr(layer, "weight", None)
    return f" of {_dtype(weight)}" if isinstance(weight, Tensor) and not isinstance(layer, nn.Embedding) else ""


def _at_layer(model: nn.Module, run: Run, batch: Any) -> str:
    """The layer at which the pass ended, when its input is not of the form that it takes."""
    seen = _calls(model, run, batch)
    if not seen:
        return ""
    name, layer, x = seen[-1]
    inputs = inputs_of(batch)
    shape = f"; the input has shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) and len(seen) > 1 else ""
    of = f" of {_dtype(x)}"
    found = f"{tuple(x.shape)}{'' if of == _of_dtype(layer) else of}"
    if isinstance(layer, nn.Embedding) and x.numel() and not x.is_floating_point():
        found = f"values from {int(x.min())} to {int(x.max())}"
    return f"layer {name!r} ({type(layer).__name__}) takes {_takes(layer)}, found {found}{shape}"


class _watched:
    """While it stands, ``receive`` gets name, module and first input of every call of a layer that takes one form only."""

    def __init__(self, model: nn.Module, receive: Callable[[str, nn.Module, Tensor], None]) -> None:
        self.handles = [
            module.register_forward_pre_hook(
                lambda module, inputs, name=name: receive(name, module, inputs[0]) if inputs and isinstance(inputs[0], Tensor) else None
            )
            for name, module in model.named_modules()
            if _takes(module)
        ]

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            handle.remove()


def _takes(layer: nn.Module) -> str:
    """The form of a layer's input; empty for one that takes any."""
    for kind, sizes in CONVOLUTIONS.items():
        if isinstance(layer, kind):
            channels = layer.in_channels
            return f"(samples, {channels} channel{'s' if channels != 1 else ''}, {', '.join(sizes)})"
    if isinstance(layer, nn.Linear):
        return f"(samples, ..., {layer.in_features})"
    if isinstance(layer, nn.Embedding):
        return f"whole numbers from 0 to {layer.num_embeddings - 1}"
    if isinstance(layer, (nn.RNNBase)):
        return f"({'samples, steps' if layer.batch_first else 'steps, samples'}, {layer.input_size})"
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return f"(samples, {layer.num_features}, ...)"
    if isinstance(layer, nn.LayerNorm):
        return f"(..., {', '.join(map(str, layer.normalized_shape))})"
    return ""


def _unbatched(layer: nn.Module) -> int:
    """The dimensions of an input that the layer takes as one sample; 0 where there is no such."""
    if isinstance(layer, nn.Linear):
        return 1
    return next((len(sizes) + 1 for kind, sizes in CONVOLUTIONS.items() if isinstance(layer, kind)), 0)


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
