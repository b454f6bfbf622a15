"""``compare``: the methods side by side on one model and its data; data only, no presentation (``render`` makes the table and picture)."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from . import calibration as data
from .attention import opened
from .calibration import Batches, Calibration
from .capture import Replica, device_of, hashes, random_state_kept, replicate
from .corrections import Parts, corrections_of
from .experiments.journal import Journal
from .heldout import Reading, check_heldout, read_outputs
from .methods import LOBS, OBS, LinearADMM, Magnitude, Method, NetTrim, Random, SparseGPT, Wanda
from .outputs import outputs_of, squares
from .patterns import parse
from .predictions import right, stayed
from .preimage import Activation
from .progress import NOTHING_KEPT, Advance, shown, within
from .pruning import MAX_SAMPLES, prune
from .records import build
from .selection import check_targets, select
from .staging import check_writable
from .status import InvalidInput
from .verification import versions
from .wrappers import takes_models

ALL = "all"
JOURNAL = "compare.jsonl"
SPARSITIES = (0.5, 0.7, 0.9)
METHODS: dict[str, Callable[..., Method]] = {
    "NetTrim": NetTrim,
    "Magnitude": Magnitude,
    "Random": Random,
    "Wanda": Wanda,
    "OBS": OBS,
    "SparseGPT": SparseGPT,
    "LinearADMM": LinearADMM,
    "LOBS": LOBS,
}


@dataclass(frozen=True)
class ComparedRun:
    """One method at one sparsity. ``density`` and ``densities`` (by layer) are shares of weights that are not zero.

    ``discrepancy`` is ``||X_hat - X||_F / ||X||_F`` of the network's outputs on the data that were measured on, ``calibration_discrepancy``
    the same on the calibration data, in float64, and ``bound`` its proven upper bound (``None`` where there is none). ``agreement`` is the
    share of predicted classes that stayed, ``accuracy`` that of labelled entries predicted right (``None`` without classes, or without
    labels that fit).
    ``seconds`` is the time of ``prune``, its certificate included.
    """

    method: str
    sparsity: float | None
    pattern: str | None
    density: float
    densities: dict[str, float]
    accuracy: float | None
    agreement: float | None
    discrepancy: float
    calibration_discrepancy: float
    bound: float | None
    holds: bool
    seconds: float

    @property
    def label(self) -> str:
        """Method and pattern."""
        return self.method if self.pattern is None else f"{self.method} {self.pattern}"


@dataclass(frozen=True)
class Comparison:
    """All runs, in the order of methods and sparsities; ``accuracy`` is the reference network's own.

    ``measured_on`` is ``"heldout"`` or ``"calibration"``, with ``samples`` samples; ``metric`` names the number by which networks are
    compared: ``"accuracy"`` where labels were given, otherwise ``"agreement"``, or ``"discrepancy"`` where outputs are no classes.
    """

    runs: tuple[ComparedRun, ...]
    accuracy: float | None
    metric: str
    measured_on: str
    samples: int
    calibration_samples: int
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for JSON."""
        return asdict(self) | {"runs": [asdict(run) for run in self.runs]}

    def __str__(self) -> str:
        from .render.compare_table import compare_text  # presentation stays in render

        return compare_text(self)

    __repr__ = __str__


def methods_named(names: str | Sequence[str], pattern: str | None = None) -> list[str]:
    """Names of ``METHODS`` for names in any case; ``"all"`` stands for all of them that take the pattern.

    Raises:
        InvalidInput: a name that is not known; the message gives the nearest one. Or no name, a method named that does not take the
            pattern, or no such pattern.
    """
    able = _taking(pattern)
    given = [names] if isinstance(names, str) else list(names)
    if not given:
        raise InvalidInput(f"compare: name at least one method of {', '.join(METHODS)}, or {ALL!r}")
    known = {name.lower(): name for name in METHODS}
    found: list[str] = []
    for name in given:
        key = str(name).lower().replace("-", "")
        if key == ALL:
            found += able
        elif key in known:
            if known[key] not in able:
                raise InvalidInput(f"{known[key]} does not take pattern {pattern!r}; of the methods, {', '.join(able)} do")
            found.append(known[key])
        else:
            near = get_close_matches(key, [*known, ALL], n=1, cutoff=0.0)[0]
            raise InvalidInput(f"method {name!r} is not known; the nearest is {known.get(near, ALL)!r} (methods: {', '.join(METHODS)})")
    return list(dict.fromkeys(found))


def _taking(pattern: str | None) -> list[str]:
    """The methods that take a pattern."""
    kind = parse(pattern, "compare").kind
    return [
        name
        for name, make in METHODS.items()
        if not kind or ("pattern" in inspect.signature(make).parameters and kind in getattr(make, "takes", (kind,)))
    ]


