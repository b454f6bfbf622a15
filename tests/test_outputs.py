"""Outputs in whatever nesting: every tensor is found, and no change of one goes unseen."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import nettrim
from nettrim.outputs import Outputs, changed_integers, disagreement, largest_difference, outputs_of, pairs, squares
from nettrim.render import certificate_words
from nettrim.status import InvalidInput
from nettrim.verification import _OutputTally

EPS = torch.finfo(torch.float64).eps
Named = namedtuple("Named", ["scores", "boxes"])


@dataclass
class Record:
    scores: Any
    rest: Any = None


class Mapped(OrderedDict[str, Any]):
    """A mapping whose fields are attributes too, as the outputs of language models are."""


@dataclass
class Both(Mapped):
    logits: Any = None
    hidden: Any = field(default=None)

    def __post_init__(self) -> None:
        self["logits"] = self.logits


class Cache:
    def __init__(self, tensor: Tensor) -> None:
        self.layers = [SimpleNamespace(keys=tensor)]
        self.owner = self  # goes round


class Slotted:
    __slots__ = ("inner",)

    def __init__(self, inner: object) -> None:
        self.inner = inner


def test_paths() -> None:
    x = torch.ones(2, 3)
    output = {"logits": x, "aux": [(x, {"deep key": x, 3: x})], "named": Named(x, None), "record": Record(x, [x])}
    assert list(outputs_of(output).tensors) == [
        "logits",
        "aux[0][0]",
        "aux[0][1]['deep key']",
        "aux[0][1][3]",
        "named.scores",
        "record.scores",
        "record.rest[0]",
    ]
    assert list(outputs_of(x).tensors) == [""]
    assert list(outputs_of((x, [SimpleNamespace(a=x)])).tensors) == ["[0]", "[1][0].a"]
    assert list(outputs_of(Both(x, x)).tensors) == ["logits", "hidden"]
    found = outputs_of((x, x > 0, None, 3, "word", 1 + 2j))
    assert list(found.scores) == ["[0]"] and list(found.integers) == ["[1]"]
    assert list(found.plain) == ["[2]", "[3]", "[4]", "[5]"] and not found.others
    assert list(outputs_of([x.to(torch.complex64), x.half()]).scores) == ["[0]", "[1]"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_other_forms_of_tensors() -> None:
    x = torch.eye(3)
    (sparse,) = outputs_of([x.to_sparse()]).tensors.values()
    assert torch.equal(sparse, x)
    assert list(outputs_of({"n": torch.nested.as_nested_tensor([x, x[:2]])}).tensors) == ["n[0]", "n[1]"]
    assert torch.equal(outputs_of((x, np.ones(3))).tensors["[1]"], torch.ones(3, dtype=torch.float64))
    assert outputs_of((x, torch.empty(2, device="meta"))).others == {"[1]": "meta tensor"}


@pytest.mark.parametrize(
    "held", [Cache(torch.ones(1)), Slotted(torch.ones(1)), {torch.ones(1)}, nn.Linear(2, 2), Slotted([Cache(torch.ones(1))])]
)
def test_objects_with_tensors_are_named(held: object) -> None:
    found = outputs_of({"logits": torch.ones(2), "past": [held]})
    assert found.not_compared == (f"past[0] ({type(held).__name__})",)
    assert found.notes == [f"not compared: past[0] ({type(held).__name__})"]


@pytest.mark.parametrize("held", [Slotted(3), print, Slotted, range(3), {1, 2}, torch.float32])
def test_objects_without_tensors_are_not(held: object) -> None:
    assert outputs_of((torch.ones(2), held)).others == {}


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (torch.ones(2) > 0, "itself (bool tensor)"),
        (3.0, "itself (float)"),
        ([1, {"a": None}], "[0] (int), [1].a (NoneType)"),
        ({}, "an empty dict"),
        ({"past": Cache(torch.ones(1))}, "past (Cache)"),
        (list(range(9)), "and 3 more"),
    ],
)
def test_without_scores_it_is_refused_with_what_was_found(output: object, words: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        outputs_of(output)
    assert "no floating-point tensor" in str(caught.value) and words in str(caught.value)


def test_what_goes_round_ends() -> None:
    loop: list[Any] = [torch.ones(2)]
    loop.append(loop)
    assert outputs_of(loop).others


# --- comparisons --------------------------------------------------------------------------------------------------------------------


def leaves() -> st.SearchStrategy[Any]:
    """Makers of tensors, so that each place of a nesting holds one of its own."""
    kinds = [torch.float64, torch.float32, torch.int64, torch.bool, torch.complex128]
    shapes = st.lists(st.integers(1, 3), max_size=3)
    return st.builds(lambda kind, shape: (kind, tuple(shape)), st.sampled_from(kinds), shapes)


NESTINGS = st.recursive(
    leaves(),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3),
        st.tuples(inner, inner).map(lambda parts: ("tuple", parts)),
        st.tuples(inner, inner).map(lambda parts: ("named", parts)),
        st.tuples(inner, inner).map(lambda parts: ("record", parts)),
        st.dictionaries(st.sampled_from(["a", "b c", "0", "."]), inner, min_size=1, max_size=3),
    ),
    max_leaves=8,
)


def built(plan: Any, made: list[Tensor]) -> Any:
    """A nesting of fresh tensors, which are listed in ``made``."""
    if isinstance(plan, dict):
        return {key: built(part, made) for key, part in plan.items()}
    if isinstance(plan, list):
        return [built(part, made) for part in plan]
    kind, parts = plan
    if isinstance(kind, torch.dtype):
        made.append((torch.arange(1.0, 1 + math.prod(parts)).reshape(parts) / 7).to(kind))
        return made[-1]
    own = [built(part, made) for part in parts]
    return tuple(own) if kind == "tuple" else Named(*own) if kind == "named" else Record(*own)


@settings(max_examples=150, deadline=None)
@given(NESTINGS, st.integers(0, 7))
def test_a_change_of_any_tensor_is_seen(plan: Any, which: int) -> None:
    before: list[Tensor] = []
    first = (torch.ones(2), built(plan, before))
    after: list[Tensor] = []
    second = (torch.ones(2), built(plan, after))
    assert disagreement(first, second, EPS) == "" and largest_difference(outputs_of(first), outputs_of(second)) == 0
    changed = after[which % len(after)].view(-1)
    changed[-1] = ~changed[-1] if changed.dtype == torch.bool else changed[-1] + 1
    assert disagreement(first, second, EPS)
    one, two = outputs_of(first), outputs_of(second)
    assert largest_difference(one, two) > 0
    tally = _OutputTally()
    tally.add(first, second)
    assert tally.moved > 0 or (tally.integer_changes == 1 and len(tally.changed) == 1)
    assert (tally.moved > 0) == (changed.is_floating_point() or changed.is_complex())
    assert sum(changed_integers(one, two).values()) == tally.integer_changes


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ((torch.ones(2), [torch.ones(3)]), (torch.ones(2), [torch.ones(4)]), "'[1][0]' has the shapes (3,) and (4,)"),
        ({"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(1)}, "only one has the tensor output 'b'"),
        ((torch.ones(2), 1), (torch.ones(2), None), ""),
        ((torch.ones(2), torch.ones(2)), (torch.ones(2), torch.ones(2, dtype=torch.int64)), "torch.int64"),
        ((torch.ones(2), Cache(torch.ones(1))), (torch.ones(2), Slotted(torch.ones(1))), "other classes"),
    ],
)
def test_other_forms(first: Any, second: Any, words: str) -> None:
    assert disagreement(first, second, EPS)
    if words:
        assert words in disagreement(first, second, EPS)
        assert largest_difference(outputs_of(first), outputs_of(second)) == math.inf
        with pytest.raises(InvalidInput, match="another form"):
            pairs(outputs_of(first), outputs_of(second))


def test_rounding_is_allowed_and_coarse_arithmetic_does_not_allow_everything() -> None:
    y = torch.linspace(-1, 1, 50, dtype=torch.float64)
    for precision, within, beyond in ((EPS, 1e-13, 1e-11), (torch.finfo(torch.float32).eps, 1e-4, 1e-2), (0.0078, 0.1, 0.5)):
        assert not disagreement(y, y + within, precision) and disagreement(y, y + beyond, precision)
    special = torch.tensor([1.0, math.nan, math.inf, -math.inf])
    assert not disagreement(special, special.clone(), EPS)
    assert disagreement(special, torch.tensor([1.0, math.nan, math.inf, math.inf]), EPS)
    assert disagreement((y, 0.5), (y, 0.6), EPS) == "output '[1]' is 0.5 and 0.6"


def test_the_largest_difference_counts_only_where_one_is_not_finite() -> None:
    same = Outputs({"": torch.tensor([1.0, math.nan, math.inf])})
    assert largest_difference(same, same) == 0
    assert largest_difference(same, Outputs({"": torch.tensor([math.nan, math.nan, math.inf])})) == math.inf
    assert largest_difference(Outputs({"": torch.tensor([2.0, 4.0])}), Outputs({"": torch.tensor([2.0, 3.0])})) == 0.25
    integers = [Outputs({"": torch.ones(1), "i": torch.tensor([value])}) for value in (1, 2)]
    assert largest_difference(*integers) == math.inf and largest_difference(*integers, exact=False) == 0


def test_squares_by_hand_over_more_than_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nettrim.outputs.CHUNK", 7)
    y, x = torch.randn(5, 6), torch.randn(5, 6)
    z, w = torch.randn(4, dtype=torch.complex128), torch.randn(4, dtype=torch.complex128)
    moved, size = squares(outputs_of((y, [z], y > 0)), outputs_of((x, [w], y > 0)))
    assert moved == pytest.approx(float((x.double() - y.double()).square().sum() + (w - z).abs().square().sum()))
    assert size == pytest.approx(float(y.double().square().sum() + z.abs().square().sum()))


# --- everywhere ---------------------------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """Two heads behind one convolution; ``form`` says how their outputs nest."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1, bias=False)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        y = torch.relu(self.a(x))
        b, c = self.b(y), self.c(y)
        if self.form == "integer":
            return b, c.argmax(1)
        if self.form == "cache":
            return {"b": b, "c": c, "cache": Cache(c)}
        return {
            "flat": (b, c),
            "nested": (b, [c]),
            "lists": ([b], [c]),
            "dicts": [{"b": b, "c": {"deep": c}}],
            "record": Record(b, Record(c)),
            "named": Named(b, (c,)),
        }[self.form]


