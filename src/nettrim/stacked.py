"""Calibration inputs stacked, so that samples can be drawn one by one; and what a network puts out for some of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .arithmetic import full_float32
from .assignment import layouts_of
from .calibration import Calibration, forward, inputs_of
from .capture import Replica
from .outputs import Outputs, outputs_of
from .status import InvalidInput


@dataclass(frozen=True)
class Group:
    """Inputs of one form, stacked: samples along the first dimension of every tensor, unless they are one batch that cannot be cut."""

    tensors: dict[str, Tensor]
    plain: Mapping[str, Any]
    keyed: bool
    divisible: bool

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    @property
    def mixable(self) -> bool:
        """Whether two of its samples can be mixed."""
        return self.divisible and all(tensor.is_floating_point() for tensor in self.tensors.values())

    def take(self, rows: Tensor | slice) -> Group:
        """Some of the samples."""
        return Group({key: tensor[rows] for key, tensor in self.tensors.items()}, self.plain, self.keyed, self.divisible)

    def mixed(self, generator: torch.Generator, pool: Group) -> Group:
        """Each sample mixed with one of ``pool``, by a share drawn for the sample."""
        others = torch.randint(len(pool), (len(self),), generator=generator)
        share = torch.rand(len(self), generator=generator, dtype=torch.float64)
        tensors = {}
        for key, tensor in self.tensors.items():
            s = share.to(tensor).view(-1, *(1,) * (tensor.ndim - 1))
            tensors[key] = s * tensor + (1 - s) * pool.tensors[key][others]
        return Group(tensors, self.plain, self.keyed, self.divisible)

    def batch(self) -> Any:
        """The inputs as a model takes them."""
        return {**self.plain, **self.tensors} if self.keyed else self.tensors[""]

    def parts(self, size: int) -> Iterator[Group]:
        """The samples in their order, ``size`` at a time."""
        if not self.divisible:
            yield self
            return
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))


def stacked(batches: Calibration, teacher: Replica) -> list[Group]:
    """The calibration inputs, stacked where their forms agree and the reference network treats samples one by one."""
    found: dict[Any, list[Group]] = {}
    alone: list[Group] = []
    for batch in batches:
        inputs = inputs_of(batch)
        keyed = isinstance(inputs, Mapping)
        items = dict(inputs) if keyed else {"": inputs}
        tensors = {key: value.detach().cpu() for key, value in items.items() if isinstance(value, Tensor)}
        plain = {key: value for key, value in items.items() if not isinstance(value, Tensor)}
        group = Group(tensors, plain, keyed, len({len(tensor) for tensor in tensors.values()}) == 1)
        if not group.divisible:
            alone.append(group)
            continue
        form = (repr(sorted(plain.items())), *((key, value.dtype, value.shape[1:]) for key, value in sorted(tensors.items())))
        found.setdefault(form, []).append(group)
    together: list[Group] = []
    for same in found.values():
        # a sample by itself shows nothing: two at least
        if _cuts(next((group for group in same if len(group) > 1), None) or _joined(same[:2]), teacher):
            together.append(_joined(same))
        else:
            alone += [replace(group, divisible=False) for group in same]
    return together + alone


def _joined(groups: Sequence[Group]) -> Group:
    """Groups of one form as one."""
    tensors = {key: torch.cat([group.tensors[key] for group in groups]) for key in groups[0].tensors}
    return replace(groups[0], tensors=tensors)


def _cuts(group: Group, teacher: Replica) -> bool:
    """Whether the network's outputs belong to the samples one by one."""
    if len(group) < 2:
        return False
    found = layouts_of(teacher, group.batch())
    return all(found[path] for path in outputs(teacher, group).scores)


def outputs(model: Replica, group: Group) -> Outputs:
    """The model's outputs, without gradients."""
    with torch.no_grad():
        return differentiable(model, group)


def differentiable(model: Replica, group: Group) -> Outputs:
    """The same with gradients."""
    with full_float32():
        return outputs_of(forward(model.model, group.batch(), model.device, model.dtype))


def split(groups: Sequence[Group], share: float, generator: torch.Generator) -> tuple[list[Group], list[Group]]:
    """Samples to learn from, and ``share`` of them held back; whole groups where they cannot be cut."""
    if share == 0:
        return list(groups), []
    whole = [group for group in groups if not group.divisible]
    order = torch.randperm(len(whole), generator=generator).tolist()
    held = round(share * len(whole))
    kept, unseen = [whole[i] for i in order[held:]], [whole[i] for i in order[:held]]
    for group in groups:
        if group.divisible:
            rows = torch.randperm(len(group), generator=generator)
            held = round(share * len(group))
            unseen += [group.take(rows[:held])] if held else []
            kept += [group.take(rows[held:])] if held < len(group) else []
    if not kept or not unseen:
        what = "samples" if any(group.divisible for group in groups) else "batches (they cannot be cut)"
        raise InvalidInput(
            f"distill: holdback {share:g} leaves {'nothing to learn from' if unseen else 'nothing held back'}; give more {what}, "
            "another share, or holdback=0"
        )
    return kept, unseen
