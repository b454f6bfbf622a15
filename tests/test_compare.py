"""Methods compared on a tiny network: from Python, and by the real command, interrupted and continued."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

import nettrim
from nettrim import InvalidInput, staging
from nettrim.cli import app
from nettrim.compare import JOURNAL, METHODS, Comparison, compare, first_samples, methods_named
from nettrim.experiments.models import fully_connected
from nettrim.render.compare_picture import compare_picture
from nettrim.render.compare_table import compare_text

FACTORY = """
import os, time, torch
from pathlib import Path
from nettrim.experiments.models import fully_connected

def small():
    return fully_connected((12, 16, 10, 4), seed=3)

class Waiting(torch.nn.Module):  # says so, and stays in a pass, once the journal that it is told of has a header and a run
    def __init__(self):
        super().__init__()
        self.net = small()
    def forward(self, x):
        journal = Path(os.environ.get("WAIT_FOR", "none"))
        if journal.exists() and journal.read_text().count("\\n") >= 2:
            Path("waiting").touch()
            time.sleep(3600)
        return self.net(x)
"""
ARGUMENTS = ("compare", "compared:small", "--untrained", "--data", "calibration.npy", "--output", "out")


def network() -> torch.nn.Sequential:
    return fully_connected((12, 16, 10, 4), seed=3)


def images(count: int = 80, seed: int = 0) -> Tensor:
    return torch.rand(count, 12, generator=torch.Generator().manual_seed(seed))


def labelled(count: int = 60) -> list[tuple[Tensor, Tensor]]:
    x = images(count, seed=1)
    with torch.no_grad():
        truth = network()(x).argmax(1)
    truth[:15] = (truth[:15] + 1) % 4  # the reference network is right on three quarters
    return list(zip(torch.split(x, 25), torch.split(truth, 25), strict=True))


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare(network(), images(), sparsities=(0.5, 0.8), heldout=labelled(), progress=False)


def test_every_method_at_every_sparsity(comparison: Comparison) -> None:
    assert [(run.method, run.sparsity) for run in comparison.runs] == [(name, s) for name in METHODS for s in (0.5, 0.8)]
    assert (comparison.metric, comparison.measured_on, comparison.samples) == ("accuracy", "heldout", 60)
    assert comparison.accuracy == 0.75
    for run in comparison.runs:
        assert run.sparsity is not None and run.holds and run.seconds > 0
        assert run.density == pytest.approx(1 - run.sparsity, abs=0.01)
        assert list(run.densities) == ["1", "3", "5"]
    by = {(run.method, run.sparsity): run.discrepancy for run in comparison.runs}
    assert by["NetTrim", 0.8] < min(value for (name, sparsity), value in by.items() if name != "NetTrim" and sparsity == 0.8)


def test_the_numbers_are_those_of_the_pruned_network(comparison: Comparison) -> None:
    model, batches = network(), labelled()
    result = nettrim.prune(model, images(), nettrim.Magnitude(sparsity=0.8), heldout=batches, progress=False)
    run = next(run for run in comparison.runs if (run.method, run.sparsity) == ("Magnitude", 0.8))
    x = torch.cat([batch for batch, _ in batches])
    with torch.no_grad():
        before, after = model(x).double(), result.model(x).double()
    unseen, certified = result.certificate.heldout, result.certificate.network
    assert unseen is not None and unseen.class_changes is not None and unseen.accuracy_after is not None and certified.bound is not None
    assert run.accuracy == unseen.accuracy_after
    assert run.agreement == pytest.approx(1 - unseen.class_changes / 60)
    assert run.discrepancy == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-5)
    assert run.calibration_discrepancy == certified.achieved / certified.reference_norm
    assert run.bound == certified.bound / certified.reference_norm
    assert run.densities == {layer.name: layer.density for layer in result.report.layers}


def test_without_labels_or_classes(comparison: Comparison) -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = compare(model, images(), methods="magnitude", sparsities=[0.5], progress=False)
    assert (plain.metric, plain.measured_on, plain.samples, plain.accuracy) == ("agreement", "calibration", 80, None)
    assert plain.runs[0].discrepancy == pytest.approx(plain.runs[0].calibration_discrepancy, rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    single = fully_connected((12, 5, 1), seed=0)
    one = compare(single, images(), methods=["Magnitude", "magnitude"], sparsities=[0.5, 0.5], progress=False)
    assert one.metric == "discrepancy" and len(one.runs) == 1 and one.runs[0].agreement is None
    assert compare_picture(one).axes[0].get_yscale() == "log"


def test_settings_reach_every_run() -> None:
    parallel = compare(
        network(), images(), methods="RANDOM", sparsities=[0.5], scheme="parallel", layers=["1", "3"], ignore=["3"], seed=4, progress=False
    )
    own = nettrim.prune(
        network(), images(), nettrim.Random(sparsity=0.5, seed=4), scheme="parallel", layers=["1"], seed=4, progress=False
    ).certificate.network
    assert parallel.runs[0].calibration_discrepancy == own.achieved / own.reference_norm
    assert list(parallel.runs[0].densities) == ["1"]


def test_a_pattern_for_all_methods() -> None:
    found = compare(network(), images(), pattern="2:4", progress=False)
    assert [run.label for run in found.runs] == [f"{name} 2:4" for name in METHODS if name != "LOBS"]
    assert all(0.4 < run.density <= 0.52 and run.sparsity is None for run in found.runs)
    with pytest.raises(InvalidInput, match="2:x"):
        compare(network(), images(), pattern="2:x", progress=False)
    assert methods_named("all", "rows") == ["NetTrim", "Magnitude", "Random", "Wanda", "LinearADMM"]
    for method, pattern in (("lobs", "2:4"), ("obs", "rows")):
        with pytest.raises(InvalidInput, match=f"{method.upper()} does not take pattern '{pattern}'"):
            compare(network(), images(), methods=["wanda", method], sparsities=[0.5], pattern=pattern, progress=False)


def test_lobs_and_readings_are_those_of_prune() -> None:
    readings: dict[str, dict[str, str | None]] = {"re:[13]": {"activation": None}}
    found = compare(network(), images(), methods=["lobs", "nettrim"], sparsities=[0.7], readings=readings, progress=False)
    assert found.settings["readings"] == readings
    for run, method in zip(found.runs, (nettrim.LOBS(sparsity=0.7), nettrim.NetTrim(sparsity=0.7)), strict=True):
        own = nettrim.prune(network(), images(), method, readings=readings, progress=False).certificate.network
        assert run.calibration_discrepancy == own.achieved / own.reference_norm
        plain = nettrim.prune(network(), images(), method, progress=False).certificate.network
        assert (plain.achieved == own.achieved) == (run.method == "LOBS")  # which knows of no activation


def test_names_in_any_case_and_the_nearest() -> None:
    assert methods_named("all") == list(METHODS) == methods_named(["ALL", "obs"])
    assert methods_named(["sparsegpt", "OBS", "NETTRIM", "obs"]) == ["SparseGPT", "OBS", "NetTrim"]
    with pytest.raises(InvalidInput, match=r"method 'wamda' is not known; the nearest is 'Wanda' \(methods: NetTrim, "):
        methods_named(["nettrim", "wamda"])
    with pytest.raises(InvalidInput, match="name at least one method"):
        methods_named([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsities": [0.5, 1.0]}, r"must lie in \[0, 1\), found 1"),
        ({"sparsities": []}, "sparsities must be a list"),
        ({"sparsities": 0.5}, "sparsities must be a list"),
        ({"model": None}, r"model must be an nn\.Module"),
        ({"layers": ["7"]}, "no layer fits '7'"),
        ({"calibration": images()[:, :5]}, "the model cannot run on batch 1"),
        ({"calibration": images() * float("nan")}, "NaN or inf"),
        ({"heldout": images()}, "all of these samples are calibration data"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"max_samples": 0}, "max_samples must be"),
        ({"scheme": "both"}, "scheme must be"),
        ({"readings": {"1": {"norm": "bn"}}}, "has no module 'bn'"),
        ({"readings": {"9": {"activation": None}}}, "no layer fits '9'"),
        ({"activations": {"1": "rleu"}}, "activation 'rleu' is not known"),
        ({"pattern": "rows", "sparsities": [0.5, 0.9]}, "layer '5': its sparsity leaves 4 of 40 weights, less than the smallest group"),
    ],
)
def test_refused_before_any_work(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": network(), "calibration": images(), "progress": False, "folder": tmp_path / "out"} | change
    with pytest.raises(InvalidInput, match=message):
        compare(given.pop("model"), given.pop("calibration"), **given)
    assert not (tmp_path / "out" / JOURNAL).exists()


def test_the_journal_continues_grows_and_keeps_runs_apart(tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []

    def run(**change: Any) -> Comparison:
        given: dict[str, Any] = {"methods": ["magnitude", "wanda"], "sparsities": [0.5, 0.8], "folder": tmp_path} | change
        return compare(given.pop("model", network()), given.pop("calibration", images()), progress=lambda *x: told.append(x), **given)

    first = run()
    path = tmp_path / JOURNAL
    whole = path.read_text()
    assert told[0] == (0, 4, "Magnitude 0.5") and told[-1] == (4, 4, "done") and any("layer 2 of 3" in what for _, _, what in told)
    path.write_text("".join(whole.splitlines(keepends=True)[:3]) + '{"key": "half')  # cut off while writing the third
    told.clear()
    again = run()
    assert not any("Magnitude" in what and "layer" in what for _, _, what in told)  # was there already
    assert [r.__dict__ | {"seconds": 0} for r in again.runs] == [r.__dict__ | {"seconds": 0} for r in first.runs]
    assert again.runs[:2] == first.runs[:2]
    kept = path.read_text()
    more = run(methods=["wanda", "random"], sparsities=[0.8])
    assert path.read_text().startswith(kept) and [r.method for r in more.runs] == ["Wanda", "Random"]
    assert more.runs[0] == again.runs[3]
    kept = path.read_text()
    for change in ({"seed": 1}, {"calibration": images(seed=7)}, {"model": fully_connected((12, 16, 10, 4), seed=4)}, {"ignore": ["5"]}):
        with pytest.raises(InvalidInput, match="choose another folder, or resume=False"):
            run(**change)
        assert path.read_text() == kept
    for other in (labelled(), [(x, y * 0) for x, y in labelled()]):  # the same images, other labels
        with pytest.raises(InvalidInput, match="must belong to a run"):
            run(heldout=other)
        run(heldout=other, resume=False, methods=["magnitude"], sparsities=[0.5])


def test_the_first_samples() -> None:
    x, y = images(10), torch.arange(10)
    assert torch.equal(torch.cat(first_samples(x, 7)), x[:7])
    pairs = first_samples([(x[:4], y[:4]), (x[4:], y[4:])], 6)
    assert [len(b) for b, _ in pairs] == [4, 2] and torch.equal(torch.cat([labels for _, labels in pairs]), y[:6])
    assert first_samples([{"x": x, "scale": 2.0}], 3)[0]["scale"] == 2.0
    assert first_samples([{"x": x, "scale": 2.0}], 3)[0]["x"].shape == (3, 12)
    assert len(first_samples([x], 10)[0]) == 10
    for count, message in ((11, "11 were asked for, the calibration data hold 10"), (0, "at least 1")):
        with pytest.raises(InvalidInput, match=message):
            first_samples([x], count)


def test_table_and_picture(comparison: Comparison) -> None:
    text = compare_text(comparison)
    assert text == str(comparison) and all(name in text for name in METHODS) and "75.00%" in text
    figure = compare_picture(comparison)
    quality, seconds = figure.axes
    assert quality.get_ylabel() == "accuracy (%)" and seconds.get_yscale() == "log"
    lines = {line.get_label(): line for line in quality.lines}
    assert set(lines) == {*METHODS, "reference network"}
    drawn = dict(zip(*(np.asarray(data).round(6).tolist() for data in lines["Wanda"].get_data()), strict=True))
    runs = [run for run in comparison.runs if run.method == "Wanda"]
    assert drawn == {round(100 * run.density, 6): round(100 * (run.accuracy or 0), 6) for run in runs}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    (folder / "compared.py").write_text(FACTORY)
    np.save(folder / "calibration.npy", images().numpy())
    heldout = labelled()
    np.savez(folder / "heldout.npz", inputs=torch.cat([x for x, _ in heldout]), labels=torch.cat([y for _, y in heldout]))
    return folder


def invoke(workplace: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Result:
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(str(workplace))
    return CliRunner().invoke(app, list(arguments))


def test_the_command_writes_table_picture_and_numbers(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ("--methods", "magnitude", "WANDA", "--sparsity", "0.5", "0.8", "--heldout", "heldout.npz", "--samples", "50")
    done = invoke(workplace, monkeypatch, *ARGUMENTS, *chosen)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count("Magnitude") == 2 and "Wanda" in done.stdout and "60 held-out samples" in done.stdout
    folder = workplace / "out"
    assert {path.name for path in folder.iterdir()} == {JOURNAL, "compare.json", "compare.png", "compare.svg"}
    assert (folder / "compare.png").stat().st_size > 10_000
    told = json.loads(invoke(workplace, monkeypatch, *ARGUMENTS, *chosen, "--json").stdout)
    assert told.pop("files") == [f"out/compare.{ending}" for ending in ("json", "png", "svg")]
    assert staging.mark("comparison") | told == json.loads((folder / "compare.json").read_text())
    assert told["calibration_samples"] == 50 and len(told["runs"]) == 4 and told["accuracy"] == 0.75


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "wanda", "sparsgpt"), "the nearest is 'SparseGPT'"),
        (("--sparsity", "0.5", "1.5"), "found 1.5"),
        (("--samples", "81"), "81 were asked for"),
        (("--pattern", "4:2"), "4:2"),
        (("--heldout", "calibration.npy"), "all of these samples are calibration data"),
    ],
)
def test_bad_input_ends_with_2(workplace: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str) -> None:
    done = invoke(workplace, monkeypatch, *ARGUMENTS, *arguments)
    assert done.exit_code == 2 and message in done.stderr, done.stderr


def test_many_values_do_not_take_the_model(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = (
        "compare",
        "--methods",
        "magnitude",
        "random",
        "--sparsity",
        "0.5",
        "compared:small",
        "--untrained",
        "--data",
        "calibration.npy",
    )
    done = invoke(workplace, monkeypatch, *order, "--output", "order", "--json")
    assert done.exit_code == 0, done.stderr
    assert [(run["method"], run["sparsity"]) for run in json.loads(done.stdout)["runs"]] == [("Magnitude", 0.5), ("Random", 0.5)]


def test_readings_and_lobs_on_the_command_line(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = (
        "compare",
        "compared:small",
        "--untrained",
        "--data",
        "calibration.npy",
        "--output",
        "read",
        "--methods",
        "lobs",
        "--sparsity",
        "0.5",
    )
    done = invoke(workplace, monkeypatch, *read, "--reading", "1:activation=none", "--reading", "re:[35]:branch=none", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["settings"]["readings"] == {"1": {"activation": None}, "re:[35]": {"branch": None}}
    assert [run["method"] for run in told["runs"]] == ["LOBS"]
    refused = invoke(workplace, monkeypatch, *read, "--reading", "1=none")
    assert refused.exit_code == 2 and "LAYER:PART=VALUE" in refused.stderr


def test_the_real_command_interrupted_and_continued(workplace: Path) -> None:
    command = [sys.executable, "-m", "nettrim", "compare", "compared:Waiting", "--untrained", "--data", "calibration.npy"]
    command += ["--output", "waited"]
    command += ["--methods", "magnitude", "random", "--sparsity", "0.3", "0.6", "0.9"]
    path = workplace / "waited" / JOURNAL
    environment = {**os.environ, "PYTHONWARNINGS": "error", "NO_COLOR": "1"}
    waits = {**environment, "WAIT_FOR": str(path)}
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # ignored by what runs in the background
    running = subprocess.Popen(
        command, cwd=workplace, env=waits, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard
    )
    while not (workplace / "waiting").exists() and running.poll() is None:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate()
    assert running.returncode == 130 and "interrupted" in errors
    before = path.read_text()
    assert before.count("\n") == 2
    done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert path.read_text().startswith(before) and path.read_text().count("\n") == 7
    assert len(json.loads((workplace / "waited" / "compare.json").read_text())["runs"]) == 6