FORMS = ("flat", "nested", "lists", "dicts", "record", "named")


@pytest.mark.parametrize("form", FORMS)
def test_the_certificate_speaks_of_every_output(form: str) -> None:
    torch.manual_seed(0)
    model, x = Heads(form).eval(), torch.randn(4, 3, 8, 8)
    result = nettrim.prune(model, [x], nettrim.Magnitude(sparsity=0.8), layers=["c"], progress=False)
    with torch.no_grad():
        before, after = (outputs_of(net.double()(x.double())) for net in (copy.deepcopy(model), copy.deepcopy(result.model)))
    moved, size = squares(before, after)
    network = result.certificate.network
    assert moved > 0 and network.achieved == pytest.approx(math.sqrt(moved)) and network.reference_norm == pytest.approx(math.sqrt(size))
    assert network.agreement is not None and network.agreement < 1
    assert network.rows == 2 * 4 * 6 * 6 and network.classes.count("dimension 1 of ") == 2


def test_integer_outputs_are_counted_and_do_not_enter_the_norm() -> None:
    torch.manual_seed(0)
    model, x = Heads("integer").eval(), torch.randn(4, 3, 8, 8)
    result = nettrim.prune(model, [x], nettrim.Magnitude(sparsity=0.8), layers=["c"], progress=False)
    with torch.no_grad():
        differ = int((model.double()(x.double())[1] != result.model.double()(x.double())[1]).sum())
    network = result.certificate.network
    assert differ > 0 and network.integer_changes == differ and network.changed == ("[1]",) and network.achieved == 0


