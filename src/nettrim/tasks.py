"""One layer's optimisation problem: a program for each group of a convolution (one for every other layer), and their solutions as one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .methods.targets import kept_weights, shares
from .preimage import nearest_point
from .program import MOVED, LayerProgram, Moments, dead_inputs, from_boxes
from .solution import Solution
from .status import Status
from .units import Unit

_WORST = (Status.INFEASIBLE, Status.ITERATION_LIMIT, Status.ORIGINAL_KEPT, Status.CONVERGED, Status.SKIPPED)


@dataclass(frozen=True)
class LayerTask:
    """The programs of a layer; ``columns`` says which outputs each of them speaks of.

    Outputs in no program have a batch-norm factor of zero: nothing that the layer does reaches them, so their weights become zero. What
    they are off the reference output is a fixed amount of a program (``LayerProgram.unreachable``), and their reference output is part of
    its norm: of the program of their group, or the first one where a group has no other outputs. A layer that has no others at all has one
    program without outputs.
    """

    programs: tuple[LayerProgram, ...]
    columns: tuple[Tensor, ...]
    weights: Tensor
    bias: Tensor | None
    rows: int

    @property
    def reference_norm(self) -> float:
        """Frobenius norm of the layer's reference output on the rows of the programs."""
        return math.hypot(*(p.reference_norm for p in self.programs))

    def original_distance(self) -> float:
        """Distance of the layer's own weights."""
        return math.hypot(*(p.original_distance() for p in self.programs))

    def dead_inputs(self) -> int:
        """Inputs that never vary, over all groups."""
        return sum(dead_inputs(p) for p in self.programs)

    def targets(self, kind: str, target: float) -> list[float]:
        """What to ask of each program, so that the layer as a whole meets ``target``; the kept weights of all groups add up exactly."""
        if kind != "sparsity" or len(self.programs) == 1:
            return [target] * len(self.programs)
        sizes = [p.weights.numel() for p in self.programs]
        return [1 - count / size for count, size in zip(shares(kept_weights(sum(sizes), target), sizes), sizes, strict=True)]

    def solve(self, solve: Callable[[LayerProgram, float], Solution], kind: str, target: float) -> Solution:
        """Solves all programs and puts their solutions together."""
        if not self.programs[0].weights.numel() and kind != "epsilon":  # nothing to choose, and no tolerance to meet
            (program,) = self.programs
            return self._merged(
                [Solution(*program.stored(program.weights, program.bias), Status.CONVERGED, program.original_distance(), 0)]
            )
        return self._merged([solve(p, own) for p, own in zip(self.programs, self.targets(kind, target), strict=True)])

    def _merged(self, parts: Sequence[Solution]) -> Solution:
        if len(parts) == 1 and len(self.columns[0]) == self.weights.shape[1]:
            return parts[0]
        W = torch.zeros_like(self.weights)
        b = None if self.bias is None else self.bias.clone()
        for columns, part in zip(self.columns, parts, strict=True):
            W[:, columns] = part.weights.double()
            if b is not None and part.bias is not None:
                b[columns] = part.bias.double()
        first = parts[0]
        gaps = [part.gap for part in parts if part.gap is not None]
        violations = [part.violation for part in parts if part.violation is not None]
        return replace(
            first,
            weights=W,
            bias=b,
            status=min((part.status for part in parts), key=_WORST.index),
            distance=math.hypot(*(part.distance for part in parts)),
            iterations=max(part.iterations for part in parts),
            tolerance=_together([part.tolerance for part in parts]),
            tolerance_used=_together([part.tolerance_used for part in parts]),
            gap=max(gaps) if len(gaps) == len(parts) and len(parts) == 1 else None,  # gaps of parts are no gap of the whole
            violation=max(violations) if violations else None,
            kept=all(part.kept for part in parts),
            notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
        )


