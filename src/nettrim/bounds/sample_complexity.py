"""Sample complexity: how many random samples suffice, or are about needed, to recover a sparse neuron exactly (docs/recovery.md)."""

from __future__ import annotations

import math
from typing import Any, SupportsIndex

from scipy.optimize import minimize_scalar
from scipy.special import ndtr

from ..recovery import finite_number
from ..status import InvalidInput


def samples_for_recovery(N: int, s: int, *, probability: float | None = None, mu: float | None = None) -> int:
    """Samples that suffice to recover an ``s``-sparse neuron of ``N`` inputs exactly: ``P = (11 s + 7) mu log N``, rounded up.

    For inputs drawn i.i.d. from N(0, 1), V = 0 and exact responses, the minimiser is unique and equals the neuron with probability at
    least ``1 - N^(1 - mu)``, mu > 1 (Theorem 3 of arXiv 1611.05162; natural logarithm). Give exactly one of ``probability`` in (0, 1)
    and ``mu``. More samples never hurt (docs/recovery.md, 3.1). Raises InvalidInput.
    """
    N, s = _sizes(N, s)
    if (probability is None) == (mu is None):
        found = "neither" if mu is None else "both"
        raise InvalidInput(f"samples_for_recovery needs exactly one of probability and mu; found {found}: leave one out")
    if probability is not None:
        p = finite_number("probability", probability)
        if not 0 < p < 1:
            raise InvalidInput(f"probability must lie strictly between 0 and 1, found {p}: no finite number gives certainty; try 0.99")
        return math.ceil((11 * s + 7) * (math.log(N) - math.log1p(-p)))
    m = finite_number("mu", mu)
    if not m > 1:
        raise InvalidInput(f"mu must be a number > 1, found {m}: at 1 the stated probability is 0; give probability=0.99 instead")
    return math.ceil((11 * s + 7) * m * math.log(N))


def recovery_probability(N: int, s: int, samples: int) -> float:
    """The probability of unique exact recovery that Theorem 3 states for ``samples`` samples: the inverse of :func:`samples_for_recovery`.

    ``1 - N^(1 - mu)`` with ``mu = samples / ((11 s + 7) log N)``; 0 where mu <= 1, about which the theorem says nothing.
    Raises InvalidInput.
    """
    N, s = _sizes(N, s)
    P = _whole("samples", samples, 0, "the number of rows of A")
    return max(0.0, -math.expm1(math.log(N) - P / (11 * s + 7)))


def statistical_dimension(N: int, s: int) -> float:
    """About how many random equations pin an ``s``-sparse vector of ``N`` entries as the l1 minimiser with probability one half.

    The minimum over tau >= 0 of ``s (1 + tau^2) + (N - s) E[max(|g| - tau, 0)^2]``, g standard normal: the upper bound of the statistical
    dimension of the l1 norm's descent cone (Amelunxen, Lotz, McCoy, Tropp 2014), tight up to lower order. Raises InvalidInput.
    """
    N, s = _sizes(N, s)

    def value(tau: float) -> float:
        tail = float(ndtr(-tau))
        density = math.exp(-tau * tau / 2) / math.sqrt(2 * math.pi)
        return s * (1 + tau * tau) + (N - s) * 2 * ((1 + tau * tau) * tail - tau * density)

    # Beyond sqrt(2 log N) + 1 the first term alone grows, so the minimum lies inside; at s = N it is tau = 0.
    best = minimize_scalar(value, bounds=(0.0, math.sqrt(2 * math.log(N)) + 1), method="bounded", options={"xatol": 1e-10})
    return min(value(0.0), float(best.fun))


def expected_transition(N: int, s: int) -> float:
    """Samples at which about half of the Gaussian neurons are recovered: twice the statistical dimension (docs/recovery.md, 3.2).

    Only samples with a response count, and half of them have one. A prediction, not a bound. Raises InvalidInput.
    """
    return 2 * statistical_dimension(N, s)


def _sizes(N: int, s: int) -> tuple[int, int]:
    N = _whole("N", N, 2, "the number of inputs")
    s = _whole("s", s, 1, "the number of nonzero weights")
    if s > N:
        raise InvalidInput(f"s must be at most N = {N}, found {s}: a neuron has no more nonzero weights than inputs")
    return N, s


def _whole(name: str, value: Any, least: int, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise InvalidInput(f"{name} must be a whole number, found {value!r}: it is {what}")
    number = value.__index__()
    if number < least:
        raise InvalidInput(f"{name} must be at least {least}, found {number}: it is {what}")
    return number
