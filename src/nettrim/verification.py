"""Runs the reference and the pruned network side by side, and certifies what the pruned one can have moved.

Everything is recomputed in float64 from stored weights, in one pass, batch by batch; nothing comes from a solver.
"""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import calibration as data
from .calibration import Calibration
from .capture import Replica, Scan, Selection, paired, selection_for
from .certificate import (
    ROUNDING,
    Certificate,
    HeldOutCertificate,
    LayerCertificate,
    LayerTally,
    NetworkCertificate,
    clopper_pearson_upper,
    entry_norm,
    spectral_norm,
    within,
)
from .graph import Chain, Graph
from .preimage import Activation
from .progress import Advance, counted, silent
from .status import InvalidInput
from .units import Call, Unit

CONFIDENCE = 0.95
LEVEL = 0.1  # relative discrepancy whose probability of being exceeded is bounded


@dataclass(frozen=True)
class Claim:
    """What is to be certified of one pruned layer.

    What was asked for: ``tolerance`` is absolute, ``budget`` a number of weights, ``pattern`` which sets of them may stay; ``None`` or
    empty for none. ``gap_kind`` and ``gap_level`` name the l1 program whose gap is recomputed; ``source`` says where the activation comes
    from (see :class:`nettrim.graph.Reading`).
    """

    name: str
    activation: Activation
    tolerance: float | None
    gap_kind: str
    gap_level: float
    source: str = "graph"
    budget: int | None = None
    pattern: str = ""


@dataclass(frozen=True)
class Setup:
    """What a certificate says of the run: method, program, scheme, arithmetic, seed and the cap on samples."""

    method: str
    program: str
    scheme: str
    arithmetic: str
    max_samples: int
    seed: int
    reference_hash: str
    weights_hash: str


def rounding_of(reference: Replica) -> float:
    """Relative allowance for rounding: of summation in float64, or of the passes where the model does not run in float64."""
    return max(ROUNDING, 32 * reference.precision)


def certify(
    reference: Replica,
    pruned: Replica,
    claims: Sequence[Claim],
    graph: Graph,
    batches: Calibration,
    found: Scan,
    setup: Setup,
    advance: Advance = silent,
) -> Certificate:
    """One pass over the calibration data through both networks; the certificate of all layers and of the network."""
    names = [claim.name for claim in claims]
    after, before = pruned.units(names), reference.units(names)
    tallies = {
        claim.name: LayerTally(
            after[claim.name].weights(),
            after[claim.name].bias() is not None,
            claim.activation,
            claim.gap_kind,
            claim.gap_level,
            after[claim.name].view.groups,
        )
        for claim in claims
    }
    selections = {name: selection_for(before[name], found.rows[name], setup.max_samples, setup.seed) for name in names}
    start = dict.fromkeys(names, 0)
    output = _OutputTally()
    digest = hashlib.sha256()
    for batch in counted(batches, batches.count, advance, "certifying"):
        data.update_hash(digest, batch)
        seen, out_before = reference.calls(batch, names)
        waiting = {name: list(calls) for name, calls in seen.items()}
        del seen

        def receive(name: str, call: Call, waiting: dict[str, list[Call]] = waiting) -> None:
            (pair,) = paired(name, waiting[name][:1], [call])
            del waiting[name][0]
            count = _tally(tallies[name], before[name], after[name], *pair, setup.scheme, selections[name], start[name])
            start[name] += count

        out_after = pruned.stream(batch, names, receive)
        for name, left in waiting.items():
            list(paired(name, left, []))
        output.add(out_before, out_after)
    bounds = _Bounds(claims, tallies, graph, pruned, reference, setup.scheme, rounding_of(reference))
    layers = tuple(
        tallies[claim.name].certificate(
            claim.name,
            claim.tolerance,
            *bounds.of_layer(claim.name, found.calls[claim.name]),
            claim.source,
            rounding_of(reference),
            bounds.theorem.get(claim.name),
            claim.budget,
            claim.pattern,
            after[claim.name].view.weights(),
        )
        for claim in claims
    )
    return Certificate(
        method=setup.method,
        program=setup.program,
        scheme=setup.scheme,
        arithmetic=setup.arithmetic,
        calibration_hash=digest.hexdigest(),
        reference_hash=setup.reference_hash,
        weights_hash=setup.weights_hash,
        max_samples=setup.max_samples,
        seed=setup.seed,
        versions=versions(),
        layers=layers,
        network=_network(bounds, output, layers, setup.scheme, rounding_of(reference)),
    )


