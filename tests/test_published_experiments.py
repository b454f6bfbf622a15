"""The published MNIST experiments on scikit-learn's digits: training, fine-tuning, curves, noise, and both schemes, on tiny sizes."""

from __future__ import annotations

import copy
import io
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import nettrim
from nettrim import staging
from nettrim.experiments import (
    cascade_vs_parallel,
    cascade_vs_parallel_figures,
    curves,
    mnist_fc,
    mnist_fc_figures,
    mnist_lenet_fc,
    mnist_lenet_fc_figures,
    robustness,
    robustness_figures,
)
from nettrim.experiments import published_training as training
from nettrim.experiments.curves import Point
from nettrim.experiments.datasets import Dataset, load
from nettrim.experiments.published_training import Architecture, Recipe, Tuning
from nettrim.status import InvalidInput

FC = Architecture((1, 8, 8), (), (12, 8), 10)
LENET = Architecture((1, 8, 8), (3, 4), (12,), 10)
SHORT = Recipe(iterations=150, batch_size=50, keep=0.9, l2=1e-4)
TUNE = Tuning(steps=(5, 10), batch_size=50)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


def weights_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def text_of(table: Any) -> str:
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


# --- networks and training


def test_architectures_are_the_published_ones() -> None:
    fc = Architecture((1, 28, 28), (), mnist_fc.HIDDEN, 10)
    assert fc.name == "784-300-1000-100-10" and fc.layers == ("fc1", "fc2", "fc3", "fc4")
    lenet = Architecture((1, 28, 28), mnist_lenet_fc.CHANNELS, mnist_lenet_fc.HIDDEN, 10)
    assert lenet.name == "conv5x5x32, conv5x5x64, 3136-512-10"
    model = lenet.build(0)
    counts = [module.weight.numel() for module in model if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert counts == [800, 51_200, 1_605_632, 5_120]
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    first = model.get_submodule("fc1")
    assert isinstance(first, nn.Linear)
    weight = first.weight.detach()
    # 0.088 is the deviation of a normal one of 0.1 that is cut at 0.2
    assert float(weight.abs().max()) <= 0.2 and float(weight.std()) == pytest.approx(0.088, rel=0.01)
    assert torch.all(first.bias == 0.1)
    with pytest.raises(InvalidInput, match="at least one unit"):
        Architecture((1, 2, 2), (3, 4), (5,), 10).build(0)


def test_training_is_deterministic_learns_and_leaves_global_randomness_alone(digits: Dataset) -> None:
    state = torch.get_rng_state()
    models = [FC.build(seed) for seed in (0, 0, 1)]
    recipe = replace(SHORT, learning_rate=5e-3)
    for model, seed in zip(models, (0, 0, 1), strict=True):
        training.train(model, digits.train_images, digits.train_labels, recipe, seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weights_of(models[0]), weights_of(models[1]))
    assert not torch.equal(weights_of(models[0]), weights_of(models[2]))
    assert training.accuracy(models[0], digits.test_images, digits.test_labels) > 0.7


def test_one_step_is_adam_on_the_penalised_loss(digits: Dataset) -> None:
    """Against autograd on the loss written out, penalties included; biases carry none."""
    recipe = Recipe(iterations=1, batch_size=len(digits.train_labels), keep=1.0, l1=0.03, l2=0.5)
    model, other = FC.build(3), FC.build(3)
    training.train(model, digits.train_images, digits.train_labels, recipe, 0)
    linear = [module for module in other if isinstance(module, nn.Linear)]
    penalty = sum((0.03 * layer.weight.abs().sum() + 0.25 * layer.weight.square().sum() for layer in linear), torch.zeros(()))
    optimizer = torch.optim.Adam(other.parameters(), lr=1e-3)
    (nn.functional.cross_entropy(other(digits.train_images), digits.train_labels) + penalty).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert torch.allclose(weights_of(model), weights_of(other), atol=1e-5)
    assert not torch.allclose(weights_of(model), weights_of(FC.build(3)), atol=1e-5)


def test_the_learning_rate_falls_in_steps(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    monkeypatch.setattr(training, "_decay", lambda optimizer, rate: rates.append(rate))
    recipe = Recipe(iterations=7, batch_size=10, learning_rate=0.5, decay=0.1, decay_every=3)
    training.train(FC.build(0), digits.train_images, digits.train_labels, recipe, 0)
    assert rates == pytest.approx([0.5] * 3 + [0.05] * 3 + [0.005])


def test_dropout_stands_before_every_fully_connected_layer() -> None:
    """With weights of one and no bias, a layer's outputs count the inputs that dropout kept."""
    model = Architecture((1, 4, 4), (), (), 2).build(0)
    last = model.get_submodule("fc1")
    assert isinstance(last, nn.Linear)
    nn.init.ones_(last.weight)
    nn.init.zeros_(last.bias)
    generator = torch.Generator().manual_seed(0)
    sums = training._dropped(model, torch.ones(4000, 1, 4, 4), 0.25, generator)[:, 0].detach() * 0.25
    assert torch.equal(sums, sums.round()) and sums.min() < sums.max()
    assert float(sums.mean()) == pytest.approx(4, rel=0.05)
    assert torch.equal(training._dropped(model, torch.ones(3, 1, 4, 4), 1.0, generator), model(torch.ones(3, 1, 4, 4)))


def test_every_epoch_shows_every_image_once() -> None:
    rows = torch.cat(list(training._batches(7, 3, 7, torch.Generator().manual_seed(0))))
    for epoch in rows.split(7):
        assert sorted(epoch.tolist()) == list(range(7))
    assert rows[:7].tolist() != rows[7:14].tolist()


def test_trained_networks_are_kept_and_checked(digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = training.train
    monkeypatch.setattr(training, "train", lambda *arguments: (calls.append(1), original(*arguments)))
    recipe = replace(SHORT, iterations=5)
    first = training.trained(digits, FC, recipe, 0, tmp_path)
    again = training.trained(digits, FC, recipe, 0, tmp_path)
    assert len(calls) == 1 and torch.equal(weights_of(first), weights_of(again))
    training.trained(digits, FC, replace(recipe, l1=0.1), 0, tmp_path)
    training.trained(digits, FC, recipe, 1, tmp_path)
    assert len(calls) == 3 and len(list(tmp_path.iterdir())) == 3
    training.trained(digits, FC, recipe, 0, tmp_path, reuse=False)
    assert len(calls) == 4
    for path in tmp_path.iterdir():
        content = bytearray(path.read_bytes())
        content[-1] ^= 1  # one bit of one weight
        path.write_bytes(bytes(content))
    with pytest.warns(UserWarning, match="is not used"):
        repaired = training.trained(digits, FC, recipe, 0, tmp_path)
    assert len(calls) == 5 and torch.equal(weights_of(first), weights_of(repaired))


def test_fine_tuning_keeps_zeros_and_moves_the_rest(digits: Dataset) -> None:
    model = FC.build(0)
    training.train(model, digits.train_images, digits.train_labels, SHORT, 0)
    pruned = nettrim.prune(model, digits.train_images[:100], nettrim.Magnitude(sparsity=0.6), progress=False).model
    before = copy.deepcopy(pruned)
    reached = training.finetune(pruned, digits, Tuning(steps=(20, 40), batch_size=50, learning_rate=0.05), 0)
    assert [step for step, _ in reached] == [20, 40]
    assert reached[-1][1] == training.accuracy(pruned, digits.test_images, digits.test_labels)
    assert reached[-1][1] > training.accuracy(before, digits.test_images, digits.test_labels)
    for old, new in zip(before, pruned, strict=True):
        if isinstance(old, nn.Linear) and isinstance(new, nn.Linear):
            assert torch.equal(old.weight == 0, new.weight == 0)
            assert not torch.equal(old.weight, new.weight) and not torch.equal(old.bias, new.bias)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe(iterations=0), "iterations"),
        (lambda: Recipe(keep=0.0), "keep"),
        (lambda: Recipe(l1=-1.0), "l1"),
        (lambda: Recipe(decay=1.5), "decay"),
        (lambda: Tuning(steps=()), "steps"),
        (lambda: Tuning(steps=(5, 5)), "steps"),
        (lambda: Tuning(learning_rate=0.0), "learning_rate"),
        (lambda: curves.settings("magnitude", 0.1), "method"),
    ],
)
def test_bad_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        make()


