"""The phase transition of exact recovery: how many Gaussian samples pin an s-sparse ReLU neuron as the l1 minimiser.

A trial draws an s-sparse neuron ``w`` of N inputs and an endless sequence of samples ``a_i`` from N(0, I_N), with responses
``max(a_i w, 0)``. For a number of samples P it solves ``min ||u||_1`` subject to ``a_i u = y_i`` where ``y_i > 0`` and ``a_i u <= 0``
elsewhere, an exact linear program, and asks whether the minimiser is ``w``. A further sample only adds a constraint that ``w`` meets,
so within a trial recovery, once reached, stays (docs/recovery.md, 3.1): the smallest sufficient P is found by bisection, and the
share of trials whose smallest P is at most P is the success rate at every P at once.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from ..bounds import expected_transition, samples_for_recovery
from ..recovery import Verdict, is_unique_minimiser
from ..status import InvalidInput
from . import outputs
from .journal import Journal, Record

Entries = Literal["gaussian", "signs"]
Array = NDArray[np.float64]

PROBABILITY = 0.99
"""The probability at which Theorem 3's line is drawn."""
RECOVERED = 1e-6
"""A minimiser within this relative error of the neuron counts as the neuron."""
SPARSITIES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
QUICK_SPARSITIES = (1, 2, 4, 8, 16, 32)
_TRIALS, _QUICK_TRIALS = 60, 25
_CERTIFIED = 5  # trials of each (N, s) whose verdicts on both sides of the threshold are computed
_FORMAT = 2
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Attempt:
    """One linear program: its number of samples, whether the minimiser was the neuron, and its relative error."""

    samples: int
    recovered: bool
    error: float


@dataclass(frozen=True)
class Certified:
    """The verdicts on the neuron at the threshold and one sample before it, and the margin at the threshold."""

    at: str
    margin: float | None
    before: str


@dataclass(frozen=True)
class Trial:
    """One neuron: ``threshold`` is the smallest number of samples from which on it is recovered."""

    inputs: int
    sparsity: int
    trial: int
    threshold: int
    attempts: tuple[Attempt, ...]
    certified: Certified | None
    seconds: float


@dataclass(frozen=True)
class Transition:
    """All trials of one (N, s); counts of samples. ``half`` is the smallest P at which at least half of the trials are recovered,
    ``low`` and ``high`` the same for 10 % and 90 %, ``largest`` for all of them. ``expected`` is the parameter-free prediction
    (docs/recovery.md, 3.2) and ``theorem`` Theorem 3's number of samples for ``PROBABILITY``."""

    inputs: int
    sparsity: int
    trials: int
    low: int
    half: int
    high: int
    largest: int
    expected: float
    theorem: int


@dataclass(frozen=True)
class Fit:
    """Least squares of the half-way points P50, or of log P50 where ``of`` says so, on the named terms; ``r_squared`` is about the mean."""

    name: str
    terms: tuple[str, ...]
    coefficients: tuple[float, ...]
    r_squared: float
    points: int
    of: str = "P50"


