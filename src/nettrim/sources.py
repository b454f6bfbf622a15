"""Models and data named on the command line: by a factory or by a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .calibration import Batches
from .checkpoint import load_state, read_weights
from .factories import made_by
from .foreign import arrays
from .programs import model_from_program
from .status import InvalidInput
from .wrappers import unwrapped, without_prefix

INPUT_NAMES = ("inputs", "x", "X", "images", "arr_0")
LABEL_NAMES = ("labels", "y", "Y", "targets", "arr_1")


@dataclass(frozen=True)
class Source:
    """A model named on the command line, and what a report should say of where its weights come from."""

    model: nn.Module
    notes: tuple[str, ...] = ()


def carries_weights(text: str) -> bool:
    """Whether a model is named by a file that holds its weights, a ``.pt2`` program of torch.export."""
    return text.endswith(".pt2")


def source_from(text: str, weights: Path | None) -> Source:
    """The model that ``package.module:factory`` or ``file.py:factory`` makes (a function without required arguments, a class, or a module
    object), or that a ``.pt2`` program of torch.export holds, with the weights of a ``.safetensors`` file or of a state dict saved by
    ``torch.save``."""
    made = model_from_program(Path(text)) if carries_weights(text) else made_by(text, "model")
    if not isinstance(made, nn.Module):
        raise InvalidInput(f"model {text!r}: it must give an nn.Module, found {type(made).__name__}")
    made = unwrapped(made, f"model {text!r}:")
    if weights is None:
        return Source(made, () if carries_weights(text) else (f"its weights are those with which {text} makes it; none were read",))
    state, taken = without_prefix(read_weights(weights), made.state_dict())
    load_state(made, state, str(weights))
    return Source(made, (f"weights {weights}: {taken!r}, which a wrapper put before every name, was taken off",) if taken else ())


def model_from(text: str, weights: Path | None) -> nn.Module:
    """The model of :func:`source_from`."""
    return source_from(text, weights).model


def batches_from(text: str, model: nn.Module, batch_size: int) -> Batches:
    """Batches from ``.npy`` (inputs), ``.npz`` or ``.safetensors`` (inputs, and labels where given), or a factory
    (``package.module:name``, ``file.py:name``).

    Floating-point arrays are cast to the dtype of the model's parameters.
    """
    if batch_size < 1:
        raise InvalidInput(f"batch size must be at least 1, found {batch_size}")
    path = Path(text)
    if path.suffix in (".npy", ".npz", ".safetensors"):
        if not path.is_file():
            raise InvalidInput(f"data file {path}: there is no such file")
        inputs, labels = _read_arrays(path)
        parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
        if inputs.is_floating_point() and parameter is not None:
            inputs = inputs.to(parameter.dtype)
        if inputs.ndim < 2 or not len(inputs):
            raise InvalidInput(f"data file {path}: inputs must hold samples along their first dimension, found shape {tuple(inputs.shape)}")
        if labels is None:
            return list(torch.split(inputs, batch_size))
        if len(labels) != len(inputs):
            raise InvalidInput(f"data file {path}: {len(inputs)} inputs but {len(labels)} labels")
        return list(zip(torch.split(inputs, batch_size), torch.split(labels, batch_size), strict=True))
    made = made_by(text, "data")
    return made  # type: ignore[no-any-return]  # checked where it is read (calibration.Calibration)


def _read_arrays(path: Path) -> tuple[Tensor, Tensor | None]:
    found = arrays(path)
    name = next((key for key in INPUT_NAMES if key in found), None)
    if name is None:
        raise InvalidInput(f"data file {path}: it needs an array named {' or '.join(INPUT_NAMES[:3])}, found {', '.join(found) or 'none'}")
    label = next((key for key in LABEL_NAMES if key in found), None)
    if label is None:
        return found[name], None
    labels = found[label]
    if not labels.ndim or labels.is_complex() or not torch.equal(labels, labels.long().to(labels.dtype)):
        raise InvalidInput(
            f"data file {path}: {label} must be whole numbers, one class a sample, found shape {tuple(labels.shape)} of {labels.dtype}"
        )
    return found[name], labels.long()
