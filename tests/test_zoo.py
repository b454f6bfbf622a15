"""The zoo of networks: shapes, seeds, graphs, sizes; and their training with its cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from nettrim.experiments import zoo, zoo_training
from nettrim.experiments.datasets import Dataset, load
from nettrim.experiments.training import accuracy
from nettrim.experiments.zoo_training import Settings, augmented, settings_for, train, trained
from nettrim.status import InvalidInput

CONSTRUCTORS: list[Callable[..., nn.Module]] = [
    zoo.lenet5,
    zoo.vgg_like,
    zoo.resnet,
    zoo.depthwise_separable,
    zoo.transformer_encoder,
]
NAMES = list(zoo.NETWORKS)


def make(name: str, image_size: int = 28, seed: int = 0, in_channels: int = 1) -> nn.Module:
    return zoo.NETWORKS[name].make(in_channels=in_channels, classes=10, image_size=image_size, seed=seed)


def same(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


@pytest.fixture(scope="module")
def large_digits(digits: Dataset) -> Dataset:
    """The digits at 16 x 16 pixels, which LeNet needs."""

    def enlarged(images: Tensor) -> Tensor:
        return functional.interpolate(images, size=(16, 16), mode="bilinear")

    return replace(digits, name="digits16", train_images=enlarged(digits.train_images), test_images=enlarged(digits.test_images))


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one each time a network is trained."""
    calls: list[int] = []
    original: Callable[..., None] = train

    def counted(*arguments: object, **settings: object) -> None:
        calls.append(1)
        original(*arguments, **settings)

    monkeypatch.setattr(zoo_training, "train", counted)
    return calls


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written to is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("image_size", "in_channels"), [(28, 1), (16, 3)])
def test_shapes_and_graphs(name: str, image_size: int, in_channels: int) -> None:
    model = make(name, image_size, in_channels=in_channels)
    images = torch.rand(3, in_channels, image_size, image_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(images)
        assert logits.shape == (3, 10) and logits.isfinite().all()
        assert torch.equal(fx.symbolic_trace(model)(images), logits)
    assert not any(module.training for module in model.modules())
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "lenet5"])
def test_small_images_are_accepted(name: str) -> None:
    with torch.no_grad():
        assert make(name, 8)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("name", NAMES)