@dataclass(frozen=True)
class Summary:
    """What the experiment found. ``size`` is the N of the map; ``theorem_above`` says that Theorem 3's number is at least the
    largest threshold of any trial, everywhere. ``unique`` of ``certified`` trials were certified at their threshold and ``refuted``
    of them were proven not to be minimisers one sample before it."""

    size: int
    entries: str
    seed: int
    transitions: tuple[Transition, ...]
    fits: tuple[Fit, ...]
    theorem_above: bool
    smallest_ratio: float
    certified: int
    unique: int
    refuted: int
    linear_programs: int
    largest_recovered_error: float
    smallest_failed_error: float
    solver_seconds: float
    files: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain JSON types."""
        return asdict(self)


def run(
    N: int = 200,
    sparsities: Sequence[int] | None = None,
    trials: int | None = None,
    seed: int = 0,
    quick: bool = False,
    *,
    out: Path,
    sizes: Sequence[int] | None = None,
    entries: Entries = "gaussian",
    progress: Callable[[float, float, str], None] = lambda done, total, what: None,
    resume: bool = True,
    processes: int = 2,
) -> Summary:
    """Measure the transition and write ``recovery.jsonl`` (one line a trial), ``recovery.json``, ``recovery.png`` and ``recovery.svg``.

    The map is drawn for ``N``; the scaling is fitted over ``sizes`` (default: N/4, N/2, N and, unless ``quick``, 2 N), each with those
    of the ``sparsities`` that are at most a quarter of it; at N itself with all that are given, or the usual ones up to N/3.
    ``entries`` of the neuron are standard normal or +-1; both give the same law (docs/recovery.md, 3.2). A trial depends only on
    (seed, N, s, trial), not on the order or the number of processes.

    With ``resume`` the trials in an existing ``recovery.jsonl`` of the same seed and entries are kept, so an interrupted run continues and
    more trials can be added; without it the file is started afresh. ``progress(done, total, what)`` is called after every trial.
    Processes are spawned: call this under ``if __name__ == "__main__"`` in a script, or give ``processes=1``. Raises InvalidInput.
    """
    started = {"format": _FORMAT, "seed": seed, "entries": entries, "recovered": RECOVERED}
    keys = _plan(N, sparsities, trials, seed, quick, sizes, entries, processes)
    outputs.begin(out, "recovery")
    with Journal(out / "recovery.jsonl", started, resume=resume) as journal:
        missing = [key for key in keys if _name(key) not in journal]
        finished = len(keys) - len(missing)
        progress(finished, len(keys), "resumed" if finished else "started")
        for trial in _solve(missing, seed, entries, processes):
            journal.add(_name((trial.inputs, trial.sparsity, trial.trial)), asdict(trial))
            finished += 1
            progress(finished, len(keys), f"N = {trial.inputs}, s = {trial.sparsity}: recovered from {trial.threshold} samples on")
    wanted = [_trial(journal.records[_name(key)]) for key in keys]
    files = ("recovery.jsonl", "recovery.json", "recovery.png", "recovery.svg")
    summary = summarise(wanted, N, seed, entries, files)
    from .recovery_figures import picture  # drawn from this module's data

    outputs.write(out, "recovery", summary.to_dict(), picture(summary, wanted))
    return summary


def samples_of(N: int, s: int, trial: int, seed: int, entries: Entries = "gaussian") -> tuple[Array, Callable[[int], Array]]:
    """The neuron ``w`` (N,) of a trial, and a function from P to its first P samples (P, N): longer ones begin with the shorter ones."""
    rng = np.random.default_rng([seed, N, s, trial])
    w = np.zeros(N)
    support = rng.choice(N, s, replace=False)
    w[support] = rng.standard_normal(s) if entries == "gaussian" else rng.choice([-1.0, 1.0], s)
    rows = np.empty((0, N))

    def samples(P: int) -> Array:
        nonlocal rows
        if len(rows) < P:  # row by row, the stream of numbers does not depend on how it is cut
            rows = np.vstack([rows, rng.standard_normal((max(P, 2 * len(rows)) - len(rows), N))])
        return rows[:P]

    return w, samples


def minimiser(A: Array, y: Array) -> Array:
    """A minimiser (N,) of ``||u||_1`` subject to ``A u = y`` where ``y > 0`` and ``A u <= 0`` elsewhere; A (P, N), y (P,), by HiGHS."""
    N, on = A.shape[1], y > 0
    if not on.any():
        return np.zeros(N)
    both = np.hstack([A, -A])
    limits = {"A_ub": both[~on], "b_ub": np.zeros(int((~on).sum()))} if not on.all() else {}
    result = linprog(np.ones(2 * N), A_eq=both[on], b_eq=y[on], bounds=(0, None), method="highs", **limits)
    if result.status != 0:  # the neuron itself is feasible and the norm is bounded below, so this is the solver's trouble
        raise ArithmeticError(f"HiGHS did not solve a recovery program of shape {A.shape}: {result.message}")
    return np.asarray(result.x[:N] - result.x[N:], dtype=np.float64)


def solve_trial(N: int, s: int, trial: int, seed: int, entries: Entries = "gaussian", certify: bool = False) -> Trial:
    """Find by bisection the smallest number of samples from which on the trial's neuron is recovered."""
    began = time.perf_counter()
    w, samples = samples_of(N, s, trial, seed, entries)
    attempts: list[Attempt] = []

    def recovered(P: int) -> bool:
        A = samples(P)
        error = float(np.linalg.norm(minimiser(A, np.maximum(A @ w, 0)) - w) / np.linalg.norm(w))
        attempts.append(Attempt(P, error < RECOVERED, error))
        return attempts[-1].recovered

    # A bracket around the prediction, widened until it holds the threshold. With no samples the minimiser is 0.
    failing, enough = 0, max(2, round(1.15 * expected_transition(N, s)))
    while not recovered(enough):
        failing, enough = enough, math.ceil(1.3 * enough) + 1
    guess = round(0.85 * expected_transition(N, s))
    while enough - failing > 1:
        middle = guess if failing < guess < enough and len(attempts) == 1 else (failing + enough) // 2
        if recovered(middle):
            enough = middle
        else:
            failing = middle
    certified = None
    if certify:
        at, before = (is_unique_minimiser(A, np.maximum(A @ w, 0), w) if len(A) else None for A in (samples(enough), samples(failing)))
        assert at is not None
        # Without samples everything is feasible, 0 too, so the neuron is not a minimiser.
        certified = Certified(at.verdict.value, at.margin, (before.verdict if before else Verdict.NOT_MINIMISER).value)
    return Trial(N, s, trial, enough, tuple(sorted(attempts, key=lambda a: a.samples)), certified, time.perf_counter() - began)


