"""Tables, sentences and the page: what they must say, and that names and numbers cannot break or overstate them."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import numpy.typing as npt
import pytest
from rich.console import Console
from rich.table import Table

from nettrim.certificate import Certificate, HeldOutCertificate, LayerCertificate, NetworkCertificate
from nettrim.render import (
    ComparisonRow,
    _number,
    _percent,
    _short,
    certificate_table,
    certificate_words,
    comparison_table,
    report_html,
    report_table,
    report_text,
)
from nettrim.report import LayerReport, PruneReport
from nettrim.status import InvalidInput, Status

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
        gap_kind="against the preimage program",
        holds=True,
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
            holds=True,
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
    layers = (certificate.layers[0], make_certified("fc2", distance=12.5, discrepancy=11.0, bound=12.5, holds=False), certificate.layers[2])
    return replace(certificate, layers=layers)


COMPARISON = (
    ComparisonRow("reference network", (1.0, 1.0, 1.0), 1.0, 0.984, 1.0, 0.0, None, None, "-"),
    ComparisonRow("Net-Trim, cascade", (0.1, 0.11, 0.3), 0.11, 0.981, 0.99699, 0.018, 0.0201001, 4.2, "holds"),
    ComparisonRow("magnitude <same>", (0.1, 0.11, 0.3), 0.11, None, 0.4, 0.9, None, 0.01, "states distances"),
)


def shown(table: Table, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


class Page(HTMLParser):
    """Collects the tags, attributes and text of a page, and checks that what was opened is closed in order."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def images(self) -> list[str]:
        return [attributes["alt"] or "" for tag, attributes in self.tags if tag == "img"]


def page(**changes: object) -> Page:
    settings: dict[str, object] = {"report": make_report(), "certificate": make_certificate(), "masks": make_masks()} | changes
    return Page(report_html(**settings))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- numbers


def test_numbers_are_rounded_in_the_safe_direction() -> None:
    assert _percent(0.123401) == "12.3%"
    assert _percent(0.123401, +1) == "12.4%"
    assert _percent(0.99699, -1, decimals=2) == "99.69%"
    assert _percent(0.99999, -1, decimals=2) == "99.99%"
    assert _percent(1.0, -1, decimals=2) == "100.00%"
    assert _percent(0.02, +1) == "2.00%"  # no rounding up of what is exact but for float noise
    assert _percent(0.07, +1) == "7.00%"
    assert _percent(54.321) == "5,432%"
    assert _percent(3.21e-7, +1) == "3.3e-05%"
    assert _percent(0.0) == "0%"
    assert _percent(None) == "-"
    assert _percent(float("inf")) == "inf"
    assert _number(1234.51, +1) == "1,235"
    assert _number(0.01234501, +1) == "0.01235"
    assert _number(1.23e-7) == "1.230e-7"
    assert _number(0.0) == "0"


# -------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("width", [80, 100])
def test_report_table_fits_and_says_all(width: int) -> None:
    masks = make_masks()
    report = make_report(masks)
    text = shown(report_table(report), width)
    assert max(len(line) for line in text.splitlines()) <= width
    for needed in ("fc1", "64->300", "identity", "1.98%", "2.00%", "0.123%", "converged", "1.23", "total", "4.20"):
        assert needed in text
    assert f"{masks['fc2'].sum()}/30k" in text
    assert "\N{HORIZONTAL ELLIPSIS}" not in text


def test_report_table_of_large_layers_keeps_every_column_at_80() -> None:
    layer = make_layer("model.layers.11.mlp.gate_proj", 4096, 11008, "leaky_relu", 1_234_567, seconds=1234.5, status=Status.INFEASIBLE)
    text = shown(report_table(make_report(layers=(layer,))), 80)
    lines = [line.rstrip() for line in text.splitlines()]
    assert "4096->11008" in text
    assert "1.2M/45M" in text
    assert lines[1].endswith(" s")
    assert any(line.endswith(" 1,234") for line in lines)
    assert "tolerance" in text


@pytest.mark.parametrize(
    ("count", "text"), [(9999, "9999"), (10_000, "10k"), (999_499, "999k"), (999_500, "1.0M"), (4_190_000, "4.2M"), (9_960_000, "10M")]
)
def test_short_counts(count: int, text: str) -> None:
    assert _short(count) == text


def test_report_table_leaves_out_columns_that_no_layer_fills() -> None:
    report = make_report()
    report = replace(report, layers=tuple(replace(layer, tolerance=None, gap=None) for layer in report.layers))
    text = shown(report_table(report))
    assert "toler" not in text
    assert "gap" not in text


