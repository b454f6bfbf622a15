"""A part of a network as one module that runs on sparse weights, its activations staying features-first in between."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..solvers.reference import MissingExtra
from ..status import InvalidInput
from . import kernels_team
from .sparse_module import SparseModule
from .sparse_steps import FUNCTIONS, SparseWeights, Step

if TYPE_CHECKING:
    from .sparse_layout import Field, Operation, Plan

_PLANS = 16
"""Input sizes whose plans are kept."""
_WORKSPACES = 4
"""Idle workspaces kept for an input size; as many calls at once share no memory."""
_ALONE = 200_000
"""Multiply-adds up to which one thread is taken to be faster than waking others, where it was not measured."""


_Program = tuple[NDArray[np.int64], NDArray[np.int64], int, NDArray[np.int64]]
"""The program, its counters, its address, and its operations as rows."""


class SparseRegion(SparseModule):
    """Runs its layers as direct sparse products (numba); returns one tensor, or a tuple of several.

    Inputs are images (B, C, H, W) where ``images`` says so, else (..., features). ``chunk`` rows of the batch are computed at a time, so
    that activations stay in the cache; one thread does it where that is no more than ``alone`` multiply-adds.
    """

    def __init__(
        self, steps: Sequence[Step], weights: Mapping[str, SparseWeights], images: Sequence[bool], outputs: Sequence[int], chunk: int = 16
    ) -> None:
        super().__init__(steps, weights, outputs)
        self.images, self.chunk = tuple(images), chunk
        self.alone: float = _ALONE

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The region's outputs."""
        self.refuse(tensors)
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise InvalidInput(
                "an accelerated model cannot be traced, as its numbers come from native code; trace the one it was made from"
            )
        for tensor, image in zip(tensors, self.images, strict=True):
            if image and tensor.ndim != 4:
                raise InvalidInput(
                    f"accelerated region: takes images (B, C, H, W), found shape {tuple(tensor.shape)}; add the batch dimension"
                )
        leads = [tensor.shape[:1] if image else tensor.shape[:-1] for tensor, image in zip(tensors, self.images, strict=True)]
        if any(lead != leads[0] for lead in leads):
            raise InvalidInput(
                f"accelerated region: its inputs have the leading sizes {[tuple(lead) for lead in leads]}; they must be equal"
            )
        flat = [tensor if image else tensor.reshape(-1, tensor.shape[-1]) for tensor, image in zip(tensors, self.images, strict=True)]
        total = flat[0].shape[0]
        if not total:
            raise InvalidInput("accelerated region: the batch is empty; give at least one sample")
        sizes = tuple(tuple(tensor.shape[1:]) for tensor in flat)
        if total <= self.chunk:
            results = self._chunk(flat, sizes, total, None, 0)
        else:
            made: list[Tensor] | None = None
            for begin in range(0, total, self.chunk):
                number = min(self.chunk, total - begin)
                made = self._chunk([tensor[begin : begin + number] for tensor in flat], sizes, number, made, begin, total)
            assert made is not None
            results = made
        results = [y if y.ndim == 4 else y.reshape(*leads[0], y.shape[-1]) for y in results]
        return results[0] if len(results) == 1 else tuple(results)

    def _chunk(
        self, tensors: list[Tensor], sizes: tuple[tuple[int, ...], ...], number: int, made: list[Tensor] | None, begin: int, total: int = 0
    ) -> list[Tensor]:
        """Runs one chunk; its outputs, or all outputs ``made`` so far with its own written into them."""
        plans = self._plan(number, sizes)
        workspace = plans.take()
        try:
            workspace.run(tensors, self.threads(plans.work))
            if not total:
                return [workspace.views[key].clone(memory_format=torch.contiguous_format) for key in self.outputs]
            if made is None:
                made = [workspace.views[key].new_empty(total, *workspace.views[key].shape[1:]) for key in self.outputs]
            for whole, key in zip(made, self.outputs, strict=True):
                whole[begin : begin + number].copy_(workspace.views[key])
            return made
        finally:
            plans.give(workspace)

    def _plan(self, number: int, sizes: tuple[tuple[int, ...], ...]) -> _Plans:
        key = (number, sizes)
        found = self._plans.get(key)
        if found is None:
            try:
                from . import sparse_layout
            except ImportError as error:
                raise MissingExtra('accelerated convolutions need numba: pip install "nettrim[fast]"') from error
            self.refuse_broken()
            made = sparse_layout.plan(self.steps, self.weights, dict(enumerate(sizes)), self.outputs, number)
            with self._lock:
                found = self._plans.setdefault(key, _Plans(self, made))
                while len(self._plans) > _PLANS:
                    self._plans.popitem(last=False)
        return found

    def threads(self, work: int) -> int:
        """How many threads share so many multiply-adds."""
        return torch.get_num_threads() if work > self.alone else 1

    def workspace(self, tensors: Sequence[Tensor]) -> Workspace:
        """A workspace of its own that holds these inputs (as many rows as fit into a chunk), run once: to time operations in."""
        flat = [tensor if image else tensor.reshape(-1, tensor.shape[-1]) for tensor, image in zip(tensors, self.images, strict=True)]
        number = min(self.chunk, flat[0].shape[0])
        plans = self._plan(number, tuple(tuple(tensor.shape[1:]) for tensor in flat))
        found = plans.new()
        found.run([x[:number] for x in flat], self.threads(plans.work))
        return found

    def _forget(self) -> None:
        self._plans: OrderedDict[tuple[int, tuple[tuple[int, ...], ...]], _Plans] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_plans", "_lock")}


