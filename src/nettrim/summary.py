"""A result in five lines of plain text: what became of the outputs, what is zero, what was left out, the verdict, what to do next."""

from __future__ import annotations

from .certificate import Certificate
from .report import PruneReport

SHOWN = 3  # of what was left out, the largest are named
NEXT = "result.save('pruned'); nettrim.verify('pruned', model, data); nettrim.bench, compact, export of result.model"


def result_text(report: PruneReport, certificate: Certificate, following: str = NEXT) -> str:
    """The five lines; ``following`` is the last: what to do next, with the names that are in use."""
    return "\n".join(
        (
            f"outputs:  {_outputs(certificate)}",
            f"zeros:    {_zeros(report)}",
            f"left out: {_left_out(report)}",
            f"verdict:  {certificate.verdict_words()}{_warnings(report)}",
            f"next:     {following}",
        )
    )


def _outputs(certificate: Certificate) -> str:
    """How right or how like the trained network the pruned one is: of labels, classes and distances, the first two that are known."""
    from .render.numbers import percent  # presentation stays in render

    heldout, network = certificate.heldout, certificate.network
    found = []
    if heldout is not None and heldout.accuracy_before is not None and heldout.accuracy_after is not None:
        found.append(f"accuracy {heldout.accuracy_before:.2%} -> {heldout.accuracy_after:.2%} on {heldout.labelled_words}")
    if heldout is not None and heldout.class_changes is not None:
        same = percent(1 - heldout.class_changes / heldout.counted, -1, decimals=2)
        found.append(f"same {heldout.predicted_words} for {same} of {heldout.units_words}")
    elif network.agreement is not None:
        words = "predicted class" if heldout is not None and heldout.accuracy_before is not None else "largest entry"
        found.append(f"same {words} for {percent(network.agreement, -1, decimals=2)} of {network.rows:,} calibration rows")
    if network.reference_norm > 0:
        found.append(f"moved by {percent(network.achieved / network.reference_norm)} of their norm on the calibration data")
    else:
        found.append(f"moved by {network.achieved:.4g} (the trained network puts out zero on the calibration data)")
    return "; ".join(found[:2])


def _zeros(report: PruneReport) -> str:
    from .render.numbers import percent  # presentation stays in render

    whole = report.model
    return (
        f"{percent(whole.zero_share, -1, decimals=1)} of the model's {whole.parameters:,} parameters "
        f"({percent(1 - report.density, -1, decimals=1)} of the {report.weights:,} weights of {len(report.layers)} pruned layers)"
    )


def _left_out(report: PruneReport) -> str:
    whole = report.model
    largest = sorted(whole.left_out, key=lambda left: -left.parameters)
    named = [str(left) for left in largest[:SHOWN]]
    if len(largest) > SHOWN:
        rest = largest[SHOWN:]
        named.append(f"{len(rest)} more modules ({sum(left.parameters for left in rest):,} parameters; all in report.model.left_out)")
    vectors = f" but {whole.vectors:,} parameters of biases, norms and other vectors" if whole.vectors else ""
    return "; ".join(named) or f"nothing{vectors}"


def _warnings(report: PruneReport) -> str:
    """Layers whose solver did not end well, and layers that the data say too little of."""
    found = []
    unsettled = [layer.name for layer in report.layers if not layer.status.ok]
    if unsettled:
        found.append(f"{_some(unsettled)}: see the report's notes")
    scarce = [layer.name for layer in report.layers if layer.scarce]
    if scarce:
        found.append(f"too few data for {_some(scarce)} (fewer rows than inputs): what holds here may not hold elsewhere")
    return "".join(f"; {text}" for text in found)


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
