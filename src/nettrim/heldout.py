"""What held-out samples say about unseen inputs: one event a sample, exact binomial bounds, and accuracy where there are labels."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import calibration as data
from .assignment import Layout, best, divisible, form_of, joined, layouts_of
from .calibration import Calibration
from .capture import Replica
from .certificate import HeldOutCertificate, clopper_pearson_upper
from .diagnosis import must_run
from .outputs import Outputs, outputs_of, pairs
from .predictions import Classes, classes_of, labelled, right, stayed
from .progress import Advance, counted, silent
from .status import InvalidInput, first_line

CONFIDENCE = 0.95
LEVEL = 0.1  # relative discrepancy whose probability of being exceeded is bounded
_FAILS = (RuntimeError, ValueError, TypeError, IndexError)


def check_heldout(reference: Replica, batches: Calibration, calibration: Calibration) -> int:
    """Refuses held-out data that cannot serve, before any work is done; the number of samples that are calibration samples too.

    Raises:
        InvalidInput: a batch that cannot be used or on which the model does not run, or data that are all calibration data.
    """
    overlap = _overlap(batches, calibration)
    for number, batch in enumerate(batches, 1):
        _run(reference, batch, batches, number)
    return overlap


def _overlap(batches: Calibration, calibration: Calibration) -> int:
    """How many held-out samples are calibration samples too. Raises InvalidInput where all are."""
    known = set(data.sample_digests(calibration))
    overlap = [digest in known for digest in data.sample_digests(batches)]
    if all(overlap):
        raise InvalidInput(
            f"{batches.what}: all of these samples are calibration data; a bound for unseen inputs needs samples "
            "that were not used for pruning"
        )
    return sum(overlap)


def _run(network: Replica, batch: Any, batches: Calibration, number: int) -> Any:
    """The network's output on a batch. Raises InvalidInput where it does not run."""
    with must_run(network.model, network.run, batch, f"{batches.what}: the model cannot run on batch {number}"):
        return network.run(batch)


def certify_heldout(
    reference: Replica,
    pruned: Replica,
    batches: Calibration,
    calibration: Calibration,
    *,
    confidence: float = CONFIDENCE,
    level: float = LEVEL,
    advance: Advance = silent,
) -> HeldOutCertificate:
    """Exact binomial bounds from held-out samples (docs/theory.md, section 5), and accuracy where batches carry labels.

    There is one event a sample, however many predictions a sample has: any of them changed; the sample's relative discrepancy, over all
    its outputs, exceeds ``level``. That outputs belong to samples one by one is checked on all batches and both networks. Where they do
    not, rows or batches are counted, and no bound is stated. A response that is not finite counts as exceeding any level, and as a change.

    Raises:
        InvalidInput: settings out of range, data that are all calibration data, or networks with outputs of different forms.
    """
    if not 0 < confidence < 1:
        raise InvalidInput(f"confidence must lie in (0, 1), found {confidence}")
    if not (level >= 0 and math.isfinite(level)):
        raise InvalidInput(f"level must be >= 0, found {level}")
    overlap = _overlap(batches, calibration)
    reading = read_outputs((reference, pruned), batches)
    digest, counts = hashlib.sha256(), _Counts(reading, level)
    for batch in counted(batches, batches.count, advance, "running held-out samples"):
        data.update_hash(digest, batch)
        counts.add(batch, outputs_of(reference.run(batch)), outputs_of(pruned.run(batch)))
    proven = reading.unit == "sample"
    changes = counts.changes if reading.classes else None
    return HeldOutCertificate(
        samples=counts.samples,
        data_hash=digest.hexdigest(),
        confidence=confidence,
        class_changes=changes,
        class_change_bound=clopper_pearson_upper(changes, counts.units, confidence) if proven and changes is not None else None,
        level=level,
        exceed=counts.exceed,
        exceed_bound=clopper_pearson_upper(counts.exceed, counts.units, confidence) if proven else None,
        accuracy_before=None if counts.accuracy is None else counts.accuracy[0],
        accuracy_after=None if counts.accuracy is None else counts.accuracy[1],
        overlap=overlap,
        unit=reading.unit,
        units=0 if proven else counts.units,
        reason=reading.reason,
        note=reading.note,
        classes="; ".join(one.words for one in reading.classes) + (f"; {reading.chosen}" if reading.chosen and reading.classes else ""),
        classes_reason="" if reading.classes else "no output that is counted holds scores of two or more classes",
        predictions=counts.predictions if reading.classes else None,
        predictions_changed=counts.predictions_changed if reading.classes else None,
        integer_changes=counts.integer_changes if counts.integers else None,
        labelled=counts.given if counts.accuracy is not None else None,
        accuracy_reason="" if counts.accuracy is not None else reading.unlabelled or "no label is 0 or above",
        left_out=reading.left_out,
    )


