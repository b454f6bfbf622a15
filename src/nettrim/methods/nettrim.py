"""Net-Trim, on the preimage or on the published program: within a tolerance, at a penalty, or within a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch

from ..patterns import Pattern, parse
from ..program import LayerProgram, StandardProgram, standardise
from ..solution import Solution, Watch
from ..solvers import l0, l1
from ..solvers.polish import polish as polish_support
from ..status import InvalidInput, Status
from . import published
from .settings import settings
from .targets import PerLayer, check_target, numbers, target_for, weights_kept

SHIFTED = ", correction "  # in a method's description, before how far its targets stand
ABOVE_BEST = 1.01  # an unreachable tolerance is replaced by the best reachable distance times this


@settings
class NetTrim:
    """The sparsest weights whose response stays near the reference network's (Aghasi et al. 2017, 2020;
    preimage program: design section 2).

    Give exactly one target, as a number or as a mapping from layer name (or ``re:pattern``) to number; layers that a mapping does not name
    stay as they are:

    - ``epsilon``: the layer's pre-activations stay within ``epsilon * ||Y||_F`` of the preimage box, so its output moves by
      no more than that;
    - ``sparsity``: the fraction of zeros, in [0, 1);
    - ``penalty``: ``lambda`` of ``1/2 dist^2 + lambda ||W||`` (absolute, so it scales with the number of samples).

    A ``pattern="N:M"`` without target stands for what it implies, a sparsity of 1 - N/M; with a target, both hold.

    Args:
        pattern: which sets of weights may stay, l0 only: ``"N:M"``, ``"rows"`` (whole neurons), ``"columns"`` (whole inputs), ``"RxC"``
            (blocks of R outputs by C inputs); see :mod:`nettrim.patterns`. It comes before a tolerance: where no weights in the pattern
            are found within it, those of least distance are taken, and the status says so.
        program: ``"preimage"``, or ``"halfspace"``: the published program, whose bias is penalised and whose outputs off Omega are held
            to at most 0 (in the cascade, to the original weights' response); l1, epsilon or penalty only. Its lambda is twice ours.
        gamma: with epsilon, cascade only; at least 1, a number or a mapping by layer. Layers whose inputs pruning has changed
            take, instead of epsilon, the tolerance ``sqrt(gamma)`` times the distance of their own original weights (published).
        kappa: risk coefficient in (0, 1]: factor on that tolerance for layers without activation. Below 1 it may be out of reach.
        norm: ``"l1"`` (convex, with a duality gap) or ``"l0"``. Default: l1 for epsilon and penalty, l0 for sparsity and with a pattern.
        polish: least distance on the support that was found. Default: off for l1, whose certificate speaks of the
            optimum itself; on for l0.
        correction: in the cascade, how far the target stands at the reference output (1) rather than at the unpruned layer's own
            response to the pruned inputs (0). Tolerances are guaranteed for 1 only.
        ridge: l0 only: weight of ``||W - W0||^2`` beside the squared distance while weights are chosen, relative to the mean diagonal of
            the Gram matrix. It keeps weights of inputs that hardly vary from growing; distances that are stated do not contain it.
        importance: sparsity with l0 only: how the outputs of a layer share its weights. ``"output"``: a squared error of each counts by how
            much it moves the network's outputs (mean squared gradients on the calibration data); ``"uniform"``: all count the same.
            What is stated and certified is never weighted.
        effort: l0 only. ``"full"``, or ``"quick"``: which weights stay is decided with the target where the original weights have it, and
            only their values see the boxes: a fraction of the time, for a few percent more distance.
        gap: l1 only: relative duality gap at which the solver stops.
        max_iterations: iterations of one solve; the default is 3000 for l1 and 500 for l0.

    Raises:
        InvalidInput: not exactly one target, a setting outside its range, or a pattern with l1 or the published program.
    """

    epsilon: PerLayer | None = None
    sparsity: PerLayer | None = None
    penalty: PerLayer | None = None
    program: Literal["preimage", "halfspace"] = "preimage"
    gamma: PerLayer | None = None
    kappa: float = 1.0
    norm: Literal["l1", "l0"] | None = None
    polish: bool | None = None
    correction: float = 1.0
    ridge: float = 0.001
    importance: Literal["output", "uniform"] = "output"
    gap: float = 0.01
    max_iterations: int | None = None
    pattern: str | None = None
    effort: Literal["full", "quick"] = "full"

    def __post_init__(self) -> None:
        given = [name for name in ("epsilon", "sparsity", "penalty") if getattr(self, name) is not None]
        implied = self.chosen.sparsity
        if len(given) != 1 and (given or implied is None):
            found = " and ".join(given) or "none"
            raise InvalidInput(
                f"NetTrim needs exactly one of epsilon, sparsity and penalty; found {found} (only a pattern 'N:M' needs none)"
            )
        for name in given:
            check_target("NetTrim", name, getattr(self, name))
        if self.norm not in (None, "l1", "l0"):
            raise InvalidInput(f"NetTrim: norm must be 'l1' or 'l0', found {self.norm!r}")
        if self.program not in ("preimage", "halfspace"):
            raise InvalidInput(f"NetTrim: program must be 'preimage' or 'halfspace', found {self.program!r}")
        if self.pattern is not None and (self.norm == "l1" or self.program == "halfspace"):
            found = "norm='l1'" if self.norm == "l1" else "program='halfspace'"
            raise InvalidInput(f"NetTrim: pattern {self.pattern!r} needs norm='l0' on the preimage program, found {found}; leave that out")
        if self.program == "halfspace":
            self._check_published()
        if self.gamma is not None:
            self._check_gamma(self.gamma)
        if not 0 < self.kappa <= 1:
            raise InvalidInput(f"NetTrim: kappa must lie in (0, 1], found {self.kappa}")
        if self.kappa < 1 and self.gamma is None:
            raise InvalidInput(f"NetTrim: kappa ({self.kappa}) tightens tolerances that gamma gives; give gamma too")
        if not 0 <= self.correction <= 1:
            raise InvalidInput(f"NetTrim: correction must lie in [0, 1], found {self.correction}")
        if self.importance not in ("output", "uniform"):
            raise InvalidInput(f"NetTrim: importance must be 'output' or 'uniform', found {self.importance!r}")
        if self.effort not in ("full", "quick"):
            raise InvalidInput(f"NetTrim: effort must be 'full' or 'quick', found {self.effort!r}")
        if self._quick and self.chosen_norm == "l1":
            raise InvalidInput("NetTrim: effort='quick' needs norm='l0', found 'l1', whose time and precision gap= sets; leave effort out")
        if not 0 <= self.ridge < math.inf:
            raise InvalidInput(f"NetTrim: ridge must be >= 0 and finite, found {self.ridge}")
        if not 0 < self.gap < 1:
            raise InvalidInput(f"NetTrim: gap must lie in (0, 1), found {self.gap}")
        if self.max_iterations is not None and self.max_iterations < 1:
            raise InvalidInput(f"NetTrim: max_iterations must be at least 1, found {self.max_iterations}")

    def _check_published(self) -> None:
        if self.sparsity is not None:
            raise InvalidInput("NetTrim: program='halfspace' takes epsilon or penalty; sparsity is a target of the preimage program")
        if self.penalty is not None and any(value <= 0 for value in numbers(self.penalty)):
            raise InvalidInput("NetTrim: program='halfspace' needs a penalty above 0; 0 would leave nothing to minimise")
        for name, value, allowed in (("norm", self.norm, (None, "l1")), ("polish", self.polish, (None, False))):
            if value not in allowed:
                raise InvalidInput(f"NetTrim: program='halfspace' is solved as published, without {name}={value!r}; use 'preimage' for it")
        if self.correction != 1:
            raise InvalidInput(f"NetTrim: program='halfspace' aims at the reference output: correction must be 1, found {self.correction}")

    def _check_gamma(self, gamma: PerLayer) -> None:
        check_target("NetTrim", "gamma", gamma)
        if self.epsilon is None:
            raise InvalidInput(f"NetTrim: gamma says how tolerances grow; it needs epsilon, found {self.kind}")
        if self.correction != 1:
            raise InvalidInput(f"NetTrim: gamma needs the reference output as target: correction must be 1, found {self.correction}")
        if any(value < 1 for value in numbers(gamma)):
            raise InvalidInput(f"NetTrim: gamma must be at least 1, found {gamma}; kappa tightens the last layer")

    @property
    def kind(self) -> str:
        """Which target was given: ``"epsilon"``, ``"sparsity"`` or ``"penalty"``."""
        return "epsilon" if self.epsilon is not None else "penalty" if self.penalty is not None else "sparsity"

    @property
    def chosen(self) -> Pattern:
        """The pattern."""
        return parse(self.pattern, "NetTrim")

    @property
    def targets(self) -> PerLayer:
        """The target that was given, or the sparsity that the pattern implies: a number, or a mapping by layer."""
        value = getattr(self, self.kind)
        value = self.chosen.sparsity if value is None else value
        assert isinstance(value, (int, float, Mapping))
        return value

    @property
    def chosen_norm(self) -> str:
        """The norm in use."""
        return self.norm or ("l0" if self.kind == "sparsity" or self.pattern is not None else "l1")

    @property
    def certified_program(self) -> str:
        """Which l1 program's duality gap the certificate recomputes: ``"epsilon"``, ``"penalty"`` or ``""`` for none."""
        return self.kind if self.chosen_norm == "l1" and self.kind != "sparsity" and self.program == "preimage" else ""

    @property
    def layer_settings(self) -> dict[str, PerLayer]:
        """The target, and gamma where it was given, by name."""
        return {self.kind: self.targets} | ({} if self.gamma is None else {"gamma": self.gamma})

    @property
    def needs_cascade(self) -> str:
        """``"gamma"`` when it was given."""
        return "" if self.gamma is None else "gamma"

    @property
    def weighs_outputs(self) -> bool:
        """True for budgets of l0, unless ``importance`` is ``"uniform"``."""
        return self.kind == "sparsity" and self.chosen_norm == "l0" and self.importance == "output"

    def describe(self) -> str:
        """One line for tables."""
        gamma = "" if self.gamma is None else f", gamma {self.gamma:g}" if isinstance(self.gamma, (int, float)) else ", gamma by layer"
        kappa = "" if self.kappa == 1 else f", kappa {self.kappa:g}"
        pattern = "" if self.pattern is None else f", pattern {self.pattern}"
        effort = ", quick" if self._quick else ""
        shifted = "" if self.correction == 1 else f"{SHIFTED}{self.correction!r}"
        return f"NetTrim {self.chosen_norm}, {self.program} program{pattern}{effort}{gamma}{kappa}{shifted}"

    def target(self, layer: str) -> float | None:
        """The target of that layer; ``None`` when a mapping does not name it."""
        return target_for(self.targets, layer)

    def solve(self, program: LayerProgram, target: float, watch: Watch | None = None) -> Solution:
        """Solves one layer's program for ``target``, a number of the kind that was given."""
        factor = self._inflated(program)
        if not program.weights.shape[1]:
            return replace(self._without_outputs(program, target, factor), inflation=factor)
        return replace(self._solve(program, target, factor, watch), inflation=factor)

    def _without_outputs(self, program: LayerProgram, epsilon: float, factor: float | None) -> Solution:
        """Of a layer whose outputs batch-norm multiplies by zero, all of them: no weights change what it is off the reference output."""
        distance = program.original_distance()
        tolerance = epsilon * program.reference_norm if factor is None else factor * distance
        met = distance <= tolerance + 1e-12 * program.reference_norm
        note = f"{_asked(epsilon, factor)} is out of reach: batch-norm multiplies all outputs by zero, so no weights bring them nearer"
        return Solution(
            *program.stored(program.weights, program.bias),
            Status.CONVERGED if met else Status.INFEASIBLE,
            distance,
            0,
            tolerance=tolerance,
            tolerance_used=tolerance if met else distance,
            gap=0.0 if self.chosen_norm == "l1" else None,
            notes=() if met else (note,),
        )

    def _solve(self, program: LayerProgram, target: float, factor: float | None, watch: Watch | None) -> Solution:
        if self.program == "halfspace":
            return self._published(program, target, factor, watch)
        if self.chosen_norm == "l1":
            standard = standardise(program, power=0.5)
        else:
            # a quick effort never looks at a part of the rows
            shuffled, weighted = not self._quick, self.weighs_outputs
            standard = standardise(program, power=1.0, ridge=self.ridge, shuffled=shuffled, rough=True, weighted=weighted)
        if self.kind == "epsilon":
            return self._within_tolerance(standard, target, factor, watch)
        if self.kind == "penalty":
            return self._penalised(standard, target, watch)
        return self._within_budget(standard, target, watch)

    def _inflated(self, program: LayerProgram) -> float | None:
        """The factor on the original weights' distance, for a layer that takes its tolerance from gamma."""
        gamma = None if self.gamma is None else target_for(self.gamma, program.name)
        if gamma is None or not program.is_moved():
            return None
        return math.sqrt(gamma) * (self.kappa if program.is_linear else 1.0)

    def _published(self, program: LayerProgram, target: float, factor: float | None, watch: Watch | None) -> Solution:
        settings = published.Settings(self.gap, self._l1_iterations(), watch)
        if self.kind == "penalty":
            return published.penalised(program, target, program.is_moved(), settings)
        epsilon = target * program.reference_norm if factor is None else None
        return published.within_tolerance(program, epsilon, factor or 1.0, program.is_moved(), settings)

    def _l1_iterations(self) -> int:
        return self.max_iterations or 5000

    def _l0_iterations(self) -> int:
        return self.max_iterations or 500

    @property
    def _quick(self) -> bool:
        return self.effort == "quick"

    def _within_tolerance(self, p: StandardProgram, epsilon: float, factor: float | None, watch: Watch | None) -> Solution:
        program = p.source
        original = program.original_distance()
        tolerance = epsilon * program.reference_norm if factor is None else factor * original
        used, notes = tolerance, tuple[str, ...]()
        if original > tolerance:
            best = self._best_reachable(program)
            if best.distance > tolerance:
                used = min(best.distance * ABOVE_BEST, original)
                notes = (f"{_asked(epsilon, factor)} is out of reach: the best reachable distance is {_share(best, program)}",)
        none = l1.no_weights(p)
        if none.distance <= tolerance:  # also where the reference output is zero, and the tolerance with it
            gap = 0.0 if self.chosen_norm == "l1" else None
            return Solution(
                none.weights, none.bias, Status.CONVERGED, none.distance, 0, tolerance=tolerance, tolerance_used=tolerance, gap=gap
            )
        if used <= 1e-12 * program.reference_norm:
            return self._fallback(p, tolerance, used, original, notes, watch)
        if self.chosen_norm == "l1":
            result = l1.within_tolerance(p, used, gap=self.gap, max_iterations=self._l1_iterations(), watch=watch)
            W, b, distance, iterations, converged, gap = (
                result.weights,
                result.bias,
                result.distance,
                result.iterations,
                result.converged,
                result.gap,
            )
            if not converged and iterations < self._l1_iterations():
                notes += (f"the gap is what rounding to {str(program.dtype).removeprefix('torch.')} leaves of a smaller one",)
            if self.polish and distance <= used:
                U, c = p.enter(W, b)
                U, c, _ = polish_support(p, U, c)
                W, b = p.restore(U, c)
                distance, gap = program.distance(W, b), l1.dual_gap(program, W, b, epsilon=used)
        else:
            limit = self._l0_iterations()
            found = l0.within_tolerance(p, used, max_iterations=limit, pattern=self.chosen, quick=self._quick, watch=watch)
            if found is None:
                return self._fallback(p, tolerance, used, original, notes, watch)
            W, b = p.restore(found.U, found.c)
            distance, iterations, converged, gap = program.distance(W, b), found.iterations, found.converged, None
        if distance > used:
            return self._fallback(p, tolerance, used, original, notes, watch)
        status = Status.INFEASIBLE if used > tolerance else Status.CONVERGED if converged else Status.ITERATION_LIMIT
        return Solution(W, b, status, distance, iterations, tolerance=tolerance, tolerance_used=used, gap=gap, notes=notes)

    def _best_reachable(self, program: LayerProgram) -> Solution:
        """Least distance over all weights of the layer."""
        p = standardise(program, power=0.5)
        every = torch.ones_like(p.U0, dtype=torch.bool)
        U, c, _ = polish_support(p, p.U0, p.c0, support=every, rounds=30, steps=60, tolerance=1e-6)
        W, b = p.restore(U, c)
        return Solution(W, b, Status.CONVERGED, p.source.distance(W, b), 0)

    def _fallback(
        self, p: StandardProgram, tolerance: float, used: float, original: float, notes: tuple[str, ...], watch: Watch | None
    ) -> Solution:
        """No sparse weights met the tolerance: the original ones when they do, otherwise those of least distance.

        Where the pattern bounds how many weights stay, those of least distance within it.
        """
        if self.chosen.sparsity is not None:
            best = self._budget(p, p.source.weights.numel(), watch)
            met = best.distance <= tolerance
            status, wider = (best.status, tolerance) if met else (Status.INFEASIBLE, best.distance)
            note = () if met else (f"pattern {self.pattern} has no weights within the tolerance: those of least distance found were taken",)
            return replace(best, status=status, tolerance=tolerance, tolerance_used=wider, notes=(*notes, *note))
        if original <= tolerance or used <= 1e-12 * p.source.reference_norm:
            return self._original(p.source, tolerance, original)
        best = self._best_reachable(p.source)
        met = best.distance <= tolerance
        return replace(
            best,
            status=Status.ITERATION_LIMIT if met else Status.INFEASIBLE,
            tolerance=tolerance,
            tolerance_used=tolerance if met else max(used, best.distance),
            notes=(*notes, "no sparse weights were found within the tolerance: those of least distance were taken"),
        )

    def _original(self, program: LayerProgram, tolerance: float, distance: float) -> Solution:
        W, b = program.stored(program.weights, program.bias)
        status = Status.ORIGINAL_KEPT
        note = ("the tolerance is below what the arithmetic can resolve",) if tolerance > 0 else ()
        used = max(tolerance, distance)
        return Solution(W, b, status, distance, 0, tolerance=tolerance, tolerance_used=used, notes=note, kept=True)

    def _penalised(self, p: StandardProgram, penalty: float, watch: Watch | None) -> Solution:
        program = p.source
        if penalty == 0 and self.chosen.sparsity is not None:
            return replace(self._budget(p, program.weights.numel(), watch), penalty=0.0)
        if penalty == 0:  # nothing but the distance is left to minimise
            best = self._best_reachable(program)
            own = Solution(*program.stored(program.weights, program.bias), Status.CONVERGED, program.original_distance(), 0, kept=True)
            return replace(own if own.distance <= best.distance else best, penalty=0.0)
        if self.chosen_norm == "l1":
            result = l1.penalised(p, penalty, gap=self.gap, max_iterations=self._l1_iterations(), watch=watch)
            W, b, iterations, converged = result.weights, result.bias, result.iterations, result.converged
            gap: float | None = result.gap
        else:
            limit = self._l0_iterations()
            found = l0.penalised(p, penalty, max_iterations=limit, pattern=self.chosen, quick=self._quick, watch=watch)
            (W, b), iterations, converged, gap = p.restore(found.U, found.c), found.iterations, found.converged, None
        if self.polish and self.chosen_norm == "l1":
            U, c = p.enter(W, b)
            U, c, _ = polish_support(p, U, c)
            W, b = p.restore(U, c)
            gap = l1.dual_gap(program, W, b, penalty=penalty)
        status = Status.CONVERGED if converged else Status.ITERATION_LIMIT
        return Solution(W, b, status, program.distance(W, b), iterations, penalty=penalty, gap=gap)

    def _within_budget(self, p: StandardProgram, sparsity: float, watch: Watch | None) -> Solution:
        program = p.source
        given = None if self.sparsity is None else sparsity
        return self._budget(p, weights_kept("NetTrim", self.chosen, given, program.name, *program.weights.shape), watch)

    def _budget(self, p: StandardProgram, k: int, watch: Watch | None) -> Solution:
        """Least distance with at most ``k`` weights, in the pattern."""
        program = p.source
        if self.chosen_norm == "l0":
            limit, polished = self._l0_iterations(), self.polish is not False
            found = l0.within_budget(p, k, max_iterations=limit, polished=polished, pattern=self.chosen, quick=self._quick, watch=watch)
            (W, b), iterations, converged = p.restore(found.U, found.c), found.iterations, found.converged
        else:
            result = l1.within_budget(p, k, gap=self.gap, max_iterations=self._l1_iterations(), watch=watch)
            W, b, iterations, converged = result.weights, result.bias, result.iterations, result.converged
            if self.polish:
                U, c = p.enter(W, b)
                U, c, _ = polish_support(p, U, c)
                W, b = p.restore(U, c)
        status = Status.CONVERGED if converged else Status.ITERATION_LIMIT
        return Solution(W, b, status, program.distance(W, b), iterations)


def _share(best: Solution, program: LayerProgram) -> str:
    """A distance as a share of the reference output's norm, in words."""
    norm = program.reference_norm
    return f"{best.distance / norm:.4g} of the reference norm" if norm > 0 else f"{best.distance:.4g}, and the reference output is zero"


def _asked(epsilon: float, factor: float | None) -> str:
    """What the tolerance was asked to be, in words."""
    return f"epsilon {epsilon:g}" if factor is None else f"{factor:.4g} times the original weights' distance"
