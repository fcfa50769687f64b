"""Calls of the cross-layer solver: equal ones repeat, limits and Ctrl-C hold, and what is wrong is named."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time

import numpy as np
import pytest

from mpqkern.solve import prepare, quadratic
from mpqkern.solve.prepare import evaluate
from mpqkern.solve.quadratic import minimise
from tests.reference.crosslayer import KINDS, Case, Shy, case, hard, needs_host
from tests.reference.interrupt import ctrl_c, interruptible


@needs_host
def test_scale_of_costs_does_not_matter() -> None:
    for seed in range(10):
        problem = case(seed, 8, 3, 1, KINDS[seed % 2])
        plain = problem.solve()
        for factor in (1e-18, 1e-9, 1e12):
            other = problem.scaled(factor).solve()
            assert other.status == plain.status and np.array_equal(other.choice, plain.choice)
        for factor in (2.0**-60, 2.0**40):  # costs with the same digits: the same search, step by step
            other = problem.scaled(factor).solve()
            assert (other.nodes, other.bound) == (plain.nodes, plain.bound * factor)


@needs_host
def test_order_of_layers_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quadratic, "_host", Shy(kicks=5))  # leaves work to the trees
    for seed in range(10):
        problem = case(seed, 16, 3, 1, KINDS[seed % 2])
        order = np.random.default_rng(seed).permutation(16)
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
def test_same_call_same_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages that end without a proof show every difference on the way; the seed is the only thing that makes one."""
    stub = Shy(kicks=100, work=2e5)
    monkeypatch.setattr(quadratic, "_host", stub)

    def trace(**options: object) -> list:
        stub.calls.clear()
        out = case(4, 30, 3, 1).solve(**options)
        stages = [(s.name, s.nodes, s.objective, s.bound) for s in out.log]
        return [[(k.get("work"), k.get("share")) for k in stub.calls], stages, out.choice.tolist()]

    first = trace()
    assert [len(part) for part in first] == [4, 5, 30]  # a local search and three trees
    assert trace() == first and trace(seed=1) != first


def test_without_the_extension_highs_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = case(4, 5, 3, 1)
    monkeypatch.setattr(quadratic, "_host", None)
    assert np.array_equal(problem.solve().choice, problem.enumerate()[1])
    with pytest.raises(RuntimeError, match=r"engine='host' needs the compiled mpqkern\._host"):
        problem.solve(engine="host")
    with pytest.raises(ValueError, match=r"unary has 76 layers; .* at most 75"):
        case(0, 76, 2, 1).solve()


@needs_host
def test_time_limit_returns_the_incumbent_and_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, stub = hard(), Shy(kicks=3000)
    monkeypatch.setattr(quadratic, "_host", stub)
    began = time.perf_counter()
    out = problem.solve(time_limit=0.6)
    assert time.perf_counter() - began < 5
    left = [call["seconds"] for call in stub.calls]
    assert len(left) > 1 and left[0] <= 0.6 and left == sorted(left, reverse=True)
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
    rounding = 1e-12 * abs(out.objective)  # of a value kept up to date over many moves
    assert all(later[0] <= earlier[0] + rounding for earlier, later in itertools.pairwise(seen))
    assert all(later[1] >= earlier[1] for earlier, later in itertools.pairwise(seen))
    assert seen[-1][1] <= out.bound + 1e-9


@needs_host
def test_ctrl_c_works_without_a_callback() -> None:
    problem = hard()
    with ctrl_c(after=0.3):
        out = problem.solve(time_limit=20)
    assert out.status == "interrupted" and out.seconds < 10 and problem.fits(out.choice)


@needs_host
def test_ctrl_c_ends_the_local_search_too() -> None:
    problem, calls = hard(), []

    def press(*_: object) -> None:
        if not calls:
            calls.append(os.kill(os.getpid(), signal.SIGINT))

    with interruptible():
        out = problem.solve(on_progress=press, time_limit=60)
    assert out.status == "interrupted" and [stage.name for stage in out.log] == ["local search"]
    assert problem.fits(out.choice) and out.bound == -np.inf


@needs_host
def test_progress_never_falls_back_between_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quadratic, "_host", Shy(kicks=100, work=2e5))
    seen: list[tuple] = []
    out = case(4, 30, 3, 1).scaled(1e-3).solve(on_progress=lambda *news: seen.append(news))
    values, bounds, seconds, nodes = map(list, zip(*seen, strict=True))
    values = [round(value, 12) for value in values]  # kept up to date over many moves, so off in the last bits
    assert len(seen) >= 4 and values == sorted(values, reverse=True) and bounds == sorted(bounds)
    assert seconds == sorted(seconds) and nodes == sorted(nodes) and nodes[-1] > nodes[1] > 0
    assert values[-1] == pytest.approx(out.objective, rel=1e-12) and -np.inf < bounds[-1] <= out.bound


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
def test_start_is_used_and_repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = case(4, 40, 3, 1)
    good = problem.solve(time_limit=0.5).choice
    value = evaluate(problem.unary, problem.pairwise, good)
    monkeypatch.setattr(quadratic, "_host", Shy(kicks=0))
    assert problem.solve(time_limit=0).objective > value  # so that what follows comes from the start
    assert problem.solve(start=good, time_limit=0).objective == value
    heavy = problem.solve(start=problem.rows[0].argmax(axis=1), time_limit=0)
    assert problem.fits(heavy.choice)
    problem.allowed[0, good[0]] = False
    near = problem.solve(start=good, time_limit=0)
    assert problem.fits(near.choice) and near.objective < problem.solve(time_limit=0).objective


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
        (dict(seed=-1), "seed=-1; wanted a whole number from 0"),
        (dict(seed="x"), "seed='x'; wanted a whole number from 0"),
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
