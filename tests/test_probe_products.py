"""probe_linear, probe_conv2d: many weights of one layer on the same inputs, to the bit as if they came one by one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mpqkern import ops, plain

from . import reference

# Rows around a panel of 32 and the 512 staged at once, N around a block of 48, K around a block of 512.
LINEAR = [(1, 1, 1), (3, 5, 7), (32, 48, 64), (33, 49, 513), (2, 100, 1030), (65, 11, 31), (515, 13, 40)]
# batch, channels, height, width, rows, kernel, stride, padding, dilation, groups
CONV = [
    (1, 1, 1, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (2, 3, 9, 11, 5, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (3, 6, 7, 7, 50, (3, 2), (2, 3), (2, 1), (1, 2), 1),
    (2, 8, 6, 9, 12, (3, 3), (2, 1), (1, 2), (1, 1), 4),
    (2, 5, 8, 8, 10, (3, 3), (1, 2), (1, 1), (2, 1), 5),
    (1, 70, 5, 6, 4, (3, 3), (1, 1), (0, 1), (1, 1), 1),
    (1, 2, 3, 4, 3, (2, 2), (9, 7), (1, 3), (1, 1), 1),
]
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def geometry(shape: tuple) -> tuple[list[int], list[int], list[int], int]:
    return [*shape[6]], [*shape[7]], [*shape[8]], shape[9]


def images(shape: tuple, variants: int, last: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, channels, height, width, n, kernel, groups = *shape[:6], shape[9]
    form = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(batch, channels, height, width).contiguous(memory_format=form)
    return x, torch.randn(variants, n, channels // groups, *kernel), torch.randn(n)


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", LINEAR)
def test_linear(path: SimpleNamespace, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    x, weights, bias = torch.randn(m, k), torch.randn(3, n, k), torch.randn(n)
    got = path.probe_linear(x, weights, bias)
    assert got.shape == (3, m, n)
    for y, w in zip(got, weights, strict=True):
        bound = reference.sum_bound(x, w, k)
        reference.assert_within(y, x.double() @ w.double().T + bias, bound + 2 * reference.U * bias.abs())


@pytest.mark.sanitize
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", CONV)
def test_conv(path: SimpleNamespace, shape: tuple, last: bool) -> None:
    x, weights, bias = images(shape, 3, last)
    how = geometry(shape)
    got = path.probe_conv2d(x, weights, bias, *how)
    k = weights[0, 0].numel()
    for y, w in zip(got, weights, strict=True):
        named = dict(zip(("stride", "padding", "dilation", "groups"), how, strict=True))
        want = reference.conv(x, w, bias, **named)
        size = reference.conv(x.abs(), w.abs(), bias.abs(), **named)
        reference.assert_within(y, want, (6 * k**0.5 + 2) * reference.U * size)
    if last and x.shape[1] > 1:
        assert got.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", TYPES)
def test_stacking_changes_no_bit(path: SimpleNamespace, dtype: torch.dtype) -> None:
    """All at once, one by one, and several streams of inputs together."""
    for m, n, k in LINEAR:
        x, weights, bias = torch.randn(m, k).to(dtype), torch.randn(4, n, k).to(dtype), torch.randn(n)
        together = path.probe_linear(x, weights, bias)
        assert torch.equal(together, torch.cat([path.probe_linear(x, w[None], bias) for w in weights]))
    for last in (False, True):
        for shape in CONV:
            x, weights, bias = images(shape, 4, last)
            x, weights, how = x.to(dtype), weights.to(dtype), geometry(shape)
            together = path.probe_conv2d(x, weights, bias, *how)
            assert torch.equal(together, torch.cat([path.probe_conv2d(x, w[None], bias, *how) for w in weights]))


def test_plain_is_a_loop_over_torch_layers() -> None:
    x, weights, bias = torch.randn(7, 30), torch.randn(3, 11, 30), torch.randn(11)
    want = torch.stack([F.linear(x, w, bias) for w in weights])
    assert torch.equal(plain.probe_linear(x, weights, bias), want)
    for shape in CONV:
        x, weights, bias = images(shape, 3)
        want = torch.stack([F.conv2d(x, w, bias, *geometry(shape)) for w in weights])
        assert torch.equal(plain.probe_conv2d(x, weights, bias, *geometry(shape)), want)


@pytest.mark.sanitize
def test_a_result_depends_on_its_row_and_input_only(path: SimpleNamespace) -> None:
    """Not on how many other rows, columns, pixels or threads there are: sums over k run in one order."""
    if path.name == "plain":
        pytest.skip("torch's own products choose an order by the shape")
    x, w = torch.randn(70, 1100), torch.randn(2, 60, 1100)
    whole = path.probe_linear(x, w)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(path.probe_linear(x, w), whole)
        assert torch.equal(path.probe_linear(x[5:9], w[1:, 10:15]), whole[1:, 5:9, 10:15])
        assert torch.equal(path.probe_linear(x[69], w[:, 59:]), whole[:, 69, 59:])
    image, w = torch.randn(4, 60, 12, 12), torch.randn(3, 50, 60, 3, 3)
    how = ([1, 1], [0, 0], [1, 1], 1)
    whole = path.probe_conv2d(image, w, None, *how)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.equal(path.probe_conv2d(image, w, None, *how), whole)
        assert torch.equal(path.probe_conv2d(image[1:2, :, 3:8, 2:9], w[2:, 7:9], None, *how),
                           whole[2:, 1:2, 7:9, 3:6, 2:7])  # fmt: skip


@pytest.mark.skipif(ops.why_plain is not None, reason="no compiled kernels")
def test_avx2_and_avx512_agree_to_the_bit() -> None:
    x, w, results = torch.randn(40, 700), torch.randn(2, 30, 700), []
    image, filters = torch.randn(2, 9, 8, 8), torch.randn(2, 20, 9, 3, 3)
    for isa in ("avx2", "avx512"):
        try:
            ops.isa(isa)
        except RuntimeError:
            pytest.skip(f"this processor has no {isa}")
        how = ([1, 1], [1, 1], [1, 1], 1)
        mpq = torch.ops.mpqkern
        results.append((mpq.probe_linear(x, w), mpq.probe_conv2d(image, filters, None, *how)))
        ops.isa("best")
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_shapes_of_inputs(path: SimpleNamespace) -> None:
    w, bias = torch.randn(3, 6, 20), torch.randn(12)[::2]
    x = torch.randn(2, 20, 5).transpose(1, 2)  # streams, rows, K: not contiguous
    want = torch.stack([x @ v.T + bias for v in w])
    got = path.probe_linear(x, w.mT.contiguous().mT, bias)
    assert got.shape == (3, 2, 5, 6) and torch.allclose(got, want, rtol=1e-4, atol=1e-5)
    assert torch.allclose(path.probe_linear(x[0, 0], w, bias), want[:, 0, 0], rtol=1e-4, atol=1e-5)
    assert path.probe_linear(x[:, :0], w).shape == (3, 2, 0, 6)
    assert path.probe_linear(x, w[:0]).shape == (0, 2, 5, 6)
    assert path.probe_linear(x, w[:, :0]).shape == (3, 2, 5, 0)
    image, filters = torch.randn(2, 4, 6, 6), torch.randn(3, 5, 4, 3, 3)
    how = ([1, 1], [0, 0], [1, 1], 1)
    assert path.probe_conv2d(image[:0], filters, None, *how).shape == (3, 0, 5, 4, 4)
    assert path.probe_conv2d(image, filters[:0], None, *how).shape == (0, 2, 5, 4, 4)
    turned = image.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(path.probe_conv2d(turned, filters, None, *how), path.probe_conv2d(image, filters, None, *how))


LINEAR_ERRORS = [
    ((torch.ones(2, 5, dtype=torch.int32), torch.ones(1, 3, 5), None), r"x .*; wanted float32, float16 or bfloat16"),
    ((torch.ones(2, 0), torch.ones(1, 3, 0), None), "x .*; wanted .* K at least 1"),
    ((torch.ones(2, 5), torch.ones(3, 5), None), r"weights .*; wanted float32 \[V, N, 5\]"),
    ((torch.ones(2, 5), torch.ones(1, 3, 4), None), r"weights .*; wanted float32 \[V, N, 5\]"),
    ((torch.ones(2, 5), torch.ones(1, 3, 5).half(), None), r"weights .*; wanted float32 \[V, N, 5\]"),
    ((torch.ones(2, 5), torch.ones(1, 3, 5), torch.ones(4)), r"bias .*wanted .*\[3\]"),
]
PLAIN_CONV = ([1, 1], [0, 0], [1, 1], 1)
CONV_ERRORS = [
    ((torch.ones(4, 6, 6), torch.ones(1, 2, 4, 3, 3), None, *PLAIN_CONV), r"x .*\[batch, channels, height, width\]"),
    ((torch.ones(1, 4, 6, 6), torch.ones(2, 4, 3, 3), None, *PLAIN_CONV), r"weights .*; wanted float32 \[V, N, chann"),
    ((torch.ones(1, 4, 6, 6), torch.ones(1, 2, 4, 3, 3).half(), None, *PLAIN_CONV), "weights .*; wanted float32"),
    ((torch.ones(1, 4, 6, 6), torch.ones(1, 2, 3, 3, 3), None, *PLAIN_CONV), "weights .*; wanted 4 channels"),
    ((torch.ones(1, 4, 6, 6), torch.ones(1, 3, 2, 3, 3), None, *PLAIN_CONV[:3], 2), "groups=2; wanted a divisor of w"),
    ((torch.ones(1, 4, 6, 6), torch.ones(1, 3, 2, 3, 3), None, *PLAIN_CONV[:3], 3), "groups=3; wanted a divisor of x"),
    ((torch.ones(1, 4, 6, 6), torch.ones(1, 2, 4, 3, 3), torch.ones(3), *PLAIN_CONV), r"bias .*wanted .*\[2\]"),
    ((torch.ones(1, 4, 6, 6), torch.ones(1, 2, 4, 3, 3), None, [0, 1], *PLAIN_CONV[1:]), "stride.*0"),
    ((torch.ones(1, 4, 6, 2), torch.ones(1, 2, 4, 3, 3), None, *PLAIN_CONV), "x.*kernel"),
]


@pytest.mark.parametrize("op,args,message", [("probe_linear", *e) for e in LINEAR_ERRORS]
                         + [("probe_conv2d", *e) for e in CONV_ERRORS])  # fmt: skip
def test_errors(op: str, args: tuple, message: str) -> None:
    for module in (torch.ops.mpqkern, plain):
        with pytest.raises((RuntimeError, ValueError), match=f"mpqkern::{op}: {message}"):
            getattr(module, op)(*args)
