"""linear with 8-bit activations: integer sums to the last one, whatever codes, groups, shapes and threads."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mpqkern import ops

from . import reference

BITS = (2, 4, 8)
# Rows around the 4, 6, 12 or 14 of a tile, and where sums take turns.
ROWS = (1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 14, 24, 25, 28, 56, 98)
# N around the 8 rows of the smallest square and the 32 of a panel; K around blocks and squares of packed words: 64,
# 128 or 256 codes. From 128 rows on sums of 16 bits may start with what is taken from them.
SHAPES = ((1, 1), (7, 33), (8, 64), (9, 545), (31, 130), (33, 256), (65, 96), (40, 290), (130, 420), (161, 576))


@pytest.fixture(params=["alone", "fragments"])
def linear(request: pytest.FixtureRequest, path: SimpleNamespace) -> Callable[..., torch.Tensor]:
    """The op with 8-bit activations, given fragments or not."""

    def multiply(x: torch.Tensor, q: torch.Tensor, *rest: Any) -> torch.Tensor:
        return path.linear(x, q, *rest, 8)

    def by_fragments(x: torch.Tensor, q: torch.Tensor, *rest: Any) -> torch.Tensor:
        *_, bits, _ = rest
        return path.linear_fragments(x, q, *rest, 8, None, path.fragments(q, bits, x.shape[-1]))

    return multiply if request.param == "alone" else by_fragments


def integers(*size: int) -> torch.Tensor:
    """Activations that are their own 8-bit form: integers up to 127, which every row holds in every block of 32."""
    x = torch.randint(-127, 128, size).float()
    x[:, ::32] = 127
    return x


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [32, 64, 96, 128, 0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers(
    path: SimpleNamespace, linear: Callable[..., torch.Tensor], bits: int, group: int, symmetric: bool
) -> None:
    """Scales that are powers of 2 and zeros in quarters: every step is exact in fp32, so results must be, too."""
    for i, (n, k) in enumerate(SHAPES):
        groups = -(-k // group) if group else 1
        codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
        scales = 2.0 ** torch.randint(-1, 2, (n, groups))
        zeros = torch.tensor([2**bits - 1.0]) / 2 if symmetric else torch.randint(0, 4 * 2**bits, (n, groups)) / 4
        q, half = path.pack(codes, bits), torch.float16 if i % 2 else torch.float32
        for m in ROWS[i % 3 :: 3]:
            x = integers(m, k)
            got = linear(x, q, scales.to(half), zeros.to(half), None, bits, group)
            assert torch.equal(got.double(), reference.linear_a8(x, codes, scales, zeros, group))


@pytest.mark.sanitize
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("m", [1, 3, 5, 13])
def test_sums_at_their_limit(path: SimpleNamespace, linear: Callable[..., torch.Tensor], bits: int, m: int) -> None:
    """Every product the largest there is. In spans a sum just stays below 2^24; over 70000 codes it leaves 32 bits."""
    for k, group in ((512, 0), (544, 0), (8832, 0), (8832, 8832), (70000, 0), (1100, 544)):
        n = 130 if k < 10000 else 9
        codes = torch.full((n, k), 2**bits - 1, dtype=torch.uint8)
        codes[1::2] = 0  # zeros beyond all codes then make the others as large
        groups = -(-k // group) if group else 1
        zeros = torch.zeros(n, groups)
        zeros[1::2] = 2.0**bits - 1
        x = torch.full((m, k), 127.0)
        x[1::2] = -127
        got = linear(x, path.pack(codes, bits), torch.ones(n, groups), zeros, None, bits, group)
        sign = torch.tensor([1.0, -1.0]).repeat(65)
        want = sign[:m, None].double() * sign[None, :n] * 127 * k * (2**bits - 1)
        assert ((got.double() - want).abs() <= reference.a8_factor(k, group) * want.abs()).all()


@pytest.mark.parametrize("bits,k", [(2, 143360), (4, 20480), (8, 20480)])
@pytest.mark.parametrize("m", [1, 5])
def test_zeros_near_the_codes_do_not_cancel(
    path: SimpleNamespace, linear: Callable[..., torch.Tensor], bits: int, k: int, m: int
) -> None:
    """Sums of codes leave 24 bits, the results, integers again, do not: they are exact if sums are kept in spans."""
    zero = 2**bits - 2
    codes = torch.randint(zero - 1, zero + 2, (9, k), dtype=torch.uint8)
    x = integers(m, k).abs()
    got = linear(x, path.pack(codes, bits), torch.ones(9, 1), torch.full((9, 1), zero + 0.0), None, bits, 0)
    assert torch.equal(got.double(), x.double() @ (codes.double() - zero).T)


@pytest.mark.parametrize("m", [1, 2, 3, 14, 17, 40])
def test_results_are_the_same_on_every_instruction_set(m: int) -> None:
    """With fragments and without: each step is one rounding in one order."""
    if ops.why_plain is not None:
        pytest.skip(f"no compiled kernels: {ops.why_plain}")
    x = torch.randn(m, 1130)
    for bits, group in itertools.product(BITS, (32, 96, 544, 0)):
        q, scales, zeros, _ = torch.ops.mpqkern.quantize(torch.randn(70, 1130), bits, group, False)
        results = []
        for name in ops.ISAS[1:]:
            try:
                ops.isa(name)
            except RuntimeError:
                continue
            f = torch.ops.mpqkern.fragments(q, bits, 1130)
            how = (x, q, scales, zeros, None, bits, group, 8)
            results.append((torch.ops.mpqkern.linear(*how), torch.ops.mpqkern.linear_fragments(*how, None, f)))
        ops.isa("best")
        assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))
        assert torch.equal(*results[0])


@pytest.mark.parametrize("m", [1, 2, 3, 5, 40, 150])
def test_threads_do_not_matter(path: SimpleNamespace, linear: Callable[..., torch.Tensor], m: int) -> None:
    """Large enough that two threads do share it."""
    if path.name == "plain":
        pytest.skip("torch's own matmul")
    q, scales, zeros, _ = path.quantize(torch.randn(1500, 1024), 4, 64, False)
    x, results = torch.randn(m, 1024), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(linear(x, q, scales, zeros, None, 4, 64))
    assert all(torch.equal(results[0], r) for r in results[1:])
