"""nettrim.bench: how much smaller and faster a pruned network is, measured in one run on this machine."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import inputs_of, sample_shape
from ..capture import Replica, device_of, hashes, random_state_kept, replicate
from ..checkpoint import save_weights
from ..outputs import Outputs, largest_difference, other_form
from ..progress import Advance, shown, within
from ..status import InvalidInput, NetTrimError
from ..wrappers import takes_models
from .accelerate import accelerate, kernels_there
from .bench_result import ACCELERATED, COMPACTED, DENSE, PRUNED, Bench, Form, Timing
from .compact import check, compact, outputs
from .counting import Counted, count
from .export_common import allowed, resized
from .machine import this_machine
from .timing import apart, faster_in, side_by_side

SIZES = (1, 32, 256)
SECONDS = 0.5
_BUDGET = 0.3  # of accelerate's own measuring, its default; less where a bench is to be shorter than that
_EXACT = 1e-5  # what compact and accelerate promise of their outputs


@dataclass
class _Work:
    """The copies that are measured, what is known of each, and what went wrong."""

    place: torch.device
    example: Any
    models: dict[str, nn.Module] = field(default_factory=dict)
    forms: dict[str, Form] = field(default_factory=dict)
    counts: dict[str, Counted | None] = field(default_factory=dict)
    timings: dict[str, list[Timing]] = field(default_factory=dict)
    differences: dict[str, list[float]] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)


@takes_models("model", "reference")
def bench(
    model: nn.Module,
    example: Any,
    *,
    reference: nn.Module | None = None,
    batch_sizes: Sequence[int] = SIZES,
    threads: int | None = None,
    seconds: float = SECONDS,
    device: torch.device | str | None = None,
    progress: bool | Advance = True,
) -> Bench:
    """Measures a pruned model's size and speed on this machine, in the forms in which it can be used.

    ``dense``: the trained network, ``reference``, where it is given. ``pruned``: ``model`` as it is, of the same shapes with zeros in them.
    ``compacted``: what :func:`nettrim.compact` makes of it. ``accelerated``: what :func:`nettrim.accelerate` makes of the compacted model
    (of the pruned one where it cannot be compacted), for each batch size anew, as one would set up a service of that batch size; what
    lies on disk is the model that it is made from. A form that cannot be made or run is left out, and a note says why.

    All forms run in eval mode on the same inputs, side by side in turns (`timing`), without gradients and garbage collection.
    The inputs lie on the device; what is timed is the forward pass. Passes during which the system took a processor away are set aside.
    Outputs are compared with the pruned model's at every batch size.

    Args:
        model: the pruned model; left unchanged.
        example: a batch on which it runs: a tensor, a tuple whose first item is the input, or a mapping of keyword inputs. For other batch
            sizes its samples are repeated or left out.
        reference: the trained network; ratios then compare with it, otherwise with the pruned model.
        threads: so many threads of torch while it runs; by default as many as torch has now. They are put back afterwards.
        seconds: measured at least, for each form and batch size, beside the warm-up and what ``accelerate`` measures for its choices.
        device: where the models run; by default where ``model`` is.
        progress: as for :func:`nettrim.prune`; it draws only between measurements.

    Raises:
        InvalidInput: a setting out of range; a model that cannot be copied or run on the example, or holds NaN or inf; a reference whose
            outputs have other shapes; no batch size at which the pruned model runs.
    """
    sizes = check_settings(batch_sizes, threads, seconds)
    check(model, example, "bench")
    if reference is not None:
        check(reference, example, "bench: reference")
    place = device_of(model, device)
    if place.type == "cpu":
        kernels_there(progress)
    with _threads(threads), random_state_kept(place), shown(progress, still=True) as advance:
        work = _Work(place, example)
        steps = len(sizes) + 1
        advance(0, steps, "sizes")
        _prepare(work, model, reference)
        for number, batch in enumerate(sizes, 1):
            told = within(advance, number, steps, f"batches of {batch}")
            told(0, 1, "")
            _measure(work, batch, seconds, told)
        advance(steps, steps, "done")
        if not work.timings.get(PRUNED):
            raise InvalidInput(f"bench: the pruned model runs at no batch size: {'; '.join(work.notes)}; choose others")
        machine = this_machine(place)
    return Bench(
        forms=tuple(_finished(work, name) for name in (DENSE, PRUNED, COMPACTED, ACCELERATED) if name in work.forms),
        baseline=PRUNED if reference is None else DENSE,
        batch_sizes=sizes,
        sample_shape=sample_shape(example),
        dtype=str(next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())).removeprefix("torch."),
        seconds=float(seconds),
        weights_hash=hashes(model),
        machine=machine,
        notes=tuple(work.notes),
    )


def check_settings(batch_sizes: Sequence[int], threads: int | None, seconds: float) -> tuple[int, ...]:
    """The batch sizes. Raises InvalidInput where one of the settings is out of range."""
    sizes = tuple(batch_sizes) if isinstance(batch_sizes, Sequence) and not isinstance(batch_sizes, str) else ()
    if not sizes or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes) or len(set(sizes)) < len(sizes):
        raise InvalidInput(
            f"bench: batch_sizes must be different integers of at least 1, found {batch_sizes!r}; (1, 32, 256) is the default"
        )
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise InvalidInput(f"bench: threads must be an integer of at least 1, found {threads!r}; leave it out for those that torch has now")
    number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if not (number and math.isfinite(seconds) and seconds > 0):
        raise InvalidInput(f"bench: seconds must be a positive number, found {seconds!r}; the default is {SECONDS}")
    return sizes


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if number is not None:
            torch.set_num_threads(number)
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------------------ sizes


def _prepare(work: _Work, model: nn.Module, reference: nn.Module | None) -> None:
    """Makes dense, pruned and compacted, and what can be said of them without a clock."""
    wanted = _add(work, PRUNED, model, "", "bench")
    if reference is not None:
        found = _add(work, DENSE, reference, "", "bench: reference")
        other = other_form(wanted, found)
        if other:
            shapes = [[tuple(y.shape) for y in values.tensors.values()] for values in (wanted, found)]
            raise InvalidInput(
                f"bench: the reference's outputs have the shapes {shapes[1]}, the model's {shapes[0]} ({other}); "
                "give the network from which the model was pruned"
            )
    work.notes |= dict.fromkeys(wanted.notes)
    try:
        made = compact(work.models[PRUNED], work.example, device=work.place)
    except Exception as error:  # a user's forward may raise anything
        work.notes[f"{COMPACTED} is left out: {_words(error)}"] = None
    else:
        _add(work, COMPACTED, made.model, PRUNED, "bench: compacted")
        work.notes |= dict.fromkeys(f"{COMPACTED}: {note}" for note in made.notes)


def _add(work: _Work, name: str, model: nn.Module, made_from: str, what: str) -> Outputs:
    """A copy in eval mode and without gradients joins the forms, with its sizes; returns its outputs on the example."""
    twin = replicate(model, work.place, None)
    twin.model.requires_grad_(False)
    found = outputs(twin, work.example, what)  # refuses what does not run before anything is counted
    parameters = list(twin.model.parameters())
    plain, compressed = _bytes(work, name, model)
    counted = _counted(work, name, twin.model)
    work.models[name], work.counts[name] = twin.model, counted
    work.forms[name] = Form(
        name=name,
        made_from=made_from,
        parameters=sum(p.numel() for p in parameters),
        nonzeros=sum(int(torch.count_nonzero(p)) for p in parameters),
        bytes=plain,
        compressed_bytes=compressed,
        macs=None if counted is None else counted.dense,
        nonzero_macs=None if counted is None else counted.nonzero,
        difference=None,
    )
    return found


def _bytes(work: _Work, name: str, model: nn.Module) -> tuple[int | None, int | None]:
    """Sizes of the files as nettrim writes them, plain and compressed."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            written = (
                save_weights(model, Path(folder) / f"{kind}.safetensors", compressed=kind == "packed") for kind in ("plain", "packed")
            )
            plain, packed = (file.stat().st_size for file in written)
        except InvalidInput as error:
            work.notes[f"{name}: bytes on disk are not known: {error}"] = None
            return None, None
    return plain, packed


