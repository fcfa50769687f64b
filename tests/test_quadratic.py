"""The cross-layer solver: enumeration on small problems, proofs that hold, and answers that repeat."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from mpqkern.solve import convexify, prepare, quadratic
from mpqkern.solve.prepare import evaluate
from mpqkern.solve.quadratic import Outcome, minimise

needs_host = pytest.mark.skipif(quadratic._host is None, reason=f"no mpqkern._host: {quadratic.why_no_host}")


@dataclass
class Case:
    unary: np.ndarray
    pairwise: np.ndarray
    rows: np.ndarray
    caps: np.ndarray
    allowed: np.ndarray

    def solve(self, **options: object) -> Outcome:
        return minimise(self.unary, self.pairwise, self.rows, self.caps, self.allowed, **options)

    def fits(self, choice: np.ndarray) -> bool:
        at = np.arange(len(choice))
        within = all(row[at, choice].sum() <= cap for row, cap in zip(self.rows, self.caps, strict=True))
        return within and bool(self.allowed[at, choice].all())

    def enumerate(self) -> tuple[float, np.ndarray | None]:
        best, arg = np.inf, None
        for picks in itertools.product(*(np.flatnonzero(row) for row in self.allowed)):
            choice = np.array(picks)
            if self.fits(choice) and (value := evaluate(self.unary, self.pairwise, choice)) < best:
                best, arg = value, choice
        return best, arg

    def largest(self) -> float:
        return max(np.abs(self.unary).max(), np.abs(self.pairwise).max())

    def scaled(self, factor: float) -> Case:
        return Case(self.unary * factor, self.pairwise * factor, self.rows, self.caps, self.allowed)


def split(matrix: np.ndarray, layers: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """unary and pairwise of 1/2 x'Gx."""
    pairs = matrix.reshape(layers, width, layers, width).copy()
    for layer in range(layers):
        pairs[layer, :, layer] = 0
    return matrix.diagonal().reshape(layers, width) / 2, pairs


def case(seed: int, layers: int, width: int, budgets: int, kind: str = "indefinite") -> Case:
    """Random costs; whole uses, and caps that are the exact use of some choice."""
    rng = np.random.default_rng(seed)
    n = layers * width
    normal = rng.normal(size=(n, n))
    matrix = normal @ normal.T if kind == "psd" else normal + normal.T
    if kind == "spread":  # magnitudes from 1e-12 to 1e6
        size = 10.0 ** rng.integers(-6, 4, n)
        matrix *= np.sqrt(np.outer(size, size)) * 1e-3
    if kind == "equal":
        matrix = np.ones((n, n))
    if kind == "zero":
        matrix = np.zeros((n, n))
    rows = rng.integers(1, 50, (budgets, layers, width))
    picks = rng.integers(0, width, layers)
    caps = rows[:, np.arange(layers), picks].sum(axis=1)
    if seed % 7 == 3 and budgets:
        caps[0] = rows[0].min(axis=1).sum() - (seed % 2)  # just the least use, or one less
    if seed % 4 == 1:
        rows, caps = rows / 8.0, caps / 8.0 + 0.01
    allowed = np.ones((layers, width), dtype=bool)
    if seed % 3 == 2:
        allowed = rng.random((layers, width)) < 0.7
        allowed[np.arange(layers), picks] = True
    if seed % 11 == 5:  # one choice left
        allowed[0] = np.arange(width) == picks[0]
    return Case(*split(matrix, layers, width), rows, caps, allowed)


def check(problem: Case, out: Outcome, best: float, arg: np.ndarray | None, loose: float = 0.0) -> None:
    if arg is None:
        assert out.status == "infeasible" and out.choice is None and out.objective == np.inf
        return
    slack = 1e-9 * abs(best) + 1e-11 * problem.largest()
    assert out.status == "optimal"
    assert problem.fits(out.choice)
    assert out.objective == evaluate(problem.unary, problem.pairwise, out.choice)
    assert out.objective <= best + slack + loose
    assert out.objective - slack - loose <= out.bound <= best + 1e-15 * problem.largest()
    assert all(stage.bound <= best + 1e-11 * problem.largest() for stage in out.log)


