"""What long work shows, on a fake clock: nothing for short work, a bar with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable

import pytest
import torch
from rich.console import Console
from torch import nn

import nettrim
from nettrim import progress
from nettrim.progress import Advance, Display, Estimate, counted, duration, shown, within


class Clock:
    """Stands until it is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def display(clock: Clock, *, terminal: bool, still: bool = True, width: int = 80) -> tuple[Display, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=width, color_system=None, legacy_windows=False, force_jupyter=False)
    return Display(console, still=still, clock=clock), file


def test_time_left() -> None:
    clock = Clock()
    estimate = Estimate(clock)
    assert estimate.left is None
    estimate.update(3, 10)  # three were done by an earlier run: they say nothing
    clock.now += 20
    estimate.update(5, 10)
    assert estimate.left == 50 and estimate.elapsed == 20  # 10 s a piece
    clock.now += 15
    assert estimate.left == 35  # it counts down between pieces
    estimate.update(5, 10)  # the same again is no news
    clock.now += 34.7
    assert estimate.left is None  # no time at all is never left while it runs
    clock.now += 1.3
    assert estimate.left is None  # and is silent where it was wrong
    estimate.update(6.5, 10)
    assert estimate.left == pytest.approx(71 * 3.5 / 3.5)


def test_pieces_within_pieces() -> None:
    told: list[tuple[float, float, str]] = []
    tell: Advance = lambda *x: told.append(x)  # noqa: E731
    inner = within(within(tell, 2, 4, "batch"), 1, 2, "layer")
    inner(0, 8, "reading")
    inner(4, 8, "")
    inner(9, 8, "more than there were")  # never beyond its own piece
    inner(1, 0, "of an unknown number")
    within(tell, 2, 4, share=0)(1, 2, "no part of it")
    assert told == [
        (2.5, 4, "batch, layer, reading"),
        (2.75, 4, "batch, layer"),
        (3.0, 4, "batch, layer, more than there were"),
        (2.5, 4, "batch, layer, of an unknown number"),
        (2.0, 4, "no part of it"),
    ]
    told.clear()
    assert list(counted("abc", 3, tell, "x")) == ["a", "b", "c"] and told == [(n, 3, "x") for n in range(4)]
    told.clear()
    assert list(counted("ab", 0, tell, "x")) == ["a", "b"] and [total for _, total, _ in told] == [1, 2, 2]


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("still", [True, False])
def test_short_work_shows_nothing(terminal: bool, still: bool) -> None:
    clock = Clock()
    screen, file = display(clock, terminal=terminal, still=still)
    with screen:
        for number in range(20):
            screen.advance(number, 20, "work")
            clock.now += 0.09
    text = file.getvalue()
    assert "work" not in text and "20" not in text.replace("\x1b[?25", "") and "\n" not in text


def test_plain_lines_come_now_and_then() -> None:
    clock = Clock()
    screen, file = display(clock, terminal=False)
    with screen:
        for number in range(1000):
            screen.advance(number, 1000, f"piece {number}")
            clock.now += 1.0
    lines = file.getvalue().splitlines()
    assert lines[0] == "2 of 1,000: piece 2 (2 s, about 16 min 38 s left)" and lines[-1] == "done in 16 min 40 s"
    times = [int(line.split(" ")[0]) for line in lines[:-1] if "," not in line.split(" ")[0]]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert all(gap >= max(10, a // 10) for a, gap in zip(times, gaps, strict=False)) and len(lines) < 60


def test_a_long_piece_that_tells_nothing_shows_that_it_lives() -> None:
    clock = Clock()
    screen, file = display(clock, terminal=False, still=False)
    with screen:
        screen.advance(0, 3, "compiling")
        assert not file.getvalue()
        clock.now += 30
        pulse = screen.pulse
        assert pulse is not None
        while pulse.thread.is_alive() and not file.getvalue():  # the clock stands: one line is due, and no more
            time.sleep(0.05)
    assert file.getvalue().splitlines() == ["0 of 3: compiling (30 s)", "done in 30 s"]
    assert not pulse.thread.is_alive()


def test_an_error_is_not_called_done() -> None:
    clock = Clock()
    screen, file = display(clock, terminal=False)
    with pytest.raises(KeyboardInterrupt), screen:
        clock.now += 5
        screen.advance(1, 2, "work")
        raise KeyboardInterrupt
    assert file.getvalue().splitlines() == ["1 of 2: work (5 s, about 5 s left)"] or "1 of 2: work (5 s" in file.getvalue()
    assert "done in" not in file.getvalue()


@pytest.mark.parametrize("width", [40, 80])
def test_the_bar(width: int) -> None:
    clock = Clock()
    screen, file = display(clock, terminal=True, width=width)
    with screen:
        screen.advance(0, 8, "pruning encoder.layers.0.self_attn.out_proj, layer 1 of 8: step 120, distance 2.10%, density 10.0%")
        clock.now += 30
        screen.advance(2, 8, "pruning encoder.layers.0.self_attn.out_proj, layer 3 of 8: step 120, distance 2.10%, density 10.0%")
        text = file.getvalue()
        assert "2 of 8" in text and "about 1 min 30 s left" in text and "30 s" in text
        before = len(text)
        clock.now += 30
        assert len(file.getvalue()) == before  # nothing is drawn beside what is timed
    assert "done" not in file.getvalue()


def test_what_the_argument_means(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[float, float, str]] = []
    with shown(lambda *x: told.append(x)) as advance:
        advance(1, 2, "mine")
    assert told == [(1, 2, "mine")]
    with shown(False) as advance:
        advance(1, 2, "unseen")
    assert not any(capsys.readouterr())
    assert [duration(s) for s in (0.4, 59.4, 59.6, 185, 7800)] == ["0 s", "59 s", "1 min 0 s", "3 min 5 s", "2 h 10 min"]


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


X = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))


