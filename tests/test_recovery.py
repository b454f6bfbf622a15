"""Certificates of recovery against brute force and CVXPY, Theorem 3's numbers by hand, and the experiment on tiny sizes."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console
from scipy.optimize import linprog

from nettrim import bounds
from nettrim.experiments import recovery as experiment
from nettrim.experiments import recovery_figures as figures
from nettrim.recovery import Verdict, is_unique_minimiser
from nettrim.status import CertificateError, InvalidInput

Array = NDArray[np.float64]


def brute_force(A: Array, y: Array, w: Array, V: Array, bias: bool) -> str:
    """Truth by linear programs: the optimal value, then the range of every coordinate over the optimal face."""
    X = np.hstack([A, np.ones((len(A), 1))]) if bias else A
    n, on = X.shape[1], y > 0
    cost = np.ones(n)
    cost[-1:] = 0.0 if bias else 1.0
    norm = np.concatenate([cost, cost])
    equal = {"A_eq": np.hstack([X[on], -X[on]]), "b_eq": y[on]} if on.any() else {}
    above, limit = np.hstack([X[~on], -X[~on]]), V[~on]
    best = linprog(norm, A_ub=above, b_ub=limit, bounds=(0, None), **equal)
    assert best.status == 0
    if cost @ np.abs(w) > best.fun + 1e-7:
        return "not a minimiser"
    reach = 0.0
    for j in range(n):
        for sign in (1.0, -1.0):
            aim = np.zeros(2 * n)
            aim[j], aim[n + j] = sign, -sign
            far = linprog(aim, A_ub=np.vstack([above, norm]), b_ub=np.append(limit, best.fun + 1e-10), bounds=(0, None), **equal)
            reach = max(reach, math.inf if far.status == 3 else abs(far.fun - sign * w[j]))
    return "unique" if reach < 1e-6 else "several"


def small_neuron(k: int) -> tuple[Array, Array, Array, Array, bool]:
    """Whole numbers every other time: they give ties, tight rows, dependent columns, dead neurons and empty Omega."""
    rng = np.random.default_rng([77, k])
    P, N, bias = int(rng.integers(1, 8)), int(rng.integers(1, 6)), k % 3 == 0
    A = rng.integers(-2, 3, (P, N)).astype(float) if k % 2 else rng.standard_normal((P, N))
    w = np.where(rng.random(N) < 0.5, rng.integers(-2, 3, N), 0).astype(float)
    Z = A @ w
    if bias:
        w = np.append(w, float(rng.integers(-1, 2)))
        Z = Z + w[-1]
    V = np.minimum(Z, 0.0) if k % 5 == 0 else np.zeros(P)  # the cascade's V: every row off Omega is tight
    return A, np.maximum(Z, 0.0), w, V, bias


def test_verdicts_agree_with_brute_force() -> None:
    seen: dict[str, int] = {}
    for k in range(150):
        A, y, w, V, bias = small_neuron(k)
        certificate = is_unique_minimiser(A, y, w, V=V, bias=bias)
        certificate.check()
        truth = brute_force(A, y, w, V, bias)
        expected = {"unique": Verdict.UNIQUE, "several": Verdict.MINIMISER, "not a minimiser": Verdict.NOT_MINIMISER}
        assert certificate.verdict is expected[truth], f"case {k}: {certificate.reason}"
        assert certificate.unique == (truth == "unique")
        seen[truth] = seen.get(truth, 0) + 1
        if truth == "unique":
            continue
        other = certificate.other_point()
        assert other is not None, f"case {k} has no second point"
        Z = (np.hstack([A, np.ones((len(A), 1))]) if bias else A) @ other
        assert np.allclose(Z[y > 0], y[y > 0], atol=1e-8)
        assert (Z[y == 0] <= V[y == 0] + 1e-8).all()
        penalised = slice(0, A.shape[1])
        change = np.abs(other[penalised]).sum() - np.abs(w[penalised]).sum()
        assert np.abs(other - w).max() > 1e-6
        assert change < -1e-9 if truth == "not a minimiser" else abs(change) < 1e-8
    assert min(seen.values()) >= 10 and len(seen) == 3


def test_sharpness_holds_for_feasible_points() -> None:
    """Equation (2.3): the margin bounds from below how fast the norm grows, in random feasible directions."""
    rng = np.random.default_rng(5)
    w = np.array([1.0, -2.0, 0, 0, 0, 0, 0, 0])
    A = rng.standard_normal((14, 8))
    y = np.maximum(A @ w, 0.0)
    V = np.minimum(A @ w, 0.0)
    certificate = is_unique_minimiser(A, y, w, V=V)
    assert certificate.unique and certificate.margin is not None and certificate.margin > 0.01
    on = y > 0
    kernel = np.linalg.svd(A[on])[2][on.sum() :]
    tested = 0
    for _ in range(3000):
        d = rng.standard_normal(len(kernel)) @ kernel
        if (A[~on] @ d > 0).any():
            continue
        tested += 1
        grown = np.abs(w + d).sum() - np.abs(w).sum()
        far = np.abs(d[2:]).sum() + (np.abs(A[~on] @ d) / np.linalg.norm(A[~on], axis=1)).sum()
        assert grown >= certificate.margin * far - 1e-12
    assert tested > 20


def test_agrees_with_cvxpy() -> None:
    """CVXPY's minimiser is certified; the neuron is certified exactly when CVXPY finds it."""
    pytest.importorskip("cvxpy")
    from nettrim.solvers.reference import halfspace_l1

    rng = np.random.default_rng(8)
    found = []
    for k in range(8):
        P, N = (10, 12) if k % 2 else (30, 12)
        A, w = rng.standard_normal((P, N)), np.zeros(N)
        w[:2] = [1.5, -0.7]
        y = np.maximum(A @ w, 0.0)
        solution = halfspace_l1(A, y[:, None], 0.0, bias=False).weights[:, 0]
        found.append(bool(np.linalg.norm(solution - w) < 1e-6))
        assert is_unique_minimiser(A, y, w).unique == found[-1]
        theirs = is_unique_minimiser(A, y, solution, tolerance=1e-6)
        theirs.check()
        assert theirs.unique
    assert set(found) == {True, False}


