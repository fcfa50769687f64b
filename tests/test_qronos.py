"""Qronos: by hand, and against least squares solved anew after each weight."""

from __future__ import annotations

import pytest
import torch

from mpqkern import Scheme
from mpqkern.rounding import GPTQ, Qronos
from mpqkern.rounding.gptq import gptq, rank
from mpqkern.rounding.qronos import qronos

from .reference import columnwise

TWO = Scheme(2, scale_dtype="float32")
SCHEMES = (Scheme(2), Scheme(4), Scheme(2, symmetric=False), Scheme(4, symmetric=False, group_size=32))


def test_by_hand() -> None:
    h, grid = torch.tensor([[[4.0, 2], [2, 2]]]).double(), columnwise.ladder(1, 2, TWO)
    rows = torch.tensor([[0.45, 0.4]])
    wanted = 2 * rows.double()  # inputs half as large as they were
    # beside a second weight of 0.4 the best first is (4 * 0.9 + 2 * 0.8 - 2 * 0.4) / 4 = 1.1, not 0.9;
    # after 1.5 the best second is (2 * 0.9 + 2 * 0.8 - 2 * 1.5) / 2 = 0.2
    assert grid.values(qronos(rows, wanted, h, grid)).tolist() == [[1.5, 0.5]]
    assert grid.values(gptq(wanted, h, grid)).tolist() == [[0.5, 1.5]]


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("k", [2, 9, 24, 140])
def test_is_least_squares_after_each_weight(k: int, order: bool) -> None:
    rows, (x, y) = torch.randn(6, k).double(), columnwise.inputs(1, k + 10, k)
    statistics, grid = columnwise.statistics(x, y), columnwise.ladder(6, k, TWO)
    wanted, h = statistics.target(rows, 0.01)
    columns = rank(h)[0].tolist() if order else list(range(k))
    direct = columnwise.qronos(rows, *columnwise.noisy(x[0], y[0], 0.01), grid, columns)
    assert torch.equal(qronos(rows, wanted, h, grid, order=order), direct)


def test_differs_from_gptq_by_the_first_weight() -> None:
    rows, (x, y) = torch.randn(200, 20), columnwise.inputs(1, 40, 20)
    wanted, h = columnwise.statistics(x, y).target(rows, 0.01)
    grid, first = columnwise.ladder(200, 20, TWO), rank(h)[0, 0]
    ours, theirs = qronos(rows, wanted, h, grid), gptq(wanted, h, grid)
    same = ours[:, first] == theirs[:, first]
    assert torch.equal(ours[same], theirs[same]) and 0 < same.sum() < 200


def test_without_mismatch_is_gptq() -> None:
    rows, (_, y) = torch.randn(12, 40), columnwise.inputs(2, 60, 40)
    statistics = columnwise.statistics(y, y)
    statistics.g = statistics.h
    ours, theirs = (m.round(rows, Scheme(4), statistics).values() for m in (Qronos(), GPTQ()))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_never_worse_than_nearest(scheme: Scheme) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        columnwise.check_never_worse(Qronos(), scheme)


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_groups_are_layers(scheme: Scheme, order: bool) -> None:
    columnwise.check_groups(Qronos(order=order), scheme)
