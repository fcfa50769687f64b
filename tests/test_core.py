"""The exact end of the linear solver: whole numbers decide what fits, what is cheapest, and what comes first."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from mpqkern.solve import core, highs, linear

compiled = pytest.mark.skipif(core._host is None, reason="mpqkern._host is not built")


def every(cost, rows, caps):
    """The cheapest of all choices that fit, of equals the first in lexicographic order; None: nothing fits."""
    layers, width = cost.shape
    choices = np.array(list(itertools.product(range(width), repeat=layers)))
    at = np.arange(layers)
    fits = (rows[:, at, choices].sum(axis=2) <= caps[:, None]).all(axis=0)
    value = np.where(fits, cost[at, choices].sum(axis=1), np.inf)
    best = int(value.argmin())
    return (value[best], tuple(choices[best])) if fits.any() else None


def everywhere(cost):
    return np.ones(cost.shape, dtype=bool)


def assert_agrees(cost, rows, caps, monkeypatch):
    """Our answer, without HiGHS, to what HiGHS answers by itself at the same cost."""
    reduced = linear.reduce(cost, rows, caps, everywhere(cost))
    arguments = reduced.cost, reduced.use, everywhere(cost), reduced.rest
    choice, _, status = highs.integer(*arguments, value=1.0, time_limit=None, rel_gap=0.0)
    assert status == "optimal"
    with monkeypatch.context() as patch:
        patch.setattr(highs, "integer", None)
        got = linear.minimise(cost, rows, caps, everywhere(cost))
    assert got.objective == pytest.approx(cost[np.arange(len(cost)), choice].sum(), rel=1e-9)
    assert got.status == "optimal" and (rows[:, np.arange(len(cost)), got.choice].sum(axis=1) <= caps).all()
    return got


def opposed(rng, layers, width, budgets, top):
    """Rows of which the last takes what the others leave, so that caps can pin down their sums."""
    rows = rng.integers(0, top, (budgets, layers, width))
    rows[-1] = rows[:-1].sum(axis=0).max() - rows[:-1].sum(axis=0)
    return rows


@compiled
@pytest.mark.parametrize("top", [10, 10**6, 10**12, 10**15])
@pytest.mark.parametrize("budgets", [2, 3])
def test_caps_met_exactly_or_missed_by_one(budgets: int, top: int) -> None:
    rng = np.random.default_rng(budgets * top)
    fitting = missed = 0
    for trial in range(40):
        layers = int(rng.integers(2, 8))
        rows = opposed(rng, layers, 3, budgets, top) if trial % 2 else rng.integers(0, top, (budgets, layers, 3))
        caps = rows[:, np.arange(layers), rng.integers(0, 3, layers)].sum(axis=1)
        caps[rng.integers(budgets)] -= trial // 2 % 2
        cost = rng.random((layers, 3))
        wanted, got = every(cost, rows, caps), linear.minimise(cost, rows, caps, everywhere(cost))
        some = linear.any_fit(rows, caps, everywhere(cost))
        assert (got is None) == (some is None) == (wanted is None)
        if wanted is None:
            missed += 1
            continue
        fitting += 1
        assert tuple(got.choice) == wanted[1] and got.status == "optimal"
        assert (rows[:, np.arange(layers), some].sum(axis=1) <= caps).all()
    assert fitting >= 20 and missed >= 8


@compiled
def test_sums_that_are_no_multiple_of_the_common_divisor_do_not_fit() -> None:
    rng = np.random.default_rng(1)
    rows = 2 * opposed(rng, 40, 3, 2, 10**9)
    caps = rows[:, np.arange(40), rng.integers(0, 3, 40)].sum(axis=1) + np.array([1, -1])
    cost = rng.random((40, 3))
    assert linear.minimise(cost, rows, caps, everywhere(cost), time_limit=2) is None


@compiled
def test_without_the_compiled_search_none_is_still_a_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "_host", None)
    rows = np.array([[[0, 10**12]] * 3, [[10**12, 0]] * 3])
    cost = np.array([[1.0, 2.0]] * 3)
    assert linear.minimise(cost, rows, np.array([10**12, 10**12]), everywhere(cost)) is None
    for short in (1, 5 * 10**5):  # HiGHS takes the first for a fit, and not the second, by as little
        with pytest.raises(TimeoutError, match="found neither an assignment nor a proof"):
            linear.minimise(cost, rows, np.array([10**12, 2 * 10**12 - short]), everywhere(cost))


@compiled
@pytest.mark.parametrize("budgets", [1, 2, 3])
def test_of_equals_the_first(budgets: int) -> None:
    rng = np.random.default_rng(budgets)
    for trial in range(50):
        layers = int(rng.integers(4, 9))
        cost = rng.integers(0, 4, (layers, 3)).astype(float)
        rows = rng.integers(0, (6, 1000)[trial % 2], (budgets, layers, 3))
        if trial % 3 == 0:  # all layers alike
            cost, rows = np.tile(cost[:1], (layers, 1)), np.tile(rows[:, :1], (1, layers, 1))
        caps = (rows.min(axis=2).sum(axis=1) * 0.6 + rows.max(axis=2).sum(axis=1) * 0.4).astype(np.int64)
        wanted, got = every(cost, rows, caps), linear.minimise(cost, rows, caps, everywhere(cost))
        assert (wanted is None) == (got is None)
        assert got is None or (got.objective, tuple(got.choice)) == wanted


@compiled
@pytest.mark.parametrize("budgets", [1, 2])
def test_a_hundred_layers_alike(budgets: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only how many layers take each choice matters, so that all answers can be tried; the first is in order."""
    monkeypatch.setattr(highs, "integer", None)
    first = np.array(list(itertools.combinations(range(103), 3)))  # three bars among a hundred stars
    mixes = np.diff(first, axis=1, prepend=-1, append=103) - 1
    for seed in range(8):
        rng = np.random.default_rng(seed)
        one, use = rng.random(4), rng.integers(0, 10**6, (budgets, 4))
        caps = (50 * (use.min(axis=1) + use.mean(axis=1))).astype(np.int64)
        fits = (mixes @ use.T <= caps).all(axis=1)
        wanted = mixes[np.where(fits, mixes @ one, np.inf).argmin()] if fits.any() else None
        cost = np.tile(one, (100, 1))
        got = linear.minimise(cost, np.tile(use[:, None], (1, 100, 1)), caps, everywhere(cost))
        assert (got is None) == (wanted is None)
        assert got is None or got.choice.tolist() == np.repeat(np.arange(4), wanted).tolist()