def test_seeds(name: str) -> None:
    before = torch.get_rng_state()
    model = make(name, 16, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert same(model, make(name, 16, seed=4))
    weights = [(a, b) for a, b in zip(model.parameters(), make(name, 16, seed=5).parameters(), strict=True) if a.ndim > 1]
    # in_proj_weight, say, must depend on the seed as well as every convolution
    assert all(not torch.equal(first, second) for first, second in weights)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", NAMES)
def test_every_value_is_initialised(name: str) -> None:
    assert torch.empty(1).isnan().all()
    for key, tensor in make(name, 16).state_dict().items():
        assert tensor.isfinite().all() if tensor.is_floating_point() else tensor == 0, key


def test_numbers_of_parameters() -> None:
    assert count(zoo.lenet5()) == 430_500 + 580  # Caffe's weights and biases
    # ResNet-20, -32 and -44 for CIFAR-10 with option A, as published: 0.27 M, 0.46 M, 0.66 M
    assert [count(zoo.resnet(in_channels=3, blocks=n, shortcut="A")) for n in (3, 5, 7)] == [269_722, 464_154, 658_586]
    # option B: two 1 x 1 convolutions with their norms more
    assert count(zoo.resnet(shortcut="B")) - count(zoo.resnet(shortcut="A")) == 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_layers_of_a_resnet(shortcut: zoo.Shortcut) -> None:
    for blocks in (1, 3):
        layers = [
            name
            for name, module in zoo.resnet(blocks=blocks, shortcut=shortcut).named_modules()
            if isinstance(module, (nn.Conv2d, nn.Linear)) and "shortcut" not in name
        ]
        assert len(layers) == 6 * blocks + 2


@pytest.mark.parametrize(("stem_stride", "sides"), [(1, (28, 14, 7)), (2, (14, 7, 4))])
def test_resolutions_of_a_resnet(stem_stride: int, sides: tuple[int, int, int]) -> None:
    model = zoo.resnet(width=4, blocks=1, shortcut="A", stem_stride=stem_stride)
    with torch.no_grad():
        features = model.relu(model.conv(torch.zeros(1, 1, 28, 28)))
        for channels, side, stage in zip((4, 8, 16), sides, (model.stage1, model.stage2, model.stage3), strict=True):
            features = stage(features)
            assert features.shape == (1, channels, side, side)


@pytest.mark.parametrize(("outputs", "side"), [(4, 6), (5, 7)])
def test_option_a_is_slicing_and_zero_channels(outputs: int, side: int) -> None:
    images = torch.rand(2, 2, side, side, generator=torch.Generator().manual_seed(0))
    made = zoo.SlicedShortcut(2, outputs, 2)(images)
    half = (side + 1) // 2
    expected = torch.zeros(2, outputs, half, half)
    for row in range(half):
        for column in range(half):
            expected[:, 1:3, row, column] = images[:, :, 2 * row, 2 * column]
    assert torch.equal(made, expected)


def test_a_residual_block_is_relu_of_the_sum() -> None:
    block = zoo.resnet(width=4, blocks=1, shortcut="A").stage2[0]
    images = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    # an initial batch-norm in eval mode divides by sqrt(1 + eps)
    scale = (1 + 1e-5) ** -0.5
    with torch.no_grad():
        inner = functional.conv2d(images, block.conv1.weight, stride=2, padding=1) * scale
        inner = functional.conv2d(inner.clamp(min=0), block.conv2.weight, padding=1) * scale
        expected = (inner + functional.pad(images[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))).clamp(min=0)
        torch.testing.assert_close(block(images), expected)


def test_depthwise_convolutions_have_one_group_a_channel() -> None:
    convolutions = [module for module in zoo.depthwise_separable().modules() if isinstance(module, nn.Conv2d)]
    kinds = [(module.groups == module.in_channels == module.out_channels, module.kernel_size) for module in convolutions[1:]]
    assert kinds == [(True, (3, 3)), (False, (1, 1))] * 6


@pytest.mark.parametrize(
    ("constructor", "arguments", "message"),
    [
        *((constructor, {"width": 0}, "width must be at least 1") for constructor in CONSTRUCTORS),
        *((constructor, {"classes": 0}, "classes must be at least 1") for constructor in CONSTRUCTORS),
        (zoo.lenet5, {"image_size": 15}, "at least 16 x 16"),
        (zoo.vgg_like, {"image_size": 7}, "at least 8 x 8"),
        (zoo.vgg_like, {"dropout": 1.0}, "dropout must be"),
        (zoo.resnet, {"shortcut": "C"}, "shortcut must be 'A'"),
        (zoo.resnet, {"stem_stride": 3}, "stem_stride must be"),
        (zoo.depthwise_separable, {"stem_stride": 0}, "stem_stride must be"),
        (zoo.transformer_encoder, {"image_size": 30}, "patch must divide"),
        (zoo.transformer_encoder, {"heads": 5}, "heads must divide"),
        (zoo.transformer_encoder, {"activation": "tanh"}, "activation must be"),
    ],
)
def test_impossible_networks_are_refused(constructor: Callable[..., nn.Module], arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        constructor(**arguments)


def test_augmentation_shifts_and_mirrors() -> None:
    batch = torch.arange(1.0, 49.0).reshape(2, 1, 4, 6).repeat(100, 2, 1, 1)
    generator = torch.Generator().manual_seed(0)
    assert augmented(batch, 0, False, generator) is batch
    made = augmented(batch, 1, True, generator)
    assert made.shape == batch.shape
    seen = set()
    for image, original in zip(made, batch, strict=True):
        padded = functional.pad(original, (1, 1, 1, 1))
        found = [
            (down, right, mirrored)
            for down in range(3)
            for right in range(3)
            for mirrored in (False, True)
            if torch.equal(image.flip(2) if mirrored else image, padded[:, down : down + 4, right : right + 6])
        ]
        assert len(found) == 1
        seen.update(found)
    assert len(seen) == 18  # every shift, mirrored and not


def test_settings(digits: Dataset) -> None:
    assert set(zoo_training._SETTINGS) == set(NAMES)
    small = settings_for("resnet20_b", digits)
    assert (small.crop, small.mirror, small.images) == (0, False, None)
    many = replace(digits, name="fashion-mnist", train_labels=torch.zeros(10_000, dtype=torch.int64))
    assert (settings_for("vgg_like", many).crop, settings_for("vgg_like", many).mirror) == (2, True)
    assert not settings_for("vgg_like", replace(many, name="mnist")).mirror  # a mirrored 3 is no 3
    quick = settings_for("vgg_like", many, quick=True)
    assert quick == replace(settings_for("vgg_like", many), epochs=quick.epochs, images=quick.images) and quick.epochs < 3
    with pytest.raises(InvalidInput, match="'lenet5'"):
        settings_for("lenet", digits)


@pytest.mark.parametrize(
    "fault",
    [
        {"epochs": 0},
        {"learning_rate": 0.0},
        {"crop": -1},
        {"optimizer": "adam"},
        {"label_smoothing": 1.0},
        {"images": 0},
    ],
)
def test_impossible_settings_are_refused(fault: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match="Settings"):
        replace(Settings(epochs=1, optimizer="sgd", learning_rate=0.1), **fault)


@pytest.mark.parametrize("name", NAMES)
def test_training_lowers_the_loss(name: str, large_digits: Dataset) -> None:
    told: list[float] = []
    model = trained(name, large_digits, quick=True, progress=lambda epoch, loss: told.append(loss))
    assert len(told) == 2 and told[1] < 0.9 * told[0]
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None and p.is_contiguous() and p.isfinite().all() for p in model.parameters())


def test_a_trained_network_is_better_than_chance(digits: Dataset) -> None:
    model = make("resnet20_a", 8)
    train(model, digits.train_images, digits.train_labels, Settings(epochs=4, optimizer="sgd", learning_rate=0.1), seed=0)
    assert accuracy(model, digits.test_images, digits.test_labels) > 0.8


def test_training_depends_on_the_seed_only(digits: Dataset) -> None:
    # dropout, crops and mirrors: everything that is random
    settings = Settings(epochs=1, optimizer="sgd", learning_rate=0.1, crop=1, mirror=True, images=512)
    models = []
    for seed, noise in ((5, 0), (5, 1), (6, 0)):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        model = zoo.vgg_like(width=4, image_size=8)
        train(model, digits.train_images, digits.train_labels, settings, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        models.append(model)
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


def test_weight_decay_spares_biases_and_norms() -> None:
    model = make("vgg_like", 8)
    optimizer = zoo_training._optimizer(model, Settings(epochs=1, optimizer="adamw", learning_rate=0.1, weight_decay=0.5))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0.5 for p in group["params"]}
    every = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert every == {id(p) for p in model.parameters()}
    assert decayed == {id(m.weight) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def test_diverged_training_is_refused(digits: Dataset) -> None:
    with pytest.raises(InvalidInput, match="learning_rate"):
        train(
            make("resnet20_a", 8),
            digits.train_images[:128] / 0,
            digits.train_labels[:128],
            Settings(epochs=1, optimizer="sgd", learning_rate=0.1),
            seed=0,
        )


def test_images_that_do_not_suit_are_refused(digits: Dataset) -> None:
    with pytest.raises(InvalidInput, match="as high as wide"):
        trained("resnet20_a", replace(digits, train_images=digits.train_images[:, :, :6]), quick=True)
    with pytest.raises(InvalidInput, match="at least 16 x 16"):
        trained("lenet5", digits, quick=True)


def test_a_cached_network_is_not_trained_again(digits: Dataset, tmp_path: Path, trainings: list[int]) -> None:
    first = trained("depthwise_separable", digits, cache=tmp_path / "new", quick=True)
    (path,) = (tmp_path / "new").iterdir()
    second = trained("depthwise_separable", digits, cache=tmp_path / "new", quick=True)
    assert len(trainings) == 1 and same(first, second)
    assert [p.stride() for p in first.parameters()] == [p.stride() for p in second.parameters()]
    assert not any(module.training for module in second.modules())
    trained("depthwise_separable", digits, seed=1, cache=tmp_path / "new", quick=True)
    assert len(trainings) == 2 and len(list((tmp_path / "new").iterdir())) == 2

    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.warns(UserWarning, match="not the ones that were written"):
        third = trained("depthwise_separable", digits, cache=tmp_path / "new", quick=True)
    assert len(trainings) == 3 and same(first, third)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(first, trained("depthwise_separable", digits, cache=tmp_path / "new", quick=True))
    assert len(trainings) == 3


def test_a_cache_states_the_network_the_data_and_the_settings(
    digits: Dataset, tmp_path: Path, trainings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def again() -> None:
        trained("transformer_encoder", digits, cache=tmp_path, quick=True)

    again()
    entry = zoo.NETWORKS["transformer_encoder"]
    narrow = {**zoo.NETWORKS, "transformer_encoder": replace(entry, arguments={**entry.arguments, "activation": "relu"})}
    with monkeypatch.context() as patched:
        patched.setattr(zoo_training, "NETWORKS", narrow)
        again()
    with monkeypatch.context() as patched:
        patched.setattr(zoo_training, "VERSION", zoo_training.VERSION + 1)
        again()
    with monkeypatch.context() as patched:
        patched.setattr(zoo_training, "_QUICK_EPOCHS", 1)
        again()
    again()
    assert len(trainings) == 4 and len(list(tmp_path.iterdir())) == 4
    trained("transformer_encoder", load("digits", seed=1), cache=tmp_path, quick=True)
    assert len(trainings) == 5
