"""The certificate in plain sentences, and the short texts about a report that the tables and the page share."""

from __future__ import annotations

from ..certificate import Certificate, HeldOutCertificate, LayerCertificate, by_module
from ..preimage import named
from ..report import LayerReport, PruneReport
from ..status import InvalidInput
from .numbers import clean, listed, number, percent, plural, quoted, share_of


def headline(report: PruneReport) -> str:
    """Method, scheme, samples and what remains, in one line."""
    return (
        f"{clean(report.method)}, {clean(report.scheme)} scheme, {plural(report.samples, 'calibration sample')}: "
        f"{report.nonzeros:,} of {report.weights:,} weights remain ({percent(report.density)}); of the whole model's "
        f"{report.model.parameters:,} parameters {percent(report.model.zero_share)} are zero"
    )


def left_out_words(report: PruneReport) -> list[str]:
    """One line for each module that was not pruned, and one for what never is."""
    return [
        *(clean(str(left)) for left in report.model.left_out),
        f"{report.model.vectors:,} parameters of biases, norms and other vectors",
    ]


def layer_remarks(layer: LayerReport) -> list[str]:
    """What to do about a layer's status, and the layer's notes."""
    remarks = [] if layer.status.ok else [f"{layer.status.value}: {layer.status.remedy}"]
    return remarks + layer.warnings() + [clean(note) for note in layer.notes]


def certificate_words(certificate: Certificate) -> list[str]:
    """The certificate in sentences. The first is always the verdict; what does not hold comes next."""
    return [
        verdict(certificate),
        *failures(certificate),
        *_layer_words(certificate),
        *_scheme_words(certificate),
        *_network_words(certificate),
        *_gap_words(certificate),
        *_trained_words(certificate),
        *_heldout_words(certificate),
        "To check it yourself, run `nettrim verify DIR ...` with the reference network and the same calibration data: it recomputes every "
        "number from the files, compares the hashes of data and weights, and fails when a number does not hold.",
    ]


def verdict(certificate: Certificate) -> str:
    """The one verdict, in one sentence."""
    asked = "" if any(layer.asked for layer in certificate.layers) else "; nothing was asked for that could be missed"
    meaning = _sentence(certificate.verdict.meaning + asked)
    return f"Verdict: {certificate.verdict.value}. {meaning} Arithmetic: {clean(certificate.arithmetic)}."


def failures(certificate: Certificate) -> list[str]:
    """One sentence for each layer that does not hold, and one for the network's output; none where all hold."""
    return [_sentence(clean(text)) for text in certificate.failures()]


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _layer_words(certificate: Certificate) -> list[str]:
    inputs = "the pruned network's own inputs" if certificate.scheme == "cascade" else "the reference network's inputs"
    bounded = [(layer, layer.tolerance) for layer in certificate.layers if layer.tolerance is not None]
    confirmed = [(layer, tolerance) for layer, tolerance in bounded if layer.met]
    words = []
    if not bounded:
        words.append(
            "No layer has a tolerance (its target was a number of weights, a pattern or a penalty, or none is claimed of it), so the "
            f"certificate states how far each layer moved. On the calibration rows and {inputs}, a layer's output differs from the "
            "reference output by no more than the distance of its pre-activations to the set that the activation maps to the reference "
            "output, in the Frobenius norm (Lemma 1)."
        )
    elif not confirmed:
        words.append("No layer with a tolerance meets it.")
    else:
        who = "Each layer with a tolerance meets it"
        if len(confirmed) < len(bounded):
            who = f"Of {len(bounded)} layers with a tolerance, {len(confirmed)} {'meets' if len(confirmed) == 1 else 'meet'} it"
        words.append(
            f"{who}: on the calibration rows of its program and {inputs}, the pruned layer's pre-activations lie within the tolerance of "
            "the set that the activation maps to the reference output. The activation cannot enlarge a distance, so on those inputs the "
            "layer's output differs from the reference output by no more than that, in the Frobenius norm (Lemma 1)."
        )
        tight = [(layer.distance / tolerance, layer, tolerance) for layer, tolerance in confirmed if tolerance > 0]
        if tight:
            share, layer, tolerance = max(tight, key=lambda item: item[0])
            words.append(
                f"Closest to its tolerance is layer {quoted(layer.name)}: distance {number(layer.distance)} where {number(tolerance)} is "
                f"allowed ({percent(share)} of it)."
            )
    linear = [f"{quoted(layer.name)} ({clean(layer.activation)})" for layer in certificate.layers if _matched_linearly(layer)]
    if linear:
        words.append(
            f"Matched before their activation, because its preimages are not boxes or it is not known: {listed(linear)}. All that is said "
            "of the output of such a layer speaks of its pre-activations."
        )
    stated = [f"{quoted(layer.name)} ({clean(layer.activation)})" for layer in certificate.layers if layer.source == "stated"]
    if stated:
        words.append(f"These activations were stated by the user, where the model's graph shows none: {listed(stated)}.")
    against = [
        f"{quoted(layer.name)} ({clean(layer.activation)})" for layer in certificate.layers if layer.source == "stated against the graph"
    ]
    if against:
        words.append(
            f"These readings were stated by the user against what the model's graph shows, so no bound of the network passes through "
            f"their layers: {listed(against)}."
        )
    sampled = [layer for layer in certificate.layers if layer.rows < layer.rows_total]
    if sampled:
        names = listed([f"{quoted(layer.name)} ({layer.rows:,} of {layer.rows_total:,})" for layer in sampled])
        words.append(
            f"The programs of these layers used a part of the calibration rows: {names}. Their distances and tolerances speak of "
            "those rows; their discrepancies and proven bounds speak of all calibration rows."
        )
    return words