def summarise(trials: Sequence[Trial], size: int, seed: int, entries: str, files: tuple[str, ...] = ()) -> Summary:
    """The transition of every (N, s), the fits of the half-way points, and the comparison with Theorem 3."""
    transitions = tuple(_transition([t for t in trials if (t.inputs, t.sparsity) == key]) for key in sorted({_key(t)[:2] for t in trials}))
    certified = [t.certified for t in trials if t.certified is not None]
    attempts = [attempt for trial in trials for attempt in trial.attempts]
    return Summary(
        size=size,
        entries=entries,
        seed=seed,
        transitions=transitions,
        fits=tuple(_fits(transitions)),
        theorem_above=all(t.theorem >= t.largest for t in transitions),
        smallest_ratio=min(t.theorem / t.half for t in transitions),
        certified=len(certified),
        unique=sum(c.at == Verdict.UNIQUE.value for c in certified),
        refuted=sum(c.before == Verdict.NOT_MINIMISER.value for c in certified),
        linear_programs=len(attempts),
        largest_recovered_error=max((a.error for a in attempts if a.recovered), default=0.0),
        smallest_failed_error=min((a.error for a in attempts if not a.recovered), default=math.inf),
        solver_seconds=sum(t.seconds for t in trials),
        files=files,
    )


def _transition(trials: Sequence[Trial]) -> Transition:
    N, s = trials[0].inputs, trials[0].sparsity
    thresholds = sorted(t.threshold for t in trials)

    def at(share: float) -> int:
        return thresholds[max(0, math.ceil(share * len(thresholds)) - 1)]

    theorem = samples_for_recovery(N, s, probability=PROBABILITY)
    return Transition(N, s, len(trials), at(0.1), at(0.5), at(0.9), thresholds[-1], expected_transition(N, s), theorem)


def _fits(transitions: Sequence[Transition]) -> Iterator[Fit]:
    """First the sparse regime s <= N/10, then all points, where s log(N/s) is the law; then the growth with N for each s."""
    sparse = [t for t in transitions if 10 * t.sparsity <= t.inputs] or list(transitions)
    yield _fit("s <= N/10, through the origin", sparse, {"s log N": lambda t: t.sparsity * math.log(t.inputs)})
    yield _fit(
        "s <= N/10, two terms",
        sparse,
        {"s log N": lambda t: t.sparsity * math.log(t.inputs), "s log s": lambda t: t.sparsity * math.log(t.sparsity)},
    )
    one_power: dict[str, Callable[[Transition], float]] = {
        "log(s log N)": lambda t: math.log(t.sparsity * math.log(t.inputs)),
        "": lambda t: 1.0,
    }
    yield _fit("s <= N/10, logarithmic", sparse, one_power, logarithmic=True)
    yield _fit("all s, through the origin", transitions, {"s log N": lambda t: t.sparsity * math.log(t.inputs)})
    yield _fit("all s, through the origin", transitions, {"s log(e N/s)": lambda t: t.sparsity * (1 + math.log(t.inputs / t.sparsity))})
    for s in sorted({t.sparsity for t in transitions}):
        own = [t for t in transitions if t.sparsity == s]
        if len(own) >= 3:
            yield _fit(f"s = {s}, over N", own, {"log N": lambda t: math.log(t.inputs), "": lambda t: 1.0})


