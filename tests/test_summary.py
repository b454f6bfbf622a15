"""The five lines of a result: no word and no number that says more than is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import nettrim
from nettrim import Magnitude, PruneResult
from nettrim.render import certificate_words, report_html

X, UNSEEN = torch.randn(80, 6, generator=torch.Generator().manual_seed(0)), torch.randn(30, 6, generator=torch.Generator().manual_seed(1))


def result(*, bias: bool = True, labels: torch.Tensor | None = None, heldout: bool = True) -> PruneResult:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias), nn.ReLU(), nn.Linear(8, 3, bias)).eval()
    unseen = [UNSEEN if labels is None else (UNSEEN, labels)]
    return nettrim.prune(model, X, Magnitude(sparsity=0.5), heldout=unseen if heldout else None, progress=False)


def line(text: str, name: str) -> str:
    (found,) = (part for part in text.splitlines() if part.startswith(f"{name}: "))
    return found


def shown(told: PruneResult) -> tuple[str, str, str]:
    """The first line, the sentences and the page."""
    masks = told.masks()
    return (
        line(str(told), "outputs"),
        " ".join(certificate_words(told.certificate)),
        report_html(told.report, told.certificate, masks),
    )


@pytest.mark.parametrize(
    "told",
    [
        {"heldout": False},
        {},
        {"labels": torch.randn(30, 3)},  # what is predicted are numbers
        {"labels": torch.full((30,), -100)},
        {"labels": torch.arange(30)},  # more than there are outputs
    ],
    ids=["calibration", "unlabelled", "numbers", "none", "too many"],
)
def test_the_largest_output_is_no_predicted_class_where_no_labels_fit(told: dict[str, object]) -> None:
    outputs, sentences, page = shown(result(**told))  # type: ignore[arg-type]
    assert "same largest entry for " in outputs and "class" not in outputs and "accuracy" not in outputs
    assert "the predicted class, where these are scores of classes" in sentences
    assert "Same largest entry" in page and "Same predicted class" not in page
    assert ("no labels say whether these are scores of classes" in sentences) == told.get("heldout", True)


def test_it_is_a_predicted_class_where_labels_fit() -> None:
    outputs, sentences, page = shown(result(labels=torch.arange(30) % 3))
    assert outputs.startswith("outputs:  accuracy ") and "same predicted class for " in outputs
    assert "no labels say" not in sentences and "Same predicted class" in page


def test_shares_are_not_rounded_to_what_they_are_not() -> None:
    told = result(heldout=False)
    network = replace(told.certificate.network, agreement=1 - 1e-6, achieved=1e-5, reference_norm=1.0)
    whole = replace(told.report.model, parameters=100_000, zeros=99_999)
    text = str(replace(told, certificate=replace(told.certificate, network=network), report=replace(told.report, model=whole)))
    assert "same largest entry for 99.99% of" in text and "moved by 1.0e-03% of" in text
    assert line(text, "zeros").startswith("zeros:    99.9% of the model's 100,000 parameters")


def test_nothing_is_left_out_of_a_model_of_weights_alone() -> None:
    assert line(str(result(bias=False)), "left out") == "left out: nothing"
    assert line(str(result()), "left out") == "left out: nothing but 11 parameters of biases, norms and other vectors"
