"""Every table fits a terminal of 80 columns, and one of 60: long names fold, numbers are whole, nothing runs over the edge."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from render_examples import make_certificate, make_report
from rich.console import Console
from rich.table import Table
from torch import nn

from nettrim.alternating import Alternated
from nettrim.bound_network import GapBound, LayerBound, network_bounds
from nettrim.compare import ComparedRun, Comparison
from nettrim.deploy.accelerate import Accelerated, Choice
from nettrim.deploy.bench_result import Bench, Form, Timing
from nettrim.deploy.compact import Compacted, Shrunk
from nettrim.deploy.export_result import CSizes, Exported
from nettrim.deploy.machine import Machine
from nettrim.render import certificate_table, report_table
from nettrim.render.bench_table import bench_tables
from nettrim.render.bounds import bound_table
from nettrim.render.compare_table import compare_table
from nettrim.render.deploy_words import accelerated_text, compacted_text, exported_text, trimmed_text
from nettrim.render.fitting import Column, fitting_table, folded, plain_text
from nettrim.trimming import LayerApoz, Round, Trimmed

LONG = "encoder.blocks.11.residual.attention.output_dense"
WIDTHS = [60, 80, 120]


def shown(table: Table, width: int) -> str:
    """What a terminal of that width shows, every line within it."""
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    text = capture.get()
    assert all(len(line) <= width for line in text.splitlines()) and "\N{HORIZONTAL ELLIPSIS}" not in text
    return text


def within(text: str, width: int) -> str:
    assert all(len(line) <= width for line in text.splitlines()), text
    return text


def whole(text: str, *numbers: str) -> None:
    for number in numbers:
        assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d,])", text), (number, text)


@pytest.fixture
def bench() -> Bench:
    timing = Timing(256, 0.1234567, 0.1111, 0.1399, 50, 3, 4_111_222_333, "every layer sparse")
    counts = {"parameters": 138_357_544, "nonzeros": 13_835_754, "bytes": 553_430_176, "compressed_bytes": 61_111_222}
    dense = Form("dense", "", **counts, macs=15_470_264_320, nonzero_macs=1_547_026_432, difference=0.25, timings=(timing,))
    forms = (dense, *(replace(dense, name=name, made_from="pruned") for name in ("pruned", "compacted", "accelerated")))
    machine = Machine("Some CPU", 4, 2, "AVX2", "Linux x86_64", "3.11", "2.9", None, None)
    return Bench(forms, "dense", (256, 1), (3, 224, 224), "float32", 0.5, "0" * 64, machine, (f"compacted: {LONG}: 12 dead channels stay",))


@pytest.mark.parametrize("width", WIDTHS)
def test_bench(bench: Bench, width: int) -> None:
    sizes, speed = (shown(table, width) for table in bench_tables(bench))
    whole(sizes, "138,357,544 (1.00)", "13,835,754 (1.00)", "61,111,222 (9.06)", "15,470,264,320 (1.00)", "1,547,026,432 (10.0)", "2.5e-01")
    whole(speed, "111 - 140", "123", "2,074", "4,111,222,333", "256")
    assert " ".join(sizes.split()).count("multiply-adds of one sample") == 1  # the caption, once, below the last part
    within(str(bench), 80)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("bound", [None, 12.3456])
@pytest.mark.parametrize("measured", ["heldout", "calibration"])
def test_compare(width: int, bound: float | None, measured: str) -> None:
    densities = {f"{LONG}.{i}": 0.1 * i + 0.0123 for i in range(8)}
    runs = tuple(
        ComparedRun(name, sparsity, "16:32", 0.0987, densities, 0.9877, 0.99876, 0.123, 0.0456, bound, True, 123.4)
        for name in ("NetTrim", "LinearADMM")
        for sparsity in (0.5, 0.995)
    )
    text = shown(compare_table(Comparison(runs, 0.99, "accuracy", measured, 10_000, 4_096, {})), width)
    whole(text, "98.77%", "99.87%", "12.3%", "99.5%", "50.0%", "123", "9.87%", "10,000", "4,096", *(["1,235%"] if bound else []))
    assert text.count("99.00%") == 1  # the reference network's accuracy


@pytest.mark.parametrize("width", WIDTHS)
def test_bounds(width: int) -> None:
    layers = tuple(LayerBound(f"{LONG}.{i}", 138_357_544, 0.012345, 1234.5, 2345.6, 1.0, 3456.789) for i in range(3))
    bound = GapBound(3456.789, 0.1234, "data", "random", 0.05, None, 64, layers)
    text = shown(bound_table(bound), width)
    whole(text, "138,357,544", "0.01235", "2,346", "3,457")
    within(str(bound), 80)
    made = network_bounds(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.rand(5, 4))
    assert "2 layers: 0, 2" in str(made) and "5 samples" in str(made) and "object at" not in str(made)


@pytest.mark.parametrize("width", WIDTHS)
def test_reports_and_certificates(width: int) -> None:
    report, certificate = make_report(), make_certificate()
    for table in (report_table(report), certificate_table(certificate)):
        shown(table, width)


def accelerated(kept: str = "every layer sparse") -> Accelerated:
    seconds = {"dense": 1.61e-3, "direct": 0.411e-3}
    choices = (
        Choice(LONG, "direct", seconds, 0.05, "direct is the fastest alone"),
        Choice("conv", "dense", seconds, 0.5, f"direct is the fastest alone, but the whole model is fastest as {kept!r}"),
        Choice("odd", "dense", {}, 0.5, "Conv1d has no sparse kernel"),
    )
    whole_seconds = {"dense": 4.2e-3, "every layer sparse": 1.4e-3}
    quartiles = {name: (0.9 * value, 1.1 * value) for name, value in whole_seconds.items()}
    return Accelerated(nn.Identity(), choices, 1e-7, whole_seconds, quartiles, kept, (10, 10), 16, 2, ("a note",))


@pytest.mark.parametrize("width", WIDTHS)
def test_accelerated(width: int) -> None:
    text = within(accelerated_text(accelerated(), width), width)
    flat = " ".join(text.split())
    assert flat.startswith(
        "every layer sparse: 3.00 times as fast as dense on the example (16 samples, 2 threads): 1.40 ms instead of 4.20 ms"
    )
    assert "faster in 10 of 10 rounds" in flat and "3.22 ms dense, 2.02 ms as they run now" in flat  # 2 * 1.61; 0.411 + 1.61
    assert "odd: Conv1d has no sparse kernel" in flat and "note: a note" in flat
    whole(text, "3.78 - 4.62", "0.411", "5.00%", "1.00")
    assert str(accelerated()) == accelerated_text(accelerated())
    kept = " ".join(accelerated_text(accelerated("dense"), width).split())
    assert (
        kept.startswith("dense is kept: nothing else was faster by more than noise on the example") and "3.00 times as fast as" not in kept
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_compacted_exported_trimmed(width: int) -> None:
    layers = (Shrunk(LONG, (4096, 1024), (25088, 12544), (100, 50)), Shrunk("same", (3, 3), (4, 4), (15, 15)))
    compacted = Compacted(
        nn.Identity(), layers, (138_357_544, 38_357_544), 2e-7, 2, (f"{LONG}: 3 dead channels stay: they are read by add",)
    )
    text = within(compacted_text(compacted, width), width)
    whole(text, "138,357,544", "38,357,544", "3.61", "25,088", "12,544", "1,024")
    assert "same" not in text and "read by add" in " ".join(text.split()) and str(compacted) == compacted_text(compacted)

    sizes = CSizes(12_345, 2_345, 345, 123_456, 4_567, 890)
    exported = Exported(Path("network.c"), "c", (Path("network.c"),), 251_834, 1e-7, (16,), False, ("a note",), sizes)
    text = within(exported_text(exported, width), width)
    whole(text, "251,834", "14,690", "123,456", "890", "1.0e-07")
    unchecked = " ".join(exported_text(replace(exported, difference=None), width).split())
    assert "not run here" in unchecked and str(exported) == exported_text(exported)

    layer = LayerApoz(LONG, (0.1,), 0.1, 0.5, 500, 392)
    rounds = (Round(1, (layer,) * 7, 289_308, 0.9939, 0.9863, 0.9942, True), Round(2, (layer,), 1_000, 0.9942, 0.5, 0.9, False))
    trimmed = Trimmed(nn.Identity(), rounds, (431_080, 289_308), (0.9939, 0.9942), "the score could not be recovered")
    text = within(trimmed_text(trimmed, width), width)
    whole(text, "431,080", "289,308", "392/500", "0.9863", "0.9942")
    assert "NO" in text and "could not be recovered" in " ".join(text.split()) and str(trimmed) == trimmed_text(trimmed)
    assert "Identity" not in str(trimmed) + str(compacted) and "score" in str(replace(trimmed, rounds=()))


def test_alternated() -> None:
    from nettrim.pruning import PruneResult

    result = PruneResult(nn.Identity(), make_report(), make_certificate())
    text = within(str(Alternated(nn.Identity(), (result, result))), 80)
    assert "in 2 rounds" in text and "round 2: " in text and "nothing is certified of retraining" in text and "Identity" not in text


def test_columns_that_do_not_fit_are_shown_below() -> None:
    """Parts repeat the key columns; title and caption stand once; a column wider than everything stands alone, whole."""
    numbers = [Column(f"n{i}", [f"{10**9 + i:,}", "7"]) for i in range(9)]
    table = fitting_table([Column("layer", [LONG, "fc"], fold=8), *numbers], "the caption", "the title", last_row=False)
    text = shown(table, 40)
    whole(text, *(f"{10**9 + i:,}" for i in range(9)))
    assert text.count("the title") == text.count("the caption") == 1 and text.count("layer") == 5 > 1
    assert shown(table, 300).count("layer") == 1
    assert "7" in plain_text(table, "a paragraph", width=40) and folded("") == [""]
    assert folded("  " + "word " * 30, 40)[1].startswith("    word")