def _matched_linearly(layer: LayerCertificate) -> bool:
    try:
        return not named(layer.activation).exact
    except InvalidInput:  # a name from elsewhere: nothing is known of it
        return True


def _scheme_words(certificate: Certificate) -> list[str]:
    if certificate.scheme == "cascade":
        words = [
            "Cascade scheme: every layer was pruned on what the pruned layers before it really pass on, and its target stayed the "
            "reference network's output. So the discrepancy of each layer inside the pruned network is bounded by that layer's own "
            "distance on the calibration rows, whatever happened before it: nothing accumulates from layer to layer."
        ]
    else:
        words = [
            "Parallel scheme: every layer was pruned on the reference network's inputs, so discrepancies add up along the network. The "
            "bound follows them layer by layer: a layer's discrepancy is at most its own distance plus the spectral norm of its pruned "
            "weights (or a proven upper bound of it) times the discrepancy of its input; what stands between "
            "layers counts with its Lipschitz constant."
        ]
    without: dict[str, list[str]] = {}
    for layer in certificate.layers:
        if layer.bound is None:
            without.setdefault(clean(layer.reason).rstrip("."), []).append(quoted(layer.name))
    for reason, names in without.items():
        because = f": {reason}" if reason else ""
        words.append(f"No bound is proven inside the network for {'layer' if len(names) == 1 else 'layers'} {listed(names)}{because}.")
    return words


def _measured(value: float, norm: float, direction: int = 0) -> str:
    """``12.34 (1.98% of the norm of the reference output)``, without the share where the norm is zero."""
    share = share_of(value, norm)
    tail = "" if share is None else f" ({percent(share, direction)} of the norm of the reference output)"
    return number(value, direction) + tail


def _network_words(certificate: Certificate) -> list[str]:
    network = certificate.network
    where = f"Network output ({plural(network.rows, 'calibration row')})"
    achieved = f"achieved is {_measured(network.achieved, network.reference_norm)}"
    if network.bound is None:
        reason = f" ({clean(network.reason).rstrip('.')})" if network.reason else ""
        words = [f"{where}: no bound of its discrepancy from the reference output is proven{reason}; {achieved}."]
    else:
        bound = _measured(network.bound, network.reference_norm, +1)
        words = [f"{where}: its discrepancy from the reference output is proven to be at most {bound}; {achieved}."]
    others = []
    if network.bound_from_tolerances is not None:
        others.append(f"from the tolerances alone, where they are met, {number(network.bound_from_tolerances, +1)}")
    if network.bound_link_normalised is not None:
        others.append(f"in the published link-normalised form {number(network.bound_link_normalised, +1)}")
    if others:
        words.append(f"The bound stated in other ways: {'; '.join(others)}.")
    if network.agreement is not None:
        where = f" along {clean(network.classes)}" if network.classes else ""
        words.append(
            f"On {percent(network.agreement, -1, decimals=2)} of these rows both networks have their largest entry{where} at the same "
            "place: the predicted class, where these are scores of classes (counted, not a bound)."
        )
    if network.changed:
        entries = "" if not network.integer_changes else f", {network.integer_changes:,} entries of integer or boolean outputs in all"
        words.append(f"Outputs that are no scores and changed: {listed([clean(path) for path in network.changed])}{entries}.")
    if network.not_compared:
        parts = [clean(part) for part in network.not_compared]
        words.append(f"Not compared, so nothing here speaks of it: {listed(parts, len(parts))}.")
    return words


_GAPS = {
    "epsilon": (
        "tolerance",
        "Optimality at the stated tolerance: all but a share, the gap, of the l1 norm of a layer's stored weights is unavoidable. No "
        "weights and bias that keep the layer within that tolerance, on the rows and inputs of its program, have an l1 norm below "
        "(1 - gap) times that of the stored weights",
    ),
    "penalty": (
        "penalty",
        "Optimality at the stated penalty: the program's objective is half the squared distance plus the penalty times the l1 norm of the "
        "weights. No weights and bias bring it, on the rows and inputs of the layer's program, below (1 - gap) times its value at the "
        "stored weights",
    ),
}


