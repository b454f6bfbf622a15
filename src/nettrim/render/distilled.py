"""What fine-tuning without labels did, in plain lines."""

from __future__ import annotations

from ..certificate import by_module
from ..distill import Distilled
from .numbers import clean, duration, percent


def distilled_words(made: Distilled) -> str:
    """What it did to the outputs, in one sentence."""
    held = (
        ""
        if made.unseen_before is None or made.unseen_after is None
        else f", {percent(made.unseen_before)} to {percent(made.unseen_after)} on the samples held back"
    )
    return (
        f"fine-tuned without labels: the outputs' discrepancy went from {percent(made.before)} to {percent(made.after)}{held} "
        f"(step {made.best} of {made.steps} is kept)"
    )


def distilled_text(made: Distilled) -> str:
    """The sentence, what could change, and what to do next."""
    mixed = ", inputs mixed in pairs" if made.mixed else ""
    return "\n".join(
        [
            distilled_words(made),
            f"trained, zeros kept: {clean(by_module(made.learned))}",
            f"{duration(made.seconds)}{mixed}",
            "not certified yet: nettrim.recertify(result, distilled.model, model, calibration)",
        ]
    )