def _counted(work: _Work, name: str, model: nn.Module) -> Counted | None:
    try:
        # a copy: hooks and torch's counter meet a user's modules
        counted = count(copy.deepcopy(model), work.example, work.place)
    except Exception as error:
        work.notes[f"{name}: multiply-adds could not be counted: {_words(error)}"] = None
        return None
    work.notes |= dict.fromkeys(counted.notes)
    return counted


# ------------------------------------------------------------------------------------------------------------------ times


def _measure(work: _Work, batch: int, seconds: float, advance: Advance) -> None:
    """All forms at one batch size."""
    inputs = _moved(resized(inputs_of(work.example), batch), work.place)
    wanted = _agreed(work, batch, PRUNED, work.models[PRUNED], inputs, None)
    if wanted is None:
        return
    made = {PRUNED: work.models[PRUNED]}
    made |= {name: model for name, model in work.models.items() if name != PRUNED and _agreed(work, batch, name, model, inputs, wanted)}
    kinds, how = dict[str, str](), ""
    base = COMPACTED if COMPACTED in work.models else PRUNED
    try:
        fast = accelerate(work.models[base], inputs, device=work.place, budget=min(_BUDGET, seconds), progress=within(advance, 0, 2))
    except Exception as error:
        work.notes[f"batches of {batch}: {ACCELERATED} is left out: {_words(error)}"] = None
    else:
        work.notes |= dict.fromkeys(f"{ACCELERATED}: {note}" for note in fast.notes)
        if _agreed(work, batch, ACCELERATED, fast.model, inputs, wanted):
            made[ACCELERATED] = fast.model
            kinds, how = {choice.name: choice.kind for choice in fast.choices}, fast.kept
            work.counts[ACCELERATED] = work.counts[base]
            work.forms[ACCELERATED] = replace(work.forms[base], name=ACCELERATED, made_from=base)
    runs = {name: _run(model, inputs, work.place) for name, model in made.items()}
    taken = side_by_side(runs, seconds, tell=within(advance, 1, 2))
    busy = [f"{name} in {len(p.interrupted)} of {len(p.counted)} passes" for name, p in taken.items() if not p.enough]
    if busy:
        work.notes[
            f"batches of {batch}: interrupted were {', '.join(busy)}; all of these count, so that times and ratios say little: "
            "measure again when the machine is less busy, or with more seconds"
        ] = None
    baseline = DENSE if DENSE in taken else PRUNED
    for name in (COMPACTED, ACCELERATED):
        if name in taken and not apart(taken[name], taken[baseline]):
            wins, rounds = faster_in(taken[name], taken[baseline])
            work.notes[
                f"batches of {batch}: {name} and {baseline} could not be told apart: {name} was the faster in {wins} of {rounds} rounds"
            ] = None
    for name, passes in taken.items():
        lower, median, upper = passes.quartiles
        counted = work.counts[name]
        macs = None if counted is None else counted.executed(kinds if name == ACCELERATED else {})
        timing = Timing(batch, median, lower, upper, len(passes.counted), len(passes.interrupted), macs, how if name == ACCELERATED else "")
        work.timings.setdefault(name, []).append(timing)


