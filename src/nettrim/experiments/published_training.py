"""The networks, the training and the masked fine-tuning of the published MNIST experiments.

Settings as read in the authors' code (Aghasi, Abdi and Romberg, SIAM J. Math. Data Science 2020): weights start truncated normal
(0.1, cut at two deviations) and biases at 0.1; dropout stands before every fully connected layer, the first one included; the
penalties are ``l1 ||W||_1 + l2/2 ||W||_F^2`` on the weights of the fully connected layers only; batches come from a new order of all
images in every epoch; the fine-tuning has neither dropout nor penalties.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import uuid
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from ..finetune import keep_zeros
from ..status import InvalidInput
from .datasets import Dataset
from .training import accuracy

VERSION = 1
"""Raise it when a change of this module changes trained weights: cached networks are then trained anew."""

_METADATA_KEY = "nettrim"
_TELL_EVERY = 100  # iterations between two reports of progress

Tell = Callable[[int, int], None]


def _silent(done: int, total: int) -> None:
    return None


@dataclass(frozen=True)
class Architecture:
    """Blocks of 5 x 5 convolution (same size), ReLU and 2 x 2 max pooling with ``channels`` outputs, if any; then fully connected layers.

    ``image`` is (C, H, W); ``hidden`` are the units of the hidden fully connected layers.
    """

    image: tuple[int, int, int]
    channels: tuple[int, ...]
    hidden: tuple[int, ...]
    classes: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Units of the fully connected part: inputs, hidden ..., classes."""
        channels, height, width = self.image
        for made in self.channels:
            channels, height, width = made, height // 2, width // 2
        return (channels * height * width, *self.hidden, self.classes)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the fully connected layers."""
        return tuple(f"fc{index}" for index in range(1, len(self.sizes)))

    @property
    def name(self) -> str:
        """One line: ``conv5x5x32, conv5x5x64, 3136-512-10``."""
        return ", ".join([*(f"conv5x5x{made}" for made in self.channels), "-".join(map(str, self.sizes))])

    def build(self, seed: int) -> nn.Sequential:
        """The network with its first weights, in float32 on the CPU, in eval mode; no global random state is read or changed."""
        if min(self.sizes) < 1:
            raise InvalidInput(
                f"Architecture: every layer must have at least one unit, found {self.name} for images {self.image}; use fewer channels"
            )
        modules: OrderedDict[str, nn.Module] = OrderedDict()
        before = self.image[0]
        for index, made in enumerate(self.channels, start=1):
            # made without values: the module's own initialisation would advance the global generator
            modules[f"conv{index}"] = nn.Conv2d(before, made, 5, padding=2, device="meta").to_empty(device="cpu")
            modules[f"conv{index}_relu"] = nn.ReLU()
            modules[f"conv{index}_pool"] = nn.MaxPool2d(2)
            before = made
        modules["flatten"] = nn.Flatten()
        for index, (inputs, outputs) in enumerate(itertools.pairwise(self.sizes), start=1):
            modules[f"fc{index}"] = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")
            if index < len(self.sizes) - 1:
                modules[f"fc{index}_relu"] = nn.ReLU()
        generator = torch.Generator().manual_seed(seed)
        for module in modules.values():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                assert module.bias is not None
                nn.init.trunc_normal_(module.weight, std=0.1, a=-0.2, b=0.2, generator=generator)
                nn.init.constant_(module.bias, 0.1)
        return nn.Sequential(modules).eval()


@dataclass(frozen=True)
class Recipe:
    """Adam at ``learning_rate``, times ``decay`` every ``decay_every`` iterations; ``keep`` is dropout's probability to keep a value."""

    iterations: int = 8001
    batch_size: int = 100
    learning_rate: float = 1e-3
    decay: float = 0.98
    decay_every: int = 500
    keep: float = 0.5
    l1: float = 0.0
    l2: float = 0.004

    def __post_init__(self) -> None:
        _check_schedule("Recipe", self.iterations, self.batch_size, self.learning_rate, self.decay, self.decay_every)
        if not 0 < self.keep <= 1:
            raise InvalidInput(f"Recipe: keep must lie in (0, 1], found {self.keep}: it is the share of values that dropout keeps")
        if not (0 <= self.l1 < math.inf and 0 <= self.l2 < math.inf):
            raise InvalidInput(f"Recipe: l1 and l2 must be >= 0 and finite, found {self.l1} and {self.l2}; use 0 for no penalty")


