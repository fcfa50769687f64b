"""GPTQ against its definition, one column after the other, and against every rounding there is."""

from itertools import product

import pytest
import torch

from mpqkern import Scheme
from mpqkern.rounding import GPTQ
from mpqkern.rounding.gptq import gptq
from mpqkern.rounding.grid import Grid, damage
from mpqkern.rounding.statistics import Statistics


def problem(n: int, k: int, groups: int = 1, samples: int = 40, seed: int = 0) -> tuple[torch.Tensor, Statistics]:
    """A weight, and inputs whose columns have much in common."""
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=draw)
    x = torch.randn(groups, samples, k, generator=draw) + 2 * torch.randn(groups, samples, 1, generator=draw)
    y = x + 0.1 * torch.randn(groups, samples, k, generator=draw)
    zeros = torch.zeros(groups, k, k, dtype=torch.float64), torch.zeros(groups, k, dtype=torch.float64)
    found = Statistics(zeros[0], zeros[0].clone(), zeros[1], zeros[1].clone())
    found.add(y, x)
    return w, found


def one_by_one(w: torch.Tensor, h: torch.Tensor, grid: Grid, order: list[int]) -> torch.Tensor:
    """After each column, the best the remaining ones can do (OBQ's update, one row at a time, by least squares)."""
    codes, free = torch.empty_like(w), list(order)
    w = w.clone()
    for t in order:
        code = (w[:, t] / grid.scale[:, t] + (grid.zero if grid.zero.numel() == 1 else grid.zero[:, t])).clamp(
            0, grid.top
        )
        codes[:, t] = code.round()
        error = w[:, t] - grid.values(codes)[:, t]
        free.remove(t)
        if free:  # min over d of (d, -error) h (d, -error)'
            w[:, free] += error[:, None] * torch.linalg.solve(h[free][:, free], h[free, t])
    return codes


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize(("symmetric", "group"), [(True, None), (False, 32)])
def test_equals_its_definition(order: bool, symmetric: bool, group: int | None):
    w, found = problem(5, 70)
    wanted, h = found.target(w, 0.01)
    grid = Grid.fit(wanted, Scheme(2, symmetric=symmetric, group_size=group))
    ranks = h[0].diagonal().argsort(descending=True, stable=True).tolist() if order else list(range(70))
    assert torch.equal(gptq(wanted, h, grid, order=order), one_by_one(wanted, h[0], grid, ranks))


def test_blocks_of_columns_change_nothing(monkeypatch: pytest.MonkeyPatch):
    w, found = problem(6, 100)
    wanted, h = found.target(w, 0.01)
    grid = Grid.fit(wanted, Scheme(4))
    whole = gptq(wanted, h, grid)
    monkeypatch.setattr("mpqkern.rounding.gptq.BLOCK", 7)
    assert torch.equal(gptq(wanted, h, grid), whole)


def test_groups_of_a_convolution_are_rounded_each_by_itself():
    w, found = problem(6, 12, groups=3)
    wanted, h = found.target(w, 0.01)
    grid = Grid.fit(wanted, Scheme(2))
    parts = []
    for g in range(3):
        part = wanted[2 * g : 2 * g + 2]
        parts.append(gptq(part, h[g : g + 1], Grid.fit(part, Scheme(2))))
    assert torch.equal(gptq(wanted, h, grid), torch.cat(parts))


def test_by_hand():
    """Two inputs that are always alike: what the first weight gains, the second gives back."""
    h = torch.tensor([[[1.0, 1.0], [1.0, 1.0]]], dtype=torch.float64) + 1e-9 * torch.eye(2, dtype=torch.float64)
    grid = Grid.fit(torch.tensor([[-1.5, 1.5]]), Scheme(2, scale_dtype="float32"))  # values -1.5, -0.5, 0.5, 1.5
    codes = gptq(torch.tensor([[0.1, 0.2]]), h, grid, order=False)
    # 0.1 -> 0.5 is 0.4 too much, so 0.2 becomes -0.2 -> -0.5; nearest would have been 0.5 + 0.5 for 0.3
    assert grid.values(codes).tolist() == [[0.5, -0.5]]


@pytest.mark.parametrize("how", [{}, {"order": False}, {"grid": "minmax"}, {"grid": "mse"}, {"mismatch": False}])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_never_worse_than_nearest(how: dict, bits: int):
    for seed in range(5):
        w, found = problem(8, 33, seed=seed)
        if not how.get("mismatch", True):
            found.g, found.x = found.h, found.y
        method, scheme = GPTQ(**how), Scheme(bits)
        wanted, h = found.target(w, 0.01)
        grid = Grid.fit(wanted, scheme, method.grid, h)
        got = damage(wanted, method.round(w, scheme, found).values(), h)
        for other in (wanted, w):
            assert (got <= damage(wanted, grid.values(grid.nearest(other)), h) * (1 + 1e-6)).all()


def test_near_the_best_there_is():
    """Of all 4^6 roundings of rows of 6 weights; nearest is more than twice as far off, by mean logarithms."""
    w, found = problem(20, 6)
    wanted, h = found.target(w, 0.01)
    grid = Grid.fit(wanted, Scheme(2))
    every = torch.tensor(list(product(range(4), repeat=6)), dtype=torch.float64)
    best = torch.stack([damage(wanted, grid.values(codes.expand(20, 6)), h) for codes in every]).min(0).values
    got = damage(wanted, GPTQ(grid="minmax").round(w, Scheme(2), found).values(), h)
    nearest = damage(wanted, grid.values(grid.nearest(wanted)), h)
    assert (got >= best * (1 - 1e-6)).all()
    assert 2 * (got / best).log().mean() < (nearest / best).log().mean()


def test_the_grid_by_output_has_the_least_error_of_those_tried():
    w, found = problem(7, 40)
    h = found.h
    grid = Grid.fit(w, Scheme(2), "output", h)
    full = Grid.fit(w, Scheme(2))
    got, whole = (damage(w, g.values(g.nearest(w)), h) for g in (grid, full))
    assert (got <= whole).all() and (got < whole).any()
    assert (grid.scales <= full.scales).all()


def test_damage_is_the_squared_error_of_the_outputs_of_each_group():
    w, _ = problem(6, 5, groups=3)
    draw = torch.Generator().manual_seed(0)
    x, other = torch.randn(3, 30, 5, generator=draw).double(), w + 0.1 * torch.randn(6, 5, generator=draw)
    want = torch.cat([(x[g] @ (w - other)[2 * g : 2 * g + 2].double().T).square().sum(0) for g in range(3)])
    torch.testing.assert_close(damage(w, other, x.mT @ x), want)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"damp": 0}, "damp=0; wanted a number above 0"),
        ({"damp": "0.1"}, "damp='0.1'; wanted a number above 0"),
        ({"order": "no"}, "order='no'; wanted True or False"),
        ({"mismatch": 0.1}, "mismatch=0.1; wanted True or False"),
        ({"grid": "best"}, "grid='best'; wanted 'minmax', 'mse' or"),
    ],
)
def test_bad_options(how: dict, message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        GPTQ(**how)


def test_without_inputs():
    with pytest.raises(ValueError, match="statistics=None; wanted those of the layer's inputs, which 'gptq' needs"):
        GPTQ().round(torch.zeros(2, 4), Scheme(4))
