"""compare: figures that can be checked by hand, controls that are always there, a model that is left as found."""

from __future__ import annotations

import copy
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

import mpqkern as mq
from mpqkern.compare import DRAWS, Outcome, kendall


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 4))


def judge(x: torch.Tensor, y: torch.Tensor):  # type: ignore[no-untyped-def]
    def evaluate(model: nn.Module) -> dict[str, float]:
        out = model(x).detach()
        loss = nn.functional.cross_entropy(out.double(), y)
        return {"loss": float(loss), "accuracy": float((out.argmax(1) == y).double().mean())}

    return evaluate


@pytest.fixture
def task():  # type: ignore[no-untyped-def]
    model, x = net(), torch.randn(60, 32)
    y = (model(x) * 4).argmax(1)
    return model, [(x[:20], y[:20])], judge(x[20:], y[20:])


def test_what_is_reported_is_what_a_swap_gives(task) -> None:  # type: ignore[no-untyped-def]
    model, batches, evaluate = task
    budgets = [mq.Budget(avg_bits=3), mq.Budget(bytes=3500)]
    found = mq.compare(model, batches, evaluate, budgets, methods=["roundoff", "fisher"])
    assert [(o.method, o.budget) for o in found.outcomes] == [
        (m, repr(b)) for m in ("roundoff", "fisher", "uniform", "random") for b in budgets
    ]
    for outcome in found.outcomes:
        assert len(outcome.bits) == (DRAWS if outcome.method == "random" else 1) and outcome.seconds > 0
        sizes, losses = [], []
        for bits in outcome.bits:
            swapped = copy.deepcopy(model)
            sizes.append(mq.swap_(swapped, bits).bytes)
            losses.append(evaluate(swapped)["loss"])
        assert outcome.bytes == np.mean(sizes)
        assert outcome.metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert all(o.bytes <= 3500 for o in found.outcomes if o.budget == repr(budgets[1]))
    assert found.metrics == evaluate(model)
    direct = mq.solve(mq.score(model, batches, method="fisher"), budgets[0])
    assert found.of("fisher")[0].bits == [direct.bits]


def test_wins_and_taus(task) -> None:  # type: ignore[no-untyped-def]
    model, batches, evaluate = task
    budgets = [mq.Budget(avg_bits=a) for a in (2.5, 3.5, 5)]
    found = mq.compare(model, batches, evaluate, budgets, methods=["roundoff", "size"])
    loss = {m: [o.metrics["loss"] for o in found.of(m)] for m in ("roundoff", "random")}
    better = [(a < b) + (a == b) / 2 for a, b in zip(loss["roundoff"], loss["random"], strict=True)]
    assert found.wins("roundoff", "random") == np.mean(better)
    assert found.wins("random", "roundoff") == pytest.approx(1 - np.mean(better))
    assert found.wins("random", "random") is None
    damage = []
    for name in ("0", "2", "4"):
        swapped = copy.deepcopy(model)
        mq.swap_(swapped, {name: 2})
        damage.append(evaluate(swapped)["loss"])
    scores = mq.score(model, batches, method="roundoff")
    assert found.tau["roundoff"] == pytest.approx(kendall(scores.unary[:, 0], np.array(damage)))
    assert found.tau["size"] is None and found.tau["random"] is None  # equal everywhere; no scores


