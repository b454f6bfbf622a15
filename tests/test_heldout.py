"""Held-out statements: one event a sample, whatever the layout of the outputs; against a twin that runs every sample by itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor, nn

from nettrim.assignment import Layout, layouts_of
from nettrim.calibration import Calibration
from nettrim.capture import Replica
from nettrim.certificate import HeldOutCertificate, clopper_pearson_upper
from nettrim.heldout import certify_heldout, check_heldout, contradictions
from nettrim.render.words import _heldout_words as words_of
from nettrim.status import InvalidInput

CPU = torch.device("cpu")
Shape = Callable[[Tensor], Any]


class Net(nn.Module):
    """Two layers over the last dimension; ``shape`` makes an output of the scores (B, ..., 3) and the hidden values (B, ..., 8)."""

    def __init__(self, shape: Callable[[Tensor, Tensor], Any] = lambda y, h: y) -> None:
        super().__init__()
        self.a, self.b, self.shape = nn.Linear(4, 8), nn.Linear(8, 3), shape

    def forward(self, x: Tensor, **more: Any) -> Any:
        h = torch.relu(self.a(x))
        return self.shape(self.b(h), h)


def networks(shape: Callable[[Tensor, Tensor], Any], moved: float = 0.1) -> tuple[Net, Net]:
    torch.manual_seed(1)
    model = Net(shape).double().eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += moved * torch.randn_like(parameter)
    return model, other


def inputs(count: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def state(shape: Callable[[Tensor, Tensor], Any], batches: Any, **keywords: Any) -> HeldOutCertificate:
    model, other = networks(shape, keywords.pop("moved", 0.1))
    calibration = Calibration([inputs(3, seed=9)])
    replicas = (Replica(net, CPU, torch.float64) for net in (model, other))
    return certify_heldout(*replicas, Calibration(batches, "heldout"), calibration, level=0.2, **keywords)


def twin(shape: Callable[[Tensor, Tensor], Any], x: Tensor) -> tuple[int, int]:
    """Samples in which a class changes, and in which the discrepancy exceeds 0.2: every sample by itself, scores (..., 3) last."""
    model, other = networks(lambda y, h: y)
    changes = exceed = 0
    with torch.no_grad():
        for one in x:
            y, z = model(one[None]), other(one[None])
            changes += bool((y.argmax(-1) != z.argmax(-1)).any())
            exceed += bool((z - y).norm() / y.norm() > 0.2)
    return changes, exceed


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Any], str]] = {
    "flat": ((), lambda y, h: y, "the last dimension of the output"),
    "sequence": ((5,), lambda y, h: y, "the last dimension of the output"),
    "flattened": ((5,), lambda y, h: y.reshape(-1, 3), "the last dimension of the output"),
    "time first": ((5,), lambda y, h: y.transpose(0, 1), "the last dimension of the output"),
    "time first, flattened": ((5,), lambda y, h: y.transpose(0, 1).reshape(-1, 3), "the last dimension of the output"),
    "dense": ((4, 5), lambda y, h: y.movedim(-1, 1), "dimension 1 of the output"),
    "dense, frames flattened": ((2, 4, 5), lambda y, h: y.movedim(-1, 2).flatten(0, 1), "dimension 1 of the output"),
    "in a mapping": ((5,), lambda y, h: {"out": [y]}, "the last dimension of out[0]"),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("sizes", [[20], [7, 12, 1], [1] * 20])
def test_events_are_those_of_samples(name: str, sizes: list[int]) -> None:
    extra, shape, classes = LAYOUTS[name]
    x = inputs(20, *extra)
    found = state(shape, list(x.split(sizes)))
    changes, exceed = twin(shape, x)
    assert changes > 0 and exceed > 0
    assert (found.samples, found.unit, found.counted, found.reason, found.note) == (20, "sample", 20, "", "")
    assert (found.class_changes, found.exceed) == (changes, exceed)
    assert found.class_change_bound == clopper_pearson_upper(changes, 20, 0.95)
    assert found.exceed_bound == clopper_pearson_upper(exceed, 20, 0.95)
    assert found.predictions == 20 * math.prod(extra) and found.classes == classes and found.left_out == ()
    assert contradictions(found) == []
    assert "with confidence 95.0%" in words_of_statement(found)


def words_of_statement(statement: HeldOutCertificate) -> str:
    from render_examples import make_certificate

    return "\n".join(words_of(make_certificate(heldout=statement)))


MIXED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "normalised over the batch": lambda y, h: (y - y.mean(0)) / y.std(0),
    "summed along the batch": lambda y, h: y.cumsum(0),
    "the neighbour's": lambda y, h: y + 0.1 * y.roll(1, 0),
    "attention over the batch": lambda y, h: (y @ y.T).softmax(-1) @ y,
    "of one form at all sizes": lambda y, h: y.sum(0, keepdim=True).expand(6, -1),
    "sorted": lambda y, h: y.sort(0).values,
}


@pytest.mark.parametrize("name", MIXED)
def test_no_bound_where_samples_depend_on_one_another(name: str) -> None:
    found = state(MIXED[name], list(inputs(20).split(10)))
    assert found.unit == "row" and "samples depend on one another" in found.reason
    assert found.class_change_bound is None and found.exceed_bound is None and found.class_changes is not None
    assert found.counted == (12 if name == "of one form at all sizes" else 20) and found.samples == 20
    assert contradictions(found) == []
    assert "NO bound is stated" in words_of_statement(found) and "with probability at most" not in words_of_statement(found)


def test_rows_that_cannot_be_assigned() -> None:
    def shuffled(y: Tensor, h: Tensor) -> Tensor:
        rows = y.reshape(-1, 3)
        return rows[rows[:, 0].argsort()]  # by value: rows of all samples mingle

    found = state(shuffled, [inputs(10, 5)])
    assert (found.unit, found.counted, found.exceed_bound) == ("row", 50, None)
    fixed = state(lambda y, h: y if len(y) == 10 else y[:, :0].sum(5), [inputs(10)])
    assert fixed.unit == "row" and "does not run on a part of a batch" in fixed.reason
    whole = state(lambda y, h: y.square().mean(), [inputs(10), inputs(10, seed=2)])
    assert (whole.unit, whole.counted, whole.class_changes) == ("batch", 2, None) and contradictions(whole) == []
    assert "2 held-out batches" in words_of_statement(whole)


def test_inputs_without_one_number_of_samples() -> None:
    found = state(lambda y, h: y, [{"x": inputs(6), "more": torch.zeros(5, 5)}])
    assert found.unit == "row" and "different first dimensions" in found.reason and found.exceed_bound is None
    found = state(lambda y, h: y, [{"x": inputs(6), "more": torch.zeros(1, 5)}])
    assert (found.unit, found.samples) == ("sample", 6)


def test_what_belongs_to_no_sample_is_left_out_by_name() -> None:
    x = inputs(20)
    found = state(lambda y, h: {"loss": y.square().mean(), "y": y, "alike": y @ y.T, "table": torch.ones(7, 2).to(y)}, [x])
    alone = state(lambda y, h: y, [x])
    assert (found.class_changes, found.exceed) == (alone.class_changes, alone.exceed)
    assert [name.split(" ")[0] for name in found.left_out] == ["loss", "alike", "table"]
    assert "loss (one number for a whole batch)" in words_of_statement(found)


def test_a_batch_of_one_sample_is_said_to_show_nothing() -> None:
    batches = [inputs(1, length) for length in (3, 4, 5)]
    found = state(lambda y, h: y, batches)
    assert (found.unit, found.samples) == ("sample", 3) and "each ran by itself" in found.note
    assert found.note in words_of_statement(found)
    assert state(lambda y, h: y, [*batches, inputs(1, 3, seed=5)]).note == ""


def test_samples_with_several_outputs_have_one_event() -> None:
    x = inputs(20, 5)
    found = state(lambda y, h: (y, [h, h > 0.5]), [x])
    model, other = networks(lambda y, h: (y, [h, h > 0.5]))
    changes = exceed = flips = 0
    with torch.no_grad():
        for one in x:
            (y, (h, m)), (z, (g, n)) = model(one[None]), other(one[None])
            flipped = bool((m != n).any())
            flips += flipped
            changes += flipped or bool((y.argmax(-1) != z.argmax(-1)).any()) or bool((h.argmax(-1) != g.argmax(-1)).any())
            exceed += bool(math.hypot((z - y).norm(), (g - h).norm()) / math.hypot(y.norm(), h.norm()) > 0.2)
    assert (found.class_changes, found.exceed, found.integer_changes) == (changes, exceed, flips)
    assert flips > 0 and found.predictions == 200
    assert "an entry of an integer output of a sample changes" in words_of_statement(found)


def test_a_single_channel_has_no_classes() -> None:
    for shape in (lambda y, h: y[:, :1], lambda y, h: y[:, 0], lambda y, h: y[:, :1, None, None].expand(-1, 1, 3, 3)):
        found = state(shape, [inputs(20)])
        assert found.class_changes is None and found.class_change_bound is None and "two or more classes" in found.classes_reason
        assert found.exceed_bound is not None and found.classes == ""


def test_coarse_arithmetic_does_not_assign_rows_to_other_samples() -> None:
    torch.manual_seed(0)
    for shape, layout in ((lambda y, h: y.reshape(-1, 3), Layout(0)), (lambda y, h: y.transpose(0, 1).reshape(-1, 3), Layout(0, True))):
        net = Replica(Net(shape).bfloat16().eval(), CPU, None)
        found = layouts_of(net, torch.randn(6, 4, 4).bfloat16())[""]
        assert min(found, key=lambda one: found[one]) == layout


# --- accuracy -----------------------------------------------------------------------------------------------------------------------


def truth(y: Tensor, wrong: int = 3) -> Tensor:
    """Labels: the classes of largest score, but for every ``wrong``-th."""
    found = y.argmax(-1)
    flat = found.view(-1)
    flat[::wrong] = (flat[::wrong] + 1) % 3
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_accuracy_counts_labelled_entries(name: str) -> None:
    extra, shape, _ = LAYOUTS[name]
    x = inputs(20, *extra)
    model, other = networks(lambda y, h: y)
    with torch.no_grad():
        y, z = model(x), other(x)
    labels = truth(y)
    ignored = labels.clone()
    ignored.view(-1)[1::4] = -100
    for given in (labels, ignored):
        if name == "dense, frames flattened":
            batches = [(x[i : i + 10], given[i : i + 10].flatten(0, 1)) for i in (0, 10)]
        else:
            batches = [(x[i : i + 10], given[i : i + 10]) for i in (0, 10)]
        found = state(shape, batches)
        kept = given >= 0
        assert found.labelled == int(kept.sum())
        assert found.accuracy_before == pytest.approx(float((y.argmax(-1) == given)[kept].double().mean()))
        assert found.accuracy_after == pytest.approx(float((z.argmax(-1) == given)[kept].double().mean()))
        assert found.accuracy_reason == "" and contradictions(found) == []


def test_labels_say_which_output_and_which_dimension() -> None:
    x = inputs(20, 3)  # (B, 3, 3) scores: labels (B, 3) fit along either; the last is taken
    model, _ = networks(lambda y, h: y)
    with torch.no_grad():
        labels = truth(model(x))
    found = state(lambda y, h: {"hidden": h[..., :2], "y": y, "auxiliary": 2 * y}, [(x, labels)])
    assert found.classes == "the last dimension of y; the output that the labels fit" and found.predictions == 60
    several = state(lambda y, h: {"hidden": h, "y": y}, [(x, labels)])
    assert several.accuracy_before is None and "fit several outputs" in several.accuracy_reason and several.predictions == 120
    channels = state(lambda y, h: y.transpose(1, 2), [(inputs(20, 5), torch.zeros(20, 5, dtype=torch.long))])
    assert channels.classes == "dimension 1 of the output" and channels.labelled == 100


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (torch.zeros(20, 3, dtype=torch.long), "of shape (20, 3), fit no output"),
        (torch.full((20,), 3), "fit no output"),
        (torch.zeros(20), "no integer labels"),
        (torch.full((20,), -100), "no label is 0 or above"),
        (torch.zeros(20, 1, 1, dtype=torch.long), "of shape (20, 1, 1), fit no output"),
    ],
)
def test_no_accuracy_where_labels_do_not_fit(labels: Tensor, reason: str) -> None:
    found = state(lambda y, h: y, [(inputs(20), labels)])
    assert found.accuracy_before is None and found.accuracy_after is None and found.labelled is None
    assert reason in found.accuracy_reason and found.class_change_bound is not None


def test_labels_of_some_batches_give_no_accuracy() -> None:
    found = state(lambda y, h: y, [(inputs(9), torch.zeros(9, dtype=torch.long)), inputs(11, seed=2)])
    assert found.accuracy_before is None and found.accuracy_reason == "batch 2 carries no integer labels"


# --- what cannot be -----------------------------------------------------------------------------------------------------------------


def good() -> HeldOutCertificate:
    x = inputs(20, 5)
    return state(lambda y, h: (y, h > 0.5), [(x, torch.zeros(20, 5, dtype=torch.long))])


@pytest.mark.parametrize(
    "change",
    [
        {"level": -1.0},
        {"confidence": 0.0},
        {"confidence": 1.0},
        {"accuracy_after": 1.5},
        {"accuracy_before": -0.1},
        {"accuracy_before": 0.123},
        {"accuracy_before": None},
        {"exceed": 21},
        {"exceed": -1},
        {"class_changes": 21},
        {"class_changes": None},
        {"class_change_bound": None},
        {"exceed_bound": None},
        {"exceed_bound": 0.01},
        {"class_change_bound": 0.01},
        {"overlap": 21},
        {"overlap": -1},
        {"samples": 0},
        {"samples": 10**6},
        {"unit": "token"},
        {"unit": "row"},
        {"units": 640},
        {"predictions": 0},
        {"predictions": 3},
        {"predictions_changed": -1},
        {"integer_changes": 10**6},
        {"labelled": 0},
        {"labelled": 99},
    ],
    ids=str,
)
def test_contradictions_are_found_without_data(change: dict[str, Any]) -> None:
    statement = good()
    assert contradictions(statement) == []
    assert contradictions(replace(statement, **change))


def test_a_statement_in_its_shortest_form_is_complete() -> None:
    shortest = {field.name: getattr(good(), field.name) for field in fields(HeldOutCertificate)[:10]}
    assert contradictions(HeldOutCertificate(**shortest)) == []


@pytest.mark.parametrize("forward", ["wrong shape", "an error of its own"])
def test_every_batch_is_run_before_any_work(forward: str) -> None:
    model, _ = networks(lambda y, h: y if forward == "wrong shape" or len(y) != 2 else {}["missing"])
    batches = [inputs(3), inputs(2) if forward != "wrong shape" else inputs(2)[:, :3]]
    with pytest.raises(InvalidInput, match="heldout: the model cannot run on batch 2"):
        check_heldout(Replica(model, CPU, torch.float64), Calibration(batches, "heldout"), Calibration([inputs(3, seed=9)]))


def test_settings_are_refused() -> None:
    for keywords in ({"confidence": 0.0}, {"confidence": float("nan")}):
        with pytest.raises(InvalidInput):
            state(lambda y, h: y, [inputs(5)], **keywords)


# --- coverage -----------------------------------------------------------------------------------------------------------------------

COVERED = ("flat", "sequence", "flattened", "dense")


def coverage(name: str, repetitions: int, samples: int = 20) -> tuple[int, int]:
    """How often the two bounds hold, of samples drawn from a finite population whose rates are known exactly."""
    extra, shape, _ = LAYOUTS[name]
    generator = torch.Generator().manual_seed(5)
    population = torch.randn(300, *(1 for _ in extra), 4, generator=generator, dtype=torch.float64)
    population = population + 0.3 * torch.randn(300, *extra, 4, generator=generator, dtype=torch.float64)  # rows of one sample are alike
    model, other = networks(shape, 0.05)
    rate_of_changes, rate_exceeding = (count / len(population) for count in known(shape, population))
    assert 0.02 < rate_of_changes < 0.9 and 0.02 < rate_exceeding < 0.9
    replicas = [Replica(net, CPU, torch.float64) for net in (model, other)]
    draws, calibration = np.random.default_rng(0), Calibration([inputs(3, seed=9)])
    kept = [0, 0]
    for _ in range(repetitions):
        drawn = population[torch.from_numpy(draws.integers(0, len(population), samples))]
        found = certify_heldout(*replicas, Calibration([drawn], "heldout"), calibration, level=0.5)
        assert found.samples == samples and found.class_change_bound is not None and found.exceed_bound is not None
        kept[0] += rate_of_changes <= found.class_change_bound
        kept[1] += rate_exceeding <= found.exceed_bound
    return kept[0], kept[1]


def known(shape: Callable[[Tensor, Tensor], Any], population: Tensor) -> tuple[int, int]:
    """The numbers of samples of the population with either event, each sample by itself."""
    model, other = networks(lambda y, h: y, 0.05)
    with torch.no_grad():
        y, z = (net(population).flatten(1, -2) if population.ndim > 2 else net(population)[:, None] for net in (model, other))
    exceeding = (z - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1) > 0.5
    return int((y.argmax(-1) != z.argmax(-1)).any(1).sum()), int(exceeding.sum())


def least(repetitions: int) -> int:
    """What a statement that holds with probability 0.95 reaches in all but one of a million runs of the test."""
    return int(binom.ppf(1e-6, repetitions, 0.95))


@pytest.mark.parametrize("name", COVERED)
def test_coverage_in_a_few_repetitions(name: str) -> None:
    assert min(coverage(name, 60)) >= least(60)


@pytest.mark.slow
@pytest.mark.parametrize("name", COVERED)
def test_coverage(name: str) -> None:
    kept = coverage(name, 1000)
    assert min(kept) >= least(1000)
    assert max(kept) < 1000  # the rates are such that a bound can fail