@compiled
def test_few_kinds_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many mixes of choices spend the same; of these only the cheapest matters."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 4, 40)
    cost, rows = rng.random((40, 1)) * 4.0 ** -np.array([2, 3, 4, 8]), rng.integers(0, 10**6, (2, 4, 4))[:, kinds]
    caps = (rows.min(axis=2).sum(axis=1) * 0.5 + rows.mean(axis=2).sum(axis=1) * 0.5).astype(np.int64)
    assert_agrees(cost, rows, caps, monkeypatch)


@compiled
@pytest.mark.parametrize("layers", [30, 50])
@pytest.mark.parametrize("budgets", [2, 3])
def test_agrees_with_highs_on_the_whole_problem(layers: int, budgets: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(layers + budgets)
    for tight in (1.2, 1.6, 2.5):
        cost = rng.lognormal(0, 1, (layers, 1)) * 4.0 ** -np.array([2, 3, 4, 8]) * (1 + 0.2 * rng.random((layers, 4)))
        rows = rng.integers(10**4, 10**7, (budgets, layers, 1)) * [2, 3, 4, 8]
        caps = (rows.min(axis=2).sum(axis=1) * tight).astype(np.int64)
        assert_agrees(cost, rows, caps, monkeypatch)


@compiled
@pytest.mark.parametrize("work", [0, 1e4, 3e4])
def test_too_much_work_is_left_to_highs(work: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    cost, rows = rng.random((30, 4)), rng.integers(1, 10**6, (3, 30, 4))
    caps = (rows.min(axis=2).sum(axis=1) * 1.9).astype(np.int64)
    best = linear.minimise(cost, rows, caps, everywhere(cost))
    asked = []
    monkeypatch.setattr(highs, "integer", lambda *a, _f=highs.integer, **k: asked.append(1) or _f(*a, **k))
    monkeypatch.setattr(core, "WORK", work)
    got = linear.minimise(cost, rows, caps, everywhere(cost))
    assert asked and got.status == "optimal" and got.objective == pytest.approx(best.objective, rel=1e-12)


@compiled
def test_one_relaxation_does_not_outlast_the_work_allowed() -> None:
    rng = np.random.default_rng(0)
    cost, use = rng.integers(0, 10**9, (4000, 6)), rng.integers(0, 10**6, (3, 4000, 6))
    problem = core.Core(cost, use, use.sum(axis=(1, 2)) // 12, np.ones((4000, 6), dtype=bool))
    start = time.process_time()
    assert not core.cheapest(problem, None, time_limit=0.01).done
    assert time.process_time() - start < 0.3


@compiled
def test_little_time_allows_little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    spent = []

    class Counter:
        @staticmethod
        def cheapest(work: float, **problem: object) -> dict:
            spent.append(work)
            return {"choice": [], "done": False, "first": False}

    monkeypatch.setattr(core, "_host", Counter)
    one = np.zeros((1, 1, 1), dtype=np.int64)
    problem = core.Core(one[0], one, one[0, 0], np.ones((1, 1), dtype=bool))
    for limit in (None, 60.0, 0.01, 0.0):
        core.cheapest(problem, None, time_limit=limit)
    assert spent == [core.WORK, core.WORK, 8e6, 0.0]


@compiled
def test_too_many_equals_leave_the_proof_but_not_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(highs, "integer", None)
    monkeypatch.setattr(core, "WORK", 1e6)
    rng = np.random.default_rng(4)
    cost, rows = np.full((60, 4), 3.0), rng.integers(1, 10**6, (2, 60, 4))
    caps = (rows.mean(axis=2).sum(axis=1) * 0.8).astype(np.int64)
    got = linear.minimise(cost, rows, caps, everywhere(cost))
    assert got.status == "optimal" and got.objective == got.bound == 180.0


@compiled
def test_no_budget_of_a_sweep_is_slow() -> None:
    rng = np.random.default_rng(10)
    params, macs = (np.exp(rng.normal(12, 1.5, (100, 1))).astype(np.int64) for _ in range(2))
    bits = np.array([2, 3, 4, 8])
    cost = np.exp(rng.normal(0, 1, (100, 1))) * params * 4.0**-bits * np.exp(0.2 * rng.normal(size=(100, 4)))
    rows = np.stack([params * bits, macs * bits * 8, np.round(params**0.5).astype(np.int64) * bits])
    for average, budgets in itertools.product((2.3, 4.0, 7.5), (1, 2, 3)):
        caps = (rows[:budgets, :, 0].sum(axis=1) * average / 2).astype(np.int64)
        seconds = []
        for _ in range(2):
            start = time.process_time()
            got = linear.minimise(cost, rows[:budgets], caps, everywhere(cost))
            seconds.append(time.process_time() - start)
        assert got.status == "optimal" and min(seconds) < 0.05


@compiled
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use": np.zeros((2, 3, 2), np.int64)}, "use has shape .*; wanted \\[K, U, B\\]"),
        ({"allowed": np.zeros((3, 2), bool)}, "no choice for unit 0; wanted one or more"),
        ({"known": [0, 1]}, "known has 2 entries; wanted none or 3"),
        ({"known": [0, 1, 2]}, "known holds 2; wanted choices below 2"),
    ],
)
def test_the_binding_names_what_is_wrong(change: dict, message: str) -> None:
    arguments = {
        "cost": np.zeros((3, 2), np.int64),
        "use": np.zeros((1, 3, 2), np.int64),
        "rest": np.zeros(1, np.int64),
    }
    arguments |= {"allowed": np.ones((3, 2), bool), "known": [], "any": False, "work": 1e6} | change
    with pytest.raises(ValueError, match=message):
        core._host.cheapest(**arguments)
