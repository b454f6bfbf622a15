"""Tail bounds with explicit constants (docs/bounds.md, section 2). All are increasing in every size and decreasing in ``delta``."""

from __future__ import annotations

import math
from typing import Any

from scipy.special import gammaln, xlog1py, xlogy

from ..recovery import finite_number
from ..status import InvalidInput

FEW = 0.01  # shares from here to 1 - FEW have one and the same factor of a fixed count


def check_delta(delta: Any) -> float:
    """``delta`` as a float in (0, 1). Raises InvalidInput."""
    number = finite_number("delta", delta)
    if not 0 < number < 1:
        raise InvalidInput(
            f"delta must lie strictly between 0 and 1, found {number}: it is the probability with which the bound may fail; try 0.05"
        )
    return number


def check_share(share: Any, name: str = "share") -> float:
    """A share of removed weights as a float in [0, 1). Raises InvalidInput."""
    number = finite_number(name, share)
    if not 0 <= number < 1:
        raise InvalidInput(f"{name} is the fraction of weights removed and must lie in [0, 1), found {number}; try 0.3")
    return number


def check_positive(name: str, value: Any, what: str) -> float:
    """A finite number above 0. Raises InvalidInput."""
    number = finite_number(name, value)
    if not number > 0:
        raise InvalidInput(f"{name} must be above 0, found {number}: it is {what}")
    return number


def mask_variance(share: float) -> float:
    """``v(p)``: at least ``p (1 - p)``, and increasing in ``p``: ``p (1 - p)`` up to one half, then 1/4."""
    return share * (1 - share) if share <= 0.5 else 0.25


def bernstein(deviation: float, largest: float, log_term: float) -> float:
    """The ``t`` with ``t^2 / 2 = log_term (deviation^2 + largest t / 3)``: beyond it ``exp(-(t^2/2) / (deviation^2 + largest t/3))`` is
    below ``exp(-log_term)``."""
    linear = largest * log_term / 3
    return linear + math.sqrt(linear * linear + 2 * deviation * deviation * log_term)


def response(mean: float, deviation: float, slope: float, jump: float, delta: float, span: float = 1.0) -> float:
    """A number that ``Z = ||m + sum_i xi_i y_i||`` exceeds with probability at most ``delta`` (docs/bounds.md, Lemma 3).

    The ``xi_i`` are independent, centred, each in an interval of length ``span`` with ``|xi_i| <= 1``. ``mean >= ||m||``,
    ``deviation^2 >= sum_i Var(xi_i) ||y_i||^2``, ``slope >= ||u -> sum_i u_i y_i||_2``, ``jump >= max_i ||y_i||``. The smallest of
    Markov's bound of Z^2 (with the mean inside or outside), convex concentration, and Bernstein's inequality in Hilbert space: four
    numbers, none of which depends on the draw.
    """
    second = math.hypot(mean, deviation)
    return min(
        second / math.sqrt(delta),
        mean + deviation / math.sqrt(delta),
        second + span * slope * math.sqrt(2 * math.log(1 / delta)),
        mean + bernstein(deviation, jump, math.log(2 / delta)),
    )


def spectral(
    line: float, frobenius: float, fourth: float, largest: float, dimensions: int, delta: float, *, jump: float = 1.0, span: float = 1.0
) -> float:
    """A number that ``||Delta||_2`` exceeds with probability at most ``delta``, for independent centred entries (docs/bounds.md, Lemma 4).

    Args:
        line: the root of the largest variance of a row or a column.
        frobenius: root of the sum of all variances.
        fourth: ``E ||Delta Delta^T||_F^2``, or more.
        largest: the largest ``|w|``; entries are ``w xi`` with ``xi`` in an interval of length ``span``.
        dimensions: rows and columns together.
        jump: 1 where ``|xi| <= 1``; 0 for random signs, whose matrix Bernstein bound has no linear term.
    """
    log_dimensions, log_both = math.log(dimensions), math.log(dimensions / delta)
    expected = min(
        math.sqrt(2 * log_dimensions) * line + jump * largest * log_dimensions / 3,
        math.sqrt(math.sqrt(fourth)),
        frobenius,
    )
    return min(
        bernstein(line, jump * largest, log_both),
        expected + span * largest * math.sqrt(2 * math.log(1 / delta)),
        math.sqrt(math.sqrt(fourth / delta)),
        frobenius / math.sqrt(delta),
    )


def fixed_count_factor(removed: int, weights: int) -> float:
    """``1 / c``, at least 1: what a bound for independent removals must be multiplied by for exactly ``removed`` of ``weights`` removed.

    ``c = 1 - P(Binomial(n, k/n) = k)`` (docs/bounds.md, Lemma 2). Between the shares ``FEW`` and ``1 - FEW`` the factor of ``FEW``,
    which is the largest there, is used throughout, so that bounds increase with the share.
    """
    if removed in (0, weights):
        return 1.0  # nothing is random
    least = max(1, math.ceil(FEW * weights))
    count = min(removed, weights - removed, least)
    share = count / weights
    chosen = gammaln(weights + 1) - gammaln(count + 1) - gammaln(weights - count + 1)  # logarithm of the number of masks
    same = math.exp(float(chosen + xlogy(count, share) + xlog1py(weights - count, -share)))
    return 1.0 / (1.0 - same)
