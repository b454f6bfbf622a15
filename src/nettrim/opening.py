"""How far a model can be opened without changing what it computes: checked on a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .attention import opened
from .capture import Replica, replicate
from .outputs import Outputs, disagreement, outputs_of

HIDDEN = "nn.TransformerEncoderLayer is not looked into: taken apart, it computes something else on the first batch"
OTHER = (
    "attention taken apart computes something else than the model on the first batch (at padded places, say): what is reported and "
    "certified speaks of the model as it computes without torch's fused path"
)


def how_opened(given: nn.Module, place: torch.device, batch: Any) -> tuple[bool, str]:
    """Whether the encoder layers of ``given`` may be opened too, and a notice where opening changes what is computed."""
    wide = opened(given)
    if wide is given:
        return True, ""
    expected = _outputs(replicate(given, place, None), batch)
    if expected is None or _agree(expected, wide, place, batch):  # what does not run is refused with the calibration data
        return True, ""
    return (False, HIDDEN) if _agree(expected, opened(given, encoders=False), place, batch) else (True, OTHER)


def alike(model: nn.Module, other: nn.Module, place: torch.device, batch: Any) -> bool:
    """Whether two models run on a batch and put out the same, up to what the order of sums changes."""
    expected = _outputs(replicate(model, place, None), batch)
    return expected is not None and _agree(expected, other, place, batch)


def _outputs(replica: Replica, batch: Any) -> Outputs | None:
    try:
        return outputs_of(replica.run(batch))
    except Exception:  # a user's forward may raise anything
        return None


def _agree(expected: Outputs, model: nn.Module, place: torch.device, batch: Any) -> bool:
    """Whether ``model`` gives the outputs expected, up to what the order of sums changes."""
    replica = replicate(model, place, None)
    found = _outputs(replica, batch)
    return found is not None and not disagreement(expected, found, replica.precision)
