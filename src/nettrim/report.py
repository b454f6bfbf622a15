"""What one pruning run did: plain data, no presentation (``render`` turns it into tables and pages)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .certificate import Certificate, LayerCertificate
from .records import build, items, texts
from .status import InvalidInput, Status
from .whole import LeftOut, WholeModel

SOLVED = "it was solved to a distance of"  # how the note on a distance that was not foreseen begins


@dataclass(frozen=True)
class LayerReport:
    """One layer of one pruning run.

    ``distance``, ``tolerance`` and ``reference_norm`` are Frobenius norms over the rows that the layer's program
    used: the distance of the pre-activations to the preimage box, what was asked of it (``None`` for other
    targets), and the norm of the layer's reference output; they are the certificate's numbers. ``target`` is ``"epsilon 0.02"``,
    ``"sparsity 0.9"``, ``"penalty 3"``, ``"pattern 2:4"`` or ``"inflation 1.05"``: that many times the original weights'
    distance, which gamma gave. ``violation`` is the most by which a constraint of the published program is missed, in units of the
    pre-activations (``None`` for programs without constraints). ``norm`` names the batch-norm that is folded into the layer (empty for
    none).
    """

    name: str
    kind: str
    inputs: int
    outputs: int
    activation: str
    reading: str
    target: str
    status: Status
    nonzeros: int
    weights: int
    rows: int
    reference_norm: float
    distance: float
    tolerance: float | None
    original_distance: float
    gap: float | None
    iterations: int
    seconds: float
    dead_inputs: int
    notes: tuple[str, ...] = ()
    violation: float | None = None
    norm: str = ""

    @property
    def density(self) -> float:
        """Share of the layer's weights that are not zero."""
        return self.nonzeros / self.weights if self.weights else 0.0

    @property
    def relative_distance(self) -> float:
        """``distance`` as a share of the norm of the layer's reference output."""
        return self.distance / self.reference_norm if self.reference_norm > 0 else 0.0

    @property
    def relative_tolerance(self) -> float | None:
        """``tolerance`` as a share of the norm of the layer's reference output."""
        if self.tolerance is None:
            return None
        return self.tolerance / self.reference_norm if self.reference_norm > 0 else 0.0

    @property
    def scarce(self) -> bool:
        """Whether the data have fewer rows than the layer has inputs that vary: many weights then do the same on these data alone."""
        return self.rows < max(2, self.inputs - self.dead_inputs)

    def warnings(self) -> list[str]:
        """What the calibration data do not say of the layer."""
        found = []
        if self.scarce:
            found.append(
                f"{self.rows:,} rows for {self.inputs:,} inputs: these data do not determine its weights, which may do anything on other "
                f"data; give at least {self.inputs:,} rows, better ten times as many"
            )
        if self.dead_inputs:
            found.append(
                f"{self.dead_inputs:,} of {self.inputs:,} inputs never vary on the calibration data, so what it does with them is not "
                "known; give data in which they vary if they can"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for JSON, derived numbers included."""
        data = asdict(self)
        data["status"] = self.status.value
        data["notes"] = list(self.notes)
        data["density"] = self.density
        data["relative_distance"] = self.relative_distance
        data["relative_tolerance"] = self.relative_tolerance
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerReport:
        """The report of a dict made by ``to_dict``.

        Raises:
            InvalidInput: fields are missing or of another type.
        """
        try:
            status = Status(data.get("status"))
        except (ValueError, AttributeError) as error:
            raise InvalidInput(f"LayerReport: status must be one of {', '.join(s.value for s in Status)}; the file is damaged") from error
        return build(cls, data, status=status, notes=texts(data, "notes"))


@dataclass(frozen=True)
class PruneReport:
    """All layers of one pruning run, in the order in which they were pruned; and ``model``, what became of the whole model."""

    method: str
    scheme: str
    seed: int
    samples: int
    seconds: float
    sample_shape: tuple[int, ...]
    layers: tuple[LayerReport, ...]
    model: WholeModel
    notes: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def nonzeros(self) -> int:
        """Weights of all pruned layers that are not zero."""
        return sum(layer.nonzeros for layer in self.layers)

    @property
    def weights(self) -> int:
        """Weights of all pruned layers."""
        return sum(layer.weights for layer in self.layers)

    @property
    def density(self) -> float:
        """Share of the weights of all pruned layers that are not zero."""
        return self.nonzeros / self.weights if self.weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for JSON, derived numbers included."""
        return {
            "method": self.method,
            "scheme": self.scheme,
            "seed": self.seed,
            "samples": self.samples,
            "seconds": self.seconds,
            "sample_shape": list(self.sample_shape),
            "density": self.density,
            "nonzeros": self.nonzeros,
            "weights": self.weights,
            "model": asdict(self.model),
            "settings": self.settings,
            "notes": list(self.notes),
            "layers": [layer.to_dict() for layer in self.layers],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PruneReport:
        """The report of a dict made by ``to_dict``.

        Raises:
            InvalidInput: fields are missing or of another type.
        """
        return build(
            cls,
            data,
            sample_shape=tuple(items(data, "sample_shape")),
            layers=tuple(LayerReport.from_dict(layer) for layer in items(data, "layers")),
            model=build(
                WholeModel,
                data.get("model"),
                left_out=tuple(build(LeftOut, left) for left in items(data.get("model"), "left_out")),
            ),
            notes=texts(data, "notes"),
            settings=dict(data.get("settings", {})),
        )

    def __str__(self) -> str:
        from .render import report_text  # presentation stays in render; imported late so that data never needs it

        return report_text(self)

    __repr__ = __str__


def as_certified(layers: Sequence[LayerReport], certificate: Certificate) -> list[LayerReport]:
    """The layers with the certificate's numbers in the place of those of the moment when each was solved: one number for one thing.

    They differ where a layer's target was shifted (``correction`` below 1), where it is called more than once in a cascade, or where the
    branch that is added to it was pruned after it: no tolerance is claimed then, and a note says what the solver had reached. The gap of
    the published program is the solver's own, which no certificate has.
    """
    return [
        replace(
            layer,
            rows=stated.rows,
            reference_norm=stated.reference_norm,
            distance=stated.distance,
            tolerance=stated.tolerance,
            original_distance=stated.original_distance,
            gap=layer.gap if certificate.program == "halfspace" else stated.gap,
            notes=(*layer.notes, *_unforeseen(layer, stated)),
        )
        for layer, stated in zip(layers, certificate.layers, strict=True)
    ]


def _unforeseen(layer: LayerReport, stated: LayerCertificate) -> list[str]:
    """A note where the finished network's distance is not the one that the solver left."""
    if math.isclose(layer.distance, stated.distance, rel_tol=1e-5, abs_tol=1e-6 * stated.reference_norm):
        return []
    return [f"{SOLVED} {layer.distance:.4g} from its target at that time; the distance stated is that of the finished network"]
