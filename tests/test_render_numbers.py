"""Numbers as text: no rounding may overstate what is claimed."""

from __future__ import annotations

import pytest

from nettrim.render.numbers import clean, number, percent, short_count


def testnumbers_are_rounded_in_the_safe_direction() -> None:
    assert percent(0.123401) == "12.3%"
    assert percent(0.123401, +1) == "12.4%"
    assert percent(0.99699, -1, decimals=2) == "99.69%"
    assert percent(0.99999, -1, decimals=2) == "99.99%"
    assert percent(1.0, -1, decimals=2) == "100.00%"
    assert percent(0.02, +1) == "2.00%"  # no rounding up of what is exact but for float noise
    assert percent(0.07, +1) == "7.00%"
    assert percent(54.321) == "5,432%"
    assert percent(3.21e-7, +1) == "3.3e-05%"
    assert percent(0.0) == "0%"
    assert percent(None) == "-"
    assert percent(float("inf")) == "inf"
    assert number(1234.51, +1) == "1,235"
    assert number(0.01234501, +1) == "0.01235"
    assert number(1.23e-7) == "1.230e-7"
    assert number(0.0) == "0"


@pytest.mark.parametrize(
    ("count", "text"), [(9999, "9999"), (10_000, "10k"), (999_499, "999k"), (999_500, "1.0M"), (4_190_000, "4.2M"), (9_960_000, "10M")]
)
def test_short_counts(count: int, text: str) -> None:
    assert short_count(count) == text


def test_clean_text_is_one_printable_line() -> None:
    assert clean("two\nlines\tand \x1b[31mred") == "two lines and \N{REPLACEMENT CHARACTER}[31mred"
