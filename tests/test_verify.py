"""``verify``: passes on what ``save`` wrote, and names what was altered."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import nettrim
from nettrim import CertificateError, InvalidInput, Magnitude, NetTrim, prune, verify
from nettrim.capture import hashes


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)
    )


def data(rows: int = 60, seed: int = 0) -> Tensor:
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed))


HELDOUT = [(data(40, 1), torch.arange(40) % 3)]
RUNS: dict[str, dict[str, Any]] = {
    "cascade": {"method": NetTrim(epsilon=0.1)},
    "parallel": {"method": NetTrim(epsilon=0.1), "scheme": "parallel"},
    "subsampled": {"method": NetTrim(epsilon=0.1), "max_samples": 25, "seed": 4},
    "penalty": {"method": NetTrim(penalty=0.3)},
    "budget": {"method": Magnitude(sparsity=0.4), "ignore": ["5"]},
    "out of reach": {"method": NetTrim(epsilon={"0": 0.5, "2": 0.5, "5": 1e-4, "7": 0.2})},
    "correction": {"method": NetTrim(epsilon=0.1, correction=0.5)},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, settings in RUNS.items():
        keywords = dict(settings)
        result = nettrim.prune(net(), data(), keywords.pop("method"), heldout=HELDOUT, progress=False, **keywords)
        folders[name] = result.save(tmp_path_factory.mktemp(name.replace(" ", "_")) / "out")
    return folders


@pytest.fixture
def copied(saved: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for path in saved[name].iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        return folder

    return copy


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", RUNS)
def test_untouched_folders_pass(saved: dict[str, Path], name: str) -> None:
    model = net()
    model.train()
    before = hashes(model)
    again = verify(saved[name], model, data(), HELDOUT)
    assert again.sound and again.met == (name != "out of reach")
    assert again.not_checked is not None and "seconds" in again.not_checked and not any("heldout" in text for text in again.not_checked)
    stored = nettrim.checkpoint.read_certificate(saved[name])
    assert again == stored
    assert hashes(model) == before and all(module.training for module in model.modules())
    without = verify(saved[name], model, data())
    assert without.heldout is None and without.not_checked is not None
    assert any(text.startswith("heldout") for text in without.not_checked)


def test_random_state_is_untouched(saved: dict[str, Path]) -> None:
    model, before = net(), torch.get_rng_state()
    verify(saved["cascade"], model, torch.utils.data.DataLoader(data(), batch_size=256), HELDOUT)
    assert torch.equal(torch.get_rng_state(), before)


def refused(folder: Path, *words: str, model: nn.Module | None = None, calibration: Any = None, heldout: Any = None) -> None:
    with pytest.raises(CertificateError) as caught:
        verify(folder, net() if model is None else model, data() if calibration is None else calibration, heldout)
    for word in words:
        assert re.search(word, str(caught.value)), f"{word!r} is not in {caught.value}"


# --- weights, model and data --------------------------------------------------------------------------------------------------------


def test_one_weight_changed(copied: Callable[[str], Path]) -> None:
    folder = copied("cascade")
    state = load_file(folder / "model.safetensors")
    state["2.weight"][0, 0] += 0.5
    save_file(state, folder / "model.safetensors")
    refused(folder, "stored weights are not those", "2: distance is stated as")


def test_weights_and_hash_changed_together(copied: Callable[[str], Path]) -> None:
    """A hash that was made to fit does not help: every number is recomputed."""
    for key, words in (("2.weight", "2: "), ("5.bias", "5: "), ("3.weight", "3.weight differs from the reference model")):
        folder = copied("parallel")
        state = load_file(folder / "model.safetensors")
        state[key][0] += 0.5
        save_file(state, folder / "model.safetensors")
        digest = {"weights_hash": hashes(nettrim.load(folder, into=net()))}
        edit(folder / "certificate.json", lambda c, digest=digest: c.update(digest))  # type: ignore[misc]
        refused(folder, words)


def test_certified_layer_left_out(copied: Callable[[str], Path]) -> None:
    folder = copied("budget")
    for name in ("certificate.json", "report.json"):
        edit(folder / name, lambda c: c["layers"].pop(1))
    refused(folder, "2.weight differs from the reference model, but belongs to no certified layer")


def test_another_reference_model(saved: dict[str, Path]) -> None:
    model = net()
    with torch.no_grad():
        model[0].bias[1] += 0.1  # type: ignore[operator, index]
    refused(saved["cascade"], "reference model's weights are not those", "give the model that was pruned", "do not recompute", model=model)


@pytest.mark.parametrize("change", ["values", "order", "batches", "fewer"])
def test_other_calibration_data(saved: dict[str, Path], change: str) -> None:
    x = data()
    other: Any = {
        "values": torch.cat([x[:-1], x[-1:] + 0.1]),
        "order": x.flip(0),
        "batches": list(x.split(20)),
        "fewer": x[:-1],
    }[change]
    refused(saved["cascade"], "calibration data are not those that the certificate was made for", "what prune was given", calibration=other)


def test_what_follows_from_other_inputs_is_counted_and_damage_is_still_named(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "r"
    shutil.copytree(saved["cascade"], folder)
    with pytest.raises(CertificateError) as caught:
        verify(folder, net(), data() + 0.5, progress=False)
    assert len(str(caught.value).splitlines()) == 3 and "of the statements do not recompute from these inputs" in str(caught.value)
    text = json.loads((folder / "certificate.json").read_text())
    text["holds"] = not text["holds"]
    (folder / "certificate.json").write_text(json.dumps(text))
    with pytest.raises(CertificateError, match="holds does not follow from the other entries"):
        verify(folder, net(), data() + 0.5, progress=False)


def test_what_is_no_folder(saved: dict[str, Path]) -> None:
    result = prune(net(), data(), NetTrim(epsilon=0.1), progress=False)
    for call in (lambda: verify(result, net(), data()), lambda: nettrim.load(result, net())):  # type: ignore[arg-type]
        with pytest.raises(InvalidInput, match="folder must be a path, found PruneResult; save it first"):
            call()
    with pytest.raises(InvalidInput, match="output folder must be a path, found int"):
        result.save(3)  # type: ignore[arg-type]


def test_other_heldout_data(saved: dict[str, Path]) -> None:
    refused(saved["cascade"], "held-out: the stored statement was made from other data", heldout=data(40, 2))
    with pytest.raises(InvalidInput, match="all of these samples are calibration data"):
        verify(saved["cascade"], net(), data(), data())


def test_new_heldout_statement(copied: Callable[[str], Path]) -> None:
    folder = copied("cascade")
    edit(folder / "certificate.json", lambda c: c.update(heldout=None))
    (folder / "report.html").unlink()  # it shows the statement
    again = verify(folder, net(), data(), data(30, 5))
    assert again.heldout is not None and again.heldout.samples == 30


# --- numbers improved by hand -------------------------------------------------------------------------------------------------------

LAYER: list[tuple[str, Any, str]] = [
    ("distance", 0.5, "distance is stated as"),
    ("distance_all_rows", 0.5, "distance_all_rows is stated as"),
    ("discrepancy", 0.5, "discrepancy is stated as"),
    ("reference_norm", 2.0, "reference_norm is stated as"),
    ("tolerance", 0.5, "tolerance is stated as"),
    ("tolerance", 2.0, "tolerance"),
    ("bound", 0.5, "bound is stated as"),
    ("gap", 0.1, "gap is stated as"),
    ("gap_level", 2.0, "gap_level is"),
    ("original_distance", 2.0, "original_distance is stated as"),
    ("rows", lambda v: v + 1, "rows is stated as"),
    ("rows_total", lambda v: v + 1, "rows_total is stated as"),
    ("activation", lambda v: "relu", "the certificate says relu, the model's graph says identity"),
    ("source", lambda v: "stated", "source of the activation is stated as 'stated', found as 'graph'"),
    ("holds", lambda v: False, "holds does not follow"),
    ("met", lambda v: False, "met is stated as False"),
    ("sound", lambda v: False, "sound is stated as False"),
    ("nonzeros", lambda v: v - 1, "nonzeros is stated as"),
    ("weights", lambda v: v + 1, "weights is stated as"),
    ("budget", lambda v: 3, "the certificate's budget is 3"),
    ("pattern", lambda v: "2:4", "the certificate's pattern is '2:4'"),
]


def changed(value: Any, change: Any) -> Any:
    return change(value) if callable(change) else value * change


@pytest.mark.parametrize(("field", "change", "words"), LAYER, ids=lambda v: str(v) if isinstance(v, (str, float)) else "")
@pytest.mark.parametrize("name", ["cascade", "parallel"])
def test_layer_numbers(copied: Callable[[str], Path], name: str, field: str, change: Any, words: str) -> None:
    folder = copied(name)
    index = 1  # followed by a LayerNorm: its activation reads identity; in the parallel scheme the chain still reaches it

    def alter(content: dict[str, Any]) -> None:
        layer = content["layers"][index]
        layer[field] = changed(0.01 if layer[field] in (None, 0) else layer[field], change)

    edit(folder / "certificate.json", alter)
    refused(folder, words)


NETWORK: list[tuple[str, Any]] = [
    ("achieved", 0.5),
    ("reference_norm", 2.0),
    ("agreement", lambda v: 1.5),
    ("rows", lambda v: v + 1),
    ("sound", lambda v: False),
    ("bound", lambda v: 1e-3),
    ("bound_from_tolerances", lambda v: 1e-3),
    ("bound_link_normalised", lambda v: 1e-3),
    ("output_layer", lambda v: "0"),
    ("scheme", lambda v: "parallel"),
    ("classes", lambda v: "dimension 0"),
    ("integer_changes", lambda v: 0),
    ("changed", lambda v: ["mask"]),
    ("not_compared", lambda v: ["cache (Cache)"]),
]


@pytest.mark.parametrize(("field", "change"), NETWORK, ids=lambda v: v if isinstance(v, str) else "")
def test_network_numbers(copied: Callable[[str], Path], field: str, change: Any) -> None:
    folder = copied("cascade")
    edit(folder / "certificate.json", lambda c: c["network"].update({field: changed(c["network"][field], change)}))
    refused(folder, f"network: {field} is stated as")


@pytest.mark.parametrize(
    ("field", "value"), [("class_change_bound", 0.001), ("exceed_bound", 0.001), ("exceed", 0), ("confidence", 0.99), ("samples", 4000)]
)
def test_heldout_numbers_are_checked_without_the_data(copied: Callable[[str], Path], field: str, value: Any) -> None:
    folder = copied("cascade")
    edit(folder / "certificate.json", lambda c: c["heldout"].update({field: value}))
    refused(folder, "held-out: ")


HELDOUT_FIELDS: dict[str, Any] = {
    "samples": 41,
    "data_hash": "0",
    "confidence": 0.9,
    "class_changes": 0,
    "class_change_bound": 0.001,
    "level": 0.2,
    "exceed": 1,
    "exceed_bound": 0.001,
    "accuracy_before": 0.975,
    "accuracy_after": 0.975,
    "overlap": 3,
    "unit": "row",
    "units": 39,
    "reason": "because",
    "note": "checked twice",
    "classes": "dimension 0 of the output",
    "classes_reason": "none",
    "predictions": 41,
    "predictions_changed": 0,
    "integer_changes": 0,
    "labelled": 20,
    "accuracy_reason": "none",
    "left_out": ["loss (one number for a whole batch)"],
}


@pytest.mark.parametrize("field", HELDOUT_FIELDS)
def test_every_heldout_field_is_checked_with_the_data(copied: Callable[[str], Path], field: str) -> None:
    folder = copied("cascade")
    edit(folder / "certificate.json", lambda c: c["heldout"].update({field: HELDOUT_FIELDS[field]}))
    refused(folder, "held-out: ", heldout=HELDOUT)


def test_the_list_of_heldout_fields_is_complete() -> None:
    assert list(HELDOUT_FIELDS) == [field.name for field in dataclasses.fields(nettrim.certificate.HeldOutCertificate)]


@pytest.mark.parametrize(
    ("field", "value"),
    [("accuracy_after", 1.5), ("confidence", 1.5), ("overlap", 99)],  # negative ones are no record
)
def test_what_cannot_be_is_refused_without_the_data(copied: Callable[[str], Path], field: str, value: float) -> None:
    folder = copied("cascade")
    edit(folder / "certificate.json", lambda c: c["heldout"].update({field: value}))
    refused(folder, f"held-out: {field}")
    refused(folder, f"held-out: {field}", heldout=HELDOUT)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scheme": "parallel"}, "scheme"),
        ({"seed": 9}, "seed is stated as 4, recomputed as 9"),
        ({"max_samples": 60}, "max_samples is not that of the certificate"),
        ({"method": "Magnitude"}, "method is stated as NetTrim"),
        ({"holds": False}, "holds does not follow from the other entries"),
        ({"arithmetic": "float32"}, "arithmetic is stated as 'float32'"),
    ],
)
def test_settings(copied: Callable[[str], Path], change: dict[str, Any], words: str) -> None:
    folder = copied("subsampled")
    edit(folder / "certificate.json", lambda c: c.update(change))
    refused(folder, words)


@pytest.mark.parametrize(
    ("field", "change", "words"),
    [
        ("nonzeros", lambda v: v - 1, "report, 0: nonzeros is stated as"),
        ("density", lambda v: v / 2, r"report.json: layers\[0\].density does not follow"),
        ("weights", lambda v: 2 * v, "report, 0: weights is stated as"),
        ("activation", lambda v: "identity", "report, 0: activation is stated as"),
        ("tolerance", lambda v: v / 2, "report, 0: tolerance is stated as"),
        ("target", lambda v: "epsilon 0.01", "its target is 'epsilon 0.01', the settings ask for 0.1"),
        ("target", lambda v: "epsilon small", "target 'epsilon small' cannot be read"),
        ("reference_norm", lambda v: v / 2, "report, 0: reference_norm is stated as"),
        ("distance", lambda v: v / 2, "report, 0: distance is stated as"),
        ("original_distance", lambda v: v + 1, "report, 0: original_distance is stated as"),
        ("rows", lambda v: v + 1, "report, 0: rows is stated as"),
        ("name", lambda v: "00", "its layers are not those of the certificate"),
    ],
)
def test_report_numbers(copied: Callable[[str], Path], field: str, change: Any, words: str) -> None:
    folder = copied("cascade")
    edit(folder / "report.json", lambda c: c["layers"][0].update({field: changed(c["layers"][0][field], change)}))
    refused(folder, words)


def test_a_tolerance_out_of_reach_cannot_be_passed_off_as_met(copied: Callable[[str], Path]) -> None:
    folder = copied("out of reach")
    statuses = [layer["status"] for layer in json.loads((folder / "report.json").read_text())["layers"]]
    assert "tolerance out of reach" in statuses
    index = statuses.index("tolerance out of reach")
    edit(folder / "report.json", lambda c: c["layers"][index].update(status="converged"))
    refused(folder, "status is 'converged', but it does not meet what was asked of it")


def test_a_stated_activation_cannot_be_passed_off_as_seen(copied: Callable[[str], Path]) -> None:
    """Stating relu for the last layer would hide all errors at negative outputs."""
    folder = copied("cascade")

    def alter(content: dict[str, Any]) -> None:
        content["layers"][-1]["activation"] = "relu"

    edit(folder / "certificate.json", alter)
    edit(folder / "report.json", alter)
    edit(folder / "report.json", lambda c: c["settings"].update(stated_activations={"7": "relu"}))
    refused(folder, "7: source of the activation is stated as 'graph', found as 'stated against the graph'")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scheme": "serial"}, "scheme must be"),
        ({"max_samples": 0}, "max_samples must be at least 1"),
        ({"layers": []}, "."),
        ({"network": None}, "must be an object"),
        ({"heldout": [1]}, "must be an object"),
    ],
)
def test_unusable_certificates_are_refused(copied: Callable[[str], Path], change: dict[str, Any], words: str) -> None:
    folder = copied("cascade")
    edit(folder / "certificate.json", lambda c: c.update(change))
    with pytest.raises(InvalidInput, match=words):
        verify(folder, net(), data())


def test_layers_of_another_kind_or_name_are_refused(copied: Callable[[str], Path]) -> None:
    for change, words in (
        (lambda c: c["layers"][0].update(name="9"), "no layer fits '9'"),
        (lambda c: c["layers"][0].update(name="2"), "a layer is named twice"),
        (lambda c: c["layers"][0].update(gap_kind="best"), "gap_kind 'best' is not known"),
        (lambda c: c["layers"][0].update(distance=float("inf")), "distance must be float"),
    ):
        folder = copied("cascade")
        edit(folder / "certificate.json", change)
        with pytest.raises(InvalidInput, match=words):
            verify(folder, net(), data())


def test_a_model_of_another_form_is_refused(saved: dict[str, Path]) -> None:
    with pytest.raises(InvalidInput):
        verify(saved["cascade"], nn.Sequential(nn.Linear(5, 3)), data())
    with pytest.raises(InvalidInput, match="cannot run"):
        verify(saved["cascade"], net(), torch.randn(10, 4))


def test_all_problems_are_listed(copied: Callable[[str], Path]) -> None:
    folder = copied("cascade")
    edit(folder / "certificate.json", lambda c: c["layers"][0].update(distance=0.0))
    edit(folder / "certificate.json", lambda c: c["network"].update(achieved=0.0))
    refused(folder, "0: distance", "network: achieved")


def test_a_page_made_from_other_files_is_refused(copied: Callable[[str], Path], saved: dict[str, Path]) -> None:
    folder = copied("cascade")
    assert verify(folder, net(), data()).not_checked
    (folder / "report.html").write_bytes((saved["budget"] / "report.html").read_bytes())
    refused(folder, "report.html: it was not made from this model.safetensors", "report.html: it was not made from this report.json")
    (folder / "report.html").unlink()
    verify(folder, net(), data())


def test_another_request_that_fits_everything_is_named_as_not_checked(copied: Callable[[str], Path]) -> None:
    """What was asked for stands in no weights: files that were changed together in all places can ask for less, or for nothing."""
    folder = copied("out of reach")

    def certificate(c: dict[str, Any]) -> None:
        for layer in c["layers"]:
            layer.update(tolerance=None, gap=None, gap_kind="", gap_level=0.0, met=True, holds=True, theorem=None)
        c["network"].update(bound_from_tolerances=None, bound_link_normalised=None)
        c.update(method=c["method"] + ", fine-tuned", verdict="holds", met=True, holds=True)

    def report(c: dict[str, Any]) -> None:
        for layer in c["layers"]:
            layer.update(tolerance=None, relative_tolerance=None, gap=None, target=layer["target"] + ", fine-tuned")
        c.update(method=c["method"] + ", fine-tuned")

    edit(folder / "certificate.json", certificate)
    edit(folder / "report.json", report)
    (folder / "report.html").unlink()
    again = verify(folder, net(), data())
    assert again.holds and again.not_checked is not None
    assert any(text.startswith("what was asked for (method") for text in again.not_checked)


@pytest.mark.parametrize("seed", [1, 3])
def test_a_tolerance_of_zero_that_is_met_up_to_rounding_verifies(tmp_path: Path, seed: int) -> None:
    """Behind a batch-norm that multiplies all by zero, a distance of rounding alone takes the place of a tolerance of zero."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.LeakyReLU(), nn.Linear(6, 3)).eval()
    nn.init.zeros_(model[1].weight)  # type: ignore[arg-type]
    for values in (model[1].bias, model[1].running_mean):
        nn.init.normal_(values)  # type: ignore[arg-type]
    nn.init.uniform_(model[1].running_var, 0.2, 2.0)  # type: ignore[arg-type]
    x = torch.randn(50, 4)
    result = nettrim.prune(model, x, NetTrim(epsilon=0.0), scheme="parallel", progress=False)
    assert result.certificate.holds and verify(result.save(tmp_path / "result"), model, x) == result.certificate
