"""Makes a pruned network faster for real: sparse execution where it was measured to be faster, dense where not."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import forward, inputs_of, samples
from ..capture import Replica, device_of, random_state_kept, replicate
from ..outputs import largest_difference
from ..progress import Advance, shown, within
from ..status import InvalidInput, NetTrimError
from ..wrappers import takes_models
from . import semi_structured, sparse_candidates
from .compact import allowed_difference, check, outputs
from .sparse_module import SparseModule
from .timing import Passes, apart, faster_in, side_by_side

MARGIN = 1.03
"""By so much faster than the model as given an arrangement must be: a difference within the noise is none."""


_KERNELS = f"{__package__}.kernels"


def kernels_there(progress: bool | Advance) -> bool:
    """Whether there are native kernels. They are compiled when they are first asked for, which takes a while and is shown: what measures
    afterwards draws nothing beside it."""
    if importlib.util.find_spec("numba") is None:
        return False
    if _KERNELS not in sys.modules:
        with shown(progress) as advance:
            advance(0, 1, "compiling the sparse kernels, once in a process")
            importlib.import_module(_KERNELS)
    return True


@dataclass(frozen=True)
class Choice:
    """How one layer runs. ``kind``: dense, csr (PyTorch's sparse product), direct (numba) or semi-structured (2:4 on a GPU).

    ``seconds`` of each candidate alone, in all of its calls in a pass over the example, with the batch-norm, sum and activation that it is
    merged with, and without the change of layout around sparse layers; ``density`` is the share of its weights that are not zero; ``why``
    says what decided.
    """

    name: str
    kind: str
    seconds: Mapping[str, float]
    density: float
    why: str


@dataclass(frozen=True, eq=False)
class Accelerated:
    """What :func:`accelerate` made. ``seconds`` are medians of whole passes over the example by candidate, ``kept`` is the one that
    ``model`` is, and ``quartiles`` the lower and upper ones beside those medians.

    ``faster_in``: in how many rounds the kept one was faster than dense, and of how many; 0 where dense is kept. ``difference`` of the
    outputs on the example, relative to the largest; ``notes`` say what could not be accelerated, and what could not be told apart.
    """

    model: nn.Module
    choices: tuple[Choice, ...]
    difference: float
    seconds: Mapping[str, float]
    quartiles: Mapping[str, tuple[float, float]]
    kept: str
    faster_in: tuple[int, int]
    samples: int
    threads: int
    notes: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """How many times faster than the model as given, on the example."""
        return self.seconds["dense"] / self.seconds[self.kept]

    def __str__(self) -> str:
        from ..render.deploy_words import accelerated_text  # presentation stays in render

        return accelerated_text(self)

    __repr__ = __str__


@takes_models("model")
def accelerate(
    model: nn.Module, example: Any, *, device: torch.device | str | None = None, budget: float = 0.3, progress: bool | Advance = True
) -> Accelerated:
    """A copy of ``model`` for inference whose sparse layers run as sparse products where that is faster on this machine.

    Every Linear and Conv2d is timed dense and sparse at the example's batch size, with the threads that torch has now; whole passes are
    timed too, and the fastest arrangement is kept: the model as given unless another is 3 % faster. Layers that follow each other, with
    the batch-norm, sums, activations and pooling in between, become one module whose activations stay features-first
    (docs/acceleration.md). Direct sparse kernels need numba (``pip install "nettrim[fast]"``); without it only Linear layers are
    accelerated, by PyTorch's CSR product.

    The copy is in eval mode and frozen; its accelerated parts refuse training, gradients, and other inputs than float32 on the CPU. It
    takes any batch size and, where the model does, any image size.

    Args:
        example: a batch of the size to be fast at: a tensor, a tuple whose first item is the input, or a mapping of keyword inputs.
        device: where the copy runs; by default where the model is. On CUDA, Linear layers with 2:4 zeros are tried with PyTorch's
            semi-structured kernels, and nothing else.
        budget: seconds of measuring for each candidate.
        progress: as for :func:`nettrim.prune`; it draws only between measurements.

    Raises:
        InvalidInput: the model cannot be copied or run on the example, holds NaN or inf, changes its buffers in a pass, or the device has
            no such kernels.
        NetTrimError: the outputs differ by more than 1e-5 of the largest.
    """
    if not (isinstance(budget, (int, float)) and budget > 0):
        raise InvalidInput(f"accelerate: budget must be a positive number of seconds, found {budget!r}; the default is 0.3")
    check(model, example, "accelerate")
    if any(isinstance(module, SparseModule) for module in model.modules()):
        raise InvalidInput(
            "accelerate: the model is accelerated already; accelerate the model that it was made from, for another batch size say"
        )
    place, given = device_of(model, device), example
    if place.type not in ("cpu", "cuda"):
        raise InvalidInput(f"accelerate: {place} is a device without the kernel; use device='cpu', or 'cuda' for 2:4 zeros")
    native = place.type == "cpu" and kernels_there(progress)
    with random_state_kept(place), shown(progress, still=True) as advance:
        advance(0, 3, "reading the model")
        twin = replicate(model, place, None)
        twin.model.requires_grad_(False)
        buffers = {name: buffer.clone() for name, buffer in twin.model.named_buffers()}
        reference = outputs(twin, _own(example), "accelerate").cloned()
        _refuse_memory(twin.model, buffers)
        example = _own(example, place)  # for a model that works in place on its input; a pass that is timed moves no data

        def differs(module: nn.Module) -> float:
            return largest_difference(reference, outputs(Replica(module, place, None), _own(given), "accelerate"))

        allowed = allowed_difference(twin.model)
        if place.type == "cuda":
            found = semi_structured.search(twin, example, budget)
        else:
            found = sparse_candidates.search(
                twin, example, budget, native, lambda module: differs(module) <= allowed, within(advance, 0, 3, share=2)
            )
        taken = _whole(found, example, place, budget, within(advance, 2, 3))
        kept = _fastest(taken, found.notes)
        made = found.candidates[kept]
        difference = differs(made.module)
    if not difference <= allowed:
        raise NetTrimError(
            f"accelerate: the output differs by {difference:.2g} of the largest output, more than {allowed:.0e}: nothing is returned; "
            "take out what is random in the model; if nothing is, please report its structure"
        )
    found.notes.extend(reference.notes)
    choices = tuple(_choice(name, layer, made, kept, found) for name, layer in sparse_candidates.layers_of(twin.model).items())
    return Accelerated(
        model=made.module,
        choices=choices,
        difference=difference,
        seconds={name: passes.median for name, passes in taken.items()},
        quartiles={name: (passes.quartiles[0], passes.quartiles[2]) for name, passes in taken.items()},
        kept=kept,
        faster_in=faster_in(taken[kept], taken["dense"]),
        samples=samples(example),
        threads=torch.get_num_threads(),
        notes=tuple(found.notes),
    )


def _own(example: Any, place: torch.device | None = None) -> Any:
    """A copy of the inputs of a batch, on ``place`` where it is given."""
    inputs = inputs_of(example)
    if isinstance(inputs, Mapping):
        return {name: value.detach().clone().to(place) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    return inputs.detach().clone().to(place)


def _refuse_memory(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Refuses a model whose passes change its buffers, as they were before the first. Raises InvalidInput."""
    for name, buffer in model.named_buffers():
        if name not in before or not torch.equal(before[name], buffer):
            raise InvalidInput(
                f"accelerate: a pass in eval mode changes the buffer {name!r}, which an accelerated copy would lose; take it out of "
                "forward, or accelerate the part of the model without it"
            )


def _fastest(taken: Mapping[str, Passes], notes: list[str]) -> str:
    """The fastest candidate, which is dense unless another is faster by more than the margin and more than noise; notes say where."""
    dense = taken["dense"]
    if busy := [f"{name} in {len(p.interrupted)} of {len(p.counted)} passes" for name, p in taken.items() if not p.enough]:
        notes.append(f"interrupted were {', '.join(busy)}: these times say little; measure again when the machine is less busy")
    faster = {name: passes.median for name, passes in taken.items() if passes.median * MARGIN <= dense.median}
    told = {name: seconds for name, seconds in faster.items() if apart(taken[name], dense)}
    for name in faster.keys() - told.keys():
        wins, rounds = faster_in(taken[name], dense)
        notes.append(f"{name!r} and dense could not be told apart: it was the faster in {wins} of {rounds} rounds")
    return min(told, key=lambda name: told[name]) if told else "dense"


def _whole(found: sparse_candidates.Found, example: Any, place: torch.device, budget: float, advance: Advance) -> dict[str, Passes]:
    """Whole passes over the example, by candidate."""

    def run(module: nn.Module) -> Callable[[], None]:
        def once() -> None:
            forward(module, example, place, None)
            if place.type == "cuda":
                torch.cuda.synchronize(place)

        return once

    return side_by_side({name: run(candidate.module) for name, candidate in found.candidates.items()}, budget, tell=advance)


def _choice(name: str, layer: nn.Module, made: sparse_candidates.Candidate, kept: str, found: sparse_candidates.Found) -> Choice:
    seconds = found.seconds.get(name, {})
    weight = getattr(layer, "weight", None)
    density = float((weight.detach() != 0).double().mean()) if isinstance(weight, Tensor) and weight.numel() else 1.0
    kind = made.kinds.get(name, "dense")
    if name in found.unable:
        why = found.unable[name]
    elif not seconds:
        why = "nothing around it lets it run on sparse weights"
    else:
        fastest = min(seconds, key=lambda key: seconds[key])
        why = f"{fastest} is the fastest alone" + ("" if fastest == kind else f", but the whole model is fastest as {kept!r}")
    return Choice(name, kind, dict(seconds), density, why)
