"""Searches that take long: their time limit, Ctrl-C, news of their progress, several at once."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import time

import numpy as np
import pytest

from mpqkern.solve import Budget, Infeasible, Scores, core, linear, solve
from tests.reference.interrupt import ctrl_c, interruptible
from tests.reference.networks import units


def test_progress_is_told_in_the_objective_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "WORK", 0)
    rng, seen = np.random.default_rng(0), []
    rows, allowed = rng.integers(1, 10**6, (2, 150, 4)), np.ones((150, 4), dtype=bool)
    caps = (rows.min(axis=2).sum(axis=1) * 1.6).astype(np.int64)
    cost = 5.0 + rng.random((150, 4))
    got = linear.minimise(cost, rows, caps, allowed, on_progress=lambda *news: seen.append(news))
    assert seen and all(bound <= got.objective * (1 + 1e-9) for _, bound, _, _ in seen)
    assert all(objective >= got.objective * (1 - 1e-9) for objective, _, _, _ in seen)


def hard():
    """Eight budgets that HiGHS takes seconds to prove anything about."""
    rng = np.random.default_rng(0)
    rows = np.sort(rng.integers(1, 1000, (8, 100, 4)), axis=2)
    caps = (rows.mean(axis=(1, 2)) * 80).astype(np.int64)
    return -np.sort(rng.random((100, 4)), axis=1), rows, caps, np.ones((100, 4), dtype=bool)


def market(pairwise: bool):
    """Sums that must be met exactly: feasible by no easy reason, infeasible by no easy proof."""
    rng = np.random.default_rng(5)
    rows = np.zeros((5, 40, 2), dtype=np.int64)
    rows[:, :, 1] = rng.integers(0, 100, (5, 40))
    half = rows.sum(axis=(1, 2)) // 2
    scores = Scores(units([15] * 40), [2, 4], rng.random((40, 2)), np.zeros((40, 2, 40, 2)) if pairwise else None)
    signed = [(sign, k) for sign in (1, -1) for k in range(5)]
    return scores, [Budget(limit=sign * int(half[k]), rows=sign * rows[k]) for sign, k in signed]


@pytest.mark.parametrize(("pairwise", "objective"), [(False, "sum"), (False, "minimax"), (True, "sum")])
def test_time_that_is_up_is_the_time_that_was_given(pairwise: bool, objective: str) -> None:
    scores, budgets = market(pairwise)
    start = time.process_time()
    with pytest.raises(TimeoutError, match=r"time_limit=0\.2: found neither an assignment nor a proof"):
        solve(scores, *budgets, time_limit=0.2, objective=objective)
    assert time.process_time() - start < 2


def test_a_known_clash_is_explained_within_the_time() -> None:
    scores, budgets = market(False)
    start = time.process_time()
    with pytest.raises(Infeasible, match="these clash: Budget") as caught:
        solve(scores, Budget(avg_bits=1), *budgets, time_limit=0.2)
    assert "Budget(avg_bits=1)" in caught.value.conflict and time.process_time() - start < 3


def test_ctrl_c_returns_the_best_so_far(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(core, "WORK", 0)
    cost, rows, caps, allowed = hard()
    pressed = []

    def press(objective: float, *_: object) -> None:
        if objective < np.inf and not pressed:
            pressed.append(os.kill(os.getpid(), signal.SIGINT))

    with interruptible():
        got = linear.minimise(cost, rows, caps, allowed, on_progress=press, time_limit=20)
    assert got.status == "interrupted" and got.bound < got.objective
    assert (rows[:, np.arange(100), got.choice].sum(axis=1) <= caps).all()
    scores, budgets = market(False)
    with ctrl_c(after=0.3), pytest.raises(KeyboardInterrupt):  # nothing was found by then
        solve(scores, *budgets, time_limit=20)
    assert capfd.readouterr() == ("", "")


def test_several_threads_may_solve_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "WORK", 0)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: linear.minimise(*hard(), time_limit=0.3).status, range(3)))
    assert found == ["limit"] * 3


def test_errors_of_the_progress_callback_come_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "WORK", 0)

    def fail(*news: float) -> None:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        linear.minimise(*hard(), on_progress=fail)