KINDS = ("indefinite", "psd", "spread", "equal", "zero")


@needs_host
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budgets", [0, 1, 2, 3])
def test_enumeration_agrees(kind: str, budgets: int) -> None:
    rng = np.random.default_rng(budgets)
    for seed in range(20):
        width = int(rng.integers(2, 5))
        layers = int(rng.integers(1, {2: 8, 3: 7, 4: 6}[width]))
        problem = case(100 * budgets + seed, layers, width, budgets, kind)
        best, arg = problem.enumerate()
        check(problem, problem.solve(), best, arg)


@needs_host
def test_enumeration_agrees_without_local_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """A poor incumbent makes the trees do the work, in every stage and share of convexity."""
    search = quadratic._host.local_search
    monkeypatch.setattr(quadratic, "_host", Shy(quadratic._host, lambda **k: search(**k | {"kicks": 0})))
    for work in (1e9, 0.0):  # 0: on to the reformulated stage at once
        monkeypatch.setattr(quadratic, "FIRST_WORK", work)
        monkeypatch.setattr(quadratic, "SECOND_WORK", work)
        for seed in range(60):
            problem = case(seed, 5, 3, seed % 3, KINDS[seed % 3])
            best, arg = problem.enumerate()
            check(problem, problem.solve(), best, arg)


class Shy:
    """_host with another local search."""

    def __init__(self, host: object, search: object) -> None:
        self.tree, self.local_search = host.tree, search


@needs_host
def test_bounds_of_unfinished_searches_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    host = quadratic._host
    for seed in range(60):
        problem = case(seed, 6, 3, 1 + seed % 2, KINDS[seed % 2])
        best, arg = problem.enumerate()
        if arg is None:
            continue
        task = prepare.Task(problem.unary, problem.pairwise, None, problem.rows, problem.caps, problem.allowed)
        form, _ = prepare.clipped(task.pairwise.reshape(18, 18) / 2 + np.diag(task.unary.ravel()))
        for work in (1, 300, 1000, 3000, 10000):
            result = host.tree(
                **task.arrays(), incumbent=None, form=form, share=0.6, relative=0.0, absolute=0.0, work=work,
                memory=0 if seed % 2 else 2.0**30, seconds=60.0,
            )  # fmt: skip
            assert result["bound"] * task.scale <= best + 1e-11 * problem.largest()
            assert result["value"] * task.scale >= best - 1e-11 * problem.largest()


@needs_host
def test_reformulation_bounds_from_below() -> None:
    for seed in range(25):
        problem = case(seed, 5, 3, seed % 3)
        best, arg = problem.enumerate()
        if arg is None:
            continue
        task = prepare.Task(problem.unary, problem.pairwise, None, problem.rows, problem.caps, problem.allowed)
        args = (task.unary, task.pairwise, task.use, task.rest, task.alive)
        first = convexify.convexify(*args, rounds=0, incumbent=best / task.scale)
        last = convexify.convexify(*args, rounds=12, incumbent=best / task.scale)
        assert first.bound <= last.bound <= best / task.scale + 1e-9
        basis = np.kron(np.eye(5), convexify._differences(3))
        assert np.linalg.eigvalsh(basis.T @ last.form @ basis)[0] > 0
        at = np.arange(5) * 3 + arg  # the same value at every assignment
        linear = task.unary.ravel() - last.form.diagonal()
        assert linear[at].sum() + last.form[np.ix_(at, at)].sum() == pytest.approx(best / task.scale, abs=1e-9)


@needs_host
@pytest.mark.parametrize("layers,width,budgets", [(1, 2, 1), (6, 3, 1), (5, 4, 2), (20, 3, 1), (4, 8, 3)])
def test_nodes_keep_their_identity(layers: int, width: int, budgets: int) -> None:
    """Both sides of the node's identity, after every operation and for random choices."""
    for seed in range(12):
        problem = case(seed, layers, width, budgets)
        task = prepare.Task(problem.unary, problem.pairwise, None, problem.rows, problem.caps, problem.allowed)
        if task.infeasible:
            continue
        n = layers * width
        form, _ = prepare.clipped(task.pairwise.reshape(n, n) / 2 + np.diag(task.unary.ravel()))
        for convex in (None, form):
            error, steepest = quadratic._host.identity_error(
                **task.arrays(), form=convex, share=0.7, rounds=4, seed=seed
            )
            assert error <= 1e-14 * (n + steepest)  # a multiplier's rounding, and that of n sums


