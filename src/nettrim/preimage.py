"""Activation and reference output -> the preimage box of pre-activations, and the distance to a box."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor

from .status import InvalidInput


@dataclass(frozen=True)
class Activation:
    """An elementwise, nondecreasing, 1-Lipschitz activation whose preimages are boxes.

    ``s(z) = clamp(z, low, high)`` for ``z >= 0`` side and slope ``slope`` below zero when ``slope < 1``. Identity, ReLU, ReLU6, Hardtanh
    and LeakyReLU are all of this form. An activation of any other form is *treated as linear*: ``exact`` is False, ``apply`` is
    the identity (the pre-activation itself is matched) and ``lipschitz`` bounds what the true activation can do to an error
    (``None`` when it is not known).
    """

    name: str
    low: float = -math.inf
    high: float = math.inf
    slope: float = 1.0
    exact: bool = True
    lipschitz: float | None = 1.0

    @property
    def is_point(self) -> bool:
        """True when every preimage is a single point, so that second moments say all about the program."""
        return self.low == -math.inf and self.high == math.inf

    def apply(self, Z: Tensor) -> Tensor:
        """``s(Z)`` entry by entry; the identity for an activation that is treated as linear."""
        if self.slope != 1.0:
            Z = torch.where(Z < 0, self.slope * Z, Z)
        return Z if self.is_point else Z.clamp(self.low, self.high)

    def box(self, Y: Tensor) -> tuple[Tensor, Tensor]:
        """The box ``S(Y) = {T : s(T) = Y}``, as ``(lo, hi)`` of the shape of ``Y`` (design: the table of preimages).

        ``Y`` must lie in the range of the activation.
        """
        point = torch.where(Y < 0, Y / self.slope, Y) if self.slope != 1.0 else Y
        lo = torch.where(self.low >= Y, -math.inf, point)
        hi = torch.where(self.high <= Y, math.inf, point)
        return lo, hi


@dataclass(frozen=True)
class Pool:
    """Max-pooling over disjoint windows of ``kernel`` along the last dimensions; entries in no window are dropped."""

    kernel: tuple[int, ...]

    def apply(self, Y: Tensor) -> Tensor:
        """The pooled map of ``Y`` (B, C, *places)."""
        return self._windows(Y).amax(-1)

    def box(self, Z: Tensor, activation: Activation) -> tuple[Tensor, Tensor, Tensor]:
        """For the reference pre-activation ``Z`` (B, C, *places): ``lo`` and ``hi`` of that shape (docs/theory.md, (1.3)), and the pooled
        outputs at the places where they arise, zero elsewhere."""
        windows = self._windows(Z)
        largest, first = windows.max(-1)
        m = activation.apply(largest)
        here = torch.zeros_like(windows, dtype=torch.bool).scatter_(-1, first[..., None], True)
        lo, hi = (side[..., None].expand_as(windows) for side in activation.box(m))
        lo = torch.where(here, lo, -math.inf)
        Y = torch.where(here, m[..., None], 0.0)
        return self._spread(lo, Z, -math.inf), self._spread(hi, Z, math.inf), self._spread(Y, Z, 0.0)

    def _windows(self, Z: Tensor) -> Tensor:
        """(B, C, *windows, entries of a window)."""
        dims = len(self.kernel)
        counts = [n // k for n, k in zip(Z.shape[-dims:], self.kernel, strict=True)]
        for axis, (count, k) in enumerate(zip(counts, self.kernel, strict=True)):
            Z = Z.narrow(axis - dims, 0, count * k)
        front = Z.shape[:-dims]
        Z = Z.reshape(*front, *(n for pair in zip(counts, self.kernel, strict=True) for n in pair))
        lead = len(front)
        order = [*range(lead), *range(lead, lead + 2 * dims, 2), *range(lead + 1, lead + 2 * dims, 2)]
        return Z.permute(order).reshape(*front, *counts, -1)

    def _spread(self, windows: Tensor, like: Tensor, rest: float) -> Tensor:
        """The reverse of :meth:`_windows`; ``rest`` where no window is."""
        dims = len(self.kernel)
        front, counts = windows.shape[: -dims - 1], windows.shape[-dims - 1 : -1]
        lead = len(front)
        order = [*range(lead), *(n for i in range(dims) for n in (lead + i, lead + dims + i))]
        sizes = [count * k for count, k in zip(counts, self.kernel, strict=True)]
        inside = windows.reshape(*front, *counts, *self.kernel).permute(order).reshape(*front, *sizes)
        whole = torch.full_like(like, rest)
        corner = whole
        for axis, size in enumerate(sizes):
            corner = corner.narrow(lead + axis, 0, size)
        corner.copy_(inside)
        return whole


IDENTITY = Activation("identity")
RELU = Activation("relu", low=0.0)

# Lipschitz constants of activations that are treated as linear (largest slope; GELU and SiLU rounded up).
_LIPSCHITZ: dict[str, float] = {
    "sigmoid": 0.25,
    "tanh": 1.0,
    "softplus": 1.0,
    "softsign": 1.0,
    "hardsigmoid": 1.0 / 6.0,
    "gelu": 1.129,
    "silu": 1.0999,
    "mish": 1.0886,
    "hardswish": 1.5,
    "selu": 1.7581,
    "logsigmoid": 1.0,
    "tanhshrink": 1.0,
    "softshrink": 1.0,
    "softmax": 1.0,
    "celu": 1.0,
}


def clamp(low: float, high: float, name: str = "hardtanh") -> Activation:
    """``s(z) = min(max(z, low), high)``: ReLU6 is ``clamp(0, 6)``, Hardtanh ``clamp(-1, 1)``."""
    if not low < high:
        raise InvalidInput(f"activation {name}: low must be below high, found low={low}, high={high}")
    if name == "relu6" and (low, high) == (0.0, 6.0):
        label = name
    else:  # a name that `named` can read back
        label = f"{name if name in ('hardtanh', 'clamp') else 'clamp'}({float(low)!r}, {float(high)!r})"
    return Activation(label, low=float(low), high=float(high))


def leaky_relu(slope: float) -> Activation:
    """``s(z) = z`` for ``z >= 0`` and ``slope * z`` below; slopes outside (0, 1] are treated as ReLU (0) or as linear."""
    if slope == 0.0:
        return RELU
    if 0.0 < slope <= 1.0:
        return IDENTITY if slope == 1.0 else Activation(f"leaky_relu({float(slope)!r})", slope=float(slope))
    return as_linear(f"leaky_relu({float(slope)!r})", lipschitz=max(1.0, abs(slope)))


def as_linear(name: str, lipschitz: float | None = None) -> Activation:
    """An activation whose pre-activation is matched because its preimages are not boxes (or nobody knows)."""
    return Activation(name, exact=False, lipschitz=_LIPSCHITZ.get(name) if lipschitz is None else lipschitz)


_NAMED: dict[str, Activation] = {
    "identity": IDENTITY,
    "linear": IDENTITY,
    "relu": RELU,
    "relu6": clamp(0.0, 6.0, "relu6"),
    "hardtanh": clamp(-1.0, 1.0),
    "leaky_relu": leaky_relu(0.01),
    "elu": as_linear("elu(1.0)", lipschitz=1.0),
}


def elu(alpha: float) -> Activation:
    """ELU, treated as linear; its largest slope is ``max(1, alpha)``."""
    return as_linear(f"elu({float(alpha)!r})", lipschitz=max(1.0, abs(alpha)))


_MADE: dict[str, Callable[..., Activation]] = {
    "leaky_relu": leaky_relu,
    "elu": elu,
    "hardtanh": clamp,
    "clamp": lambda low, high: clamp(low, high, "clamp"),
}


def named(name: str) -> Activation:
    """The activation of that name: identity, linear, relu, relu6, hardtanh, leaky_relu, or one known only by its Lipschitz constant.

    Parameters stand in parentheses, as in ``"leaky_relu(0.1)"`` or ``"hardtanh(-2, 2)"``; ``named(a.name)`` gives ``a`` back.

    Raises:
        InvalidInput: the name is not known; the message names the nearest one.
    """
    key = name.lower().replace("-", "_") if "(" not in name else name.lower()
    made = re.fullmatch(r"(\w+)\(([^()]*)\)", key)
    if made and made[1] in _MADE:
        try:
            return _MADE[made[1]](*(float(value) for value in made[2].split(",")))
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"activation {name!r}: its parameters cannot be read ({error})") from error
    if key in ("unknown", "mixed"):
        return as_linear(key)
    if key in _NAMED:
        return _NAMED[key]
    if key in _LIPSCHITZ:
        return as_linear(key)
    known = [*_NAMED, *_LIPSCHITZ]
    near = get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    raise InvalidInput(f"activation {name!r} is not known; {hint}")


def nearest_point(Z: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """The point ``T`` of the box nearest to ``Z`` (entry by entry)."""
    return torch.minimum(torch.maximum(Z, lo), hi)


def distance(Z: Tensor, lo: Tensor, hi: Tensor) -> float:
    """``dist(Z, [lo, hi])`` in the Frobenius norm."""
    return float(torch.linalg.vector_norm(Z - nearest_point(Z, lo, hi)))