@dataclass(frozen=True)
class Tuning:
    """Plain SGD, zeros kept; the test accuracy is taken after each of ``steps`` iterations."""

    steps: tuple[int, ...] = (5_000, 10_000, 15_000)
    batch_size: int = 100
    learning_rate: float = 0.01
    decay: float = 0.98
    decay_every: int = 500

    def __post_init__(self) -> None:
        if not self.steps or list(self.steps) != sorted(set(self.steps)):
            raise InvalidInput(f"Tuning: steps must be rising numbers of iterations, found {self.steps}; give at least one")
        _check_schedule("Tuning", self.steps[0], self.batch_size, self.learning_rate, self.decay, self.decay_every)


def _check_schedule(owner: str, iterations: int, batch_size: int, learning_rate: float, decay: float, decay_every: int) -> None:
    for name, value in (("iterations", iterations), ("batch_size", batch_size), ("decay_every", decay_every)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidInput(f"{owner}: {name} must be a whole number of at least 1, found {value!r}; see published_training.{owner}")
    if not 0 < learning_rate < math.inf or not 0 < decay <= 1:
        raise InvalidInput(f"{owner}: learning_rate must be above 0 and decay in (0, 1], found {learning_rate} and {decay}; correct them")


def train(model: nn.Sequential, images: Tensor, labels: Tensor, recipe: Recipe, seed: int, tell: Tell = _silent) -> None:
    """Trains in place on ``images`` (n, C, H, W) with ``labels`` (n,); left in eval mode, without gradients.

    Orders and dropout come from a generator of their own: the same model, data, recipe, seed and number of threads give the same
    weights. ``tell(done, iterations)`` is called every 100 iterations. Raises InvalidInput when the loss is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    penalised = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate, fused=True)
    with torch.enable_grad():
        for done, rows in enumerate(_batches(len(labels), recipe.batch_size, recipe.iterations, generator)):
            _decay(optimizer, recipe.learning_rate * recipe.decay ** (done // recipe.decay_every))
            loss = functional.cross_entropy(_dropped(model, images[rows], recipe.keep, generator), labels[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            with torch.no_grad():  # the penalties' gradients, without a graph over all weights
                for weight in penalised:
                    assert weight.grad is not None
                    if recipe.l2:
                        weight.grad.add_(weight, alpha=recipe.l2)
                    if recipe.l1:
                        weight.grad.add_(weight.sign(), alpha=recipe.l1)
            optimizer.step()
            if done % _TELL_EVERY == _TELL_EVERY - 1:
                _check_loss(loss, done)
                tell(done + 1, recipe.iterations)
    _check_loss(loss, recipe.iterations - 1)
    model.zero_grad()


def finetune(model: nn.Module, dataset: Dataset, tuning: Tuning, seed: int, tell: Tell = _silent) -> tuple[tuple[int, float], ...]:
    """Trains all weights and biases of a pruned model in place, its zeros kept; (iterations, test accuracy in [0, 1]) at every step.

    ``seed`` fixes the batches: networks tuned with one seed see the same ones. Raises InvalidInput when the loss is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=tuning.learning_rate)
    sparse = any(bool((module.weight == 0).any()) for module in model.modules() if isinstance(module, nn.Linear))
    reached: list[tuple[int, float]] = []
    # without a zero there is nothing to keep
    with keep_zeros(model, optimizer) if sparse else contextlib.nullcontext(), torch.enable_grad():
        for done, rows in enumerate(_batches(len(dataset.train_labels), tuning.batch_size, tuning.steps[-1], generator)):
            _decay(optimizer, tuning.learning_rate * tuning.decay ** (done // tuning.decay_every))
            loss = functional.cross_entropy(model(dataset.train_images[rows]), dataset.train_labels[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if done % _TELL_EVERY == _TELL_EVERY - 1:
                tell(done + 1, tuning.steps[-1])
            if done + 1 in tuning.steps:
                _check_loss(loss, done)
                reached.append((done + 1, accuracy(model, dataset.test_images, dataset.test_labels)))
    model.zero_grad()
    return tuple(reached)


def trained(
    dataset: Dataset,
    architecture: Architecture,
    recipe: Recipe,
    seed: int,
    cache: Path,
    *,
    reuse: bool = True,
    tell: Tell = _silent,
) -> nn.Sequential:
    """The trained network, in eval mode on the CPU, from ``cache`` when it holds it.

    The safetensors file states the data (with a hash), architecture, recipe, seed, and a hash of the weights; one that is damaged or
    states anything else is not used: a warning says so and the network is trained again. ``reuse=False`` trains in any case.
    """
    facts = {
        "architecture": asdict(architecture),
        "data": dataset.name,
        "data_sha256": digest(dataset.train_images, dataset.train_labels),
        "recipe": asdict(recipe),
        "seed": seed,
        "version": VERSION,
    }
    stated = json.dumps(facts, sort_keys=True)
    key = hashlib.sha256(stated.encode()).hexdigest()[:12]
    shape = "-".join(map(str, (*architecture.channels, *architecture.sizes)))
    path = cache / f"{dataset.name}-{shape}-seed{seed}-{key}.safetensors"
    model = architecture.build(seed)
    if reuse and restored(model, path, stated):
        return model
    train(model, dataset.train_images, dataset.train_labels, recipe, seed, tell)
    store(model, path, stated)
    return model


def digest(*tensors: Tensor) -> str:
    """SHA-256 of the tensors' types, shapes and bytes, in order."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().numpy().data)
    return total.hexdigest()


def _dropped(model: nn.Sequential, x: Tensor, keep: float, generator: torch.Generator) -> Tensor:
    """The logits with dropout before every fully connected layer; the model itself holds no dropout, so pruning sees none."""
    for module in model:
        if keep < 1 and isinstance(module, nn.Linear):
            x = x * torch.empty_like(x).bernoulli_(keep, generator=generator).div_(keep)
        x = module(x)
    return x


def _batches(count: int, size: int, iterations: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers of ``iterations`` batches: a new order in every epoch, whose rest begins the next epoch's first batch."""
    rest = torch.empty(0, dtype=torch.int64)
    for _ in range(iterations):
        while len(rest) < size:
            rest = torch.cat([rest, torch.randperm(count, generator=generator)])
        yield rest[:size]
        rest = rest[size:]


def _decay(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def _check_loss(loss: Tensor, done: int) -> None:
    if not bool(torch.isfinite(loss)):
        raise InvalidInput(f"the training loss must stay finite, found {loss.item()} after iteration {done + 1}; lower learning_rate")


def restored(model: nn.Module, path: Path, stated: str) -> bool:
    """Fills ``model`` from a sound file that states exactly what is asked for; warns about any other."""
    if not path.exists():
        return False
    fault = "it states other data or settings, or its weights are not the ones that were written"
    try:
        with safe_open(path, framework="pt") as file:
            written = json.loads((file.metadata() or {}).get(_METADATA_KEY, "{}"))
        weights = safetensors.torch.load_file(path)
        if written == _written(weights, stated):
            model.load_state_dict(weights)
            return True
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        fault = f"it cannot be read ({error})"
    warnings.warn(f"cached network {path} is not used: {fault}; training again and replacing it", stacklevel=3)
    return False


def _written(weights: dict[str, Tensor], stated: str) -> dict[str, str]:
    return {"stated": stated, "weights_sha256": digest(*(weights[name] for name in sorted(weights)))}


def store(model: nn.Module, path: Path, stated: str) -> None:
    """Writes the file under another name first, so that no reader ever sees half of it."""
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(safetensors.torch.save(weights, {_METADATA_KEY: json.dumps(_written(weights, stated), sort_keys=True)}))
        os.replace(unfinished, path)
    except OSError as error:
        raise InvalidInput(f"the trained network must be stored as {path}, which failed ({error}); choose another folder") from error
    finally:
        unfinished.unlink(missing_ok=True)