def test_certificate_has_proposition_2s_form() -> None:
    rng = np.random.default_rng(2)
    A = rng.standard_normal((25, 10))
    w = np.zeros(10)
    w[[1, 4]] = [2.0, -1.0]
    y = np.maximum(A @ w, 0.0)
    c = is_unique_minimiser(A, y, w)
    assert c.multiplier is not None and c.Lambda is not None and c.full_rank and c.residual is not None
    on = y > 0
    lifted = np.block([[A[on], np.zeros((on.sum(), (~on).sum()))], [A[~on], -np.eye((~on).sum())]])
    Lambda = lifted.T @ np.concatenate([c.multiplier[on], c.multiplier[~on]])
    assert np.allclose(Lambda, c.Lambda, atol=1e-12)
    assert np.allclose(Lambda[[1, 4]], [1.0, -1.0], atol=1e-9) and c.residual < 1e-9
    assert (np.abs(np.delete(Lambda[:10], [1, 4])) < 1).all() and (Lambda[10:] == 0).all()  # every slack is in its support here
    restricted = lifted[:, np.concatenate([[1, 4], np.arange(10, lifted.shape[1])])]
    assert np.linalg.matrix_rank(restricted) == restricted.shape[1]


def test_degenerate_candidates() -> None:
    A = np.array([[1.0, 2.0], [-1.0, 1.0]])
    zero = is_unique_minimiser(A, np.zeros(2), np.zeros(2))
    assert zero.unique and zero.singular_value == math.inf  # w = 0: every row is tight, no column is needed
    idle = is_unique_minimiser(-np.abs(A) - 1, np.zeros(2), np.array([1.0, 0.0]))  # empty Omega, no tight row
    assert idle.verdict is Verdict.NOT_MINIMISER and not idle.tight.any() and not idle.omega.any()
    better = idle.other_point()
    assert better is not None and np.abs(better).sum() < 1
    free = is_unique_minimiser(A, np.zeros(2), np.array([0.0, 0.0, -1.0]), bias=True)  # nothing pins the unpenalised bias
    assert free.verdict is Verdict.MINIMISER and free.other_point() is not None
    twins = is_unique_minimiser(np.array([[1.0, 1.0]]), np.array([1.0]), np.array([1.0, 0.0]))
    assert twins.verdict is Verdict.MINIMISER and twins.full_rank and twins.margin is not None and abs(twins.margin) < 1e-9
    both = is_unique_minimiser(np.array([[1.0, 1.0]]), np.array([1.0]), np.array([0.5, 0.5]))
    assert both.verdict is Verdict.MINIMISER and not both.full_rank
    for certificate in (zero, idle, free, twins, both):
        certificate.check()
    # A cascade's negative V, empty Omega: u_1 <= -1 makes (-1, 0) the unique minimiser.
    pushed = is_unique_minimiser(np.array([[1.0, 0.5]]), np.zeros(1), np.array([-1.0, 0.0]), V=np.array([-1.0]))
    assert pushed.unique and pushed.tight.all()


