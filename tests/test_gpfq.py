"""GPFQ: by hand, against its recurrence on the inputs themselves, and the theorem that it is known for."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mpqkern import Scheme, swap_
from mpqkern.rounding import GPFQ
from mpqkern.rounding.gpfq import gpfq

from .reference import columnwise

TWO = Scheme(2, scale_dtype="float32")
SCHEMES = (Scheme(2), Scheme(4), Scheme(2, symmetric=False), Scheme(4, symmetric=False, group_size=32))


def test_by_hand() -> None:
    h, grid = torch.tensor([[[4.0, 2], [2, 2]]]).double(), columnwise.ladder(1, 2, TWO)
    # 0.9 -> 0.5, which leaves 0.7 + 0.4 * 2 / 2 = 1.1 for the second, not 0.7
    assert grid.values(gpfq(torch.tensor([[0.9, 0.7]]), h, h, grid)).tolist() == [[0.5, 1.5]]
    # inputs half as large as they were: 2 * 0.4 -> 0.5, then (2 * (0.4 * 2 + 0.4 * 2) - 0.5 * 2) / 2 = 1.1
    assert grid.values(gpfq(torch.tensor([[0.4, 0.4]]), 2 * h, h, grid)).tolist() == [[0.5, 1.5]]
    assert grid.values(gpfq(torch.tensor([[0.4, 0.4]]), h, h, grid)).tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("k", [7, 128, 300])
def test_gram_form_is_the_recurrence(k: int) -> None:
    rows, (x, y) = torch.randn(8, k).double(), columnwise.inputs(1, 90, k)
    grid = columnwise.ladder(8, k, TWO)
    codes = gpfq(rows, y.mT @ x, y.mT @ y, grid)
    wanted = columnwise.gpfq(rows, x[0], y[0], grid)
    apart = (grid.values(codes) - grid.values(wanted)) @ y[0].T
    assert apart.norm() <= 1e-9 * (rows @ x[0].T).norm()


def test_damping_is_noise() -> None:
    rows, (x, y) = torch.randn(8, 40).double(), columnwise.inputs(1, 30, 40)  # fewer rows than columns
    grid = columnwise.ladder(8, 40, TWO)
    noisy = columnwise.noisy(x[0], y[0], 0.05)
    codes = gpfq(rows, *columnwise.statistics(x, y).damped(0.05), grid)
    assert torch.equal(codes, columnwise.gpfq(rows, *noisy, grid))
    assert not torch.equal(codes, columnwise.gpfq(rows, x[0], y[0], grid))


def test_columns_that_are_always_zero() -> None:
    rows, (x, y) = torch.randn(8, 20).double(), columnwise.inputs(1, 60, 20)
    y[..., [3, 11]] = 0
    statistics, grid = columnwise.statistics(x, y), columnwise.ladder(8, 20, TWO)
    for g, h in ((statistics.g, statistics.h), statistics.damped(0.01)):
        codes = gpfq(rows, g, h, grid)
        assert torch.equal(codes[:, [3, 11]], grid.nearest(rows)[:, [3, 11]])
        assert not torch.equal(codes, grid.nearest(rows))


def test_is_far_faster_than_the_recurrence() -> None:
    rows, (x, y) = torch.randn(64, 512).double(), columnwise.inputs(1, 6144, 512)
    g, h, grid = y.mT @ x, y.mT @ y, columnwise.ladder(64, 512, TWO)
    slow = _seconds(lambda: columnwise.gpfq(rows, x[0], y[0], grid), 1)
    assert slow > 20 * _seconds(lambda: gpfq(rows, g, h, grid), 3)


def _seconds(call: Callable[[], Tensor], times: int) -> float:
    """Of this process, the least of some times."""
    found = []
    for _ in range(times):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return min(found)


def test_error_halves_as_weights_double() -> None:
    sizes, ours, nearest = [128, 256, 512, 1024, 2048], [], []
    for k in sizes:
        rows, x = torch.rand(16, k).double() * 2 - 1, torch.randn(64, k).double()
        grid = columnwise.ladder(16, k, TWO)
        grid = type(grid)(grid.scales / 1.5, grid.zeros, TWO, k)  # -1, -1/3, 1/3 and 1
        h = (x.T @ x)[None]
        for errors, codes in ((ours, gpfq(rows, h, h, grid)), (nearest, grid.nearest(rows))):
            off = (grid.values(codes) - rows) @ x.T
            errors.append(float(off.square().sum() / (rows @ x.T).square().sum()))
    assert -1.2 < _slope(sizes, ours) < -0.8
    assert abs(_slope(sizes, nearest)) < 0.15


def _slope(sizes: list[int], errors: list[float]) -> float:
    """Of log error against log size, by least squares."""
    a, b = (torch.tensor([math.log(v) for v in values], dtype=torch.float64) for values in (sizes, errors))
    a = a - a.mean()
    return float(a @ b / (a @ a))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_never_worse_than_nearest(scheme: Scheme) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        columnwise.check_never_worse(GPFQ(), scheme)
        columnwise.check_never_worse(GPFQ(radius=1.0, percentile=98), scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_groups_are_layers(scheme: Scheme) -> None:
    columnwise.check_groups(GPFQ(), scheme)


def test_radius() -> None:
    rows = torch.tensor([[0.1, -0.2, 0.3, -4.0], [-0.5, 1.0, 0.5, 0.5]])
    x = torch.eye(4).double()[None]
    statistics = columnwise.statistics(x, x)
    # the largest: 4 and 1, in the mean 2.5; three of four: 0.3 and 0.5, in the mean 0.4
    for options, reach in (({}, 2.5), ({"percentile": 75}, 0.4), ({"percentile": 60}, 0.4), ({"percentile": 50}, 0.35)):
        codes = GPFQ(radius=1.2, **options).round(rows, TWO, statistics)
        assert codes.scales.shape == (2, 1) and codes.zeros.tolist() == [1.5]
        assert torch.allclose(codes.scales, torch.tensor(1.2 * reach / 1.5))
        uneven = GPFQ(radius=1.2, **options).round(rows, Scheme(2, symmetric=False, scale_dtype="float32"), statistics)
        assert uneven.zeros.tolist() == [[2.0], [2.0]]
        assert torch.allclose(uneven.scales, torch.tensor(1.2 * reach / 2))
    with pytest.raises(ValueError, match="too large for float16"):
        GPFQ(radius=1e6).round(rows, Scheme(2), statistics)


def test_sparse_by_hand() -> None:
    rows, x = torch.tensor([[0.9, 1.2, 2.2, -1.6, -4.0]]), torch.eye(5).double()[None]
    statistics = columnwise.statistics(x, x)
    scheme = Scheme(4, symmetric=False, scale_dtype="float32")
    values = {}
    for sparse in ("soft", "hard"):
        method = GPFQ(radius=2.0, percentile=100, sparse=sparse, damp=1e-9)  # 8 steps to 8: one apart
        values[sparse] = method.round(rows, scheme, statistics).values().tolist()
    assert values == {"soft": [[0, 0, 1, -1, -3]], "hard": [[0, 1, 2, -2, -4]]}


@pytest.mark.parametrize("radius", [None, 1.0])
@pytest.mark.parametrize("sparse", ["soft", "hard"])
def test_the_stronger_the_sparser(sparse: str, radius: float | None) -> None:
    rows, (x, y) = torch.randn(32, 64), columnwise.inputs(1, 200, 64)
    scheme, zeros = Scheme(4, symmetric=False), []
    for strength in (0.0, 0.6, 1.0, 1.5, 2.5, 4.0, 1e4):
        method = GPFQ(sparse=sparse, strength=strength, radius=radius)
        zeros.append(int((method.round(rows, scheme, columnwise.statistics(x, y)).values() == 0).sum()))
    assert zeros == sorted(zeros) and zeros[0] < zeros[2] < zeros[4] and zeros[-1] == rows.numel()


@pytest.mark.parametrize("weight", [0.2, -1.3])
def test_by_chance_but_right_on_average(weight: float) -> None:
    rows, x = torch.full((20000, 1), weight), torch.ones(1, 1, 1).double()
    method = GPFQ(stochastic=True, radius=1.5 / abs(weight), damp=1e-9)  # points one apart
    statistics = columnwise.statistics(x, x)
    values = method.round(rows, TWO, statistics).values()
    low = math.floor(weight - 0.5) + 0.5
    assert torch.allclose(values.unique(), torch.tensor([low, low + 1]), atol=1e-5)
    assert abs(float(values.mean()) - weight) < 4 * 0.5 / 20000**0.5
    assert torch.equal(method.round(rows, TWO, statistics).values(), values)
    other = GPFQ(stochastic=True, radius=method.radius, damp=1e-9, seed=1)
    assert not torch.equal(other.round(rows, TWO, statistics).values(), values)


@pytest.mark.parametrize("rounding", ["gpfq", "qronos"])
def test_whole_models(rounding: str) -> None:
    x, off = torch.randn(64, 4, 6, 6), {}
    for name in ("minmax", rounding):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
        wanted = model(x).detach()
        swap_(model, {"*": 2}, rounding=name, **({} if name == "minmax" else {"batches": [x]}))
        off[name] = float((model(x) - wanted).square().mean())
    assert off[rounding] < 0.25 * off["minmax"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damp": 0}, "damp=0; wanted a number above 0"),
        ({"grid": "best"}, "grid='best'; wanted 'minmax', 'mse' or 'output'"),
        ({"radius": -1.0}, "radius=-1.0; wanted a number above 0, or None"),
        ({"radius": True}, "radius=True; wanted a number above 0, or None"),
        ({"stochastic": 1}, "stochastic=1; wanted True or False"),
        ({"seed": None}, "seed=None; wanted a whole number"),
        ({"percentile": 101}, "percentile=101; wanted a number above 0, at most 100"),
        ({"sparse": "l1"}, "sparse='l1'; wanted None, 'soft' or 'hard'"),
        ({"strength": -1}, "strength=-1; wanted a number of at least 0"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        GPFQ(**options)


def test_sparse_needs_a_zero() -> None:
    x = torch.eye(4).double()[None]
    with pytest.raises(ValueError, match="whose grid has no 0; wanted symmetric=False"):
        GPFQ(sparse="soft").round(torch.ones(1, 4), Scheme(4), columnwise.statistics(x, x))
