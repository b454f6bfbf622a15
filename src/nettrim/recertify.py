"""``recertify``: the certificate of a pruned model that was changed afterwards, by fine-tuning for instance."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .attention import opened
from .calibration import Batches, Calibration
from .capture import device_of, hashes, random_state_kept, read_graph, reference_replica, replicate, scan
from .certificate import Certificate, by_module
from .checkpoint import read_certificate, read_report
from .corrections import corrected_graph
from .heldout import certify_heldout, check_heldout
from .layers import LayerView, add_bias, view
from .opening import alike, how_opened
from .progress import Advance, shown, within
from .pruning import PruneResult
from .report import LayerReport
from .report_check import TUNED
from .selection import select
from .status import InvalidInput
from .trained import differing, own_keys, state_key
from .verification import Claim, Setup, certify
from .verify import stated_corrections
from .whole import whole_model
from .wrappers import takes_models

CHANGED = "its weights were changed after pruning: distances are those of the new weights; tolerances and gaps are not claimed any more"
BESIDE = "changed after pruning besides the pruned layers: "
ZEROS = "zeros were lost after pruning: "


@takes_models("model", "reference")
def recertify(
    result: PruneResult | str | Path,
    model: nn.Module,
    reference: nn.Module,
    calibration: Batches,
    *,
    heldout: Batches | None = None,
    device: torch.device | str | None = None,
    progress: bool | Advance = True,
) -> PruneResult:
    """A result with ``model`` in it, and a certificate that speaks of its weights; nothing given is changed.

    Recomputed in float64 from the weights: every layer's distance, the bounds that follow from the distances, what was achieved, the
    statement about unseen inputs, and how many weights are not zero. Whatever was trained besides the pruned layers is certified as it is:
    the certificate names it (``trained``), and no bound rests on what it was. No longer claimed: tolerances and duality gaps, because
    nothing kept the new weights to them.

    Args:
        result: what :func:`nettrim.prune` returned, or the folder that it was saved in.
        model: its model with other values in it: fine-tuned with labels (:func:`nettrim.finetuning`) or without (:func:`nettrim.distill`).
        reference: the network that was pruned.
        calibration: the calibration data of the run, in the same order.
        heldout: data that were used neither for pruning nor for fine-tuning, for a statement about unseen inputs.
        device: where the work is done; by default where the reference network is.
        progress: as for :func:`nettrim.prune`.

    Raises:
        InvalidInput: another reference network or other calibration data than those of the run; a model of another form, one in which more
            than its state was changed, or one with NaN or inf in its weights or its outputs.
    """
    if isinstance(result, (str, Path)):
        old, report = read_certificate(result), read_report(result)
    elif isinstance(result, PruneResult):
        old, report = result.certificate, result.report
    else:
        raise InvalidInput(f"recertify: result must be what nettrim.prune returned, or its folder; found {type(result).__name__}")
    names = [layer.name for layer in old.layers]
    original, changed = opened(reference), opened(model)
    select(original, names, (), reference)
    if hashes(original) != old.reference_hash:
        raise InvalidInput("recertify: reference must be the network that the result was pruned from; its weights are others")
    added = [name for name in names if name in report.settings.get("added_biases", [])]
    _check_form(original, changed, added)
    batches = Calibration(calibration)
    unseen = None if heldout is None else Calibration(heldout, "heldout")
    place = device_of(original, device)
    with random_state_kept(place), shown(progress) as advance:
        pieces = 2 + (unseen is not None)
        advance(0, pieces, "reading the calibration data")
        first = next(iter(batches))
        if not how_opened(reference, place, first)[0]:
            original, changed = (opened(net, encoders=False) for net in (reference, model))
        before, notice = reference_replica(original, place, first)
        found = scan(before, names, batches)
        if found.data_hash != old.calibration_hash:
            raise InvalidInput(
                "recertify: calibration must be the data of the run, found others (values, dtype, order or batch sizes); "
                "give those, or prune again with these"
            )
        if unseen is not None:
            check_heldout(before, unseen, batches)
        corrections = stated_corrections(report, names, dict(original.named_modules()))
        graph = corrected_graph(before, read_graph(before, names, {}, first), corrections, first)
        modules = dict(before.model.named_modules())
        for name in added:
            add_bias(modules[name])
        norms = {name: reading.norm for name, reading in graph.readings.items()}
        trained = differing(original, changed, own_keys(names, norms, dict(changed.named_modules())))
        graph = graph.where_trained(before.model, trained)
        stored = _stored(original, changed, added)
        if not alike(stored, changed, place, first):
            raise InvalidInput(
                "recertify: model computes something else than the reference network with the same state: an attribute is another one "
                "(eps, say, or a module's class), or a buffer that state_dict leaves out; give a model in which only its state has changed"
            )
        after = replicate(stored, place, before.dtype)
        before.graph = after.graph = graph
        setup = Setup(
            method=old.method.removesuffix(TUNED) + TUNED,
            program=old.program,
            scheme=old.scheme,
            arithmetic=notice or "float64",
            max_samples=old.max_samples,
            seed=old.seed,
            reference_hash=old.reference_hash,
            weights_hash=hashes(changed),
            trained=trained,
        )
        readings = graph.readings
        claims = [
            Claim(layer.name, readings[layer.name].activation, None, "", 0.0, readings[layer.name].source, layer.budget, layer.pattern)
            for layer in old.layers
        ]
        certificate = certify(before, after, claims, graph, batches, found, setup, within(advance, 1, pieces))
        _refuse_not_finite(certificate)
        if unseen is not None:
            certificate = replace(certificate, heldout=certify_heldout(before, after, unseen, batches, advance=within(advance, 2, pieces)))
    modules = dict(changed.named_modules())
    layers = _reports(report.layers, certificate, [view(name, modules[name]) for name in names])
    notes = [*(text for text in report.notes if not text.startswith((CHANGED, BESIDE))), CHANGED]
    if trained:
        notes.append(
            f"{BESIDE}{by_module(trained)}; the certificate speaks of the network as it is now, and no bound rests on what they were"
        )
    whole = whole_model(changed, names, {left.name: left.reason for left in report.model.left_out})
    told = replace(report, method=setup.method, layers=layers, model=whole, notes=tuple(notes))
    return PruneResult(model, told, certificate)


def _stored(original: nn.Module, changed: nn.Module, added: Sequence[str]) -> nn.Module:
    """What a file gives back: the reference network with the changed state."""
    twin = copy.deepcopy(original)
    modules = dict(twin.named_modules())
    for name in added:
        add_bias(modules[name])
    twin.load_state_dict(changed.state_dict())
    return twin


def _check_form(original: nn.Module, changed: nn.Module, added: Sequence[str]) -> None:
    """Refuses state of other names, shapes or dtypes than the reference network's, but for biases that pruning added; and NaN and inf."""
    more = {state_key(name, "bias") for name in added}
    before, after = ({k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)} for model in (original, changed))
    forms = [{k: (tuple(v.shape), v.dtype) for k, v in state.items() if k not in more} for state in (before, after)]
    for name in (*forms[0], *forms[1]):
        if forms[0].get(name) != forms[1].get(name):
            found, wanted = (form.get(name, "none") for form in (forms[1], forms[0]))
            raise InvalidInput(
                f"recertify: model must have the reference network's parameters and buffers, found another {name!r}: {found}, not {wanted}"
            )
    for name, value in after.items():
        finite = torch.isfinite(value)
        if not bool(finite.all()) and not (name in before and torch.equal(finite.cpu(), torch.isfinite(before[name]).cpu())):
            raise InvalidInput(f"recertify: {name} holds NaN or inf: the training diverged; train again with a lower learning rate")


