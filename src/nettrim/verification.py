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
from .certificate import Certificate, LayerCertificate, NetworkCertificate, within
from .graph import Chain, Graph
from .heldout import certify_heldout, check_heldout
from .outputs import changed_integers, changed_plain, outputs_of, squares
from .predictions import classes_of, rows_of, stayed
from .preimage import Activation
from .progress import Advance, counted, silent
from .tally import LayerTally, entry_norm, spectral_norm
from .units import Call, Unit

# all that certifies, on calibration data and on others
__all__ = ["Claim", "Setup", "certify", "certify_heldout", "check_heldout", "versions"]


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
    """What a certificate says of the run: method, program, scheme, arithmetic, seed, the cap on samples, and what else was trained."""

    method: str
    program: str
    scheme: str
    arithmetic: str
    max_samples: int
    seed: int
    reference_hash: str
    weights_hash: str
    trained: tuple[str, ...] = ()


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
            None if (fold := after[claim.name].fold) is None else fold.live,
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
    bounds = _Bounds(claims, tallies, graph, pruned, reference, setup.scheme, found.calls, math.sqrt(output.moved))
    layers = tuple(
        tallies[claim.name].certificate(
            claim.name,
            claim.tolerance,
            *bounds.of_layer(claim.name),
            claim.source,
            bounds.theorem.get(claim.name),
            claim.budget,
            claim.pattern,
            after[claim.name].view.weights(),
            bounds.rounding[claim.name],
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
        network=_network(bounds, output, layers, setup.scheme),
        trained=setup.trained,
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
    moved = before.output(after.full(pruned.native())) - before.output(before.full(reference.native()))
    rows = selection.within(start, len(Y))
    tally.add(
        (lo, hi),
        Y,
        Z,
        original,
        float(moved.square().sum()),
        rows,
        lambda which: before.view.rows(x, which),
        (before.rounding(reference), after.rounding(pruned)),
        float((pruned.x.double() - reference.x.double()).square().sum()),
    )
    return len(Y)


class _Bounds:
    """Network bounds along the chain (docs/theory.md, section 4), on all calibration rows.

    Where the networks do not run in float64, the bounds contain what rounding was measured to add: inside each layer, and between layers as
    far as inputs differ by more than what comes before them explains (4.6). Bounds from tolerances alone are then not stated.
    """

    def __init__(
        self,
        claims: Sequence[Claim],
        tallies: Mapping[str, LayerTally],
        graph: Graph,
        pruned: Replica,
        original: Replica,
        scheme: str,
        calls: Mapping[str, int],
        achieved: float,
    ) -> None:
        # in the cascade nothing accumulates: where paths branch, the last layer's own distance says all about what follows it
        self.partial = scheme == "cascade" and bool(graph.chain.reason) and not graph.tail.reason
        chain = graph.tail if self.partial else graph.chain
        self.chain, self.scheme, self.calls, self.achieved = chain, scheme, calls, achieved
        self.measured = pruned.dtype is None
        self.tallies = tallies
        self.rounding = {name: tally.rounding for name, tally in tallies.items()}
        self.output_rounding = 0.0
        self.distances = {name: math.sqrt(tally.distance_all) for name, tally in tallies.items()}
        everything = all(tally.rows == tally.rows_total for tally in tallies.values())
        # what is proven from tolerances alone needs them to be met, on all rows
        self.tolerances = {
            claim.name: claim.tolerance
            for claim in claims
            if claim.tolerance is not None
            and everything
            and within(self.distances[claim.name], claim.tolerance, math.sqrt(tallies[claim.name].reference_all))
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
        seen = 0.0  # what value bounds, as far as the last pruned layer's own discrepancy is known
        complete = not self.measured
        for step in self.chain.steps:
            if step.layer is None:
                value, from_tolerances, link, seen = (step.lipschitz * x for x in (value, from_tolerances, link, seen))
                continue
            name, pruned = step.layer, step.layer in self.distances
            repeated = self.calls.get(name, 1) > 1  # its numbers hold all calls, the chain only the first
            if pruned:
                self.last = name
            own, stated = self.distances.get(name, 0.0) + self.rounding.get(name, 0.0), self.tolerances.get(name)
            complete = complete and (stated is not None or not pruned)
            stated = stated or 0.0
            if self.scheme == "cascade" and pruned:
                link = stated if link == 0.0 or repeated else self.gammas.get(name, math.inf) * self.entries[name] * link
                value, from_tolerances = own, stated
            else:
                between = self._excess(math.sqrt(self.tallies[name].entered), seen) if pruned else 0.0
                spectral = _operator_norm(*self.layers[name]) if value or between or from_tolerances else 0.0
                value = own + spectral * (value + between)
                seen *= spectral
                from_tolerances = stated + spectral * from_tolerances
                link = stated + self.entries[name] * link
                if between and math.isfinite(spectral):
                    self.rounding[name] += spectral * between
            if pruned:
                seen = 0.0 if repeated else math.sqrt(self.tallies[name].discrepancy)
            if not repeated:
                self.after[name] = value
                if pruned and complete and math.isfinite(link) and not self.partial:
                    self.theorem[name] = link
        self.reason = self.chain.reason
        if not self.reason and not math.isfinite(value):
            self.reason = "no bound is known for the operator norm of a convolution with its padding mode"
        self.after = {name: value for name, value in self.after.items() if math.isfinite(value)}
        if not self.reason:
            self.output_rounding = self._excess(self.achieved, seen)
            self.output = value + self.output_rounding
            if complete and self.tolerances:
                self.output_from_tolerances = from_tolerances
                self.output_link_normalised = link if math.isfinite(link) and not self.partial else None

    def _excess(self, found: float, explained: float) -> float:
        """What of a discrepancy rounding has added since the last layer whose own discrepancy is known; in float64 nothing is taken so."""
        return max(0.0, found - explained) if self.measured else 0.0

    def of_layer(self, name: str) -> tuple[float | None, str]:
        """The proven bound of a layer's discrepancy in the network, or ``None`` and the reason."""
        if self.scheme == "cascade":
            return self.distances[name] + self.rounding[name], ""
        if name in self.after:
            return self.after[name], ""
        if self.calls[name] > 1:
            return None, f"it is called {self.calls[name]} times in a pass"
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
        self.rows = self.predictions = self.same = self.integer_changes = 0
        self.reference = self.moved = 0.0
        self.integers = False
        self.classes: dict[str, None] = {}
        self.changed: dict[str, None] = {}
        self.not_compared: dict[str, None] = {}

    def add(self, before: Any, after: Any) -> None:
        """Adds the outputs on one batch."""
        first, second = outputs_of(before), outputs_of(after)
        moved, reference = squares(first, second)
        self.moved += moved
        self.reference += reference
        self.rows += sum(rows_of(Y) for Y in first.scores.values())
        for classes in classes_of(first):
            kept = stayed(first.tensors[classes.path], second.tensors[classes.path], classes)
            self.classes[classes.words] = None
            self.predictions += kept.numel()
            self.same += int(kept.sum())
        integers = changed_integers(first, second)
        self.integers = self.integers or bool(first.integers)
        self.integer_changes += sum(integers.values())
        self.changed |= dict.fromkeys(path or "the output" for path in (*integers, *changed_plain(first, second)))
        self.not_compared |= dict.fromkeys(first.not_compared)


def _network(bounds: _Bounds, output: _OutputTally, layers: Sequence[LayerCertificate], scheme: str) -> NetworkCertificate:
    achieved, reference = math.sqrt(output.moved), math.sqrt(output.reference)
    bound = bounds.output
    return NetworkCertificate(
        scheme=scheme,
        output_layer=bounds.last or layers[-1].name,
        rows=output.predictions or output.rows,
        reference_norm=reference,
        bound=bound,
        bound_from_tolerances=bounds.output_from_tolerances,
        bound_link_normalised=bounds.output_link_normalised,
        reason=bounds.reason,
        achieved=achieved,
        agreement=output.same / output.predictions if output.predictions else None,
        sound=within(achieved, bound, reference),
        classes="; ".join(output.classes),
        integer_changes=output.integer_changes if output.integers else None,
        changed=tuple(output.changed),
        not_compared=tuple(output.not_compared),
        rounding=bounds.output_rounding,
    )


def versions() -> dict[str, str]:
    """Versions of everything that could change a number."""
    return {"nettrim": version("nettrim"), "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
