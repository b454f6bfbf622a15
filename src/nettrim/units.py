"""A layer together with what its reading says follows it: batch-norm, an added branch, activation, pooling. Maps in, rows out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from .fold import Fold, Home
from .layers import LayerView
from .nodes import norm_scale
from .reading import Reading


@dataclass(frozen=True)
class Call:
    """One call of a layer: its input, its output, and what is added to that where its reading names a branch.

    In a network that does not run in float64, ``x`` is widened, ``y`` is the float64 product of ``x`` and the stored weights, and ``seen``
    is what the network itself put out; elsewhere ``y`` is just that, and ``seen`` is ``None``.
    """

    x: Tensor
    y: Tensor
    branch: Tensor | None = None
    seen: Tensor | None = None

    def native(self) -> Call:
        """The call with the output that the network itself goes on with."""
        return self if self.seen is None else replace(self, y=self.seen.double(), seen=None)


@dataclass(frozen=True)
class Unit:
    """A layer of one network. Rows are (P, M), one for each output position, in float64.

    ``fold`` is the batch-norm behind the layer, ``norm`` its module; both ``None`` where there is none.
    """

    view: LayerView
    reading: Reading
    fold: Fold | None
    norm: nn.Module | None

    @property
    def uses_moments(self) -> bool:
        """True when every box is a point, so that second moments say all about the program."""
        return self.reading.activation.is_point and self.reading.pool is None

    def weights(self) -> Tensor:
        """``W'`` (N, M), float64, batch-norm folded in."""
        W = self.view.weights().double()
        return W if self.fold is None else self.fold.weights(W)

    def bias(self) -> Tensor | None:
        """``b'`` (M,), float64; ``None`` where nothing can take a new offset."""
        if self.fold is not None:
            return None if self.fold.home == "none" else self.fold.offset
        b = self.view.bias()
        return None if b is None else b.double()

    def own(self, y: Tensor) -> Tensor:
        """The layer's part of the pre-activation, as rows, from its output."""
        rows = self.view.outputs(y).double()
        return rows if self.fold is None else self.fold.apply(rows)

    def respond(self, x: Tensor) -> Tensor:
        """:meth:`own` for the input ``x``."""
        return self.own(self.view.respond(x))

    def branch(self, call: Call) -> Tensor | None:
        """What was added to the layer's part before the activation, as rows; ``None`` for nothing."""
        return None if call.branch is None else self.view.outputs(call.branch.double().expand_as(call.y))

    def shift(self, call: Call) -> Tensor | None:
        """All that the program's own weights and bias do not give: the branch, and an offset that nothing can change."""
        branch = self.branch(call)
        if self.fold is None or self.fold.home != "none":
            return branch
        return self.fold.offset.expand(len(self.view.outputs(call.y)), -1) if branch is None else branch + self.fold.offset

    def full(self, call: Call) -> Tensor:
        """The whole pre-activation as a map of the form of the layer's output."""
        y = call.y.double()
        if self.fold is not None:
            y = y * _along(self.fold.scale, y) + _along(self.fold.beta - self.fold.scale * self.fold.mean, y)
        return y if call.branch is None else y + call.branch.double()

    def rounding(self, call: Call) -> float:
        """The squared distance between the layer's part as the network computed it and in float64; 0 in networks that run in float64."""
        return 0.0 if call.seen is None else float((self.own(call.seen) - self.own(call.y)).square().sum())

    def output(self, full: Tensor) -> Tensor:
        """What the activation, and the pooling with it, make of a whole pre-activation."""
        Y = self.reading.activation.apply(full)
        return Y if self.reading.pool is None else self.reading.pool.apply(Y)

    def target(self, reference: Call, own: Call | None = None, correction: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes ``lo`` and ``hi`` of the whole pre-activation, and the reference output where it arises; all as rows.

        With ``own``, the target stands only ``correction`` of the way from that call's response to the reference's.
        """
        activation, pool, Z = self.reading.activation, self.reading.pool, self.full(reference)
        if pool is not None:
            if own is not None:
                Z = torch.lerp(self.full(own), Z, correction)
            lo, hi, Y = pool.box(Z, activation)
        else:
            Y = activation.apply(Z)
            if own is not None:
                Y = torch.lerp(activation.apply(self.full(own)), Y, correction)
            lo, hi = activation.box(Y)
        return self.view.outputs(lo), self.view.outputs(hi), self.view.outputs(Y)

    def restore(self, original: Unit) -> None:
        """Gives back what :meth:`write` can have changed, to the last bit."""
        pairs = [(self.view.weight, original.view.weight), (self.view.module.bias, original.view.module.bias)]
        if self.norm is not None and original.norm is not None:
            pairs.append((self.norm.bias, original.norm.bias))
        with torch.no_grad():
            for own, value in pairs:
                if own is not None:  # a bias that the layer was given was zero
                    cast(Tensor, own).copy_(torch.zeros_like(cast(Tensor, own)) if value is None else cast(Tensor, value))

    def write(self, W: Tensor, b: Tensor | None) -> None:
        """Writes folded weights (N, M) and offset (M,) back: into the layer, and into its batch-norm where that holds the offset. They may
        be on another device than the layer."""
        place = self.view.weight.device
        W, b = W.to(place), None if b is None else b.to(place)
        if self.fold is None:
            self.view.write(W, b)
            return
        in_layer = b is not None and self.fold.home == "layer"
        self.view.write(self.fold.raw(W), self.fold.own_offset(b) if b is not None and in_layer else None)
        if b is not None and self.fold.home == "norm":
            assert self.norm is not None
            with torch.no_grad():
                cast(nn.Parameter, self.norm.bias).copy_(self.fold.own_offset(b))


def unit_of(name: str, modules: Mapping[str, nn.Module], reading: Reading) -> Unit:
    """The unit of a layer among the modules of its network; the layer was checked when it was selected."""
    view = LayerView(name, modules[name])
    if not reading.norm:
        return Unit(view, reading, None, None)
    norm = modules[reading.norm]
    scale = norm_scale(norm)
    own, beta = view.bias(), cast("Tensor | None", norm.bias)
    home: Home = "layer" if own is not None else "norm" if beta is not None else "none"
    fold = Fold(
        scale=scale,
        mean=cast(Tensor, norm.running_mean).double(),
        beta=torch.zeros_like(scale) if beta is None else beta.detach().double(),
        bias=torch.zeros_like(scale) if own is None else own.double(),
        home=home,
    )
    return Unit(view, reading, fold, norm)


def _along(values: Tensor, y: Tensor) -> Tensor:
    """Values by channel, shaped to multiply a map whose second dimension is the channel."""
    return values.reshape(-1, *(1 for _ in y.shape[2:]))