def test_infeasible_candidate_is_not_a_minimiser() -> None:
    A = np.eye(2)
    certificate = is_unique_minimiser(A, np.array([1.0, 0.0]), np.array([2.0, 0.0]))
    assert certificate.verdict is Verdict.NOT_MINIMISER and "breaks a constraint" in certificate.reason
    assert certificate.direction is None and certificate.other_point() is None
    certificate.check()


def test_scale_does_not_matter() -> None:
    rng = np.random.default_rng(4)
    A, w = rng.standard_normal((20, 8)), np.zeros(8)
    w[0] = 1.0
    y = np.maximum(A @ w, 0.0)
    plain = is_unique_minimiser(A, y, w)
    for inputs, outputs in ((1e6, 1.0), (1e-6, 1.0), (1.0, 1e8), (1.0, 1e-8)):
        scaled = is_unique_minimiser(inputs * A, inputs * outputs * y, outputs * w)
        assert scaled.unique and scaled.margin == pytest.approx(plain.margin, rel=1e-6)


def test_check_finds_what_was_changed() -> None:
    rng = np.random.default_rng(3)
    A, w = rng.standard_normal((25, 8)), np.zeros(8)
    w[0] = 1.0
    good = is_unique_minimiser(A, np.maximum(A @ w, 0.0), w)
    assert good.unique and good.multiplier is not None and good.margin is not None
    for changed in (
        {"multiplier": 1.001 * good.multiplier},
        {"margin": good.margin + 0.01},
        {"weights": w + 0.01},
        {"tight": ~good.tight},
        {"singular_value": 2 * good.singular_value},
        {"verdict": Verdict.NOT_MINIMISER},
    ):
        with pytest.raises(CertificateError, match="does not hold"):
            dataclasses.replace(good, **changed).check()  # type: ignore[arg-type]


def test_verdicts_carry_their_proof() -> None:
    assert all(verdict.proof for verdict in Verdict)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"A": np.ones(3)}, "A must be a matrix"),
        ({"A": np.ones((0, 2))}, "at least one sample"),
        ({"A": np.full((3, 2), np.nan)}, "A must be finite"),
        ({"A": [["a", "b"]]}, "A must be .* real numbers"),
        ({"y": np.ones(2)}, "y must have one response for each of the 3 rows of A, found 2"),
        ({"y": np.array([1.0, -1.0, 0.0])}, "y must be nonnegative, found -1"),
        ({"w": np.ones(3)}, "w must have 2 entries"),
        ({"bias": True}, "w must have 3 entries"),
        ({"V": np.zeros(2)}, "V must have one bound"),
        ({"tolerance": 0.0}, "tolerance must lie in"),
        ({"tolerance": math.nan}, "tolerance must be a finite number"),
    ],
)
def test_unusable_input_is_refused(change: dict[str, object], words: str) -> None:
    arguments: dict[str, object] = {"A": np.ones((3, 2)), "y": np.ones(3), "w": np.array([1.0, 0.0])} | change
    with pytest.raises(InvalidInput, match=words):
        is_unique_minimiser(**arguments)  # type: ignore[arg-type]


