"""The format: csrc/packed.h, mpqkern/packed.py and the reference agree on every byte."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpqkern import packed

from . import reference

BITS = (2, 4, 8)
# every N and K around the block of 32 and well past it, and larger ones now and then
SIZES = st.integers(1, 130) | st.integers(131, 700)
SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def codes_for(n: int, k: int, bits: int, seed: int = 0) -> torch.Tensor:
    """Random codes with both extremes present."""
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    codes[0, 0], codes[-1, -1] = 0, 2**bits - 1
    return codes


@pytest.mark.sanitize
@pytest.mark.parametrize("bits", BITS)
@given(n=SIZES, k=SIZES, seed=st.integers(0, 99))
@SETTINGS
def test_round_trip(path: SimpleNamespace, bits: int, n: int, k: int, seed: int) -> None:
    codes = codes_for(n, k, bits, seed)
    assert torch.equal(path.unpack(path.pack(codes, bits), bits, k), codes)


@pytest.mark.parametrize("bits", BITS)
def test_every_k_to_130_equals_the_reference(path: SimpleNamespace, bits: int) -> None:
    for k in range(1, 131):
        codes = codes_for(1 + k % 5, k, bits, k)
        got = path.pack(codes, bits)
        assert torch.equal(got, reference.pack(codes, bits)), k  # the padding codes are 0 there
        assert torch.equal(path.unpack(got, bits, k), codes), k


@pytest.mark.parametrize("bits", BITS)
def test_every_n_to_130(path: SimpleNamespace, bits: int) -> None:
    for n in range(1, 131):
        codes = codes_for(n, 1 + n % 45, bits, n)
        assert torch.equal(path.unpack(path.pack(codes, bits), bits, codes.shape[1]), codes), n


@pytest.mark.parametrize("bits", BITS)
def test_extreme_codes(path: SimpleNamespace, bits: int) -> None:
    for code in (0, 2**bits - 1):
        codes = torch.full((3, 77), code, dtype=torch.uint8)
        assert torch.equal(path.unpack(path.pack(codes, bits), bits, 77), codes)


@pytest.mark.sanitize
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [0, 32, 64, 128])
def test_dequantize_equals_the_reference(path: SimpleNamespace, bits: int, group: int) -> None:
    for k in (1, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 300):
        codes = codes_for(5, k, bits, k)
        groups = -(-k // group) if group else 1
        for zeros in (torch.rand(5, groups) * 3, torch.tensor([1.5])):
            for dtype in (torch.float16, torch.float32):
                s, z = torch.rand(5, groups).to(dtype), zeros.to(dtype)
                got = path.dequantize(path.pack(codes, bits), s, z, bits, group, k)
                want = reference.dequantize(codes, s, z, group)
                # two roundings, of the difference and of the product
                assert ((got.double() - want).abs() <= 2 * reference.U * want.abs()).all()
                assert torch.equal(got, packed.dequantize(path.pack(codes, bits), s, z, bits, group, k))


def test_no_zeros_is_the_symmetric_grid(path: SimpleNamespace) -> None:
    q = path.pack(torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8), 2)
    got = path.dequantize(q, torch.tensor([[2.0]]), None, 2, 0, 4)
    assert got.tolist() == [[-3.0, -1.0, 1.0, 3.0]]


def test_the_ternary_grid_is_a_zero_of_one(path: SimpleNamespace) -> None:
    q = path.pack(torch.tensor([[0, 1, 2, 1]], dtype=torch.uint8), 2)
    got = path.dequantize(q, torch.tensor([[0.5]]), torch.tensor([1.0]), 2, 0, 4)
    assert got.tolist() == [[-0.5, 0.0, 0.5, 0.0]]


@pytest.mark.parametrize("bits", BITS)
def test_padding_codes_contribute_nothing(path: SimpleNamespace, bits: int) -> None:
    """Bytes past K, set to all ones, change no result."""
    codes = codes_for(4, 33, bits)
    clean, dirty = path.pack(codes, bits), path.pack(codes, bits)
    full = path.unpack(dirty, bits, 64)
    full[:, 33:] = 2**bits - 1
    dirty = path.pack(full, bits)
    assert not torch.equal(clean, dirty)
    scales, x = torch.rand(4, 1), torch.randn(3, 33)
    for act_bits in (None, 8):
        a, b = (path.linear(x, q, scales, None, None, bits, 0, act_bits) for q in (clean, dirty))
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(6, 40), (6, 3, 2, 5)])
def test_weight_rows_round_trip(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    rows = packed.weight_rows(weight)
    assert rows.shape == (6, weight[0].numel())
    assert torch.equal(packed.weight_from_rows(rows.contiguous(), shape), weight)
    if len(shape) == 4:  # channels run fastest, then the kernel's columns
        assert rows[2, 3 * 4 + 1] == weight[2, 1, 0, 4]
