"""``prune``: the entry point."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from . import schemes
from .attention import closed, in_attention, opened
from .calibration import Batches, Calibration
from .capture import (
    Replica,
    Scan,
    device_of,
    hashes,
    layer_task,
    random_state_kept,
    read_graph,
    reference_replica,
    replicate,
    scan,
)
from .certificate import Certificate
from .corrections import Parts, corrected_graph, corrections_of
from .graph import Graph
from .layers import LayerView, can_take_bias, view
from .layers import add_bias as give_bias
from .methods import Method
from .methods.targets import check_room
from .opening import how_opened
from .preimage import Activation
from .program import LayerProgram
from .progress import Observer, observer
from .report import LayerReport, PruneReport
from .selection import resolve, select
from .solution import Solution
from .status import InvalidInput, NothingToPrune, Status
from .tasks import LayerTask
from .units import unit_of
from .verification import Claim, Setup, certify, certify_heldout, check_heldout

MAX_SAMPLES = 20_000


@dataclass(frozen=True)
class PruneResult:
    """A pruned copy of the model, the report of how it was made, and the certificate of what it guarantees."""

    model: nn.Module
    report: PruneReport
    certificate: Certificate

    def save(self, folder: str | Path) -> Path:
        """Writes model.safetensors, report.json, certificate.json and report.html; all of them or none."""
        from .checkpoint import save  # checkpoint renders the page; only those who save need it

        return save(self, folder)

    def masks(self) -> dict[str, NDArray[np.bool_]]:
        """For each pruned layer, which weights are not zero, in the shape in which its module keeps them."""
        modules = dict(opened(self.model).named_modules())
        return {layer.name: (view(layer.name, modules[layer.name]).weight.detach() != 0).cpu().numpy() for layer in self.report.layers}


def prune(
    model: nn.Module,
    calibration: Batches,
    method: Method,
    *,
    scheme: Literal["cascade", "parallel"] = "cascade",
    layers: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    activations: Mapping[str, str | Activation] | None = None,
    readings: Mapping[str, Parts] | None = None,
    add_bias: bool = False,
    heldout: Batches | None = None,
    max_samples: int = MAX_SAMPLES,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool | Observer = True,
) -> PruneResult:
    """Prunes a trained network layer by layer and certifies the result. ``model`` itself is left unchanged.

    Args:
        model: any module in which torch.fx or hooks can find layers to prune. The projections inside ``nn.MultiheadAttention`` are layers
            ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj`` of that module, whatever parameters it keeps them in.
        calibration: unlabelled batches that can be read more than once: tensors, tuples whose first item is the input, or mappings of
            keyword inputs; or one tensor with samples along its first dimension.
        method: ``NetTrim(...)``, or one to measure against: ``Magnitude``, ``Random``, ``Wanda``, ``OBS``, ``SparseGPT``, ``LinearADMM``.
        scheme: ``"parallel"`` (every layer sees the reference network's inputs) or ``"cascade"`` (the pruned network's).
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
        progress: ``True`` shows a live bar on a terminal and plain lines elsewhere (standard error).

    Returns:
        PruneResult: ``.model`` (same class, same state_dict keys, but for biases that were asked for), ``.report``, ``.certificate``.

    Raises:
        InvalidInput: anything that cannot be used; raised before any layer is solved.
    """
    started = time.perf_counter()
    if scheme not in ("cascade", "parallel"):
        raise InvalidInput(f"scheme must be 'cascade' or 'parallel', found {scheme!r}")
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"model must be an nn.Module, found {type(model).__name__}")
    if isinstance(method, type) or not callable(getattr(method, "solve", None)):
        raise InvalidInput(f"method must be a pruning method such as nettrim.NetTrim(epsilon=0.02), found {method!r}")
    if isinstance(max_samples, bool) or not isinstance(max_samples, int) or max_samples < 1:
        raise InvalidInput(f"max_samples must be a whole number of at least 1, found {max_samples!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InvalidInput(f"seed must be a whole number of at least 0, found {seed!r}")
    if scheme == "parallel" and method.needs_cascade:
        raise InvalidInput(f"{type(method).__name__}: {method.needs_cascade} speaks of the cascade; leave it out, or pass scheme='cascade'")
    given, model = model, opened(model)
    names = select(model, layers, ignore, given)
    for setting, value in method.layer_settings.items():
        if isinstance(value, Mapping):
            resolve(value, names, f"{type(method).__name__}.{setting}")
    modules = dict(model.named_modules())
    for name in names:
        if method.kind == "sparsity" and (target := method.target(name)) is not None:
            layer = view(name, modules[name])
            check_room(type(method).__name__, method.chosen, target, name, *layer.shape, layer.groups)
    corrections = corrections_of(readings or {}, activations or {}, names, modules)
    batches = Calibration(calibration)
    unseen = None if heldout is None else Calibration(heldout, "heldout")
    place = device_of(model, device)
    with observer(progress) as show, random_state_kept(place):
        show.message("reading the calibration data")
        first = next(iter(batches))
        encoders, opening = how_opened(given, place, first)
        model = model if encoders else opened(given, encoders=False)
        reference, notice = reference_replica(model, place, first)
        found = scan(reference, names, batches)
        if unseen is not None:
            check_heldout(reference, unseen, batches)
        names, notes = _called(names, found, layers)
        wanted = [name for name in names if method.target(name) is not None]  # what follows the others is read step by step
        corrections = {name: correction for name, correction in corrections.items() if name in wanted}
        graph = corrected_graph(reference, read_graph(reference, wanted, {}, first), corrections, first)
        notes = [*([opening] if opening else []), *([notice] if notice else []), *([graph.notice] if graph.notice else []), *notes]
        run = _Run(model, method, scheme, batches, found, graph, reference, max_samples, seed, show)
        if add_bias:
            notes += run.add_biases(wanted)
        run.solve(wanted)
        show.message("certifying")
        certificate = run.certify(notice)
        if unseen is not None:
            certificate = replace(certificate, heldout=certify_heldout(reference, run.pruned, unseen, batches))
    notes += [f"{name}: no {method.kind} was given for it; left as it is" for name in names if method.target(name) is None]
    report = PruneReport(
        method=method.describe(),
        scheme=scheme,
        seed=seed,
        samples=found.samples,
        seconds=time.perf_counter() - started,
        sample_shape=found.sample_shape,
        layers=tuple(run.reports),
        notes=tuple(notes),
        settings=_settings(method)
        | {"max_samples": max_samples, "readings": {name: c.record() for name, c in corrections.items()}, "added_biases": run.added},
    )
    return PruneResult(closed(run.result, given), report, certificate)


class _Run:
    """One pruning run: the copies it works on and what it has reported so far."""

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        scheme: str,
        batches: Calibration,
        found: Scan,
        graph: Graph,
        reference: Replica,
        max_samples: int,
        seed: int,
        show: Observer,
    ) -> None:
        self.method, self.scheme, self.batches, self.found, self.graph, self.reference = method, scheme, batches, found, graph, reference
        self.max_samples, self.seed, self.show = max_samples, seed, show
        self.original = model
        self.result = copy.deepcopy(model)
        self.result.zero_grad(set_to_none=True)  # gradients of the unpruned weights say nothing about the pruned ones
        self.pruned = replicate(model, reference.device, reference.dtype)
        self.reference.graph = self.pruned.graph = graph
        self.reports: list[LayerReport] = []
        self.claims: list[Claim] = []
        self.added: list[str] = []
        self.count = self.index = 0
        self.begun = 0.0

    def add_biases(self, names: Sequence[str]) -> list[str]:
        """Gives layers without any home for an offset a bias of zero, in all copies; notes on those that must stay without."""
        homeless = [name for name, unit in self.reference.units(names).items() if unit.bias() is None]
        fits = {name: can_take_bias(self.result.get_submodule(name)) and not in_attention(self.result, name) for name in homeless}
        self.added = [name for name in homeless if fits[name]]
        for name in self.added:
            for model in (self.result, self.reference.model, self.pruned.model):
                give_bias(model.get_submodule(name))
        return [f"{name}: it takes no bias (attention, or a forward of its own); pruned without" for name in homeless if not fits[name]]

    def solve(self, names: Sequence[str]) -> None:
        if not names:
            raise NothingToPrune(f"{type(self.method).__name__}: no {self.method.kind} was given for any layer that the model calls")
        self.count = len(names)
        self.names = list(names)
        if self.scheme == "parallel":
            schemes.parallel(names, self._capture, self._solve, self._write)
        else:
            schemes.cascade(names, self.pruned, self._capture, self._solve, self._write)

    def _layer(self, name: str) -> LayerView:
        return view(name, dict(self.result.named_modules())[name])

    def _capture(self, name: str, pruned: Replica | None) -> LayerTask:
        self.begun = time.perf_counter()
        self.show.begin(name, self.index, self.count)
        return layer_task(
            name,
            self.reference,
            pruned,
            self.batches,
            self.found,
            max_samples=self.max_samples,
            seed=self.seed,
            correction=self.method.correction,
            dtype=self._layer(name).dtype,
        )

    def _solve(self, name: str, task: LayerTask) -> Solution:
        target = self.method.target(name)
        assert target is not None

        def watch(iteration: int, distance: float, density: float) -> None:
            self.show.update(name, iteration, distance / max(task.reference_norm, 1e-300), density)

        solution = task.solve(lambda program, own: _finite(self.method.solve(program, own, watch), program), self.method.kind, target)
        self._report(name, task, solution, target)
        return solution

    def _write(self, name: str, solution: Solution) -> None:
        reading = self.graph.readings[name]
        for model in (self.result, self.pruned.model):
            unit_of(name, dict(model.named_modules()), reading).write(solution.weights, solution.bias)
        self.index += 1
        self.show.end(self.reports[-1])

    def _report(self, name: str, program: LayerTask, solution: Solution, target: float) -> None:
        layer, reading = self._layer(name), self.graph.readings[name]
        notes = list(solution.notes)
        if not layer.weight.requires_grad:
            notes.append(
                "its weights are frozen (requires_grad=False); they were pruned all the same and stay frozen; use ignore= to leave them"
            )
        if name in self.added:
            notes.append("it was given a bias (add_bias)")
        calls = self.found.calls[name]
        if calls > 1:
            notes.append(f"called {calls} times in a pass: all calls count as rows of one program")
            if self.scheme == "cascade":
                notes.append("its later inputs depend on itself: the certificate checks its tolerance on the finished network")
        if solution.inflation is not None:
            notes.append(f"tolerance: {solution.inflation:.4g} times the distance of its original weights (gamma)")
        if solution.violation is not None:
            notes.append(f"the largest violation of its constraints off Omega is {solution.violation:.2g}")
        if self.found.rows[name] > program.rows:
            notes.append(f"{program.rows} of {self.found.rows[name]} rows were used (max_samples)")
        later = sorted(self.graph.feeding(name, self.names[self.names.index(name) + 1 :])) if self.scheme == "cascade" else []
        if later:
            notes.append(
                f"its sum is changed by {', '.join(later)}, pruned after it: what is certified of the sum stands with the last of them"
            )
        exact = self.scheme == "parallel" or (self.method.correction == 1 and not later)
        if self.scheme == "cascade" and self.method.correction != 1 and solution.tolerance is not None:
            notes.append("correction below 1: the tolerance was kept to a shifted target, so the certificate states only what was achieved")
        self.reports.append(
            LayerReport(
                name=name,
                kind=layer.kind,
                inputs=layer.shape[0],
                outputs=layer.shape[1],
                activation=reading.activation.name,
                reading=reading.words,
                target=f"{self.method.kind} {target:g}" if solution.inflation is None else f"inflation {solution.inflation:g}",
                status=solution.status,
                nonzeros=int((solution.weights != 0).sum()),
                weights=solution.weights.numel(),
                rows=program.rows,
                reference_norm=program.reference_norm,
                distance=solution.distance,
                tolerance=solution.tolerance,
                original_distance=program.original_distance(),
                gap=solution.gap,
                iterations=solution.iterations,
                seconds=time.perf_counter() - self.begun,
                dead_inputs=program.dead_inputs(),
                notes=tuple(notes),
                violation=solution.violation,
            )
        )
        kind = self.method.certified_program if solution.gap is not None and exact else ""
        level = solution.tolerance_used if kind == "epsilon" else solution.penalty
        self.claims.append(
            Claim(
                name=name,
                activation=reading.activation,
                tolerance=solution.tolerance_used if exact else None,
                gap_kind=kind,
                gap_level=level if kind and level is not None else 0.0,
                source=reading.source,
            )
        )

    def certify(self, notice: str) -> Certificate:
        setup = Setup(
            method=self.method.describe(),
            program=self.method.program,
            scheme=self.scheme,
            arithmetic=notice or "float64",
            max_samples=self.max_samples,
            seed=self.seed,
            reference_hash=hashes(self.original),
            weights_hash=hashes(self.result),
        )
        return certify(self.reference, self.pruned, self.claims, self.graph, self.batches, self.found, setup)


def _called(names: list[str], found: Scan, layers: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """The layers that the calibration data reach, in the order of their calls; and notes on those that they do not."""
    missing = [name for name in names if name not in found.order]
    named = [name for name in missing if layers is not None and name in layers]
    if named:
        raise InvalidInput(
            f"layer {named[0]!r} is never called on the calibration data, so nothing is known of its inputs; "
            "remove it from layers=, or give data that reach it"
        )
    if not found.order:
        raise NothingToPrune(f"none of the layers {', '.join(names[:8])} is called on the calibration data")
    return found.order, [f"{name}: never called on the calibration data; left as it is" for name in missing]


def _finite(solution: Solution, program: LayerProgram) -> Solution:
    """The solution, or the original weights when it holds values that the layer's dtype cannot."""
    parts = (solution.weights, *(() if solution.bias is None else (solution.bias,)))
    if all(bool(torch.isfinite(part).all()) for part in parts):
        return solution
    distance = program.original_distance()
    return replace(
        solution,
        weights=program.weights.to(program.dtype),
        bias=None if program.bias is None else program.bias.to(program.dtype),
        status=Status.SKIPPED,
        distance=distance,
        tolerance_used=None if solution.tolerance is None else max(solution.tolerance, distance),
        gap=None,
        notes=(*solution.notes, f"the solution holds values beyond the range of {program.dtype}: left as it was; prune it in float32"),
    )


def _settings(method: Method) -> dict[str, Any]:
    if not is_dataclass(method) or isinstance(method, type):
        return {}
    return {key: dict(value) if isinstance(value, Mapping) else value for key, value in asdict(method).items() if value is not None}
