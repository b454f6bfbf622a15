"""``prune``: the entry point."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .allocation import check_allocation
from .arithmetic import full_float32
from .attention import closed, opened
from .calibration import Batches, Calibration
from .capture import (
    Scan,
    device_of,
    hashes,
    random_state_kept,
    read_graph,
    reference_replica,
    scan,
)
from .certificate import Certificate
from .choice import check_order, method_of
from .corrections import Parts, corrected_graph, corrections_of
from .heldout import certify_heldout, check_heldout
from .layers import view
from .methods import Method, PerLayer
from .opening import how_opened
from .preimage import Activation
from .progress import Advance, interruptible, shown, within
from .reading import Correction
from .report import PruneReport, as_certified
from .run import Run
from .selection import check_targets, refuse_shared_norms, select
from .status import InvalidInput, NothingToPrune
from .summary import result_text
from .whole import reasons_of, whole_model
from .wrappers import takes_models, unwrapped

MAX_SAMPLES = 20_000


@dataclass(frozen=True)
class PruneResult:
    """A pruned copy of the model, the report of how it was made, and the certificate of what it guarantees."""

    model: nn.Module
    report: PruneReport
    certificate: Certificate

    def __str__(self) -> str:
        return result_text(self.report, self.certificate)

    __repr__ = __str__

    def save(self, folder: str | Path, *, compressed: bool = False, force: bool = True) -> Path:
        """Writes model.safetensors, report.json, certificate.json and report.html; all of them or none, whenever it is interrupted.

        With ``compressed``, tensors with many zeros are stored as values and positions (docs/files.md). ``load`` and ``verify``
        restore them to the last bit; other readers of safetensors see packed bytes. An earlier result in the folder is replaced whole, and
        refused with ``force=False``; files that nettrim did not write are never replaced.

        Raises:
            InvalidInput: the model was changed since its certificate was made; or the folder cannot be written to, or holds a file of
                somebody else (or, with ``force=False``, an earlier result).
        """
        if hashes(opened(unwrapped(self.model))) != self.certificate.weights_hash:
            raise InvalidInput(
                "save: the model's weights are not those that its certificate speaks of: they were changed afterwards; "
                "nettrim.recertify(result, result.model, model, calibration) makes a result that speaks of them"
            )
        from .checkpoint import save  # checkpoint renders the page; only those who save need it

        return save(self, folder, compressed=compressed, force=force)

    def masks(self) -> dict[str, NDArray[np.bool_]]:
        """For each pruned layer, which weights are not zero, in the shape in which its module keeps them."""
        modules = dict(opened(unwrapped(self.model)).named_modules())
        return {layer.name: (view(layer.name, modules[layer.name]).weight.detach() != 0).cpu().numpy() for layer in self.report.layers}


@takes_models("model", first=check_order)
def prune(
    model: nn.Module,
    calibration: Batches,
    method: Method | None = None,
    *,
    sparsity: PerLayer | None = None,
    epsilon: PerLayer | None = None,
    scheme: Literal["cascade", "parallel"] = "cascade",
    allocation: Literal["uniform", "global"] = "uniform",
    target: Literal["parameters", "bytes", "macs"] = "parameters",
    sweeps: int = 0,
    layers: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    activations: Mapping[str, str | Activation] | None = None,
    readings: Mapping[str, Parts] | None = None,
    add_bias: bool = False,
    heldout: Batches | None = None,
    max_samples: int = MAX_SAMPLES,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool | Advance = True,
) -> PruneResult:
    """Prunes a trained network layer by layer and certifies the result. ``model`` itself is left unchanged.

    Args:
        model: any module in which torch.fx or hooks can find layers to prune. The projections inside ``nn.MultiheadAttention`` are layers
            ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj`` of that module, whatever parameters it keeps them in.
        calibration: unlabelled batches that can be read more than once: tensors, tuples whose first item is the input, or mappings of
            keyword inputs; or one tensor with samples along its first dimension. A DataLoader with ``shuffle=True`` is read in the order
            of its data set.
        method: ``NetTrim(...)``, or one to measure against: ``Magnitude``, ``Random``, ``Wanda``, ``OBS``, ``SparseGPT``,
            ``LinearADMM``, ``LOBS``. Instead of a method, ``sparsity`` or ``epsilon``.
        sparsity: ``NetTrim(sparsity=...)`` with its defaults: the fraction of weights that become zero, in [0, 1); a number, or a mapping
            from layer name (or ``re:pattern``) to number.
        epsilon: ``NetTrim(epsilon=...)`` with its defaults: how far each layer's output may move, relative to its norm; in the same forms.
        scheme: ``"parallel"`` (every layer sees the reference network's inputs) or ``"cascade"`` (the pruned network's).
        allocation: ``"uniform"`` gives every layer the method's target. ``"global"`` shares one sparsity out over all pruned layers so that
            the network's outputs move least, from a curve of error against density measured for each layer (magnitude pruning: by one
            threshold on all weights, as published). The report says what was decided.
        target: with ``"global"``, what the sparsity is a fraction of: weights, their bytes, or multiply-adds of a sample.
        sweeps: how often all layers are solved once more after a cascade for sparsities, with the importance of their outputs measured in
            the pruned network. A sweep after which the outputs are not nearer to the reference's is undone, and is the last.
        layers: names of layers, names of modules that contain them, or ``re:pattern``; by default every Linear layer.
        ignore: the same, to leave out.
        activations: by layer name, the activation that follows (``"relu"``, ``"hardtanh(-1, 1)"``, ...), where the model's graph does not
            show it.
        readings: by layer name or ``re:pattern``, corrections of what the report says is read of a layer: ``"activation"`` (its name),
            ``"norm"`` and ``"pool"`` (the name of the batch-norm or max-pooling module behind it; checked on the first batch), and
            ``"branch"`` (what is added to its output). ``None`` takes a part out, and what stands behind it too where that is not
            stated. No network bound rests on what the graph does not show.
        add_bias: gives Linear, Conv1d and Conv2d layers a bias where neither they nor a batch-norm behind them hold an offset; the result's
            state_dict then has those keys more. Layers inside attention keep their form.
        heldout: batches that the certificate's statement about unseen inputs is made from; with labels, accuracy too.
        max_samples: most rows kept for a layer whose activation's preimages are boxes; chosen with ``seed``. One layer at a time is held,
            at about 12 bytes * max_samples * (N + 3 M), besides 32 bytes * N^2 for its Gram matrix. Layers that are matched linearly
            use every row and keep none.
        seed: chooses the rows where there are more than ``max_samples``.
        device: where the work is done; by default where the model is (on the CPU when that has no float64).
        progress: ``True`` shows a bar with the time left on a terminal, and a line now and then elsewhere, on standard error, once it has
            taken two seconds; ``False`` nothing; or a function of (pieces done, pieces in all, what is being done).

    Returns:
        PruneResult: ``.model`` (same class, same state_dict keys, but for biases that were asked for), ``.report``, ``.certificate``.

    Raises:
        InvalidInput: anything that cannot be used; raised before any layer is solved.
    """
    started = time.perf_counter()
    method = method_of(method, sparsity, epsilon)
    _check_settings(method, scheme, max_samples, seed)
    check_allocation(method, allocation, target, sweeps, scheme)
    given, model = model, opened(model)
    names = select(model, layers, ignore, given)
    modules = dict(model.named_modules())
    check_targets(method, names, modules)
    corrections = corrections_of(readings or {}, activations or {}, names, modules)
    batches = Calibration(calibration)
    unseen = None if heldout is None else Calibration(heldout, "heldout")
    place = device_of(model, device)
    runs: list[Run] = []
    with interruptible(lambda: _far(runs)), shown(progress) as advance, random_state_kept(place), full_float32():
        advance(0, 1, "reading the calibration data")
        first = next(iter(batches))
        encoders, opening = how_opened(given, place, first)
        model = model if encoders else opened(given, encoders=False)
        reference, notice = reference_replica(model, place, first)
        found = scan(reference, names, batches)
        if unseen is not None:
            check_heldout(reference, unseen, batches)
        chosen, names = names, _called(names, found, layers)
        wanted = [name for name in names if method.target(name) is not None]  # what follows the others is read step by step
        corrections = {name: correction for name, correction in corrections.items() if name in wanted}
        graph = corrected_graph(reference, read_graph(reference, wanted, {}, first), corrections, first)
        notes = [text for text in (opening, notice, graph.notice) if text]
        run = Run(model, method, scheme, batches, found, graph, reference, max_samples, seed, advance)
        refuse_shared_norms(model, run.offset_holders())
        runs.append(run)
        run.plan(len(wanted), sweeps, allocation == "global", unseen is not None)
        if add_bias:
            notes += run.add_biases(wanted)
        run.weigh(reference)
        if allocation == "global":
            run.allocate(wanted, target)
        run.solve(wanted)
        for number in range(1, sweeps + 1):
            if not run.sweep(wanted, number):
                break
        notes += run.notes
        certificate = run.certify(notice)
        if unseen is not None:
            told = within(advance, run.solving + 1, run.pieces)
            certificate = replace(certificate, heldout=certify_heldout(reference, run.pruned, unseen, batches, advance=told))
    notes += [f"not compared: {part}" for part in certificate.network.not_compared]
    whole = whole_model(run.result, wanted, reasons_of(run.result, chosen, names))
    report = PruneReport(
        method=method.describe(),
        scheme=scheme,
        seed=seed,
        samples=found.samples,
        seconds=time.perf_counter() - started,
        sample_shape=found.sample_shape,
        layers=tuple(as_certified(run.reports, certificate)),
        model=whole,
        notes=(*notes, *whole.notes()),
        settings=_settings(method, run, sweeps, corrections),
    )
    return PruneResult(closed(run.result, given), report, certificate)


def _check_settings(method: Method, scheme: str, max_samples: object, seed: object) -> None:
    """Refuses settings outside their range. Raises InvalidInput."""
    if scheme not in ("cascade", "parallel"):
        raise InvalidInput(f"scheme must be 'cascade' or 'parallel', found {scheme!r}")
    for name, value, least in (("max_samples", max_samples, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InvalidInput(f"{name} must be a whole number of at least {least}, found {value!r}")
    if scheme == "parallel" and method.needs_cascade:
        raise InvalidInput(f"{type(method).__name__}: {method.needs_cascade} speaks of the cascade; leave it out, or pass scheme='cascade'")


def _far(runs: Sequence[Run]) -> str:
    """How far an interrupted run was."""
    run = runs[0] if runs else None
    if run is None or not run.reports:
        return "before the first layer was done"
    return f"after {len(run.reports)} of {run.count} layers"


def _called(names: list[str], found: Scan, layers: Sequence[str] | None) -> list[str]:
    """The layers that the calibration data reach, in the order of their calls."""
    missing = [name for name in names if name not in found.order]
    named = [name for name in missing if layers is not None and name in layers]
    if named:
        raise InvalidInput(
            f"layer {named[0]!r} is never called on the calibration data, so nothing is known of its inputs; "
            "remove it from layers=, or give data that reach it"
        )
    if not found.order:
        raise NothingToPrune(f"none of the layers {', '.join(names[:8])} is called on the calibration data")
    return found.order


def _settings(method: Method, run: Run, sweeps: int, corrections: Mapping[str, Correction]) -> dict[str, Any]:
    """What was chosen, for the report: the method's own settings, and those of the run."""
    own: dict[str, Any] = asdict(method) if is_dataclass(method) and not isinstance(method, type) else {}
    return (
        {key: dict(value) if isinstance(value, Mapping) else value for key, value in own.items() if value is not None}
        | ({"allocation": run.shares} if run.shares else {})
        | ({"sweeps": sweeps} if sweeps else {})
        | {"max_samples": run.max_samples, "readings": {name: c.record() for name, c in corrections.items()}, "added_biases": run.added}
    )