def _tally(
    tally: LayerTally, before: Unit, after: Unit, reference: Call, pruned: Call, scheme: str, selection: Selection, start: int
) -> int:
    """Adds one call of a layer in both networks to its tally; the number of its rows."""
    lo, hi, Y = before.target(reference)
    if scheme == "parallel":
        x, branch = reference.x, before.branch(reference)
        Z, original = after.respond(x), before.own(reference.y)
    else:
        x, branch = pruned.x, after.branch(pruned)
        Z, original = after.own(pruned.y), before.respond(x)
    if branch is not None:
        lo, hi = lo - branch, hi - branch
    moved = before.output(after.full(pruned)) - before.output(before.full(reference))
    rows = selection.within(start, len(Y))
    tally.add((lo, hi), Y, Z, original, float(moved.square().sum()), rows, lambda which: before.view.rows(x, which))
    return len(Y)


class _Bounds:
    """Network bounds along the chain (docs/theory.md, section 4), on all calibration rows."""

    def __init__(
        self,
        claims: Sequence[Claim],
        tallies: Mapping[str, LayerTally],
        graph: Graph,
        pruned: Replica,
        original: Replica,
        scheme: str,
        rounding: float,
    ) -> None:
        # in the cascade nothing accumulates: where paths branch, the last layer's own distance says all about what follows it
        self.partial = scheme == "cascade" and bool(graph.chain.reason) and not graph.tail.reason
        chain = graph.tail if self.partial else graph.chain
        self.chain, self.scheme = chain, scheme
        self.distances = {name: math.sqrt(tally.distance_all) for name, tally in tallies.items()}
        everything = all(tally.rows == tally.rows_total for tally in tallies.values())
        # what is proven from tolerances alone needs them to be met, on all rows
        self.tolerances = {
            claim.name: claim.tolerance
            for claim in claims
            if claim.tolerance is not None
            and everything
            and within(self.distances[claim.name], claim.tolerance, math.sqrt(tallies[claim.name].reference_all), rounding)
        }
        self.gammas = {
            name: tolerance / math.sqrt(tallies[name].original_distance)
            for name, tolerance in self.tolerances.items()
            if tallies[name].original_distance > 0
        }
        self.layers = _chain_layers(chain, pruned, self.distances)
        # the cascade's published bound speaks of the original weights, the parallel one of the pruned ones
        source = _chain_layers(chain, original, self.distances) if scheme == "cascade" else self.layers
        self.entries = {name: factor * entry_norm(W) for name, (W, _, factor) in source.items()}
        self.after: dict[str, float] = {}
        self.theorem: dict[str, float] = {}
        self.last: str | None = None
        self.output: float | None = None
        self.output_from_tolerances: float | None = None
        self.output_link_normalised: float | None = None
        self._walk()

    def _walk(self) -> None:
        value, from_tolerances, link = 0.0, 0.0, 0.0
        complete = True
        for step in self.chain.steps:
            if step.layer is None:
                value, from_tolerances, link = (step.lipschitz * x for x in (value, from_tolerances, link))
                continue
            name, pruned = step.layer, step.layer in self.distances
            if pruned:
                self.last = name
            own, stated = self.distances.get(name, 0.0), self.tolerances.get(name)
            complete = complete and (stated is not None or not pruned)
            stated = stated or 0.0
            if self.scheme == "cascade" and pruned:
                link = stated if link == 0.0 else self.gammas.get(name, math.inf) * self.entries[name] * link
                value, from_tolerances = own, stated
            else:
                spectral = _operator_norm(*self.layers[name]) if value or from_tolerances else 0.0
                value = own + spectral * value
                from_tolerances = stated + spectral * from_tolerances
                link = stated + self.entries[name] * link
            self.after[name] = value
            if pruned and complete and math.isfinite(link) and not self.partial:
                self.theorem[name] = link
        self.reason = self.chain.reason
        if not self.reason and not math.isfinite(value):
            self.reason = "no bound is known for the operator norm of a convolution with its padding mode"
        self.after = {name: value for name, value in self.after.items() if math.isfinite(value)}
        if not self.reason:
            self.output = value
            if complete and self.tolerances:
                self.output_from_tolerances = from_tolerances
                self.output_link_normalised = link if math.isfinite(link) and not self.partial else None

    def of_layer(self, name: str, calls: int) -> tuple[float | None, str]:
        """The proven bound of a layer's discrepancy in the network, or ``None`` and the reason."""
        if self.scheme == "cascade":
            return self.distances[name], ""
        if name in self.after:
            return self.after[name], ""
        if calls > 1:
            return None, f"it is called {calls} times in a pass"
        return None, self.reason