@dataclass
class Reading:
    """How held-out outputs are to be counted.

    ``unit``: ``"sample"``, or ``"row"`` or ``"batch"`` where outputs do not belong to samples one by one, for the ``reason`` given.
    ``counted``: the outputs that are; ``left_out`` names the others, with the reason. ``layouts`` of the outputs that belong to samples;
    ``classes`` whose predictions are counted; ``truth``: the output that labels fit (``None``, and ``unlabelled`` says why).
    """

    unit: str = "sample"
    reason: str = ""
    note: str = ""
    counted: frozenset[str] = frozenset()
    layouts: dict[str, Layout] = field(default_factory=dict)
    classes: list[Classes] = field(default_factory=list)
    chosen: str = ""
    truth: Classes | None = None
    unlabelled: str = ""
    left_out: tuple[str, ...] = ()

    def by_unit(self, Y: Tensor, path: str, samples: int, removed: int | None = None) -> Tensor:
        """An output as (units, entries); ``removed`` names a dimension that was summed up."""
        if self.unit == "batch":
            return Y.reshape(1, -1)
        if self.unit == "row":
            return Y.reshape(len(Y), -1)
        layout = self.layouts[path] if removed is None else self.layouts[path].without(removed)
        return layout.by_sample(Y, samples).reshape(samples, -1)


def read_outputs(networks: Sequence[Replica], batches: Calibration) -> Reading:
    """Which outputs belong to which samples, where classes are, and which output the labels fit; runs every batch whole and in parts."""
    survey = _Survey()
    for number, batch in enumerate(batches, 1):
        together = survey.together(batch)
        for network in networks:
            outputs = outputs_of(_run(network, batch, batches, number))
            if network is networks[0]:
                survey.add(batch, outputs)
            if together is None or survey.failed:
                continue
            try:
                survey.check(layouts_of(network, together, outputs if together is batch else None))
            except _FAILS as error:
                survey.fail(f"the model does not run on a part of a batch ({first_line(error)})")
    return survey.reading()