def test_report_table_counts_layers_to_look_at_and_keeps_markup_literal() -> None:
    report = make_report()
    odd = replace(report.layers[0], name="[red]odd[/red]\x1b[31m", status=Status.INFEASIBLE)
    text = shown(report_table(replace(report, layers=(odd, *report.layers[1:]))), 140)
    assert "[red]odd[/red]" in text
    assert "\x1b" not in text
    assert "1 not" in text


@pytest.mark.parametrize("width", [80, 100])
def test_certificate_table(width: int) -> None:
    text = shown(certificate_table(make_certificate()), width)
    assert max(len(line) for line in text.splitlines()) <= width
    for needed in ("certificate: holds", "1.98%", "2.00%", "1.70%", "yes", "network output", "1.06%", "1.24%"):
        assert needed in text
    assert "NO" not in text
    broken = shown(certificate_table(broken_certificate()), width)
    assert "DOES NOT HOLD" in broken
    assert "NO" in broken.splitlines()[5]


def test_certificate_table_compares_sampled_rows_per_row() -> None:
    layer = make_certified("conv", rows=1000, rows_total=4000, discrepancy=20.0, bound=20.0)
    text = shown(certificate_table(make_certificate(layers=(layer,))))
    assert "1000/4000" in text
    assert "2.00%" in text
    assert "compared per row" in text


def test_comparison_table() -> None:
    text = shown(comparison_table(COMPARISON), 110)
    for needed in ("reference network", "10.0% / 11.0% / 30.0%", "98.40%", "99.69%", "2.02%", "holds", "magnitude <same>"):
        assert needed in text
    many = replace(COMPARISON[0], densities=tuple(0.1 for _ in range(40)))
    assert "..." in shown(comparison_table([many]), 140)
    assert "network" in shown(comparison_table([]))


# ---------------------------------------------------------------------------------------------------------- text


def test_report_text_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    report = make_report()
    slow = replace(report.layers[1], status=Status.ITERATION_LIMIT, notes=("stopped early",))
    report = replace(report, layers=(report.layers[0], slow, report.layers[2]))
    text = report_text(report)
    assert text.isascii()
    assert all(character.isprintable() or character == "\n" for character in text)
    assert max(len(line) for line in text.splitlines()) <= 110
    assert "weights remain" in text.splitlines()[0]
    assert f"fc2: iteration limit: {Status.ITERATION_LIMIT.remedy}" in text
    assert "fc2: stopped early" in text
    assert "two batches were <b>shorter</b>" in text
    assert str(report) == text


# --------------------------------------------------------------------------------------------------------- words


def test_words_of_the_cascade() -> None:
    words = certificate_words(make_certificate())
    assert words[0].startswith("The certificate holds")
    text = "\n".join(words)
    assert "Each layer with a tolerance meets it" in text
    assert "the pruned network's own inputs" in text
    assert "Lemma 1" in text
    assert "bounded by that layer's own distance" in text
    assert "nothing accumulates" in text
    assert "proven to be at most 9.900 (1.24% of the norm of the reference output); achieved is 8.500 (1.06%" in text
    assert "99.69%" in text
    assert "where they are met, 10.00" in text
    assert "link-normalised" not in text
    assert "the largest gap of 3 layers is 0.123%" in text
    assert "says nothing about any other input" in text
    assert "`nettrim verify DIR ...`" in words[-1]


def test_words_of_the_parallel_scheme() -> None:
    certificate = make_certificate("parallel")
    certificate = replace(
        certificate,
        layers=(certificate.layers[0], make_certified("fc2", bound=None, reason="a branch that was not followed"), certificate.layers[2]),
        network=replace(certificate.network, bound_link_normalised=31.41001),
    )
    text = "\n".join(certificate_words(certificate))
    assert "the reference network's inputs" in text
    assert "plus the spectral norm" in text
    assert "accumulates" not in text
    assert 'No bound is proven inside the network for layer "fc2": a branch that was not followed.' in text
    assert "link-normalised form 31.42" in text


def test_words_without_tolerances_and_without_network_bound() -> None:
    certificate = make_certificate(
        layers=tuple(make_certified(name, tolerance=None, gap=None) for name, *_ in SHAPES),
    )
    certificate = replace(
        certificate,
        network=replace(certificate.network, bound=None, bound_from_tolerances=None, agreement=None, reason="the output is not a layer."),
    )
    text = "\n".join(certificate_words(certificate))
    assert "No layer was given a tolerance" in text
    assert "no bound of its discrepancy from the reference output is proven (the output is not a layer); achieved is 8.500" in text
    assert "Optimality" not in text
    assert "same class" not in text
    assert "stated in other ways" not in text