def _fit(name: str, points: Sequence[Transition], terms: dict[str, Callable[[Transition], float]], logarithmic: bool = False) -> Fit:
    X = np.array([[term(t) for term in terms.values()] for t in points])
    y = np.array([t.half for t in points], dtype=float)
    y = np.log(y) if logarithmic else y
    coefficients = np.linalg.lstsq(X, y, rcond=None)[0]
    spread = float(((y - y.mean()) ** 2).sum())
    r_squared = 1 - float(((y - X @ coefficients) ** 2).sum()) / spread if spread > 0 else math.nan
    return Fit(name, tuple(terms), tuple(float(c) for c in coefficients), r_squared, len(points), "log P50" if logarithmic else "P50")


def _plan(
    N: int,
    sparsities: Sequence[int] | None,
    trials: int | None,
    seed: int,
    quick: bool,
    sizes: Sequence[int] | None,
    entries: str,
    processes: int,
) -> list[tuple[int, int, int]]:
    """All (N, s, trial) to be solved, the large ones first, so that two processes end together."""
    count = (_QUICK_TRIALS if quick else _TRIALS) if trials is None else trials
    for name, value, least in (("N", N, 4), ("trials", count, 1), ("seed", seed, 0), ("processes", processes, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InvalidInput(f"{name} must be a whole number of at least {least}, found {value!r}: see experiments.recovery.run")
    if entries not in ("gaussian", "signs"):
        raise InvalidInput(f"entries must be 'gaussian' or 'signs', found {entries!r}: both give the same law")
    chosen = tuple(sparsities) if sparsities is not None else (QUICK_SPARSITIES if quick else SPARSITIES)
    every = set(sizes) if sizes is not None else {N // 4, N // 2, N, *(() if quick else (2 * N,))}
    plan: list[tuple[int, int, int]] = []
    for s in chosen if sparsities is not None else ():
        if isinstance(s, bool) or not isinstance(s, int) or not 1 <= s <= N:
            raise InvalidInput(f"sparsities must be whole numbers from 1 to N = {N}, found {s!r}: they count nonzero weights")
    for size in every if sizes is not None else ():
        if isinstance(size, bool) or not isinstance(size, int) or size < 4:
            raise InvalidInput(f"sizes must be whole numbers of at least 4, found {size!r}: they are numbers of inputs")
    for size in sorted(every | {N}, reverse=True):
        for s in chosen:
            # An explicit choice is honoured at N; at the other sizes a neuron with most weights nonzero says nothing about scaling.
            if (size == N and (sparsities is not None or 3 * s <= N)) or (size != N and 4 * s <= size):
                plan += [(size, s, trial) for trial in range(count)]
    if not any(size == N for size, _, _ in plan):
        raise InvalidInput(f"sparsities must hold at least one number, found {list(chosen)} for N = {N}: leave them out for the usual ones")
    return plan


def _solve(keys: Sequence[tuple[int, int, int]], seed: int, entries: Entries, processes: int) -> Iterator[Trial]:
    if processes == 1 or len(keys) < 2:
        for N, s, trial in keys:
            yield solve_trial(N, s, trial, seed, entries, trial < _CERTIFIED)
        return
    with _one_thread_each(), ProcessPoolExecutor(processes, get_context("spawn"), initializer=_ignore_interrupts) as pool:
        waiting: list[Future[Trial]] = []
        try:
            waiting = [pool.submit(solve_trial, N, s, trial, seed, entries, trial < _CERTIFIED) for N, s, trial in keys]
            for future in as_completed(waiting):
                yield future.result()
        finally:  # an interrupt must not wait for all that is queued
            for future in waiting:
                future.cancel()


def _ignore_interrupts() -> None:
    """Ctrl-C goes to the whole group; the parent alone decides how to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes spawned inside use one thread each; the environment is put back afterwards."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _key(trial: Trial) -> tuple[int, int, int]:
    return trial.inputs, trial.sparsity, trial.trial


def _name(key: tuple[int, int, int]) -> str:
    return "N={} s={} trial={}".format(*key)


def _trial(record: Record) -> Trial:
    attempts = tuple(Attempt(**attempt) for attempt in record["attempts"])
    certified = None if record["certified"] is None else Certified(**record["certified"])
    return Trial(**record | {"attempts": attempts, "certified": certified})