def first_samples(batches: Batches, count: int) -> list[Any]:
    """The first ``count`` samples, in batches as they come; labels with them.

    Raises:
        InvalidInput: there are fewer.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InvalidInput(f"samples must be a whole number of at least 1, found {count!r}")
    found: list[Any] = []
    left = count
    for batch in Calibration(batches):
        held = data.samples(batch)
        found.append(batch if held <= left else _cut(batch, left, held))
        left -= min(held, left)
        if not left:
            return found
    raise InvalidInput(f"samples: {count} were asked for, the calibration data hold {count - left}; ask for fewer, or leave it out")


def _cut(batch: Any, count: int, held: int) -> Any:
    """The first ``count`` of the ``held`` samples of a batch."""
    if isinstance(batch, torch.Tensor):
        return batch[:count] if batch.ndim and len(batch) == held else batch
    if isinstance(batch, Mapping):
        return {key: _cut(value, count, held) for key, value in batch.items()}
    return tuple(_cut(value, count, held) for value in batch) if isinstance(batch, (tuple, list)) else batch


@takes_models("model")
def compare(
    model: nn.Module,
    calibration: Batches,
    *,
    methods: str | Sequence[str] = ALL,
    sparsities: Sequence[float] | None = None,
    pattern: str | None = None,
    heldout: Batches | None = None,
    scheme: Literal["cascade", "parallel"] = "cascade",
    layers: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    activations: Mapping[str, str | Activation] | None = None,
    readings: Mapping[str, Parts] | None = None,
    max_samples: int = MAX_SAMPLES,
    seed: int = 0,
    device: torch.device | str | None = None,
    folder: str | Path | None = None,
    resume: bool = True,
    progress: bool | Advance = True,
) -> Comparison:
    """Prunes a model with every method at every sparsity and measures what each leaves. ``model`` is left unchanged.

    Args:
        model: as for :func:`nettrim.prune`.
        calibration: as for :func:`nettrim.prune`; every method sees the same.
        methods: ``"all"`` (with a pattern, all that take it), or names of methods in any case.
        sparsities: fractions of zeros, in [0, 1); by default 0.5, 0.7 and 0.9, and with a pattern what that leaves.
        pattern: which sets of weights may stay (``"2:4"``), for all methods.
        heldout: what is measured on, with labels for accuracy; by default the calibration data.
        scheme, layers, ignore, activations, readings, max_samples, device: as for :func:`nettrim.prune`.
        seed: of the pruning runs, and of Random.
        folder: where each result is kept as soon as it is there, in a file from which an interrupted comparison continues, and which a
            later one with more methods or sparsities adds to.
        resume: ``False`` begins that file anew.
        progress: as for :func:`nettrim.prune`; a piece is a run.

    Raises:
        InvalidInput: anything that cannot be used, before any work is done; a folder that belongs to another model, other data or settings.
    """
    names = methods_named(methods, pattern)
    wanted = _runs(names, sparsities, pattern, seed)
    whole = opened(model)
    chosen = select(whole, layers, ignore, model)
    modules = dict(whole.named_modules())
    corrections_of(readings or {}, activations or {}, chosen, modules)
    for run in wanted.values():
        check_targets(run.method, chosen, modules)
    place = device_of(model, device)
    batches = Calibration(calibration)
    unseen = None if heldout is None else Calibration(heldout, "heldout")
    measured = batches if unseen is None else unseen
    kept = NOTHING_KEPT if folder is None else f"what is finished is kept in {folder}, where the same comparison continues"
    with random_state_kept(place), shown(progress, pieces="runs", kept=kept) as advance:
        reference = replicate(model, place, None)
        if unseen is not None:
            check_heldout(reference, unseen, batches)
        reading = read_outputs((reference,), measured)
        dense = _measure(reference, reference, measured, reading)
        settings = {
            "scheme": scheme,
            "layers": chosen,
            "activations": {name: getattr(value, "name", value) for name, value in (activations or {}).items()},
            "readings": {
                name: {part: getattr(value, "name", value) for part, value in parts.items()} for name, parts in (readings or {}).items()
            },
            "max_samples": max_samples,
            "seed": seed,
        }
        samples = sum(data.samples(batch) for batch in batches)
        header = {
            "comparison": settings,
            "model": hashes(model),
            "calibration": _data_hash(batches, labelled=unseen is None),
            "heldout": None if unseen is None else _data_hash(unseen, labelled=True),
            "versions": versions(),
        }
        journal = None if folder is None else Journal(check_writable(folder) / JOURNAL, header, resume=resume)
        records: dict[str, dict[str, Any]] = {}

        def solve(run: _Wanted, done: int) -> ComparedRun:
            start = time.perf_counter()
            result = prune(
                model,
                batches,
                run.method,
                scheme=scheme,
                layers=layers,
                ignore=ignore,
                activations=activations,
                readings=readings,
                max_samples=max_samples,
                seed=seed,
                device=device,
                progress=within(advance, done, len(wanted), run.words),
            )
            seconds = time.perf_counter() - start
            found = _measure(reference, replicate(result.model, place, None), measured, reading)
            network = result.certificate.network
            return ComparedRun(
                method=run.name,
                sparsity=run.sparsity,
                pattern=pattern,
                density=result.report.density,
                densities={layer.name: layer.density for layer in result.report.layers},
                accuracy=found.accuracy,
                agreement=found.agreement,
                discrepancy=found.discrepancy,
                calibration_discrepancy=_share(network.achieved, network.reference_norm),
                bound=None if network.bound is None or not math.isfinite(network.bound) else _share(network.bound, network.reference_norm),
                holds=result.certificate.holds,
                seconds=seconds,
            )

        with ExitStack() as stack:
            writing: Journal | None = None
            known = {} if journal is None else {key: journal.records[key] for key in wanted if key in journal.records}
            for done, (key, run) in enumerate(sorted(wanted.items(), key=lambda item: item[0] not in known)):
                record = known.get(key)
                if record is None:
                    advance(done, len(wanted), run.words)
                    record = asdict(solve(run, done))
                    if journal is not None:
                        # not before there is a result: settings that prune refuses leave no file behind that other settings would not fit
                        writing = writing or stack.enter_context(journal)
                        record = writing.add(key, record)
                records[key] = record
        advance(len(wanted), len(wanted), "done")
    return Comparison(
        runs=tuple(_run_of(records[key]) for key in wanted),
        accuracy=dense.accuracy,
        metric="accuracy" if dense.accuracy is not None else "agreement" if dense.agreement is not None else "discrepancy",
        measured_on="calibration" if unseen is None else "heldout",
        samples=dense.samples,
        calibration_samples=samples,
        settings=settings,
    )


def _run_of(record: dict[str, Any]) -> ComparedRun:
    """A run from its record in the file of finished runs. Raises InvalidInput."""
    densities = record.get("densities")
    if not isinstance(densities, dict) or not all(type(share) in (int, float) and 0 <= share <= 1 for share in densities.values()):
        raise InvalidInput("ComparedRun: densities must be shares by layer; the file is damaged: pass resume=False to begin it anew")
    return build(ComparedRun, record, densities=densities)


@dataclass(frozen=True)
class _Wanted:
    name: str
    sparsity: float | None
    method: Method
    words: str


def _runs(names: Sequence[str], sparsities: Sequence[float] | None, pattern: str | None, seed: int) -> dict[str, _Wanted]:
    """Every method at every sparsity, by a key that holds all of its settings."""
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InvalidInput(f"seed must be a whole number of at least 0, found {seed!r}")
    if sparsities is None:
        sparsities = SPARSITIES if pattern is None else ()
    elif isinstance(sparsities, (str, int, float)) or not len(sparsities):
        raise InvalidInput(f"compare: sparsities must be a list of numbers in [0, 1), found {sparsities!r}")
    found = {}
    for name in names:
        for sparsity in dict.fromkeys(sparsities or (None,)):
            given: dict[str, Any] = {} if sparsity is None else {"sparsity": sparsity}
            given |= {} if pattern is None else {"pattern": pattern}
            given |= {"seed": seed} if name == "Random" else {}
            method = METHODS[name](**given)
            key = json.dumps({"method": name, **asdict(method)})  # type: ignore[call-overload]  # every method is a dataclass
            words = " ".join(str(value) for value in (name, pattern, sparsity) if value is not None)
            found[key] = _Wanted(name, sparsity, method, words)
    return found


@dataclass(frozen=True)
class _Measured:
    samples: int
    accuracy: float | None
    agreement: float | None
    discrepancy: float


def _measure(reference: Replica, pruned: Replica, batches: Calibration, reading: Reading) -> _Measured:
    """Accuracy, agreement and relative discrepancy of a network's outputs; scores that are not finite are never right."""
    samples = predictions = same = correct = labelled = 0
    moved = size = 0.0
    for batch in batches:
        before, after = (outputs_of(network.run(batch)) for network in (reference, pruned))
        of_batch = squares(before, after)
        moved, size = moved + of_batch[0], size + of_batch[1]
        samples += data.samples(batch)
        for classes in reading.classes:
            kept = stayed(before.tensors[classes.path], after.tensors[classes.path], classes)
            predictions, same = predictions + kept.numel(), same + int(kept.sum())
        truth, labels = reading.truth, data.labels(batch)
        if truth is not None and labels is not None:
            found = right(after.tensors[truth.path], truth, labels, data.samples(batch), reading.layouts.get(truth.path))
            assert found is not None  # read on the same batches
            correct, labelled = correct + found[0], labelled + found[1]
    if not math.isfinite(size) or size == 0:
        raise InvalidInput(
            f"{batches.what}: the reference network's outputs are {'all zero' if size == 0 else 'not finite'}; check its weights"
        )
    if not math.isfinite(moved):
        raise InvalidInput(f"{batches.what}: the pruned network puts out NaN or inf; leave that method out, or use float32")
    return _Measured(
        samples,
        correct / labelled if labelled else None,
        same / predictions if predictions else None,
        _share(math.sqrt(moved), math.sqrt(size)),
    )


def _share(value: float, norm: float) -> float:
    return value / norm if norm > 0 else 0.0


def _data_hash(batches: Calibration, *, labelled: bool) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        data.update_hash(digest, batch)
        truth = data.labels(batch) if labelled else None
        if truth is not None:
            data.update_tensor(digest, truth)
    return digest.hexdigest()
