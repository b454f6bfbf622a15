"""Recomputes a saved certificate from the files, the reference model and the data, and fails loudly where a number does not hold."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from . import preimage
from .calibration import Batches, Calibration
from .capture import device_of, hashes, reference_replica, replicate, scan
from .certificate import Certificate
from .checkpoint import load, read_certificate, read_report
from .graph import read
from .selection import select
from .status import CertificateError, InvalidInput
from .verification import Claim, Setup, certify, certify_heldout

AGREEMENT = 1e-6  # relative: two machines may sum in another order


def verify(
    folder: str | Path,
    model: nn.Module,
    calibration: Batches,
    heldout: Batches | None = None,
    *,
    device: torch.device | str | None = None,
) -> Certificate:
    """Recomputes every number of the certificate in ``folder`` and returns the recomputed certificate.

    Args:
        folder: what ``result.save`` wrote.
        model: the reference network, with the weights that were pruned; it is left unchanged.
        calibration: the calibration data of the run, in the same order.
        heldout: held-out batches. Needed to recheck a stored held-out statement; new ones make a new statement.

    Raises:
        CertificateError: a hash differs, a stored number is better than the recomputed one, or a guarantee does not hold; the message
            lists all of them.
        InvalidInput: files, model or data that do not fit together.
    """
    stored, report = read_certificate(folder), read_report(folder)
    names = [layer.name for layer in stored.layers]
    select(model, names, ())
    problems: list[str] = []
    if hashes(model) != stored.reference_hash:
        problems.append("the reference model's weights are not those that the certificate was made for")
    pruned_model = load(folder, copy.deepcopy(model))
    if hashes(pruned_model) != stored.weights_hash:
        problems.append("the stored weights are not those that the certificate was made for")
    batches = Calibration(calibration)
    place = device_of(model, device)
    reference, notice = reference_replica(model, place, next(iter(batches)))
    pruned = replicate(pruned_model, place, reference.dtype)
    found = scan(reference, names, batches)
    if found.data_hash != stored.calibration_hash:
        problems.append("the calibration data are not those that the certificate was made for (values, dtype, order or batch sizes differ)")
    uncalled = [name for name in names if name not in found.order]
    if uncalled:
        raise InvalidInput(f"layer {uncalled[0]!r} is never called on these calibration data")
    stated = report.settings.get("stated_activations", {})
    graph = read(reference.model, names, {name: preimage.named(text) for name, text in stated.items() if name in names})
    claims = []
    for layer in stored.layers:
        activation = graph.readings[layer.name].activation
        if activation.name != layer.activation:
            problems.append(f"{layer.name}: the certificate says {layer.activation}, the model's graph says {activation.name}")
        claims.append(Claim(layer.name, preimage.named(layer.activation), layer.tolerance, layer.gap_kind, layer.gap_level))
    setup = Setup(
        method=stored.method,
        program=stored.program,
        scheme=stored.scheme,
        arithmetic="float64" if not notice else notice,
        max_samples=stored.max_samples,
        seed=stored.seed,
        reference_hash=hashes(model),
        weights_hash=hashes(pruned_model),
    )
    again = certify(reference, pruned, claims, graph.chain, batches, found, setup)
    problems += _compare(stored, again)
    if heldout is not None:
        unseen = Calibration(heldout, "heldout")
        old = stored.heldout
        new = certify_heldout(
            reference,
            pruned,
            unseen,
            calibration_hash=found.data_hash,
            **({"confidence": old.confidence, "level": old.level} if old is not None else {}),
        )
        again = replace(again, heldout=new)
        if old is not None and old.data_hash == new.data_hash:
            problems += _differences("held-out", old.__dict__, new.__dict__, ("samples", "class_changes", "exceed"), exact=True)
            problems += _differences(
                "held-out", old.__dict__, new.__dict__, ("class_change_bound", "exceed_bound", "accuracy_before", "accuracy_after")
            )
        elif old is not None:
            problems.append("held-out: the stored statement was made from other data; give those, or none")
    problems += [f"{layer.name}: a guarantee does not hold" for layer in again.layers if not layer.holds]
    if not again.network.holds:
        problems.append("network: the bound does not hold")
    if problems:
        raise CertificateError("the certificate does not hold:\n" + "\n".join(f"- {problem}" for problem in dict.fromkeys(problems)))
    return again


_LAYER_NUMBERS = ("reference_norm", "distance", "distance_all_rows", "discrepancy", "bound", "original_distance")
_NETWORK_NUMBERS = ("reference_norm", "bound", "bound_from_tolerances", "bound_link_normalised", "achieved", "agreement")


def _compare(stored: Certificate, again: Certificate) -> list[str]:
    problems = []
    for old, new in zip(stored.layers, again.layers, strict=True):
        problems += _differences(old.name, old.__dict__, new.__dict__, ("rows", "rows_total", "holds"), exact=True)
        problems += _differences(old.name, old.__dict__, new.__dict__, _LAYER_NUMBERS, scale=new.reference_norm)
        problems += _differences(old.name, old.__dict__, new.__dict__, ("gap",), scale=1.0)
    problems += _differences("network", stored.network.__dict__, again.network.__dict__, ("rows", "holds"), exact=True)
    return problems + _differences(
        "network", stored.network.__dict__, again.network.__dict__, _NETWORK_NUMBERS, scale=again.network.reference_norm
    )


def _differences(
    label: str, old: dict[str, object], new: dict[str, object], fields: tuple[str, ...], *, exact: bool = False, scale: float = 1.0
) -> list[str]:
    problems = []
    for name in fields:
        a, b = old[name], new[name]
        if exact or not isinstance(a, float) or not isinstance(b, float):
            same = a == b
        else:
            same = math.isclose(a, b, rel_tol=AGREEMENT, abs_tol=AGREEMENT * max(scale, 1e-30))
        if not same:
            problems.append(f"{label}: {name} is stated as {a}, recomputed as {b}")
    return problems
