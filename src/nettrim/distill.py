"""``distill``: a pruned network learns the reference network's outputs again, without labels, while its zeros stay zero."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .attention import closed, opened
from .calibration import Batches, Calibration
from .capture import Replica, device_of, random_state_kept, read_graph, replicate
from .diagnosis import must_run
from .finetune import keep_zeros, learnable
from .outputs import outputs_of, real, square, squares
from .progress import Advance, shown
from .quiet import gradients
from .stacked import Group, differentiable, outputs, split, stacked
from .status import InvalidInput
from .trained import zeroed_layers
from .wrappers import takes_models

LOOKS = 40  # times that the held-back samples are looked at


@dataclass(frozen=True)
class Distilled:
    """A fine-tuned copy of a pruned model, and what the fine-tuning did; printed, a few plain lines.

    ``before`` and ``after`` are relative discrepancies of the outputs, ``||X_hat - X||_F / ||X||_F``, over all calibration samples;
    ``unseen_before`` and ``unseen_after`` the same over the samples held back (``None`` without). ``history`` holds (step, loss) on the
    samples held back, step 0 being the model as it was given; the model returned is that of step ``best``. ``mixed`` says whether inputs
    were mixed, ``learned`` names the parameters that could change.
    """

    model: nn.Module
    before: float
    after: float
    unseen_before: float | None
    unseen_after: float | None
    steps: int
    best: int
    history: tuple[tuple[int, float], ...]
    mixed: bool
    learned: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        from .render.distilled import distilled_text  # presentation stays in render

        return distilled_text(self)

    __repr__ = __str__


@takes_models("pruned", "reference")
def distill(
    pruned: nn.Module,
    reference: nn.Module,
    calibration: Batches,
    *,
    loss: Literal["mse", "kl"] = "mse",
    temperature: float = 8.0,
    learn: Literal["pruned", "all"] = "pruned",
    steps: int = 4000,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    mixing: bool = True,
    holdback: float = 0.1,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool | Advance = True,
) -> Distilled:
    """Fine-tunes a pruned model towards the reference network's outputs on unlabelled data (knowledge distillation: Hinton, Vinyals and
    Dean 2015, arXiv 1503.02531). Both models are left unchanged; zeros stay zero; the same seed gives the same result.

    Adam with a cosine schedule down to zero; both networks in eval mode, so batch-norm statistics stay as they are. The calibration inputs
    are held in memory once. Samples are drawn one by one where the first dimension holds samples (checked on the reference network), and
    otherwise in the batches as they are given.

    A certificate of the pruned model does not speak of the result: :func:`nettrim.recertify` makes a new one. Fine-tuning with labels, in a
    loop of your own: :func:`nettrim.finetuning`.

    Args:
        pruned: a pruned model, as :func:`nettrim.prune` returns it.
        reference: the network it was pruned from.
        calibration: as for :func:`nettrim.prune`; labels are not read.
        loss: ``"mse"``: the squared discrepancy, relative to the outputs' mean square, which is what certificates speak of. ``"kl"``: the
            divergence of the softened class probabilities (softmax over the last dimension), for models with one output.
        temperature: divides the logits of ``"kl"``.
        learn: ``"pruned"``: weights and biases of layers that hold zeros and other weights than the reference network's, and the bias of
            a batch-norm behind one without bias. ``"all"``: every parameter. Frozen parameters (``requires_grad=False``) stay.
        steps: steps of the optimizer.
        batch_size: samples in a step.
        learning_rate: of the first step.
        mixing: trains on ``s x + (1 - s) x'``, two samples' inputs mixed by a share drawn uniformly (Zhang et al. 2018, arXiv
            1710.09412), with the reference network's outputs for that (Beyer et al. 2022, arXiv 2106.05237): it widens a small
            calibration set. Inputs that are not floating-point (tokens) are never mixed.
        holdback: share of the samples held back: the state of least loss on them is returned, the one at the start included. With 0 nothing
            is held back, and the last state is returned.
        seed: chooses the samples held back, their order, and how they are mixed.
        device: where the work is done; by default where the pruned model is.
        progress: as for :func:`nettrim.prune`; a piece is a step.

    Raises:
        InvalidInput: settings outside their range; no zeros; models whose outputs have different forms; NaN or inf in the data, the outputs
            or the weights; a loss that grows beyond all bounds.
    """
    started = time.perf_counter()
    _check(loss, temperature, learn, steps, batch_size, learning_rate, mixing, holdback, seed)
    source = opened(pruned, encoders=False)
    names = zeroed_layers(source, opened(reference, encoders=False), "distill")
    batches = Calibration(calibration)
    place = device_of(source, device)
    with random_state_kept(place), shown(progress, pieces="steps") as advance:
        student, teacher = _working_copy(source, place), _working_copy(opened(reference, encoders=False), place)
        generator = torch.Generator().manual_seed(seed)
        first = next(iter(batches))
        _compare_forms(student, teacher, first)
        groups = stacked(batches, teacher)
        kept, unseen = split(groups, holdback, generator)
        norms = _norms(teacher, names, first) if learn == "pruned" else {}
        learned = learnable(student.model, names, norms, learn, "distill")
        for name, parameter in student.model.named_parameters():
            parameter.requires_grad_(name in learned)
        measure = _Loss(student, teacher, loss, temperature, _mean_square(teacher, groups))
        before, unseen_before = _discrepancy(student, teacher, groups), _discrepancy(student, teacher, unseen) if unseen else None
        run = _Run(student, learned, measure, kept, unseen, generator, batch_size, mixing)
        run.train(steps, learning_rate, advance)
        model = _with_values(source, student, learned, pruned)
        student = _working_copy(opened(model, encoders=False), place)  # as stored
        return Distilled(
            model=model,
            before=before,
            after=_discrepancy(student, teacher, groups),
            unseen_before=unseen_before,
            unseen_after=_discrepancy(student, teacher, unseen) if unseen else None,
            steps=steps,
            best=run.best,
            history=tuple(run.history),
            mixed=mixing and any(group.mixable for group in kept),
            learned=tuple(learned),
            seconds=time.perf_counter() - started,
        )


def _compare_forms(student: Replica, teacher: Replica, first: Any) -> None:
    """Refuses models that cannot be compared, or that cannot run on the data."""
    found = []
    for name, model in (("pruned", student), ("reference", teacher)):
        with must_run(model.model, model.run, first, f"distill: the {name} model cannot run on the calibration data"):
            found.append({key: tuple(value.shape) for key, value in outputs_of(model.run(first)).scores.items()})
    if found[0] != found[1]:
        raise InvalidInput(
            f"distill: the two models must put out tensors of the same shapes, found {found[0]} (pruned) and {found[1]} (reference); "
            "give the network that the pruned one was made from"
        )


class _Loss:
    """The loss of a batch, its target computed by the reference network."""

    def __init__(self, student: Replica, teacher: Replica, kind: str, temperature: float, scale: float) -> None:
        self.student, self.teacher, self.kind, self.temperature, self.scale = student, teacher, kind, temperature, scale

    def __call__(self, group: Group) -> Tensor:
        """Mean over the samples; differentiable."""
        wanted = outputs(self.teacher, group).scores
        given = differentiable(self.student, group).scores
        if self.kind == "mse":
            return torch.stack([real(given[key] - Y).square().sum() for key, Y in wanted.items()]).sum() / (len(group) * self.scale)
        if len(wanted) != 1 or next(iter(wanted.values())).shape[-1] < 2:
            shapes = [tuple(Y.shape) for Y in wanted.values()]
            raise InvalidInput(f"distill: loss='kl' needs one output with classes in its last dimension, found shapes {shapes}; use 'mse'")
        ((key, Y),) = wanted.items()
        P, Q = ((X / self.temperature).log_softmax(-1) for X in (Y, given[key]))
        # the squared temperature keeps the size of the gradients (Hinton et al. 2015, section 2)
        return self.temperature**2 * (P.exp() * (P - Q)).sum() / (Y.numel() / Y.shape[-1])

    def over(self, groups: Sequence[Group], size: int) -> float:
        """Mean over all samples."""
        with torch.no_grad():
            total = sum(float(self(part)) * len(part) for group in groups for part in group.parts(size))
        return total / sum(map(len, groups))


class _Run:
    """One run of the optimizer."""

    def __init__(
        self,
        student: Replica,
        learned: Mapping[str, nn.Parameter],
        loss: _Loss,
        kept: Sequence[Group],
        unseen: Sequence[Group],
        generator: torch.Generator,
        batch_size: int,
        mixing: bool,
    ) -> None:
        self.student, self.learned, self.loss, self.kept, self.unseen = student, learned, loss, kept, unseen
        self.generator, self.batch_size, self.mixing = generator, batch_size, mixing
        self.history: list[tuple[int, float]] = []
        self.best, self.least = 0, math.inf
        self.state: dict[str, Tensor] = {}

    def train(self, steps: int, learning_rate: float, advance: Advance) -> None:
        """Takes the steps; the parameters are then those of the state to return."""
        optimizer = torch.optim.Adam(self.learned.values(), lr=learning_rate)
        look = max(1, steps // LOOKS)
        self._look(0)
        batches = self._batches()
        with keep_zeros(self.student.model, optimizer):
            for step in range(1, steps + 1):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
                value = self.loss(next(batches))
                if not bool(torch.isfinite(value)):
                    raise InvalidInput(f"distill: the loss is no longer finite in step {step}; lower learning_rate ({learning_rate:g})")
                optimizer.zero_grad()
                with gradients():
                    value.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                if step % look == 0 or step == steps:
                    loss = self._look(step)
                    advance(step, steps, f"distilling, loss {float(value.detach()) if loss is None else loss:.3g}")
        if self.unseen:
            with torch.no_grad():
                for name, parameter in self.learned.items():
                    parameter.copy_(self.state[name])

    def _look(self, step: int) -> float | None:
        """Looks at the samples held back, and keeps the state where it is the best so far."""
        if not self.unseen:
            self.best = step
            return None
        value = self.loss.over(self.unseen, max(self.batch_size, 256))
        self.history.append((step, value))
        if value < self.least:
            self.best, self.least = step, value
            self.state = {name: parameter.detach().clone() for name, parameter in self.learned.items()}
        return value

    def _batches(self) -> Iterator[Group]:
        """Endless: every sample once, in a new order, again and again."""
        while True:
            pieces: list[tuple[Group, Tensor | None]] = []
            for group in self.kept:
                if not group.divisible:
                    pieces.append((group, None))
                    continue
                rows = torch.randperm(len(group), generator=self.generator)
                pieces += [(group, part) for part in torch.split(rows, self.batch_size)]
            for i in torch.randperm(len(pieces), generator=self.generator).tolist():
                group, some = pieces[i]
                batch = group if some is None else group.take(some)
                yield batch.mixed(self.generator, group) if self.mixing and group.mixable else batch


def _check(
    loss: object,
    temperature: object,
    learn: object,
    steps: object,
    batch_size: object,
    learning_rate: object,
    mixing: object,
    holdback: object,
    seed: object,
) -> None:
    if loss not in ("mse", "kl"):
        raise InvalidInput(f"distill: loss must be 'mse' or 'kl', found {loss!r}")
    if learn not in ("pruned", "all"):
        raise InvalidInput(f"distill: learn must be 'pruned' or 'all', found {learn!r}")
    for name, number, least in (("steps", steps, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise InvalidInput(f"distill: {name} must be a whole number of at least {least}, found {number!r}")
    for name, value in (("temperature", temperature), ("learning_rate", learning_rate)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise InvalidInput(f"distill: {name} must be a finite number above 0, found {value!r}")
    if not isinstance(mixing, bool):
        raise InvalidInput(f"distill: mixing must be True or False, found {mixing!r}")
    if isinstance(holdback, bool) or not isinstance(holdback, (int, float)) or not 0 <= holdback < 1:
        raise InvalidInput(f"distill: holdback is a share of the samples and must lie in [0, 1), found {holdback!r}")


def _working_copy(model: nn.Module, place: torch.device) -> Replica:
    """A copy in eval mode whose arithmetic is float32 where the model is held in half precision, and otherwise its own."""
    twin = replicate(model, place, None)
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in twin.model.parameters()):
        twin.model.float()
        twin.dtype = torch.float32
    return twin


def _norms(teacher: Replica, names: Sequence[str], first: Any) -> dict[str, str]:
    """The batch-norm that is folded into each layer."""
    return {name: reading.norm for name, reading in read_graph(teacher, names, {}, first).readings.items()}


def _mean_square(teacher: Replica, groups: Sequence[Group]) -> float:
    """The mean, over samples, of the squared norm of the reference network's outputs."""
    total = 0.0
    for group in groups:
        for part in group.parts(256):
            for value in outputs(teacher, part).scores.values():
                if not bool(torch.isfinite(value).all()):
                    raise InvalidInput("distill: the reference network puts out NaN or inf; check its weights and the data")
                total += square(value)
    if total == 0:
        raise InvalidInput("distill: the reference network's outputs are all zero; check its weights and the data")
    return total / sum(map(len, groups))


def _discrepancy(student: Replica, teacher: Replica, groups: Sequence[Group]) -> float:
    """``||X_hat - X||_F / ||X||_F`` over all samples and outputs."""
    moved = size = 0.0
    for group in groups:
        for part in group.parts(256):
            of_part = squares(outputs(teacher, part), outputs(student, part))
            moved, size = moved + of_part[0], size + of_part[1]
    return math.sqrt(moved / size) if size else math.inf


def _with_values(source: nn.Module, student: Replica, learned: Mapping[str, nn.Parameter], like: nn.Module) -> nn.Module:
    """A copy of the pruned model with the learned values, of its class, dtype and device."""
    result = copy.deepcopy(source)
    result.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if name in learned:
                parameter.copy_(learned[name])
                if not bool(torch.isfinite(parameter).all()):
                    raise InvalidInput(f"distill: {name} left the range of {parameter.dtype}; lower learning_rate, or use float32")
    return closed(result, like)
