"""Budgets count in whole numbers, as the files and the models do."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import mpqkern as mq
from mpqkern.scheme import Layer, Scheme
from mpqkern.solve import Budget, Infeasible, Scores, solve
from tests.reference.networks import units


def test_packed_bytes_are_those_of_the_packed_model() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(50, 33), torch.nn.Conv2d(3, 7, 3), torch.nn.Linear(64, 10))
    layers = mq.catalog(model)
    schemes = [Scheme(2), Scheme(4, group_size=32), Scheme(8, symmetric=False), None]
    scores = Scores(layers, schemes, np.random.default_rng(0).random((3, 4)))
    answer = solve(scores, Budget(bytes=20_000), pins={"0": schemes[1], "1": schemes[2], "2": None})
    ledger = mq.swap_(model, answer)
    assert answer.costs["bytes"] == ledger["0"].bytes + ledger["1"].bytes + 64 * 10 * 4


def test_kinds_agree_with_each_other() -> None:
    layers = [Layer("a", "linear", (10, 64), 640, 640), Layer("b", "linear", (20, 64), 1280, 1280)]
    schemes = [Scheme(2), Scheme(8), None]
    packed = np.array([[Scheme(2).bytes((n, 64)), Scheme(8).bytes((n, 64)), n * 64 * 4] for n in (10, 20)])
    for budget, per in (
        (Budget(bytes=100), 1),
        (Budget(mbytes=1), 2**20),
        (Budget(fraction=0.5), 4 * 1920),
        (Budget(avg_bits=4, count="packed"), 1920 / 8),
    ):
        row = budget.row(layers, schemes)
        assert [[float(row.amount(int(v))) for v in line] for line in row.values] == pytest.approx(packed / per)
    nominal = Budget(avg_bits=4).row(layers, schemes)
    assert nominal.values.tolist() == [[1280, 5120, 20480], [2560, 10240, 40960]] and nominal.cap == 4 * 1920
    bops = Budget(gbops=1).row(layers, [Scheme(2, act_bits=8), Scheme(4), None])
    assert bops.values.tolist() == [[640 * 16, 640 * 128, 640 * 1024], [1280 * 16, 1280 * 128, 1280 * 1024]]


def gate_count(weight: int, act: int, products: int, outputs: int) -> int:
    """CLADO's formula: an array multiplier for each product, an adder for each but the first of an output."""
    multiplier = 5 * act * weight - 5 * act - 3 * weight + 3
    return products * multiplier + (products - outputs) * (3 * act + 3 * weight + 29)


def test_gates_of_multipliers_and_adders() -> None:
    conv = Layer("conv", "conv2d", (16, 8, 3, 3), 1152, 2 * 1152 * 49)  # a batch of 2, 7 x 7 positions
    depthwise = Layer("dw", "conv2d", (8, 1, 3, 3), 72, 72 * 49)
    head = Layer("head", "linear", (10, 64), 640, 640)
    schemes = [Scheme(2, act_bits=4), Scheme(8, act_bits=8), Scheme(4), None]
    row = Budget(gbops=0.01, count="gates").row([conv, depthwise, head], schemes)
    sums = [(2 * 1152 * 49, 2 * 16 * 49), (72 * 49, 8 * 49), (640, 10)]  # products, outputs
    widths = [(2, 4), (8, 8), (4, 32), (32, 32)]
    assert row.values.tolist() == [[gate_count(w, a, *layer) for w, a in widths] for layer in sums]
    assert gate_count(8, 8, 1, 1) == 7 * 37 and row.cap == 10**7 and row.unit == "10^9 gates"
    assert Budget(gbops=1, count="macs").row([head], schemes).values.tolist() == [[5120, 40960, 81920, 655360]]


