"""Tables and the plain text: they fit, say all, and no name can steer a terminal."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from render_examples import COMPARISON, broken_certificate, make_certificate, make_certified, make_layer, make_masks, make_report
from rich.console import Console
from rich.table import Table

from nettrim.render import certificate_table, comparison_table, report_table, report_text
from nettrim.status import Status


def shown(table: Table, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


@pytest.mark.parametrize("width", [80, 100])
def test_report_table_fits_and_says_all(width: int) -> None:
    masks = make_masks()
    report = make_report(masks)
    text = shown(report_table(report), width)
    assert max(len(line) for line in text.splitlines()) <= width
    for needed in ("fc1", "64->300", "identity", "1.98%", "2.00%", "0.123%", "converged", "1.23", "total", "4.20"):
        assert needed in text
    assert f"{masks['fc2'].sum()}/30k" in text
    assert "\N{HORIZONTAL ELLIPSIS}" not in text


def test_report_table_of_large_layers_keeps_every_column_at_80() -> None:
    layer = make_layer("model.layers.11.mlp.gate_proj", 4096, 11008, "leaky_relu", 1_234_567, seconds=1234.5, status=Status.INFEASIBLE)
    text = shown(report_table(make_report(layers=(layer,))), 80)
    lines = [line.rstrip() for line in text.splitlines()]
    assert "4096->11008" in text
    assert "1.2M/45M" in text
    assert lines[1].endswith(" s")
    assert any(line.endswith(" 1,234") for line in lines)
    assert "tolerance" in text


def test_report_table_leaves_out_columns_that_no_layer_fills() -> None:
    report = make_report()
    report = replace(report, layers=tuple(replace(layer, tolerance=None, gap=None) for layer in report.layers))
    text = shown(report_table(report))
    assert "toler" not in text
    assert "gap" not in text


def test_report_table_counts_layers_to_look_at_and_keeps_markup_literal() -> None:
    report = make_report()
    odd = replace(report.layers[0], name="[red]odd[/red]\x1b[31m", status=Status.INFEASIBLE)
    text = shown(report_table(replace(report, layers=(odd, *report.layers[1:]))), 140)
    assert "[red]odd[/red]" in text
    assert "\x1b" not in text
    assert "1 not" in text


@pytest.mark.parametrize("width", [80, 100])
def test_certificate_table(width: int) -> None:
    text = shown(certificate_table(make_certificate()), width)
    assert max(len(line) for line in text.splitlines()) <= width
    for needed in ("certificate: holds", "1.98%", "2.00%", "1.70%", "yes", "network output", "1.06%", "1.24%"):
        assert needed in text
    assert "NO" not in text
    broken = shown(certificate_table(broken_certificate()), width)
    assert "certificate: not met" in broken
    assert "NO" in broken.splitlines()[5]


def test_certificate_table_compares_sampled_rows_per_row() -> None:
    layer = make_certified("conv", rows=1000, rows_total=4000, discrepancy=20.0, bound=20.0)
    text = shown(certificate_table(make_certificate(layers=(layer,))))
    assert "1000/4000" in text
    assert "2.00%" in text
    assert "compared per row" in text


def test_comparison_table() -> None:
    text = shown(comparison_table(COMPARISON), 110)
    for needed in ("reference network", "10.0% / 11.0% / 30.0%", "98.40%", "99.69%", "2.02%", "holds", "magnitude <same>"):
        assert needed in text
    many = replace(COMPARISON[0], densities=tuple(0.1 for _ in range(40)))
    assert "..." in shown(comparison_table([many]), 140)
    assert "network" in shown(comparison_table([]))


def test_report_text_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    report = make_report()
    slow = replace(report.layers[1], status=Status.ITERATION_LIMIT, notes=("stopped early",))
    report = replace(report, layers=(report.layers[0], slow, report.layers[2]))
    text = report_text(report)
    assert text.isascii()
    assert all(character.isprintable() or character == "\n" for character in text)
    assert max(len(line) for line in text.splitlines()) <= 110
    assert "weights remain" in text.splitlines()[0]
    assert f"fc2: iteration limit: {Status.ITERATION_LIMIT.remedy}" in text
    assert "fc2: stopped early" in text
    assert "two batches were <b>shorter</b>" in text
    assert str(report) == text


def test_report_text_folds_long_notes() -> None:
    report = make_report()
    layer = replace(report.layers[0], notes=("a long note\nover lines, " * 20,), dead_inputs=0)
    lines = report_text(replace(report, layers=(layer,), notes=("another one " * 30,))).splitlines()
    assert max(map(len, lines)) <= 110
    notes = lines[lines.index("notes") + 1 :]
    assert " ".join("".join(line.removeprefix("  ") + " " for line in notes).split()) == " ".join(
        ["fc1:", *("a long note over lines, " * 20).split(), *("another one " * 30).split()]
    )
