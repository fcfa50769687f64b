"""assign: every method keeps to what was asked; searches, controls, and answers judged by other scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpqkern as mq
from mpqkern import Budget, Scheme
from mpqkern.assign import SEARCHES
from mpqkern.scores.entry import METHODS


def net(depth: int = 5) -> nn.Module:
    torch.manual_seed(3)
    inside = [layer for _ in range(depth - 2) for layer in (nn.Linear(24, 24), nn.ReLU())]
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), *inside, nn.Linear(24, 6))
    model[-1].weight.data *= 30  # sure of its answers
    return model.eval().requires_grad_(False)


def batch() -> tuple[Tensor, Tensor]:
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(4))
    return x, net()(x).argmax(1)


NAMES = ["0", "2", "4", "6", "8"]
OPTIONS = {"greedy": {}, "uniform": {}, "random": {}, "reversed": {"of": "single"}, "single": {}, "roundoff": {}}


@pytest.mark.parametrize("method", OPTIONS)
def test_budgets_and_constraints_hold(method: str) -> None:
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    how = {"pins": {"0": 8}, "forbid": {"8": 2}, "ties": [["2", "4"]], "method": method, **OPTIONS[method]}
    for bits in (3.2, 3.7, 4.4, 5.9, 8.0):
        answer = mq.assign(model, batch(), Budget(avg_bits=bits), Budget(bytes=2200), **how)
        assert answer.costs["avg_bits"] <= bits and answer.costs["bytes"] <= 2200
        assert answer.bits["0"] == 8 and answer.bits["8"] > 2 and answer.bits["2"] == answer.bits["4"]
        assert answer.path is None or answer.path.assigned(-1) == answer.schemes  # tied layers were tried as tied
        mq.swap_(net(), answer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", OPTIONS)
def test_the_impossible_is_said_before_anything_is_measured(method: str) -> None:
    calls = []

    def loss(output: Tensor, labelled: tuple) -> Tensor:
        calls.append(1)
        return F.cross_entropy(output, labelled[1], reduction="none")

    with pytest.raises(mq.Infeasible, match=r"these clash: .*avg_bits=2\.5") as error:
        mq.assign(net(), batch(), Budget(avg_bits=2.5), pins={"*": 4}, method=method, loss=loss, **OPTIONS[method])
    assert error.value.least == {"avg_bits": 4} and not calls


def test_greedy_follows_its_path_until_the_budgets_hold() -> None:
    model = net()
    for mode in ("stagewise", "joint", "static"):
        answer = mq.assign(model, batch(), Budget(avg_bits=4.5), method="greedy", mode=mode)
        path, params = answer.path, [layer.params for layer in mq.catalog(model)]
        sizes = [
            sum(n * path.schemes[b].bits for n, b in zip(params, s.choice, strict=True)) / sum(params) for s in path
        ]
        assert all(size > 4.5 for size in sizes[:-1]) and sizes[-1] == pytest.approx(answer.costs["avg_bits"])
        assert [s.size for s in path] == pytest.approx([size / 4.5 for size in sizes])  # shares of the budget
        assert path.assigned(-1) == dict(answer.schemes) and answer.objective == path[-1].value
        assert (answer.status, answer.bound, answer.gap, answer.prices) == ("heuristic", None, None, {})
        assert "heuristic: objective" in str(answer) and "avg_bits: " in str(answer)
        again = mq.Assignment.from_json(answer.to_json())
        assert again == answer and again.status == "heuristic"


def test_greedy_goes_where_budgets_that_do_not_shrink_with_the_width_leave_a_way() -> None:
    """Here 2 bits are slow in half of the layers, and at most two layers may have 4: a blind search would be stuck."""
    slow = np.array([[9.0, 2.0, 3.0]] * 3 + [[1.0, 2.0, 3.0]] * 2)  # 2, 4, 8 bits
    for mode in ("stagewise", "joint", "static"):
        for limit in (11.0, 13.0):
            answer = mq.assign(
                net(), batch(), Budget(limit=limit, rows=slow), at_most={4: 2}, method="greedy", mode=mode
            )
            assert answer.costs["limit"] <= limit and sum(b == 4 for b in answer.bits.values()) <= 2
            assert all(answer.bits[name] != 2 for name in NAMES[:3])


def test_greedy_with_a_drop() -> None:
    model, how = net(), {"method": "greedy", "bits": (2, 4, 8)}
    assert set(mq.assign(model, batch(), **how).bits.values()) == {8}  # nothing asks for less
    loose = mq.assign(model, batch(), drop=1e9, **how)
    assert set(loose.bits.values()) == {2}
    clean = float(F.cross_entropy(model(batch()[0]).double(), batch()[1]))
    some = mq.assign(model, batch(), drop=0.02, **how)
    assert some.objective <= clean + 0.02 and set(some.bits.values()) not in ({2}, {8})
    assert (
        mq.assign(model, batch(), Budget(avg_bits=6), drop=1e9, **how).bits
        == mq.assign(model, batch(), Budget(avg_bits=6), **how).bits
    )
    with pytest.raises(ValueError, match=r"drop=0\.02 was passed before the budgets held"):
        mq.assign(model, batch(), Budget(avg_bits=2), drop=0.02, **how)


def test_a_bank_serves_other_budgets_modes_and_runs_that_were_stopped(tmp_path) -> None:
    model, how = net(), {"method": "greedy", "bank": tmp_path}
    with pytest.raises(mq.Unfinished):
        mq.assign(model, batch(), Budget(avg_bits=3), max_evals=9, **how)
    first = mq.assign(model, batch(), Budget(avg_bits=3), **how)
    count = len(list(tmp_path.rglob("*.npz")))
    tight = mq.assign(model, batch(), Budget(avg_bits=2.5), **how)
    assert tight.path.steps[: len(first.path)] != first.path.steps  # other sizes: shares of another budget
    assert [s.choice for s in tight.path][: len(first.path)] == [s.choice for s in first.path]
    more = len(list(tmp_path.rglob("*.npz")))
    assert count < more
    assert mq.assign(model, batch(), Budget(avg_bits=2.5), lazy=True, **how).path.steps[0] == tight.path.steps[0]
    assert len(list(tmp_path.rglob("*.npz"))) == more  # a lazy search asks for nothing new
    fresh = mq.assign(model, batch(), Budget(avg_bits=3), method="greedy")
    assert fresh.path == first.path and fresh.schemes == first.schemes


def test_uniform_is_the_widest_that_fits() -> None:
    model, how = net(), {"method": "uniform", "bits": (2, 3, 4, 5, 8)}
    for bits in (2, 2.9, 3, 4.999, 5, 7, 8, 32):
        width = max(b for b in (2, 3, 4, 5, 8) if b <= bits)
        answer = mq.assign(model, batch(), Budget(avg_bits=bits), **how)
        assert set(answer.bits.values()) == {width} and answer.objective is None and answer.status == "heuristic"
    answer = mq.assign(model, batch(), Budget(avg_bits=5), pins={"0": 8}, forbid={"2": (2, 4)}, **how)
    assert answer.bits == {"0": 8, "2": 3, "4": 4, "6": 4, "8": 4}  # the next narrower where 4 is not allowed
    answer = mq.assign(model, batch(), Budget(avg_bits=4), forbid={"2": (2, 3, 4)}, **how)
    assert answer.bits == {"0": 3, "2": 5, "4": 3, "6": 3, "8": 3}  # and the next wider where there is none
    wide = [Scheme(4, act_bits=8), Scheme(4)]
    assert mq.assign(model, batch(), Budget(avg_bits=4), method="uniform", bits=wide).schemes["0"] == Scheme(4)
    with pytest.raises(ValueError, match="no single scheme fits, though a mixture does"):
        mq.assign(model, batch(), at_most={2: 2, 4: 2, 8: 2}, method="uniform", bits=(2, 4, 8))


def test_random_is_feasible_seeded_and_spends_the_budget() -> None:
    model, found, spent = net(), [], []
    for seed in range(100):
        answer = mq.assign(model, batch(), Budget(avg_bits=4.5), pins={"8": 8}, method="random", seed=seed)
        assert answer.costs["avg_bits"] <= 4.5 and answer.bits["8"] == 8 and answer.objective is None
        found.append(tuple(answer.bits.values()))
        spent.append(answer.costs["avg_bits"])
    assert len(set(found)) > 10 and np.mean(spent) > 4
    again = mq.assign(model, batch(), Budget(avg_bits=4.5), pins={"8": 8}, method="random", seed=7)
    assert tuple(again.bits.values()) == found[7]
    assert all(len({bits[i] for bits in found}) == 3 for i in range(4))


def test_reversed_gives_bits_to_the_wrong_layers() -> None:
    model = net()
    scores = mq.score(model, batch(), method="single")
    best = mq.solve(scores, Budget(avg_bits=4.5))
    worst = mq.assign(model, batch(), Budget(avg_bits=4.5), method="reversed", of="single")
    assert worst.objective == scores.cost([scores.schemes.index(s) for s in worst.schemes.values()])
    assert worst.objective > best.objective == worst.bound and worst.gap > 0 and worst.status == "heuristic"
    order = np.argsort(np.ptp(scores.unary, axis=1))
    swapped = np.empty_like(scores.unary)
    swapped[order] = scores.unary[order[::-1]]
    assert worst.schemes == mq.solve(mq.Scores(scores.layers, scores.schemes, swapped), Budget(avg_bits=4.5)).schemes


def test_answers_are_judged_by_other_scores() -> None:
    model, budget = net(), Budget(avg_bits=4.5)
    scores = mq.score(model, batch(), method="single")
    pairs = np.zeros((5, 3, 5, 3))
    pairs[0, :, 1, :] = np.random.default_rng(0).normal(size=(3, 3))
    pairs += pairs.transpose(2, 3, 0, 1)
    for known in (scores, mq.Scores(scores.layers, scores.schemes, scores.unary, pairs)):
        best = mq.solve(known, budget)
        for method in OPTIONS:
            plain = mq.assign(model, batch(), budget, method=method, **OPTIONS[method])
            answer = mq.assign(model, batch(), budget, method=method, scores=known, **OPTIONS[method])
            assert answer.schemes == plain.schemes and answer.costs == plain.costs and answer.path == plain.path
            assert answer.objective == known.cost([known.schemes.index(s) for s in answer.schemes.values()])
            assert answer.bound <= best.objective <= answer.objective
            assert (answer.status == "optimal") == (answer.gap == 0) and answer.status in ("optimal", "heuristic")
            assert "single" in method or "objective" in answer.explain("2")
        same = mq.assign(model, batch(), budget, method="single", scores=scores)
        assert same.gap == 0 and same.status == "optimal"
    with pytest.raises(ValueError, match="are of other layers or schemes"):
        mq.assign(model, batch(), budget, method="uniform", bits=(3,), scores=scores)


def test_options_go_where_they_belong() -> None:
    model = net()
    answer = mq.assign(
        model, batch(), Budget(avg_bits=4.5), method="roundoff", solver={"relaxation": "lp", "rounding": "floor"}
    )
    assert answer.relaxed is not None and answer.costs["avg_bits"] <= 4.5
    assert mq.assign(model, iter([batch()[0]]), Budget(avg_bits=4), method="single", loss="kl").objective >= 0
    with pytest.raises(TypeError, match="lazy=True is no option of method 'uniform'; wanted one of bits, layers"):
        mq.assign(model, batch(), method="uniform", lazy=True)
    with pytest.raises(TypeError, match="of='kl' is no option of method 'greedy'; wanted one of mode, metric"):
        mq.assign(model, batch(), method="greedy", of="kl")
    with pytest.raises(ValueError, match="method='ransom'; wanted one of ompq"):
        mq.assign(model, batch(), method="ransom")
    with pytest.raises(
        ValueError, match="method='uniform' measures nothing and is for assign only; wanted one of ompq"
    ):
        mq.score(model, batch(), method="uniform")
    with pytest.raises(ValueError, match="wanted a Budget"):
        mq.assign(model, batch(), 4, method="uniform")


def test_every_method_is_listed_once() -> None:
    only = {name for name, (file, *_) in METHODS.items() if file is None}
    assert only | {"greedy"} == set(SEARCHES) and set(SEARCHES) <= set(mq.methods())
    assert all("for assign only" in mq.methods()[name] for name in only)