@needs_host
def test_scale_of_costs_does_not_matter() -> None:
    for seed in range(10):
        problem = case(seed, 8, 3, 1, KINDS[seed % 2])
        plain = problem.solve()
        for factor in (1e-9, 1e9):
            other = problem.scaled(factor).solve()
            assert other.status == plain.status and np.array_equal(other.choice, plain.choice)


@needs_host
def test_order_of_layers_does_not_matter() -> None:
    for seed in range(10):
        problem = case(seed, 9, 3, 1)
        order = np.random.default_rng(seed).permutation(9)
        moved = Case(
            problem.unary[order],
            problem.pairwise[order][:, :, order],
            problem.rows[:, order],
            problem.caps,
            problem.allowed[order],
        )
        plain, other = problem.solve(), moved.solve()
        assert plain.status == other.status
        if plain.choice is not None:
            assert np.array_equal(plain.choice[order], other.choice)


@needs_host
def test_same_call_same_bits() -> None:
    problem = case(1, 24, 3, 2)
    first, second = problem.solve(), problem.solve()
    assert first.status == "optimal"
    assert np.array_equal(first.choice, second.choice)
    assert (first.objective, first.bound, first.nodes) == (second.objective, second.bound, second.nodes)


@needs_host
@pytest.mark.parametrize("seed", range(3))
def test_highs_agrees(seed: int) -> None:
    problem = case(2 * seed, 10, 3, 1 + seed % 2, "psd")
    ours, theirs = problem.solve(), problem.solve(engine="highs")
    assert ours.status == "optimal"
    assert theirs.objective == pytest.approx(ours.objective, rel=1e-6)
    assert theirs.bound <= ours.objective * (1 + 1e-9)
    assert theirs.bound == pytest.approx(ours.objective, rel=1e-4, abs=1e-5 * problem.largest())


def test_highs_agrees_with_enumeration() -> None:
    for seed in range(24):
        problem = case(seed, 4, 3, seed % 4, KINDS[seed % 2])
        _, arg = problem.enumerate()
        out = problem.scaled(1e-9 if seed % 2 else 1.0).solve(engine="highs")
        if arg is None:
            assert out.status == "infeasible"
            continue
        assert np.array_equal(out.choice, arg)
        assert out.status in ("optimal", "feasible") and problem.fits(out.choice)


def test_without_the_extension_highs_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = case(4, 5, 3, 1)
    monkeypatch.setattr(quadratic, "_host", None)
    assert np.array_equal(problem.solve().choice, problem.enumerate()[1])
    with pytest.raises(RuntimeError, match=r"engine='host' needs the compiled mpqkern\._host"):
        problem.solve(engine="host")
    with pytest.raises(ValueError, match=r"unary has 76 layers; .* at most 75"):
        case(0, 76, 2, 1).solve()


def hard() -> Case:
    """A spin glass: no bound closes it within a minute."""
    return case(4, 60, 3, 1)


@needs_host
def test_time_limit_returns_the_incumbent_and_a_bound() -> None:
    problem = hard()
    began = time.perf_counter()
    out = problem.solve(time_limit=0.6)
    assert time.perf_counter() - began < 5
    assert out.status == "limit" and problem.fits(out.choice)
    assert -np.inf < out.bound < out.objective
    assert out.gap == (out.objective - out.bound) / abs(out.objective)
    assert [stage.bound for stage in out.log] == sorted(stage.bound for stage in out.log)


@needs_host
def test_no_time_at_all_still_gives_a_choice() -> None:
    problem = hard()
    out = problem.solve(time_limit=0)
    assert out.status == "limit" and problem.fits(out.choice)


