"""A bench as tables for a terminal: sizes, then speed at each batch size."""

from __future__ import annotations

import io

from rich.console import Console, Group
from rich.table import Table

from ..deploy.bench_result import Bench, Form, Timing
from .bench_words import count_cell, difference_text, milliseconds, per_second, times
from .numbers import NONE, clean

_WIDTH = 160  # of plain text


def bench_tables(bench: Bench) -> tuple[Table, Table]:
    """Sizes, and speed; numbers in parentheses say how many times smaller or faster than the baseline."""
    return _sizes(bench), _speed(bench)


def bench_text(bench: Bench) -> str:
    """Both tables, the machine and the notes as plain text."""
    console = Console(file=io.StringIO(), width=_WIDTH, color_system=None, force_terminal=False, no_color=True)
    with console.capture() as capture:
        console.print(Group(*bench_tables(bench)))
    lines = [line.rstrip() for line in capture.get().splitlines()]
    return "\n".join((*lines, *bench_lines(bench)))


def bench_lines(bench: Bench) -> list[str]:
    """The machine, and the notes."""
    return [f"machine: {clean(str(bench.machine))}", *(f"note: {clean(note)}" for note in bench.notes)]


def _table(title: str, caption: str, columns: tuple[str, ...], left: tuple[str, ...]) -> Table:
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", caption_style="dim")
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=name not in left)
    return table


def _sizes(bench: Bench) -> Table:
    columns = ("form", "parameters", "not zero", "bytes", "compressed", "multiply-adds", "without zeros", "difference")
    caption = (
        f"times smaller than {bench.baseline} in parentheses (compressed: than its plain file; without zeros: than all its multiply-adds); "
        "multiply-adds of one sample; difference of the outputs from the pruned model's, relative to the largest"
    )
    table = _table("Size", caption, columns, ("form",))
    for form in bench.forms:
        ratios = bench.ratios(form.name)
        table.add_row(
            _name(form),
            count_cell(form.parameters, ratios["parameters"]),
            count_cell(form.nonzeros, ratios["nonzeros"]),
            count_cell(form.bytes, ratios["bytes"]),
            count_cell(form.compressed_bytes, ratios["compressed_bytes"]),
            count_cell(form.macs, ratios["macs"]),
            count_cell(form.nonzero_macs, ratios["nonzero_macs"]),
            difference_text(form),
        )
    return table


def _speed(bench: Bench) -> Table:
    columns = ("batch", "form", "milliseconds", "quartiles", "samples a second", "times faster", "multiply-adds done", "arrangement")
    caption = (
        f"median of undisturbed single passes, at least {bench.seconds:g} s of passes for each row, forms in turns; "
        f"times faster than {bench.baseline}"
    )
    table = _table("Speed", caption, columns, ("form", "arrangement"))
    for batch in bench.batch_sizes:
        table.add_section()
        for form in bench.forms:
            found = form.at(batch)
            cells = [NONE] * 6 if found is None else _cells(found, bench.ratios(form.name)["speed"][batch])
            table.add_row(str(batch), form.name, *cells)
    return table


def _cells(found: Timing, ratio: float | None) -> list[str]:
    return [
        milliseconds(found.seconds),
        f"{milliseconds(found.lower)} - {milliseconds(found.upper)}",
        per_second(found.throughput),
        times(ratio),
        count_cell(found.macs, None),
        clean(found.how) or NONE,
    ]


def _name(form: Form) -> str:
    return f"{form.name} (of {form.made_from})" if form.made_from else form.name
