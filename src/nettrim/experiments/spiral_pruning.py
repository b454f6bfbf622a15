"""Pruning a spirals network: one pruning as a record, and the search for the sparsest within a limit of the relative discrepancy."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..certificate import LayerCertificate
from ..methods import NetTrim
from ..program import LayerProgram
from ..pruning import PruneResult, prune
from ..report import LayerReport
from ..solution import Solution, Watch
from ..status import InvalidInput
from .spiral_training import one_thread

WAYS = ("published", "preimage l1", "preimage l0")
"""The published program with the published tolerances, and the preimage program with a tolerance for each layer."""
LIMIT = 0.02
"""The relative discrepancy of the outputs before soft-max must be below it (published)."""
AIM = 0.0199
"""The tolerance of the last layer where it is chosen: within LIMIT, with a margin for rounding."""
GAMMA = 1.1
"""Published."""
PUBLISHED_GRID = (0.12, 0.08, 0.05, 0.03, 0.02, 0.01, 0.005)
"""epsilon of the first layer; the paper does not state the one of its tables."""
PREIMAGE_GRID = (0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02)
"""epsilon of the second layer."""
FIRST = 0.02
"""epsilon of the first layer with the preimage program: small, as it has few weights and all later errors stand on it."""
GAP, ITERATIONS = 0.02, 1500
LAYERS = ("1", "3", "5")
SEARCH: dict[str, object] = {
    "gamma": GAMMA,
    "published": PUBLISHED_GRID,
    "first": FIRST,
    "preimage": PREIMAGE_GRID,
    "aim": AIM,
    "gap": GAP,
    "max_iterations": ITERATIONS,
}
"""Everything that a search depends on, beside the network and the points."""
_ROUNDING = 1e-6

Scheme = Literal["cascade", "parallel"]
Known = dict[tuple[object, ...], Solution]


@dataclass(frozen=True)
class LayerRecord:
    """One layer of a pruned network. ``nonzeros`` of ``weights``, and ``biases``, are not exactly 0.

    ``tolerance``, ``original`` (the distance of the layer's own original weights on the same inputs), ``discrepancy``, ``bound`` and
    ``theorem`` are relative to the norm of the layer's reference output; a slack is a bound divided by the discrepancy, ``None``
    where there is no bound or no error. ``violation`` (absolute) is the published program's largest one.
    """

    name: str
    weights: int
    nonzeros: int
    biases: int
    status: str
    tolerance: float | None
    original: float
    discrepancy: float
    bound: float | None
    slack: float | None
    theorem: float | None
    theorem_slack: float | None
    violation: float | None
    gap: float | None
    iterations: int


@dataclass(frozen=True)
class Pruned:
    """One pruned network: ``rd`` on the calibration points, which are the training points, and on held-out ones; accuracies in [0, 1].

    ``epsilon`` by layer; with ``gamma`` only the first layer's counts, and ``kappa`` tightens the last one.
    """

    way: str
    scheme: str
    epsilon: dict[str, float]
    gamma: float | None
    kappa: float
    layers: tuple[LayerRecord, ...]
    rd: float
    rd_heldout: float
    bound: float | None
    slack: float | None
    accuracy: float
    accuracy_heldout: float
    holds: bool
    seconds: float

    @property
    def nonzeros(self) -> tuple[int, ...]:
        """By layer, weights only."""
        return tuple(layer.nonzeros for layer in self.layers)

    @property
    def within_limit(self) -> bool:
        """Whether ``rd`` is below LIMIT, with a certificate that holds."""
        return self.holds and self.rd < LIMIT

    @property
    def theorems_hold(self) -> bool:
        """Whether no published bound was exceeded."""
        return all(layer.theorem is None or layer.discrepancy <= layer.theorem * (1 + _ROUNDING) for layer in self.layers)

    @property
    def slacks(self) -> tuple[float, ...]:
        """Proven bound over what was achieved, of the layers and the network."""
        return tuple(slack for slack in (self.slack, *(layer.slack for layer in self.layers)) if slack is not None)

    @property
    def theorem_slacks(self) -> tuple[float, ...]:
        """The same of the published bounds, layer by layer."""
        return tuple(layer.theorem_slack for layer in self.layers if layer.theorem_slack is not None)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Pruned:
        """The pruning of a journal's record."""
        return cls(**{**record, "layers": tuple(LayerRecord(**layer) for layer in record["layers"])})


@dataclass(frozen=True)
class Points:
    """Points (n, 2) with classes (n,): those of training, which calibrate too, and held-out ones."""

    inputs: Tensor
    labels: Tensor
    heldout: Tensor
    heldout_labels: Tensor


def method_of(way: str, epsilon: Mapping[str, float], gamma: float | None = None, kappa: float = 1.0) -> NetTrim:
    """The Net-Trim of a way's name. Raises InvalidInput."""
    if way == "published":
        return NetTrim(epsilon=dict(epsilon), program="halfspace", gamma=gamma, kappa=kappa, gap=GAP, max_iterations=ITERATIONS)
    if way == "preimage l1":
        return NetTrim(epsilon=dict(epsilon), norm="l1", gamma=gamma, kappa=kappa, gap=GAP, max_iterations=ITERATIONS)
    if way == "preimage l0":
        return NetTrim(epsilon=dict(epsilon), norm="l0", gamma=gamma, kappa=kappa)
    raise InvalidInput(f"way must be one of {', '.join(map(repr, WAYS))}, found {way!r}; choose one of them")


class Pruner:
    """Prunes one trained network in different ways; a layer program that comes again with equal inputs and settings is not solved again."""

    def __init__(self, model: nn.Sequential, points: Points) -> None:
        self.model, self.points = model, points
        self.known: Known = {}

    def prune(
        self,
        way: str,
        epsilon: Mapping[str, float] | float,
        gamma: float | None = None,
        kappa: float = 1.0,
        scheme: Scheme = "cascade",
    ) -> Pruned:
        """One pruning; ``epsilon`` by layer, or one for all of them."""
        by_layer = dict(epsilon) if isinstance(epsilon, Mapping) else dict.fromkeys(LAYERS, float(epsilon))
        method = _remembering(method_of(way, by_layer, gamma, kappa), self.known)
        with one_thread(), torch.no_grad():
            result = prune(self.model, self.points.inputs, method, scheme=scheme, progress=False)
            return self._record(way, by_layer, gamma, kappa, result)

    def search(self, way: str) -> tuple[Pruned, ...]:
        """All prunings tried, of which ``best`` chooses.

        Tolerances are tried from the loosest to the tightest, up to the first within the limit, because layer 2's nonzeros grow as they
        tighten; then the one half-way (geometrically) between it and the one before. The published tolerances take kappa = 1 and,
        where that leaves ``rd`` at the limit or above, the kappa whose tolerance of the last layer is AIM.
        """
        tried: list[Pruned] = []
        before: float | None = None
        for epsilon in PUBLISHED_GRID if way == "published" else PREIMAGE_GRID:
            found = self._attempt(way, epsilon)
            tried += found
            if found[-1].within_limit:
                if before is not None:
                    tried += self._attempt(way, math.sqrt(before * epsilon))
                break
            before = epsilon
        return tuple(tried)

    def _attempt(self, way: str, epsilon: float) -> list[Pruned]:
        if way != "published":
            return [self.prune(way, {LAYERS[0]: FIRST, LAYERS[1]: epsilon, LAYERS[2]: AIM})]
        first = self.prune(way, epsilon, GAMMA)
        original = first.layers[-1].original
        if first.rd < LIMIT or original <= 0 or (kappa := AIM / (math.sqrt(GAMMA) * original)) >= 1:
            return [first]
        return [first, self.prune(way, epsilon, GAMMA, kappa)]

    def _record(self, way: str, epsilon: dict[str, float], gamma: float | None, kappa: float, result: PruneResult) -> Pruned:
        network, points = result.certificate.network, self.points
        norm = network.reference_norm or 1.0
        before, after = self.model(points.heldout), result.model(points.heldout)
        modules = dict(result.model.named_modules())
        return Pruned(
            way=way,
            scheme=result.report.scheme,
            epsilon=epsilon,
            gamma=gamma,
            kappa=kappa,
            layers=tuple(
                _layer(report, certified, modules[report.name])
                for report, certified in zip(result.report.layers, result.certificate.layers, strict=True)
            ),
            rd=network.achieved / norm,
            rd_heldout=float((after - before).norm() / before.norm()),
            bound=None if network.bound is None else network.bound / norm,
            slack=_slack(network.bound, network.achieved),
            accuracy=_accuracy(result.model(points.inputs), points.labels),
            accuracy_heldout=_accuracy(after, points.heldout_labels),
            holds=result.certificate.holds,
            seconds=result.report.seconds,
        )


def best(tried: Sequence[Pruned]) -> tuple[Pruned, bool]:
    """The one within the limit with the fewest nonzeros in layer 2, then in all, and True; without any, that of least ``rd`` and False."""
    within = [pruned for pruned in tried if pruned.within_limit]
    if within:
        return min(within, key=lambda pruned: (pruned.nonzeros[1], sum(pruned.nonzeros))), True
    return min(tried, key=lambda pruned: pruned.rd), False


def accuracies(model: nn.Sequential, points: Points) -> tuple[float, float]:
    """On the training points and on the held-out ones, in [0, 1]."""
    with one_thread(), torch.no_grad():
        return _accuracy(model(points.inputs), points.labels), _accuracy(model(points.heldout), points.heldout_labels)


class _Remembering(NetTrim):
    """Net-Trim that keeps its solutions."""

    known: Known

    def solve(self, program: LayerProgram, target: float, watch: Watch | None = None) -> Solution:
        """Solves one layer's program, or finds it solved."""
        inputs = hashlib.sha256(program.inputs.numpy().tobytes()).hexdigest()
        # kappa counts for the last layer only
        settings = (self.program, self.norm, str(self.gamma), self.kappa if program.is_point else 1.0)
        target = 0.0 if self.gamma is not None and program.is_moved() else target  # replaced by gamma's
        key = (program.name, target, inputs, *settings)
        if key not in self.known:
            self.known[key] = super().solve(program, target, watch)
        return self.known[key]


def _remembering(method: NetTrim, known: Known) -> _Remembering:
    made = _Remembering(**{field.name: getattr(method, field.name) for field in fields(method)})
    object.__setattr__(made, "known", known)  # no field: it is no setting
    return made


def _layer(report: LayerReport, certified: LayerCertificate, module: nn.Module) -> LayerRecord:
    norm = certified.reference_norm or 1.0
    bias = getattr(module, "bias", None)
    return LayerRecord(
        name=report.name,
        weights=report.weights,
        nonzeros=report.nonzeros,
        biases=0 if bias is None else int((bias != 0).sum()),
        status=report.status.value,
        tolerance=None if report.tolerance is None else report.tolerance / norm,
        original=report.original_distance / norm,
        discrepancy=certified.discrepancy / norm,
        bound=None if certified.bound is None else certified.bound / norm,
        slack=_slack(certified.bound, certified.discrepancy),
        theorem=None if certified.theorem is None else certified.theorem / norm,
        theorem_slack=_slack(certified.theorem, certified.discrepancy),
        violation=report.violation,
        gap=report.gap,
        iterations=report.iterations,
    )


def _slack(bound: float | None, achieved: float) -> float | None:
    return bound / achieved if bound is not None and achieved > 0 else None


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(dim=1) == labels).double().mean())
