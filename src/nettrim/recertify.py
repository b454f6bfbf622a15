"""``recertify``: the certificate of a pruned model that was changed afterwards, by fine-tuning for instance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from .attention import opened
from .calibration import Batches, Calibration
from .capture import device_of, hashes, random_state_kept, read_graph, reference_replica, replicate, scan
from .certificate import Certificate
from .corrections import corrected_graph
from .heldout import certify_heldout, check_heldout
from .layers import LayerView, add_bias, view
from .opening import how_opened
from .progress import Advance, shown, within
from .pruning import PruneResult
from .report import LayerReport
from .selection import select
from .status import InvalidInput
from .verification import Claim, Setup, certify
from .verify import changed_elsewhere, stated_corrections

WORD = "fine-tuned"


def recertify(
    result: PruneResult,
    model: nn.Module,
    reference: nn.Module,
    calibration: Batches,
    *,
    heldout: Batches | None = None,
    device: torch.device | str | None = None,
    progress: bool | Advance = True,
) -> PruneResult:
    """A result with ``model`` in it, and a certificate that speaks of its weights; nothing given is changed.

    Recomputed in float64 from the weights: every layer's distance, the bounds that follow from the distances, and what was achieved.
    No longer claimed: tolerances and duality gaps, because nothing kept the new weights to them.

    Args:
        result: what :func:`nettrim.prune` returned.
        model: its model with other weights in the pruned layers, such as :func:`nettrim.distill` with ``learn="pruned"`` makes.
        reference: the network that was pruned.
        calibration: the calibration data of the run, in the same order.
        heldout: data that were used neither for pruning nor for fine-tuning, for a statement about unseen inputs.
        device: where the work is done; by default where the reference network is.
        progress: as for :func:`nettrim.prune`.

    Raises:
        InvalidInput: another reference network or other calibration data than those of the run; a model that differs from the reference
            network elsewhere than in the pruned layers, which no certificate can speak of.
    """
    if not isinstance(result, PruneResult):
        raise InvalidInput(f"recertify: result must be what nettrim.prune returned, found {type(result).__name__}")
    old, report = result.certificate, result.report
    for name, value in (("model", model), ("reference", reference)):
        if not isinstance(value, nn.Module):
            raise InvalidInput(f"recertify: {name} must be an nn.Module, found {type(value).__name__}")
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
        elsewhere = changed_elsewhere(original, changed, names, graph)
        if elsewhere:
            raise InvalidInput(f"recertify: {elsewhere[0]} ({len(elsewhere)} such in all); fine-tune with learn='pruned'")
        after = replicate(changed, place, before.dtype)
        before.graph = after.graph = graph
        setup = Setup(
            method=f"{old.method.removesuffix(f', {WORD}')}, {WORD}",
            program=old.program,
            scheme=old.scheme,
            arithmetic=notice or "float64",
            max_samples=old.max_samples,
            seed=old.seed,
            reference_hash=old.reference_hash,
            weights_hash=hashes(changed),
        )
        readings = graph.readings
        claims = [
            Claim(layer.name, readings[layer.name].activation, None, "", 0.0, readings[layer.name].source, layer.budget, layer.pattern)
            for layer in old.layers
        ]
        certificate = certify(before, after, claims, graph, batches, found, setup, within(advance, 1, pieces))
        if unseen is not None:
            certificate = replace(certificate, heldout=certify_heldout(before, after, unseen, batches, advance=within(advance, 2, pieces)))
    modules = dict(changed.named_modules())
    layers = _reports(report.layers, certificate, [view(name, modules[name]) for name in names])
    note = "its weights were changed after pruning: distances are those of the new weights; tolerances and gaps are not claimed any more"
    notes = (*(text for text in report.notes if text != note), note)
    return PruneResult(model, replace(report, method=setup.method, layers=layers, notes=notes), certificate)


def _check_form(original: nn.Module, changed: nn.Module, added: Sequence[str]) -> None:
    """Refuses a model whose state has other names or shapes than the reference network's, but for biases that pruning added."""
    more = {f"{name}.bias" for name in added}
    shapes = [
        {key: getattr(value, "shape", None) for key, value in model.state_dict().items() if key not in more}
        for model in (original, changed)
    ]
    if shapes[0] != shapes[1]:
        key = next(key for key in (*shapes[0], *shapes[1]) if shapes[0].get(key) != shapes[1].get(key))
        raise InvalidInput(f"recertify: model must have the reference network's parameters and buffers, found another {key!r}")


def _reports(reports: Sequence[LayerReport], certificate: Certificate, views: Sequence[LayerView]) -> tuple[LayerReport, ...]:
    return tuple(
        replace(
            report,
            target=f"{report.target.removesuffix(f', {WORD}')}, {WORD}",
            nonzeros=int((layer_view.weights() != 0).sum()),
            reference_norm=layer.reference_norm,
            distance=layer.distance,
            original_distance=layer.original_distance,
            tolerance=None,
            gap=None,
            violation=None,
        )
        for report, layer, layer_view in zip(reports, certificate.layers, views, strict=True)
    )
