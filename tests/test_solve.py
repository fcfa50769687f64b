"""solve: equal to trying everything, never over budget, and clear about what cannot be."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from mpqkern.solve import Budget, Infeasible, Scores, core, highs, linear, solve
from tests.reference.networks import units


def cheapest(cost, rows, caps, allowed):
    """Every choice there is, in lexicographic order; of equals the first."""
    best = None
    layers = np.arange(len(cost))
    for x in itertools.product(*[np.flatnonzero(line) for line in allowed]):
        if (rows[:, layers, x].sum(axis=1) <= caps).all():
            value = cost[layers, x].sum()
            if best is None or value < best[0]:
                best = value, x
    return best


COSTS = {
    "random": lambda r, s: r.random(s),
    "falling": lambda r, s: r.random((s[0], 1)) * 4.0 ** -np.arange(s[1]),
    "few values": lambda r, s: r.integers(0, 3, s).astype(float),
    "all equal": lambda r, s: np.full(s, 7.0),
    "zeros": lambda r, s: np.zeros(s),
    "1e-12 next to 1e6": lambda r, s: 10.0 ** r.choice([-12, -11, 6], s),
    "1e-9 and negative": lambda r, s: 1e-9 * r.standard_normal(s),
    "1e300": lambda r, s: 1e300 * r.random(s),
    "1e-310": lambda r, s: 1e-310 * r.random(s),
}


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("kind", COSTS)
def test_equals_brute_force(kind: str) -> None:
    rng = np.random.default_rng(sorted(COSTS).index(kind))
    feasible = 0
    for trial in range(60):
        size = int(rng.integers(1, 6)), int(rng.integers(1, 5))
        cost = COSTS[kind](rng, size)
        rows = rng.integers(-1, (3, 100, 10**12)[trial % 3], (int(rng.integers(0, 4)), *size))
        part = rng.random(len(rows))
        caps = (rows.min(axis=2).sum(axis=1) * (1 - part) + rows.max(axis=2).sum(axis=1) * part).astype(np.int64)
        allowed = rng.random(size) < 0.9
        wanted, got = cheapest(cost, rows, caps, allowed), linear.minimise(cost, rows, caps, allowed)
        if wanted is None:
            assert got is None
            assert linear.any_fit(rows, caps, allowed) is None
            continue
        feasible += 1
        assert linear.any_fit(rows, caps, allowed) is not None
        assert (rows[:, np.arange(size[0]), got.choice].sum(axis=1) <= caps).all()
        assert got.status == "optimal" and got.bound == got.objective
        assert got.objective == pytest.approx(wanted[0], rel=1e-13, abs=0)
        if kind in ("few values", "all equal", "zeros"):
            assert tuple(got.choice) == wanted[1]
    assert feasible >= 30


def test_of_equals_the_first_in_order_of_layers_and_choices() -> None:
    rng = np.random.default_rng(8)
    for trial in range(60):
        cost = rng.integers(1, 4, (6, 3)).astype(float)
        rows = rng.integers(0, 4, (1 + trial % 2, 6, 3))
        caps, allowed = rows.min(axis=2).sum(axis=1) + 3, np.ones((6, 3), dtype=bool)
        wanted, got = cheapest(cost, rows, caps, allowed), linear.minimise(cost, rows, caps, allowed)
        assert (wanted is None) == (got is None)
        assert got is None or tuple(got.choice) == wanted[1]


def test_highs_on_the_core_equals_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "WORK", 0)
    rng = np.random.default_rng(5)
    asked = []
    monkeypatch.setattr(highs, "integer", lambda *a, _f=highs.integer, **k: asked.append(1) or _f(*a, **k))
    for _ in range(40):
        cost = rng.random((6, 3)) * 1e-9
        rows = rng.integers(1, 50, (2, 6, 3))
        caps = rows.mean(axis=2).sum(axis=1).astype(np.int64)
        wanted = cheapest(cost, rows, caps, np.ones((6, 3), dtype=bool))
        got = linear.minimise(cost, rows, caps, np.ones((6, 3), dtype=bool))
        assert (wanted is None) == (got is None)
        assert got is None or got.objective == pytest.approx(wanted[0], rel=1e-9)
    assert asked


def test_a_bound_holds_when_a_gap_or_no_time_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    cost, rows = rng.random((40, 4)), rng.integers(1, 10**6, (2, 40, 4))
    caps, allowed = (rows.min(axis=2).sum(axis=1) * 1.7).astype(np.int64), np.ones((40, 4), dtype=bool)
    best = linear.minimise(cost, rows, caps, allowed)
    loose = linear.minimise(cost, rows, caps, allowed, rel_gap=0.5)
    assert loose.status == "feasible" and loose.bound <= best.objective <= loose.objective
    monkeypatch.setattr(core, "WORK", 0)
    monkeypatch.setattr(highs, "integer", lambda *a, **k: (None, 0.0, "limit"))
    cut = linear.minimise(cost, rows, caps, allowed, time_limit=1e-3)
    assert cut.status == "limit" and cut.bound <= best.objective <= cut.objective


@pytest.mark.parametrize("seed", range(5))
def test_without_time_for_the_linear_program_an_answer_and_a_bound_remain(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(seed)
    cost, rows = rng.random((40, 4)), np.sort(rng.integers(1, 10**6, (2, 40, 4)), axis=2)
    rows[1, 0, 3] = 2**60  # more than a share can count
    caps, allowed = (rows.min(axis=2).sum(axis=1) * 1.7).astype(np.int64), np.ones((40, 4), dtype=bool)
    reduced = linear.reduce(cost, rows, caps, allowed)
    best, least = linear.minimise(cost, rows, caps, allowed), reduced.cost[:, 0].sum() + reduced.offset
    with pytest.raises(TimeoutError, match="no time for the linear program"):
        highs.lp(reduced.cost, reduced.use, allowed, reduced.rest, time_limit=0.0)
    monkeypatch.setattr(core, "WORK", 0)
    monkeypatch.setattr(highs, "integer", lambda *a, **k: (None, 0.0, "limit"))
    cut = linear.minimise(cost, rows, caps, allowed, time_limit=1e-9)
    used = rows[:, np.arange(40), cut.choice].sum(axis=1)
    assert cut.status == "limit" and (used <= caps).all() and cut.objective < least
    assert reduced.offset < cut.bound <= best.objective <= cut.objective


def test_ctrl_c_in_the_linear_program_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(1, 100, (2, 12, 3))
    monkeypatch.setattr(highs, "run", lambda *a: True)
    with pytest.raises(KeyboardInterrupt):
        linear.minimise(rng.random((12, 3)), rows, rows.min(axis=2).sum(axis=1) * 3 // 2, np.ones((12, 3), dtype=bool))


def test_scale_and_order_do_not_matter() -> None:
    rng = np.random.default_rng(3)
    layers = units(rng.integers(1000, 10**6, 30).tolist())
    unary = rng.random((30, 1)) * 4.0 ** -np.array([2, 3, 4, 8]) * (1 + rng.random((30, 4)))
    order = rng.permutation(30)
    budget = Budget(avg_bits=3.7)
    first = solve(Scores(layers, [2, 3, 4, 8], unary), budget)
    assert first.schemes == solve(Scores(layers, [2, 3, 4, 8], unary * 1e-9), budget).schemes
    turned = solve(Scores([layers[i] for i in order], [2, 3, 4, 8], unary[order]), budget)
    assert turned.bits == first.bits
    assert solve(Scores(layers, [2, 3, 4, 8], unary), budget).schemes == first.schemes


def test_hundred_layers_within_the_time_bar() -> None:
    rng = np.random.default_rng(1)
    cost = rng.lognormal(0, 2, (100, 1)) * 4.0 ** -np.array([2, 3, 4, 8])
    sizes, macs = rng.integers(5000, 3 * 10**6, (2, 100, 1))
    rows = np.stack([sizes * [2, 3, 4, 8], macs * [2, 3, 4, 8], rng.integers(10**6, 10**8, (100, 1)) * [2, 4, 5, 8]])
    caps = (rows.min(axis=2).sum(axis=1) * 1.9).astype(np.int64)
    for budgets in (1, 2, 3):
        seconds = []
        for _ in range(3):
            start = time.process_time()
            got = linear.minimise(cost, rows[:budgets], caps[:budgets], np.ones((100, 4), dtype=bool))
            seconds.append(time.process_time() - start)
        assert got.status == "optimal" and min(seconds) < 0.05


def test_minimax_equals_brute_force() -> None:
    rng = np.random.default_rng(2)
    for _ in range(40):
        unary = rng.integers(0, 9, (4, 3)) / 8
        scores = Scores(units([3, 5, 7, 11]), [2, 4, 8], unary)
        got = solve(scores, Budget(avg_bits=4.5), objective="minimax")
        rows = np.outer([3, 5, 7, 11], [2, 4, 8])
        worst = min(
            (max(unary[range(4), x]), sum(unary[range(4), x]))
            for x in itertools.product(range(3), repeat=4)
            if rows[range(4), x].sum() <= 4.5 * 26
        )
        assert (got.objective, scores.cost([[2, 4, 8].index(b) for b in got.bits.values()])) == worst


def test_minimax_with_ties_is_about_single_layers() -> None:
    scores = Scores(units([32, 32, 32]), [2, 4], [[4, 5], [4, 0], [0, 0]])
    got = solve(scores, ties=[["unit0", "unit1"]], objective="minimax")
    assert got.bits == {"unit0": 2, "unit1": 2, "unit2": 2} and got.objective == got.bound == 4.0
    assert solve(scores, ties=[["unit0", "unit1"]]).bits["unit0"] == 4  # by the sum it is the other one


def test_constraints_equal_brute_force() -> None:
    rng = np.random.default_rng(4)
    for _ in range(60):
        unary = rng.random((5, 3))
        scores = Scores(units([3, 5, 7, 11, 13]), [2, 4, 8], unary)
        demands = {"ties": [["unit[34]"], ["unit1", "unit3"]], "pins": {"unit0": 8}, "forbid": {"unit2": [2]}}
        got = solve(scores, Budget(avg_bits=5.5), **demands, at_most={8: 2})
        wanted = min(
            (unary[range(5), x].sum(), x)
            for x in itertools.product(range(3), repeat=5)
            if x[1] == x[3] == x[4] and x[0] == 2 and x[2] != 0 and x.count(2) <= 2
            if np.outer([3, 5, 7, 11, 13], [2, 4, 8])[range(5), x].sum() <= 5.5 * 39
        )
        assert got.objective == pytest.approx(wanted[0]) and list(got.bits.values()) == [
            (2, 4, 8)[b] for b in wanted[1]
        ]


def test_first_last_gives_way_to_a_pin_by_name_only() -> None:
    scores = Scores(units([5, 5, 5]), [2, 8], [[0, 1]] * 3)
    assert solve(scores, first_last=8).bits == {"unit0": 8, "unit1": 2, "unit2": 8}
    assert solve(scores, first_last=8, pins={"unit2": 2, "*": 2}).bits == {"unit0": 8, "unit1": 2, "unit2": 2}


def test_pairwise_costs_and_ties_equal_brute_force() -> None:
    rng = np.random.default_rng(6)
    for _ in range(20):
        scores = Scores(units([3, 5, 7, 11]), [2, 4, 8], rng.random((4, 3)), _symmetric(rng, 4, 3))
        got = solve(scores, Budget(avg_bits=4.5), ties=[["unit1", "unit2"]])
        wanted = min(
            scores.unary[range(4), x].sum() + _pairs(scores.pairwise, x) / 2
            for x in itertools.product(range(3), repeat=4)
            if x[1] == x[2] and np.outer([3, 5, 7, 11], [2, 4, 8])[range(4), x].sum() <= 4.5 * 26
        )
        assert got.objective == pytest.approx(wanted, abs=1e-9) and got.status == "optimal"
        assert got.bits["unit1"] == got.bits["unit2"] and got.costs["avg_bits"] <= 4.5
        again = solve(scores, Budget(avg_bits=4.5), pins=dict(got.schemes))  # the objective without any search
        assert again.objective == pytest.approx(wanted, abs=1e-9)
    with pytest.raises(Infeasible, match="at least 2 bits"):
        solve(scores, Budget(avg_bits=1.9))
    with pytest.raises(ValueError, match="with pairwise scores; wanted 'sum'"):
        solve(scores, objective="minimax")


def _symmetric(rng, layers, width):
    half = rng.standard_normal((layers, width, layers, width))
    full = half + half.transpose(2, 3, 0, 1)
    for layer in range(layers):
        full[layer, :, layer, :] = 0
    return full


def _pairs(pairwise, x):
    return sum(pairwise[i, x[i], j, x[j]] for i in range(len(x)) for j in range(len(x)))


# --- what cannot be ---


def test_infeasible_says_the_minimum_and_the_conflict() -> None:
    scores = Scores(units([100, 300]), [2, 4, 8], np.zeros((2, 3)))
    with pytest.raises(Infeasible, match=r"avg_bits=3.*at least 5 bits") as caught:
        solve(scores, Budget(avg_bits=3), Budget(gbops=1), pins={"unit0": 8}, forbid={"Conv2d": 2})
    assert caught.value.least["avg_bits"] == 5.0
    assert caught.value.conflict == ["Budget(avg_bits=3)", "forbid['Conv2d']=2"]
    with pytest.raises(Infeasible) as caught:
        solve(scores, Budget(avg_bits=8), pins={"unit0": 8}, ties=[["unit?"]], forbid={"unit1": 8}, at_most={4: 2})
    assert caught.value.conflict == ["pins['unit0']=8", "forbid['unit1']=8", "ties=['unit?']"]
    assert caught.value.least["avg_bits"] is None


def test_budgets_that_only_clash_together() -> None:
    scores = Scores(units([10, 10]), [2, 8], np.zeros((2, 2)))
    rows = [[8, 2], [8, 2]]
    clash = Budget(limit=10, rows=rows, name="first"), Budget(avg_bits=2)
    assert solve(scores, clash[1]).status == solve(scores, clash[0]).status == "optimal"
    with pytest.raises(Infeasible) as caught:
        solve(scores, *clash, at_most={8: 2})
    assert len(caught.value.conflict) == 2 and "at_most" not in str(caught.value.conflict)


def test_a_budget_exactly_at_the_minimum_fits() -> None:
    scores = Scores(units([3, 10**9]), [2, 8], [[1, 0], [1, 0]])
    least = 2 * (3 + 10**9)
    row = [[6, 24], [2 * 10**9, 8 * 10**9]]
    assert solve(scores, Budget(limit=least, rows=row)).slack == {"limit": 0}
    with pytest.raises(Infeasible):
        solve(scores, Budget(limit=least - 1, rows=row))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: solve(s, pins={"unit7": 2}), "pattern='unit7' matches no layer; did you mean 'unit1', 'unit0'"),
        (lambda s: solve(s, pins={"unit0": 3}), "pins: 3 was not scored; wanted one of w2, w4, float"),
        (lambda s: solve(s, at_most={2: -1}), "at_most\\[2\\]=-1; wanted a whole number"),
        (lambda s: solve(s, ties=["unit0"]), "wanted a list of lists"),
        (lambda s: solve(s, 4.0), "budget=4.0; wanted a Budget"),
        (lambda s: solve(s, objective="max"), "objective='max'; wanted 'sum' or 'minimax'"),
        (lambda s: solve(s, rounding="floor"), "wanted relaxation='lp' beside it"),
        (lambda s: solve(s, ties=5), "ties=5; wanted a list of lists"),
        (lambda s: solve(s, ties=[5]), "ties=\\[5\\]; wanted a list of lists"),
        (lambda s: solve(s, seed=-1), "seed=-1; wanted a whole number from 0"),
        (lambda s: solve(s, seed="x"), "seed='x'; wanted a whole number from 0"),
        (lambda s: solve(s, rel_gap=-1), "rel_gap=-1; wanted 0 or more"),
        (lambda s: solve(s, rel_gap=float("inf")), "rel_gap=inf; wanted 0 or more, and finite"),
        (lambda s: solve(s, psd="x"), "psd='x'; wanted one of none, clip, shift"),
        (lambda s: solve(s, on_progress=5), "on_progress=5; wanted a function, or None"),
        (lambda s: solve(s, time_limit=0), "time_limit=0; wanted seconds above 0"),
        (lambda s: solve([1]), "scores=\\[1\\]; wanted Scores"),
    ],
)
def test_errors_name_argument_value_and_wish(call, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call(Scores(units([1, 2]), [2, 4, None], np.zeros((2, 3))))


def test_silent_unless_verbose(capfd: pytest.CaptureFixture) -> None:
    rng = np.random.default_rng(0)
    scores = Scores(units([5] * 12), [2, 4, 8], rng.random((12, 3)))
    second = Budget(limit=30, rows=rng.integers(0, 6, (12, 3)))
    solve(scores, Budget(avg_bits=4), second)
    assert capfd.readouterr() == ("", "")
    solve(scores, Budget(avg_bits=4), second, verbose=True)
    assert "HiGHS" in capfd.readouterr().out