def test_theorem_3_by_hand() -> None:
    # s = 1, mu = 2, N = 100: 18 * 2 * 4.605170 = 165.786
    assert bounds.samples_for_recovery(100, 1, mu=2.0) == 166
    # mu = 2 states 1 - 1/100
    assert bounds.samples_for_recovery(100, 1, probability=0.99) == 166
    # s = 10, N = 200, probability 0.99: 117 * (5.298317 + 4.605170) = 1158.708
    assert bounds.samples_for_recovery(200, 10, probability=0.99) == 1159
    assert bounds.recovery_probability(100, 1, 166) == pytest.approx(1 - math.exp(math.log(100) - 166 / 18))
    assert bounds.recovery_probability(100, 1, 82) == 0.0  # 82 < 18 log 100 = 82.9: mu <= 1


def test_theorem_3_both_ways_and_monotone() -> None:
    for N, s in ((2, 1), (50, 7), (200, 64), (10_000, 10_000)):
        last = 0
        for p in (1e-9, 0.1, 0.5, 0.9, 0.99, 0.9999):
            P = bounds.samples_for_recovery(N, s, probability=p)
            assert last <= P
            assert bounds.recovery_probability(N, s, P) >= p * (1 - 1e-12)
            assert bounds.recovery_probability(N, s, P - 1) < p
            last = P
    counts = [bounds.samples_for_recovery(200, s, probability=0.99) for s in range(1, 200)]
    assert counts == sorted(counts)


