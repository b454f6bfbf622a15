"""Multiply-adds of one sample, counted from the calls of a forward pass: all of them, and those of weights that are not zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..attention import opened
from ..calibration import forward, samples
from ..layers import LayerView, is_prunable
from ..opening import how_opened


@dataclass(frozen=True)
class LayerCount:
    """Multiply-adds of one layer for one sample, in all of its calls: with its zeros (``dense``), and without (``nonzero``)."""

    dense: float
    nonzero: float


@dataclass(frozen=True)
class Counted:
    """Multiply-adds for one sample. ``others`` are those outside of the layers: products of activations, as in attention.

    ``notes`` name modules whose weights could not be told apart from activations, so that their zeros count.
    """

    layers: Mapping[str, LayerCount]
    others: float
    notes: tuple[str, ...] = ()

    @property
    def dense(self) -> int:
        """All of them; zeros are multiplied too."""
        return round(self.others + sum(layer.dense for layer in self.layers.values()))

    @property
    def nonzero(self) -> int:
        """Those that are needed: weights that are zero are left out."""
        return round(self.others + sum(layer.nonzero for layer in self.layers.values()))

    def executed(self, kinds: Mapping[str, str]) -> int:
        """Those that are done where layers run as ``kinds`` say (`Choice.kind`): a dense layer multiplies its zeros, a sparse one none of
        them, semi-structured kernels half of the weights."""

        def of(name: str, layer: LayerCount) -> float:
            kind = kinds.get(name, "dense")
            return layer.dense if kind == "dense" else layer.dense / 2 if kind == "semi-structured" else layer.nonzero

        return round(self.others + sum(of(name, layer) for name, layer in self.layers.items()))


def count(model: nn.Module, example: Any, device: torch.device | None = None) -> Counted:
    """Counts on a batch, divided by its samples. The model is in eval mode and stays as it is.

    Counted are matrix products and convolutions. A weight of a convolution counts once for each position of the output, padding included,
    within its group. Biases, batch-norm, activations, sums and pooling are not counted: they are linear in the activations' number and
    mostly merged into the layers. Attention is opened, so that its projections are layers; what is in modules of other kinds counts
    with its zeros, and a note names it.
    """
    place = device or next((p.device for p in model.parameters()), torch.device("cpu"))
    encoders, notice = how_opened(model, place, example)
    twin = opened(model, encoders=encoders)
    found: dict[str, list[int]] = {}
    views = {name: LayerView(name, module) for name, module in twin.named_modules() if is_prunable(module)}
    handles = []
    try:
        for name, view in views.items():

            def seen(_: nn.Module, __: Any, y: Tensor, name: str = name, view: LayerView = view) -> None:
                positions = y.numel() // view.shape[1]  # each needs every weight once
                counted = found.setdefault(name, [0, 0])
                counted[0] += positions * view.weight.numel()
                counted[1] += positions * int(torch.count_nonzero(view.weight))

            handles.append(view.module.register_forward_hook(seen))
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), _by_plain_products(), counter:
            forward(twin, example, place, None)
    finally:
        for handle in handles:
            handle.remove()
    size = samples(example)
    layers = {name: LayerCount(dense / size, nonzero / size) for name, (dense, nonzero) in found.items()}
    # torch counts a multiply-add as two operations; a layer that computes something else than its class does not count below zero
    others = max(0.0, counter.get_total_flops() / 2 / size - sum(layer.dense for layer in layers.values()))
    return Counted(layers, others, tuple(_notes(twin, notice)))


@contextmanager
def _by_plain_products() -> Iterator[None]:
    """Attention by products and sums instead of fused kernels, of which torch does not count all."""
    before = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, before)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def _notes(model: nn.Module, notice: str) -> list[str]:
    """What is not a layer here but holds matrices: recurrent cells, embeddings, parameters of the user's own."""
    names = [
        f"{name or 'the model itself'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if not is_prunable(module) and any(p.ndim > 1 for p in module.parameters(recurse=False)) and not isinstance(module, nn.Embedding)
    ]
    notes = [notice] if notice else []
    if names:
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        notes.append(f"multiply-adds: parameters of {shown} are no Linear or convolution; where they are multiplied, their zeros count")
    return notes