def _gap_words(certificate: Certificate) -> list[str]:
    words = []
    for kind, (level, meaning) in _GAPS.items():
        gaps = [(layer.gap, layer) for layer in certificate.layers if layer.gap is not None and layer.gap_kind == kind]
        if gaps:
            gap, layer = max(gaps, key=lambda item: item[0])
            where = f"(layer {quoted(layer.name)}, {level} {number(layer.gap_level)})"
            words.append(f"{meaning}, by duality; the largest gap of {plural(len(gaps), 'layer')} is {percent(gap, +1)} {where}.")
    return words


def _trained_words(certificate: Certificate) -> list[str]:
    if not certificate.trained:
        return []
    return [
        f"Trained besides the pruned layers: {clean(by_module(certificate.trained))}. All numbers speak of the network with these as they "
        "are now; a bound that would rest on what they were is not claimed."
    ]


def _changes_words(heldout: HeldOutCertificate) -> str:
    """What happens to a unit whose prediction changes."""
    if heldout.predicted_words in ("predicted class", "largest entry"):
        return "the predicted class changes"
    more = "" if heldout.integer_changes is None else " or an entry of an integer output"
    return f"any predicted class{more} of a {heldout.unit} changes"


def _heldout_words(certificate: Certificate) -> list[str]:
    heldout = certificate.heldout
    if heldout is None:
        return [
            "Other inputs: no held-out samples were given, so all of this speaks of the calibration rows only and says nothing about "
            "any other input."
        ]
    words = _proven_words(heldout) if heldout.unit == "sample" else _counted_words(heldout)
    if heldout.classes:
        untold = "; no labels say whether these are scores of classes" if heldout.accuracy_before is None else ""
        words.append(f"A predicted class is the largest entry along {clean(heldout.classes)}{untold}.")
    elif heldout.classes_reason:
        words.append(f"No changes of a predicted class are stated: {clean(heldout.classes_reason)}.")
    if heldout.predictions is not None and heldout.predictions_changed is not None and heldout.predictions != heldout.counted:
        words.append(
            f"Counted one by one, {heldout.predictions_changed:,} of {heldout.predictions:,} predicted classes changed (not a bound: those "
            "of one sample are not independent)."
        )
    if heldout.integer_changes is not None:
        words.append(f"An entry of an integer or boolean output changed in {heldout.integer_changes:,} of {heldout.units_words}.")
    if heldout.left_out:
        words.append(f"Left out of these counts: {listed([clean(name) for name in heldout.left_out])}.")
    if heldout.overlap:
        words.append(
            f"{plural(heldout.overlap, 'held-out sample')} also occurred in the calibration data: unless they are chance repetitions, the "
            "statement about other inputs is not valid."
        )
    if heldout.accuracy_before is not None and heldout.accuracy_after is not None:
        where = "the held-out samples" if heldout.labelled in (None, heldout.samples) else heldout.labelled_words
        words.append(
            f"Accuracy on {where}: {percent(heldout.accuracy_before, decimals=2)} before, "
            f"{percent(heldout.accuracy_after, decimals=2)} after pruning."
        )
    elif heldout.accuracy_reason:
        words.append(f"No accuracy is stated: {clean(heldout.accuracy_reason)}.")
    return words


def _proven_words(heldout: HeldOutCertificate) -> list[str]:
    """The bounds, where samples were counted."""
    claims = []
    if heldout.class_change_bound is not None:
        seen = "" if heldout.class_changes is None else f" (seen: {heldout.class_changes:,} of {heldout.samples:,})"
        claims.append(f"{_changes_words(heldout)} with probability at most {percent(heldout.class_change_bound, +1)}{seen}")
    claims.append(
        f"the relative discrepancy of the output exceeds {percent(heldout.level)} with probability at most "
        f"{percent(heldout.exceed_bound, +1)} (seen: {heldout.exceed:,} of {heldout.samples:,})"
    )
    each = "each of these statements holds with confidence" if len(claims) > 1 else "with confidence"
    words = [
        f"Other inputs: from {plural(heldout.samples, 'held-out sample')}, {each} {percent(heldout.confidence, -1)} (exact binomial, "
        f"Clopper-Pearson): {'; '.join(claims)}.",
        "This is valid only for inputs drawn, independently, like the held-out samples, and because those samples were not used for "
        "pruning.",
    ]
    return [*words, f"Of how samples were told apart: {clean(heldout.note)}."] if heldout.note else words


def _counted_words(heldout: HeldOutCertificate) -> list[str]:
    """What was counted, where no bound can be stated."""
    counts = [] if heldout.class_changes is None else [f"{_changes_words(heldout)} in {heldout.class_changes:,}"]
    counts.append(f"the relative discrepancy exceeds {percent(heldout.level)} in {heldout.exceed:,}")
    return [
        f"Other inputs: NO bound is stated, because {clean(heldout.reason).rstrip('.')}. Counted on {heldout.units_words}, which says "
        f"something of these data only: {'; '.join(counts)}."
    ]
