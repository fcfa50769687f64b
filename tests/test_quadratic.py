"""The cross-layer solver finds what enumeration finds, and its proofs hold."""

from __future__ import annotations

import threading

import highspy
import numpy as np
import pytest

from mpqkern.solve import convexify, prepare, quadratic
from mpqkern.solve.prepare import evaluate
from mpqkern.solve.quadratic import Outcome, minimise
from tests.reference.crosslayer import KINDS, Case, Shy, case, needs_host, split


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
    monkeypatch.setattr(quadratic, "_host", Shy(kicks=0))
    for work in (1e9, 0.0):  # 0: on to the reformulated stage at once
        monkeypatch.setattr(quadratic, "FIRST_WORK", work)
        monkeypatch.setattr(quadratic, "SECOND_WORK", work)
        for seed in range(60):
            problem = case(seed, 5, 3, seed % 3, KINDS[seed % 3])
            best, arg = problem.enumerate()
            check(problem, problem.solve(), best, arg)


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


@pytest.mark.parametrize("only", [False, True])
@pytest.mark.parametrize("budgets", [0, 1, 2])
def test_relaxation_of_a_form_that_is_convex_on_shares_alone(budgets: int, only: bool) -> None:
    layers, width = 5, 3
    ones = np.kron(np.eye(layers), np.ones((width, 1)))
    basis = np.kron(np.eye(layers), convexify._differences(width))
    for seed in range(10):
        rng = np.random.default_rng(seed)
        inner = rng.standard_normal((layers * (width - 1), layers * (width - 1)))
        across = ones @ rng.standard_normal((layers, layers * width))
        form = basis @ (inner @ inner.T / 10 + 1e-4 * np.eye(len(inner))) @ basis.T + across + across.T
        assert np.linalg.eigvalsh(form)[0] < -1
        linear, use = rng.random((layers, width)), rng.random((budgets, layers, width))
        allowed = np.ones((layers, width), dtype=bool)
        allowed[0, 1:] = not only
        found = convexify.relax(form, linear, use, use[:, :, 0].sum(axis=1), allowed)
        assert found is not None
        bound, shares = found
        x = shares.ravel()
        assert bound == pytest.approx(x @ form @ x + linear.ravel() @ x, abs=1e-5)
        assert all(np.all(part[~kept] == 0) for part, kept in zip(shares, allowed, strict=True))
        assert bound <= form[::width, ::width].sum() + linear[:, 0].sum()  # the first choices fit


@needs_host
def test_reformulation_beside_another_highs_of_the_same_thread() -> None:
    """HiGHS keeps, for each thread, the number of threads of its first run, and refuses any other."""
    found = []

    def work() -> None:
        other = highspy.Highs()
        other.silent()
        other.setOptionValue("threads", 2)
        other.maximize(other.addVariable(0, 1))
        assert other.getModelStatus() == highspy.HighsModelStatus.kOptimal
        problem = case(1, 5, 3, 1)
        task = prepare.Task(problem.unary, problem.pairwise, None, problem.rows, problem.caps, problem.allowed)
        args = (task.unary, task.pairwise, task.use, task.rest, task.alive)
        found.append(convexify.convexify(*args, rounds=0, incumbent=1.0))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(found) == 1 and found[0] is not None


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