def test_what_is_not_compared_is_named_in_certificate_and_report() -> None:
    model, x = Heads("cache").eval(), torch.randn(4, 3, 8, 8)
    result = nettrim.prune(model, [x], nettrim.Magnitude(sparsity=0.8), layers=["c"], progress=False)
    assert result.certificate.network.not_compared == ("cache (Cache)",)
    assert "not compared: cache (Cache)" in result.report.notes
    assert "Not compared, so nothing here speaks of it: cache (Cache)." in certificate_words(result.certificate)
    assert nettrim.certificate.Certificate.from_dict(result.certificate.to_dict()) == result.certificate


@pytest.mark.parametrize("form", FORMS)
def test_deployment_compares_every_output(form: str) -> None:
    torch.manual_seed(0)
    model, x = Heads(form).eval(), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        model.a.weight[2], model.a.bias[2] = 0, 0.5
    made = nettrim.accelerate(model, x, budget=0.01)
    with torch.no_grad():
        assert largest_difference(outputs_of(model(x)), outputs_of(made.model(x))) <= 1e-5


def test_a_trained_network_may_decide_otherwise_than_the_pruned_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Heads("integer").eval(), torch.randn(4, 3, 8, 8)
    pruned = nettrim.prune(model, [x], nettrim.Magnitude(sparsity=0.8), layers=["c"], progress=False).model
    measured = nettrim.bench(pruned, x, reference=model, batch_sizes=(4,), seconds=0.01)
    forms = {form.name: form for form in measured.forms}
    assert forms["dense"].timings and forms["pruned"].timings
    made = nettrim.export(pruned, x, tmp_path / "net.pt2")
    assert made.difference is not None and made.difference <= 1e-5


def test_a_model_without_determinism_in_a_nested_output_is_refused() -> None:
    class Noisy(Heads):
        def forward(self, x: Tensor) -> Any:
            found = super().forward(x)
            return found[0], [found[1], {"noise": torch.rand(3)}]

    with pytest.raises(InvalidInput, match=r"two different outputs.*noise.*randomness"):
        nettrim.prune(Noisy("flat"), [torch.randn(2, 3, 8, 8)], nettrim.Magnitude(sparsity=0.5), progress=False)


def test_nan_in_a_nested_output_is_refused_by_name() -> None:
    class Broken(Heads):
        def forward(self, x: Tensor) -> Any:
            found = super().forward(x)
            return found[0], [{"gone": found[1] * math.nan}]

    with pytest.raises(InvalidInput, match=r"NaN or inf on batch 1 in '\[1\]\[0\]\.gone'"):
        nettrim.prune(Broken("flat"), [torch.randn(2, 3, 8, 8)], nettrim.Magnitude(sparsity=0.5), progress=False)
