"""The user's batches: checked, fed to a model, and guarded against changing between passes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .status import InvalidInput

BATCH = 256  # rows per batch when a whole tensor is given

Batches = Iterable[Any]


class Calibration:
    """Re-iterable batches of inputs (and labels, where given); the same ones in every pass, or an error.

    A batch is a tensor, a tuple or list whose first item is the input (the second, if any, is the label), or a mapping of keyword inputs.
    One tensor instead of batches is cut into batches along its first dimension.
    """

    def __init__(self, batches: Batches, what: str = "calibration") -> None:
        self.what = what
        if isinstance(batches, Tensor):
            if batches.ndim < 2:
                raise InvalidInput(f"{what}: a tensor of data needs samples along its first dimension, found shape {tuple(batches.shape)}")
            batches = list(batches.split(BATCH))
        elif isinstance(batches, (str, bytes, Mapping)) or not isinstance(batches, Iterable):
            raise InvalidInput(
                f"{what} must be batches that can be read more than once (a list or a DataLoader) or one tensor, found {type(batches).__name__}"
            )
        elif isinstance(batches, Iterator):
            raise InvalidInput(
                f"{what} is a {type(batches).__name__}, which can be read only once, but every layer needs a pass; "
                "give a list of batches, list(...) of it, or a DataLoader"
            )
        self.batches = batches
        self.fingerprints: list[tuple[Any, ...]] | None = None

    def __iter__(self) -> Iterator[Any]:
        """The batches, each compared with the first pass (shapes and sums)."""
        seen: list[tuple[Any, ...]] = []
        count = 0
        for batch in self.batches:
            count += 1
            fingerprint = tuple((tuple(t.shape), float(t.double().sum())) for t in _tensors(batch))
            if self.fingerprints is None:
                seen.append(fingerprint)
            elif count > len(self.fingerprints) or self.fingerprints[count - 1] != fingerprint:
                raise InvalidInput(
                    f"{self.what}: batch {count} differs from the one of the first pass; every pass must see the same data: "
                    "use shuffle=False and no random augmentation, or list(...) of the loader"
                )
            yield batch
        if not count:
            raise InvalidInput(f"{self.what} is empty; give at least one batch")
        if self.fingerprints is None:
            self.fingerprints = seen
        elif count != len(self.fingerprints):
            raise InvalidInput(f"{self.what}: this pass had {count} batches, the first one {len(self.fingerprints)}; every pass must see the same data")


def forward(model: nn.Module, batch: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Runs the model on the inputs of a batch, moved to ``device``; floating-point inputs are cast to ``dtype`` when it is given."""
    inputs = _inputs(batch)

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.to(device)
        return value.to(dtype) if dtype is not None and value.is_floating_point() else value

    if isinstance(inputs, Mapping):
        return model(**{key: move(value) for key, value in inputs.items()})
    return model(move(inputs))


def labels(batch: Any) -> Tensor | None:
    """The labels of a batch: the second item of a tuple, when it is an integer tensor."""
    if isinstance(batch, (tuple, list)) and len(batch) > 1 and isinstance(batch[1], Tensor) and not batch[1].is_floating_point():
        return batch[1]
    return None


def samples(batch: Any) -> int:
    """Number of samples in a batch."""
    return len(_tensors(batch)[0])


def sample_shape(batch: Any) -> tuple[int, ...]:
    """Shape of one input sample."""
    return tuple(_tensors(batch)[0].shape[1:])


def check_batch(batch: Any, number: int, what: str) -> None:
    """Refuses a batch that is not usable: wrong kind, no samples, NaN or inf."""
    inputs = _inputs(batch)
    if not isinstance(inputs, (Tensor, Mapping)):
        raise InvalidInput(
            f"{what}: batch {number} must be a tensor, a tuple whose first item is a tensor, or a mapping of keyword inputs, found {type(inputs).__name__}"
            + ("; use torch.from_numpy" if type(inputs).__module__ == "numpy" else "")
        )
    tensors = _tensors(batch)
    if not tensors:
        raise InvalidInput(f"{what}: batch {number} holds no tensor")
    for tensor in tensors:
        if tensor.ndim == 0 or not len(tensor):
            raise InvalidInput(f"{what}: batch {number} holds no samples (shape {tuple(tensor.shape)})")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InvalidInput(f"{what}: batch {number} holds NaN or inf; remove or repair those samples")


def update_hash(digest: hashlib._Hash, batch: Any) -> None:
    """Adds the input tensors of a batch (values, dtype, shape) to a hash."""
    for tensor in _tensors(batch):
        update_tensor(digest, tensor)


def update_tensor(digest: hashlib._Hash, tensor: Tensor) -> None:
    """Adds one tensor (dtype, shape, values) to a hash."""
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def state_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of a state dict: names, dtypes, shapes and values, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        update_tensor(digest, state[name])
    return digest.hexdigest()


def _inputs(batch: Any) -> Any:
    return batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch


def _tensors(batch: Any) -> list[Tensor]:
    inputs = _inputs(batch)
    if isinstance(inputs, Tensor):
        return [inputs]
    if isinstance(inputs, Mapping):
        return [inputs[key] for key in sorted(inputs) if isinstance(inputs[key], Tensor)]
    return []