class _Survey:
    """Collects what all batches say about the form of the outputs."""

    def __init__(self) -> None:
        self.seen: list[tuple[Outputs, int, Tensor | None]] = []  # of every batch: outputs without values, samples, labels
        self.found: dict[str, dict[Layout, float]] | None = None
        self.failed = ""
        self.waiting: dict[Any, Any] = {}

    def together(self, batch: Any) -> Any:
        """What to check a batch on: itself, or two batches of one sample as one, since a single sample shows nothing; ``None``: later."""
        if not divisible(batch):
            self.fail("the tensors of a batch have different first dimensions, so its samples cannot be told")
            return None
        if data.samples(batch) > 1:
            return batch
        form = form_of(batch)
        if form in self.waiting:
            return joined(self.waiting.pop(form), batch)
        self.waiting[form] = batch
        return None

    def add(self, batch: Any, outputs: Outputs) -> None:
        """Notes the form of a batch's outputs, and its labels."""
        empty = Outputs({path: Y.to("meta") for path, Y in outputs.tensors.items()})
        self.seen.append((empty, data.samples(batch), data.labels(batch)))

    def check(self, layouts: dict[str, dict[Layout, float]]) -> None:
        """Keeps the layouts that fit this batch too."""
        known = layouts if self.found is None else self.found
        self.found = {
            path: {layout: max(missed, layouts[path][layout]) for layout, missed in found.items() if layout in layouts.get(path, {})}
            for path, found in known.items()
        }

    def fail(self, reason: str) -> None:
        """Nothing can be told, for this reason."""
        self.failed = self.failed or reason

    def reading(self) -> Reading:
        """How to count."""
        layouts = {} if self.failed else self._layouts()
        paths = dict.fromkeys(path for outputs, _, _ in self.seen for path in outputs.tensors)
        scores = dict.fromkeys(path for outputs, _, _ in self.seen for path in outputs.scores)
        if any(path in layouts for path in scores):
            reading = Reading(counted=frozenset(layouts), layouts=layouts)
            if self.found is None:
                reading.note = "every batch holds one sample, and no two could be joined to check what belongs to which: each ran by itself"
        else:
            reason = self.failed or (
                "on a part of a batch the network does not give the same outputs for the same samples: samples depend on one another, or "
                "outputs cannot be told to belong to one"
            )
            rows = frozenset(path for path in paths if self._has_rows(path))
            unit = "row" if rows & scores.keys() else "batch"
            reading = Reading(unit, reason, counted=rows if unit == "row" else frozenset(paths))
        reading.left_out = tuple(f"{path or 'the output'} ({self._why(path)})" for path in paths if path not in reading.counted)
        self._read_classes(reading)
        return reading

    def _layouts(self) -> dict[str, Layout]:
        """The layout of every output that belongs to samples in all batches."""
        made: dict[str, Layout] = {}
        for path in self.seen[0][0].tensors:
            known = {Layout(0): 0.0} if self.found is None else self.found.get(path, {})
            able = {
                layout: missed
                for layout, missed in known.items()
                if all(path in outputs.tensors and layout.fits(outputs.tensors[path], samples) for outputs, samples, _ in self.seen)
            }
            chosen = best(able)
            if chosen is not None:
                made[path] = chosen
        return made

    def _has_rows(self, path: str) -> bool:
        """Whether an output has as many rows as the first one with rows, in every batch."""
        return all(
            path in outputs.tensors
            and outputs.tensors[path].ndim > 0
            and len(outputs.tensors[path]) == next(len(Y) for Y in outputs.tensors.values() if Y.ndim)
            for outputs, _, _ in self.seen
        )

    def _why(self, path: str) -> str:
        """Why an output belongs to no unit that is counted."""
        number = all(not outputs.tensors[path].ndim for outputs, _, _ in self.seen if path in outputs.tensors)
        return "one number for a whole batch" if number else "its entries could not be told to belong to samples one by one"

    def _read_classes(self, reading: Reading) -> None:
        """Which predictions are counted: those of the output that the labels fit, or of every output with scores of classes."""
        usable: dict[str, Classes] | None = None
        fitting: dict[str, Classes] | None = None
        for number, (outputs, samples, labels) in enumerate(self.seen, 1):
            usable = _common(usable, classes_of(outputs, reading.counted, reading.layouts))
            if labels is None:
                reading.unlabelled = reading.unlabelled or (
                    "the batches carry no integer labels" if number == 1 else f"batch {number} carries no integer labels"
                )
                continue
            fitting = _common(fitting, labelled(outputs, labels, samples, reading.layouts))
            if not fitting:
                reading.unlabelled = reading.unlabelled or (
                    f"the labels of batch {number}, of shape {tuple(labels.shape)}, fit no output with scores of classes"
                )
        reading.classes = list((usable or {}).values())
        able = list((fitting or {}).values())
        if len({classes.count for classes in able}) > 1:
            names = ", ".join(classes.path for classes in able)
            reading.unlabelled = reading.unlabelled or f"the labels fit several outputs with different numbers of classes ({names})"
        if reading.unlabelled:
            return
        reading.truth = able[0]
        if reading.truth.path in reading.counted:
            reading.chosen = "the output that the labels fit" if len(reading.classes) > 1 else ""
            reading.classes = [reading.truth]


def _common(known: dict[str, Classes] | None, new: Sequence[Classes]) -> dict[str, Classes]:
    """What all batches so far agree on, by output."""
    own = {classes.path: classes for classes in new}
    return own if known is None else {path: classes for path, classes in known.items() if own.get(path) == classes}


