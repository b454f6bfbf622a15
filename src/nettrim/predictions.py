"""Which outputs hold scores of classes, along which dimension, and how many labelled entries are predicted right."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .assignment import Layout
from .outputs import Outputs


@dataclass(frozen=True)
class Classes:
    """An output ``path`` whose dimension ``dimension`` (of ``dimensions``) holds one score for each of ``count`` classes."""

    path: str
    dimension: int
    dimensions: int
    count: int

    @property
    def words(self) -> str:
        """Where the classes are, for a certificate."""
        where = "the last dimension" if self.dimension == self.dimensions - 1 else f"dimension {self.dimension}"
        return f"{where} of {self.path or 'the output'}"


def classes_of(outputs: Outputs, counted: Container[str] | None = None, layouts: Mapping[str, Layout] | None = None) -> list[Classes]:
    """The outputs that hold scores of two or more classes: along dimension 1 where there are four or more (channels), else the last.

    ``counted`` names the outputs that are looked at, by default all. The dimension of an output's samples holds no classes.
    """
    found = []
    for path, Y in outputs.scores.items():
        if (counted is not None and path not in counted) or Y.is_complex() or Y.ndim < 2:
            continue
        place, layout = _usual(Y), (layouts or {}).get(path)
        if Y.shape[place] > 1 and (layout is None or layout.dimension != place):
            found.append(Classes(path, place, Y.ndim, Y.shape[place]))
    return found


def rows_of(Y: Tensor) -> int:
    """The rows of an output: its entries, those along the dimension where classes would be counted once."""
    return Y.numel() // max(1, Y.shape[_usual(Y)]) if Y.ndim > 1 else Y.numel()


def _usual(Y: Tensor) -> int:
    return 1 if Y.ndim >= 4 else Y.ndim - 1


def labelled(outputs: Outputs, labels: Tensor, samples: int, layouts: Mapping[str, Layout]) -> list[Classes]:
    """The outputs that labels fit: of an output's shape without its classes, as it lies or sorted by samples, and below their number."""
    found = []
    for path, Y in outputs.scores.items():
        layout = layouts.get(path)
        for place in dict.fromkeys((_usual(Y), Y.ndim - 1, 1)) if Y.ndim > 1 and not Y.is_complex() else ():
            free = Y.shape[place] > 1 and (layout is None or layout.dimension != place)
            fits = free and _placed(Y.select(place, 0), place, labels, samples, layout) is not None
            if fits and (not labels.numel() or int(labels.max()) < Y.shape[place]):
                found.append(Classes(path, place, Y.ndim, Y.shape[place]))
                break
    return found


def predicted(Y: Tensor, classes: Classes) -> Tensor:
    """The class of the largest score."""
    return Y.argmax(classes.dimension)


def stayed(Y: Tensor, X: Tensor, classes: Classes) -> Tensor:
    """Whether the predicted class stayed, entry by entry; scores that are not finite are no prediction."""
    return (predicted(Y, classes) == predicted(X, classes)) & torch.isfinite(X).all(classes.dimension)


def right(Y: Tensor, classes: Classes, labels: Tensor, samples: int, layout: Layout | None) -> tuple[int, int] | None:
    """How many labelled entries are predicted right, and of how many (negative labels are none); ``None`` where the labels do not fit."""
    guess = torch.where(torch.isfinite(Y).all(classes.dimension), predicted(Y, classes), -1)
    placed = _placed(guess, classes.dimension, labels, samples, layout)
    if placed is None or (labels.numel() and int(labels.max()) >= Y.shape[classes.dimension]):
        return None
    truth = labels.to(placed.device)
    given = truth >= 0
    return int(((placed == truth) & given).sum()), int(given.sum())


def _placed(predictions: Tensor, removed: int, labels: Tensor, samples: int, layout: Layout | None) -> Tensor | None:
    """The predictions as the labels lie: by samples where it is known which belong to which, or as they are."""
    if layout is not None:
        ordered = layout.without(removed).by_sample(predictions, samples)
        for form in (ordered.squeeze(1) if ordered.shape[1] == 1 else ordered, ordered):
            if form.shape == labels.shape:
                return form
    return predictions if predictions.shape == labels.shape else None