def test_a_loss_that_is_not_finite_is_an_error(digits: Dataset) -> None:
    model = FC.build(0)
    with pytest.raises(InvalidInput, match="finite"):
        training.train(model, digits.train_images * math.nan, digits.train_labels, replace(SHORT, iterations=1), 0)


# --- the curves


def run_fc(out: Path, **changes: Any) -> curves.Summary:
    settings: dict[str, Any] = {"samples": 150, "gains": (0.05, 0.3), "hidden": FC.hidden, "recipe": SHORT, "tuning": TUNE}
    return mnist_fc.run(out=out, dataset="digits", **settings | changes)


@pytest.fixture(scope="module")
def fc(tmp_path_factory: pytest.TempPathFactory) -> tuple[curves.Summary, Path]:
    out = tmp_path_factory.mktemp("fc")
    return run_fc(out), out


def test_curves_hold_what_they_promise(fc: tuple[curves.Summary, Path]) -> None:
    summary, _ = fc
    assert summary.holds and summary.theorems_hold
    assert summary.smallest_slack is not None and summary.smallest_slack >= 1 - 1e-6
    points = {(p.method, p.gain): p for p in summary.points}
    assert len(points) == 2 * 3 * 2
    for method in curves.METHODS:
        assert points[method, 0.3].kept < points[method, 0.05].kept < 1
        for gain in (0.05, 0.3):
            own, like = points[method, gain], points[curves.MAGNITUDE + method, gain]
            assert [layer.nonzeros for layer in own.layers] == [layer.nonzeros for layer in like.layers]
            assert own.scheme == "parallel" and own.bound is not None and own.theorem is not None
            assert own.discrepancy <= own.bound and own.discrepancy <= own.theorem
            assert own.slack == pytest.approx(own.bound / own.discrepancy)
            assert [step for step, _ in own.tuned] == [step for step, _ in like.tuned] == [5, 10]
            for layer in own.layers:
                assert layer.tolerance == pytest.approx(gain) and layer.distance <= gain * (1 + 1e-9)
                assert layer.discrepancy <= (layer.bound or 0) * (1 + 1e-9)
            assert (own.layers[0].violation is not None) == (method == "published")
            assert all(layer.tolerance is None for layer in like.layers)
    # the preimage program asks for less than the published one, up to the solvers' gap
    assert points["preimage l1", 0.3].kept <= 1.05 * points["published", 0.3].kept
    assert points["preimage l0", 0.3].kept < points["preimage l1", 0.3].kept


