"""Numbers, counts, times and names as short text, rounded in a stated direction."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..certificate import LayerCertificate
from ..progress import duration as whole_duration

NONE = "-"


def _rounded(value: float, decimals: int, direction: int) -> float:
    """``value`` at ``decimals`` digits: down (-1), nearest (0) or up (+1); float noise below 1e-9 units does not count."""
    scaled = value * 10.0**decimals
    nearest = float(round(scaled))
    if direction and abs(scaled - nearest) > 1e-9 * max(1.0, abs(scaled)):
        nearest = float(math.ceil(scaled) if direction > 0 else math.floor(scaled))
    return nearest / 10.0**decimals


def percent(share: float | None, direction: int = 0, decimals: int | None = None) -> str:
    """A share as a percentage, with about three significant digits where ``decimals`` does not say otherwise."""
    if share is None:
        return NONE
    value = 100.0 * share
    size = abs(value)
    if not math.isfinite(value):
        return f"{share:g}" if not math.isfinite(share) else f"{share:.1e} times"
    if value == 0:
        return "0%"
    if size < 1e-300:  # its power of ten would be 0
        return f"{value:.1e}%"
    if decimals is None and size < 0.01:
        exponent = math.floor(math.log10(size))
        mantissa = _rounded(value / 10.0**exponent, 1, direction)
        return f"{mantissa * 10.0**exponent:.1e}%"
    if decimals is None:
        decimals = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{_rounded(value, decimals, direction):,.{decimals}f}%"


def number(value: float | None, direction: int = 0) -> str:
    """An absolute value with four significant digits."""
    if value is None:
        return NONE
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -300:
        return f"{value:.3e}"
    if -4 <= exponent < 9:
        decimals = max(0, 3 - exponent)
        return f"{_rounded(value, decimals, direction):,.{decimals}f}"
    return f"{_rounded(value / 10.0**exponent, 3, direction):.3f}e{exponent:+d}"


def short_count(count: int) -> str:
    """A count in at most four characters: 7840, 29k, 4.2M."""
    if count < 10_000:
        return str(count)
    scaled = float(count)
    for suffix in ("k", "M", "G", "T"):
        scaled /= 1000.0
        if scaled < 999.5 or suffix == "T":
            break
    return f"{scaled:.1f}{suffix}" if scaled < 9.95 else f"{scaled:.0f}{suffix}"


def seconds_text(seconds: float | None) -> str:
    """Seconds without a unit."""
    if seconds is None:
        return NONE
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:.1f}" if seconds < 100 else f"{seconds:,.0f}"


def duration(seconds: float) -> str:
    """A time with its unit: 4.20 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 120 or not math.isfinite(seconds):
        return f"{seconds_text(seconds)} s"
    return whole_duration(seconds)


def plural(count: int, noun: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def densities_text(densities: Sequence[float]) -> str:
    """The densities of a network's layers; those in the middle are left out where there are many."""
    shown = [percent(density) for density in densities]
    if len(shown) > 6:
        shown = [*shown[:3], "...", *shown[-2:]]
    return " / ".join(shown) or NONE


def share_of(value: float | None, norm: float) -> float | None:
    """``value / norm``, or ``None`` where there is no value or no norm."""
    return value / norm if value is not None and norm > 0 else None


def share_over_all_rows(value: float | None, layer: LayerCertificate) -> float | None:
    """A number over all rows as a share of the reference norm.

    The reference norm is taken over the rows of the layer's program. Where those are a part of all rows, the two are compared
    per row (root mean square), which is the plain quotient where they are the same rows.
    """
    share = share_of(value, layer.reference_norm)
    return None if share is None else share * math.sqrt(layer.rows / layer.rows_total)


def clean(text: str) -> str:
    """One line without anything that could steer a terminal: names and notes come from users and from other libraries."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in " ".join(text.split()))


def quoted(name: str) -> str:
    """A name in quotation marks."""
    return f'"{clean(name)}"'


def listed(items: Sequence[str], limit: int = 6) -> str:
    """``a``, ``a and b``, ``a, b and c``, ``a, b and 7 more``."""
    shown = list(items[:limit])
    if len(items) > limit:
        shown.append(f"{len(items) - limit:,} more")
    return shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + " and " + shown[-1]
