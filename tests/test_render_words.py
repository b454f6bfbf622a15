"""The certificate in sentences: what they must say, and what they must not claim."""

from __future__ import annotations

from dataclasses import replace

import pytest
from render_examples import SHAPES, broken_certificate, make_certificate, make_certified, make_heldout

from nettrim.render import certificate_words


def test_words_of_the_cascade() -> None:
    words = certificate_words(make_certificate())
    assert words[0] == (
        "Verdict: holds. The numbers recompute from the stored weights, and what was asked for is met. Arithmetic: float64."
    )
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
    assert "below (1 - gap) times that of the stored weights, by duality" in text
    assert 'the largest gap of 3 layers is 0.123% (layer "fc1", tolerance 10.00)' in text
    assert "penalty" not in text
    assert "before their activation" not in text
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
    assert "No layer has a tolerance" in text
    assert "nothing was asked for that could be missed" in text
    assert "no bound of its discrepancy from the reference output is proven (the output is not a layer); achieved is 8.500" in text
    assert "Optimality" not in text
    assert "same class" not in text
    assert "stated in other ways" not in text


def test_words_say_first_what_does_not_hold() -> None:
    words = certificate_words(broken_certificate())
    assert words[0].startswith("Verdict: not met. The numbers recompute from the stored weights, but what was asked for is NOT met.")
    assert words[1] == "Layer 'fc2': its distance 12.5 is above its tolerance 10 (2.500% of its output's norm, 2.000% asked for)."
    assert "Of 3 layers with a tolerance, 2 meet it" in "\n".join(words)
    certificate = make_certificate()
    broken = replace(
        certificate,
        layers=(
            make_certified("fc1", discrepancy=11.0, bound=9.9, sound=False),
            make_certified("fc2", sound=False),
            make_certified("fc3", met=False, tolerance=None, budget=4_000),
            make_certified("fc4", met=False, tolerance=None, pattern="2:4"),
        ),
        network=replace(certificate.network, achieved=12.0, sound=False),
    )
    words = certificate_words(broken)
    assert words[0].startswith("Verdict: wrong. A stated bound is exceeded")
    assert "its discrepancy 11 is above its stated bound 9.9" in words[1]
    assert "could not be confirmed" in words[2]
    assert words[3] == "Layer 'fc3': 4,800 of 19,200 weights are left, where at most 4,000 were asked for."
    assert words[4] == "Layer 'fc4': its weights do not keep to the pattern '2:4'."
    assert words[5] == "Network output: its discrepancy 12 is above its stated bound 9.9: one of them is wrong."
    assert not broken.holds and broken.verdict.value == "wrong" and "wrong" in str(broken)


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


def test_words_about_gaps_of_penalised_programs_and_of_no_program() -> None:
    layers = (
        make_certified("fc1", tolerance=None, gap=0.004, gap_kind="penalty", gap_level=0.25),
        make_certified("fc2", tolerance=None, gap=0.0100001, gap_kind="penalty", gap_level=0.5),
        make_certified("fc3", tolerance=None, gap=0.5, gap_kind=""),
    )
    text = "\n".join(certificate_words(make_certificate(layers=layers)))
    assert "half the squared distance plus the penalty times the l1 norm" in text
    assert 'the largest gap of 2 layers is 1.01% (layer "fc2", penalty 0.5000)' in text
    assert "stated tolerance: all but" not in text
    assert "50.0%" not in text


@pytest.mark.parametrize("activation", ["gelu", "unknown", "mixed", "leaky_relu(2.0)", "some name from elsewhere"])
def test_words_say_which_layers_are_matched_before_their_activation(activation: str) -> None:
    layers = (make_certified("fc1"), make_certified("fc2", activation=activation), make_certified("fc3", activation="leaky_relu(0.1)"))
    (sentence,) = (words for words in certificate_words(make_certificate(layers=layers)) if "before their activation" in words)
    assert f'not known: "fc2" ({activation}). ' in sentence


def test_words_say_who_stated_an_activation_and_what_overlaps() -> None:
    certificate = make_certificate()
    first, second, *others = certificate.layers
    certificate = replace(
        certificate,
        layers=(replace(first, source="stated"), replace(second, source="stated against the graph"), *others),
        heldout=replace(make_heldout(), overlap=3),
    )
    text = "\n".join(certificate_words(certificate))
    assert 'stated by the user, where the model\'s graph shows none: "fc1" (relu)' in text
    assert 'no bound of the network passes through their layers: "fc2" (relu)' in text
    assert "3 held-out samples also occurred in the calibration data" in text
    plain = "\n".join(certificate_words(make_certificate()))
    assert "stated by the user" not in plain and "also occurred" not in plain
