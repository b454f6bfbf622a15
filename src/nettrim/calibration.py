"""The user's batches: checked, fed to a model, and guarded against changing between passes."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler

from .status import InvalidInput

BATCH = 256  # rows per batch when a whole tensor is given

Batches = Iterable[Any]


class Calibration:
    """Re-iterable batches of inputs (and labels, where given); the same ones in every pass, or an error.

    A batch is a tensor, a tuple or list whose first item is the input (the second, if any, is the label), or a mapping of keyword inputs.
    One tensor instead of batches is cut into batches along its first dimension, a Dataset of samples is batched in its order, and so is
    that of a DataLoader with ``shuffle=True``: which samples lie together matters to training alone. The first pass checks every batch;
    later passes compare each with a checksum of its bytes (4 bytes a tensor are kept), which is far cheaper than running a model on it.
    """

    def __init__(self, batches: Batches, what: str = "calibration") -> None:
        self.what = what
        if isinstance(batches, Tensor):
            if batches.ndim < 2:
                raise InvalidInput(f"{what}: a tensor of data needs samples along its first dimension, found shape {tuple(batches.shape)}")
            batches = list(torch.split(batches, BATCH))
        elif isinstance(batches, Dataset) and not isinstance(batches, IterableDataset) and hasattr(batches, "__len__"):
            batches = DataLoader(batches, BATCH)  # samples, in their order
        elif isinstance(batches, DataLoader):
            batches = _in_order(batches)
        elif isinstance(batches, (str, bytes, Mapping, Dataset, np.ndarray)) or not isinstance(batches, Iterable):
            raise InvalidInput(
                f"{what} must be batches that can be read more than once (a list or a DataLoader), a Dataset of samples or one tensor, "
                f"found {type(batches).__name__}{_instead(batches)}"
            )
        elif isinstance(batches, Iterator):
            raise InvalidInput(
                f"{what} is a {type(batches).__name__}, which can be read only once, but every layer needs a pass; "
                "give a list of batches, list(...) of it, or a DataLoader"
            )
        self.batches = batches
        self.fingerprints: list[tuple[Any, ...]] | None = None
        self.form: dict[str, Any] | None = None  # of the keyword inputs: plain values, which decide what a model does

    @property
    def count(self) -> int:
        """The number of batches; 0 before the first pass has ended."""
        return len(self.fingerprints or ())

    def __iter__(self) -> Iterator[Any]:
        """The batches: checked in the first pass, compared with the first pass in all others.

        Raises:
            InvalidInput: there is no batch, one cannot be used, or a pass differs from the first.
        """
        seen: list[tuple[Any, ...]] = []
        count = 0
        for batch in self.batches:
            count += 1
            if self.fingerprints is None:
                check_batch(batch, count, self.what)
                self._check_form(batch, count)
                seen.append(_fingerprint(batch))
            elif count > len(self.fingerprints) or self.fingerprints[count - 1] != _fingerprint(batch):
                raise InvalidInput(
                    f"{self.what}: batch {count} differs from the one of the first pass; every pass must see the same data: "
                    "take out random sampling and random augmentation, or keep one pass: give list(loader), and keep it for verify"
                )
            yield batch
        if not count:
            raise InvalidInput(
                f"{self.what} is empty; give at least one batch (a loader with drop_last=True drops a set smaller than a batch)"
            )
        if self.fingerprints is None:
            self.fingerprints = seen
        elif count != len(self.fingerprints):
            raise InvalidInput(
                f"{self.what}: this pass had {count} batches, the first one {len(self.fingerprints)}; every pass must see the same data"
            )

    def _check_form(self, batch: Any, number: int) -> None:
        """Refuses keyword inputs with other names or plain values than the first batch's: they decide what a model computes."""
        form = {key: None if isinstance(value, Tensor) else repr(value) for key, value in (keywords_of(batch) or {}).items()}
        if number == 1:
            self.form = form
        elif form != self.form:
            found, first = (
                ", ".join(key if value is None else f"{key}={value}" for key, value in each.items()) or "no keyword inputs"
                for each in (form, self.form or {})
            )
            raise InvalidInput(
                f"{self.what}: batch {number} gives {found}, the first one {first}; every batch must call the model in the same way: "
                "give the same keys in all, or use those batches alone that do"
            )


