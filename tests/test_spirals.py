"""Spirals: points, training, pruning records against the library itself, the search, the experiment on tiny sizes, the schemes."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import nn

import nettrim
from nettrim import staging
from nettrim.experiments import spiral_pruning, spiral_schemes, spiral_schemes_figures, spiral_training, spirals, spirals_figures
from nettrim.experiments.models import fully_connected
from nettrim.experiments.spiral_pruning import LayerRecord, Points, Pruned, Pruner
from nettrim.experiments.spiral_schemes import SpiralPoint
from nettrim.experiments.spiral_training import Recipe, Spirals
from nettrim.status import InvalidInput

EASY = Spirals(points=40, turns=0.5)
SHORT = Recipe(steps=80, learning_rate=0.02, keep=0.9)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> nn.Sequential:
    return spiral_training.trained(EASY, 12, SHORT, 0, 3, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def points() -> Points:
    return spirals.points_of(EASY, 0)


def test_points_lie_on_two_arms() -> None:
    still = Spirals(points=60, turns=1.3, inner=0.3, noise=0.0)
    x, labels = spiral_training.draw(still, 5)
    assert x.shape == (60, 2) and x.dtype == torch.float32 and int(labels.sum()) == 30
    radius = x.double().norm(dim=1)
    assert float(radius.min()) >= 0.3 and float(radius.max()) <= 1.0
    turned = torch.atan2(x[:, 1], x[:, 0]).double() - 2 * math.pi * 1.3 * radius - math.pi * labels
    assert torch.allclose(torch.cos(turned), torch.ones(60, dtype=torch.float64), atol=1e-5)
    again, _ = spiral_training.draw(still, 5)
    other, _ = spiral_training.draw(still, 5, heldout=True)
    assert torch.equal(x, again) and not torch.equal(x, other)


def test_training_repeats_itself_and_leaves_the_global_state(tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = spiral_training.trained(EASY, 8, SHORT, 0, 1, tmp_path)
    assert torch.equal(torch.rand(3), expected)
    (stored,) = tmp_path.glob("*.safetensors")
    before = stored.read_bytes()
    cached = spiral_training.trained(EASY, 8, SHORT, 0, 1, tmp_path)
    fresh = spiral_training.trained(EASY, 8, SHORT, 0, 1, tmp_path, reuse=False)
    assert stored.read_bytes() == before
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, cached.state_dict()[name]) and torch.equal(weight, fresh.state_dict()[name])
    other = spiral_training.trained(EASY, 8, SHORT, 0, 2, tmp_path)
    assert not torch.equal(first.state_dict()["1.weight"], other.state_dict()["1.weight"])


def test_training_separates_and_l1_leaves_small_weights() -> None:
    x, labels = spiral_training.draw(EASY, 0)
    counts = {}
    for l1 in (0.0, 3e-3):
        model = fully_connected([2, 20, 20, 2], 0)
        spiral_training.train(model, x, labels, Recipe(steps=300, keep=1.0, l1=l1), 0)
        assert float((model(x).argmax(dim=1) == labels).double().mean()) == 1.0
        assert not model.training
        counts[l1] = spiral_training.counted(model)
    assert counts[0.0][1] > 380 and counts[3e-3][1] < 200


def test_counting_leaves_out_small_weights_and_biases() -> None:
    model = fully_connected([2, 3, 3, 2], 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
        model[3].weight[0] = torch.tensor([0.0, 0.0009, -0.0011])
    assert spiral_training.counted(model) == (6, 7, 6)


@pytest.mark.parametrize("way", spiral_pruning.WAYS)
def test_a_record_says_what_the_library_does(way: str, trained: nn.Sequential, points: Points) -> None:
    epsilon = {"1": 0.02, "3": 0.1, "5": 0.05}
    gamma = 1.2 if way == "published" else None
    pruned = Pruner(trained, points).prune(way, epsilon, gamma, 0.9 if gamma else 1.0)
    with spiral_training.one_thread():
        method = spiral_pruning.method_of(way, epsilon, gamma, 0.9 if gamma else 1.0)
        result = nettrim.prune(trained, points.inputs, method, progress=False)
    linear = [module for module in result.model if isinstance(module, nn.Linear)]
    assert pruned.nonzeros == tuple(int((module.weight != 0).sum()) for module in linear)
    assert tuple(layer.biases for layer in pruned.layers) == tuple(int((module.bias != 0).sum()) for module in linear)
    for inputs, rd, rtol in ((points.inputs, pruned.rd, 1e-9), (points.heldout, pruned.rd_heldout, 1e-3)):
        with torch.no_grad():
            before, after = trained.double()(inputs.double()), result.model.double()(inputs.double())
        trained.float(), result.model.float()
        assert rd == pytest.approx(float((after - before).norm() / before.norm()), rel=rtol)
    assert pruned.holds and pruned.theorems_hold and pruned.slacks and min(pruned.slacks) >= 1 - 1e-6
    assert pruned.layers[2].bound is not None and pruned.rd <= pruned.layers[2].bound * (1 + 1e-9)
    assert (pruned.layers[0].violation is not None) == (way == "published")
    assert Pruned.from_record(json.loads(json.dumps(dataclasses.asdict(pruned)))) == pruned


def test_gamma_scales_the_original_weights_distance(trained: nn.Sequential, points: Points) -> None:
    pruner = Pruner(trained, points)
    loose = pruner.prune("published", 0.05, 1.1)
    assert len(pruner.known) == 3
    tight = pruner.prune("published", 0.05, 1.1, 0.8)
    assert len(pruner.known) == 4  # only the last layer is solved again
    assert tight.nonzeros[:2] == loose.nonzeros[:2] and tight.layers[2].original == loose.layers[2].original
    for pruned, kappa in ((loose, 1.0), (tight, 0.8)):
        tolerance = pruned.layers[2].tolerance
        assert tolerance is not None and tolerance == pytest.approx(kappa * math.sqrt(1.1) * pruned.layers[2].original)


def record(way: str, nonzeros: tuple[int, int, int], rd: float, original: float = 0.0) -> Pruned:
    """A made-up pruning."""
    layers = tuple(
        LayerRecord(name, 100, n, 1, "converged", rd, original, rd, 2 * rd, 2.0, 3 * rd, 3.0, None, None, 1)
        for name, n in zip(spiral_pruning.LAYERS, nonzeros, strict=True)
    )
    return Pruned(way, "cascade", dict.fromkeys(spiral_pruning.LAYERS, 0.1), 1.1, 1.0, layers, rd, 2 * rd, 2 * rd, 2.0, 1.0, 0.9, True, 0.1)


def test_search_goes_from_loose_to_tight(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def made_up(self: Pruner, way: str, epsilon: dict[str, float]) -> Pruned:
        asked.append(epsilon["3"])
        return record(way, (5, round(10 / epsilon["3"]), 5), 0.15 * epsilon["3"])  # below 0.02 from 0.133 down

    monkeypatch.setattr(Pruner, "prune", made_up)
    tried = Pruner(nn.Sequential(), None).search("preimage l1")  # type: ignore[arg-type]
    assert asked == [0.3, 0.2, 0.15, 0.1, math.sqrt(0.15 * 0.1)]
    chosen, reached = spiral_pruning.best(tried)
    assert reached and chosen == tried[-1]
    chosen, reached = spiral_pruning.best(tried[:3])
    assert not reached and chosen == tried[2]


def test_search_tightens_by_kappa(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, float]] = []

    def made_up(self: Pruner, way: str, epsilon: float, gamma: float, kappa: float = 1.0) -> Pruned:
        asked.append((epsilon, kappa))
        return record(way, (5, 50, 5), kappa * math.sqrt(gamma) * 2 * epsilon, original=2 * epsilon)

    monkeypatch.setattr(Pruner, "prune", made_up)
    tried = Pruner(nn.Sequential(), None).search("published")  # type: ignore[arg-type]
    assert [kappa for _, kappa in asked] == [1.0, pytest.approx(0.0199 / (math.sqrt(1.1) * 0.24))]
    assert tried[-1].rd == pytest.approx(0.0199) and spiral_pruning.best(tried) == (tried[-1], True)


def timeless(summary: spirals.Summary) -> dict[str, object]:
    data = summary.to_dict()
    for result in data["results"]:
        del result["best"]["seconds"]
    return data


def tiny(out: Path, progress: Callable[[int, int, str], None] = lambda done, total, what: None, *, processes: int = 1) -> spirals.Summary:
    return spirals.run(
        out=out,
        hidden=(50,),
        repeats=1,
        ways=("published",),
        spirals=EASY,
        recipe=SHORT,
        processes=processes,
        progress=progress,
    )


def test_experiment_interrupted_and_resumed(tmp_path: Path) -> None:
    whole = tiny(tmp_path / "whole")
    steps: list[tuple[int, int]] = []

    def stop(done: int, total: int, what: str) -> None:
        steps.append((done, total))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny(tmp_path / "parts", stop)
    assert steps == [(0, 4), (1, 4), (2, 4)]
    steps.clear()
    resumed = tiny(tmp_path / "parts", lambda done, total, what: steps.append((done, total)))
    assert steps == [(2, 4), (3, 4), (4, 4)]
    assert timeless(resumed) == timeless(whole)
    assert [(tmp_path / "parts" / name).is_file() for name in resumed.files] == [True] * 4
    assert json.loads((tmp_path / "parts" / "spirals.json").read_text()) == staging.mark("experiment") | resumed.to_dict()

    assert resumed.holds and resumed.theorems_hold and resumed.compared == 2
    for cell in resumed.cells:
        assert cell.published == spirals.PUBLISHED[50, cell.training][1]
        assert cell.reached == 1 and cell.rd < 0.02 and cell.least == cell.nonzeros[1] == cell.most
        assert cell.at_or_below == (cell.nonzeros[1] <= cell.published[1])
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(spirals_figures.table(resumed))
    words = console.export_text()
    assert "99/2483/100" in words and "54/342/46" in words and "/".join(f"{n:g}" for n in resumed.cells[0].nonzeros) in words
    with pytest.raises(InvalidInput, match="resume=False"):
        spirals.run(out=tmp_path / "parts", hidden=(50,), repeats=1, spirals=EASY, processes=1)


def test_a_network_out_of_reach_counts_as_trained() -> None:
    network = spirals.Trained(50, "dropout", 0, (100, 2490, 100), 1.0, 1.0)
    failed = record("published", (1, 2, 3), 0.5)
    fine = record("published", (60, 300, 40), 0.019)
    results = [
        spirals.Result(50, "dropout", 0, "published", False, failed, 3),
        spirals.Result(50, "dropout", 1, "published", True, fine, 3),
        spirals.Result(50, "dropout", 2, "published", False, failed, 3),
    ]
    cell = spirals._cell(results, [network] * 3)
    assert cell.nonzeros == (100, 2490, 100) and cell.reached == 1 and cell.least == 300 and cell.at_or_below is False
    single = spirals._cell(results[1:2], [network])
    assert single.at_or_below is True and single.with_biases is True  # 300 weights and 1 bias of 467
    many = dataclasses.replace(fine, layers=tuple(dataclasses.replace(layer, biases=168) for layer in fine.layers))
    assert spirals._cell([dataclasses.replace(results[1], best=many)], [network]).with_biases is False


def test_a_certificate_that_fails_is_no_result() -> None:
    sparse = dataclasses.replace(record("published", (60, 200, 40), 0.01), holds=False)
    fine = record("published", (60, 300, 40), 0.019)
    assert spiral_pruning.best([sparse, fine]) == (fine, True)
    assert spiral_pruning.best([sparse]) == (sparse, False)


@pytest.mark.slow
def test_two_processes_find_the_same(tmp_path: Path) -> None:
    assert timeless(tiny(tmp_path / "one")) == timeless(tiny(tmp_path / "two", processes=2))


def test_published_numbers_are_complete() -> None:
    assert set(spirals.PUBLISHED) == {(h, training) for h in spirals.HIDDEN for training in spirals.TRAININGS}
    for (h, _), (before, after) in spirals.PUBLISHED.items():
        assert all(a <= b <= n for a, b, n in zip(after, before, (2 * h, h * h, 2 * h), strict=True))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"hidden": (0,)}, "hidden must hold different positive"),
        ({"hidden": (5, 5)}, "hidden must hold different positive"),
        ({"ways": ("l1",)}, "ways must be different ones of"),
        ({"repeats": 0}, "repeats must be a whole number"),
        ({"processes": True}, "processes must be a whole number"),
    ],
)
def test_what_cannot_be_run(arguments: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=words):
        spirals.run(out=tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_settings_that_make_no_data() -> None:
    for make in (
        lambda: Spirals(points=1),
        lambda: Spirals(turns=0.0),
        lambda: Spirals(inner=1.0),
        lambda: Recipe(steps=1),
        lambda: Recipe(keep=0.0),
        lambda: Recipe(l1=-1.0),
        lambda: spiral_pruning.method_of("l1", {"1": 0.1}),
    ):
        with pytest.raises(InvalidInput, match="found"):
            make()


def scheme_points(scheme: str, slope: float) -> list[SpiralPoint]:
    """Layer 3 keeps ``slope / rd`` weights, exactly a line in the logarithms."""
    return [
        SpiralPoint(50, repeat, scheme, rd, record("published", (90, 400, round(slope / rd)), rd))
        for repeat in (0, 1)
        for rd in (0.005, 0.04, 0.2)
    ]


def test_schemes_are_compared_at_equal_discrepancy() -> None:
    points = scheme_points("cascade", 1.0) + scheme_points("parallel", 4.0)
    found = spiral_schemes.compare(points, (0.001, 0.01, 0.1, 0.5))
    assert [c.rd for c in found] == [0.01, 0.1]
    for c in found:
        assert c.cascade[2] == pytest.approx(1 / c.rd) and c.parallel[2] == pytest.approx(4 / c.rd)
        assert c.ratios == pytest.approx((1.0, 1.0, 0.25))
    means = spiral_schemes.means(points)
    assert len(means) == 6 and all(mean.repeats == 2 for mean in means)
    assert "sparser in layer 3 at 4 of 4" in " ".join(spiral_schemes_figures.words(points))
    assert "share no discrepancy" in " ".join(spiral_schemes_figures.words(points[:6]))


def test_scheme_points_resume_and_draw(tmp_path: Path) -> None:
    seen: list[str] = []

    def run(**more: object) -> tuple[SpiralPoint, ...]:
        return spiral_schemes.spiral_points(
            out=tmp_path,
            hidden=(10,),
            cascade=(0.02, 0.1),
            parallel=(0.02, 0.1),
            way="preimage l1",
            spirals=EASY,
            recipe=SHORT,
            progress=lambda done, total, what: seen.append(f"{done}/{total} {what}"),
            **more,  # type: ignore[arg-type]
        )

    first = run(repeats=1)
    assert [(p.scheme, p.pruned.scheme, p.epsilon) for p in first] == [
        (scheme, scheme, epsilon) for scheme in ("cascade", "parallel") for epsilon in (0.02, 0.1)
    ]
    assert all(p.pruned.holds and p.pruned.theorems_hold for p in first)
    assert first[1].pruned.nonzeros[0] <= first[0].pruned.nonzeros[0]
    seen.clear()
    both = run(repeats=2)
    assert seen[0] == "4/8 resumed" and len(seen) == 5
    assert both[:4] == first
    figure = Figure()
    axes = figure.subplots()
    spiral_schemes_figures.draw(axes, both, layer=3)
    assert len(axes.get_lines()) == 2 and "layer 3" in axes.get_ylabel()
    assert len(spiral_schemes_figures.picture(both).axes) == 3
    with pytest.raises(InvalidInput, match="epsilons must be different"):
        spiral_schemes.spiral_points(out=tmp_path, cascade=(0.1, 0.1))
