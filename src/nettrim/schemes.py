"""The two schemes: every layer on the reference network's inputs, or each on the inputs that the pruned network gives it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .capture import Replica
from .tasks import LayerTask

Capture = Callable[[str, Replica | None], LayerTask]
Settle = Callable[[str, LayerTask], None]


def parallel(names: Sequence[str], capture: Capture, settle: Settle) -> None:
    """Every layer sees the reference network's inputs; the order of the layers does not matter."""
    for name in names:
        settle(name, capture(name, None))


def cascade(names: Sequence[str], pruned: Replica, capture: Capture, settle: Settle) -> None:
    """Every layer sees the inputs of the network as pruned so far; its target is still the reference network's output.

    ``settle`` must change ``pruned``, so that the next layer sees it.
    """
    for name in names:
        settle(name, capture(name, pruned))
