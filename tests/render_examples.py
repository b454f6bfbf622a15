"""Small reports, certificates and masks that the tests of tables, sentences and the page share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from nettrim.certificate import Certificate, HeldOutCertificate, LayerCertificate, NetworkCertificate
from nettrim.render import ComparisonRow
from nettrim.report import LayerReport, PruneReport
from nettrim.status import Status
from nettrim.whole import LeftOut, WholeModel

SHAPES = (("fc1", 64, 300, "relu"), ("fc2", 300, 100, "relu"), ("<script>alert(1)</script>", 100, 10, "identity"))


def make_masks(density: float = 0.25) -> dict[str, npt.NDArray[np.bool_]]:
    generator = np.random.default_rng(7)
    masks = {name: generator.random((outputs, inputs)) < density for name, inputs, outputs, _ in SHAPES}
    masks["fc1"][:, [0, 7, 56, 63]] = False
    masks["fc1"][[5, 9], :] = False
    return masks


def make_layer(name: str, inputs: int, outputs: int, activation: str, nonzeros: int, **changes: object) -> LayerReport:
    layer = LayerReport(
        name=name,
        kind="Linear",
        inputs=inputs,
        outputs=outputs,
        activation=activation,
        reading="features",
        target="epsilon 0.02",
        status=Status.CONVERGED,
        nonzeros=nonzeros,
        weights=inputs * outputs,
        rows=1000,
        reference_norm=500.0,
        distance=9.9,
        tolerance=10.0,
        original_distance=4.2,
        gap=0.00123,
        iterations=412,
        seconds=1.234,
        dead_inputs=0,
    )
    return replace(layer, **changes)  # type: ignore[arg-type]


def make_whole(**changes: object) -> WholeModel:
    left = (LeftOut("gru", "GRU", 7776, "nettrim prunes Linear"), LeftOut("head", "Linear", 500, "left out by ignore="))
    return replace(WholeModel(parameters=60_000, zeros=37_650, vectors=1_234, left_out=left), **changes)  # type: ignore[arg-type]


def make_report(masks: Mapping[str, npt.NDArray[np.bool_]] | None = None, **changes: object) -> PruneReport:
    masks = make_masks() if masks is None else masks
    layers = tuple(
        make_layer(name, inputs, outputs, activation, int(masks[name].sum()), dead_inputs=3 if name == "fc1" else 0)
        for name, inputs, outputs, activation in SHAPES
    )
    report = PruneReport(
        method="NetTrim(epsilon=0.02)",
        scheme="cascade",
        seed=0,
        samples=1000,
        seconds=4.2,
        sample_shape=(1, 8, 8),
        layers=layers,
        model=make_whole(),
        notes=("two batches were <b>shorter</b>",),
        settings={"norm": "l1", "epsilon": 0.02, "pattern": None},
    )
    return replace(report, **changes)  # type: ignore[arg-type]


def make_certified(name: str, **changes: object) -> LayerCertificate:
    layer = LayerCertificate(
        name=name,
        activation="relu",
        rows=1000,
        rows_total=1000,
        reference_norm=500.0,
        tolerance=10.0,
        distance=9.9,
        distance_all_rows=9.9,
        discrepancy=8.5,
        bound=9.9,
        reason="",
        gap=0.00123,
        gap_kind="epsilon",
        weights=19_200,
        nonzeros=4_800,
        budget=None,
        pattern="",
        sound=True,
        met=True,
        gap_level=10.0,
        original_distance=4.2,
    )
    return replace(layer, **changes)  # type: ignore[arg-type]


def make_certificate(scheme: str = "cascade", **changes: object) -> Certificate:
    certificate = Certificate(
        method="NetTrim",
        program="preimage",
        scheme=scheme,
        arithmetic="float64",
        calibration_hash="c" * 64,
        reference_hash="r" * 64,
        weights_hash="w" * 64,
        max_samples=20000,
        seed=0,
        versions={"torch": "2.13.0", "nettrim": "0.1.0"},
        layers=tuple(make_certified(name) for name, *_ in SHAPES),
        network=NetworkCertificate(
            scheme=scheme,
            output_layer="fc3",
            rows=1000,
            reference_norm=800.0,
            bound=9.9,
            bound_from_tolerances=10.0,
            bound_link_normalised=None,
            reason="",
            achieved=8.5,
            agreement=0.99699,
            sound=True,
        ),
    )
    return replace(certificate, **changes)  # type: ignore[arg-type]


def make_heldout(**changes: object) -> HeldOutCertificate:
    heldout = HeldOutCertificate(
        samples=2000,
        data_hash="h" * 64,
        confidence=0.95,
        class_changes=6,
        class_change_bound=0.0059201,
        level=0.05,
        exceed=11,
        exceed_bound=0.0091,
        accuracy_before=0.984,
        accuracy_after=0.9815,
    )
    return replace(heldout, **changes)  # type: ignore[arg-type]


def broken_certificate() -> Certificate:
    certificate = make_certificate()
    layers = (certificate.layers[0], make_certified("fc2", distance=12.5, discrepancy=11.0, bound=12.5, met=False), certificate.layers[2])
    return replace(certificate, layers=layers)


COMPARISON = (
    ComparisonRow("reference network", (1.0, 1.0, 1.0), 1.0, 0.984, 1.0, 0.0, None, None, "-"),
    ComparisonRow("Net-Trim, cascade", (0.1, 0.11, 0.3), 0.11, 0.981, 0.99699, 0.018, 0.0201001, 4.2, "holds"),
    ComparisonRow("magnitude <same>", (0.1, 0.11, 0.3), 0.11, None, 0.4, 0.9, None, 0.01, "states distances"),
)