def _chain_layers(chain: Chain, replica: Replica, pruned: Container[str]) -> dict[str, tuple[Tensor, int, float]]:
    """For every layer of the chain its weights, its groups, and how much more than their norm its operator norm can be.

    Batch-norm is part of a pruned layer; behind any other it is a step of its own.
    """
    names = [step.layer for step in chain.steps if step.layer is not None]
    units = replica.units([name for name in names if name in pruned])
    found = {}
    for name, view in replica.views(names).items():
        W = units[name].weights() if name in units else view.weights().double()
        found[name] = (W, view.groups, view.operator_factor())
    return found


def _operator_norm(W: Tensor, groups: int, factor: float) -> float:
    """An upper bound of a layer's operator norm (docs/theory.md, (4.7)); groups act on disjoint channels."""
    return factor * max(spectral_norm(part) for part in W.chunk(groups, dim=1))


class _OutputTally:
    """Discrepancy and agreement of the two networks' outputs."""

    def __init__(self) -> None:
        self.rows = self.same = 0
        self.reference = self.moved = 0.0
        self.classes = True

    def add(self, before: Any, after: Any) -> None:
        pairs = _output_pairs(before, after)
        for Y, X in pairs:
            self.reference += float(Y.double().square().sum())
            self.moved += float((X.double() - Y.double()).square().sum())
        self.rows += len(pairs[0][0])
        same = _same_class(*pairs[0]) if len(pairs) == 1 else None
        self.classes = self.classes and same is not None
        self.same += 0 if same is None else int(same.sum())


def _output_pairs(before: Any, after: Any) -> list[tuple[Tensor, Tensor]]:
    """The floating-point tensors of two outputs, pairwise, with a sample dimension in front."""
    first, second = data.output_tensors(before), data.output_tensors(after)
    if first.keys() != second.keys() or any(Y.shape != second[key].shape for key, Y in first.items()):
        raise InvalidInput("the pruned network's output has another form than the reference network's, so they cannot be compared")
    return [(Y.reshape(1) if Y.ndim == 0 else Y, second[key].reshape(Y.shape or (1,))) for key, Y in first.items()]


def _same_class(before: Tensor, after: Tensor) -> Tensor | None:
    """Whether the predicted class (largest entry of the last dimension) stayed, sample by sample; ``None`` when there are no classes."""
    if before.ndim != 2 or before.shape[1] < 2:
        return None
    return (before.argmax(1) == after.argmax(1)) & torch.isfinite(after).all(1)