def test_tables_of_several_batch_sizes(tmp_path) -> None:
    layers, schemes = units([10, 20]), [Scheme(2), None]
    one, eight = [[0.5, 1.25], [2.0, 4.0]], {"unit0": {"w2": 1, "float": 2}, "unit1": {"w2": 3, "float": 5}}
    (tmp_path / "t.json").write_text(json.dumps({1: one, 8: eight}))
    for source in ({1: one, 8: eight}, tmp_path / "t.json"):
        for batch, wanted in ((1, one), (8, [[1, 2], [3, 5]])):
            row = Budget(ms=3, table=source, batch=batch).row(layers, schemes)
            assert (row.values / 1e9).tolist() == wanted and row.label == f"ms at batch {batch}"
    budgets = [Budget(ms=limit, table={1: one, 8: eight}, batch=batch) for limit, batch in ((9, 1), (4, 8))]
    answer = solve(Scores(layers, schemes, [[1, 0], [1, 0]]), *budgets)
    assert answer.costs == {"ms at batch 1": 2.5, "ms at batch 8": 4.0} and repr(budgets[1]) == "Budget(ms=4, batch=8)"
    digits = [Layer("1", "linear", (1, 1), 1), Layer("8", "linear", (1, 1), 1)]  # as torch.nn.Sequential names them
    row = Budget(ms=9, table={"1": {"w2": 1, "float": 2}, "8": {"w2": 3, "float": 5}}).row(digits, schemes)
    assert (row.values / 1e9).tolist() == [[1, 2], [3, 5]]


def test_written_decimals_are_exact() -> None:
    layers = units([10, 10, 10])
    assert Budget(avg_bits=4.7).row(layers, [Scheme(2)]).cap == 141  # 4.7 * 30 is 141.0 - 3e-14 in floats
    scores = Scores(layers, [2, 4], [[1, 0]] * 3)
    tenths = [[0.1, 0.1], [0.2, 0.2], [0.0, 0.0]]  # 0.1 + 0.2 is 0.30000000000000004 in floats
    assert solve(scores, Budget(ms=0.3, table=tenths)).slack == {"ms": 0.0}
    assert solve(scores, Budget(limit=0.3, rows=tenths)).slack == {"limit": 0.0}


def test_tables_from_files(tmp_path) -> None:
    layers, schemes = units([10, 20]), [Scheme(2), None]
    table = np.array([[0.5, 1.25], [2.0, 4.0]])
    np.save(tmp_path / "t.npy", table)
    (tmp_path / "t.json").write_text(json.dumps(table.tolist()))
    (tmp_path / "n.json").write_text(json.dumps({"unit0": {"w2": 0.5, "float": 1.25}, "unit1": {"w2": 2, "float": 4}}))
    for source in (table, tmp_path / "t.npy", str(tmp_path / "t.json"), tmp_path / "n.json"):
        row = Budget(ms=3, table=source).row(layers, schemes)
        assert row.values.tolist() == [[5 * 10**8, 125 * 10**7], [2 * 10**9, 4 * 10**9]] and row.cap == 3 * 10**9


def test_limits_beyond_all_sums_are_never_or_always_met() -> None:
    scores = Scores(units([10, 20, 30]), [2, 4], [[1, 0]] * 3)
    small, whole = np.full((3, 2), 1e-5), np.ones((3, 2), dtype=int)
    for limit, rows in ((-3000, small), (-1e300, small), (-(10**19), whole)):
        with pytest.raises(Infeasible, match="no assignment fits limit="):
            solve(scores, Budget(limit=limit, rows=rows))
    assert solve(scores, Budget(limit=3000, rows=small)).slack == {"limit": 3000 - 3e-5}
    assert solve(scores, Budget(limit=10**30, rows=whole)).slack == {"limit": 10**30 - 3}
    used = sum(Scheme(4).bytes(layer.weight_shape) for layer in scores.layers)
    assert solve(scores, Budget(bytes=10**30)).slack == {"bytes": 10**30 - used}
    assert solve(scores, at_most={4: 10**30}).slack == {"at_most 4": 10**30 - 3}


def test_rows_as_small_as_floats_get() -> None:
    scores = Scores(units([10, 20, 30]), [2, 4], [[1, 0]] * 3)
    answer = solve(scores, Budget(limit=4e-310, rows=np.array([[1, 2]] * 3) * 1e-310))
    assert answer.objective == 2.0 and answer.prices == {"limit": np.inf} and "Infinity" not in answer.to_json()


def test_no_two_budgets_share_a_label() -> None:
    scores = Scores(units([10, 20, 30]), [2, 4], [[1, 0]] * 3)
    rows = np.ones((3, 2), dtype=int)
    for names in (["a#2", "a", "a"], ["a", "a", "a#2"], ["a", "a", "a"], ["at_most 4", "at_most 4", None]):
        limits = [Budget(limit=9 + i, rows=rows, name=name) for i, name in enumerate(names)]
        slack = solve(scores, *limits, at_most={4: 3}).slack
        assert sorted(slack.values()) == [0, 6, 7, 8], names


