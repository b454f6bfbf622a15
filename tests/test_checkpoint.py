"""Saving and loading: all files or none, clean keys, and refusals that leave models and folders as they were."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import nettrim
from nettrim import Certificate, InvalidInput, NetTrim, PruneReport, PruneResult, checkpoint, staging
from nettrim.capture import hashes

NUMBERS = (
    ("reference_norm", "tolerance", "distance", "distance_all_rows", "discrepancy", "bound", "gap", "gap_level", "original_distance"),
    ("reference_norm", "bound", "bound_from_tolerances", "bound_link_normalised", "achieved", "agreement"),
    ("reference_norm", "distance", "tolerance", "original_distance", "gap", "seconds"),
)
FILES = ["certificate.json", "model.safetensors", "report.html", "report.json"]


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def run(seed: int = 0) -> PruneResult:
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(seed))
    unseen = torch.randn(20, 5, generator=torch.Generator().manual_seed(seed + 100))
    return nettrim.prune(net(seed), x, NetTrim(epsilon=0.1), heldout=unseen, progress=False)


@pytest.fixture(scope="module")
def result() -> PruneResult:
    return run()


@pytest.fixture
def folder(result: PruneResult, tmp_path: Path) -> Path:
    return result.save(tmp_path / "out")


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_round_trip(result: PruneResult, folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == FILES
    loaded = nettrim.load(folder, into=net(7))
    assert list(loaded.state_dict()) == list(result.model.state_dict())
    for key, value in result.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value) and loaded.state_dict()[key].dtype == value.dtype
    assert set(load_file(folder / "model.safetensors")) == set(net().state_dict())
    assert nettrim.load(folder / "model.safetensors", into=net(7)) is not None
    assert checkpoint.read_report(folder) == result.report
    assert checkpoint.read_certificate(folder) == result.certificate
    assert checkpoint.contradictions(folder) == []


def test_json_round_trip(result: PruneResult) -> None:
    report = json.loads(json.dumps(result.report.to_dict(), allow_nan=False))
    assert PruneReport.from_dict(report) == result.report
    assert PruneReport.from_dict(report).to_dict() == result.report.to_dict()
    certificate = json.loads(json.dumps(result.certificate.to_dict(), allow_nan=False))
    assert Certificate.from_dict(certificate) == result.certificate
    assert certificate["holds"] is True


@pytest.mark.parametrize("cls", [PruneReport, Certificate])
def test_damaged_records_are_refused(result: PruneResult, cls: Any) -> None:
    good = (result.report if cls is PruneReport else result.certificate).to_dict()
    cls.from_dict(good)
    for key in ("method", "scheme", "seed", "layers"):
        with pytest.raises(InvalidInput, match=key):
            cls.from_dict({name: value for name, value in good.items() if name != key})
        with pytest.raises(InvalidInput, match=key):
            cls.from_dict({**good, key: [1.5] if key != "layers" else "none"})
    layer = good["layers"][0]
    for key, value in (("distance", "0.1"), ("distance", float("nan")), ("rows", 1.5), ("rows", True), ("name", None), ("gap", "small")):
        with pytest.raises(InvalidInput, match=f"{key} must be"):
            cls.from_dict({**good, "layers": [{**layer, key: value}]})
    with pytest.raises(InvalidInput, match=r"must be an object|status must be"):
        cls.from_dict({**good, "layers": [3]})


def test_damaged_status_is_refused(result: PruneResult) -> None:
    good = result.report.to_dict()
    with pytest.raises(InvalidInput, match="status must be one of converged"):
        PruneReport.from_dict({**good, "layers": [{**good["layers"][0], "status": "fine"}]})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(5, 8)), "not in the model 1.bias"),
        (nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3), nn.Linear(3, 3)), "missing 4.bias, 4.weight"),
        (nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)), r"3.bias must be \(4,\), found \(3,\)"),
        (net().half(), "stored in torch.float32, the model holds it in torch.float16.*convert the model"),
        (net().to("meta"), "is on the meta device.*to_empty"),
    ],
    ids=["extra", "missing", "shape", "dtype", "meta"],
)
def test_load_refuses_what_does_not_fit_and_changes_nothing(folder: Path, model: nn.Module, message: str) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InvalidInput, match=message):
        nettrim.load(folder, into=model)
    for key, value in model.state_dict().items():
        assert value.is_meta or torch.equal(value, before[key])


def test_load_into_a_wider_dtype(folder: Path, result: PruneResult) -> None:
    loaded = nettrim.load(folder, into=net().double())
    assert torch.equal(loaded.get_parameter("0.weight"), result.model.get_parameter("0.weight").double())


def test_damaged_files(folder: Path) -> None:
    (folder / "report.json").write_text("{ not json")
    with pytest.raises(InvalidInput, match=r"report.json: it is not valid JSON"):
        checkpoint.read_report(folder)
    (folder / "report.json").write_text("[1]")
    with pytest.raises(InvalidInput, match=r"must hold a JSON object"):
        checkpoint.read_report(folder)
    (folder / "report.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInput, match=r"report.json: it is not valid JSON"):
        checkpoint.read_report(folder)
    (folder / "certificate.json").unlink()
    with pytest.raises(InvalidInput, match=r"certificate.json: it cannot be read"):
        checkpoint.read_certificate(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    with pytest.raises(InvalidInput, match="it cannot be read"):
        nettrim.load(folder, into=net())
    weights.unlink()
    with pytest.raises(InvalidInput, match="there is no such file"):
        nettrim.load(folder, into=net())


def test_torch_save_files(tmp_path: Path) -> None:
    torch.save(net().state_dict(), tmp_path / "state.pt")
    assert set(checkpoint.read_weights(tmp_path / "state.pt")) == set(net().state_dict())
    torch.save(net(), tmp_path / "module.pt")
    with pytest.raises(InvalidInput, match="not a plain state dict"):
        checkpoint.read_weights(tmp_path / "module.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(InvalidInput, match="must hold a state dict"):
        checkpoint.read_weights(tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(InvalidInput, match=r"text\.pt"):
        checkpoint.read_weights(tmp_path / "text.pt")


def test_folder_that_cannot_be_written(result: PruneResult, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InvalidInput, match=r"output folder .*choose another"):
            result.save(path)
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["interrupt", "disk full"])
@pytest.mark.parametrize("step", ["weights", "json", "commit", "first move", "last move"])
@pytest.mark.parametrize("earlier", [True, False])
def test_interrupted_save_leaves_one_result_whole(
    result: PruneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException, earlier: bool
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine.txt").write_text("kept")
    if earlier:
        result.save(folder)
    before = contents(folder)
    new = run(1)
    real, moves = os.replace, [0]
    stop = {"commit": 1, "first move": 2, "last move": 5}.get(step)

    def replace(source: Any, target: Any) -> None:
        moves[0] += 1
        if moves[0] == stop:
            raise error
        real(source, target)

    def fail(*arguments: Any, **keywords: Any) -> None:
        raise error

    if step == "weights":
        monkeypatch.setattr(checkpoint, "save_file", fail)
    elif step == "json":
        monkeypatch.setattr(checkpoint, "_write_json", fail)
    else:
        monkeypatch.setattr(staging.os, "replace", replace)
    with pytest.raises((KeyboardInterrupt, InvalidInput)):
        new.save(folder)
    monkeypatch.undo()
    staging.settle(folder)
    if "move" in step:  # the commit was before
        assert checkpoint.read_certificate(folder) == new.certificate and checkpoint.read_report(folder) == new.report
        assert hashes(nettrim.load(folder, net(7))) == new.certificate.weights_hash
        assert sorted(contents(folder)) == sorted([*FILES, "mine.txt"])
    else:
        assert contents(folder) == before
    new.save(folder)
    assert sorted(contents(folder)) == sorted([*FILES, "mine.txt"])


def test_numbers_that_json_does_not_hold_lose_no_work(result: PruneResult, tmp_path: Path) -> None:
    layer = replace(result.certificate.layers[0], gap=float("inf"), gap_kind="epsilon")
    certificate = replace(result.certificate, layers=(layer, *result.certificate.layers[1:]))
    settings = {**result.report.settings, "odd": {1: torch.float32, "b": np.float32("nan"), "c": {Path("x")}}}
    report = replace(result.report, settings=settings, seconds=float("nan"))
    folder = replace(result, certificate=certificate, report=report).save(tmp_path / "out")
    assert checkpoint.read_certificate(folder).layers[0].gap is None
    written = json.loads((folder / "report.json").read_text())
    assert written["seconds"] is None and written["settings"]["odd"] == {"1": "torch.float32", "b": None, "c": ["x"]}
    assert "certificate.layers[0].gap was inf and is written as null" in written["notes"]
    assert "gap was inf" in (folder / "report.html").read_text()
    assert nettrim.load(folder, net(7)) is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e308, 1e-320])
def test_no_number_keeps_a_result_from_being_saved(result: PruneResult, tmp_path: Path, value: float) -> None:
    """Whatever a number of the certificate or the report became: the weights are what the work was for."""
    layers = tuple(replace(layer, **dict.fromkeys(NUMBERS[0], value)) for layer in result.certificate.layers)
    network = replace(result.certificate.network, **dict.fromkeys(NUMBERS[1], value))
    reports = tuple(replace(layer, **dict.fromkeys(NUMBERS[2], value)) for layer in result.report.layers)
    odd = replace(
        result,
        certificate=replace(result.certificate, layers=layers, network=network),
        report=replace(result.report, layers=reports, seconds=value),
    )
    assert nettrim.load(odd.save(tmp_path / "out"), net(7)) is not None


def test_state_that_is_not_a_tensor_is_refused(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

        def set_extra_state(self, state: Any) -> None:
            return None

    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    result = nettrim.prune(nn.Sequential(Extra(3, 2)), x, NetTrim(epsilon=0.1), progress=False)
    with pytest.raises(InvalidInput, match="_extra_state' is a dict; safetensors holds tensors only"):
        result.save(tmp_path / "out")


def test_shared_storage_is_saved_key_by_key(tmp_path: Path) -> None:
    class Alias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 3)
            self.also = self.fc

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.also(x)

    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    model = Alias()
    result = nettrim.prune(model, x, NetTrim(epsilon=0.1), progress=False)
    folder = result.save(tmp_path / "out")
    assert set(load_file(folder / "model.safetensors")) == {"fc.weight", "fc.bias", "also.weight", "also.bias"}
    assert nettrim.verify(folder, model, x).holds


def test_extra_weights_in_the_file_are_refused(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({**state, "more": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(InvalidInput, match="not in the model more"):
        nettrim.load(folder, into=net())
