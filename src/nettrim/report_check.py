"""Whether a report says what its certificate, the stored weights and the data say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from .capture import Scan
from .certificate import Certificate, LayerCertificate
from .graph import Graph
from .layers import view
from .methods.nettrim import SHIFTED
from .methods.targets import kept_weights, lookup
from .report import LayerReport, PruneReport
from .whole import whole_model

TUNED = ", fine-tuned"  # ends the method and the targets of what was changed after pruning
AGREEMENT = 1e-6  # relative: two machines may sum in another order


def unlike(report: PruneReport, stored: Certificate, pruned: nn.Module, found: Scan, graph: Graph) -> list[str]:
    """Where the report does not state what the certificate, the weights and the data say."""
    shared = ("method", "scheme", "seed")
    problems = differences("report", report.__dict__, stored.__dict__, shared, exact=True)
    problems += differences("report", report.__dict__, found.__dict__, ("samples", "sample_shape"), exact=True)
    for key, value in (("max_samples", stored.max_samples), ("program", stored.program)):
        if report.settings.get(key, "none") != value:
            problems.append(f"report: {key} is not that of the certificate, {value!r}")
    shifted = SHIFTED in stored.method  # no setting of the report takes a check away
    if shifted != (report.settings.get("correction", 1) != 1):
        problems.append("report: correction is not that of the certificate's method")
    if [layer.name for layer in report.layers] != [layer.name for layer in stored.layers]:
        return [*problems, "report: its layers are not those of the certificate"]
    modules = dict(pruned.named_modules())
    for place, (said, layer) in enumerate(zip(report.layers, stored.layers, strict=True)):
        own = view(layer.name, modules[layer.name])
        facts = {
            "kind": own.kind,
            "inputs": own.shape[0],
            "outputs": own.shape[1],
            "weights": own.weight.numel(),
            "nonzeros": int((own.weight != 0).sum()),
            "activation": layer.activation,
            "norm": graph.readings[layer.name].norm,
        }
        numbers: tuple[str, ...] = ("rows", "reference_norm", "distance", "original_distance", "tolerance")
        if stored.program != "halfspace":  # only the published program has constraints, and a gap of the solver's own
            facts, numbers = facts | {"violation": None}, (*numbers, "gap")
        problems += differences(f"report, {layer.name}", said.__dict__, facts, tuple(facts), exact=True)
        problems += differences(f"report, {layer.name}", said.__dict__, layer.__dict__, numbers, exact=True)
        if said.status.ok and not layer.met and not said.target.endswith(TUNED):  # the status is that of the solver, long ago
            problems.append(f"report, {said.name}: its status is {said.status.value!r}, but it does not meet what was asked of it")
        moving = said.target.startswith("inflation") and found.calls[layer.name] > 1  # its original distance is not what it was
        later = [other.name for other in report.layers[place + 1 :]]
        unclaimed = moving or shifted or bool(graph.feeding(layer.name, later))
        problems += _target(said, layer, report.settings, unclaimed=unclaimed, exact=stored.program == "preimage")
    return problems + _whole(report, pruned)


def _whole(report: PruneReport, pruned: nn.Module) -> list[str]:
    """Where the report's counts over the whole model are not those of the weights."""
    names = [layer.name for layer in report.layers]
    again = whole_model(pruned, names, {left.name: left.reason for left in report.model.left_out})
    counts = ("parameters", "zeros", "vectors")
    problems = differences("report, whole model", report.model.__dict__, again.__dict__, counts, exact=True)
    said, found = ([(left.name, left.kind, left.parameters) for left in whole.left_out] for whole in (report.model, again))
    return problems + ([] if said == found else [f"report, whole model: left_out is stated as {said}, recomputed as {found}"])


def _target(said: LayerReport, layer: LayerCertificate, settings: Mapping[str, Any], *, unclaimed: bool, exact: bool) -> list[str]:
    """A layer's target is what the certificate holds it to, and what the settings ask for.

    Not ``exact``: in the published program's cascade the target is that of Omega alone, and bounds the tolerance (docs/theory.md, 2.1).
    """
    kind, _, text = said.target.partition(" ")
    text, tuned = text.removesuffix(TUNED), text.endswith(TUNED)
    asked = settings.get("error" if "error" in settings else kind)
    asked = lookup(asked, said.name) if isinstance(asked, Mapping) else asked
    if kind == "pattern":
        return (
            [] if text == layer.pattern == settings.get("pattern") and layer.budget is None else [_misfit(said, "pattern", layer.pattern)]
        )
    try:
        number = float(text)
    except ValueError:
        return [f"report, {said.name}: target {said.target!r} cannot be read"]
    problems = [] if layer.pattern == (settings.get("pattern") or "") else [_misfit(said, "pattern", layer.pattern)]
    if kind != "inflation" and "allocation" not in settings and asked != number:
        problems.append(f"report, {said.name}: its target is {said.target!r}, the settings ask for {asked!r}")
    budget = kept_weights(said.weights, number) if kind == "sparsity" else None
    if layer.budget != budget:
        problems.append(_misfit(said, "budget", layer.budget))
    if tuned:  # what is certified after fine-tuning claims no tolerance
        return problems
    if kind == "penalty" and layer.gap_kind and (layer.gap_kind, layer.gap_level) != ("penalty", number):
        problems.append(_misfit(said, "gap_level", layer.gap_level))
    if kind not in ("epsilon", "inflation"):
        return problems
    if layer.tolerance is None:
        return problems if unclaimed else [*problems, f"{said.name}: the certificate states no tolerance, its target is {said.target!r}"]
    target = number * (layer.original_distance if kind == "inflation" else layer.reference_norm)
    margin = 1e-5 * max(target, layer.tolerance)
    short = layer.tolerance < target - margin and (exact or kind == "epsilon")
    long = layer.tolerance > target + margin and (exact or kind == "inflation")
    return [*problems, _misfit(said, "tolerance", layer.tolerance)] if short or long else problems


def _misfit(said: LayerReport, name: str, value: object) -> str:
    return f"{said.name}: the certificate's {name} is {value!r}, which its target {said.target!r} does not give"


def differences(
    label: str,
    old: dict[str, object],
    new: dict[str, object],
    fields: tuple[str, ...],
    *,
    exact: bool = False,
    scale: float = 1.0,
    agreement: float = AGREEMENT,
) -> list[str]:
    """Where fields are not the same in two records, exactly or up to ``agreement``, relative to the value or to ``scale``."""
    problems = []
    for name in fields:
        a, b = old[name], new[name]
        if exact or not isinstance(a, (int, float)) or not isinstance(b, (int, float)):
            same = a == b
        else:
            same = math.isclose(a, b, rel_tol=agreement, abs_tol=agreement * scale)
        if not same:
            problems.append(f"{label}: {name} is stated as {a}, recomputed as {b}")
    return problems
