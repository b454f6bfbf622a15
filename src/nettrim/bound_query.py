"""One question to the bounds of a network, as the command line asks it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .bound_network import GapBound, network_bounds
from .bounds.masks import check_rule
from .bounds.tails import check_delta, check_positive, check_share
from .methods.targets import PerLayer
from .progress import Advance
from .sources import batches_from
from .status import InvalidInput


def ask(
    model: nn.Module,
    data: str | None,
    *,
    radius: float | None = None,
    input_shape: str | None = None,
    share: PerLayer | None = None,
    gap: float | None = None,
    relative: bool = False,
    delta: float = 0.05,
    rule: str = "random",
    layers: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    batch_size: int = 256,
    device: torch.device | str | None = None,
    progress: bool | Advance = True,
) -> list[GapBound]:
    """The bound for ``share``, or for the largest share whose bound is at most ``gap``, in every form that was given something.

    ``data`` is named as for :func:`nettrim.sources.batches_from`, ``input_shape`` written as "1,28,28". Raises InvalidInput, for settings
    before the data are read.
    """
    check_rule(rule)
    check_delta(delta)
    if (share is None) == (gap is None):
        raise InvalidInput("give exactly one of share and gap: the share that is removed, or the gap for which the largest share is sought")
    if isinstance(share, float):
        check_share(share)
    if gap is not None:
        check_positive("gap", gap, "the largest distance of the outputs")
        if relative and data is None:
            raise InvalidInput("a relative gap needs data, to whose outputs it is relative: add data, or leave relative out")
    elif relative:
        raise InvalidInput("relative speaks of gap: give gap, or leave relative out (relative bounds are reported wherever data are given)")
    batches = None if data is None else batches_from(data, model, batch_size)
    found = network_bounds(
        model,
        batches,
        radius=radius,
        input_shape=None if input_shape is None else _shape(input_shape),
        layers=layers,
        ignore=ignore,
        device=device,
        progress=progress,
    )
    bounds = []
    for form in found.forms:
        if relative and form != "data":
            continue
        own = found.largest_share(gap, delta, rule=rule, form=form, relative=relative) if gap is not None else share
        assert own is not None
        bounds.append(found.gap(own, delta, rule=rule, form=form))
    return bounds


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InvalidInput(f"input_shape must be whole numbers with commas between them, as 1,28,28; found {text!r}") from error
