"""Fixed activation scales in the ops: the integers of a ten-line reference, saturation, bad values, gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mpqkern import packed, plain

from . import reference
from .test_conv import CASES, images
from .test_linear import BITS, KS, NS, ROWS
from .test_linear import problem as linear_problem

mpq = torch.ops.mpqkern
CONV = ((3, 3), (1, 1), (1, 1), (1, 1), 1)


def fixed_scales(groups: int) -> list[torch.Tensor]:
    """For standard normal values: some saturate, half of them do; one for all and one a group."""
    each = torch.linspace(0.004, 0.03, groups)
    return [torch.tensor([0.015]), torch.tensor([0.66 / 127]), each]


@pytest.mark.sanitize
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group,symmetric", [(0, True), (32, False), (64, True)])
def test_linear_is_exact(path: SimpleNamespace, bits: int, group: int, symmetric: bool) -> None:
    for i, k in enumerate(KS):
        n = NS[i % len(NS)]
        codes, q, scales, zeros = linear_problem(path, n, k, bits, group, symmetric)
        bias = torch.randn(n)
        for m in ROWS[i % 2 :: 3]:
            x = torch.randn(m, k)
            for fixed in fixed_scales(scales.shape[1]):
                got = path.linear(x, q, scales, zeros, bias, bits, group, 8, fixed)
                want = reference.linear_a8(x, codes, scales, zeros, group, fixed)
                size = reference.dequantize(codes, scales, zeros, group).abs().sum(1) * 127 * fixed.max().double()
                slack = reference.a8_factor(k, group) * size + reference.U * bias.abs()
                reference.assert_within(got, want + bias, slack)


@pytest.mark.sanitize
def test_integers_to_the_last_one(path: SimpleNamespace) -> None:
    """An asymmetric weight of 1 at one place: the result is that input's integer, ties and saturation included."""
    codes = torch.eye(33, dtype=torch.uint8)
    values = torch.tensor([0.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.0, 127.4, 127.5, 128.0, -127.5, -128.0, 1e30])
    largest = torch.tensor([torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max, 1e-45, -1e-45, 126.49])
    x = torch.cat([values, largest, torch.linspace(-140, 140, 14)])
    want = [max(-127, min(127, round(v))) for v in x.tolist()]  # Python rounds halves to even as well
    for scale in (1.0, 2.0**-20, 2.0**20):
        args = (path.pack(codes, 8), torch.ones(33, 1), torch.zeros(1), None, 8, 0, 8, torch.tensor([scale]))
        finite = torch.where((x * scale).isfinite(), x * scale, x)
        got = path.linear(finite, *args) / scale
        exact = want if scale == 1 else [max(-127, min(127, round(v / scale))) for v in finite.tolist()]
        assert got.tolist() == exact