@needs_host
def test_gap_ends_the_search_early() -> None:
    problem = case(1, 24, 3, 1, "psd")
    loose = problem.solve(rel_gap=0.5)
    assert loose.status == "feasible" and loose.gap <= 0.5 + 1e-9
    assert loose.bound < loose.objective


@contextlib.contextmanager
def ctrl_c(after: float) -> Iterator[None]:
    timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()  # a search that ended early must not take the test run with it


@needs_host
def test_ctrl_c_returns_the_incumbent() -> None:
    problem = hard()
    seen = []

    def note(incumbent: float, bound: float, seconds: float, nodes: int) -> None:
        seen.append((incumbent, bound, seconds, nodes))

    with ctrl_c(after=1.0):
        out = problem.solve(on_progress=note, time_limit=60)
    assert out.status == "interrupted" and out.seconds < 20
    assert problem.fits(out.choice) and out.bound <= out.objective
    assert len(seen) >= 2
    assert all(later[0] <= earlier[0] for earlier, later in itertools.pairwise(seen))
    assert all(later[1] >= earlier[1] for earlier, later in itertools.pairwise(seen))
    assert seen[-1][1] <= out.bound + 1e-9


@needs_host
def test_ctrl_c_works_without_a_callback() -> None:
    problem = hard()
    with ctrl_c(after=0.3):
        out = problem.solve(time_limit=20)
    assert out.status == "interrupted" and out.seconds < 10 and problem.fits(out.choice)


@needs_host
def test_errors_of_the_progress_callback_come_through() -> None:
    def fail(*_: object) -> None:
        raise LookupError("planted")

    with pytest.raises(LookupError, match="planted"):
        hard().solve(on_progress=fail, time_limit=60)


@needs_host
def test_the_lock_is_free_while_searching() -> None:
    """Another thread keeps counting."""
    ticks = []
    stop = threading.Event()

    def count() -> None:
        while not stop.wait(0.005):
            ticks.append(None)

    thread = threading.Thread(target=count)
    thread.start()
    hard().solve(time_limit=0.5)
    stop.set()
    thread.join()
    assert len(ticks) > 20


@needs_host
def test_clip_and_shift_change_the_matrix_as_they_say() -> None:
    for seed in range(10):
        problem = case(4 * seed, 5, 3, 1)
        matrix = problem.pairwise.reshape(15, 15) + np.diag(2 * problem.unary.ravel())
        values, vectors = np.linalg.eigh(matrix)
        expected = {"clip": (vectors * values.clip(0)) @ vectors.T, "shift": matrix + max(-values[0], 0) * np.eye(15)}
        for mode, changed in expected.items():
            other = Case(*split(changed, 5, 3), problem.rows, problem.caps, problem.allowed)
            best, arg = other.enumerate()
            out = problem.solve(psd=mode)
            if arg is None:
                assert out.status == "infeasible"
                continue
            assert out.status == "optimal"
            assert out.objective == pytest.approx(best, rel=1e-9, abs=1e-9 * other.largest())
            assert out.raw_objective == evaluate(problem.unary, problem.pairwise, out.choice)


@needs_host
def test_a_semidefinite_matrix_is_left_alone_by_clip() -> None:
    normal = np.random.default_rng(0).normal(size=(12, 12))
    unary, pairwise = split(np.eye(12) * 100 + (normal + normal.T), 4, 3)
    problem = Case(unary, pairwise, np.zeros((0, 4, 3)), np.zeros(0), np.ones((4, 3), dtype=bool))
    plain, clipped = problem.solve(), problem.solve(psd="clip")
    assert np.array_equal(plain.choice, clipped.choice)
    assert clipped.objective == pytest.approx(plain.objective, rel=1e-12)


@needs_host
def test_infinite_costs_of_forbidden_choices_do_no_harm() -> None:
    problem = case(4, 5, 3, 1)
    problem.allowed[2, 1] = False
    _, arg = problem.enumerate()
    problem.unary[2, 1] = np.inf
    problem.pairwise[2, 1] = problem.pairwise[:, :, 2, 1] = np.nan
    problem.pairwise[2, 1, 2] = 0
    assert np.array_equal(problem.solve().choice, arg)


