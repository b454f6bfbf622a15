"""nettrim.bench: counts against hand-computed ones, the record, the page, the command, and that nothing is changed."""

from __future__ import annotations

import copy
import gc
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import nettrim
from nettrim.cli import app
from nettrim.deploy import timing as clock_of
from nettrim.deploy.bench_result import Bench, Form, Timing
from nettrim.deploy.counting import count
from nettrim.deploy.machine import Machine, this_machine
from nettrim.deploy.timing import ROUNDS, Passes, apart, faster_in, side_by_side
from nettrim.experiments.models import fully_connected
from nettrim.render import bench_files, report_html
from nettrim.render.bench_table import bench_text
from nettrim.render.page import page_with_bench
from nettrim.solvers.reference import MissingExtra
from nettrim.status import InvalidInput

MODEL = f"{__name__}:network"
QUICK = 0.002


def network() -> nn.Sequential:
    return fully_connected((12, 16, 10, 4), seed=3)


def images(count: int = 40) -> Tensor:
    return torch.rand(count, 12, generator=torch.Generator().manual_seed(0))


def pruned() -> nn.Module:
    """Half of the first layer's neurons dead, so that there is something to compact."""
    model = network()
    with torch.no_grad():
        model[1].weight[:8] = 0
        model[1].bias[:8] = 0
        model[3].weight[:, :12] = 0
    return model


# ----------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Linear(7, 5), (7,), 35),
        (nn.Linear(7, 5), (3, 7), 3 * 35),  # a sequence of three
        (nn.Conv2d(3, 8, 3, padding=1), (3, 10, 10), 8 * 10 * 10 * 3 * 9),
        (nn.Conv2d(3, 8, 3, stride=2), (3, 11, 9), 8 * 5 * 4 * 3 * 9),
        (nn.Conv2d(6, 8, (3, 1), stride=(2, 1), dilation=(2, 1), groups=2), (6, 11, 4), 8 * 4 * 4 * 3 * 3),
        (nn.Conv2d(6, 6, 3, groups=6, padding="same"), (6, 5, 5), 6 * 25 * 9),
        (nn.Conv1d(4, 6, 5, stride=3), (4, 20), 6 * 6 * 4 * 5),
    ],
)
def test_multiply_adds_of_one_layer(layer: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        weight.view(-1)[: weight.numel() // 2] = 0
    found = count(layer.eval(), torch.rand(3, *shape))
    assert found.dense == macs and found.others == 0
    assert found.nonzero == macs * int((weight != 0).sum()) // weight.numel()
    assert not layer._forward_hooks


def test_what_is_no_product_is_not_counted_and_every_call_is() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.norm(self.conv(x))).mean((2, 3))
            return self.fc(self.fc(y)) @ torch.ones(4, 2)  # type: ignore[no-any-return]

    found = count(Twice().eval(), torch.rand(5, 2, 6, 6))
    assert {name: layer.dense for name, layer in found.layers.items()} == {"conv": 4 * 16 * 18, "fc": 2 * 16}
    assert found.others == 8 and found.dense == 4 * 16 * 18 + 2 * 16 + 8
    kinds = {"conv": "semi-structured", "fc": "direct"}
    assert found.executed({}) == found.dense and found.executed(kinds) == 2 * 16 * 18 + 2 * 16 + 8


def test_attention_is_opened() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True).eval()
    with torch.no_grad():
        layer.self_attn.in_proj_weight[:8] = 0  # the queries' projection
    fast = torch.backends.mha.get_fastpath_enabled()
    found = count(layer, torch.rand(3, 5, 8))
    projections, attention, feedforward = 4 * 5 * 64, 2 * 5 * 5 * 8, 2 * 5 * 8 * 16
    assert found.dense == projections + attention + feedforward and found.others == attention
    assert found.nonzero == found.dense - 5 * 64
    assert torch.backends.mha.get_fastpath_enabled() is fast and not found.notes