def _in_order(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The samples of a loader with ``shuffle=True``, in the order of its data set; any other loader as it is.

    Samplers and loaders of one's own, and such as draw a part of the samples or draw with replacement, mean what they do: they stay.
    """
    sampler = loader.sampler
    plain = type(loader) is DataLoader and type(loader.batch_sampler) in (BatchSampler, type(None))
    if not plain or type(sampler) is not RandomSampler or sampler.replacement or sampler.num_samples != len(loader.dataset):  # type: ignore[arg-type]
        return loader
    same = ("batch_size", "drop_last", "num_workers", "collate_fn", "timeout", "worker_init_fn", "multiprocessing_context")
    return DataLoader(loader.dataset, **{name: getattr(loader, name) for name in same}, prefetch_factor=loader.prefetch_factor)


def forward(model: nn.Module, batch: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Runs the model on the inputs of a batch, moved to ``device``; floating-point inputs are cast to ``dtype`` when it is given."""
    inputs = inputs_of(batch)

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        moved = value.to(device)
        moved = moved.to(dtype) if dtype is not None and value.is_floating_point() else moved
        return moved.clone() if moved.data_ptr() == value.data_ptr() else moved  # a model may work in place

    # a GraphModule's own call prints a traceback of generated code before it raises
    call = partial(nn.Module.__call__, model) if isinstance(model, fx.GraphModule) else model
    if isinstance(inputs, Mapping):
        return call(**{key: move(value) for key, value in inputs.items()})
    return call(move(inputs))


def labels(batch: Any) -> Tensor | None:
    """The labels of a batch: the second item of a tuple, when it is an integer tensor."""
    if isinstance(batch, (tuple, list)) and len(batch) > 1 and isinstance(batch[1], Tensor) and not batch[1].is_floating_point():
        return batch[1]
    return None


def samples(batch: Any) -> int:
    """Number of samples in a batch: the first dimension of its inputs. One of length 1 beside longer ones is the same for all samples."""
    lengths = [len(tensor) for tensor in _tensors(batch)]
    return next((length for length in lengths if length > 1), lengths[0])


def sample_shape(batch: Any) -> tuple[int, ...]:
    """Shape of one input sample."""
    return tuple(_tensors(batch)[0].shape[1:])


def check_batch(batch: Any, number: int, what: str) -> None:
    """Refuses a batch that is not usable: wrong kind, no samples, NaN or inf."""
    inputs = inputs_of(batch)
    if not isinstance(inputs, (Tensor, Mapping)):
        where = "" if inputs is batch else f" in a {type(batch).__name__}"
        raise InvalidInput(
            f"{what}: batch {number} must be a tensor, a tuple whose first item is a tensor, or a mapping of keyword inputs, "
            f"found {type(inputs).__name__}{where}{_instead(inputs)}"
        )
    tensors = _tensors(batch)
    if not tensors:
        items = inputs.items() if isinstance(inputs, Mapping) else ()
        found = ", ".join(f"{key!r}: {type(value).__name__}{_instead(value)}" for key, value in items)
        raise InvalidInput(f"{what}: batch {number} holds no tensor{f' ({found})' if found else ''}")
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.is_meta:
            kind = "meta" if tensor.is_meta else tensor.layout
            raise InvalidInput(f"{what}: batch {number} holds a {kind} tensor; give dense tensors with values")
        if tensor.ndim == 0 or not tensor.numel():
            raise InvalidInput(f"{what}: batch {number} holds no samples (shape {tuple(tensor.shape)})")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InvalidInput(f"{what}: batch {number} holds NaN or inf; remove or repair those samples")


def _instead(value: object) -> str:
    """What to give instead of something that is no data, as the end of a sentence."""
    if isinstance(value, np.ndarray):
        change = {"u": ".float() / 255" if value.dtype == np.uint8 else ".long()", "f": ".float()"}.get(value.dtype.kind, "")
        change = "" if value.dtype == np.float32 else change
        return f"; use torch.from_numpy(array){change}"
    if isinstance(value, Mapping):
        return "; put the one batch into a list"
    if isinstance(value, IterableDataset):
        return "; give DataLoader(dataset, batch_size=256)"
    if isinstance(value, Dataset):
        return " without a length; give DataLoader(dataset, batch_size=256)"
    if isinstance(value, (str, bytes)):
        return "; load the file first: torch.from_numpy(numpy.load(path)), say"
    if isinstance(value, (tuple, list)) and any(isinstance(item, Tensor) for item in value):
        return "; give several inputs by name: ({'a': first, 'b': second}, labels), with the names of forward's arguments"
    if isinstance(value, (tuple, list)) and value:
        return "; use torch.tensor(...)"
    if callable(value):
        return "; call it, and give list(...) of what it makes"
    return ""


def sample_digests(batches: Calibration) -> list[bytes]:
    """An 8-byte digest of every sample's inputs, whatever the batches they come in."""
    digests = []
    for batch in batches:
        tensors = _tensors(batch)
        count = samples(batch)
        rows = [_bytes(tensor).reshape(count, -1) for tensor in tensors if len(tensor) == count]
        for i in range(count):
            digest = hashlib.blake2b(digest_size=8)
            for row in rows:
                digest.update(row[i].data)
            digests.append(digest.digest())
    return digests


def update_hash(digest: hashlib._Hash, batch: Any) -> None:
    """Adds the inputs of a batch to a hash: tensors (values, dtype, shape), and for keyword inputs their names and plain values."""
    inputs = inputs_of(batch)
    if not isinstance(inputs, Mapping):
        update_tensor(digest, inputs)
        return
    for key in sorted(inputs):
        value = inputs[key]
        if isinstance(value, Tensor):
            digest.update(f"{key}=".encode())
            update_tensor(digest, value)
        elif value is None or isinstance(value, (bool, int, float, str)):
            digest.update(f"{key}={value!r};".encode())


def update_tensor(digest: hashlib._Hash, tensor: Tensor) -> None:
    """Adds one tensor (dtype, shape, values) to a hash."""
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(_bytes(tensor).data)


def state_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of a state dict: names, dtypes, shapes and values, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        update_tensor(digest, state[name])
    return digest.hexdigest()


def inputs_of(batch: Any) -> Any:
    """The model's input in a batch: the first item of a tuple or list, or the batch itself."""
    return batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch


def keywords_of(batch: Any) -> Mapping[str, Any] | None:
    """The keyword inputs of a batch; ``None`` where its input is one positional tensor."""
    inputs = inputs_of(batch)
    return inputs if isinstance(inputs, Mapping) else None


def _tensors(batch: Any) -> list[Tensor]:
    inputs = inputs_of(batch)
    if isinstance(inputs, Tensor):
        return [inputs]
    if isinstance(inputs, Mapping):
        return [inputs[key] for key in sorted(inputs) if isinstance(inputs[key], Tensor)]
    return []


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    array: NDArray[np.uint8] = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return array


def _fingerprint(batch: Any) -> tuple[Any, ...]:
    """Dtype, shape and checksum of every input tensor."""
    return tuple((tensor.dtype, tuple(tensor.shape), zlib.crc32(_bytes(tensor).data)) for tensor in _tensors(batch))
