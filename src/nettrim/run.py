"""One pruning run: layer after layer, the copies it works on, and what it reports of each."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import schemes
from .allocation import CURVE_ROWS, Curve, by_magnitude, check_budget, error_curve, is_ranked, shared
from .attention import in_attention
from .calibration import Calibration
from .capture import Replica, Scan, hashes, layer_task, replicate
from .certificate import Certificate
from .graph import Graph
from .importance import output_importance
from .layers import LayerView, can_take_bias, view
from .layers import add_bias as give_bias
from .methods import Method
from .methods.targets import kept_weights, takes_nothing, weights_kept
from .outputs import outputs_of, squares
from .program import LayerProgram
from .progress import Advance, within
from .report import LayerReport
from .solution import Solution
from .status import InvalidInput, NothingToPrune, Status
from .tasks import LayerTask
from .units import Call, unit_of
from .verification import Claim, Setup, certify


class Run:
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
        advance: Advance,
    ) -> None:
        self.method, self.scheme, self.batches, self.found, self.graph, self.reference = method, scheme, batches, found, graph, reference
        self.max_samples, self.seed = max_samples, seed
        self.original = model
        self.result = copy.deepcopy(model)
        self.result.zero_grad(set_to_none=True)  # gradients of the unpruned weights say nothing about the pruned ones
        self.pruned = replicate(model, reference.device, reference.dtype)
        self.reference.graph = self.pruned.graph = graph
        self.reports: list[LayerReport] = []
        self.claims: list[Claim] = []
        self.added: list[str] = []
        self.notes: list[str] = []
        self.importance: dict[str, Tensor] = {}
        self.shares: dict[str, Any] = {}
        self.count = self.index = 0
        self.begun = 0.0
        self.advance, self.finished, self.solving, self.pieces = advance, 0, 0, 1

    def plan(self, layers: int, sweeps: int, curves: bool, heldout: bool) -> None:
        """How much there is to do: a piece for each curve and each solution of a layer, one for the certificate, one for held-out data."""
        self.solving = layers * (1 + sweeps + (curves and not is_ranked(self.method)))
        self.pieces = self.solving + 1 + heldout

    def tell(self, what: str) -> None:
        """What is being done now."""
        self.advance(self.finished, self.pieces, what)

    def _where(self, name: str) -> str:
        return f"pruning {name}, layer {self.index + 1} of {self.count}"

    def offset_holders(self) -> dict[str, str]:
        """By layer, the batch-norm whose bias takes its offset."""
        units = self.reference.units(list(self.graph.readings))
        return {name: unit.reading.norm for name, unit in units.items() if unit.fold is not None and unit.fold.home == "norm"}

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
            schemes.parallel(names, self._capture, self._settle)
        else:
            schemes.cascade(names, self.pruned, self._capture, self._settle)

    def weigh(self, network: Replica) -> None:
        """Measures what the outputs of the layers count for in ``network``, for a method that asks."""
        if self.method.weighs_outputs:
            self.tell("measuring the importance of outputs")
            self.importance, notice = output_importance(network, list(self.graph.readings), self.batches, self.seed)
            self.notes += [notice] if notice and notice not in self.notes else []

    def allocate(self, names: Sequence[str], target: str) -> None:
        """Shares the method's sparsity out over the layers: the method then has one for each."""
        sparsity = self.method.targets
        assert isinstance(sparsity, (int, float)) and is_dataclass(self.method)
        units = self.reference.units(names)
        sizes = {name: unit.view.weight.numel() for name, unit in units.items()}
        each = {
            "parameters": dict.fromkeys(names, 1.0),
            "bytes": {name: float(self._layer(name).weight.element_size()) for name in names},
            "macs": {name: self.found.rows[name] / self.found.samples for name in names},
        }[target]
        whole = sum(each[name] * sizes[name] for name in names)
        budget = (1 - sparsity) * whole
        check_budget(each, budget, target)
        curves: list[Curve] = []
        if is_ranked(self.method):
            kept = by_magnitude({name: unit.view.weight for name, unit in units.items()}, each, budget)
        else:
            known = set(names) <= self.importance.keys()
            if self.method.weighs_outputs and not known:
                self.notes.append("allocation: the importance of some layers' outputs is not known: their relative distances were compared")
            for index, name in enumerate(names):
                self.tell(f"measuring the curve of {name}, layer {index + 1} of {len(names)}")
                task = self._task(name, None, min(self.max_samples, CURVE_ROWS), self.importance[name] if known else None)
                curves.append(error_curve(self.method, task, name, each[name]))
                self.finished += 1
            kept = shared(curves, budget)
        self.method = replace(self.method, sparsity={name: 1 - kept[name] / sizes[name] for name in names})
        densities = ", ".join(f"{name} {kept[name] / sizes[name]:.2%}" for name in names)
        spent = sum(each[name] * kept[name] for name in names) / whole
        self.notes.append(f"allocation: {spent:.4g} of all {target} stay, shared out as densities {densities}")
        self.shares = {"target": target, "kept": kept, "curves": {c.name: [list(c.kept), list(c.errors)] for c in curves}}

    def sweep(self, names: Sequence[str], number: int) -> bool:
        """Solves all layers again; undoes it and returns ``False`` when the outputs are not nearer to the reference's than before."""
        before = self._discrepancy()
        states = [copy.deepcopy(model.state_dict()) for model in (self.result, self.pruned.model)]
        reports, claims = self.reports, self.claims
        self.reports, self.claims, self.index = [], [], 0
        self.weigh(self.pruned)
        self.solve(names)
        after = self._discrepancy()
        better = after < before
        self.notes.append(f"sweep {number}: discrepancy of the outputs {before:.4g} -> {after:.4g}" + ("" if better else "; undone"))
        if not better:
            for model, state in zip((self.result, self.pruned.model), states, strict=True):
                model.load_state_dict(state)
            self.reports, self.claims = reports, claims
        return better

    def _discrepancy(self) -> float:
        """Of the pruned network's outputs from the reference's on the calibration data, relative to their norm."""
        moved = size = 0.0
        for batch in self.batches:
            of_batch = squares(*(outputs_of(network.run(batch)) for network in (self.reference, self.pruned)))
            moved, size = moved + of_batch[0], size + of_batch[1]
        return math.sqrt(moved / size if size else moved)

    def _layer(self, name: str) -> LayerView:
        return view(name, dict(self.result.named_modules())[name])

    def _capture(self, name: str, pruned: Replica | None) -> LayerTask:
        self.begun = time.perf_counter()
        self.tell(f"{self._where(name)}: reading inputs")
        return self._task(name, pruned, self.max_samples, self.importance.get(name))

    def _task(self, name: str, pruned: Replica | None, max_samples: int, importance: Tensor | None) -> LayerTask:
        return layer_task(
            name,
            self.reference,
            pruned,
            self.batches,
            self.found,
            max_samples=max_samples,
            seed=self.seed,
            correction=self.method.correction,
            dtype=self._layer(name).dtype,
            importance=importance,
        )

    def _settle(self, name: str, task: LayerTask) -> None:
        """Solves a layer, writes what was found, and reports it."""
        target = self.method.target(name)
        assert target is not None
        solution = self._solve(name, task, target)
        self._write(name, solution)
        if self.pruned.dtype is None and not solution.kept and self._overflows():
            note = "with its new weights the network leaves the range of its own dtype: left as it was"
            solution = _as_it_was(task, Status.SKIPPED, note, solution)
            self._write(name, solution)
        self._report(name, task, solution, target)
        self.index += 1
        self.finished += 1
        done = self.reports[-1]
        self.tell(f"{name}: {done.density:.1%} of {done.weights:,} weights kept, distance {done.relative_distance:.2%}")

    def _solve(self, name: str, task: LayerTask, target: float) -> Solution:
        def watch(iteration: int, distance: float, density: float) -> None:
            share = distance / max(task.reference_norm, 1e-300)
            self.tell(f"{self._where(name)}: step {iteration}, distance {share:.2%}, density {density:.1%}")

        if self._takes_nothing(name, target):
            return _as_it_was(task, Status.CONVERGED, "its sparsity takes none of its weights: kept as it was, to the last bit")
        try:
            return task.solve(lambda program, own: _finite(self.method.solve(program, own, watch), program), self.method.kind, target)
        except (InvalidInput, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            if not self.reports and isinstance(error, InvalidInput):  # nothing is lost yet
                raise
            asked = target * task.reference_norm if self.method.kind == "epsilon" else None
            started = Solution(task.weights, task.bias, Status.SKIPPED, 0.0, 0, tolerance=asked)
            return _as_it_was(task, Status.SKIPPED, f"it could not be solved ({error}): left as it was", started)

    def _takes_nothing(self, name: str, target: float) -> bool:
        """Whether the layer's target is a sparsity that it has already."""
        if self.method.kind != "sparsity":
            return False
        layer, own = view(name, self.original.get_submodule(name)), type(self.method).__name__
        stated = None if getattr(self.method, "sparsity", target) is None else target
        kept = weights_kept(own, self.method.chosen, stated, name, *layer.shape)
        return takes_nothing(self.method.chosen, kept, layer.weights(), layer.groups)

    def _overflows(self) -> bool:
        """Whether the network as pruned so far puts out, in any of its layers, what is not finite where the reference network's is."""
        finite = True

        def check(_: str, call: Call) -> None:
            nonlocal finite
            finite = finite and bool(torch.isfinite(call.native().y).all())

        for batch in self.batches:
            output = self.pruned.stream(batch, self.names, check)
            finite = finite and all(bool(torch.isfinite(Y).all()) for Y in outputs_of(output).scores.values())
            if not finite:
                return True
        return False

    def _write(self, name: str, solution: Solution) -> None:
        """Writes a layer's solution into the result and into the copy that the next layer sees."""
        reading = self.graph.readings[name]
        for model, source in ((self.result, self.original), (self.pruned.model, self.reference.model)):
            unit = unit_of(name, dict(model.named_modules()), reading)
            if solution.kept:
                unit.restore(unit_of(name, dict(source.named_modules()), reading))
            else:
                unit.write(solution.weights, solution.bias)

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
        moving = calls > 1 and solution.inflation is not None  # only in a cascade
        if moving:
            notes.append("the distance that gamma multiplies moved while it was pruned, so the certificate states only what was achieved")
        exact = self.scheme == "parallel" or (self.method.correction == 1 and not later and not moving)
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
                target=self._asked(target, solution),
                status=solution.status,
                nonzeros=int((layer.weights() != 0).sum()),
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
                norm=reading.norm,
            )
        )
        kind = self.method.certified_program if solution.gap is not None and exact else ""
        level = solution.tolerance_used if kind == "epsilon" else solution.penalty
        by_count = self.method.kind == "sparsity" and self.method.sparsity is not None
        self.claims.append(
            Claim(
                name=name,
                activation=reading.activation,
                tolerance=solution.tolerance if exact else None,
                gap_kind=kind,
                gap_level=level if kind and level is not None else 0.0,
                source=reading.source,
                budget=kept_weights(solution.weights.numel(), target) if by_count else None,
                pattern=self.method.chosen.name,
            )
        )

    def _asked(self, target: float, solution: Solution) -> str:
        """What was asked of a layer, as reports hold it: a kind, and a number that reads back as it was (or a pattern)."""
        if solution.inflation is not None:
            return f"inflation {solution.inflation!r}"
        if self.method.kind == "sparsity" and self.method.sparsity is None:
            return f"pattern {self.method.chosen.name}"
        return f"{self.method.kind} {target!r}"

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
        advance = within(self.advance, self.solving, self.pieces)
        return certify(self.reference, self.pruned, self.claims, self.graph, self.batches, self.found, setup, advance)


