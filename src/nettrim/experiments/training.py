"""Training and measuring classifiers: the trained networks that the demo and the experiments prune."""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn import functional

from nettrim.experiments.datasets import Dataset
from nettrim.experiments.models import fully_connected
from nettrim.status import InvalidInput

RECIPE_VERSION = 1
"""Raise it when a change of `train_classifier` or `fully_connected` changes the weights: cached networks are then trained anew."""


_METADATA_KEY = "nettrim"  # one key only: safetensors writes several in no fixed order, and equal networks should make equal files


@dataclass(frozen=True)
class Recipe:
    """The settings with which `trained_network` calls `train_classifier`."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float


def recipe_for(dataset: Dataset) -> Recipe:
    """The settings for ``dataset``: few long epochs for the large sets, many short ones for the small."""
    if len(dataset.train_labels) >= 10_000:
        return Recipe(epochs=14, batch_size=128, learning_rate=2e-3, weight_decay=0.0)
    return Recipe(epochs=20, batch_size=64, learning_rate=2e-3, weight_decay=0.0)


def train_classifier(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    epochs: int,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.0,
    seed: int,
    progress: Callable[[int, float], None] | None = None,
) -> None:
    """Train ``model`` in place to classify ``images`` (n, ...) as ``labels`` (n,), integers, by cross entropy.

    Adam with a one-cycle schedule that peaks at ``learning_rate``. The order of the samples comes from a generator of its own, seeded
    with ``seed``, so the same model, data, seed, and number of threads give the same weights; a model that itself draws random
    numbers (dropout) draws them from the global state. Batches are moved to the model's device. After each epoch ``progress`` is
    called with the number of epochs done and the epoch's mean loss. The model is left in eval mode, without gradients.

    Raises InvalidInput for settings or shapes that cannot be trained on, and when the loss is no longer finite.
    """
    check_pairs(images, labels, batch_size)
    if epochs < 1 or not learning_rate > 0 or weight_decay < 0:
        raise InvalidInput(
            "epochs must be at least 1, learning_rate above 0 and weight_decay at least 0; "
            f"found {epochs}, {learning_rate} and {weight_decay}"
        )
    device = _device_of(model)
    count = len(labels)
    generator = torch.Generator().manual_seed(seed)
    # One kernel for all parameters: on small networks the optimiser's own overhead is most of the time.
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=fused)
    # The schedule's arithmetic divides by its number of steps less one.
    steps = max(2, epochs * math.ceil(count / batch_size))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=steps)
    model.train()
    try:
        with torch.enable_grad():
            for epoch in range(1, epochs + 1):
                total = torch.zeros((), device=device)
                for rows in torch.split(torch.randperm(count, generator=generator), batch_size):
                    rows = rows.to(images.device)
                    targets = labels[rows.to(labels.device)].to(device)
                    loss = functional.cross_entropy(model(images[rows].to(device)), targets)
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    schedule.step()
                    total += loss.detach() * len(rows)
                mean = total.item() / count
                if not math.isfinite(mean):
                    raise InvalidInput(
                        f"the training loss is {mean} after epoch {epoch}: it must be finite; "
                        f"lower learning_rate (now {learning_rate}) or look for non-finite images"
                    )
                if progress is not None:
                    progress(epoch, mean)
    finally:
        model.zero_grad()
        model.eval()


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch_size: int = 1000) -> float:
    """The fraction in [0, 1] of ``images`` (n, ...) to which ``model``, in eval mode, gives the largest logit at ``labels`` (n,).

    Batches are moved to the model's device; every module's train or eval mode is put back afterwards.

    Raises InvalidInput when images and labels do not belong together or there are none.
    """
    check_pairs(images, labels, batch_size)
    device = _device_of(model)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    correct = 0
    try:
        with torch.no_grad():
            for batch, targets in zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True):
                predicted = model(batch.to(device)).argmax(dim=1)
                correct += int((predicted == targets.to(device)).sum())
    finally:
        for module, mode in modes:
            module.training = mode
    return correct / len(labels)


def trained_network(
    dataset: Dataset,
    hidden: Sequence[int] = (300, 100),
    seed: int = 0,
    cache: Path | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> nn.Sequential:
    """A fully connected ReLU network with ``hidden`` units, trained on ``dataset``'s training images; in eval mode on the CPU.

    The settings are `recipe_for`'s. With ``cache``, a folder that is made when missing, the weights are kept there as a
    safetensors file that names the data (with a hash of its content), the sizes, the settings, the seed and the version of the
    recipe, and a hash of the weights. A later call with the same of all these reads it and does not train. A file that is damaged or
    states anything else is never used: a warning says so, and the network is trained again and the file replaced.

    Raises InvalidInput for sizes that make no network and a cache folder that cannot be written.
    """
    pixels = math.prod(dataset.train_images.shape[1:])
    sizes = [pixels, *hidden, len(dataset.classes)]
    recipe = recipe_for(dataset)
    model = fully_connected(sizes, seed).eval()
    path: Path | None = None
    stated = ""
    if cache is not None:
        facts = {
            "data": dataset.name,
            "data_sha256": digest(dataset.train_images, dataset.train_labels),
            "sizes": sizes,
            "seed": seed,
            "recipe": asdict(recipe),
            "recipe_version": RECIPE_VERSION,
        }
        stated = json.dumps(facts, sort_keys=True)
        key = hashlib.sha256(stated.encode()).hexdigest()[:12]
        path = writable(Path(cache)) / f"{dataset.name}-{'-'.join(map(str, sizes))}-seed{seed}-{key}.safetensors"
        if restored(model, path, stated):
            return model
    train_classifier(model, dataset.train_images, dataset.train_labels, **asdict(recipe), seed=seed, progress=progress)
    if path is not None:
        store(model, path, stated)
    return model


def restored(model: nn.Module, path: Path, stated: str) -> bool:
    """Fill ``model`` from the cache file when it is sound and states exactly what is asked for; warn when it is not."""
    if not path.exists():
        return False
    fault = "it states other data, sizes or settings"
    try:
        with safe_open(path, framework="pt") as file:
            written = json.loads((file.metadata() or {}).get(_METADATA_KEY, "null"))
        weights = safetensors.torch.load_file(path)
        if isinstance(written, dict) and written.get("stated") == stated:
            fault = "its weights are not the ones that were written"
            if written.get("weights_sha256") == digest(*(weights[name] for name in sorted(weights))):
                model.load_state_dict(weights)
                return True
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        fault = f"it cannot be read ({error})"
    warnings.warn(f"cached network {path} is not used: {fault}; training again and replacing it", stacklevel=3)
    return False


def store(model: nn.Module, path: Path, stated: str) -> None:
    """Write the cache file under another name first, so that no reader ever sees half of it."""
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    written = {
        "stated": stated,
        "weights_sha256": digest(*(weights[name] for name in sorted(weights))),
        "torch": str(torch.__version__),  # for the reader: it is not asked for again
    }
    metadata = {_METADATA_KEY: json.dumps(written, sort_keys=True)}
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        unfinished.write_bytes(safetensors.torch.save(weights, metadata=metadata))
        os.replace(unfinished, path)
    except OSError as error:
        raise InvalidInput(f"the trained network cannot be stored as {path} ({error}); free space or pass another cache folder") from error
    finally:
        unfinished.unlink(missing_ok=True)


def writable(folder: Path) -> Path:
    """Make ``folder`` and check it before minutes of training, not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"cache must be a folder that can be written, and {str(folder)!r} is not ({error}); pass another") from error
    if not os.access(folder, os.W_OK):
        raise InvalidInput(f"cache must be a folder that can be written, and {str(folder)!r} is read-only; pass another")
    return folder


def digest(*tensors: torch.Tensor) -> str:
    """SHA-256 of the tensors' types, shapes and bytes, in order."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().numpy().data)
    return sha.hexdigest()


def _device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise InvalidInput(f"{type(model).__name__} has no parameters: a model with weights is required")
    return parameter.device


def check_pairs(images: torch.Tensor, labels: torch.Tensor, batch_size: int) -> None:
    """Refuses images (n, ...) and labels (n,) that do not belong together, and batches of no image."""
    integers = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if labels.ndim != 1 or not integers or len(labels) == 0 or images.ndim < 2 or len(images) != len(labels):
        raise InvalidInput(
            "images must be (n, ...) and labels (n,) integers, with the same n of at least 1; "
            f"found images {tuple(images.shape)} and labels {tuple(labels.shape)} of {labels.dtype}"
        )
    if batch_size < 1:
        raise InvalidInput(f"batch_size must be at least 1; found {batch_size}")