def test_predicted_transition() -> None:
    assert bounds.statistical_dimension(50, 50) == pytest.approx(50.0)  # no zeros: as many equations as unknowns
    values = [bounds.statistical_dimension(200, s) for s in range(1, 201)]
    assert values == sorted(values) and values[0] > 1 and values[-1] <= 200 + 1e-9
    assert bounds.expected_transition(200, 10) == 2 * bounds.statistical_dimension(200, 10)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bounds.samples_for_recovery(200, 10), "exactly one of probability and mu; found neither"),
        (lambda: bounds.samples_for_recovery(200, 10, probability=0.9, mu=2), "found both"),
        (lambda: bounds.samples_for_recovery(200, 10, probability=1.0), "probability must lie strictly"),
        (lambda: bounds.samples_for_recovery(200, 10, probability=math.nan), "probability must be a finite number"),
        (lambda: bounds.samples_for_recovery(200, 10, mu=1.0), "mu must be a number > 1, found 1.0"),
        (lambda: bounds.samples_for_recovery(1, 1, mu=2.0), "N must be at least 2, found 1"),
        (lambda: bounds.samples_for_recovery(200, 0, mu=2.0), "s must be at least 1, found 0"),
        (lambda: bounds.samples_for_recovery(200, 201, mu=2.0), "s must be at most N = 200, found 201"),
        (lambda: bounds.samples_for_recovery(200.0, 3, mu=2.0), "N must be a whole number"),  # type: ignore[arg-type]
        (lambda: bounds.recovery_probability(200, 3, -1), "samples must be at least 0"),
    ],
)
def test_theorem_3_refusals(call: object, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        call()  # type: ignore[operator]


@pytest.mark.parametrize("entries", ["gaussian", "signs"])
def test_bisection_finds_the_only_threshold(entries: experiment.Entries) -> None:
    """Recovery is monotone in the number of samples, and the certificate says the same as the solver at every one of them."""
    for number in range(3):
        trial = experiment.solve_trial(12, 2, number, 0, entries, certify=True)
        w, samples = experiment.samples_of(12, 2, number, 0, entries)
        assert np.count_nonzero(w) == 2
        for P in range(1, trial.threshold + 6):
            A = samples(P)
            y = np.maximum(A @ w, 0.0)
            recovered = bool(np.linalg.norm(experiment.minimiser(A, y) - w) < 1e-6)
            assert recovered == (trial.threshold <= P)
            assert is_unique_minimiser(A, y, w).unique == recovered
        assert trial.certified is not None
        assert (trial.certified.at, trial.certified.before) == (Verdict.UNIQUE.value, Verdict.NOT_MINIMISER.value)


def test_samples_do_not_depend_on_how_they_are_asked_for() -> None:
    _, one = experiment.samples_of(5, 2, 0, 3)
    _, other = experiment.samples_of(5, 2, 0, 3)
    first = one(4).copy()
    assert np.array_equal(one(30)[:4], first) and np.array_equal(other(30), one(30))


def test_experiment_and_resume(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    arguments = {"N": 12, "sparsities": (1, 3), "trials": 4, "sizes": (8, 12), "processes": 1}
    whole = experiment.run(**arguments, out=tmp_path / "a", progress=lambda d, n, _: calls.append((d, n)))  # type: ignore[arg-type]
    assert calls[0] == (0, 12) and calls[-1] == (12, 12)
    assert [(t.inputs, t.sparsity) for t in whole.transitions] == [(8, 1), (12, 1), (12, 3)]
    assert whole.theorem_above and whole.smallest_ratio > 1
    assert (whole.unique, whole.refuted) == (whole.certified, whole.certified) == (12, 12)
    assert all(t.low <= t.half <= t.high <= t.largest for t in whole.transitions)
    for name in whole.files:
        assert (tmp_path / "a" / name).stat().st_size > 100
    assert json.loads((tmp_path / "a" / "recovery.json").read_text())["transitions"][0]["inputs"] == 8

    # Cut off after five trials, in the middle of a line.
    lines = (tmp_path / "a" / "recovery.jsonl").read_text().splitlines()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "recovery.jsonl").write_text("\n".join([*lines[:6], lines[6][:40]]))
    calls.clear()
    resumed = experiment.run(**arguments, out=tmp_path / "b", progress=lambda d, n, _: calls.append((d, n)))  # type: ignore[arg-type]
    assert calls[0] == (5, 12) and len(calls) == 8
    assert resumed.transitions == whole.transitions and resumed.fits == whole.fits
    assert len((tmp_path / "b" / "recovery.jsonl").read_text().splitlines()) == 13

    console = Console(width=140, record=True, file=(tmp_path / "table.txt").open("w"))
    console.print(figures.table(resumed))
    text = console.export_text()
    console.file.close()
    assert "Theorem 3's line is above every trial's threshold" in text and "12 of 12 unique" in text

    with pytest.raises(InvalidInput, match="must belong to a run with"):
        experiment.run(**arguments, out=tmp_path / "b", seed=1)  # type: ignore[arg-type]
    (tmp_path / "b" / "recovery.jsonl").write_text("\n".join([lines[0], "broken", *lines[2:]]))
    with pytest.raises(InvalidInput, match="line 2"):
        experiment.run(**arguments, out=tmp_path / "b")  # type: ignore[arg-type]


@pytest.mark.slow
def test_two_processes_give_the_same(tmp_path: Path) -> None:
    one = experiment.run(12, (2,), 3, sizes=(12,), out=tmp_path / "one", processes=1)
    two = experiment.run(12, (2,), 3, sizes=(12,), out=tmp_path / "two", processes=2)
    assert one.transitions == two.transitions


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"N": 2}, "N must be"),
        ({"trials": 0}, "trials must be"),
        ({"entries": "uniform"}, "entries must be"),
        ({"sparsities": (0,)}, "sparsities must be"),
        ({"sparsities": ()}, "at least one number"),
        ({"sizes": (1,)}, "sizes must be"),
        ({"processes": 0}, "processes must be"),
    ],
)
def test_experiment_refusals(tmp_path: Path, change: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        experiment.run(**({"N": 12} | change), out=tmp_path)  # type: ignore[arg-type]
