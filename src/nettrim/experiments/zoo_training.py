"""Training the zoo's networks on image data, and keeping them in a cache."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from nettrim.experiments.datasets import Dataset
from nettrim.experiments.training import check_pairs, digest, restored, store, writable
from nettrim.experiments.zoo import NETWORKS
from nettrim.status import InvalidInput

VERSION = 1
"""Raise it when a change of this module or of `zoo` changes trained weights: cached networks are then trained anew."""

Progress = Callable[[int, float], None]

_QUICK_EPOCHS, _QUICK_IMAGES = 2, 6_000
_MIRRORED = ("fashion-mnist",)  # the data sets whose classes do not change in a mirror


@dataclass(frozen=True)
class Settings:
    """How a network is trained: a one-cycle schedule that peaks at ``learning_rate``, cross entropy with ``label_smoothing``.

    ``optimizer`` is "sgd" (Nesterov's momentum) or "adamw". Weight decay spares biases and norms. ``crop`` is the number of zero pixels
    put around an image before a random part of its own size is cut out (0: none), ``mirror`` flips half of the images left to right.
    ``images``: at most so many of the training images, the first ones; None for all.
    """

    epochs: int
    optimizer: Literal["sgd", "adamw"]
    learning_rate: float
    weight_decay: float = 0.0
    batch_size: int = 128
    label_smoothing: float = 0.0
    crop: int = 0
    mirror: bool = False
    images: int | None = None

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size) < 1 or not self.learning_rate > 0 or min(self.weight_decay, self.crop) < 0:
            raise InvalidInput(
                "Settings: epochs and batch_size must be at least 1, learning_rate above 0, weight_decay and crop at least 0; "
                f"found {self.epochs}, {self.batch_size}, {self.learning_rate}, {self.weight_decay} and {self.crop}"
            )
        if self.optimizer not in ("sgd", "adamw"):
            raise InvalidInput(f"Settings: optimizer must be 'sgd' or 'adamw', found {self.optimizer!r}")
        if not 0 <= self.label_smoothing < 1 or (self.images is not None and self.images < 1):
            raise InvalidInput(
                "Settings: label_smoothing must be at least 0 and below 1, images at least 1 or None; "
                f"found {self.label_smoothing} and {self.images}"
            )


_SETTINGS: dict[str, Settings] = {
    "lenet5": Settings(epochs=6, optimizer="adamw", learning_rate=2e-3, weight_decay=1e-2),
    "vgg_like": Settings(epochs=8, optimizer="sgd", learning_rate=0.1, weight_decay=5e-4, label_smoothing=0.05),
    "resnet20_a": Settings(epochs=18, optimizer="sgd", learning_rate=0.2, weight_decay=5e-4, label_smoothing=0.05),
    "resnet20_b": Settings(epochs=18, optimizer="sgd", learning_rate=0.2, weight_decay=5e-4, label_smoothing=0.05),
    "depthwise_separable": Settings(epochs=10, optimizer="sgd", learning_rate=0.2, weight_decay=2e-4, label_smoothing=0.05),
    "transformer_encoder": Settings(epochs=8, optimizer="adamw", learning_rate=2e-3, weight_decay=5e-2),
}


def settings_for(name: str, dataset: Dataset, quick: bool = False) -> Settings:
    """How `trained` trains the network ``name`` on ``dataset``; ``quick``: 2 epochs of at most 6,000 images.

    Sets of fewer than 10,000 images are trained on in batches of 64 and as they are; larger ones with random crops, and mirrored where that
    changes no class. Raises InvalidInput for an unknown name.
    """
    if name not in _SETTINGS:
        raise InvalidInput(f"unknown network {name!r}: the name must be one of {', '.join(map(repr, NETWORKS))}")
    settings = _SETTINGS[name]
    if len(dataset.train_labels) >= 10_000:
        settings = replace(settings, crop=2, mirror=dataset.name in _MIRRORED)
    else:
        settings = replace(settings, batch_size=64)
    return replace(settings, epochs=_QUICK_EPOCHS, images=_QUICK_IMAGES) if quick else settings


def trained(
    name: str,
    dataset: Dataset,
    *,
    seed: int = 0,
    cache: Path | None = None,
    progress: Progress | None = None,
    quick: bool = False,
) -> nn.Module:
    """The zoo's network ``name`` (see `zoo.NETWORKS`), trained on ``dataset``'s training images; in eval mode on the CPU.

    The settings are `settings_for`'s. With ``cache``, a folder that is made when missing, the weights are kept there as a safetensors
    file that names the data (with a hash of its content), the network with its arguments, the settings, the seed and the version of
    this module, and a hash of the weights. A later call with the same of all these reads it and does not train. A file that is damaged
    or states anything else is never used: a warning says so, and the network is trained again and the file replaced.

    Raises InvalidInput for an unknown name, images that do not suit the network, and a cache folder that cannot be written.
    """
    settings = settings_for(name, dataset, quick)
    if dataset.train_images.ndim != 4 or dataset.train_images.shape[2] != dataset.train_images.shape[3]:
        raise InvalidInput(
            f"{name}: the images of {dataset.name!r} must be (n, C, H, H), as high as wide; "
            f"found {tuple(dataset.train_images.shape)}; pad them"
        )
    _, channels, size, _ = dataset.train_images.shape
    entry = NETWORKS[name]
    model = entry.make(in_channels=channels, classes=len(dataset.classes), image_size=size, seed=seed)
    path: Path | None = None
    stated = ""
    if cache is not None:
        facts = {
            "data": dataset.name,
            "data_sha256": digest(dataset.train_images, dataset.train_labels),
            "network": name,
            "arguments": {**entry.arguments, "in_channels": channels, "classes": len(dataset.classes), "image_size": size},
            "seed": seed,
            "settings": asdict(settings),
            "version": VERSION,
        }
        stated = json.dumps(facts, sort_keys=True)
        key = hashlib.sha256(stated.encode()).hexdigest()[:12]
        path = writable(Path(cache)) / f"{dataset.name}-{name}-seed{seed}-{key}.safetensors"
        if restored(model, path, stated):
            return model
    train(model, dataset.train_images, dataset.train_labels, settings, seed=seed, progress=progress)
    if path is not None:
        store(model, path, stated)
    return model


def train(model: nn.Module, images: Tensor, labels: Tensor, settings: Settings, *, seed: int, progress: Progress | None = None) -> None:
    """Train ``model``, on the CPU, in place to classify ``images`` (n, C, H, W) as ``labels`` (n,), integers.

    The order of the images, the crops and the flips come from a generator seeded with ``seed``; dropout draws from the global one, which is
    seeded for the time of training and then put back as it was. So the same model, data, settings, seed and number of threads give the
    same weights. After each epoch ``progress`` is called with the number of epochs done and the epoch's mean loss. The model is
    left in eval mode, without gradients.

    Raises InvalidInput for shapes that cannot be trained on, and when the loss is no longer finite.
    """
    check_pairs(images, labels, settings.batch_size)
    if images.ndim != 4:
        raise InvalidInput(f"images must be (n, C, H, W), found {tuple(images.shape)}; reshape them")
    images, labels = images[: settings.images], labels[: settings.images]
    generator = torch.Generator().manual_seed(seed)
    optimizer = _optimizer(model, settings)
    # The schedule's arithmetic divides by its number of steps less one.
    steps = max(2, settings.epochs * math.ceil(len(labels) / settings.batch_size))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=settings.learning_rate, total_steps=steps)
    model.train()
    # Channels last: the convolutions' faster layout on CPUs; the values are the same.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            for epoch in range(1, settings.epochs + 1):
                mean = _epoch(model, images, labels, settings, generator, optimizer, schedule)
                if not math.isfinite(mean):
                    raise InvalidInput(
                        f"the training loss is {mean} after epoch {epoch}: it must be finite; "
                        f"lower learning_rate (now {settings.learning_rate}) or look for non-finite images"
                    )
                if progress is not None:
                    progress(epoch, mean)
    finally:
        model.zero_grad()
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        model.eval()


def augmented(batch: Tensor, crop: int, mirror: bool, generator: torch.Generator) -> Tensor:
    """``batch`` (B, C, H, W) with each image shifted by up to ``crop`` pixels both ways, zeros coming in, and half of them mirrored."""
    count, _, height, width = batch.shape
    if crop:
        padded = functional.pad(batch, (crop, crop, crop, crop))
        down, right = torch.randint(2 * crop + 1, (2, count), generator=generator)
        # (B, C, 2 crop + 1, 2 crop + 1, H, W), a view: every possible part of every image
        parts = padded.unfold(2, height, 1).unfold(3, width, 1)
        batch = parts[torch.arange(count), :, down, right]
    if mirror:
        flipped = torch.rand(count, generator=generator) < 0.5
        batch = torch.where(flipped[:, None, None, None], batch.flip(3), batch)
    return batch


def _epoch(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    settings: Settings,
    generator: torch.Generator,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> float:
    """One pass over all images in a new order; the mean loss."""
    total = torch.zeros(())
    for rows in torch.split(torch.randperm(len(labels), generator=generator), settings.batch_size):
        batch = augmented(images[rows], settings.crop, settings.mirror, generator).contiguous(memory_format=torch.channels_last)
        loss = functional.cross_entropy(model(batch), labels[rows], label_smoothing=settings.label_smoothing)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        total += loss.detach() * len(rows)
    return total.item() / len(labels)


def _optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    # One kernel for all parameters: on small networks the optimiser's own overhead is much of the time.
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=0.9, nesterov=True, fused=True)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)