@needs_host
def test_start_is_used_and_repaired() -> None:
    problem = case(4, 12, 3, 1)
    best = problem.solve()
    assert problem.solve(start=best.choice, time_limit=0).objective == best.objective
    heavy = problem.rows[0].argmax(axis=1)
    assert np.array_equal(problem.solve(start=heavy).choice, best.choice)


@needs_host
def test_uses_beyond_float64_stay_exact() -> None:
    """Caps of 2**60 that differ by one."""
    rows = np.array([[[0, 2**59], [0, 2**59 + 1]]])
    unary = np.array([[1.0, 0.0], [1.0, 0.0]])
    for cap, value in ((2**60 + 1, 0.0), (2**60, 1.0)):
        if cap == 2**60 + 1:
            assert minimise(unary, None, rows, np.array([cap])).objective == value
        else:
            with pytest.raises(ValueError, match=r"caps\[0\] leaves .* wanted less than 2\*\*53"):
                minimise(unary, None, rows, np.array([cap]))
    even = rows // 2**30 * 2**30
    assert minimise(unary, None, even, np.array([2**60 - 1])).objective == 1.0


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(unary=np.zeros(3)), r"unary\.shape=\(3,\); wanted \(L, B\)"),
        (dict(pairwise=np.zeros((2, 3, 2, 2))), r"pairwise\.shape=\(2, 3, 2, 2\); wanted \(2, 3, 2, 3\)"),
        (dict(pairwise=np.arange(36.0).reshape(2, 3, 2, 3)), "pairwise='off symmetry by .*; wanted a symmetric array"),
        (dict(unary=np.full((2, 3), np.nan)), "unary holds nan; wanted finite"),
        (dict(rows=np.zeros((2, 2, 3))), r"rows\.shape=\(2, 2, 3\); wanted \(1, 2, 3\)"),
        (dict(caps=np.array([np.nan])), "caps has dtype float64 or holds a NaN"),
        (dict(rows=np.full((1, 2, 3), np.inf)), "rows hold an infinity"),
        (dict(allowed=np.array([[True] * 3, [False] * 3])), r"allowed\[1\] has no choice"),
        (dict(psd="project"), "psd='project'; wanted"),
        (dict(engine="gurobi"), "engine='gurobi'; wanted"),
        (dict(start=[0, 3]), r"start=\[0, 3\]; wanted 2 choices from 0 to 2"),
        (dict(rel_gap=-1), "rel_gap=-1; wanted"),
        (dict(time_limit=-1), "time_limit=-1; wanted"),
    ],
)
def test_errors_name_the_argument(change: dict[str, object], message: str) -> None:
    given = dict(unary=np.zeros((2, 3)), pairwise=np.zeros((2, 3, 2, 3)), rows=np.ones((1, 2, 3)), caps=np.array([2.0]))
    with pytest.raises(ValueError, match=message):
        minimise(**given | change)


@needs_host
def test_module_refuses_wrong_shapes() -> None:
    task = prepare.Task(*[getattr(case(0, 3, 2, 1), k) for k in ("unary", "pairwise")], None, *[
        getattr(case(0, 3, 2, 1), k) for k in ("rows", "caps", "allowed")])  # fmt: skip
    good = dict(**task.arrays(), incumbent=None, form=None, share=0.0, relative=0.0, absolute=0.0, work=1e9, memory=1e9,
                seconds=9.0)  # fmt: skip
    assert quadratic._host.tree(**good)["finished"]
    for change in (
        dict(pairwise=np.zeros((3, 2))),
        dict(use=np.zeros((2, 3, 2))),
        dict(allowed=np.zeros((3, 2), np.uint8)),
        dict(form=np.zeros((5, 5))),
        dict(incumbent=[0, 0, 2]),
        dict(incumbent=[0, 0]),
        dict(unary=np.zeros((3, 65))),
    ):
        with pytest.raises(ValueError, match="wanted"):
            quadratic._host.tree(**good | change)
