"""The built-in training loop of network trimming: cross entropy on the user's labelled batches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .calibration import Calibration, forward, labels, samples
from .quiet import gradients
from .status import InvalidInput

IGNORED = -100
"""A label that cross entropy leaves out."""


def check_labelled(batches: Any, what: str) -> Calibration:
    """The batches, each of which must be (inputs, labels) with as many labels as samples. Raises InvalidInput."""
    checked = Calibration(batches, what)
    for number, batch in enumerate(checked, 1):
        _labels(batch, number, what)
    return checked


def check_trainable(model: nn.Module, training: Any, device: torch.device) -> None:
    """Refuses batches whose labels do not fit the model's scores (samples, classes), or (samples, classes, ...) and a label for each place.

    One pass, which need not be the same another time. Raises InvalidInput.
    """
    scores: Tensor | None = None
    for number, batch in enumerate(Calibration(training, "training"), 1):
        wanted = _labels(batch, number, "training")
        if scores is None:
            with torch.no_grad():
                found = forward(model, batch, device, None)
            if not isinstance(found, Tensor) or found.ndim < 2 or len(found) != len(wanted):
                what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise InvalidInput(
                    f"training: cross entropy needs one output (samples, classes), found {what}; give a training of your own: "
                    "NetworkTrimming(train=function)"
                )
            scores = found
        if wanted.shape[1:] != scores.shape[2:]:
            raise InvalidInput(
                f"training: the labels of batch {number} must be of shape {(len(wanted), *scores.shape[2:])} for scores of shape "
                f"(samples, classes, ...) = {tuple(scores.shape)}, found {tuple(wanted.shape)}"
            )
        odd = wanted[((wanted < 0) | (wanted >= scores.shape[1])) & (wanted != IGNORED)] if wanted.dtype != torch.bool else wanted[:0]
        if len(odd):
            raise InvalidInput(
                f"training: batch {number} has the label {int(odd.flatten()[0])}, but the model's classes are 0 to {scores.shape[1] - 1}"
            )


def _labels(batch: Any, number: int, what: str) -> Tensor:
    found = labels(batch)
    if found is None:
        raise InvalidInput(f"{what}: batch {number} has no labels; give (inputs, labels) pairs with labels as integers")
    count = len(found) if found.ndim else 0
    if count != samples(batch):
        raise InvalidInput(f"{what}: batch {number} has {count} labels for {samples(batch)} samples; give one for each")
    return found


def retrain(
    model: nn.Module, training: Iterable[Any], *, epochs: int, learning_rate: float, generator: torch.Generator, device: torch.device
) -> None:
    """Trains all parameters that are not frozen, in place, by Adam with a one-cycle schedule; leaves the model in eval mode.

    A list of batches is gone through in a new order in every epoch, drawn from ``generator``; another iterable in its own.
    Raises InvalidInput where nothing can learn, or the loss is no longer finite.
    """
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not learned:
        raise InvalidInput(
            "trim: every parameter is frozen (requires_grad=False), so nothing can be retrained; unfreeze a copy of the model"
        )
    count = sum(1 for _ in training)
    optimizer = torch.optim.Adam(learned, lr=learning_rate)
    # the schedule's arithmetic divides by its number of steps less one
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=max(2, epochs * count))
    model.train()
    try:
        with torch.enable_grad():
            for epoch in range(1, epochs + 1):
                for batch in _ordered(training, generator):
                    targets = labels(batch)
                    assert targets is not None
                    loss = functional.cross_entropy(forward(model, batch, device, None), targets.to(device).long())
                    optimizer.zero_grad()
                    with gradients():
                        loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    schedule.step()
                if not math.isfinite(loss.item()):
                    raise InvalidInput(
                        f"trim: the training loss is {loss.item()} in epoch {epoch}; lower learning_rate ({learning_rate:g})"
                    )
    finally:
        model.zero_grad(set_to_none=True)
        model.eval()


def _ordered(training: Iterable[Any], generator: torch.Generator) -> Iterable[Any]:
    if not isinstance(training, (list, tuple)):
        return training
    return (training[i] for i in torch.randperm(len(training), generator=generator).tolist())
