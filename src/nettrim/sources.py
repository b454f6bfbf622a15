"""Models and data named on the command line: ``package.module:factory`` and files."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .calibration import Batches
from .checkpoint import load_state, read_weights
from .programs import model_from_program
from .status import InvalidInput

INPUT_NAMES = ("inputs", "x", "X", "images", "arr_0")
LABEL_NAMES = ("labels", "y", "Y", "targets", "arr_1")


def model_from(text: str, weights: Path | None) -> nn.Module:
    """The model that ``package.module:factory`` makes (a function without required arguments, a class, or a module object), or that
    a ``.pt2`` program of torch.export holds, with the weights of a ``.safetensors`` file or of a state dict saved by ``torch.save``."""
    made = model_from_program(Path(text)) if text.endswith(".pt2") else _call(text, "model")
    if not isinstance(made, nn.Module):
        raise InvalidInput(f"model {text!r}: it must give an nn.Module, found {type(made).__name__}")
    if weights is not None:
        load_state(made, read_weights(weights), str(weights))
    return made


def batches_from(text: str, model: nn.Module, batch_size: int) -> Batches:
    """Batches from ``.npy`` (inputs), ``.npz`` or ``.safetensors`` (inputs, and labels where given), or ``package.module:factory``.

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
    if ":" not in text:
        raise InvalidInput(f"data {text!r}: give a .npy, .npz or .safetensors file, or package.module:factory")
    made = _call(text, "data")
    return made  # type: ignore[no-any-return]  # checked where it is read (calibration.Calibration)


def _read_arrays(path: Path) -> tuple[Tensor, Tensor | None]:
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False)), None
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                arrays = {key: torch.from_numpy(archive[key]) for key in archive.files}
        else:
            arrays = load_file(path)
    except (OSError, ValueError, TypeError, EOFError, SafetensorError) as error:
        raise InvalidInput(f"data file {path}: it cannot be read ({error}); arrays of plain numbers are needed") from error
    name = next((key for key in INPUT_NAMES if key in arrays), None)
    if name is None:
        raise InvalidInput(f"data file {path}: it needs an array named {' or '.join(INPUT_NAMES[:3])}, found {', '.join(arrays) or 'none'}")
    label = next((key for key in LABEL_NAMES if key in arrays), None)
    return arrays[name], None if label is None else arrays[label].long()


def _call(text: str, what: str) -> Any:
    module_name, _, attribute = text.partition(":")
    if not module_name or not attribute:
        raise InvalidInput(f"{what} {text!r}: it must be written package.module:factory")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # a module beside the user, as with python -m
    try:
        value: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise InvalidInput(f"{what} {text!r}: module {module_name!r} cannot be imported ({error})") from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            known = ", ".join(name for name in dir(value) if not name.startswith("_"))
            raise InvalidInput(f"{what} {text!r}: {module_name} has no {attribute!r} (it has: {known[:200]})")
        value = getattr(value, part)
    if isinstance(value, nn.Module) or not callable(value):
        return value
    factory: Callable[[], Any] = value
    try:
        return factory()
    except TypeError as error:
        raise InvalidInput(f"{what} {text!r}: the factory must be callable without arguments ({error})") from error
    except InvalidInput:
        raise
    except Exception as error:  # whatever a user's own code may raise
        raise InvalidInput(f"{what} {text!r}: the factory failed with {type(error).__name__} ({error})") from error