def test_weights_that_are_no_layers_are_named() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.fc = nn.Parameter(torch.zeros(6, 6)), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x @ self.own)  # type: ignore[no-any-return]

    found = count(Own().eval(), torch.rand(4, 6))
    assert found.others == 36 and "the model itself (Own)" in found.notes[0]


# ----------------------------------------------------------------------------------------------------------------- timing


def test_every_candidate_has_its_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))  # a pass takes one second
    monkeypatch.setattr(clock_of, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    monkeypatch.setattr(clock_of, "_interruptions", lambda: 0)
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}  # type: ignore[misc]
    taken = side_by_side(runs, 2.5 * ROUNDS)
    # three passes each to warm up; then turns of 2.5 seconds, three passes, with one more before that is not measured
    assert "".join(calls).startswith("aaabbbccc" + "aaaabbbbcccc" + "bbbbccccaaaa" + "ccccaaaabbbb" + "aaaa") and gc.isenabled()
    assert all(passes.clear == [1.0] * 3 * ROUNDS and not passes.interrupted for passes in taken.values())
    calls.clear()
    assert side_by_side(runs, 0.5 * ROUNDS)["a"].counted == [1.0] * ROUNDS
    assert "".join(calls).startswith("aaabbbccc" + "aabbcc" + "bca" + "cab")  # longer than a turn: only the first ones warm up again
    calls.clear()
    switches = iter(range(10**6))
    monkeypatch.setattr(clock_of, "_interruptions", lambda: next(switches))
    lost = side_by_side(runs, 2.0 * ROUNDS)["a"]
    assert lost.interrupted == [1.0] * 2 * clock_of.PATIENCE * ROUNDS and lost.counted == lost.interrupted and not lost.enough