@pytest.mark.sanitize
@pytest.mark.parametrize("groups", [1, 24])
@pytest.mark.parametrize("scale", [0.0123, 1 / 3, 2.0**-60, 3e-39, 2.0**120])
def test_convolutions_round_quotients_next_to_halves(path: SimpleNamespace, scale: float, groups: int) -> None:
    """A weight of 1: results are integers times the scale. Quotients a few roundings from a half, and far too large."""
    if groups == 1:
        weight = path.pack(torch.eye(24, dtype=torch.uint8), 8), torch.ones(24, 1), torch.zeros(1)
    else:
        weight = path.pack(torch.ones(24, 1, dtype=torch.uint8), 8), torch.ones(24, 1), torch.zeros(1)
    near = torch.arange(-129, 130).double() + 0.5
    x = torch.cat([near * (1 + i * 2.0**-24) for i in range(-6, 7)]) * scale
    top = torch.finfo(torch.float32).max
    x = torch.cat([x.float(), torch.tensor([3e6, -3e6, 1e9]) * scale, torch.tensor([top, -top])])
    x = x.clamp(-top, top)[torch.randperm(len(x))[: len(x) // 24 * 24]].repeat(3).view(1, 24, 3, -1)
    fixed = torch.tensor([scale])
    want = (x / fixed).clamp(-127, 127).round() * fixed
    for y in (x, x.contiguous(memory_format=torch.channels_last)):
        got = path.conv2d(y, *weight, None, 8, 0, (1, 1), (1, 1), (0, 0), (1, 1), groups, 8, fixed)
        assert torch.equal(got, want)


@pytest.mark.sanitize
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("case", CASES)
def test_conv_is_exact(path: SimpleNamespace, case: tuple, bits: int) -> None:
    cin, cout, groups, kernel, stride, padding, dilation, *_ = case
    shape = (cout, cin // groups, *kernel)
    q, scales, zeros, _ = path.quantize(packed.weight_rows(torch.randn(shape)).contiguous(), bits, 64, bits != 4)
    rows = reference.dequantize(path.unpack(q, bits, shape[1] * kernel[0] * kernel[1]), scales, zeros, 64)
    w, bias, fixed = packed.weight_from_rows(rows, shape), torch.randn(cout), torch.tensor([0.012])
    for x in images(case, 2):
        got = path.conv2d(x, q, scales, zeros, bias, bits, 64, kernel, stride, padding, dilation, groups, 8, fixed)
        exact = (x / fixed).clamp(-127, 127).round().double() * fixed.double()
        how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        size = F.conv2d(exact.abs(), w.abs(), bias.double().abs(), **how)
        bound = reference.a8_factor(rows.shape[1], 64) * size
        reference.assert_within(got, F.conv2d(exact, w, bias.double(), **how), bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [0, 32])
def test_the_maximum_as_fixed_scale_is_dynamic_to_the_bit(
    path: SimpleNamespace, group: int, dtype: torch.dtype
) -> None:
    for trial in range(20):
        _, q, scales, zeros = linear_problem(path, 9, 130, 4, group, False)
        x = (torch.randn(1, 130) * 10.0 ** (trial % 7 - 3)).to(dtype)
        tops = torch.stack([part.abs().amax() for part in x[0].float().split(group or 130)])
        for args in ((q, scales, zeros, None, 4, group, 8), (q, scales, zeros, torch.randn(9), 4, group, 8)):
            assert torch.equal(path.linear(x, *args, tops / 127), path.linear(x, *args))
    q, scales, zeros, _ = path.quantize(torch.randn(5, 36), 2, 32, True)
    image = torch.randn(1, 4, 7, 6).to(dtype)
    args = (image, q, scales, zeros, None, 2, 32, *CONV, 8)
    assert torch.equal(path.conv2d(*args, image.float().abs().amax().view(1) / 127), path.conv2d(*args))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_activations_are_rounded_as_their_fp32_values(path: SimpleNamespace, dtype: torch.dtype) -> None:
    _, q, scales, zeros = linear_problem(path, 33, 130, 4, 32, False)
    x, fixed = torch.randn(7, 130).to(dtype), torch.tensor([0.01])
    want = path.linear(x.float(), q, scales, zeros, None, 4, 32, 8, fixed)
    assert torch.equal(path.linear(x, q, scales, zeros, None, 4, 32, 8, fixed), want.to(dtype))


def test_nan_and_infinity_reach_their_row_or_sample_and_no_other(path: SimpleNamespace) -> None:
    _, q, scales, zeros = linear_problem(path, 6, 45, 4, 0, True)
    cq, cs, cz, _ = path.quantize(torch.randn(5, 27), 4, 0, True)
    for value in (torch.nan, torch.inf, -torch.inf):
        x, image = torch.randn(5, 45), torch.randn(3, 3, 5, 4)
        x[1, 44] = image[2, 0, 4, 3] = value
        y = path.linear(x, q, scales, zeros, None, 4, 0, 8, torch.tensor([0.02]))
        assert y[1].isnan().all() and y[[0, 2, 3, 4]].isfinite().all()
        y = path.conv2d(image, cq, cs, cz, None, 4, 0, *CONV, 8, torch.tensor([0.02]))
        assert y[2].isnan().all() and y[:2].isfinite().all()


@pytest.mark.parametrize("scale,shown", [(0.0, 0.0), (-1.0, 0.0), (torch.nan, torch.nan), (torch.inf, torch.nan)])
def test_a_scale_that_is_no_scale_gives_zeros_or_nan(path: SimpleNamespace, scale: float, shown: float) -> None:
    _, q, scales, zeros = linear_problem(path, 6, 45, 4, 0, True)
    y = path.linear(torch.randn(3, 45), q, scales, zeros, None, 4, 0, 8, torch.tensor([scale]))
    assert torch.equal(y.isnan(), torch.full((3, 6), shown != shown)) and not y.nan_to_num().any()
    for groups in (1, 16):
        cq, cs, cz, _ = path.quantize(torch.randn(16, 144 // groups), 4, 0, True)
        for layout in (torch.contiguous_format, torch.channels_last):
            image = torch.randn(2, 16, 5, 4).to(memory_format=layout)
            y = path.conv2d(image, cq, cs, cz, None, 4, 0, *CONV[:4], groups, 8, torch.tensor([scale]))
            assert bool(y.isnan().all() if shown != shown else not y.any())


def test_gradients_stop_where_values_saturate() -> None:
    q, s, z, _ = mpq.quantize(torch.randn(12, 70), 4, 32, False)
    w, x = mpq.dequantize(q, s, z, 4, 32, 70), torch.randn(5, 70)
    fixed = torch.tensor([0.004, 0.01, 0.02])
    limit = (127.5 * fixed).repeat_interleave(32)[:70]
    seed = torch.randn(5, 12)
    for act_scale, inside in ((fixed, x.abs() < limit), (fixed[:1], x.abs() < limit[0]), (None, x.abs() < torch.inf)):
        x.requires_grad_()
        (got,) = torch.autograd.grad(mpq.linear(x, q, s, z, None, 4, 32, 8, act_scale), x, seed)
        assert torch.allclose(got, (seed @ w) * inside, atol=1e-5) and (act_scale is None or not inside.all())
    cq, cs, cz, _ = mpq.quantize(torch.randn(5, 36), 4, 0, True)
    image = torch.randn(2, 4, 7, 6, requires_grad=True)
    dynamic, static = (
        torch.autograd.grad(mpq.conv2d(image, cq, cs, cz, None, 4, 0, *CONV, 8, scale).sum(), image)[0]
        for scale in (None, torch.tensor([0.01]))
    )
    assert torch.equal(static, dynamic * (image.abs() < 1.275)) and not torch.equal(static, dynamic)


def test_gradients_of_gradients_stop_there_too() -> None:
    q, s, z, _ = mpq.quantize(torch.randn(6, 40), 8, 0, True)
    x = (torch.randn(3, 40) * 2).requires_grad_()
    scale = torch.tensor([0.01])
    y = mpq.linear(x, q, s, z, None, 8, 0, 8, scale)
    (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert second.any() and not second[x.abs() > 1.28].any()


def test_one_home_of_the_arithmetic() -> None:
    x = torch.tensor([[0.2, -0.6, 5.0, -0.1]])
    q, scale = plain.quantize_activations(x, 0, 3, torch.tensor([0.2]))
    assert q.tolist() == [[1, -3, 3, 0]] and torch.equal(scale, torch.tensor([[0.2]]))