def test_ranks_are_those_at_the_narrowest_scheme(task, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    model, batches, _ = task
    weights = [model[i].weight.detach().clone() for i in (0, 2, 4)]

    def evaluate(m: nn.Module) -> float:  # the damage is 1, 2 or 3
        return sum(k * bool((m[i].weight != w).any()) for k, i, w in zip((1, 2, 3), (0, 2, 4), weights, strict=True))

    def score(*args: object, **how: object) -> mq.Scores:
        return mq.Scores(mq.catalog(model), [8, 2, 4], [[3, 5, 9], [2, 6, 8], [1, 7, 7]])

    monkeypatch.setattr(sys.modules["mpqkern.compare"], "score", score)
    found = mq.compare(model, batches, evaluate, [mq.Budget(avg_bits=4)], methods=["fisher"], bits=(8, 2, 4))
    assert found.tau["fisher"] == 1


def test_options_by_label_and_files(task) -> None:  # type: ignore[no-untyped-def]
    model, batches, evaluate = task
    methods = {"noise": {"method": "delta_loss", "at": "float"}, "delta_loss": {}}
    found = mq.compare(model, batches, evaluate, [mq.Budget(avg_bits=3)], methods=methods, bits=(2, 3, 8), seed=4)
    assert list(found.tau) == ["noise", "delta_loss", "uniform", "random"]
    assert found.tau["noise"] == pytest.approx(
        mq.compare(
            model, batches, evaluate, [mq.Budget(avg_bits=3)], methods={"x": methods["noise"]}, bits=(2, 3, 8)
        ).tau["x"]
    )
    assert found.of("uniform")[0].bytes == 3 / 8 * (32 * 64 * 2 + 128)  # 3 bits do not pack: nominal
    draws = range(4 * DRAWS, 5 * DRAWS)
    how = {"method": "random", "bits": (2, 3, 8)}
    assert found.of("random")[0].bits == [
        mq.assign(model, batches, mq.Budget(avg_bits=3), seed=draw, **how).bits for draw in draws
    ]
    read = json.loads(found.to_json())
    assert read["metrics"] == found.metrics and read["wins"]["noise"]["random"] in (0, 0.5, 1)
    text = str(found)
    assert all(word in text for word in ("noise", "> uniform", "Budget(avg_bits=3)", f"{found.metrics['loss']:.4f}"))


def wide_first(run) -> np.ndarray:  # type: ignore[no-untyped-def]
    """A method of one's own: the first layer is worth as much as all others."""
    worth = np.array([len(run.task.layers), *[1] * (len(run.task.layers) - 1)])
    return np.outer(worth, run.widths().max() - run.widths())


def test_methods_of_ones_own(task) -> None:  # type: ignore[no-untyped-def]
    model, batches, evaluate = task
    budget = mq.Budget(avg_bits=3)
    for methods in ([wide_first, "size"], {"wide_first": {"method": wide_first}, "size": {}}):
        found = mq.compare(model, batches, evaluate, [budget], methods=methods)
        assert list(found.tau) == ["wide_first", "size", "uniform", "random"]
        assert found.of("wide_first")[0].bits == [mq.assign(model, batches, budget, method=wide_first).bits]


def test_one_method_with_several_options_shares_a_bank(task, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, batches, evaluate = task
    methods = {"clado": {}, "diagonal": {"method": "clado", "pairs": "none"}, "reversed": {}}
    how = {"methods": methods, "bank": tmp_path}
    first, again = (mq.compare(model, batches, evaluate, [mq.Budget(avg_bits=3)], **how) for _ in range(2))
    assert [o.metrics for o in first.outcomes] == [o.metrics for o in again.outcomes]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clado", "diagonal"]  # reversed has clado's


def test_the_impossible_is_said_before_anything_is_measured(task) -> None:  # type: ignore[no-untyped-def]
    model, batches, evaluate = task
    measured = []
    with pytest.raises(mq.Infeasible):
        budgets = [mq.Budget(avg_bits=4), mq.Budget(avg_bits=1)]
        mq.compare(model, batches, evaluate, budgets, methods=[lambda run: measured.append(run)])
    assert not measured


@pytest.mark.parametrize("method, wrong", [("ompq", "pairs"), ("greedy", "pairs"), ("uniform", "mode")])
def test_options_are_checked_before_anything_is_measured(task, method: str, wrong: str) -> None:  # type: ignore[no-untyped-def]
    model, batches, evaluate = task
    measured = []

    def first(run) -> np.ndarray:  # type: ignore[no-untyped-def]
        measured.append(run)
        return wide_first(run)

    for methods, frame in (({"first": {"method": first}, method: {wrong: "x"}}, {}), ([first, method], {wrong: "x"})):
        with pytest.raises(TypeError, match=f"{wrong}='x' is no option of method"):
            mq.compare(model, batches, evaluate, [mq.Budget(avg_bits=4)], methods=methods, **frame)
    assert not measured


def test_the_model_is_left_as_found(task) -> None:  # type: ignore[no-untyped-def]
    model, batches, _ = task
    model.train()
    state = copy.deepcopy(model.state_dict())
    seen = []

    def fails(m: nn.Module) -> float:
        seen.append((m.training, torch.is_grad_enabled(), bool((m[0].weight != state["0.weight"]).any())))
        if seen[-1][2]:
            raise ArithmeticError
        return 1.0

    with pytest.raises(ArithmeticError):
        mq.compare(model, batches, fails, [mq.Budget(avg_bits=3)], methods=["size"])
    assert seen[0] == (False, False, False) and model.training and torch.is_grad_enabled()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_wrong_arguments(task) -> None:  # type: ignore[no-untyped-def]
    model, batches, evaluate = task
    budget = mq.Budget(avg_bits=3)
    with pytest.raises(ValueError, match="at least one Budget"):
        mq.compare(model, batches, evaluate, budget)
    with pytest.raises(ValueError, match=r"methods\['fish'\]='fish'"):
        mq.compare(model, batches, evaluate, [budget], methods=["fish"])
    for methods in ("size", wide_first):
        with pytest.raises(ValueError, match="a sequence of names"):
            mq.compare(model, batches, evaluate, [budget], methods=methods)
    with pytest.raises(ValueError, match="wanted 'kl' among them"):
        mq.compare(model, batches, evaluate, [budget], methods=["size"], metric="kl")


def test_repeated_shows_means_and_half_ranges():
    budget = "Budget(avg_bits=4)"

    def run(loss: float, seconds: float, tau: float | None) -> mq.Comparison:
        made = [Outcome(m, budget, 100.0, {"loss": v}, seconds, []) for m, v in (("kl", loss), ("uniform", 0.5))]
        return mq.Comparison("loss", {"loss": 0.125}, made, {"kl": tau, "uniform": None})

    lines = [line.split() for line in str(mq.Repeated([run(0.25, 1.0, 0.5), run(0.75, 3.0, None)])).splitlines()]
    assert lines[2] == ["float", "0.1250", "+-0.0000"]
    assert lines[3] == [budget, "kl", "100", "0.5000", "+-0.2500", "2.00", "0.50", "50%"]
    assert lines[4] == [budget, "uniform", "100", "0.5000", "+-0.0000", "2.00"]
    assert "+-" not in str(mq.Repeated([run(0.25, 1.0, 0.5)]))
    with pytest.raises(ValueError, match="runs is empty"):
        mq.Repeated([])
    with pytest.raises(ValueError, match="runs differ in their methods or budgets"):
        mq.Repeated([run(0.25, 1.0, 0.5), mq.Comparison("loss", {"loss": 0.1}, [], {})])
