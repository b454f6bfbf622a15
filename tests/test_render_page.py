"""The page: self-contained, escaped, and showing all that the report and the certificate say."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from render_examples import (
    COMPARISON,
    SHAPES,
    broken_certificate,
    make_certificate,
    make_certified,
    make_heldout,
    make_layer,
    make_masks,
    make_report,
)

from nettrim.render import certificate_words, report_html
from nettrim.status import InvalidInput, Status


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
        "Certificate: holds",
        f"{report.nonzeros:,} of {report.weights:,}",
        "37,650 of 60,000 parameters",
        "gru (GRU, 7,776 parameters: nettrim prunes Linear)",
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
    assert "Certificate: not met" in parsed.text
    assert "Certificate: holds" not in parsed.text
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
    with pytest.raises(InvalidInput, match=r"fc1.*\(64,\).*outputs first"):
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


def test_page_shows_readings_and_notes() -> None:
    report = make_report()
    reading = "the graph could not be traced (" + "symbolically traced variables cannot be used as inputs to control flow " * 5 + ")"
    layer = replace(report.layers[0], reading=reading, notes=("1000 of 4000 rows were used", "called <twice>"))
    parsed = page(report=replace(report, layers=(layer, *report.layers[1:]), notes=("first note", "second note")))
    for needed in (reading, "1000 of 4000 rows were used", "called <twice>", "first note", "second note"):
        assert needed in parsed.text, needed


def test_the_text_of_a_report_needs_no_drawing_and_no_templates() -> None:
    program = "import sys, nettrim.render; print(sorted({'jinja2', 'markupsafe', 'matplotlib'} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