def test_layers_of_no_size_have_gates_and_bytes() -> None:
    empty = [Layer("z", "linear", (4, 0), 0, 0)]
    assert Budget(gbops=4, count="gates").row(empty, [Scheme(2), None]).values.tolist() == [[0, 0]]
    assert Budget(bytes=4).row(empty, [Scheme(2, group_size=32), None]).values[0, 1] == 0
    assert Budget(bytes=4).row(empty, [Scheme(2), None]).values[0, 1] == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda la: Budget(), "limits given: none; wanted exactly one of avg_bits"),
        (lambda la: Budget(avg_bits=4, ms=2), "limits given: avg_bits=4, ms=2"),
        (lambda la: Budget(bytes=-1), "bytes=-1; wanted a finite number, not negative"),
        (lambda la: Budget(ms=float("nan")), "ms=nan; wanted a finite number"),
        (lambda la: Budget(bytes=True), "bytes=True; wanted"),
        (lambda la: Budget(bytes=9, count="real"), "count='real' with bytes; wanted 'packed' or 'nominal'"),
        (lambda la: Budget(gbops=9, count="packed"), "count='packed' with gbops; wanted 'macs' or 'gates'"),
        (lambda la: Budget(ms=9, table=[[1]], count="packed"), "count='packed' with ms; wanted none"),
        (lambda la: Budget(bytes=9, batch=8), "batch=8 with bytes=; wanted ms= with batch="),
        (
            lambda la: Budget(ms=3, table={1: [[1], [1]], 8: [[1], [1]]}, batch=4).row(la, [Scheme(2)]),
            "batch=4 is not in table; wanted one of its batches: 1, 8",
        ),
        (lambda la: Budget(ms=3, table=[[1], [1]], batch=4).row(la, [Scheme(2)]), "wanted a table {batch: table"),
        (lambda la: Budget(ms=3, table={1: [[1], [1]]}).row(la, [Scheme(2)]), "table holds the batches 1; wanted"),
        (lambda la: Budget(ms=3), "wanted table= beside ms="),
        (lambda la: Budget(bytes=3, rows=[[1]]), "wanted limit= with rows="),
        (lambda la: Budget(gbops=3).row([Layer("x", "linear", (1, 1), 1)], [Scheme(2)]), "layer 'x' has no macs"),
        (lambda la: Budget(ms=3, table=[[1]]).row(la, [Scheme(2)]), r"shape \[1, 1\]; wanted \[2, 1\]"),
        (lambda la: Budget(ms=3, table=[[1], [-1]]).row(la, [Scheme(2)]), "none < 0"),
        (lambda la: Budget(bytes=9).row(la, [Scheme(3)]), "count='packed' for w3.*wanted count='nominal'"),
        (lambda la: Budget(avg_bits=10**400), "avg_bits=1000.*wanted a finite number"),
        (lambda la: Budget(bytes=9, name=5), "name=5; wanted text"),
        (lambda la: Budget(limit=9, rows=[[10**30], [1]]).row(la, [Scheme(2)]), "rows holds object; wanted floats"),
        (lambda la: Budget(limit=9, rows=[["a"], ["b"]]).row(la, [Scheme(2)]), "rows holds <U1; wanted floats"),
        (lambda la: Budget(limit=9, rows=[[True], [False]]).row(la, [Scheme(2)]), "rows holds bool; wanted floats"),
        (lambda la: Budget(limit=9, rows=[[1e308], [1e308]]).row(la, [Scheme(2)]), "rows holds 1e\\+308; wanted"),
        (lambda la: Budget(ms=9, table=[[1e305], [1]]).row(la, [Scheme(2)]), "table ranges from 1.0 to 1e\\+305"),
        (lambda la: Budget(ms=9, table=[["a"], ["b"]]).row(la, [Scheme(2)]), "table is no array of numbers"),
        (lambda la: Budget(avg_bits=4).row([Layer("z", "linear", (4, 0), 0)], [Scheme(2)]), "avg_bits of layers that"),
        (lambda la: Budget(fraction=1).row([Layer("z", "linear", (4, 0), 0)], [Scheme(2)]), "fraction of layers that"),
        (lambda la: Budget(limit=9, rows=[[2**60], [2**60]]).row(la, [Scheme(3)]), "beyond 2\\*\\*61"),
    ],
)
def test_errors_name_argument_value_and_wish(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(units([10, 20]))
