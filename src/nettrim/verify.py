"""Recomputes a saved certificate from the files, the reference model and the data, and fails loudly where a number does not hold."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import nn

from . import preimage, staging
from .attention import opened
from .calibration import Batches, Calibration
from .capture import Replica, device_of, hashes, random_state_kept, read_graph, reference_replica, replicate, scan
from .certificate import Certificate, HeldOutCertificate, LayerCertificate
from .certificate import within as within_rounding
from .checkpoint import contradictions, load, read_certificate, read_report, unlike_page
from .corrections import corrected_graph, corrections_of
from .heldout import certify_heldout
from .heldout import contradictions as heldout_contradictions
from .layers import add_bias, can_take_bias
from .opening import how_opened
from .patterns import parse
from .progress import Advance, shown, within
from .reading import Correction, Reading
from .report import PruneReport
from .report_check import AGREEMENT, differences, unlike
from .selection import select
from .status import CertificateError, InvalidInput
from .trained import differing, own_keys
from .verification import Claim, Setup, certify
from .wrappers import takes_models

# what nothing here can tell, by the names of fields; see also _not_checked
_NEVER_CHECKED = (
    "what was asked for (method, program, targets, tolerances, budgets, seed, max_samples: only that they fit one another)",
    "seconds",
    "iterations",
    "status (beyond what was met)",
    "dead_inputs",
    "reading (its words; the activation is checked)",
    "notes",
    "settings (beyond targets and readings)",
    "reason",
    "versions",
    "report.html (beyond the hashes of the files that it shows)",
)


@takes_models("model")
def verify(
    folder: str | Path,
    model: nn.Module,
    calibration: Batches,
    heldout: Batches | None = None,
    *,
    device: torch.device | str | None = None,
    progress: bool | Advance = True,
) -> Certificate:
    """Recomputes every number of the certificate in ``folder`` and returns the recomputed certificate.

    Checked as well: that the report states the certificate's numbers, that targets, budgets and settings fit together, that the counts over
    the whole model are those of the weights, and that nothing differs from the reference model but the weights and biases of certified
    layers and what the certificate names as trained besides (``trained``). What was not checked, because nothing here can tell, is named in
    ``not_checked`` of what is returned, by the names of its fields.

    A certificate that recomputes, and says that what was asked for is not met, is returned as well: look at its ``verdict``.

    Args:
        folder: what ``result.save`` wrote.
        model: the reference network, with the weights that were pruned; it is left unchanged.
        calibration: the calibration data of the run, in the same order.
        heldout: held-out batches. Needed to recheck a stored held-out statement; new ones make a new statement.
        device: where the work is done; by default where the model is.
        progress: as for :func:`nettrim.prune`.

    Raises:
        CertificateError: a hash differs, a stored number is not the recomputed one, entries contradict one another, or a stated bound is
            exceeded; the message lists all of them.
        InvalidInput: files, model or data that do not fit together.
    """
    folder = staging.place_of(folder, "verify: folder")
    stored, report = read_certificate(folder), read_report(folder)
    names = [layer.name for layer in stored.layers]
    _refuse_unusable(stored, names)
    given, model = model, opened(model)
    select(model, names, (), given)
    place = device_of(model, device)
    others: list[str] = []  # inputs that are not those of the certificate
    files, problems = [*contradictions(folder), *unlike_page(folder)], list[str]()
    if hashes(model) != stored.reference_hash:
        others.append(
            "the reference model's weights are not those that the certificate was made for; give the model that was pruned, with its "
            "trained weights"
        )
    pruned_model = opened(load(folder, copy.deepcopy(given)))
    if hashes(pruned_model) != stored.weights_hash:
        files.append("the stored weights are not those that the certificate was made for")
    batches = Calibration(calibration)
    with random_state_kept(place), shown(progress) as advance:
        pieces = 2 + (heldout is not None)
        advance(0, pieces, "reading the calibration data")
        first = next(iter(batches))
        if not how_opened(given, place, first)[0]:
            model, pruned_model = (opened(net, encoders=False) for net in (given, load(folder, copy.deepcopy(given))))
        reference, notice = reference_replica(model, place, first)
        pruned = replicate(pruned_model, place, reference.dtype)
        found = scan(reference, names, batches)
        if found.data_hash != stored.calibration_hash:
            others.append(
                "the calibration data are not those that the certificate was made for (values, dtype, order or batch sizes differ); give "
                "what prune was given"
            )
        uncalled = [name for name in names if name not in found.order]
        if uncalled:
            raise InvalidInput(f"layer {uncalled[0]!r} is never called on these calibration data; give the data of the run")
        corrections = stated_corrections(report, names, dict(model.named_modules()))
        graph = corrected_graph(reference, read_graph(reference, names, {}, first), corrections, first)
        before, after = dict(reference.model.named_modules()), dict(pruned.model.named_modules())
        added = [name for name in names if can_take_bias(before[name]) and after[name].bias is not None]
        for name in added:
            add_bias(before[name])
        if sorted(added) != sorted(report.settings.get("added_biases", [])):
            problems.append(f"report: added_biases are not those of the weights, which are {added}")
        problems += unlike(report, stored, pruned_model, found, graph)
        own = own_keys(names, {name: reading.norm for name, reading in graph.readings.items()}, dict(pruned_model.named_modules()))
        trained = differing(model, pruned_model, own)
        problems += _changed_elsewhere(model, pruned_model, own, trained, stored)
        graph = graph.where_trained(reference.model, trained)
        claims = []
        for layer in stored.layers:
            claim, misread = _claim(layer, graph.readings[layer.name])
            claims.append(claim)
            problems += misread
        setup = Setup(
            method=stored.method,
            program=stored.program,
            scheme=stored.scheme,
            arithmetic=notice or "float64",
            max_samples=stored.max_samples,
            seed=stored.seed,
            reference_hash=hashes(model),
            weights_hash=hashes(pruned_model),
            trained=trained,
        )
        reference.graph = pruned.graph = graph
        again = certify(reference, pruned, claims, graph, batches, found, setup, within(advance, 1, pieces))
        problems += _compare(stored, again)
        if stored.heldout is not None:
            problems += [f"held-out: {problem}" for problem in heldout_contradictions(stored.heldout)]
        if heldout is not None:
            unseen = Calibration(heldout, "heldout")
            again, more = _recheck_heldout(stored, again, reference, pruned, unseen, batches, within(advance, 2, pieces))
            problems += more
    if not again.sound:
        problems += again.failures()
    if others or files or problems:
        raise CertificateError(_said([*others, *files], problems, bool(others)))
    return replace(again, not_checked=_not_checked(stored, report, heldout is not None))


def _claim(layer: LayerCertificate, reading: Reading) -> tuple[Claim, list[str]]:
    """What is to be certified of a layer again, and where its certificate says other things of its activation than the graph."""
    problems = []
    if reading.activation.name != layer.activation:
        problems.append(f"{layer.name}: the certificate says {layer.activation}, the model's graph says {reading.activation.name}")
    # what was stated by the user is trusted, and named as such; the certificate may not pass it off as seen in the graph
    if reading.source != layer.source:
        problems.append(f"{layer.name}: source of the activation is stated as {layer.source!r}, found as {reading.source!r}")
    activation = reading.activation if reading.activation.name == layer.activation else preimage.named(layer.activation)
    asked = (layer.budget, layer.pattern)
    return Claim(layer.name, activation, layer.tolerance, layer.gap_kind, layer.gap_level, reading.source, *asked), problems


def _said(causes: list[str], problems: list[str], follows: bool) -> str:
    """What does not recompute; the number of ``problems`` alone where they ``follow`` from other inputs than those of the certificate."""
    lines = list(dict.fromkeys(problems))
    if follows and lines:
        lines = [f"{len(lines)} of the statements do not recompute from these inputs; they are listed where the inputs are the right ones"]
    return "the certificate does not recompute:\n" + "\n".join(f"- {line}" for line in (*dict.fromkeys(causes), *lines))


def _not_checked(stored: Certificate, report: PruneReport, heldout: bool) -> tuple[str, ...]:
    """What stands in the files and was not recomputed, by the names of its fields: how the weights were found, for the most part."""
    found = list(_NEVER_CHECKED)
    if stored.arithmetic != "float64":
        found.append("arithmetic (its words)")
    if any(layer.violation is not None for layer in report.layers):
        found.append("violation")
    if any(own.gap is not None and layer.gap is None for own, layer in zip(report.layers, stored.layers, strict=True)):
        found.append("gap (of the published program: the solver's own)")
    stated = [layer.name for layer in stored.layers if layer.source.startswith("stated")]
    if stated:
        found.append(f"activations that the user stated ({', '.join(stated)})")
    if stored.heldout is not None and not heldout:
        found.append("heldout (the statement about unseen inputs: give the held-out data)")
    return tuple(found)


def _refuse_unusable(stored: Certificate, names: Sequence[str]) -> None:
    """Settings without which nothing can be recomputed."""
    if stored.scheme not in ("cascade", "parallel"):
        raise InvalidInput(f"certificate: scheme must be 'cascade' or 'parallel', found {stored.scheme!r}; the file is damaged")
    if stored.max_samples < 1 or stored.seed < 0:
        raise InvalidInput("certificate: max_samples must be at least 1 and seed at least 0; the file is damaged")
    if len(set(names)) < len(names):
        raise InvalidInput("certificate: a layer is named twice; the file is damaged")
    for layer in stored.layers:
        if layer.gap_kind not in ("", "epsilon", "penalty"):
            raise InvalidInput(f"certificate: {layer.name}: gap_kind {layer.gap_kind!r} is not known; the file is damaged")
        parse(layer.pattern or None, f"certificate: {layer.name}")


def stated_corrections(report: PruneReport, names: Sequence[str], modules: Mapping[str, nn.Module]) -> dict[str, Correction]:
    """What the user said of the readings, from the report; ``stated_activations`` is its form in earlier versions."""
    given = [report.settings.get(key, {}) for key in ("readings", "stated_activations")]
    if not all(isinstance(mapping, Mapping) for mapping in given):
        raise InvalidInput("report: settings.readings must be an object; the file is damaged")
    readings, activations = ({name: value for name, value in mapping.items() if name in names} for mapping in given)
    return corrections_of(readings, activations, names, modules)


def _changed_elsewhere(model: nn.Module, pruned: nn.Module, own: set[str], trained: Sequence[str], stored: Certificate) -> list[str]:
    """State outside the certified layers that is not what the certificate says of it; ``trained`` is what differs there."""
    before, stated = model.state_dict(), stored.trained
    more = [key for key in pruned.state_dict() if key not in before and key not in own]
    problems = [f"{key} is not in the reference model, and belongs to no certified layer" for key in more]
    problems += [
        f"{key} differs from the reference model, but belongs to no certified layer, and the certificate does not name it as trained"
        for key in trained
        if key not in stated
    ]
    problems += [
        f"{key} is stated as trained besides the certified layers, but is as in the reference model, or belongs to one of them"
        for key in stated
        if key not in trained
    ]
    if not problems and stated != tuple(trained):
        problems.append("trained: entries are stated twice, or in another order than the model's")
    return problems


def _recheck_heldout(
    stored: Certificate,
    again: Certificate,
    reference: Replica,
    pruned: Replica,
    unseen: Calibration,
    batches: Calibration,
    advance: Advance,
) -> tuple[Certificate, list[str]]:
    """The held-out statement made anew, at the stored confidence and level, and where any of its fields differs from the stored one."""
    old = stored.heldout
    if old is None:
        return replace(again, heldout=certify_heldout(reference, pruned, unseen, batches, advance=advance)), []
    if not (0 < old.confidence < 1 and old.level >= 0):  # refused already, and nothing can be made with them
        return again, []
    new = certify_heldout(reference, pruned, unseen, batches, confidence=old.confidence, level=old.level, advance=advance)
    again = replace(again, heldout=new)
    if old.data_hash != new.data_hash:
        return again, ["held-out: the stored statement was made from other data; give those, or none"]
    names = [field.name for field in fields(HeldOutCertificate)]
    numbers = tuple(name for name in names if isinstance(getattr(new, name), float))
    exact = tuple(name for name in names if name not in numbers)
    return again, [
        *differences("held-out", old.__dict__, new.__dict__, exact, exact=True),
        *differences("held-out", old.__dict__, new.__dict__, numbers),
    ]


_LAYER_NUMBERS = ("reference_norm", "distance", "distance_all_rows", "discrepancy", "bound", "theorem", "original_distance", "rounding")
_NETWORK_NUMBERS = ("reference_norm", "bound", "bound_from_tolerances", "bound_link_normalised", "achieved", "agreement", "rounding")


def _instead(level: float, tolerance: float, layer: LayerCertificate) -> bool:
    """Whether a level can be what was aimed at in the place of a tolerance: above it, and by no more than rounding where it is met."""
    return level > tolerance and (not layer.met or within_rounding(level, tolerance, layer.reference_norm))


def _compare(stored: Certificate, again: Certificate) -> list[str]:
    """Where the stored certificate is not the recomputed one.

    Networks that do not run in float64 may round their sums in another order on another machine, and so move what their layers see: by
    no more than twice what rounding was measured to be here.
    """
    problems = []
    relative = max((layer.rounding / layer.reference_norm for layer in again.layers if layer.reference_norm > 0), default=0.0)
    agreement = AGREEMENT + 2 * min(relative, 1.0)
    if (stored.arithmetic == "float64") != (again.arithmetic == "float64"):
        problems.append(f"arithmetic is stated as {stored.arithmetic!r}, recomputed in {again.arithmetic!r}")
    for old, new in zip(stored.layers, again.layers, strict=True):
        problems += differences(
            old.name, old.__dict__, new.__dict__, ("rows", "rows_total", "weights", "nonzeros", "sound", "met"), exact=True
        )
        own = AGREEMENT + 2 * new.rounding / new.reference_norm if new.reference_norm > 0 else AGREEMENT
        problems += differences(old.name, old.__dict__, new.__dict__, _LAYER_NUMBERS, scale=new.reference_norm, agreement=own)
        problems += differences(old.name, old.__dict__, new.__dict__, ("gap",), agreement=agreement)
        aimed = old.tolerance is not None and (old.gap_level == old.tolerance or _instead(old.gap_level, old.tolerance, new))
        if old.gap_kind == "epsilon" and not aimed:
            problems.append(f"{old.name}: gap_level is {old.gap_level}, but the tolerance is {old.tolerance}")
        if not old.gap_kind and old.gap_level:
            problems.append(f"{old.name}: gap_level is {old.gap_level}, but there is no gap")
    old_network, new_network = stored.network.__dict__, again.network.__dict__
    said = ("scheme", "output_layer", "rows", "sound", "classes", "integer_changes", "changed", "not_compared")
    problems += differences("network", old_network, new_network, said, exact=True)
    scale = again.network.reference_norm
    return problems + differences("network", old_network, new_network, _NETWORK_NUMBERS, scale=scale, agreement=agreement)
