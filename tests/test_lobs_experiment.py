"""The L-OBS experiment on a small set, its retraining, and the accumulated error against its definition."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from nettrim import LOBS, prune, staging
from nettrim.experiments import lobs_figures, lobs_networks, lobs_study, reproduce
from nettrim.experiments.lobs_bound import accumulate, accumulated
from nettrim.experiments.lobs_networks import CONVOLUTIONAL, FULLY_CONNECTED, SHARES
from nettrim.experiments.lobs_retraining import retrain
from nettrim.status import InvalidInput


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, 3)
        ).eval()


def data(count: int = 60) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, 8, 8, generator=g), torch.randint(3, (count,), generator=g)


def test_accumulated_errors_add_up_as_the_theorem_says() -> None:
    assert accumulate((0.5,), (9.0,)) == 0.5
    assert accumulate((0.5, 0.1, 0.2), (9.0, 2.0, 3.0)) == pytest.approx(0.5 * 2 * 3 + 0.1 * 3 + 0.2)


@pytest.mark.parametrize("sparsity", [0.3, 0.8])
@pytest.mark.parametrize("method", [LOBS, partial(LOBS, form="greedy")])
def test_the_bounds_stand_in_the_order_that_is_proven(method: Any, sparsity: float) -> None:
    """docs/lobs.md, Propositions 2 and 3: achieved <= certified <= accumulated."""
    model, (images, _) = network(), data()
    result = prune(model, images, method(sparsity=sparsity), scheme="parallel", layers=["0", "4", "6"], progress=False)
    found = accumulated(model, result.model, images)
    certified = result.certificate.network
    assert certified.bound is not None
    root = math.sqrt(len(images))
    assert found.achieved == pytest.approx(certified.achieved / root, rel=1e-9)
    assert found.reference == pytest.approx(certified.reference_norm / root, rel=1e-9)
    assert found.achieved < certified.bound / root < found.bound and found.holds
    x = images.double()
    before, after = (m.double() for m in (model, result.model))
    with torch.no_grad():  # the second layer by hand
        inner = before[:4](x)
        assert found.errors[1] == pytest.approx(float((after[4](inner) - before[4](inner)).norm()) / root, rel=1e-9)
    norms = [float(after[index].weight.detach().norm()) for index in (0, 4, 6)]
    assert found.factors == pytest.approx((3 * norms[0], norms[1], norms[2]))  # every entry is read by 9 patches at most
    for layer, error in zip(result.certificate.layers, found.errors, strict=True):
        assert layer.distance_all_rows <= error * root * (1 + 1e-9)


def test_networks_without_a_proof_are_refused() -> None:
    images, _ = data()
    for module in (nn.MaxPool2d(3, 2), nn.BatchNorm2d(4), nn.Sigmoid()):
        model = nn.Sequential(nn.Conv2d(1, 4, 3), module)
        with pytest.raises(InvalidInput, match=f"module '1' must be a layer.*found {type(module).__name__}"):
            accumulated(model, model, images)


def test_retraining_keeps_zeros_and_repeats_itself() -> None:
    images, labels = data()
    tuned = []
    for _ in range(2):
        model = network()
        with torch.no_grad():
            model[4].weight[torch.rand(12, 36, generator=torch.Generator().manual_seed(2)) < 0.7] = 0
        zeros = model[4].weight == 0
        before = nn.functional.cross_entropy(model(images), labels).item()
        retrain(model, images, labels, 40, seed=3, batch_size=25, learning_rate=0.01)
        assert torch.equal(model[4].weight == 0, zeros)
        assert nn.functional.cross_entropy(model(images), labels).item() < before
        assert not model.training and all(p.grad is None for p in model.parameters())
        tuned.append(model[4].weight)
    assert torch.equal(*tuned)
    for settings in ({"iterations": 0}, {"iterations": True}, {"iterations": 5, "learning_rate": 0.0}):
        with pytest.raises(InvalidInput, match="iterations must be a whole number"):
            retrain(model, images, labels, **{"seed": 0, **settings})


def test_shares_keep_at_most_what_is_asked_for() -> None:
    sizes = {FULLY_CONNECTED: (235_200, 30_000, 1_000), CONVOLUTIONAL: (500, 25_000, 400_000, 5_000)}
    for (name, target), shares in SHARES.items():
        kept = sum(round(share * size) for share, size in zip(shares, sizes[name], strict=True)) / sum(sizes[name])
        assert 0.95 * target < kept <= target
    rows = {(row.network, row.kept) for row in lobs_networks.PUBLISHED}
    assert rows == set(SHARES)


def test_the_experiment_on_digits_writes_what_it_found_and_continues(tmp_path: Path) -> None:
    said: list[str] = []
    first = lobs_study.run(out=tmp_path, quick=True, dataset="digits", samples=80, progress=lambda done, total, what: said.append(what))
    assert first.holds and set(first.networks) == {FULLY_CONNECTED} and not first.published  # 8 x 8 pixels: no LeNet-5
    assert all((tmp_path / file).stat().st_size > 0 for file in first.files) and said[-1] == "done"
    assert json.loads((tmp_path / "lobs.json").read_text()) == staging.mark("experiment") | json.loads(json.dumps(first.to_dict()))
    own = {point.method: point for point in first.points}
    assert own["greedy, with biases"].distances[0] < own["its weights, refitted"].distances[0] < own["L-OBS"].distances[0]
    for point in first.points:
        assert point.iterations == lobs_study.QUICK_ITERATIONS and point.layers == pytest.approx((0.051, 0.2, 0.6), abs=0.002)
        assert point.certified is not None and point.achieved <= point.certified
        assert (point.accumulated is None) == (point.method == "Net-Trim")
        assert point.accumulated is None or point.certified <= point.accumulated
    lines = (tmp_path / "lobs.jsonl").read_text().splitlines()
    (tmp_path / "lobs.jsonl").write_text("\n".join(lines[:3]) + "\n")  # as after an interruption
    outcome = reproduce.run("lobs", reproduce.Settings(tmp_path, quick=True, dataset="digits", samples=80))
    again = [{**point, "seconds": 0.0} for point in outcome.numbers["points"]]
    assert again == [{**point, "seconds": 0.0} for point in first.to_dict()["points"]]
    console = Console(width=250, record=True)
    console.print(outcome.table)
    shown = console.export_text()
    assert "every certificate and every accumulated-error bound holds" in shown and "best form of OBS" in shown
    with pytest.raises(InvalidInput, match="LeNet-5 needs images of at least 16 x 16"):
        lobs_study.run(out=tmp_path / "o", dataset="digits", networks=[CONVOLUTIONAL])
    with pytest.raises(InvalidInput, match="networks must be among"):
        lobs_study.run(out=tmp_path / "o", dataset="digits", networks=["LeNet"])


def test_the_table_sets_our_numbers_beside_the_published_ones() -> None:
    def point(method: str, pruned: float) -> lobs_study.Point:
        moved = {"achieved": 0.1, "certified": 0.5, "accumulated": 4.0, "distances": (0.1,), "holds": True, "seconds": 1.0}
        errors = {"dense": 0.0165, "pruned": pruned, "retrained": 0.0171, "iterations": 510, "rounds": 1}
        return lobs_study.Point(network=FULLY_CONNECTED, method=method, target=0.07, kept=0.0699, layers=(0.0699,), **errors, **moved)

    points = tuple(point(label, 0.05 - 0.005 * i) for i, label in enumerate(lobs_study.FORMS))
    rows = tuple(row for row in lobs_networks.PUBLISHED if row.network == FULLY_CONNECTED)
    best = {FULLY_CONNECTED: "greedy (OBS)"}
    summary = lobs_study.Summary("mnist", 0, False, {FULLY_CONNECTED: ""}, points, rows, best, True, ())
    console = Console(width=250, record=True)
    console.print(lobs_figures.table(summary))
    shown = " ".join(console.export_text().split())
    assert (
        "published: L-OBS" in shown and "3.10" in shown and "at or below the published 3.10% at 7%; retrained 1.71%, dense 1.65%" in shown
    )
    assert "costs +1.00% by its updates and +0.50% by sorting once" in shown
    assert len(lobs_figures.picture(summary).axes) == 2