def _as_it_was(task: LayerTask | LayerProgram, status: Status, note: str, instead_of: Solution | None = None) -> Solution:
    """The original weights and bias of a layer or of a program, instead of a solution that cannot be used."""
    distance = task.original_distance()
    if instead_of is None:
        return Solution(task.weights, task.bias, status, distance, 0, notes=(note,), kept=True)
    asked = instead_of.tolerance
    return replace(
        instead_of,
        weights=task.weights,
        bias=task.bias,
        status=status,
        distance=distance,
        tolerance_used=None if asked is None else max(asked, distance),
        gap=None,
        violation=None,
        kept=True,
        notes=(*instead_of.notes, note),
    )


def _finite(solution: Solution, program: LayerProgram) -> Solution:
    """The solution, or the original weights when it holds values that the layer's dtype cannot."""
    parts = (solution.weights, *(() if solution.bias is None else (solution.bias,)))
    if all(bool(torch.isfinite(part).all()) for part in parts) and math.isfinite(solution.distance):
        if solution.gap is None or math.isfinite(solution.gap):
            return solution
        return replace(solution, gap=None, notes=(*solution.notes, "no duality gap is known of its weights"))
    note = f"the solution holds values beyond the range of {program.dtype}: left as it was; prune it in float32"
    return _as_it_was(program, Status.SKIPPED, note, solution)