def test_words_say_first_what_does_not_hold() -> None:
    words = certificate_words(broken_certificate())
    assert words[0].startswith("The certificate does NOT hold")
    assert words[1].startswith('Not met: layer "fc2": its distance 12.5 is above its tolerance 10 (2.50% of the norm')
    assert "Of 3 layers with a tolerance, 2 are confirmed to meet it" in "\n".join(words)
    certificate = make_certificate()
    broken = replace(
        certificate,
        layers=(make_certified("fc1", discrepancy=11.0, bound=9.9, holds=False), make_certified("fc2", holds=False)),
        network=replace(certificate.network, achieved=12.0, holds=False),
    )
    words = certificate_words(broken)
    assert "its discrepancy 11 is above its stated bound 9.9" in words[1]
    assert "could not be confirmed" in words[2]
    assert "No layer with a tolerance is confirmed to meet it." in words
    assert words[3] == "Not met: network output: its discrepancy 12 is above its stated bound 9.9: one of them is wrong."


def test_words_about_sampled_rows() -> None:
    certificate = make_certificate(layers=(make_certified("conv", rows=1000, rows_total=4000),))
    assert any('"conv" (1,000 of 4,000)' in sentence for sentence in certificate_words(certificate))


def test_words_about_heldout_samples() -> None:
    text = "\n".join(certificate_words(make_certificate(heldout=make_heldout())))
    assert "each of these statements holds with confidence 95.0%" in text
    assert "the predicted class changes with probability at most 0.593% (seen: 6 of 2,000)" in text
    assert "exceeds 5.00% with probability at most 0.910% (seen: 11 of 2,000)" in text
    assert "drawn, independently, like the held-out samples, and because those samples were not used for pruning" in text
    assert "98.40% before, 98.15% after pruning" in text
    assert "says nothing about any other input" not in text
    regression = make_heldout(class_changes=None, class_change_bound=None, accuracy_before=None, accuracy_after=None)
    text = "\n".join(certificate_words(make_certificate(heldout=regression)))
    assert "predicted class changes" not in text
    assert "with confidence 95.0%" in text
    assert "Accuracy" not in text


# ---------------------------------------------------------------------------------------------------------- page


def test_page_is_self_contained_and_escaped() -> None:
    text = report_html(make_report(), make_certificate(heldout=make_heldout()), make_masks(), title="A <i>title</i>", comparison=COMPARISON)
    assert not re.search(r"https?://", text)
    assert "url(" not in text
    assert "@import" not in text
    parsed = Page(text)
    tags = {tag for tag, _ in parsed.tags}
    assert not tags & {"script", "iframe", "object", "i2", "b", "video"}
    for tag, attributes in parsed.tags:
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("src", "href"):
                assert (value or "").startswith("data:"), (tag, value)
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "A <i>title</i>" not in text
    assert "A <i>title</i>" in parsed.text
    assert "two batches were <b>shorter</b>" in parsed.text
    assert "magnitude <same>" in parsed.text


def test_page_contains_what_it_must() -> None:
    masks = make_masks()
    report = make_report(masks)
    parsed = page(report=report, certificate=make_certificate(heldout=make_heldout()))
    for needed in (
        "Certificate holds",
        f"{report.nonzeros:,} of {report.weights:,}",
        f"{report.weights - report.nonzeros:,}",
        "98.15%",
        "98.40% before",
        "99.70%",
        "Density of each layer",
        "Distance achieved and tolerance",
        "4 of 64 inputs (3 never vary on the calibration data): 0, 7, 56, 63",
        "2 of 300 outputs: 5, 9",
        "NetTrim(epsilon=0.02)",
        "torch 2.13.0",
        "c" * 64,
        "h" * 64,
        "9.900",
        "nettrim verify DIR ...",
        "epsilon 0.02",
        "pattern",
    ):
        assert needed in parsed.text, needed
    for sentence in certificate_words(make_certificate()):
        assert sentence.replace("`", "").split(":")[0] in parsed.text
    assert ("code", {}) in parsed.tags


def test_page_says_when_the_certificate_does_not_hold() -> None:
    report = make_report()
    failing = replace(report.layers[1], distance=12.5, status=Status.INFEASIBLE)
    parsed = page(report=replace(report, layers=(report.layers[0], failing, report.layers[2])), certificate=broken_certificate())
    assert "Certificate does not hold" in parsed.text
    assert "Certificate holds" not in parsed.text
    assert "its distance 12.5 is above its tolerance 10" in parsed.text
    assert "2.50%, over 2.00%" in parsed.text
    assert Status.INFEASIBLE.remedy in parsed.text
    assert sum(attributes.get("class") == "fill over" for _, attributes in parsed.tags) == 1


