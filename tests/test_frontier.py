"""The frontier: supported points from one sweep, others on request, each one the optimum for what it spends."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest

from mpqkern.scheme import Layer, Scheme
from mpqkern.solve import Budget, Frontier, Infeasible, Scores, frontier, solve
from tests.reference.interrupt import interruptible


def make(seed: int, layers: int = 6) -> Scores:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(10, 500, layers)
    units = [Layer(f"l{i}", "linear", (int(n), 1), int(n), int(n) * 3) for i, n in enumerate(sizes)]
    unary = rng.lognormal(0, 1, (layers, 1)) * [1.0, 0.25, 0.08, 0.0] * (1 + 0.2 * rng.random((layers, 4)))
    return Scores(units, [Scheme(b) for b in (2, 3, 4, 8)], unary)


@pytest.mark.parametrize("seed", range(5))
def test_every_supported_point_is_what_solve_finds(seed: int) -> None:
    scores = make(seed)
    front = frontier(scores, "avg_bits")
    assert front.use == sorted(front.use) and front.objective == sorted(front.objective, reverse=True)
    assert front.use[0] == 2.0 and len(front) > 6
    for point, use in zip(front, front.use, strict=True):
        exact = solve(scores, Budget(limit=_bits(scores, use), rows=_rows(scores)))
        assert point.objective == pytest.approx(exact.objective, rel=1e-12)
        assert point.bound == point.objective and point.status == "optimal" and point.costs["avg_bits"] == use


def _rows(scores: Scores) -> np.ndarray:
    return np.outer([layer.params for layer in scores.layers], scores.bits)


def _bits(scores: Scores, average: float) -> int:
    return round(average * sum(layer.params for layer in scores.layers))


def test_points_on_request_are_exact_between_the_supported_ones() -> None:
    scores = make(7)
    wanted = [2.5, 3.0, 3.3, 5.0]
    front = frontier(scores, "avg_bits", at=wanted)
    exact = [solve(scores, Budget(avg_bits=a)) for a in wanted]
    assert front.objective == pytest.approx([a.objective for a in exact])
    assert [p.schemes for p in front] == [a.schemes for a in exact]
    swept = frontier(scores, "avg_bits")
    best = [min(o for u, o in zip(swept.use, swept.objective, strict=True) if u <= a) for a in wanted]
    assert all(f <= b for f, b in zip(front.objective, best, strict=True)) and front.objective != best


def test_constraints_hold_at_every_point() -> None:
    scores = make(3)
    for point in frontier(scores, "avg_bits", pins={"l0": 8}, forbid={"l1": 2}, ties=[["l2", "l3"]]):
        assert point.bits["l0"] == 8 and point.bits["l1"] != 2 and point.bits["l2"] == point.bits["l3"]
    limited = frontier(scores, "avg_bits", at_most={8: 2}, points=9)
    assert all(list(p.bits.values()).count(8) <= 2 for p in limited) and limited.use == sorted(set(limited.use))
    with pytest.raises(Infeasible, match="these clash: pins"):
        frontier(scores, "avg_bits", pins={"l0": 8}, forbid={"l0": 8})


def test_knee_is_farthest_from_the_chord() -> None:
    layers = [Layer(f"l{i}", "linear", (100, 1), 100) for i in range(3)]
    scores = Scores(layers, [2, 4], [[10.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    front = frontier(scores, "avg_bits")
    assert front.objective == [12.0, 2.0, 1.0, 0.0] and front.knee == 1
    assert front[front.knee].bits == {"l0": 4, "l1": 2, "l2": 2}
    assert frontier(scores, "bytes", count="nominal", pins={"*": 2}).knee == 0


def test_other_kinds() -> None:
    scores = make(1)
    times = np.random.default_rng(0).random((6, 4))
    fast = frontier(scores, "ms", table=times)
    assert fast.use[0] == pytest.approx(times.min(axis=1).sum(), abs=1e-8)
    assert frontier(scores, "gbops").use[0] == pytest.approx(sum(la.macs * 2 * 32 for la in scores.layers) / 1e9)
    assert frontier(scores, "limit", rows=_rows(scores)).use[0] == 2 * sum(la.params for la in scores.layers)
    with pytest.raises(ValueError, match="kind='size'; wanted one of avg_bits"):
        frontier(scores, "size")


def test_a_thousand_layers_in_one_sweep() -> None:
    front = frontier(make(0, layers=1000), "avg_bits")
    assert len(front) > 1500
    assert front[len(front) // 2].gap == 0.0


def test_pairwise_scores_are_swept_budget_by_budget() -> None:
    scores = make(2, layers=4)
    half = np.random.default_rng(0).standard_normal((4, 4, 4, 4)) * 0.1
    for layer in range(4):
        half[layer, :, layer, :] = 0
    scores = Scores(scores.layers, scores.schemes, scores.unary, half + half.transpose(2, 3, 0, 1))
    front = frontier(scores, "avg_bits", points=5)
    assert 2 <= len(front) <= 5 and front.use == sorted(set(front.use)) and front.use[0] == 2.0
    for point, value, bound in zip(front, front.objective, front.bound, strict=True):
        choice = [scores.schemes.index(s) for s in point.schemes.values()]
        assert value == pytest.approx(scores.cost(choice)) and bound <= value + 1e-12


def coupled(scores: Scores) -> Scores:
    pairwise = np.zeros((3, 2, 3, 2))
    pairwise[0, 1, 1, 1] = pairwise[1, 1, 0, 1] = -3.0
    return Scores(scores.layers, scores.schemes, scores.unary, pairwise)


THREE = Scores([Layer(c, "linear", (1, 32), 32) for c in "abc"], [2, 4], [[1, 0.1]] * 3)


@pytest.mark.parametrize("options", [{"psd": "clip"}, {"psd": "shift"}, {"objective": "minimax"}])
def test_items_are_what_solve_said(options: dict) -> None:
    scores = coupled(THREE) if "psd" in options else THREE
    used = solve(scores, Budget(bytes=60), **options)
    front = frontier(scores, "bytes", at=[60], **options)
    item = front[0]
    assert (item.objective, item.bound, item.status) == (used.objective, used.bound, used.status)
    assert front.objective == [used.objective] and item.prices == used.prices and item.costs == used.costs
    assert used.objective != scores.cost([scores.schemes.index(s) for s in used.schemes.values()])


def test_minimax_has_points_of_its_own() -> None:
    scores = make(4)
    front = frontier(scores, "avg_bits", objective="minimax", points=6)
    assert 2 < len(front) <= 6 and front.objective == sorted(front.objective, reverse=True)
    for point in front:
        choice = [scores.schemes.index(s) for s in point.schemes.values()]
        assert point.objective == scores.unary[range(6), choice].max()


@pytest.mark.parametrize("answers", [True, False])  # whether the search that is interrupted has one
def test_ctrl_c_leaves_the_points_found_so_far(answers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def interrupted(*args: object, **options: object) -> object:
        calls.append(args)
        if len(calls) == 3 and not answers:
            os.kill(os.getpid(), signal.SIGINT)
        answer = solve(*args, **options)
        return replace(answer, status="interrupted") if len(calls) == 3 else answer

    limits = [2.5, 3.5, 5, 7]
    whole = frontier(make(1), "avg_bits", at=limits)
    monkeypatch.setattr(sys.modules["mpqkern.solve.frontier"], "solve", interrupted)
    with interruptible():
        cut = frontier(make(1), "avg_bits", at=limits)
    assert len(calls) == 3 and (whole.status, cut.status) == ("complete", "interrupted")
    assert cut.use == whole.use[: len(cut)] and len(cut) == 2 + answers < len(whole)
    assert [point.status for point in cut] == ["optimal"] * 2 + ["interrupted"] * answers


def test_limits_of_any_sign_and_size() -> None:
    scores = Scores(THREE.layers, [2, 4], [[1, 0]] * 3)
    rows = np.array([[-1, 0], [0, 0], [0, 1]])
    front = frontier(scores, "limit", rows=rows, at=[-1, 0, 1, 1e300])
    assert (front.use, front.objective) == ([-1.0, 0.0, 1.0], [2.0, 1.0, 0.0])
    assert [p.status for p in front[1:]] == ["optimal"] * 2 and front[-1].costs == {"limit": 1}
    with pytest.raises(Infeasible, match=r"no assignment fits limit=-2 \(alone it needs at least -1\)"):
        frontier(scores, "limit", rows=rows, at=[1, -2])
    with pytest.raises(Infeasible, match=r"avg_bits=1.5 \(alone it needs at least 2 bits\)") as caught:
        frontier(THREE, "avg_bits", at=[1.5, 3])
    assert caught.value.conflict == ["avg_bits=1.5"] and caught.value.least == {"avg_bits": 2.0}
    assert frontier(THREE, "avg_bits", at_most={2: 0}, points=3).use == [4.0]  # nothing fits the limits below


@pytest.mark.parametrize("options", [{}, {"at": [700, 900], "at_most": {2: 3}}])
def test_a_file_of_it_has_the_same_points(options: dict) -> None:
    front = frontier(make(1), "bytes", count="nominal", **options)
    found = Frontier.from_json(front.to_json())
    assert (found.kind, found.use, found.objective, found.bound) == ("bytes", front.use, front.objective, front.bound)
    assert found.to_json() == front.to_json() and found.use_of({"l0": Scheme(2)}) is None
    assert [found.use_of(point.schemes) for point in front] == [front.use_of(p.schemes) for p in front] == front.use
    assert found.knee == front.knee and len(found) == len(front) > 1
    for point, before in zip(found, front, strict=True):
        assert dict(point.schemes) == dict(before.schemes) and point.gap == before.gap
        assert (point.costs, point.prices, point.status) == (before.costs, before.prices, before.status)


def test_a_file_that_is_no_frontier() -> None:
    text = frontier(THREE, "bytes", count="nominal").to_json()
    for bad in ("", "[]", "{}", text.replace('"choice": [0', '"choice": [7'), text[:-5]):
        with pytest.raises(ValueError, match=r"^text=.* is no frontier .*wanted what to_json wrote"):
            Frontier.from_json(bad)
    with pytest.raises(ValueError, match="version 7; wanted 'mpqkern-frontier' version 1"):
        Frontier.from_json(text.replace('"version": 1', '"version": 7'))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": []}, r"at=\[\]; wanted a list of one or more"),
        ({"at": 3000}, "at=3000; wanted a list"),
        ({"at": "300"}, "at='300'; wanted a list"),
        ({"at": [60, float("nan")]}, "nan.*; wanted a list of one or more finite"),
        ({"at": [float("inf")]}, "inf.*; wanted a list of one or more finite"),
        ({"points": 0}, "points=0; wanted a whole number"),
        ({"points": 2.5}, "points=2.5; wanted a whole number"),
        ({"kind": "ms"}, "kind='ms'; wanted table= beside it"),
        ({"kind": "limit"}, "kind='limit'; wanted rows= beside it"),
        ({"table": [[1, 2]] * 3}, "kind='bytes'; wanted kind='ms' with table="),
        ({"time_limit": 5}, "time_limit=5 is for searches"),
        ({"objective": "max"}, "objective='max'; wanted 'sum' or 'minimax'"),
    ],
)
def test_errors_name_argument_value_and_wish(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frontier(THREE, **options)