class _Counts:
    """Counts events, unit by unit."""

    def __init__(self, reading: Reading, level: float) -> None:
        self.reading, self.level = reading, level
        self.samples = self.units = self.exceed = self.changes = self.integer_changes = 0
        self.predictions = self.predictions_changed = self.given = 0
        self.right = [0, 0]
        self.integers = False

    @property
    def accuracy(self) -> tuple[float, float] | None:
        """Before and after, over the labelled entries."""
        if self.reading.truth is None or not self.given:
            return None
        return self.right[0] / self.given, self.right[1] / self.given

    def add(self, batch: Any, before: Outputs, after: Outputs) -> None:
        """Counts one batch."""
        reading, samples = self.reading, data.samples(batch)
        counted = [(path, Y, X) for path, Y, X in pairs(before, after) if path in reading.counted]
        moved = _moved([tuple(reading.by_unit(part, path, samples) for part in (Y, X)) for path, Y, X in counted])
        self.samples += samples
        self.units += len(moved)
        self.exceed += int((~(moved <= self.level)).sum())
        changed = torch.zeros(len(moved), dtype=torch.bool, device=moved.device)
        for path, Y in before.integers.items():
            if path in reading.counted:
                self.integers = True
                changed |= reading.by_unit(after.tensors[path] != Y, path, samples).any(1)
        self.integer_changes += int(changed.sum())
        for classes in reading.classes:
            kept = stayed(before.tensors[classes.path], after.tensors[classes.path], classes)
            self.predictions += kept.numel()
            self.predictions_changed += int((~kept).sum())
            changed |= ~reading.by_unit(kept, classes.path, samples, classes.dimension).all(1)
        self.changes += int(changed.sum())
        truth, labels = reading.truth, data.labels(batch)
        if truth is not None and labels is not None:
            layout = reading.layouts.get(truth.path)
            for place, outputs in enumerate((before, after)):
                found = right(outputs.tensors[truth.path], truth, labels, samples, layout)
                assert found is not None  # read on the same batches
                self.right[place] += found[0]
            self.given += int((labels >= 0).sum())


def _moved(parts: Sequence[tuple[Tensor, ...]]) -> Tensor:
    """The relative discrepancy of each unit, over all its outputs (units, entries)."""
    moved = torch.stack([_squares(X, Y) for Y, X in parts]).sum(0)
    size = torch.stack([_squares(Y) for Y, _ in parts]).sum(0)
    return torch.where(moved == 0, 0.0, (moved / size).sqrt())


def _squares(Y: Tensor, less: Tensor | None = None) -> Tensor:
    """The sum of squared absolute entries, row by row, in float64."""
    kind = torch.complex128 if Y.is_complex() else torch.float64
    wide = Y.to(kind) if less is None else Y.to(kind) - less.to(kind)
    return wide.abs().square().sum(1)


def contradictions(statement: HeldOutCertificate) -> list[str]:
    """What cannot be, whatever the data: numbers out of range, and bounds that do not follow from the counts."""
    found = []
    s = statement
    if not 0 < s.confidence < 1:
        found.append(f"confidence must lie in (0, 1), found {s.confidence}")
    if not s.level >= 0:
        found.append(f"level must be >= 0, found {s.level}")
    if s.unit not in ("sample", "row", "batch"):
        found.append(f"unit must be 'sample', 'row' or 'batch', found {s.unit!r}")
    if s.unit == "sample" and s.units:
        found.append(f"units must be 0 where samples are counted, found {s.units}")
    if s.samples < 1 or s.counted < 1:
        found.append("it must speak of at least one sample")
    limits = {"exceed": s.counted, "class_changes": s.counted, "integer_changes": s.counted, "overlap": s.samples}
    for name, limit in (limits | {"predictions_changed": s.predictions}).items():
        value = getattr(s, name)
        if value is not None and not 0 <= value <= (0 if limit is None else limit):
            found.append(f"{name} must lie in [0, {limit or 0}], found {value}")
    for name in ("predictions", "labelled"):
        value = getattr(s, name)
        if value is not None and value < 1:
            found.append(f"{name} must be at least 1, found {value}")
    for name in ("accuracy_before", "accuracy_after"):
        value = getattr(s, name)
        if value is not None and not 0 <= value <= 1:
            found.append(f"{name} must lie in [0, 1], found {value}")
        if value is not None and s.labelled is not None and abs(value * s.labelled - round(value * s.labelled)) > 1e-6 * max(1, s.labelled):
            found.append(f"{name} is {value}, which no count of {s.labelled} labelled entries gives")
    if (s.accuracy_before is None) != (s.accuracy_after is None):
        found.append("accuracy must be stated before and after, or not at all")
    if s.class_changes is not None and s.integer_changes is not None and s.integer_changes > s.class_changes:
        found.append(f"class_changes are stated as {s.class_changes}, fewer than integer_changes, which count too")
    return found or _wrong_bounds(s)


def _wrong_bounds(s: HeldOutCertificate) -> list[str]:
    found = []
    for count, name in ((s.exceed, "exceed_bound"), (s.class_changes, "class_change_bound")):
        stated = getattr(s, name)
        wanted = clopper_pearson_upper(count, s.counted, s.confidence) if s.unit == "sample" and count is not None else None
        fits = stated == wanted if stated is None or wanted is None else math.isclose(stated, wanted, rel_tol=1e-6, abs_tol=1e-6)
        if not fits:
            found.append(f"{name} is stated as {stated}, recomputed as {wanted}")
    return found