def _together(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.hypot(*known) if len(known) == len(values) else None


class TaskBuilder:
    """Collects the rows of one layer, batch by batch: as moments where boxes are points, otherwise as they are, ``count`` of them."""

    def __init__(self, unit: Unit, count: int, dtype: torch.dtype, name: str) -> None:
        self.unit, self.dtype, self.name = unit, dtype, name
        self.W, self.b = unit.weights(), unit.bias()
        N, M = self.W.shape
        G = unit.view.groups
        device = self.W.device
        live = torch.ones(M, dtype=torch.bool, device=device) if unit.fold is None else unit.fold.live
        every = torch.arange(M, device=device).reshape(G, -1)
        groups = [(g, every[g][live[every[g]]]) for g in range(G)]
        self.groups = [(g, columns) for g, columns in groups if len(columns)] or groups[:1]
        spoken = {g: position for position, (g, _) in enumerate(self.groups)}
        self.cut = (~live).nonzero()[:, 0]
        self.owner = torch.tensor([spoken.get(g, 0) for g in (self.cut // (M // G)).tolist()], dtype=torch.long, device=device)
        self.cut_square, self.cut_reference = (torch.zeros(len(self.cut), dtype=torch.float64, device=device) for _ in range(2))
        self.N = N
        self.filled = 0
        self.moments = self.kept = None
        if unit.uses_moments:
            self.moments = [Moments(self.W[:, c], None if self.b is None else self.b[c], dtype) for _, c in self.groups]
        else:
            make = torch.empty
            self.kept = tuple(make(count, width, dtype=torch.float64, device=device) for width in (G * N, M, M, M))

    def add(self, inputs: Tensor, lo: Tensor, hi: Tensor, Y: Tensor) -> None:
        """Adds rows: inputs (p, G N), boxes less what is added to the layer, and reference outputs (p, M)."""
        if len(self.cut):
            Z = lo.new_zeros(len(lo), len(self.cut), dtype=torch.float64) + (0.0 if self.b is None else self.b[self.cut])
            self.cut_square += (Z - nearest_point(Z, lo[:, self.cut].double(), hi[:, self.cut].double())).square().sum(0)
            self.cut_reference += Y[:, self.cut].double().square().sum(0)
        if self.kept is not None:
            end = self.filled + len(inputs)
            for kept, new in zip(self.kept, (inputs, lo, hi, Y), strict=True):
                kept[self.filled : end] = new
            self.filled = end
            return
        assert self.moments is not None
        for (g, columns), moments in zip(self.groups, self.moments, strict=True):
            moments.add(inputs[:, g * self.N : (g + 1) * self.N], lo[:, columns], Y[:, columns])
        self.filled += len(inputs)

    def build(self, importance: Tensor | None = None) -> LayerTask:
        """The task of all rows added; ``importance`` (M,) as in the programs."""
        programs = []
        for position, (g, columns) in enumerate(self.groups):
            fold = None if self.unit.fold is None else self.unit.fold.columns(columns)
            if self.moments is not None:
                program = replace(self.moments[position].program(), fold=fold)
            else:
                assert self.kept is not None
                inputs, lo, hi, Y = self.kept
                whole = len(columns) == self.W.shape[1]
                picked = (lo, hi, Y) if whole else (lo[:, columns], hi[:, columns], Y[:, columns])
                program = from_boxes(
                    inputs if whole and self.unit.view.groups == 1 else inputs[:, g * self.N : (g + 1) * self.N],
                    picked[0],
                    picked[1],
                    self.W[:, columns],
                    None if self.b is None else self.b[columns],
                    reference_norm=float(torch.linalg.vector_norm(picked[2])),
                    dtype=self.dtype,
                    fold=fold,
                )
            of_program = self.owner == position
            programs.append(
                replace(
                    program,
                    name=self.name,
                    importance=None if importance is None else importance[columns],
                    reference_norm=math.hypot(program.reference_norm, math.sqrt(float(self.cut_reference[of_program].sum()))),
                    unreachable=program.unreachable + float(self.cut_square[of_program].sum()),
                )
            )
        if len(programs) > 1:  # what is asked of a layer is asked of it as a whole
            distance = math.hypot(*(p.original_distance() for p in programs))
            moved = distance > MOVED * torch.finfo(self.dtype).eps * math.hypot(*(p.reference_norm for p in programs))
            linear = all(p.is_point for p in programs)
            programs = [replace(p, part_of_moved=moved, part_of_linear=linear) for p in programs]
        return LayerTask(tuple(programs), tuple(columns for _, columns in self.groups), self.W, self.b, self.filled)