class _Plans:
    """A plan and its idle workspaces."""

    def __init__(self, region: SparseRegion, plan: Plan) -> None:
        self.steps, self.plan, self.work = region.steps, plan, plan.work
        self.weights = {name: (found.values, found.rows.clone(), found.bias) for name, found in region.weights.items()}
        self.idle: list[Workspace] = []

    def new(self) -> Workspace:
        return Workspace(self.plan, self.steps, self.weights)

    def take(self) -> Workspace:
        try:
            return self.idle.pop()  # atomic
        except IndexError:
            return self.new()

    def give(self, workspace: Workspace) -> None:
        if len(self.idle) < _WORKSPACES:
            self.idle.append(workspace)


class Workspace:
    """Memory for one run of a plan, and the native programs with its addresses. ``views`` are the tensors as PyTorch has them."""

    def __init__(self, plan: Plan, steps: Sequence[Step], weights: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> None:
        from . import kernels

        self.plan, self.steps = plan, steps
        with torch.inference_mode(False):
            memory = torch.zeros(plan.size + 64, dtype=torch.float32, device="cpu")
            self.arena = memory[(-memory.data_ptr() // 4) % 16 :]  # channels then begin at cache lines
            self.views = {tensor: self._view(field, plan.offsets[tensor]) for tensor, field in plan.fields.items()}
        self.function = int(kernels.work.address)
        self.weights = weights  # kept alive with the addresses
        self.stages: list[_Program | int] = []
        for stage in plan.stages:
            self.stages.append(stage if isinstance(stage, int) else self._program(stage))
        first = self.stages[0]
        assert not isinstance(first, int)  # imports
        count = sum(op.step < 0 for op in plan.stages[0])  # type: ignore[union-attr]
        self.inputs = first[3][:count, kernels.X]

    def _view(self, field: Field, offset: int) -> Tensor:
        if field.flat:
            return self.arena.as_strided((field.images, field.channels), (1, field.stride), self.arena.storage_offset() + offset)
        shape = (field.images, field.channels, field.height, field.width)
        strides = (1, field.stride, field.pitch * field.images, field.images)
        return self.arena.as_strided(shape, strides, self.arena.storage_offset() + offset + field.begin)

    def _program(self, operations: Sequence[Operation]) -> _Program:
        from . import kernels

        program = np.zeros(1 + len(operations) * kernels.WIDTH, dtype=np.int64)
        program[0] = len(operations)
        rows = program[1:].reshape(len(operations), kernels.WIDTH)
        for row, op in zip(rows, operations, strict=True):
            for place, number in op.places.items():
                row[place] = number
            for place, offset in op.floats.items():
                row[place] = self.arena.data_ptr() + 4 * offset
            for place, array in op.arrays.items():
                row[place] = array.ctypes.data
            if op.layer:
                for place, tensor in zip((kernels.VALUES, kernels.ROWS, kernels.BIAS), self.weights[op.layer], strict=True):
                    row[place] = tensor.data_ptr()
        return program, rows[:, kernels.NEXT : kernels.DONE + 1], program.ctypes.data, rows

    def run(self, tensors: Sequence[Tensor], threads: int) -> None:
        """Imports the inputs and runs all steps; the outputs then lie in ``views``."""
        # alive while their addresses are in use; some zeros of PyTorch's have no memory
        kept = [tensor.clone() if tensor._is_zerotensor() else tensor.resolve_neg().contiguous() for tensor in tensors]
        self.inputs[:] = [tensor.data_ptr() for tensor in kept]
        run = kernels_team.run
        for stage in self.stages:
            if isinstance(stage, int):
                step = self.steps[stage]
                self.views[step.target].copy_(FUNCTIONS[step.function](self.views[step.source], **dict(step.options)))
            else:
                stage[1][:] = 0
                run(self.function, stage[2], threads)

    def single(self, threads: int, times: int) -> dict[int, Callable[[], None]]:
        """What runs each native step by itself, ``times`` times: once for each chunk of a batch."""
        programs: dict[int, list[_Program]] = {}
        for stage in self.plan.stages:
            for op in () if isinstance(stage, int) else stage:
                if op.step >= 0:
                    programs.setdefault(op.step, []).append(self._program([op]))

        def running(own: list[_Program]) -> Callable[[], None]:
            def run() -> None:
                for _ in range(times):
                    for _, counters, address, _ in own:
                        counters[:] = 0
                        kernels_team.run(self.function, address, threads)

            return run

        return {step: running(own) for step, own in programs.items()}
