"""What is guaranteed, as plain data, its one verdict, and the exact binomial bound that held-out statements state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from scipy.special import betaincinv

from .records import build, items, texts
from .status import InvalidInput

ROUNDING = 1e-9  # relative allowance for the order of summation in float64


class Verdict(Enum):
    """What there is to say of a certificate in one word: the same everywhere it is shown."""

    HOLDS = "holds"
    NOT_MET = "not met"
    WRONG = "wrong"

    @property
    def meaning(self) -> str:
        """In one sentence."""
        return _MEANINGS[self]


_MEANINGS = {
    Verdict.HOLDS: "the numbers recompute from the stored weights, and what was asked for is met",
    Verdict.NOT_MET: "the numbers recompute from the stored weights, but what was asked for is NOT met",
    Verdict.WRONG: "a stated bound is exceeded by what was measured: do not rely on this certificate, and please report it",
}


@dataclass(frozen=True)
class LayerCertificate:
    """The guarantee of one layer on the calibration rows.

    ``distance`` is ``dist(A W + 1 b^T, S(Y))`` on the ``rows`` rows that the layer's program used, ``distance_all_rows`` the same on all
    ``rows_total``. What was asked for: ``tolerance`` is what ``distance`` must meet, ``budget`` the most weights that may stay, ``pattern``
    which sets of them may (each ``None`` or empty where it was not asked for); ``met`` says whether the stored weights do. ``sound`` says
    whether every stated bound is at least what was measured. ``discrepancy`` is ``||X_hat - X||_F`` of the layer's output inside
    the two networks, on all rows. All are in float64 from the stored weights. ``bound`` is the proven upper bound of ``discrepancy``
    (``None`` where the network's structure gives none; ``reason`` says why). ``source`` says where ``activation`` comes from: ``"graph"``,
    ``"stated"`` by the user, ``"stated against the graph"``, or ``"not seen"`` (matched linearly). ``gap`` is the relative duality gap
    of the l1 program of kind ``gap_kind`` (``"epsilon"``, ``"penalty"`` or ``""`` for none) at ``gap_level`` (absolute; the tolerance, or,
    where that is out of reach, the distance that was aimed at): at most that share of the stored weights' objective can be above the
    smallest possible. ``original_distance`` is the distance of the unpruned
    weights on the same inputs. ``theorem`` is the published bound of the discrepancy, from the tolerances and the sums of absolute weights
    alone (docs/theory.md, 4.3); ``None`` where layers have no tolerance or form no chain. ``rounding`` is what the network's own
    arithmetic adds where it does not run in float64, as measured (absolute; docs/theory.md, 4.6): ``bound`` contains it, ``distance``,
    a product in float64 of the inputs and the stored weights, does not. It is 0 in float64.
    """

    name: str
    activation: str
    rows: int
    rows_total: int
    reference_norm: float
    tolerance: float | None
    distance: float
    distance_all_rows: float
    discrepancy: float
    bound: float | None
    reason: str
    gap: float | None
    gap_kind: str
    weights: int
    nonzeros: int
    budget: int | None
    pattern: str
    sound: bool
    met: bool
    gap_level: float = 0.0
    original_distance: float = 0.0
    source: str = "graph"
    theorem: float | None = None
    rounding: float = 0.0

    @property
    def holds(self) -> bool:
        """True when what was asked for is met and no stated bound is exceeded."""
        return self.sound and self.met

    @property
    def asked(self) -> bool:
        """Whether anything was asked for that can be met or missed."""
        return self.tolerance is not None or self.budget is not None or bool(self.pattern)

    def missed(self) -> list[str]:
        """What was asked for and is not met, each in a few words."""
        found = []
        if self.tolerance is not None and not self._near_enough(self.distance):
            norm = self.reference_norm
            share = f" ({self.distance / norm:.3%} of its output's norm, {self.tolerance / norm:.3%} asked for)" if norm > 0 else ""
            found.append(f"its distance {self.distance:.7g} is above its tolerance {self.tolerance:.7g}{share}")
        if self.budget is not None and self.nonzeros > self.budget:
            found.append(f"{self.nonzeros:,} of {self.weights:,} weights are left, where at most {self.budget:,} were asked for")
        return found or ([] if self.met else [f"its weights do not keep to the pattern {self.pattern!r}"])

    def _near_enough(self, distance: float) -> bool:
        return within(distance, self.tolerance, self.reference_norm)


@dataclass(frozen=True)
class NetworkCertificate:
    """The network's output on the calibration rows: proven bounds beside what was achieved.

    Norms run over all floating-point tensors of the output. ``agreement`` is the share of the ``rows`` whose predicted class stayed, the
    largest entry along what ``classes`` names (``None`` and empty without classes; rows are then those of all outputs). ``integer_changes``
    counts entries of integer and boolean outputs that differ (``None`` without such outputs); ``changed`` names those outputs, and plain
    values that differ. ``not_compared`` names objects in the output that nothing here speaks of, with their class. ``rounding`` is the part
    of ``bound`` that the network's own arithmetic adds behind the last pruned layer, as measured; 0 in float64.
    """

    scheme: str
    output_layer: str
    rows: int
    reference_norm: float
    bound: float | None
    bound_from_tolerances: float | None
    bound_link_normalised: float | None
    reason: str
    achieved: float
    agreement: float | None
    sound: bool
    classes: str = ""
    integer_changes: int | None = None
    changed: tuple[str, ...] = ()
    not_compared: tuple[str, ...] = ()
    rounding: float = 0.0

    @property
    def holds(self) -> bool:
        """True when the bound, if there is one, is not exceeded by what was achieved."""
        return self.sound

    def share(self, value: float) -> str:
        """A distance as a share of the norm of the reference output, or as it is where that is zero."""
        return f"{value / self.reference_norm:.3%} of their norm" if self.reference_norm > 0 else f"{value:.4g}"


@dataclass(frozen=True)
class HeldOutCertificate:
    """Exact binomial (Clopper-Pearson) upper bounds at ``confidence``, from samples not used for pruning.

    They hold for inputs drawn like the held-out samples. ``class_change_bound`` is an upper bound on the probability that a prediction of
    a sample changes (any of its predicted classes, or any entry of an integer output), ``exceed_bound`` on the probability that the
    relative discrepancy of a sample, over all its outputs, exceeds ``level``. ``overlap`` counts held-out samples that are calibration
    samples as well; they must be chance repetitions for the bounds to hold.

    ``unit`` is what ``class_changes``, ``integer_changes`` and ``exceed`` count: ``"sample"``, or ``"row"`` or ``"batch"`` (``units`` of
    them) where outputs do not belong to samples one by one: then there is no bound, and ``reason`` says why. ``classes`` names the outputs
    and dimensions that hold classes (``classes_reason``: why there are none); ``predictions`` and ``predictions_changed`` count predicted
    classes one by one, of which a sample may have many. ``accuracy_before`` and ``accuracy_after`` are shares of the ``labelled``
    entries (``accuracy_reason``: why they are not stated). ``left_out`` names outputs that belong to no sample; ``note`` says what else
    limits what was checked.
    """

    samples: int
    data_hash: str
    confidence: float
    class_changes: int | None
    class_change_bound: float | None
    level: float
    exceed: int
    exceed_bound: float | None
    accuracy_before: float | None
    accuracy_after: float | None
    overlap: int = 0
    unit: str = "sample"
    units: int = 0
    reason: str = ""
    note: str = ""
    classes: str = ""
    classes_reason: str = ""
    predictions: int | None = None
    predictions_changed: int | None = None
    integer_changes: int | None = None
    labelled: int | None = None
    accuracy_reason: str = ""
    left_out: tuple[str, ...] = ()

    @property
    def counted(self) -> int:
        """How many units the counts are out of."""
        return self.samples if self.unit == "sample" else self.units

    @property
    def units_words(self) -> str:
        """What the counts are out of: ``60 held-out samples``."""
        one, more = {
            "row": ("row of the outputs on held-out data", "rows of the outputs on held-out data"),
            "batch": ("held-out batch", "held-out batches"),
        }.get(self.unit, ("held-out sample", "held-out samples"))
        return f"{self.counted:,} {one if self.counted == 1 else more}"

    @property
    def predicted_words(self) -> str:
        """``predicted class``, or ``predictions`` where a unit has several.

        Where no labels fit, nothing says that an output's entries are scores of classes: ``largest entry``, or ``largest entries``.
        """
        one = self.predictions is None or self.predictions == self.counted
        if self.accuracy_before is None and self.integer_changes is None:
            return "largest entry" if one else "largest entries"
        return "predicted class" if one and self.integer_changes is None else "predictions"

    @property
    def labelled_words(self) -> str:
        """What accuracy was counted on: samples, or the labelled entries of them."""
        samples = f"{self.samples:,} held-out sample{'' if self.samples == 1 else 's'}"
        if self.labelled is None or self.labelled == self.samples:
            return samples
        return f"{self.labelled:,} labelled entr{'y' if self.labelled == 1 else 'ies'} of {samples}"


@dataclass(frozen=True)
class Certificate:
    """What is guaranteed about a pruned network, with the numbers that let someone else recompute it.

    ``trained`` names the entries of the network's state that differ from the reference network's besides the pruned layers' own (their
    weights and biases, and the bias of a batch-norm that holds a layer's offset), as fine-tuning leaves them; empty after pruning alone.
    Every number here speaks of the network as it is, and no bound rests on what these entries were.
    """

    method: str
    program: str
    scheme: str
    arithmetic: str
    calibration_hash: str
    reference_hash: str
    weights_hash: str
    max_samples: int
    seed: int
    versions: dict[str, str]
    layers: tuple[LayerCertificate, ...]
    network: NetworkCertificate
    heldout: HeldOutCertificate | None = None
    trained: tuple[str, ...] = ()
    not_checked: tuple[str, ...] | None = field(default=None, compare=False)

    @property
    def sound(self) -> bool:
        """True when no stated bound is exceeded by what was measured."""
        return all(layer.sound for layer in self.layers) and self.network.sound

    @property
    def met(self) -> bool:
        """True when every layer's stored weights meet what was asked of it: tolerance, number of weights, pattern."""
        return all(layer.met for layer in self.layers)

    @property
    def verdict(self) -> Verdict:
        """The one verdict."""
        return Verdict.WRONG if not self.sound else Verdict.HOLDS if self.met else Verdict.NOT_MET

    @property
    def holds(self) -> bool:
        """True when the verdict is that it holds."""
        return self.verdict is Verdict.HOLDS

    def verdict_words(self) -> str:
        """The verdict in one line, with the layers and the network's output that it speaks of where it is not good."""
        if self.holds and not any(layer.asked for layer in self.layers):
            return "holds: the numbers recompute from the stored weights; nothing was asked for that could be missed"
        return ". ".join([f"{self.verdict.value}: {self.verdict.meaning}", *self.failures()])

    def failures(self) -> list[str]:
        """One sentence without its full stop for each layer that does not hold, and for the network's output."""
        found = [
            f"Layer {layer.name!r}: {' and '.join([*layer.missed(), *_exceeded(layer.discrepancy, layer.bound, layer.sound)])}"
            for layer in self.layers
            if not layer.holds
        ]
        network = self.network
        return found + [f"Network output: {text}" for text in _exceeded(network.achieved, network.bound, network.sound)]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for JSON, what follows from it (``verdict``, ``holds``) included."""
        data = asdict(self)
        del data["not_checked"]
        data["trained"] = list(self.trained)
        data["layers"] = [values | {"holds": layer.holds} for values, layer in zip(data["layers"], self.layers, strict=True)]
        for part, keys in (("network", ("changed", "not_compared")), ("heldout", ("left_out",))):
            for key in keys if data[part] is not None else ():
                data[part][key] = list(data[part][key])
        return data | {"verdict": self.verdict.value, "sound": self.sound, "met": self.met, "holds": self.holds}

    def __str__(self) -> str:
        network = self.network
        bound = "no bound is proven" if network.bound is None else f"proven bound {network.share(network.bound)}"
        lines = [
            f"certificate {self.verdict_words()}",
            f"outputs moved by {network.share(network.achieved)} on {network.rows:,} calibration rows ({bound})",
            f"{len(self.layers)} layers, {sum(layer.nonzeros for layer in self.layers):,} of "
            f"{sum(layer.weights for layer in self.layers):,} weights left ({self.method}, {self.scheme})",
        ]
        if self.trained:
            lines.append(f"trained besides the pruned layers: {by_module(self.trained)}")
        if self.not_checked is not None:
            lines.append(f"not checked: {'; '.join(self.not_checked) or 'nothing'}")
        return "\n".join(lines)

    __repr__ = __str__

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Certificate:
        """The certificate of a dict made by ``to_dict``.

        Raises:
            InvalidInput: fields are missing, of another type, or not finite.
        """
        heldout = data.get("heldout")
        return build(
            cls,
            data,
            versions=dict(data.get("versions", {})),
            layers=tuple(build(LayerCertificate, layer) for layer in items(data, "layers")),
            network=build(NetworkCertificate, data.get("network"), **_texts(data.get("network"), "changed", "not_compared")),
            heldout=None if heldout is None else build(HeldOutCertificate, heldout, **_texts(heldout, "left_out")),
            **_texts(data, "trained"),
        )


def within(distance: float, limit: float | None, norm: float, rounding: float = ROUNDING) -> bool:
    """Whether ``distance`` is at most ``limit`` up to rounding of sums of size ``norm``; NaN is never within anything."""
    return limit is None or distance <= limit * (1 + rounding) + rounding * norm


def by_module(keys: Sequence[str], limit: int = 8) -> str:
    """State-dict keys by module, the first ``limit`` of them: ``net.1 (weight, bias), net.5 (running_mean) and 3 more modules``."""
    groups: dict[str, list[str]] = {}
    for name in keys:
        module, _, label = name.rpartition(".")
        groups.setdefault(module, []).append(label)
    shown = [f"{module} ({', '.join(labels)})" if module else ", ".join(labels) for module, labels in list(groups.items())[:limit]]
    more = len(groups) - len(shown)
    return ", ".join(shown) + (f" and {more} more module{'' if more == 1 else 's'}" if more else "")


def _exceeded(discrepancy: float, bound: float | None, sound: bool) -> list[str]:
    if sound:
        return []
    if bound is None or discrepancy <= bound:
        return ["a stated number could not be confirmed"]
    return [f"its discrepancy {discrepancy:.7g} is above its stated bound {bound:.7g}: one of them is wrong"]


def _texts(data: Any, *keys: str) -> dict[str, tuple[str, ...]]:
    """The lists of texts at those of ``keys`` that are there."""
    return {key: texts(data, key) for key in keys if isinstance(data, Mapping) and key in data}


def clopper_pearson_upper(events: int, samples: int, confidence: float) -> float:
    """Exact binomial upper bound, at ``confidence``, on the probability of an event seen ``events`` times in ``samples``.

    Clopper and Pearson (1934): docs/theory.md, (5.1).

    Raises:
        InvalidInput: ``confidence`` outside (0, 1), or ``events`` outside [0, samples], or no samples.
    """
    if not 0 < confidence < 1:
        raise InvalidInput(f"confidence must lie in (0, 1), found {confidence}")
    if samples < 1 or not 0 <= events <= samples:
        raise InvalidInput(f"events must lie in [0, samples] with at least one sample, found {events} of {samples}")
    if events == samples:
        return 1.0
    return float(betaincinv(events + 1, samples - events, confidence))
