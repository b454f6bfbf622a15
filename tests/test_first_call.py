"""The first call: ``prune`` with a number, and what is said to arguments that mean nothing where they stand."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import nettrim
from nettrim import InvalidInput, NetTrim, prune

CLASSES = [
    nettrim.NetTrim,
    nettrim.Magnitude,
    nettrim.Random,
    nettrim.Wanda,
    nettrim.OBS,
    nettrim.SparseGPT,
    nettrim.LinearADMM,
    nettrim.LOBS,
    nettrim.NetworkTrimming,
]


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 3)).eval()


def data() -> list[torch.Tensor]:
    return [torch.randn(40, 8, generator=torch.Generator().manual_seed(1))]


def refused(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(InvalidInput) as caught:
        prune(*args, progress=False, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize("target", [0.5, {"0": 0.5}, {"re:[02]": 0.25}], ids=str)
@pytest.mark.parametrize("kind", ["sparsity", "epsilon"])
def test_a_number_is_net_trim_with_its_defaults(kind: str, target: Any) -> None:
    short = prune(network(), data(), progress=False, **{kind: target})
    long = prune(network(), data(), NetTrim(**{kind: target}), progress=False)
    assert all(torch.equal(a, b) for a, b in zip(short.model.state_dict().values(), long.model.state_dict().values(), strict=True))
    assert short.report.settings == long.report.settings and short.report.method == long.report.method


def test_the_choice_is_explained_with_both_lines() -> None:
    text = refused(network(), data())
    lines = [line.split("#")[0].strip() for line in text.splitlines()[1:]]
    assert lines == ["nettrim.prune(model, data, sparsity=0.8)", "nettrim.prune(model, data, epsilon=0.05)"]
    for line in lines:  # ready to copy
        assert eval(line.replace(")", ", progress=False)"), {"nettrim": nettrim, "model": network(), "data": data()}).model


def test_results_say_in_a_session_what_they_say_in_print() -> None:
    public = [getattr(nettrim, name) for name in nettrim.__all__]
    results = [kind for kind in public if isinstance(kind, type) and "__str__" in vars(kind) and not issubclass(kind, Exception)]
    assert {nettrim.PruneResult, nettrim.Certificate, nettrim.Compacted, nettrim.Bench, nettrim.Exported} <= set(results)
    assert all(kind.__repr__ is kind.__str__ for kind in results)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"sparsity": 80}, "for 80 % write sparsity=0.8"),
        ({"sparsity": {"0": 12.5}}, "for 12.5 % write sparsity=0.125"),
        ({"epsilon": 5}, "for 5 % write epsilon=0.05"),
        ({"epsilon": {"re:.*": 2}}, "for 2 % write epsilon=0.02"),
        ({"epsilon": 1.0}, "must lie in [0, 1), found 1.0, which allows it to vanish"),
        ({"sparsity": 1}, "must lie in [0, 1), found 1"),
    ],
    ids=str,
)
def test_numbers_of_per_cent(target: Any, words: str) -> None:
    text = refused(network(), data(), **target)
    assert words in text and ("write" in text) == ("write" in words)


def test_two_targets_are_refused_and_the_one_to_leave_out_is_named() -> None:
    assert "leave out sparsity=0.5" in refused(network(), data(), sparsity=0.5, epsilon=0.1)
    assert "leave out epsilon=0.1" in refused(network(), data(), nettrim.Wanda(sparsity=0.5), epsilon=0.1)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((network(), data(), 0.8), "nettrim.prune(model, data, sparsity=0.8)"),
        ((network(), 0.8), "sparsity=0.8 or epsilon=0.8"),
        ((network(), NetTrim(sparsity=0.5), data()), "nettrim.prune(model, data, method)"),
        ((network(), NetTrim, data()), "nettrim.prune(model, data, method)"),
        ((data(), network(), NetTrim(sparsity=0.5)), "the second argument is the model"),
        ((network(), data(), NetTrim), "NetTrim(sparsity=0.8)"),
        ((network(), data(), "wanda"), "sparsity= or epsilon="),
    ],
    ids=range(7),
)
def test_arguments_in_the_wrong_place_are_answered_with_what_to_write(args: tuple[Any, ...], words: str) -> None:
    assert words in refused(*args)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_settings_are_given_by_name(kind: Any) -> None:
    names = list(inspect.signature(kind).parameters)
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in inspect.signature(kind).parameters.values())
    with pytest.raises(InvalidInput, match=r"settings are given by name") as caught:
        kind(0.8)
    readings = [name for name in ("sparsity", "epsilon", "error") if name in names]
    for name in readings:  # each of them works when it is written so
        assert f"{kind.__name__}({name}=0.8)" in str(caught.value)
        made = kind(**{name: 0.8})
        assert made == copy.deepcopy(made) == pickle.loads(pickle.dumps(made))
    with pytest.raises(InvalidInput, match=f"the nearest is '{names[0]}'"):
        kind(**{names[0][:-1]: 0.8})
    with pytest.raises(InvalidInput, match="by name"):
        kind(network(), data())


def test_a_pattern_by_position_is_told_from_a_number() -> None:
    with pytest.raises(InvalidInput, match=r"write Wanda\(pattern='2:4'\)"):
        nettrim.Wanda("2:4")  # type: ignore[call-arg, arg-type, misc]
