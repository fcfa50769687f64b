"""HQQ: single steps by hand, and never worse than min-max for what it minimises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mpqkern import Scheme
from mpqkern.rounding import HQQ, MinMax
from mpqkern.rounding.grid import Codes, Grid

SCHEMES = [
    Scheme(bits, symmetric=symmetric, group_size=size)
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    for size in (None, 32)
]


def lp(rows: Tensor, codes: Codes, size: int, p: float) -> Tensor:
    """Sums of |error|^p over each group of each row."""
    off = (codes.values().double() - rows.double()).abs() ** p
    return torch.stack([part.sum(1) for part in off.split(size, dim=1)], 1)


def test_a_step_of_the_scale() -> None:
    rows = torch.tensor([[0.5, -0.5, 0.5, -0.5, 1.5, 1.7]])
    scheme = Scheme(2, scale_dtype="float32")
    first = 1.7 / 1.5
    small, large = 0.5 / first, 1.5 / first  # in steps: 0.44 -> 0.5 and 1.32 -> 1.5, and 1.5 stays
    e = -((1.5 - large) - (1.5 - large) ** -0.3 / 10)  # 0.176 off: shrinks to 0.008; 0.06 off to nothing
    fit = (4 * small * 0.5 + (large - e) * 1.5 + 1.5 * 1.5) / (4 * 0.25 + 2 * 2.25)
    codes = HQQ(steps=1).round(rows, scheme)
    assert codes.scales.item() == pytest.approx(first * fit, rel=1e-6)
    assert codes.codes.tolist() == [[2, 1, 2, 1, 3, 3]]


def test_a_step_of_the_zero() -> None:
    rows = torch.tensor([[0.0, 0.8, 1.8, 0.8, 1.8, 3.0]])
    scheme = Scheme(2, symmetric=False, scale_dtype="float32")
    # min-max has scale 1 and zero 0; 0.2 off shrinks by 0.2^-0.3 / 10, which is what the zero is to make up for
    codes = HQQ(steps=1).round(rows, scheme)
    assert codes.scales.item() == 1
    assert codes.zeros.item() == pytest.approx(4 * 0.2**-0.3 / 10 / 6, rel=1e-5)
    assert codes.codes.tolist() == [[0, 1, 2, 1, 2, 3]]


def test_a_step_that_is_worse_is_not_taken() -> None:
    rows = torch.tensor([[0.0, 0.8, 1.8, 3.0]])  # two errors of 0.2 are less than four of 0.1
    codes = HQQ().round(rows, Scheme(2, symmetric=False, scale_dtype="float32"))
    assert codes.zeros.item() == 0 and codes.scales.item() == 1


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("p", [0.5, 0.7, 1.0])
def test_never_worse_than_minmax(scheme: Scheme, p: float) -> None:
    rows = torch.distributions.StudentT(3.0).sample((20, 80)) * 0.02
    ours, minmax = (lp(rows, m.round(rows, scheme), scheme.group_size or 80, p) for m in (HQQ(p=p), MinMax()))
    assert (ours <= minmax * (1 + 1e-5)).all()
    assert scheme.bits == 8 or ours.sum() < 0.99 * minmax.sum()  # zeros of 8 bits are too coarse in fp16 to gain much


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_are_the_nearest_of_the_stored_grid(scheme: Scheme) -> None:
    rows = torch.randn(20, 80)
    codes = HQQ().round(rows, scheme)
    minmax = MinMax().round(rows, scheme)
    assert codes.scales.dtype == codes.zeros.dtype == torch.float16
    assert codes.zeros.shape == minmax.zeros.shape
    moved, fixed = ("scales", "zeros") if scheme.symmetric else ("zeros", "scales")
    assert torch.equal(getattr(codes, fixed), getattr(minmax, fixed))
    assert scheme.bits == 8 or not torch.equal(getattr(codes, moved), getattr(minmax, moved))
    off = (codes.values() - rows).abs()
    nearest = Grid(codes.scales, codes.zeros, scheme, 80)
    assert torch.allclose(off, (nearest.values(nearest.nearest(rows)).float() - rows).abs(), atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_do_not_know_of_each_other(symmetric: bool) -> None:
    rows = torch.distributions.StudentT(3.0).sample((20, 80))
    values = HQQ(stop=1).round(rows, Scheme(2, symmetric=symmetric, group_size=32)).values()
    alone = Scheme(2, symmetric=symmetric)
    for row, theirs in zip(rows.split(1), values.split(1), strict=True):
        for part, wanted in zip(row.split(32, dim=1), theirs.split(32, dim=1), strict=True):
            assert torch.equal(HQQ(stop=1).round(part, alone).values(), wanted)


@pytest.mark.parametrize("symmetric", [True, False])
def test_size_of_the_weights_plays_no_part(symmetric: bool) -> None:
    rows, scheme = torch.randn(20, 80), Scheme(2, symmetric=symmetric, scale_dtype="float32")
    assert torch.equal(HQQ().round(rows * 2**-8, scheme).values(), HQQ().round(rows, scheme).values() * 2**-8)


def test_rows_of_zeros() -> None:
    for scheme in SCHEMES:
        assert (HQQ().round(torch.zeros(2, 40), scheme).values() == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": "0.7"}, "p='0.7'; wanted a number above 0, at most 1"),
        ({"p": 0}, "p=0; wanted a number above 0, at most 1"),
        ({"beta": -1}, "beta=-1; wanted a number above 0"),
        ({"growth": 0.9}, "growth=0.9; wanted a number of at least 1"),
        ({"steps": 0}, "steps=0; wanted a whole number, at least 1"),
        ({"stop": 0}, "stop=0; wanted a whole number, at least 1"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        HQQ(**options)
