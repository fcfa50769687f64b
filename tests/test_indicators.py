"""Learned steps as costs: the paper's objective, steps that are out of order, layers that have none."""

from __future__ import annotations

import itertools
import math

import pytest

from mpqkern import Budget, Layer, Scheme, solve
from mpqkern.scores.indicators import from_indicators, monotone

SIZES = {"a": (16, 9), "b": (40, 4), "c": (8, 30)}  # parameters, multiply-adds
LAYERS = [Layer(name, "linear", (4, 4), *sizes) for name, sizes in SIZES.items()]
W = {"a": {2: 0.5, 4: 0.1, 8: 0.01}, "b": {2: 0.3, 4: 0.2, 8: 0.01}, "c": {2: 0.9, 4: 0.15, 8: 0.02}}
A = {"a": {4: 0.4, 8: 0.1}, "b": {4: 0.3, 8: 0.05}, "c": {4: 0.7, 8: 0.2}}


def test_costs_are_the_papers_and_solve_to_its_integer_program() -> None:
    found = from_indicators(LAYERS, W, A, alpha=3.0)
    assert found.schemes == [Scheme(w, act_bits=a) for w in (2, 4, 8) for a in (4, 8)]
    best = math.inf
    for choice in itertools.product(found.schemes, repeat=3):
        pairs = list(zip(LAYERS, choice, strict=True))
        bops = sum(la.macs * s.bits * s.act_bits for la, s in pairs)
        size = sum(la.params * s.bits for la, s in pairs)
        if bops <= 43 * 24 and size <= 64 * 4:
            best = min(best, sum(A[la.name][s.act_bits] + 3 * W[la.name][s.bits] for la, s in pairs))
    got = solve(found, Budget(gbops=43 * 24e-9), Budget(avg_bits=4))
    assert got.status == "optimal" and got.objective == pytest.approx(best)


def test_weights_alone_and_float_as_a_choice() -> None:
    found = from_indicators(LAYERS, W, alpha=2.0, schemes=[None, Scheme(2), Scheme(8)])
    assert found.unary[0].tolist() == pytest.approx([0.0, 1.0, 0.02])
    assert found.provenance["indicators"]["a"] == {"w": {"8": 0.01, "4": 0.1, "2": 0.5}, "a": {}}


def test_a_narrower_width_is_never_cheaper() -> None:
    steps = {
        name: dict(zip((8, 4, 2), s, strict=True))
        for name, s in zip("abcd", [(1.0, 2.0, 4.0), (1.0, 0.5, 0.9), (1.0, 3.0, 2.0), (2.0, 4.0, 6.0)], strict=True)
    }
    found, changed = monotone(steps)
    # in the median layer the steps of 4 bits are 2 times those of 8, and those of 2 bits 1.65 times those of 4
    assert changed == [("b", 4), ("b", 2), ("c", 2)]
    assert found["b"] == pytest.approx({8: 1.0, 4: 2.0, 2: 3.3})
    assert found["c"] == pytest.approx({8: 1.0, 4: 3.0, 2: 4.95})
    assert found["a"] == steps["a"] and found["d"] == steps["d"]
    found, changed = monotone(steps, "forbid")
    assert found["b"] == {8: 1.0, 4: 1e8, 2: 1e8} and found["c"] == {8: 1.0, 4: 3.0, 2: 1e8} and len(changed) == 3


def test_repaired_by_a_median_below_one_it_costs_the_same() -> None:
    found, _ = monotone({"a": {8: 1.0, 4: 0.5}})
    assert found["a"] == {8: 1.0, 4: 1.0}


@pytest.mark.parametrize("wired", ["repair", "forbid"])
def test_a_wired_width_is_not_taken_for_its_small_step(wired: str) -> None:
    scores = from_indicators(LAYERS, {**W, "b": {2: 0.3, 4: 0.005, 8: 0.01}}, wired=wired)
    assert scores.provenance["wired"] == [["b", "w", 4]]
    # in the median layer the steps of 4 bits are 7.5 times those of 8
    assert scores.unary[1, 1] == pytest.approx(2 * {"repair": 0.01 * 7.5, "forbid": 1e8}[wired])


def test_layers_without_steps_are_narrowed_last() -> None:
    found = from_indicators(LAYERS, {name: W[name] for name in "ac"}, schemes=[Scheme(2), Scheme(8), Scheme(4)])
    assert found.provenance["without_steps"] == ["b"]
    assert found.unary[1].tolist() == pytest.approx([2.8, 0.0, 2.8])
    got = solve(found, Budget(limit=40 * 8 + 24 * 2, rows=[[la.params * b for b in (2, 8, 4)] for la in LAYERS]))
    assert got.bits == {"a": 2, "b": 8, "c": 2}


def test_what_is_given_is_checked() -> None:
    for step in (math.nan, math.inf, 0.0):
        with pytest.raises(ValueError, match=rf"w\['a'\]\[2\]={step}; wanted a step above 0"):
            from_indicators(LAYERS, {"a": {2: step}})
    with pytest.raises(ValueError, match=r"a\['b'\] has the widths \[4\]; wanted the same for all layers"):
        from_indicators(LAYERS, W, {"a": {2: 1.0}, "b": {4: 1.0}})
    with pytest.raises(ValueError, match="layer 'a' has no step for w3: 3 is missing"):
        from_indicators(LAYERS, W, schemes=[Scheme(3)])
    with pytest.raises(ValueError, match="layer 'a' has no step for w2a3: 3 is missing"):
        from_indicators(LAYERS, W, A, schemes=[Scheme(2, act_bits=3)])
    with pytest.raises(ValueError, match="alpha=-1; wanted 0 or more"):
        from_indicators(LAYERS, W, alpha=-1)
    with pytest.raises(ValueError, match="wired='keep'; wanted 'repair' or 'forbid'"):
        from_indicators(LAYERS, W, wired="keep")
