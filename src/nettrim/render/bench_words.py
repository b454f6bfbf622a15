"""Numbers of a bench as short text."""

from __future__ import annotations

from ..deploy.bench_result import Form
from .numbers import NONE


def milliseconds(seconds: float) -> str:
    """Three significant digits, without a unit."""
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def per_second(throughput: float) -> str:
    """Samples per second, to three significant digits where that is shorter."""
    return f"{throughput:,.0f}" if throughput >= 100 else f"{throughput:.3g}"


def times(ratio: float | None) -> str:
    """How many times: two decimals below ten."""
    if ratio is None:
        return NONE
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}" if ratio < 100 else f"{ratio:,.0f}"


def count_cell(count: int | None, ratio: float | None) -> str:
    """A count and, where it is known, how many times fewer."""
    if count is None:
        return NONE
    return f"{count:,}" if ratio is None else f"{count:,} ({times(ratio)})"


def difference_text(form: Form) -> str:
    """The difference of the outputs; nothing for a form that never ran."""
    if form.difference is None:
        return NONE
    return "0" if form.difference == 0 else f"{form.difference:.1e}"
