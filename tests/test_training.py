"""Networks and their training: determinism, global state left alone, and the cache of trained networks."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from nettrim.experiments import training
from nettrim.experiments.datasets import Dataset, load
from nettrim.experiments.models import fully_connected
from nettrim.experiments.training import Recipe, accuracy, train_classifier, trained_network
from nettrim.status import InvalidInput


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe that trains in no time, for tests of everything but the accuracy."""
    monkeypatch.setattr(training, "recipe_for", lambda _: Recipe(epochs=1, batch_size=256, learning_rate=2e-3, weight_decay=0.0))


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one each time a network is trained."""
    calls: list[int] = []
    original: Callable[..., None] = train_classifier

    def counted(*arguments: object, **settings: object) -> None:
        calls.append(1)
        original(*arguments, **settings)

    monkeypatch.setattr(training, "train_classifier", counted)
    return calls


def same(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_fully_connected_structure_and_initial_weights() -> None:
    model = fully_connected([12, 400, 5], seed=3)
    assert [type(module).__name__ for module in model] == ["Flatten", "Linear", "ReLU", "Linear"]
    assert model(torch.zeros(2, 3, 2, 2)).shape == (2, 5)
    for linear in (module for module in model if isinstance(module, nn.Linear)):
        bound = linear.in_features**-0.5
        for parameter in linear.parameters():
            assert parameter.dtype == torch.float32 and parameter.requires_grad and parameter.device.type == "cpu"
            assert parameter.abs().max() <= bound
        assert abs(linear.weight.std().item() - bound / 3**0.5) < 0.05 * bound
    assert same(model, fully_connected((12, 400, 5), seed=3))
    assert not same(model, fully_connected([12, 400, 5], seed=4))


@pytest.mark.parametrize("sizes", [[], [3], [3, 0, 2], [-1, 2]])
def test_impossible_sizes_are_refused(sizes: list[int]) -> None:
    with pytest.raises(InvalidInput, match="at least two positive"):
        fully_connected(sizes, seed=0)


def test_training_is_deterministic(digits: Dataset) -> None:
    models = []
    for seed, noise in ((5, 0), (5, 1), (6, 0)):
        torch.manual_seed(noise)
        model = fully_connected([64, 16, 10], seed=0)
        train_classifier(model, digits.train_images, digits.train_labels, epochs=1, seed=seed)
        models.append(model)
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


@pytest.mark.usefixtures("quick")
def test_global_state_is_left_alone(digits: Dataset, tmp_path: Path) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    threads, grad, dtype = torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()
    model = trained_network(load("digits", seed=2), hidden=(8,), cache=tmp_path)
    accuracy(model, digits.test_images, digits.test_labels)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1] and random.getstate() == before[2]
    assert (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()) == (threads, grad, dtype)


def test_the_model_is_left_in_eval_mode_without_gradients_and_progress_is_told(digits: Dataset) -> None:
    told: list[tuple[int, float]] = []
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10)).train()
    with torch.no_grad():
        train_classifier(
            model, digits.train_images, digits.train_labels, epochs=3, seed=0, progress=lambda epoch, loss: told.append((epoch, loss))
        )
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert [epoch for epoch, _ in told] == [1, 2, 3]
    assert told[0][1] > told[1][1] > told[2][1] > 0


def test_a_single_step_is_enough(digits: Dataset) -> None:
    model = fully_connected([64, 10], seed=0)
    train_classifier(model, digits.train_images[:3], digits.train_labels[:3].to(torch.int32).long(), epochs=1, seed=0)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_diverged_training_is_refused(digits: Dataset) -> None:
    model = fully_connected([64, 10], seed=0)
    with pytest.raises(InvalidInput, match="learning_rate"):
        train_classifier(model, digits.train_images * float("inf"), digits.train_labels, epochs=1, seed=0)
    assert not model.training


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"epochs": 0}, "epochs"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_impossible_settings_are_refused(digits: Dataset, settings: dict[str, float], fault: str) -> None:
    with pytest.raises(InvalidInput, match=fault):
        train_classifier(
            fully_connected([64, 10], seed=0), digits.train_images, digits.train_labels, **{"epochs": 1, "seed": 0, **settings}
        )


def test_images_and_labels_that_do_not_belong_together_are_refused(digits: Dataset) -> None:
    model, images, labels = fully_connected([64, 10], seed=0), digits.test_images, digits.test_labels
    for wrong in ((images, labels[:-1]), (images[:0], labels[:0]), (images, labels.float()), (images, labels[:, None])):
        with pytest.raises(InvalidInput, match="same n"):
            accuracy(model, *wrong)
        with pytest.raises(InvalidInput, match="same n"):
            train_classifier(model, *wrong, epochs=1, seed=0)
    with pytest.raises(InvalidInput, match="no parameters"):
        accuracy(nn.Flatten(), images, labels)


def test_accuracy_is_a_fraction_and_puts_modes_back() -> None:
    images = torch.eye(4)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Dropout(0.9))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
    model[0].eval()
    labels = torch.tensor([0, 1, 2, 0])
    for batch_size in (1, 3, 1000):
        assert accuracy(model, images, labels, batch_size) == 0.75
    assert model.training and model[1].training and not model[0].training


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_and_accuracy_on_a_gpu(digits: Dataset) -> None:
    model = fully_connected([64, 100, 10], seed=0).cuda()
    before = torch.cuda.get_rng_state()
    train_classifier(model, digits.train_images, digits.train_labels, epochs=10, seed=0)
    train_classifier(model, digits.train_images.cuda(), digits.train_labels, epochs=1, seed=0)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert accuracy(model, digits.test_images, digits.test_labels) > 0.9


def test_trained_network_on_digits(digits: Dataset) -> None:
    epochs: list[int] = []
    model = trained_network(digits, progress=lambda epoch, _: epochs.append(epoch))
    assert [module.out_features for module in model if isinstance(module, nn.Linear)] == [300, 100, 10]
    assert not model.training and epochs == list(range(1, training.recipe_for(digits).epochs + 1))
    assert accuracy(model, digits.test_images, digits.test_labels) >= 0.96


@pytest.mark.usefixtures("quick")
def test_cache_round_trip(digits: Dataset, tmp_path: Path, trainings: list[int]) -> None:
    folder = tmp_path / "made" / "here"
    first = trained_network(digits, hidden=(8,), cache=folder)
    second = trained_network(digits, hidden=(8,), cache=folder)
    assert len(trainings) == 1 and same(first, second) and not second.training
    assert only_file(folder).name.startswith("digits-64-8-10-seed0-")


@pytest.mark.usefixtures("quick")
def test_whatever_decides_the_weights_is_in_the_key(
    digits: Dataset, tmp_path: Path, trainings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_network(digits, hidden=(8,), cache=tmp_path)
    trained_network(digits, hidden=(9,), cache=tmp_path)
    trained_network(digits, hidden=(8,), seed=1, cache=tmp_path)
    trained_network(load("digits", seed=1), hidden=(8,), cache=tmp_path)
    trained_network(dataclasses.replace(digits, name="renamed"), hidden=(8,), cache=tmp_path)
    monkeypatch.setattr(training, "RECIPE_VERSION", training.RECIPE_VERSION + 1)
    trained_network(digits, hidden=(8,), cache=tmp_path)
    monkeypatch.setattr(training, "recipe_for", lambda _: Recipe(epochs=1, batch_size=256, learning_rate=1e-3, weight_decay=0.0))
    trained_network(digits, hidden=(8,), cache=tmp_path)
    assert len(trainings) == len(list(tmp_path.iterdir())) == 7


def corrupt_last_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def garble(path: Path) -> None:
    path.write_bytes(b"not a safetensors file")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def strip_metadata(path: Path) -> None:
    path.write_bytes(safetensors.torch.save(safetensors.torch.load_file(path)))


def swap_for_another(path: Path) -> None:
    """Another seed's network under this one's name."""
    other = path.parent / "other"
    trained_network(load("digits"), hidden=(8,), seed=1, cache=other)
    only_file(other).replace(path)
    other.rmdir()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("damage", [corrupt_last_byte, truncate, garble, empty, strip_metadata, swap_for_another])
def test_an_unsound_cache_file_is_never_used(digits: Dataset, tmp_path: Path, damage: Callable[[Path], None], trainings: list[int]) -> None:
    first = trained_network(digits, hidden=(8,), cache=tmp_path)
    path = only_file(tmp_path)
    sound = path.read_bytes()
    damage(path)
    trainings.clear()
    with pytest.warns(UserWarning, match="is not used: .*training again"):
        again = trained_network(digits, hidden=(8,), cache=tmp_path)
    assert len(trainings) == 1 and same(first, again)
    assert only_file(tmp_path).read_bytes() == sound


@pytest.mark.usefixtures("quick")
def test_a_cache_that_cannot_be_written_is_refused_before_training(digits: Dataset, tmp_path: Path, trainings: list[int]) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    for folder in (blocker, blocker / "below"):
        with pytest.raises(InvalidInput, match="cache must be a folder"):
            trained_network(digits, hidden=(8,), cache=folder)
    assert not trainings


@pytest.mark.usefixtures("quick")
def test_a_failed_write_leaves_nothing_behind(digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(InvalidInput, match="disk full"):
        trained_network(digits, hidden=(8,), cache=tmp_path)
    assert not list(tmp_path.iterdir())
