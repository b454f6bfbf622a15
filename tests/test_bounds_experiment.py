"""The experiment on bounds on a tiny set, its table and picture; the command line's question."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from nettrim import staging
from nettrim.bound_query import ask
from nettrim.cli import app
from nettrim.experiments import bounds_figures, bounds_observed
from nettrim.experiments.models import fully_connected
from nettrim.status import InvalidInput

TINY = {"dataset": "digits", "widths": (8, 16), "shares": (0.02, 0.5), "trials": 3, "samples": 40, "epochs": 1}


def small_network() -> nn.Module:
    return fully_connected((6, 12, 3), 0).eval()


def test_the_experiment_writes_what_it_found_and_continues(tmp_path: Path) -> None:
    said: list[str] = []
    first = bounds_observed.run(out=tmp_path, progress=lambda done, total, what: said.append(f"{done}/{total}"), **TINY)
    assert first.consistent and len(first.points) == 4 and said[-1] == "6/6"
    assert all((tmp_path / file).stat().st_size > 0 for file in first.files)
    assert json.loads((tmp_path / "bounds.json").read_text()) == staging.mark("experiment") | json.loads(json.dumps(first.to_dict()))
    for point in first.points:
        assert 0 < point.mean <= point.largest <= point.bound and point.farthest <= point.ball and point.exceeded == 0
        assert point.magnitude < point.mean
    lines = (tmp_path / "bounds.jsonl").read_text().splitlines()
    (tmp_path / "bounds.jsonl").write_text("\n".join(lines[:3]) + "\n")  # as after an interruption
    again = bounds_observed.run(out=tmp_path, **TINY)
    assert again == first
    console = Console(width=200, record=True)
    console.print(bounds_figures.table(first))
    assert "exceeded 0 times in 24, as stated" in console.export_text()
    with pytest.raises(InvalidInput, match="at least 1"):
        bounds_observed.run(out=tmp_path, **{**TINY, "trials": 0})


def test_the_command_answers(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(30, 6)).astype(np.float32)
    np.save(tmp_path / "data.npy", x)
    arguments = ["bound", f"{__name__}:small_network", "--untrained", "--data", str(tmp_path / "data.npy"), "--radius", "2"]
    done = CliRunner().invoke(app, [*arguments, "--share", "0.3", "--json"])
    assert done.exit_code == 0, done.output
    data, ball = sorted(json.loads(done.stdout)["bounds"], key=lambda bound: str(bound["form"]), reverse=True)
    own, other = ask(small_network(), str(tmp_path / "data.npy"), radius=2.0, share=0.3)
    assert {own.form: own.value, other.form: other.value} == {data["form"]: data["value"], ball["form"]: ball["value"]}
    shown = CliRunner().invoke(app, [*arguments, "--share", "0.3", "--rule", "any"])
    assert shown.exit_code == 0 and "How far the output moves" in shown.output
    for wrong in (["--share", "0.3", "--delta", "1"], ["--share", "1.2"], [], ["--share", "0.3", "--gap", "1"]):
        assert CliRunner().invoke(app, [*arguments, *wrong]).exit_code == 2


def test_a_question_for_the_share(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", np.random.default_rng(0).normal(size=(30, 6)).astype(np.float32))
    (bound,) = ask(small_network(), str(tmp_path / "data.npy"), radius=2.0, gap=4.0, relative=True)
    assert bound.relative is not None and 2.0 < bound.relative <= 4.0 and bound.form == "data"
    (bound,) = ask(small_network(), None, radius=2.0, input_shape="6", gap=1.0)
    assert bound.form == "ball" and bound.value <= 1.0
    for settings, message in (
        ({"input_shape": "6,a", "share": 0.1}, "whole numbers with commas"),
        ({"gap": 1.0, "relative": True}, "relative gap needs data"),
        ({"share": 0.1, "relative": True}, "relative speaks of gap"),
        ({"share": 0.1, "rule": "wanda"}, "rule must be one of"),
    ):
        with pytest.raises(InvalidInput, match=message):
            ask(small_network(), None, radius=2.0, **settings)  # type: ignore[arg-type]