def test_curves_are_written_and_read_back(fc: tuple[curves.Summary, Path]) -> None:
    summary, out = fc
    assert all((out / file).stat().st_size > 0 for file in summary.files)
    assert json.loads((out / "mnist_fc.json").read_text()) == staging.mark("experiment") | summary.to_dict()
    lines = [json.loads(line) for line in (out / "mnist_fc.jsonl").read_text().splitlines()]
    assert lines[0]["samples"] == 150 and lines[0]["series"]["published settings"]["network"] == "64-12-8-10"
    records = [Point.from_record(line["record"]) for line in lines[1:] if "layers" in line["record"]]
    assert tuple(records) == summary.points
    assert (out / "mnist_fc.svg").read_text().count("nan") == 0


def test_an_interrupted_run_continues(fc: tuple[curves.Summary, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary, out = fc
    lines = (out / "mnist_fc.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "mnist_fc.jsonl").write_text("".join(lines[:-2]) + lines[-2][:20])  # cut off within a record
    pruned: list[object] = []
    original = curves.prune
    monkeypatch.setattr(curves, "prune", lambda *a, **k: (pruned.append(a), original(*a, **k))[1])
    seen: list[tuple[int, int]] = []
    again = run_fc(tmp_path, progress=lambda done, total, what: seen.append((done, total)))
    assert len(pruned) == 2 and seen[-1] == (13, 13)
    for point, other in zip(summary.points, again.points, strict=True):  # the same again, but for the time that it took
        assert replace(point, seconds=0) == replace(other, seconds=0)
    with pytest.raises(InvalidInput, match="must belong"):
        run_fc(tmp_path, samples=140)


def test_magnitude_keeps_exactly_as_many_weights(fc: tuple[curves.Summary, Path], digits: Dataset) -> None:
    """Also in a layer that Net-Trim left nothing of."""
    like = fc[0].points[0]
    counts = (0, 1, 80)
    layers = tuple(replace(layer, nonzeros=count) for layer, count in zip(like.layers, counts, strict=True))
    result = nettrim.prune(FC.build(0), digits.train_images[:20], curves.as_many(replace(like, layers=layers)), progress=False)
    assert tuple(layer.nonzeros for layer in result.report.layers) == counts


def test_samples_must_exist(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="1437"):
        run_fc(tmp_path, samples=1438)


def test_the_table_shows_every_network(fc: tuple[curves.Summary, Path]) -> None:
    summary, _ = fc
    text = text_of(mnist_fc_figures.table(summary))
    assert text.count("preimage program, l0") == 2 and text.count("holds") == 6
    assert f"{100 * summary.trained[0].accuracy:.2f}" in text
    assert "certificates hold; published bounds hold" in text
    broken = replace(summary, holds=False, theorems_hold=False)
    assert "do NOT all hold" in text_of(mnist_fc_figures.table(broken)) and "EXCEEDED" in text_of(mnist_fc_figures.table(broken))


def test_lenet_prunes_only_its_fully_connected_layers(tmp_path: Path) -> None:
    summary = mnist_lenet_fc.run(
        out=tmp_path,
        dataset="digits",
        samples=100,
        gains=(0.2,),
        methods=("published",),
        channels=LENET.channels,
        hidden=LENET.hidden,
        recipe=SHORT,
        tuning=TUNE,
        example_recipe=replace(SHORT, iterations=20),
        example_tuning=TUNE,
    )
    assert summary.holds and len(summary.points) == 4 and len(summary.trained) == 2
    for point in summary.points:
        assert [(layer.name, layer.weights) for layer in point.layers] == [("fc1", 16 * 12), ("fc2", 120)]
    assert "as published" not in text_of(mnist_lenet_fc_figures.table(summary))  # those numbers are of MNIST
    text = text_of(mnist_lenet_fc_figures.table(replace(summary, published=(mnist_lenet_fc.PUBLISHED_EXAMPLE,))))
    assert "6.8 / 9.6" in text and "99.21 → 98.48" in text and "validation" in text
    assert mnist_lenet_fc.PUBLISHED_EXAMPLE.kept == pytest.approx(0.068, abs=5e-4)
    assert all((tmp_path / file).stat().st_size > 0 for file in summary.files)


# --- noise


def test_noise_has_the_stated_norm() -> None:
    images = torch.rand(50, 1, 8, 8)
    noise = robustness.noisy(images, 1.5, torch.Generator().manual_seed(0)) - images
    assert torch.allclose(noise.flatten(1).norm(dim=1), 1.5 * images.flatten(1).norm(dim=1), rtol=1e-4)
    assert abs(float(noise.mean())) < 0.05


def test_robustness_curves(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"dataset": "digits", "samples": 100, "networks": ("fc",), "gains": (0.1,), "methods": ("preimage l1",)}
    settings |= {"hidden": FC.hidden, "recipe": SHORT, "repeats": 3, "levels": (0.0, 0.5, 3.0)}
    summary = robustness.run(out=tmp_path, **settings)
    dense, pruned = summary.curves
    assert dense.method == "" and dense.kept == 1 and pruned.kept < 1 and summary.holds and summary.theorems_hold
    for curve in summary.curves:
        assert curve.deviation[0] == 0 and curve.deviation[2] > 0
        assert curve.mean[0] > curve.mean[1] > curve.mean[2]
    trained = training.trained(load("digits"), FC, SHORT, 0, tmp_path / "cache")
    digits = load("digits")
    assert dense.mean[0] == training.accuracy(trained, digits.test_images, digits.test_labels)
    gained = sum(p - d for p, d in zip(pruned.mean[1:], dense.mean[1:], strict=True)) / 2
    assert summary.gained["fc"]["preimage l1, gain 0.1"] == pytest.approx(gained)
    assert json.loads((tmp_path / "robustness.json").read_text()) == staging.mark("experiment") | summary.to_dict()
    assert robustness.run(out=tmp_path, **settings) == summary  # read from the records
    text = text_of(robustness_figures.table(summary))
    assert f"{100 * pruned.mean[2]:.1f}" in text and f"{100 * gained:+.2f}" in text
    with pytest.raises(InvalidInput, match="networks"):
        robustness.run(out=tmp_path, **settings | {"networks": ("vgg",)})
    with pytest.raises(InvalidInput, match="repeats"):
        robustness.run(out=tmp_path, **settings | {"repeats": 0})


# --- the two schemes


def test_cascade_against_parallel(tmp_path: Path) -> None:
    summary = cascade_vs_parallel.run(
        out=tmp_path,
        dataset="digits",
        samples=150,
        keeps=(1.0,),
        penalties=(0.0, 1e-3),
        parallel_gains=(0.05,),
        cascade_gains=(0.02, 0.3),
        hidden=FC.hidden,
        recipe=replace(SHORT, iterations=200),
    )
    assert summary.holds and summary.theorems_hold and len(summary.points) == 6
    for point in summary.points:
        assert point.layers[0].tolerance == pytest.approx(point.gain)
        if point.scheme == "cascade":
            # no layer but the first takes the gain itself: the rule is sqrt(1.1) times what its own weights leave
            assert point.layers[-1].tolerance is not None and point.layers[-1].distance <= point.layers[-1].tolerance * (1 + 1e-9)
            assert point.discrepancy <= point.layers[-1].tolerance * (1 + 1e-9)
            assert point.layers[-1].tolerance != pytest.approx(point.gain, rel=1e-3)
    assert summary.compared == len(summary.comparisons) > 0
    for comparison in summary.comparisons:
        ends = [p for p in summary.points if p.scheme == "cascade" and p.series == cascade_vs_parallel.series(1.0, comparison.l1)]
        assert min(p.kept for p in ends) < comparison.cascade < max(p.kept for p in ends)
    text = text_of(cascade_vs_parallel_figures.table(summary))
    assert text.count("cascade") >= 4 and f"sparser at {summary.sparser} of {summary.compared} points" in text
    called: list[object] = []
    figure = cascade_vs_parallel_figures.picture(summary, panel=called.append)
    assert called == [figure.axes[-1]] and len(figure.axes) == 2
    assert json.loads((tmp_path / "cascade_vs_parallel.json").read_text()) == staging.mark("experiment") | summary.to_dict()


def test_the_cascade_is_read_between_its_points(fc: tuple[curves.Summary, Path]) -> None:
    base = fc[0].points[0]
    name = cascade_vs_parallel.series(1.0, 0.0)

    def point(scheme: str, discrepancy: float, kept: float) -> Point:
        layers = tuple(replace(layer, weights=100, nonzeros=round(100 * kept)) for layer in base.layers)
        return replace(base, series=name, scheme=scheme, discrepancy=discrepancy, kept=kept, layers=layers)

    own = [point("cascade", 0.01, 0.4), point("cascade", 0.04, 0.1), point("parallel", 0.02, 0.3), point("parallel", 0.05, 0.2)]
    (found,) = cascade_vs_parallel.compare([cascade_vs_parallel.Training(1.0, 0.0, 0.9)], own)
    # half-way in the logarithm of the discrepancy is the geometric mean of the shares; 0.05 is outside the cascade's range
    assert found.discrepancy == 0.02 and found.cascade == pytest.approx(0.2) and found.parallel == 0.3
    assert found.cascade_layers == pytest.approx((0.2,) * len(base.layers))
    assert asdict(found)["gain"] == base.gain
