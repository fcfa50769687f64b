"""linear: fp32 sums within a derived bound, integer sums exactly, whatever the shape."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from . import reference

BITS = (2, 4, 8)
# Rows around the kernels' 4-row tiles, the step from register decoding to panels at 12 or 24, and a panel of 32.
ROWS = (0, 1, 2, 3, 4, 5, 11, 12, 23, 24, 25, 31, 32, 33, 65)
KS = (1, 31, 32, 33, 64, 96, 127, 130, 545)
NS = (1, 2, 3, 5, 49, 97)


def problem(path: SimpleNamespace, n: int, k: int, bits: int, group: int, symmetric: bool) -> tuple[torch.Tensor, ...]:
    """Codes with both extremes, scales, zeros, and the packed weight."""
    q, scales, zeros, _ = path.quantize(torch.randn(n, k), bits, group, symmetric)
    codes = path.unpack(q, bits, k)
    codes[0, 0], codes[-1, -1] = 0, 2**bits - 1
    return codes, path.pack(codes, bits), scales, zeros


@pytest.mark.sanitize
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "group,symmetric", [(0, True), (32, False), (32, True), (128, True), (64, False), (256, False)]
)
def test_shapes(path: SimpleNamespace, bits: int, group: int, symmetric: bool) -> None:
    for i, k in enumerate(KS):
        for n in NS[i % 3 :: 3]:
            codes, q, scales, zeros = problem(path, n, k, bits, group, symmetric)
            w, bias = reference.dequantize(codes, scales, zeros, group), torch.randn(n)
            for m in ROWS[i % 2 :: 2]:
                x = torch.randn(m, k)
                got = path.linear(x, q, scales, zeros, bias, bits, group)
                want = x.double() @ w.T + bias
                reference.assert_within(
                    got, want, reference.sum_bound(x, w, k) + 2 * reference.U * (x.double().abs() @ w.abs().T)
                )


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("bits,group", [(2, 64), (2, 128), (4, 128)])
def test_what_lies_past_the_last_group_counts_nothing(path: SimpleNamespace, bits: int, group: int, m: int) -> None:
    """Not even where a row's zeros, which follow its scales there, are so large that a weight made of them is none."""
    n, k = 5, 576
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    groups = -(-k // group)
    scales, zeros = torch.full((n, groups), 2e-38), torch.full((n, groups), 2e38)
    x = torch.randn(m, k)
    got = path.linear(x, path.pack(codes, bits), scales, zeros, None, bits, group)
    w = reference.dequantize(codes, scales, zeros, group)
    reference.assert_within(got, x.double() @ w.T, reference.sum_bound(x, w, k) + 1e-5 * x.double().abs() @ w.abs().T)


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("bits", BITS)
def test_activations_near_the_end_of_floats(path: SimpleNamespace, bits: int, m: int) -> None:
    """A sum of them times codes would be past it; times weights it is not."""
    n, k = 5, 256
    codes = torch.full((n, k), 2**bits - 1, dtype=torch.uint8)
    scales, x = torch.full((n, k // 64), 1e-9), torch.full((m, k), 3e38)
    got = path.linear(x, path.pack(codes, bits), scales, None, None, bits, 64)
    w = reference.dequantize(codes, scales, torch.full((1,), (2**bits - 1) / 2), 64)
    reference.assert_within(got, x.double() @ w.T, reference.sum_bound(x, w, k) + 1e-6 * x.double().abs() @ w.abs().T)


@pytest.mark.sanitize
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group,symmetric", [(0, True), (32, False), (64, True)])
def test_int8_activations_are_exact(path: SimpleNamespace, bits: int, group: int, symmetric: bool) -> None:
    for i, k in enumerate(KS):
        n = NS[i % len(NS)]
        codes, q, scales, zeros = problem(path, n, k, bits, group, symmetric)
        bias = torch.randn(n)
        for m in ROWS[1::2]:
            x = torch.randn(m, k)
            got = path.linear(x, q, scales, zeros, bias, bits, group, 8)
            want = reference.linear_a8(x, codes, scales, zeros, group)
            size = x.double().abs() + x.double().abs().amax(1, keepdim=True) / 254  # rounded activations at most
            size = size @ reference.dequantize(codes, scales, zeros, group).abs().T
            slack = reference.a8_factor(k, group) * size + reference.U * bias.abs()
            reference.assert_within(got, want + bias, slack)


def test_int8_does_not_saturate(path: SimpleNamespace) -> None:
    """All codes and activations at the top, where 16-bit pair sums of full-range bytes would overflow; and all codes at
    the bottom, the largest of 8 bits where they are taken less 128."""
    for bits in BITS:
        for code, zero in ((2**bits - 1, 0), (0, 1)):
            q, scales = path.pack(torch.full((5, 70000), code, dtype=torch.uint8), bits), torch.ones(5, 1)
            x = torch.full((2, 70000), 3.0)
            x[1] = -3.0
            got = path.linear(x, q, scales, torch.full((1,), float(zero)), None, bits, 0, 8)
            want = torch.tensor([[1.0], [-1.0]]) * 3.0 * 70000 * (code - zero)
            assert torch.allclose(got, want.expand(2, 5), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 7, 40, 400])
def test_half_activations(path: SimpleNamespace, dtype: torch.dtype, m: int) -> None:
    codes, q, scales, zeros = problem(path, 33, 130, 4, 32, False)
    w, bias = reference.dequantize(codes, scales, zeros, 32), torch.randn(33, dtype=dtype)
    x = torch.randn(m, 130).to(dtype)
    got = path.linear(x, q, scales, zeros, bias, 4, 32)
    want = x.double() @ w.T + bias.double()
    # a path may round the weights to the activations' type
    bound = reference.sum_bound(x, w, 130) + torch.finfo(dtype).eps / 2 * (x.double().abs() @ w.abs().T)
    reference.assert_within(got, want, bound, dtype)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_results_are_rounded_to_nearest_even(path: SimpleNamespace, dtype: torch.dtype) -> None:
    """One weight of exactly 1, so that a result is x + bias: every bit pattern of x, and biases that make ties."""
    q = path.pack(torch.ones(9, 1, dtype=torch.uint8), 8)
    bits = torch.arange(-(2**15), 2**15, 7, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype).unsqueeze(1)
    bias = torch.tensor([0, 2.0**-9, 2.0**-8, 3 * 2.0**-9, 2.0**-12, 2.0**-11, 3 * 2.0**-12, 1.0, 1e-7])
    for rows in x.split(11):  # few enough to stay on the kernels
        got = path.linear(rows, q, torch.ones(9, 1), torch.zeros(1), None if path.name == "plain" else bias, 8, 0)
        want = (rows.float() + (0 if path.name == "plain" else bias)).to(dtype).expand(-1, 9)
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(), want.nan_to_num())


def test_batch_dimensions_and_strides(path: SimpleNamespace) -> None:
    _, q, scales, zeros = problem(path, 10, 45, 4, 32, True)
    bias = torch.randn(20)[::2]
    x = torch.randn(3, 45, 4).transpose(1, 2)  # not contiguous
    want = path.linear(x.reshape(-1, 45), q, scales, zeros, bias.contiguous(), 4, 32)
    close = {"rtol": 1e-5, "atol": 1e-5}
    assert torch.allclose(path.linear(x, q, scales, zeros, bias, 4, 32), want.view(3, 4, 10), **close)
    assert torch.allclose(path.linear(x[0, 0], q, scales, zeros, bias, 4, 32), want[0], **close)
    wide = torch.zeros(10, 2 * q.shape[1], dtype=torch.uint8)
    wide[:, ::2] = q
    assert torch.allclose(
        path.linear(x, wide[:, ::2], scales.T.contiguous().T, zeros, bias, 4, 32), want.view(3, 4, 10), **close
    )
    assert path.linear(x[:, :0], q, scales, zeros, bias, 4, 32).shape == (3, 0, 10)


@pytest.mark.parametrize("m", [1, 20])
@pytest.mark.parametrize("act_bits", [None, 8])
def test_nan_and_infinity_reach_their_row_and_no_other(path: SimpleNamespace, m: int, act_bits: int | None) -> None:
    _, q, scales, zeros = problem(path, 6, 45, 4, 0, True)
    for value in (torch.nan, torch.inf):
        x = torch.randn(m + 1, 45)
        x[0, 44] = value
        y = path.linear(x, q, scales, zeros, None, 4, 0, act_bits)
        assert not y[0].isfinite().any() and y[1:].isfinite().all()


def test_results_do_not_depend_on_threads_or_repetition(path: SimpleNamespace) -> None:
    _, q, scales, zeros = problem(path, 500, 300, 4, 64, False)
    for m in (1, 5, 40):
        for act_bits in (None, 8):
            x = torch.randn(m, 300)
            results = []
            for threads in (1, 2, 3, 1):
                torch.set_num_threads(threads)
                results.append(path.linear(x, q, scales, zeros, None, 4, 64, act_bits))
            if path.name != "plain":  # plain is torch's own matmul
                assert all(torch.equal(results[0], r) for r in results[1:])
