"""A bench as tables for a terminal: sizes, then speed at each batch size."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD, Box
from rich.table import Table

from ..deploy.bench_result import Bench, Form, Timing
from .bench_words import count_cell, difference_text, milliseconds, per_second, times
from .fitting import PLAIN_BOX, Column, fitting_table, plain_text
from .numbers import NONE, clean


def bench_tables(bench: Bench) -> tuple[Table, Table]:
    """Sizes, and speed; numbers in parentheses say how many times smaller or faster than the baseline."""
    return _sizes(bench, SIMPLE_HEAD), _speed(bench, SIMPLE_HEAD)


def bench_text(bench: Bench) -> str:
    """Both tables, the machine and the notes as plain text."""
    return plain_text(_sizes(bench, PLAIN_BOX), "", _speed(bench, PLAIN_BOX), "", *bench_lines(bench))


def bench_lines(bench: Bench) -> list[str]:
    """The machine, and the notes."""
    return [f"machine: {clean(str(bench.machine))}", *(f"note: {clean(note)}" for note in bench.notes)]


def _sizes(bench: Bench, box: Box) -> Table:
    ratios = [bench.ratios(form.name) for form in bench.forms]

    def counts(name: str) -> list[str]:
        return [count_cell(getattr(form, name), own[name]) for form, own in zip(bench.forms, ratios, strict=True)]

    columns = [
        Column("form", [_name(form) for form in bench.forms], fold=11),
        Column("parameters", counts("parameters")),
        Column("not zero", counts("nonzeros")),
        Column("bytes", counts("bytes")),
        Column("compressed", counts("compressed_bytes")),
        Column("multiply-adds", counts("macs")),
        Column("without zeros", counts("nonzero_macs")),
        Column("difference", [difference_text(form) for form in bench.forms]),
    ]
    caption = (
        f"times smaller than {bench.baseline} in parentheses (compressed: than its plain file; without zeros: than all its multiply-adds); "
        "multiply-adds of one sample; difference of the outputs from the pruned model's, relative to the largest"
    )
    return fitting_table(columns, caption, "Size", box, last_row=False)


def _speed(bench: Bench, box: Box) -> Table:
    rows = [(batch, form) for batch in bench.batch_sizes for form in bench.forms]
    cells = []
    for batch, form in rows:
        found = form.at(batch)
        cells.append([NONE] * 6 if found is None else _cells(found, bench.ratios(form.name)["speed"][batch]))
    milli, quartiles, throughput, faster, done, how = zip(*cells, strict=True)
    columns = [
        Column("batch", [str(batch) for batch, _ in rows]),
        Column("form", [form.name for _, form in rows], justify="left"),
        Column("times\nfaster", faster),
        Column("milli-\nseconds", milli),
        Column("quartiles", quartiles),
        Column("samples\na second", throughput),
        Column("multiply-\nadds done", done),
        Column("arrangement", how, fold=11),
    ]
    caption = (
        f"median of undisturbed single passes, at least {bench.seconds:g} s of passes for each row, forms in turns; "
        f"times faster than {bench.baseline}"
    )
    sections = range(len(bench.forms), len(rows), len(bench.forms))
    return fitting_table(columns, caption, "Speed", box, last_row=False, keys=2, sections=sections)


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
