"""``alternate``: prunes in rounds, and has the network retrained after each of them (the iterative variant of L-OBS)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .attention import opened
from .calibration import Batches
from .layers import is_prunable, view
from .methods import LOBS
from .methods.targets import PerLayer
from .pruning import PruneResult, prune
from .status import InvalidInput
from .wrappers import takes_models


@dataclass(frozen=True)
class Alternated:
    """``model``: the network after the last retraining. ``rounds``: what each round's ``prune`` returned, before its retraining.

    A round's certificate speaks of the network that entered that round, not of the first one, and nothing is certified of retraining.
    """

    model: nn.Module
    rounds: tuple[PruneResult, ...]

    def __str__(self) -> str:
        from .render.deploy_words import alternated_text  # presentation stays in render

        return alternated_text(self)

    __repr__ = __str__


@takes_models("model")
def alternate(
    model: nn.Module,
    calibration: Batches,
    method: LOBS,
    retrain: Callable[[nn.Module], object],
    *,
    rounds: int = 2,
    **settings: Any,
) -> Alternated:
    """Prunes ``model`` and retrains it, ``rounds`` times over; ``model`` itself is left unchanged.

    With a sparsity, each round keeps the same share of what the last one left, so that the last one meets it. With an error, every round
    has that threshold, against the network as it was retrained.

    Args:
        model: the trained network.
        calibration: as for :func:`nettrim.prune`.
        method: ``LOBS(..., iterative=True)``.
        retrain: changes the model that it is given, in place, and keeps its zeros (:func:`nettrim.keep_zeros`). Labels, optimizer and
            number of iterations are its own affair.
        rounds: how often; the published code takes 2.
        settings: for :func:`nettrim.prune`; the scheme is ``"parallel"``, as published, unless one is given.

    Raises:
        InvalidInput: what ``prune`` refuses, a method without ``iterative``, or a ``retrain`` that brings zeros of a pruned layer back, or
            leaves it in another form.
    """
    if not isinstance(method, LOBS) or not method.iterative:
        raise InvalidInput(f"alternate: method must be nettrim.LOBS(..., iterative=True), found {method!r}; without retraining call prune")
    if not callable(retrain):
        raise InvalidInput(f"alternate: retrain must be a function that trains the model it is given in place, found {retrain!r}")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise InvalidInput(f"alternate: rounds must be a whole number of at least 1, found {rounds!r}")
    current, results = model, list[PruneResult]()
    for done in range(1, rounds + 1):
        once = replace(method, iterative=False)
        if method.sparsity is not None:
            once = replace(once, sparsity=after_rounds(method.sparsity, done / rounds))
        results.append(prune(current, calibration, once, **({"scheme": "parallel"} | settings)))
        current = copy.deepcopy(results[-1].model)
        retrain(current)
        _check_zeros(results[-1], current, done)
    return Alternated(current, tuple(results))


def after_rounds(sparsity: PerLayer, share: float) -> PerLayer:
    """The sparsity after a share of the rounds: what is kept is that power of what is kept in the end."""
    if isinstance(sparsity, Mapping):
        return {layer: float(1 - (1 - value) ** share) for layer, value in sparsity.items()}
    return float(1 - (1 - sparsity) ** share)


def _check_zeros(result: PruneResult, retrained: nn.Module, done: int) -> None:
    before, after = (dict(opened(model).named_modules()) for model in (result.model, retrained))
    for layer in result.report.layers:
        name = layer.name
        own, found = view(name, before[name]).weight, after.get(name)
        if found is None or not is_prunable(found) or view(name, found).weight.shape != own.shape:
            raise InvalidInput(f"alternate: retrain must keep the layers and their shapes, and after round {done} {name!r} is another one")
        if bool(((own == 0) & (view(name, found).weight != 0).to(own.device)).any()):
            raise InvalidInput(
                f"alternate: retrain must keep the zeros of '{name}.weight', and after round {done} some are gone; "
                "use nettrim.keep_zeros in it"
            )
