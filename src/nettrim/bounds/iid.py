"""Before any weights are known: the gap of networks with i.i.d. symmetric weights, over a ball, and the width that makes it small.

Fully connected layers without biases, activations with ``s(0) = 0`` (docs/bounds.md, section 5).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from scipy.special import betainccinv, ndtr, ndtri

from ..status import InvalidInput
from .masks import removed_count
from .tails import check_delta, check_positive, check_share, spectral

WIDEST = 2**20
Rule = Literal["bernoulli", "magnitude"]


@dataclass(frozen=True)
class Entries:
    """Weights of a layer: i.i.d., symmetric, of standard deviation ``gain / sqrt(size)``; ``kind`` is "normal" or "uniform".

    ``per`` says what ``size`` is: the number of the layer's "inputs", or the larger of inputs and outputs ("widest").

    ``torch.nn.Linear``'s own initial weights are uniform with gain ``1 / sqrt(3)``; He's are normal with gain ``sqrt(2)``.

    Raises:
        InvalidInput: an unknown kind, or a gain that is not above 0.
    """

    kind: str = "normal"
    gain: float = 1.0
    per: str = "inputs"

    def __post_init__(self) -> None:
        if self.kind not in ("normal", "uniform"):
            raise InvalidInput(f"Entries: kind must be 'normal' or 'uniform', found {self.kind!r}")
        if self.per not in ("inputs", "widest"):
            raise InvalidInput(f"Entries: per must be 'inputs' or 'widest', found {self.per!r}")
        check_positive("Entries: gain", self.gain, "the standard deviation times the root of the number of inputs")

    def deviation(self, inputs: int, outputs: int) -> float:
        """The standard deviation of the weights of a layer."""
        return self.gain / math.sqrt(inputs if self.per == "inputs" else max(inputs, outputs))

    def below(self, probability: float) -> float:
        """For standard deviation 1, the t with ``P(|w| <= t) = probability``."""
        if self.kind == "uniform":
            return math.sqrt(3) * probability
        return -float(ndtri((1 - probability) / 2))

    def above(self, probability: float) -> float:
        """The t with ``P(|w| > t) = probability``; the largest possible |w| where there is one."""
        return math.sqrt(3) if self.kind == "uniform" else -float(ndtri(probability / 2))

    def moments(self, t: float) -> tuple[float, float]:
        """``E w^2 1[|w| <= t]`` and ``E w^4 1[|w| <= t]`` for standard deviation 1; ``t`` may be infinite."""
        if self.kind == "uniform":
            t = min(t, math.sqrt(3))
            return t**3 / (3 * math.sqrt(3)), t**5 / (5 * math.sqrt(3))
        if t == math.inf:
            return 1.0, 3.0
        inside, density = 1 - 2 * float(ndtr(-t)), math.exp(-(t**2) / 2) / math.sqrt(2 * math.pi)
        # for small t both are differences of nearly equal numbers; t^2 and t^4 times the probability are bounds, too
        second = min(max(0.0, inside - 2 * t * density) + 1e-15, t * t * inside)
        return second, min(max(0.0, 3 * inside - 2 * density * (t**3 + 3 * t)) + 1e-15, t**4 * inside)


def whole_norm(entries: Entries, inputs: int, outputs: int, delta: float) -> float:
    """A number that ``||W||_2`` of a layer exceeds with probability at most ``delta``; the same for what any mask leaves of it."""
    scale = entries.deviation(inputs, outputs)
    if entries.kind == "normal":  # Davidson and Szarek
        return scale * (math.sqrt(inputs) + math.sqrt(outputs) + math.sqrt(2 * math.log(1 / delta)))
    return scale * _bounded(inputs, outputs, *entries.moments(math.sqrt(3)), math.sqrt(3), delta)


def removed_norm(entries: Entries, inputs: int, outputs: int, share: float, rule: str, delta: float) -> float:
    """A number that ``||D||_2`` of a layer's removed weights exceeds with probability at most ``delta``.

    ``rule``: "magnitude" (the smallest, exactly as many as the share says) or "bernoulli" (each with probability ``share``).
    """
    n = inputs * outputs
    scale = entries.deviation(inputs, outputs)
    if rule == "magnitude":
        count = removed_count(n, share)
        if count == 0:
            return 0.0
        # the k-th smallest of n uniform numbers is Beta(k, n - k + 1): all that is removed lies below t but for delta / 2
        t = entries.below(float(betainccinv(count, n - count + 1, delta / 2)))
        second, fourth = entries.moments(t)
    else:
        if share == 0:
            return 0.0
        t = entries.above(min(1.0, delta / (2 * n * share)))
        second, fourth = (share * moment for moment in entries.moments(t))
    return scale * _bounded(inputs, outputs, second, fourth, t, delta / 2)


def _bounded(inputs: int, outputs: int, second: float, fourth: float, largest: float, delta: float) -> float:
    """A bound of the norm of a matrix of i.i.d. symmetric entries with these moments, none beyond ``largest``."""
    n = float(inputs) * outputs
    whole = second * second * n * max(0, inputs + outputs - 2) + fourth * n
    line, frobenius = math.sqrt(second * max(inputs, outputs)), math.sqrt(second * n)
    return spectral(line, frobenius, whole, largest, inputs + outputs, delta, span=2.0)


def iid_gap(
    sizes: Sequence[int],
    share: float | Callable[[int], float],
    delta: float,
    *,
    rule: str = "magnitude",
    entries: Entries | None = None,
    radius: float = 1.0,
    lipschitz: float = 1.0,
) -> float:
    """With probability at least 1 - ``delta`` over weights (and mask), ``sup over ||x|| <= radius of ||f_hat(x) - f(x)||`` is at most this.

    Args:
        sizes: inputs, hidden units ..., outputs.
        share: what is removed of each layer: a number in [0, 1), or a function of the number of its weights.
        rule: "magnitude" or "bernoulli".
        entries: the weights' distribution; by default normal with gain 1.
        lipschitz: of every activation; the last layer has none.

    Raises:
        InvalidInput: anything outside its range.
    """
    delta, radius = check_delta(delta), check_positive("radius", radius, "the largest norm of an input")
    L = check_positive("lipschitz", lipschitz, "the Lipschitz constant of the activations")
    if rule not in ("magnitude", "bernoulli"):
        raise InvalidInput(f"rule must be 'magnitude' or 'bernoulli' for weights that are not known yet, found {rule!r}")
    if len(sizes) < 2 or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
        raise InvalidInput(f"sizes must be at least two whole numbers of units (inputs, hidden ..., outputs), found {list(sizes)}")
    entries = entries or Entries()
    each = delta / (3 * (len(sizes) - 1))  # of every layer: what is removed, what it was, what is left
    e, h = 0.0, radius
    for layer, (inputs, outputs) in enumerate(itertools.pairwise(sizes), 1):
        own = check_share(share(inputs * outputs) if callable(share) else share)
        norm_, removed = whole_norm(entries, inputs, outputs, each), removed_norm(entries, inputs, outputs, own, rule, each)
        factor = 1.0 if layer == len(sizes) - 1 else L
        e, h = factor * (removed * h + norm_ * e), factor * norm_ * h
    return e


def safe_width(
    gap: float,
    delta: float,
    *,
    hidden: int = 1,
    inputs: int,
    outputs: int,
    share: float | None = None,
    exponent: float | None = None,
    **settings: Any,
) -> int:
    """A number of hidden units from which on the bound of :func:`iid_gap` is at most ``gap``, at every doubling up to ``WIDEST``.

    Give ``share``, or ``exponent`` a > 0: of each layer of D weights the share ``D^-a`` is then removed, the published rule. ``hidden``
    counts the hidden layers, all of one width. ``settings`` go to :func:`iid_gap`.

    Raises:
        InvalidInput: no such width up to ``WIDEST``, or a setting outside its range.
    """
    gap = check_positive("gap", gap, "the largest distance of the outputs")
    if (share is None) == (exponent is None):
        raise InvalidInput("safe_width needs exactly one of share and exponent: leave one out")
    for name, value in (("hidden", hidden), ("inputs", inputs), ("outputs", outputs)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidInput(f"safe_width: {name} must be a whole number of at least 1, found {value!r}")
    power = 0.0 if exponent is None else check_positive("exponent", exponent, "the power a of the share D^-a of D weights")
    removed: float | Callable[[int], float] = (lambda D: 0.0 if D < 2 else D**-power) if share is None else check_share(share)

    def reached(width: int) -> bool:
        return iid_gap((inputs, *[width] * hidden, outputs), removed, delta, **settings) <= gap

    if not reached(WIDEST):
        raise InvalidInput(
            f"no width up to {WIDEST} brings the bound to gap {gap:g}: allow a larger gap, or remove less (a smaller share, or a larger "
            "exponent); or let the weights shrink with the width (Entries(per='widest'))"
        )
    width = WIDEST
    while width > 1 and reached(width // 2):
        width //= 2
    low, high = width // 2, width
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high