def _pruned(tell: bool | Advance) -> nettrim.PruneResult:
    return nettrim.prune(small(), [X[:32], X[32:]], nettrim.NetTrim(sparsity=0.5), heldout=[torch.randn(16, 12)], progress=tell)


WORK: dict[str, Callable[[Advance], object]] = {
    "prune": _pruned,
    "prune, everything": lambda tell: nettrim.prune(
        small(), [X], nettrim.NetTrim(sparsity=0.5), allocation="global", sweeps=2, progress=tell
    ),
    "recertify": lambda tell: nettrim.recertify(r := _pruned(False), r.model, small(), [X[:32], X[32:]], progress=tell),
    "accelerate": lambda tell: nettrim.accelerate(small(), X, budget=0.01, progress=tell),
    "bench": lambda tell: nettrim.bench(small(), X, batch_sizes=[1, 4], seconds=0.01, progress=tell),
    "compare": lambda tell: nettrim.compare(small(), [X], methods=["magnitude", "random"], sparsities=[0.5], progress=tell),
    "distill": lambda tell: nettrim.distill(_pruned(False).model, small(), [X], steps=8, progress=tell),
    "bounds": lambda tell: nettrim.network_bounds(small(), [X[:32], X[32:]], progress=tell),
}


@pytest.mark.parametrize("name", list(WORK))
def test_all_long_work_tells_how_far_it_is(name: str) -> None:
    told: list[tuple[float, float, str]] = []
    WORK[name](lambda *x: told.append(x))
    assert told and all(0 <= done <= total and total > 0 for done, total, _ in told)
    # once the number of pieces is known it stays, and what is done only grows
    last = [(done, total) for done, total, _ in told if total == told[-1][1]]
    assert all(a <= b for (a, _), (b, _) in itertools.pairwise(last)) and last[-1][0] >= 0.7 * last[-1][1]
    assert any(what for _, _, what in told)


def test_verify_and_export(tmp_path: object) -> None:
    told: list[tuple[float, float, str]] = []
    folder = _pruned(False).save(f"{tmp_path}/saved")
    nettrim.verify(folder, small(), [X[:32], X[32:]], progress=lambda *x: told.append(x))
    assert [done for done, _, _ in told] == [0, 1, 1.5, 2] and told[-1][1:] == (2, "certifying")
    told.clear()
    nettrim.export(small(), X, f"{tmp_path}/network.pt2", progress=lambda *x: told.append(x))
    assert told == [(0, 1, "writing network.pt2 and running it")]


def test_a_prune_tells_of_its_layers() -> None:
    told: list[tuple[float, float, str]] = []
    _pruned(lambda *x: told.append(x))
    text = "\n".join(f"{done:g}/{total:g} {what}" for done, total, what in told)
    for needed in (
        "0/1 reading",
        "0/5 pruning 0, layer 1 of 3: reading inputs",
        "2/5 pruning 4, layer 3 of 3",
        "3.5/5 certifying",
        "5/5 running held-out",
    ):
        assert needed in text, text
    assert progress.SHORT == 2.0