def _network(bounds: _Bounds, output: _OutputTally, layers: Sequence[LayerCertificate], scheme: str, rounding: float) -> NetworkCertificate:
    achieved, reference = math.sqrt(output.moved), math.sqrt(output.reference)
    bound = bounds.output
    return NetworkCertificate(
        scheme=scheme,
        output_layer=bounds.last or layers[-1].name,
        rows=output.rows,
        reference_norm=reference,
        bound=bound,
        bound_from_tolerances=bounds.output_from_tolerances,
        bound_link_normalised=bounds.output_link_normalised,
        reason=bounds.reason,
        achieved=achieved,
        agreement=output.same / output.rows if output.classes and output.rows else None,
        sound=within(achieved, bound, reference, rounding),
    )


def check_heldout(reference: Replica, batches: Calibration, calibration: Calibration) -> int:
    """Refuses held-out data that cannot serve, before any work is done; the number of samples that are calibration samples too.

    Raises:
        InvalidInput: a batch that cannot be used, or data that are all calibration data.
    """
    known = set(data.sample_digests(calibration))
    overlap = [digest in known for digest in data.sample_digests(batches)]
    if all(overlap):
        raise InvalidInput(
            f"{batches.what}: all of these samples are calibration data; a bound for unseen inputs needs samples "
            "that were not used for pruning"
        )
    try:
        reference.run(next(iter(batches)))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise InvalidInput(f"{batches.what}: the model cannot run on batch 1: {error}") from error
    return sum(overlap)


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
    """Exact binomial bounds from held-out samples (design section 4, item 3), and accuracy where batches carry labels.

    A response that is not finite counts as exceeding any level, and as a change of class.
    """
    if not 0 < confidence < 1:
        raise InvalidInput(f"confidence must lie in (0, 1), found {confidence}")
    if not level >= 0:
        raise InvalidInput(f"level must be >= 0, found {level}")
    overlap = check_heldout(reference, batches, calibration)
    digest = hashlib.sha256()
    samples = exceed = changes = right_before = right_after = labelled = 0
    classes = True
    for batch in counted(batches, batches.count, advance, "running held-out samples"):
        data.update_hash(digest, batch)
        pairs = _output_pairs(reference.run(batch), pruned.run(batch))
        (Y, X), *others = pairs
        samples += len(Y)
        exceed += int((~(_moved(pairs) <= level)).sum())
        same = None if others else _same_class(Y, X)
        classes = classes and same is not None
        if same is not None:
            changes += int((~same).sum())
            truth = data.labels(batch)
            if truth is not None and truth.shape == same.shape:
                truth = truth.to(Y.device)
                labelled += len(truth)
                right_before += int((Y.argmax(1) == truth).sum())
                right_after += int((X.argmax(1) == truth).sum())
    return HeldOutCertificate(
        samples=samples,
        data_hash=digest.hexdigest(),
        confidence=confidence,
        class_changes=changes if classes else None,
        class_change_bound=clopper_pearson_upper(changes, samples, confidence) if classes else None,
        level=level,
        exceed=exceed,
        exceed_bound=clopper_pearson_upper(exceed, samples, confidence),
        accuracy_before=right_before / samples if labelled == samples else None,
        accuracy_after=right_after / samples if labelled == samples else None,
        overlap=overlap,
    )


def _moved(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The relative discrepancy of each sample, over all outputs that have one row a sample."""
    rows = len(pairs[0][0])
    kept = [(Y.double().reshape(rows, -1), X.double().reshape(rows, -1)) for Y, X in pairs if len(Y) == rows]
    moved = sum((X - Y).square().sum(1) for Y, X in kept)
    size = sum(Y.square().sum(1) for Y, X in kept)
    assert isinstance(moved, Tensor) and isinstance(size, Tensor)
    return torch.where(moved == 0, 0.0, (moved / size).sqrt())


def versions() -> dict[str, str]:
    """Versions of everything that could change a number."""
    return {"nettrim": version("nettrim"), "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