def test_interrupted_passes_are_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    count = iter(range(10**6))
    switches = {"often": 0}

    def often() -> None:
        switches["often"] += next(count) % 3 == 0

    clock = iter(range(10**6))  # a pass takes one second
    monkeypatch.setattr(clock_of, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    monkeypatch.setattr(clock_of, "_interruptions", lambda: switches["often"])
    taken = side_by_side({"often": often, "never": lambda: None}, 10.0 * ROUNDS)
    share = len(taken["often"].interrupted) / (len(taken["often"].interrupted) + len(taken["often"].clear))
    assert 0.2 < share < 0.5 and taken["often"].counted == taken["often"].clear
    assert not taken["never"].interrupted
    assert len(taken["often"].turns) == ROUNDS  # one number a round, undisturbed where it can be
    few = Passes([1.0], [2.0, 3.0])
    assert not few.enough and few.counted == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(("wins", "told"), [(10, True), (9, True), (8, False), (5, False), (2, False), (1, True), (0, True)])
def test_what_is_noise(wins: int, told: bool) -> None:
    """Two-sided sign test over ten rounds at one in twenty: 9 or 10 of them."""
    ours, theirs = Passes(turns=[1.0] * wins + [3.0] * (10 - wins)), Passes(turns=[2.0] * 10)
    assert faster_in(ours, theirs) == (wins, 10) and apart(ours, theirs) is told and apart(theirs, ours) is told
    assert not apart(Passes(turns=[1.0] * 5), Passes(turns=[2.0] * 5))  # five rounds are too few to tell anything


def test_a_slow_pass_warms_up_once_and_turns_are_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(clock_of, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    monkeypatch.setattr(clock_of, "_interruptions", lambda: 0)
    calls: list[str] = []
    taken = side_by_side({"a": lambda: calls.append("a")}, 1.0, rounds=4)
    assert len(calls) == 1 + 1 + 4 and taken["a"].turns == [1.0] * 4 and taken["a"].quartiles == (1.0, 1.0, 1.0)
    assert taken["a"].enough and taken["a"].rounds == 4


def test_garbage_collection_is_put_back_after_an_error() -> None:
    def fails() -> None:
        raise ValueError("no")

    gc.disable()
    try:
        side_by_side({"a": lambda: None}, 1e-9)
        assert not gc.isenabled()
    finally:
        gc.enable()
    with pytest.raises(ValueError, match="no"):
        side_by_side({"a": fails}, 1e-9)
    assert gc.isenabled()


# ------------------------------------------------------------------------------------------------------------------ bench


@pytest.fixture(scope="module")
def made() -> Bench:
    return nettrim.bench(pruned(), images(), reference=network(), batch_sizes=(1, 50), seconds=QUICK)


def test_sizes_of_all_forms(made: Bench, tmp_path: Path) -> None:
    assert [form.name for form in made.forms] == ["dense", "pruned", "compacted", "accelerated"] and made.baseline == "dense"
    dense, sparse, small, fast = made.forms
    weights = 12 * 16 + 16 * 10 + 10 * 4
    assert dense.parameters == sparse.parameters == weights + 30 and dense.macs == sparse.macs == dense.nonzero_macs == weights
    assert sparse.nonzero_macs == weights - 8 * 12 - 12 * 10 and sparse.nonzeros == dense.nonzeros - 8 * 13 - 12 * 10
    # eight neurons are dead, four more are read by nothing
    assert small.parameters == 12 * 4 + 4 + 4 * 10 + 10 + 44 and small.macs == 12 * 4 + 4 * 10 + 40
    assert (fast.parameters, fast.bytes, fast.macs, fast.made_from) == (small.parameters, small.bytes, small.macs, "compacted")
    assert sparse.bytes == nettrim.save_weights(pruned(), tmp_path / "a.safetensors").stat().st_size
    assert sparse.compressed_bytes == nettrim.save_weights(pruned(), tmp_path / "b.safetensors", compressed=True).stat().st_size
    assert sparse.difference == 0 and small.difference is not None and small.difference <= 1e-5 and (dense.difference or 0) > 1e-3
    ratios = made.ratios("compacted")
    assert (
        ratios["parameters"] == dense.parameters / small.parameters and ratios["compressed_bytes"] == dense.bytes / small.compressed_bytes
    )  # type: ignore[operator]


def test_times_of_all_forms(made: Bench) -> None:
    for form in made.forms:
        assert [timing.batch for timing in form.timings] == [1, 50]
        for timing in form.timings:
            assert 0 < timing.lower <= timing.seconds <= timing.upper and timing.runs >= ROUNDS
            assert timing.throughput == timing.batch / timing.seconds
            assert (timing.how == "") is (form.name != "accelerated")
            if form.name != "accelerated":
                assert timing.macs == form.macs
            else:
                assert form.nonzero_macs <= timing.macs <= form.macs  # type: ignore[operator]
    assert made.ratios("dense")["speed"] == {1: 1.0, 50: 1.0}
    assert made.machine == this_machine() and made.machine.threads == torch.get_num_threads()


def test_the_record_comes_back_from_json(made: Bench) -> None:
    text = json.dumps(made.to_dict(), allow_nan=False)
    assert Bench.from_dict(json.loads(text)) == made and json.dumps(Bench.from_dict(json.loads(text)).to_dict()) == text
    told_of = json.loads(text)["forms"][2]
    assert told_of["ratios"]["speed"]["50"] == made.ratios("compacted")["speed"][50] and told_of["timings"][0]["throughput"] > 0


def damage(data: dict[str, Any], how: str) -> dict[str, Any]:
    if how == "missing":
        del data["forms"][0]["parameters"]
    elif how == "kind":
        data["forms"][0]["timings"][0]["seconds"] = "fast"
    elif how == "zero":
        data["forms"][0]["timings"][0]["seconds"] = 0
    elif how == "baseline":
        data["baseline"] = "other"
    else:
        data["machine"] = None
    return data


@pytest.mark.parametrize(
    ("how", "words"),
    [("missing", "parameters is missing"), ("kind", "seconds"), ("zero", "above 0"), ("baseline", "'other'"), ("", "Machine")],
)
def test_a_damaged_record_is_refused(made: Bench, how: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        Bench.from_dict(damage(json.loads(json.dumps(made.to_dict())), how))


def test_models_threads_and_random_state_are_left_alone() -> None:
    model, dense = pruned().train(), network().train()
    dense[1].weight.requires_grad_(False)
    before = [copy.deepcopy(m.state_dict()) for m in (model, dense)]
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    asked = 1 if threads > 1 else 2
    made = nettrim.bench(model, images(), reference=dense, batch_sizes=[2], threads=asked, seconds=QUICK)
    assert made.machine.threads == asked and torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    for m, kept in zip((model, dense), before, strict=True):
        assert all(torch.equal(m.state_dict()[key], value) for key, value in kept.items()) and m.training
    assert not dense[1].weight.requires_grad and model[1].weight.requires_grad and not model[1]._forward_hooks


def test_without_a_reference_ratios_compare_with_the_pruned_model() -> None:
    made = nettrim.bench(pruned(), (images(), torch.zeros(40)), batch_sizes=(3,), seconds=QUICK)
    assert made.baseline == "pruned" and made.forms[0].name == "pruned" and made.ratios("pruned")["speed"] == {3: 1.0}


def test_keyword_inputs() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 4)

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return self.fc(x) * scale  # type: ignore[no-any-return]

    made = nettrim.bench(Named(), {"x": images(), "scale": 2.0}, batch_sizes=(1, 3), seconds=QUICK)
    assert made.form("pruned").macs == 48 and len(made.form("pruned").timings) == 2


def test_forms_that_fail_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise MissingExtra("removing channels needs torch-pruning")

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("kernel\nlost")

    module = sys.modules["nettrim.deploy.bench"]  # the name itself is the function
    monkeypatch.setattr(module, "compact", missing)
    fast = nettrim.bench(pruned(), images(), batch_sizes=(2,), seconds=QUICK)
    assert [form.name for form in fast.forms] == ["pruned", "accelerated"] and fast.form("accelerated").made_from == "pruned"
    assert "compacted is left out: removing channels needs torch-pruning" in fast.notes
    monkeypatch.setattr(module, "accelerate", broken)
    plain = nettrim.bench(pruned(), images(), batch_sizes=(2,), seconds=QUICK)
    assert [form.name for form in plain.forms] == ["pruned"]
    assert "batches of 2: accelerated is left out: RuntimeError: kernel" in plain.notes and "kernel" in str(plain)


def test_a_batch_size_that_the_model_refuses_is_noted() -> None:
    class Even(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 1:
                raise ValueError("no single samples")
            return self.fc(x)  # type: ignore[no-any-return]

    made = nettrim.bench(Even(), images(), batch_sizes=(1, 2), seconds=QUICK)
    assert [timing.batch for timing in made.form("pruned").timings] == [2] and any("no single samples" in note for note in made.notes)
    assert made.ratios("pruned")["speed"] == {1: None, 2: 1.0} and "no single samples" in bench_text(made)
    with pytest.raises(InvalidInput, match="no batch size"):
        nettrim.bench(Even(), images(), batch_sizes=(1,), seconds=QUICK)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_sizes": ()}, "batch_sizes"),
        ({"batch_sizes": (1, 1)}, "batch_sizes"),
        ({"batch_sizes": (0,)}, "batch_sizes"),
        ({"batch_sizes": (2.0,)}, "batch_sizes"),
        ({"threads": 0}, "threads"),
        ({"seconds": 0}, "seconds"),
        ({"seconds": float("nan")}, "seconds"),
        ({"reference": fully_connected((12, 5), seed=0)}, r"\[\(40, 5\)\]"),
        ({"reference": fully_connected((11, 4), seed=0)}, "reference"),
        ({"reference": "network"}, "bench: reference must be an nn.Module"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        nettrim.bench(pruned(), images(), seconds=settings.pop("seconds", QUICK), **settings)


def test_bad_models_and_examples_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"bench: model must be an nn\.Module"):
        nettrim.bench("model", images())  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="bench: example"):
        nettrim.bench(network(), torch.full((2, 12), float("nan")))
    with pytest.raises(InvalidInput, match="cannot run on the example"):
        nettrim.bench(network(), torch.rand(2, 11))
    with pytest.raises(InvalidInput, match="no form 'fast'"):
        nettrim.bench(network(), images(), batch_sizes=(1,), seconds=QUICK).form("fast")


def test_the_machine_names_no_host() -> None:
    import getpass
    import platform

    machine = this_machine()
    assert machine.cpu and machine.cores >= 1 and machine.torch == torch.__version__ and machine.accelerator is None
    assert machine.capability == torch.backends.cpu.get_cpu_capability() and machine.capability in str(machine)
    told_of = json.dumps(machine.to_dict())
    assert platform.node() not in told_of and str(Path.home()) + "/" not in told_of and getpass.getuser() not in told_of.split('"')
    assert Machine.from_dict(json.loads(told_of)) == machine


# ------------------------------------------------------------------------------------------------------- tables and pages


def example_bench(**changes: Any) -> Bench:
    machine = Machine("<b>Some CPU</b>", 4, 2, "AVX2", "Linux x86_64", "3.11", "2.9", None, None)
    sizes = {"parameters": 1000, "nonzeros": 1000, "bytes": 4100, "compressed_bytes": 3500, "macs": 990, "nonzero_macs": 990}
    dense = Form("dense", "", **sizes, difference=0.25, timings=(Timing(32, 2e-3, 1.9e-3, 2.2e-3, 50, 3, 990),))  # type: ignore[arg-type]
    fast = replace(dense, name="pruned", nonzeros=100, compressed_bytes=410, nonzero_macs=99, difference=0.0)
    fast = replace(fast, timings=(Timing(32, 5e-4, 4e-4, 6e-4, 200, 0, 99, "every layer sparse"),))
    return replace(Bench((dense, fast), "dense", (32,), (10,), "float32", 0.5, "0" * 64, machine, ("a note",)), **changes)


def test_the_text_says_it_all() -> None:
    text = bench_text(example_bench())
    for needed in ("100 (10.0)", "410 (10.0)", "4,100", "0.500", "64,000", "4.00", "every layer sparse", "AVX2", "without numba", "a note"):
        assert needed in text, needed


def test_the_page_has_the_section_and_can_be_given_it_later(tmp_path: Path) -> None:
    result = nettrim.prune(network(), [images()], nettrim.Magnitude(sparsity=0.5), progress=False)
    report, certificate, masks = result.report, result.certificate, result.masks()
    without = report_html(report, certificate, masks, title="Kept")
    page = report_html(report, certificate, masks, title="Kept", bench=example_bench())
    assert "Size and speed" not in without and without.count("<section") + 1 == page.count("<section")
    for needed in ("Size and speed", "10.0 \N{MULTIPLICATION SIGN}", "64,000", "&lt;b&gt;Some CPU&lt;/b&gt;", "a note"):
        assert needed in page, needed
    later = page_with_bench(without, example_bench())
    assert later is not None and "".join(later.split()) == "".join(page.split())
    assert page_with_bench(later, example_bench()) == later  # a second bench takes the first one's place
    assert page_with_bench("<html></html>", example_bench()) is None


def test_files_of_a_saved_result(tmp_path: Path) -> None:
    result = nettrim.prune(network(), [images()], nettrim.Magnitude(sparsity=0.5), progress=False)
    folder = result.save(tmp_path / "saved")
    fits = example_bench(weights_hash=result.certificate.weights_hash)
    assert bench_files.read_bench(folder) == (None, "")
    with pytest.raises(InvalidInput, match="other weights"):
        bench_files.write(example_bench(), folder)
    assert bench_files.write(fits, folder) == [folder / "bench.json", folder / "report.html"]
    assert bench_files.read_bench(folder) == (fits, "") and "Size and speed" in (folder / "report.html").read_text()
    (folder / "report.html").write_text('<html><meta name="generator" content="nettrim page">without a place for it</html>')
    bench_files.write(fits, folder)
    assert "Size and speed" in (folder / "report.html").read_text() and "Layer by layer" in (folder / "report.html").read_text()
    nettrim.prune(network(), [images()], nettrim.Magnitude(sparsity=0.7), progress=False).save(folder)
    kept, note = bench_files.read_bench(folder)
    assert kept is None and "other weights" in note
    (folder / "bench.json").write_text("{")
    with pytest.raises(InvalidInput, match=r"bench\.json"):
        bench_files.read_bench(folder)


# ---------------------------------------------------------------------------------------------------------------- command


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    np.save(folder / "data.npy", images().numpy())
    nettrim.prune(network(), [images()], nettrim.Magnitude(sparsity=0.9), progress=False).save(folder / "pruned")
    save_file(network().state_dict(), folder / "dense.safetensors")
    return folder


def command(workplace: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str, expect: int = 0) -> Result:
    monkeypatch.chdir(workplace)
    done = CliRunner().invoke(app, ["bench", *arguments, "--seconds", str(QUICK)])
    assert done.exit_code == expect, done.output
    return done


def test_the_command(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = ("--weights", "pruned", "--reference", "dense.safetensors", "--data", "data.npy", "--output", "pruned")
    done = command(workplace, monkeypatch, "--batch-sizes", "1", "48", MODEL, *saved, "--json")
    data = json.loads(done.stdout)
    assert data["batch_sizes"] == [1, 48] and data["baseline"] == "dense" and data["files"] == ["pruned/bench.json", "pruned/report.html"]
    found = Bench.from_dict(data)
    assert found.form("pruned").parameters == 422 and found.form("pruned").nonzero_macs == 19 + 16 + 4 and done.stderr == ""
    shown = CliRunner().invoke(app, ["report", "pruned"])
    assert shown.exit_code == 0 and "compacted" in shown.stdout and "times faster" in shown.stdout.lower()
    assert json.loads(CliRunner().invoke(app, ["report", "pruned", "--json"]).stdout)["bench"]["batch_sizes"] == [1, 48]
    assert bench_files.read_bench(workplace / "pruned") == (found, "")
    assert "Size and speed" in (workplace / "pruned" / "report.html").read_text()


def test_the_command_in_words(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    arguments = (MODEL, "--weights", "pruned", "--data", "data.npy", "--batch-sizes", "2", "--threads", "1", "--output", "new")
    done = command(workplace, monkeypatch, *arguments)
    for needed in ("Size", "Speed", "pruned", "machine:", "1 thread", "written: new/bench.json"):
        assert needed in done.stdout, needed
    assert torch.get_num_threads() == threads
    assert sorted(file.name for file in (workplace / "new").iterdir()) == ["bench.json"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--batch-sizes", "0"), "batch_sizes"),
        (("--threads", "0"), "threads"),
        (("--weights", "nowhere"), "nowhere"),
        (("--reference", "data.npy"), "data.npy"),
        (("--output", "pruned"), "other weights"),
        (("--output", "data.npy"), "output folder"),
    ],
)
def test_bad_input_ends_with_2(workplace: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: str) -> None:
    own = () if "--weights" in arguments else ("--untrained",)
    done = command(workplace, monkeypatch, MODEL, "--data", "data.npy", *own, *arguments, expect=2)
    assert words in done.stderr and "batches of" not in done.stderr