def _agreed(work: _Work, batch: int, name: str, model: nn.Module, inputs: Any, wanted: Outputs | None) -> Outputs | None:
    """A form's outputs, compared with those wanted; None, and a note, where it does not run or computes something else."""
    where = f"batches of {batch}: {name} is left out"
    try:
        with torch.inference_mode():
            found = outputs(Replica(model, work.place, None), inputs, "bench").cloned()
    except Exception as error:  # a user's forward may raise anything
        work.notes[f"{where}: {_words(error)}"] = None
        return None
    # a trained network may well decide otherwise than the pruned one: the entries of integer outputs need not be equal
    moved = largest_difference(found if wanted is None else wanted, found, exact=name not in (PRUNED, DENSE))
    if not (moved < math.inf and all(bool(torch.isfinite(y).all()) for y in found.scores.values())):
        work.notes[f"{where}: its outputs are not finite, of another shape, or other integers"] = None
        return None
    if name not in (PRUNED, DENSE) and not moved <= allowed(model, _EXACT):
        work.notes[f"{where}: its outputs differ from the pruned model's by {moved:.2g} of the largest"] = None
        return None
    work.differences.setdefault(name, []).append(moved)
    return found


def _run(model: nn.Module, inputs: Any, place: torch.device) -> Callable[[], Any]:
    """One forward pass, until its result is there."""
    if place.type == "cuda":

        def waited() -> None:
            _called(model, inputs)
            torch.cuda.synchronize(place)

        return waited
    return lambda: _called(model, inputs)


def _called(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def _moved(inputs: Any, place: torch.device) -> Any:
    if isinstance(inputs, Mapping):
        return {key: value.to(place) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    return inputs.to(place)


def _finished(work: _Work, name: str) -> Form:
    found = work.differences.get(name)
    return replace(work.forms[name], difference=max(found) if found else None, timings=tuple(work.timings.get(name, ())))


def _words(error: BaseException) -> str:
    """What went wrong, in one line."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else "no reason given"
    return text if isinstance(error, NetTrimError) else f"{type(error).__name__}: {text}"
