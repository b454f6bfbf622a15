"""Network trimming (Hu, Peng, Tai and Tang 2016, arXiv 1607.03250): neurons that are mostly zero go, the others are retrained; repeated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from .calibration import Calibration, forward, inputs_of, labels
from .capture import Replica, device_of, random_state_kept, replicate
from .deploy import constants
from .deploy.channels import Flow
from .deploy.compact import channel_flow, check, compact
from .deploy.follow import LAYERS, arguments
from .deploy.removal import library
from .methods.settings import settings
from .outputs import outputs_of
from .progress import Advance, shown
from .retraining import check_labelled, check_trainable, retrain
from .status import InvalidInput
from .wrappers import takes_models

ZERO = 1e-9
"""A ReLU's output counts as zero up to this."""

Train = Callable[[nn.Module, int], object]
Score = Callable[[nn.Module], float]


@settings
class NetworkTrimming:
    """The settings of :func:`trim`.

    rounds: at most so many rounds of trimming and retraining.
    criterion: "mean+std", the published one: a neuron goes when its average percentage of zeros (APoZ) exceeds the mean of its layer by
        more than one standard deviation; or a number in (0, 1) that the APoZ must exceed.
    highest: in each round only so many layers are trimmed, those of highest mean APoZ; by default all.
    train: a function of the model and the round's number (from 1) that trains the model in place; by default the built-in loop runs
        ``epochs`` over the training batches with Adam at ``learning_rate``.
    tolerance: a round is kept when its score after retraining is at most this much below the first network's.
    """

    rounds: int = 10
    criterion: Literal["mean+std"] | float = "mean+std"
    highest: int | None = None
    train: Train | None = None
    epochs: int = 2
    learning_rate: float = 1e-3
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        for name in ("rounds", "epochs", "highest"):
            value = getattr(self, name)
            if (value is not None or name != "highest") and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InvalidInput(f"NetworkTrimming: {name} must be a whole number of at least 1, found {value!r}")
        c = self.criterion
        if c != "mean+std" and (isinstance(c, (bool, str)) or not isinstance(c, (int, float)) or not 0 < c < 1):
            raise InvalidInput(f'NetworkTrimming: criterion must be "mean+std" or a number between 0 and 1, found {c!r}')
        if self.train is not None and not callable(self.train):
            raise InvalidInput(f"NetworkTrimming: train must be a function of (model, round), found {type(self.train).__name__}")
        for name, least in (("learning_rate", 0.0), ("tolerance", -1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not value > least:
                raise InvalidInput(f"NetworkTrimming: {name} must be a finite number above {least:g}, found {value!r}")


@dataclass(frozen=True)
class LayerApoz:
    """A layer in one round: the APoZ of its neurons before trimming, the threshold, and its neurons before and after.

    Layers whose outputs are added to one another share their neurons and count as one, named "a + b".
    """

    name: str
    apoz: tuple[float, ...]
    mean: float
    threshold: float
    before: int
    after: int


@dataclass(frozen=True)
class Round:
    """One round; scores before trimming, after it, and after retraining. ``kept`` is False for a last round that was taken back."""

    number: int
    layers: tuple[LayerApoz, ...]
    parameters: int
    before: float
    trimmed: float
    retrained: float
    kept: bool


@dataclass(frozen=True, eq=False)
class Trimmed:
    """What :func:`trim` made. ``score`` of the first network and of the last that was kept; ``stopped`` says why it ended."""

    model: nn.Module
    rounds: tuple[Round, ...]
    parameters: tuple[int, int]
    score: tuple[float, float]
    stopped: str

    @property
    def ratio(self) -> float:
        """How many times fewer parameters."""
        return self.parameters[0] / self.parameters[1]

    def to_dict(self) -> dict[str, Any]:
        """All numbers as plain JSON types."""
        return {
            "rounds": [asdict(one) for one in self.rounds],
            "parameters": list(self.parameters),
            "score": list(self.score),
            "ratio": self.ratio,
            "stopped": self.stopped,
        }

    def __str__(self) -> str:
        from .render.deploy_words import trimmed_text  # presentation stays in render

        return trimmed_text(self)

    __repr__ = __str__


@takes_models("model")
def trim(
    model: nn.Module,
    validation: Iterable[Any],
    method: NetworkTrimming | None = None,
    *,
    training: Iterable[Any] | None = None,
    score: Score | None = None,
    ignore: Sequence[str] = (),
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool | Advance = True,
) -> Trimmed:
    """A smaller copy of ``model``: neurons and channels whose ReLU is mostly zero are removed for real, and the rest is retrained.

    Each round measures every ReLU channel's APoZ, the share of zeros over the validation samples and positions; removes the neurons
    above the criterion with all that belongs to them (batch-norm, depthwise convolutions, the inputs of the next layers, and the same
    channel of every layer that is added to them); and retrains from the surviving weights. It ends when no neuron exceeds the criterion,
    when retraining does not bring the score back, and after ``method.rounds`` rounds. A round that fails is taken back.

    Args:
        validation: re-iterable batches; (inputs, labels) pairs where no ``score`` is given.
        training: (inputs, labels) batches for the built-in loop.
        score: a function of the model, larger is better; by default the accuracy on the validation labels.
        ignore: layers whose neurons all stay, or modules that contain such layers.
        seed: of the built-in loop's order, and of torch's random state while ``method.train`` runs.
        progress: as for :func:`nettrim.prune`; a piece is a round.

    Raises:
        InvalidInput: bad settings or data; no ReLU follows a layer whose neurons can be removed; every neuron of a layer exceeds the
            criterion; the model cannot be traced; training leaves NaN or inf.
        MissingExtra: torch-pruning is not installed.
    """
    method = NetworkTrimming() if method is None else method
    if not isinstance(method, NetworkTrimming):
        raise InvalidInput(f"trim: method must be a NetworkTrimming, found {type(method).__name__}")
    library()
    if method.train is None and training is None:
        raise InvalidInput("trim: nothing to retrain with: give training=(inputs, labels) batches, or NetworkTrimming(train=function)")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InvalidInput(f"trim: seed must be a whole number of at least 0, found {seed!r}")
    if score is not None and not callable(score):
        raise InvalidInput(f"trim: score must be a function of the model that gives a number, found {score!r}")
    checked = check_labelled(validation, "validation") if score is None else Calibration(validation, "validation")
    example = next(iter(checked))
    check(model, inputs_of(example), "trim")
    ignore = _layers_inside(model, ignore)
    place = device_of(model, device)
    generator = torch.Generator().manual_seed(seed)
    measure = score if score is not None else lambda network: _accuracy(network, checked, place)
    rounds: list[Round] = []
    stopped = f"all {method.rounds} rounds done"
    with random_state_kept(place), shown(progress) as advance:
        current = replicate(model, place, None).model
        if training is not None and method.train is None:
            check_trainable(current, training, place)
        first = last = _scored(measure, current)
        for number in range(1, method.rounds + 1):
            advance(number - 1, method.rounds, f"round {number}: measuring zeros")
            smaller, layers = _trimmed(current, checked, example, place, method, ignore)
            if smaller is None:
                stopped = "no neuron exceeds the criterion"
                break
            trimmed = _scored(measure, smaller)
            advance(number - 1, method.rounds, f"round {number}: retraining {_count(smaller):,} parameters")
            torch.manual_seed(seed + number)
            if method.train is not None:
                method.train(smaller, number)
                smaller.eval()
            else:
                assert training is not None
                retrain(smaller, training, epochs=method.epochs, learning_rate=method.learning_rate, generator=generator, device=place)
            _refuse_not_finite(smaller)
            retrained = _scored(measure, smaller)
            kept = retrained >= first - method.tolerance
            rounds.append(Round(number, layers, _count(smaller), last, trimmed, retrained, kept))
            advance(number, method.rounds, f"round {number}: {_count(smaller):,} parameters, score {retrained:.4f}")
            if not kept:
                stopped = "the score could not be recovered"
                break
            current, last = smaller, retrained
    made = current.to(next((parameter.device for parameter in model.parameters()), place))
    made.zero_grad(set_to_none=True)
    for name, module in model.named_modules():
        made.get_submodule(name).training = module.training
    return Trimmed(made, tuple(rounds), (_count(model), _count(made)), (first, last), stopped)


def apoz(flow: Flow, batches: Iterable[Any], device: torch.device) -> Tensor:
    """The average percentage of zeros, as a share, of every class of channels over all ReLUs it goes through; NaN without any."""
    counter = _Zeros(flow)
    with torch.no_grad():
        for batch in batches:
            counter.run(*(value.to(device) if isinstance(value, Tensor) else value for value in arguments(flow.module, batch)))
    return counter.zeros / counter.total


def mask(model: nn.Module, flow: Flow, classes: Iterable[int]) -> None:
    """Makes these classes of channels put out zero, in place: weights and offsets of all that makes them become zero."""
    with torch.no_grad():
        for (name, side), channels in flow.places(classes).items():
            if side == "in":
                continue
            module: Any = model.get_submodule(name)
            if constants.is_layer(module):
                constants.by_output(module)[channels] = 0
            elif module.weight is not None:
                module.weight[channels] = 0
            if getattr(module, "bias", None) is not None:
                module.bias[channels] = 0
            if module.weight is None and isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean[channels] = 0  # without weights of its own it is zero where its mean is


class _Zeros(fx.Interpreter):
    """Runs the graph and counts the zeros of every ReLU."""

    def __init__(self, flow: Flow) -> None:
        super().__init__(flow.module, garbage_collect_values=True)
        self.flow = flow
        self.zeros, self.total = torch.zeros(flow.count, dtype=torch.float64), torch.zeros(flow.count, dtype=torch.float64)

    def run_node(self, n: fx.Node) -> Any:
        """The node's value; zeros are counted beside."""
        value = super().run_node(n)
        if n.name in self.flow.rectified:
            dim, ids = self.flow.rectified[n.name]
            flat = value.movedim(dim, 0).flatten(1)
            self.zeros.index_add_(0, ids, (flat <= ZERO).sum(1).double().cpu())
            self.total.index_add_(0, ids, torch.full((len(ids),), float(flat.shape[1]), dtype=torch.float64))
        return value


def units(flow: Flow, found: Tensor, ignore: Sequence[str] = ()) -> dict[str, list[int]]:
    """The removable classes of channels with a ReLU, by the layer that makes them; layers that share channels are one unit.

    A unit with a channel of a layer in ``ignore`` is left out (those of a depthwise convolution are the channels of the layer before).
    """
    left = {c for name in ignore if (name, "out") in flow.ends for c in flow.ends[name, "out"].tolist()}
    merged: list[tuple[list[str], list[int]]] = []
    for name, ids in flow.sources(flow.inputs).items():
        classes = [c for c in dict.fromkeys(ids.tolist()) if c not in flow.fixed and not math.isnan(found[c])]
        if not classes:
            continue
        names = [name]
        for other in [one for one in merged if set(one[1]) & set(classes)]:
            merged.remove(other)
            names, classes = other[0] + names, list(dict.fromkeys(other[1] + classes))
        merged.append((names, classes))
    return {" + ".join(names): classes for names, classes in merged if not left & set(classes)}


def _trimmed(
    model: nn.Module, batches: Calibration, example: Any, place: torch.device, method: NetworkTrimming, ignore: Sequence[str]
) -> tuple[nn.Module | None, tuple[LayerApoz, ...]]:
    """The model without the neurons above the criterion, or None where there is none, and what was measured."""
    twin = replicate(model, place, None)
    inputs = inputs_of(example)
    flow = channel_flow(Replica(twin.model, place, None), inputs, "trim")
    found = apoz(flow, batches, place)
    layers = units(flow, found, ignore)
    if not layers:
        raise InvalidInput(
            "trim: no ReLU follows a layer whose neurons can be removed (those in ignore= stay), so there are no zeros to count; "
            "network trimming needs ReLU or ReLU6 behind Linear or convolutional layers"
        )
    facts: dict[str, tuple[Tensor, float]] = {}
    for name, classes in layers.items():
        values = found[classes]
        threshold = float(values.mean() + values.std(correction=0)) if method.criterion == "mean+std" else float(method.criterion)
        if bool((values > threshold).all()):
            raise InvalidInput(
                f"trim: every neuron of {name!r} is zero more often than {threshold:.1%}; a layer cannot lose all its neurons: "
                f"raise criterion (now {method.criterion!r}) or pass ignore=[{name.split(' + ')[0]!r}]"
            )
        facts[name] = (values, threshold)
    chosen = [name for name, (values, threshold) in facts.items() if bool((values > threshold).any())]
    # the published order: the layers of highest mean APoZ first
    chosen = sorted(chosen, key=lambda name: -float(facts[name][0].mean()))[: method.highest]
    gone = {name: [c for c in layers[name] if found[c] > facts[name][1]] for name in chosen}
    rows = tuple(
        LayerApoz(name, tuple(values.tolist()), float(values.mean()), threshold, len(values), len(values) - len(gone.get(name, ())))
        for name, (values, threshold) in facts.items()
    )
    if not gone:
        return None, rows
    mask(twin.model, flow, [c for classes in gone.values() for c in classes])
    smaller = compact(twin.model, inputs, device=place)
    if smaller.notes:
        raise InvalidInput(f"trim: some neurons cannot be removed for real ({smaller.notes[0]}); pass their layers in ignore=")
    return smaller.model, rows


def _layers_inside(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The layers of these names, or in modules of these names. Raises InvalidInput."""
    if isinstance(names, str):
        raise InvalidInput(f"trim: ignore must be a list of layer names, found the string {names!r}; write [{names!r}]")
    modules = dict(model.named_modules())
    found: list[str] = []
    for name in names:
        if name not in modules:
            raise InvalidInput(f"trim: ignore names {name!r}, which the model does not have")
        inside = [one for one, module in modules.items() if isinstance(module, LAYERS) and (one == name or one.startswith(f"{name}."))]
        if not inside:
            raise InvalidInput(f"trim: ignore names {name!r}, a {type(modules[name]).__name__} without Linear or convolutional layers")
        found += inside
    return found


def _accuracy(model: nn.Module, batches: Calibration, device: torch.device) -> float:
    """Share of samples whose largest score is at their label."""
    correct = total = 0
    for batch in batches:
        wanted = labels(batch)
        assert wanted is not None
        with torch.no_grad():
            found = outputs_of(forward(model, batch, device, None)).scores
        scores = next(iter(found.values()))
        if len(found) != 1 or scores.ndim != 2 or len(scores) != len(wanted):
            raise InvalidInput("trim: accuracy needs one output (samples, classes); give score=, a function of the model")
        correct += int((scores.argmax(1).cpu() == wanted.cpu()).sum())
        total += len(wanted)
    return correct / total


def _scored(score: Score, model: nn.Module) -> float:
    value = score(model)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidInput(f"trim: score must give a finite number, found {value!r}")
    model.eval()
    return float(value)


def _refuse_not_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise InvalidInput(f"trim: training left NaN or inf in {name}; lower the learning rate")


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