def _refuse_not_finite(certificate: Certificate) -> None:
    found = [(f"layer {layer.name!r}", layer.distance_all_rows + layer.discrepancy) for layer in certificate.layers]
    for what, value in (*found, ("the network", certificate.network.achieved)):
        if not math.isfinite(value):
            raise InvalidInput(
                f"recertify: {what} of the model puts out NaN or inf on the calibration data, so no distance can be stated; "
                "train again with a lower learning rate"
            )


def _zeros_notes(report: LayerReport, nonzeros: int) -> tuple[str, ...]:
    """The layer's notes, and what was lost of its zeros."""
    if nonzeros == report.nonzeros:
        return report.notes
    notes = tuple(note for note in report.notes if not note.startswith(ZEROS))
    if nonzeros < report.nonzeros:
        return notes
    return (
        *notes,
        f"{ZEROS}{nonzeros:,} of {report.weights:,} weights are not zero, {report.nonzeros:,} were (nettrim.finetuning keeps them)",
    )


def _reports(reports: Sequence[LayerReport], certificate: Certificate, views: Sequence[LayerView]) -> tuple[LayerReport, ...]:
    counts = [int((layer_view.weights() != 0).sum()) for layer_view in views]
    return tuple(
        replace(
            report,
            target=report.target.removesuffix(TUNED) + TUNED,
            nonzeros=nonzeros,
            notes=_zeros_notes(report, nonzeros),
            reference_norm=layer.reference_norm,
            distance=layer.distance,
            original_distance=layer.original_distance,
            tolerance=None,
            gap=None,
            violation=None,
        )
        for report, layer, nonzeros in zip(reports, certificate.layers, counts, strict=True)
    )