@pytest.mark.parametrize(
    ("shape", "image"),
    [((1, 8, 8), True), ((8, 8), True), ((64,), False), ((1, 64), False), ((4, 4, 4), False), ((3, 8, 8), False), ((), False)],
)
def test_inputs_are_drawn_as_pixels_only_for_images(shape: tuple[int, ...], image: bool) -> None:
    parsed = page(report=make_report(sample_shape=shape))
    pictures = parsed.images()
    assert any("8 x 8 pixels" in alt for alt in pictures) is image
    assert sum("not zero" in alt for alt in pictures) == len(SHAPES)
    assert sum(tag == "svg" for tag, _ in parsed.tags) == len(SHAPES) - image


def test_colour_images_are_summed_over_channels() -> None:
    layer = make_layer("fc1", 48, 10, "relu", 480)
    mask = np.ones((10, 48), dtype=np.bool_)
    mask[:, [0, 16, 32]] = False  # pixel (0, 0) of every channel
    text = report_html(make_report(layers=(layer,), sample_shape=(3, 4, 4)), make_certificate(), {"fc1": mask})
    parsed = Page(text)
    source = next(attributes["src"] for tag, attributes in parsed.tags if tag == "img" and "4 x 4 pixels" in (attributes["alt"] or ""))
    from matplotlib.image import imread

    pixels = imread(io.BytesIO(base64.b64decode((source or "").split(",")[1])))
    assert pixels.shape[:2] == (4, 4)
    assert not np.array_equal(pixels[0, 0], pixels[0, 1])
    assert (pixels.reshape(16, -1)[1:] == pixels[0, 1]).all()
    assert "30" in parsed.text


def test_big_masks_are_averaged_and_missing_or_extra_masks_are_no_error() -> None:
    mask = np.zeros((1000, 2000), dtype=np.bool_)
    mask[:, :100] = True
    layer = make_layer("big", 2000, 1000, "relu", int(mask.sum()))
    other = make_layer("other", 4, 4, "relu", 16)
    text = report_html(make_report(layers=(layer, other)), make_certificate(), {"big": mask, "elsewhere": mask})
    parsed = Page(text)
    assert "of a block" in parsed.text
    assert "and 1,876 more" in parsed.text
    assert "No mask was given" in parsed.text
    assert len(text) < 200_000


def test_empty_masks_and_zero_norms_are_drawn() -> None:
    layer = make_layer("fc1", 64, 300, "relu", 0, reference_norm=0.0, distance=0.0, tolerance=0.0)
    certificate = make_certificate(
        layers=(make_certified("fc1", reference_norm=0.0, distance=0.0, tolerance=0.0, discrepancy=0.0, bound=0.0),)
    )
    parsed = page(report=make_report(layers=(layer,)), certificate=certificate, masks={"fc1": np.zeros((300, 64), dtype=np.bool_)})
    assert "64 of 64 inputs" in parsed.text
    assert "300 of 300 outputs" in parsed.text


def test_a_mask_that_is_no_matrix_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"fc1.*\(64,\).*\(outputs, inputs\)"):
        page(masks={"fc1": np.ones(64, dtype=np.bool_)})


def test_many_layers_are_folded_away() -> None:
    layers = tuple(make_layer(f"block.{index}", 8, 8, "relu", 32) for index in range(30))
    masks = {layer.name: np.eye(8, dtype=np.bool_) for layer in layers}
    parsed = page(report=make_report(layers=layers), masks=masks)
    assert any(tag == "details" for tag, _ in parsed.tags)
    assert "18 more layers" in parsed.text


def test_page_is_deterministic() -> None:
    first = report_html(make_report(), make_certificate(), make_masks(), comparison=COMPARISON)
    second = report_html(make_report(), make_certificate(), make_masks(), comparison=COMPARISON)
    assert first == second


def test_comparison_is_shown_only_when_given() -> None:
    ids = {attributes.get("id") for _, attributes in page().tags}
    assert "comparison" not in ids
    parsed = page(comparison=COMPARISON)
    assert "comparison" in {attributes.get("id") for _, attributes in parsed.tags}
    for needed in ("Net-Trim, cascade", "Agreement with the reference", "10.0% / 11.0% / 30.0%", "states distances"):
        assert needed in parsed.text
