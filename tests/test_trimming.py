"""Network trimming: zeros are counted right, what is removed was masked, and rounds end where they should."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nettrim.calibration import state_hash
from nettrim.capture import replicate
from nettrim.deploy import compact
from nettrim.deploy.channels import Flow
from nettrim.deploy.compact import channel_flow
from nettrim.experiments import network_trimming, network_trimming_figures
from nettrim.experiments.datasets import Dataset
from nettrim.experiments.zoo import NETWORKS
from nettrim.status import InvalidInput
from nettrim.trimming import NetworkTrimming, apoz, mask, trim, units

CPU = torch.device("cpu")


def flow_of(model: nn.Module, x: Tensor) -> Flow:
    return channel_flow(replicate(model, CPU, None), x, "test")


@cache
def classes(count: int = 600, side: int = 8, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches of images whose brightest quarter is their label: learned in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    images = torch.rand(count, 1, side, side, generator=generator)
    half = side // 2
    for i, label in enumerate(labels.tolist()):
        row, column = divmod(label, 2)
        images[i, 0, row * half : (row + 1) * half, column * half : (column + 1) * half] += 0.5
    return list(zip(images.split(100), labels.split(100), strict=True))


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = (nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 20), nn.ReLU(), nn.Linear(20, 4))
    return nn.Sequential(*layers)


def learn(model: nn.Module, number: int = 0, epochs: int = 8) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(epochs):
        for x, y in classes():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()


@pytest.fixture(scope="module")
def trained() -> nn.Sequential:
    model = network()
    learn(model)
    return model.eval()


def test_apoz_is_the_share_of_zeros() -> None:
    torch.manual_seed(1)
    first = (nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
    model = nn.Sequential(*first, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(45, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    batches = [torch.randn(7, 1, 8, 8), torch.randn(4, 1, 8, 8)]
    flow = flow_of(model, batches[0])
    found = apoz(flow, batches, CPU)
    both = torch.cat(batches)
    layers = units(flow, found)
    assert list(layers) == ["0", "5"]
    torch.testing.assert_close(found[layers["0"]], (model[:3](both) == 0).double().mean((0, 2, 3)))
    torch.testing.assert_close(found[layers["5"]], (model[:7](both) == 0).double().mean(0))


def test_tiny_values_count_as_zeros() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor([1e-10, 1e-8, -1.0]))
    flow = flow_of(model, torch.ones(4, 2))
    found = apoz(flow, [torch.ones(4, 2)], CPU)
    assert found[units(flow, found)["0"]].tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "transformer_encoder"])
def test_the_smaller_network_is_the_masked_one(name: str) -> None:
    model = NETWORKS[name].make(in_channels=1, classes=10, image_size=20, seed=0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3, generator=torch.Generator().manual_seed(3))
            nn.init.normal_(module.bias, std=0.3, generator=torch.Generator().manual_seed(4))
    x = torch.randn(6, 1, 20, 20, generator=torch.Generator().manual_seed(5))
    masked = copy.deepcopy(model)
    flow = flow_of(masked, x)
    found = apoz(flow, [x], CPU)
    layers = units(flow, found)
    gone = [c for ids in layers.values() for c in ids[:: max(2, len(ids) // 3)]]
    mask(masked, flow, gone)
    # every ReLU that a masked class goes through is zero there
    zeros = apoz(flow_of(masked, x), [x], CPU)
    assert bool((zeros[gone] == 1).all())
    smaller = compact(masked, x[:2])
    assert not smaller.notes and smaller.removed >= len(layers)
    with torch.no_grad():
        torch.testing.assert_close(smaller.model(x), masked(x), rtol=1e-5, atol=1e-5)


def test_residual_streams_are_one_unit() -> None:
    model = NETWORKS["resnet20_b"].make(in_channels=1, classes=10, image_size=12, seed=0)
    x = torch.randn(3, 1, 12, 12)
    flow = flow_of(model, x)
    layers = units(flow, apoz(flow, [x], CPU))
    stream = next(name for name in layers if name.startswith("conv + "))
    assert stream.split(" + ") == ["conv", "stage1.0.conv2", "stage1.1.conv2", "stage1.2.conv2"]
    assert len(layers[stream]) == 16 and len(layers["stage2.1.conv1"]) == 32


def test_rounds(trained: nn.Sequential) -> None:
    validation = classes(300, seed=1)
    before = state_hash(trained.state_dict())
    method = NetworkTrimming(rounds=3, tolerance=0.02, epochs=4, learning_rate=3e-3)
    result = trim(trained, validation, method, training=classes())
    assert state_hash(trained.state_dict()) == before and not any(p.grad is not None for p in result.model.parameters())
    first = result.rounds[0]
    assert [layer.name for layer in first.layers] == ["0", "4"]
    for layer in first.layers:
        values = torch.tensor(layer.apoz, dtype=torch.float64)
        assert layer.threshold == pytest.approx(float(values.mean() + values.std(correction=0)))
        assert layer.before - layer.after == int((values > layer.threshold).sum())
    assert sum(layer.before - layer.after for layer in first.layers) > 0
    kept = [one for one in result.rounds if one.kept]
    assert kept and result.parameters[1] == kept[-1].parameters < result.parameters[0]
    assert result.model[0].out_channels == kept[-1].layers[0].after and result.model[4].out_features == kept[-1].layers[1].after
    assert result.score[1] == kept[-1].retrained >= result.score[0] - 0.02
    again = trim(trained, validation, method, training=classes())
    assert state_hash(again.model.state_dict()) == state_hash(result.model.state_dict())
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_round_that_fails_is_taken_back(trained: nn.Sequential) -> None:
    def spoil(model: nn.Module, number: int) -> None:
        with torch.no_grad():
            model[-1].weight.zero_()  # type: ignore[index, union-attr, operator]
            model[-1].bias.copy_(torch.tensor([1.0, 0, 0, 0]))  # type: ignore[index, union-attr, operator]

    result = trim(trained, classes(300, seed=1), NetworkTrimming(train=spoil))
    assert [one.kept for one in result.rounds] == [False] and "could not be recovered" in result.stopped
    assert state_hash(result.model.state_dict()) == state_hash(trained.state_dict()) and result.ratio == 1


def test_the_highest_layers_first_and_ignored_ones(trained: nn.Sequential) -> None:
    def leave(model: nn.Module, number: int) -> None:
        pass

    def run(**more: Any) -> dict[str, int]:
        found = trim(trained, classes(300, seed=1), NetworkTrimming(rounds=1, train=leave, tolerance=1.0, **more.pop("method", {})), **more)
        return {layer.name: layer.before - layer.after for layer in found.rounds[0].layers}

    both, one = run(), run(method={"highest": 1})
    assert min(both.values()) > 0
    first = trim(trained, classes(300, seed=1), NetworkTrimming(rounds=1, train=leave, tolerance=1.0)).rounds[0]
    highest = max(first.layers, key=lambda layer: layer.mean).name
    assert one == {name: count if name == highest else 0 for name, count in both.items()}
    assert run(ignore=["0"]) == {"4": both["4"]}


def test_what_is_ignored_keeps_its_channels() -> None:
    torch.manual_seed(0)
    conv, depthwise = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
    body = nn.Sequential(
        nn.Sequential(conv, nn.ReLU(), depthwise, nn.ReLU()), nn.Flatten(), nn.Linear(128, 12), nn.ReLU(), nn.Linear(12, 4)
    )
    images = [(torch.randn(20, 1, 8, 8), torch.zeros(20, dtype=torch.long))]
    method = NetworkTrimming(rounds=1, train=lambda model, number: None, tolerance=1.0)

    def left(*ignore: str) -> list[str]:
        return [layer.name for layer in trim(body, images, method, ignore=ignore).rounds[0].layers]

    assert left() == ["0.0", "2"]
    assert left("0") == left("0.0") == left("0.2") == ["2"]  # a module that contains it; and the depthwise layer that shares its channels
    for ignore, words in ((["1"], "a Flatten without Linear"), ("0", r"must be a list of layer names, found the string '0'")):
        with pytest.raises(InvalidInput, match=words):
            trim(body, images, method, ignore=ignore)


def test_labels_that_do_not_fit_are_refused_before_any_work(trained: nn.Sequential) -> None:
    data = classes(200)
    x, y = data[0]
    told: list[str] = []
    for odd, words in (
        (y[:-1], f"batch 2 has {len(y) - 1} labels for {len(y)} samples"),
        (y + 1, "batch 2 has the label 4, but the model's classes are 0 to 3"),
        (y[:, None], r"labels of batch 2 must be of shape \(\d+,\)"),
    ):
        with pytest.raises(InvalidInput, match=words):
            trim(trained, data, training=[(x, y), (x, odd)], progress=lambda done, total, what: told.append(what))
    with pytest.raises(InvalidInput, match=f"validation: batch 1 has 3 labels for {len(y)} samples"):
        trim(trained, [(x, y[:3])], training=data)
    assert not told
    quick = NetworkTrimming(rounds=1, epochs=1, tolerance=1.0)
    one, other = (trim(trained, data, quick, training=[(x, kind)]).model for kind in (y, y.int()))
    assert state_hash(one.state_dict()) == state_hash(other.state_dict())
    for seed in (-1, 1.5, "a"):
        with pytest.raises(InvalidInput, match="seed must be a whole number"):
            trim(trained, data, quick, training=data, seed=seed)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="score must be a function"):
        trim(trained, data, quick, training=data, score=3)  # type: ignore[arg-type]


def test_it_ends_where_nothing_exceeds_the_criterion(trained: nn.Sequential) -> None:
    method = NetworkTrimming(criterion=0.9999999, train=lambda model, number: None, rounds=1)
    model = copy.deepcopy(trained)
    with torch.no_grad():
        for i in (0, 4):
            model[i].weight.abs_()  # no neuron is ever zero: images are positive
            model[i].bias.fill_(1.0)
    result = trim(model, [x for x, _ in classes(300)], method, score=lambda network: 1.0)
    assert result.rounds == () and result.stopped == "no neuron exceeds the criterion" and result.score == (1.0, 1.0)


def test_bad_input_is_refused(trained: nn.Sequential) -> None:
    data = classes(200)
    nothing: Callable[[nn.Module, int], None] = lambda model, number: None  # noqa: E731
    method = NetworkTrimming(train=nothing)
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 4)).eval()
    with pytest.raises(InvalidInput, match="no ReLU follows a layer"):
        trim(smooth, data, method)
    dead = copy.deepcopy(trained)
    with torch.no_grad():
        dead[4].bias.fill_(-100.0)
    with pytest.raises(InvalidInput, match=r"every neuron of '4' is zero more often than 90\.0%"):
        trim(dead, data, NetworkTrimming(criterion=0.9, train=nothing))
    with pytest.raises(InvalidInput, match="nothing to retrain with"):
        trim(trained, data)
    with pytest.raises(InvalidInput, match="validation: batch 1 has no labels"):
        trim(trained, [x for x, _ in data], method)
    with pytest.raises(InvalidInput, match="training: batch 1 has no labels"):
        trim(trained, data, training=[x for x, _ in data])
    with pytest.raises(InvalidInput, match="ignore names 'fc9'"):
        trim(trained, data, method, ignore=["fc9"])
    with pytest.raises(InvalidInput, match="score must give a finite number"):
        trim(trained, data, method, score=lambda network: float("nan"))
    with pytest.raises(InvalidInput, match="must be a NetworkTrimming"):
        trim(trained, data, "mean+std")  # type: ignore[arg-type]
    frozen = copy.deepcopy(trained).requires_grad_(False)
    with pytest.raises(InvalidInput, match="every parameter is frozen"):
        trim(frozen, data, training=data)

    def ruin(model: nn.Module, number: int) -> None:
        with torch.no_grad():
            model[4].weight[0, 0] = torch.nan  # type: ignore[index, union-attr, operator]

    with pytest.raises(InvalidInput, match=r"training left NaN or inf in 4\.weight"):
        trim(trained, data, NetworkTrimming(train=ruin))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rounds": 0}, "rounds must be"),
        ({"highest": 0}, "highest must be"),
        ({"criterion": "mean"}, 'criterion must be "mean\\+std"'),
        ({"criterion": 1.5}, "criterion must be"),
        ({"train": 3}, "train must be a function"),
        ({"learning_rate": 0.0}, "learning_rate must be"),
        ({"tolerance": float("inf")}, "tolerance must be"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        NetworkTrimming(**settings)


def test_the_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = classes(700, side=16)
    images, labels = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    data = Dataset("quarters", images[:600], labels[:600], images[600:], labels[600:], ("a", "b", "c", "d"))
    monkeypatch.setattr(network_trimming.datasets, "load", lambda *arguments: data)
    small = replace(NETWORKS["lenet5"], arguments={"width": 4})
    monkeypatch.setattr("nettrim.experiments.zoo_training.NETWORKS", {**NETWORKS, "lenet5": small})
    summary = network_trimming.run(out=tmp_path, quick=True)
    (run,) = summary.runs
    assert run.steps[0].sizes == "4-10-100-4" and run.steps[0].compression == 1.0
    for before, after in zip(run.steps, run.steps[1:], strict=False):
        assert after.parameters < before.parameters and after.compression == run.steps[0].parameters / after.parameters
    assert run.best.test >= run.steps[0].test and run.best.kept
    assert all((tmp_path / name).stat().st_size > 100 for name in summary.files)
    shown = network_trimming_figures.table(summary)
    assert shown.row_count == len(run.steps) + len(network_trimming.PUBLISHED)
    assert network_trimming.run(out=tmp_path, quick=True).to_dict() == summary.to_dict()  # read back, not run again
    with pytest.raises(InvalidInput, match="networks must be some of"):
        network_trimming.run(out=tmp_path, networks=["resnet"])
    with pytest.raises(InvalidInput, match="samples must be a whole number"):
        network_trimming.run(out=tmp_path, samples=600)
