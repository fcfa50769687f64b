"""conv2d: every stride, padding, dilation and group, both memory orders, both kinds of activations."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mpqkern import packed
from mpqkern.plain import quantize_activations

from . import reference

# channels in, out, groups, kernel, stride, padding, dilation, height, width
CASES = [
    (3, 8, 1, (3, 3), (1, 1), (1, 1), (1, 1), 9, 10),
    (16, 33, 1, (3, 3), (2, 2), (1, 1), (1, 1), 14, 13),
    (16, 16, 16, (3, 3), (1, 1), (1, 1), (1, 1), 7, 7),  # depthwise
    (6, 12, 6, (5, 5), (2, 1), (2, 2), (1, 2), 17, 12),  # depthwise, two results a channel
    (8, 16, 4, (5, 3), (2, 2), (2, 2), (2, 1), 17, 9),
    (12, 18, 6, (1, 3), (1, 1), (0, 1), (1, 1), 8, 40),
    (64, 50, 1, (1, 1), (1, 1), (0, 0), (1, 1), 5, 7),
    (40, 7, 1, (2, 2), (3, 3), (0, 0), (1, 1), 11, 11),
    (4, 5, 1, (3, 3), (1, 1), (4, 4), (1, 1), 2, 1),  # more padding than image
    (8, 4, 1, (1, 1), (1, 1), (2, 0), (1, 1), 1, 5),  # a row of pixels between padding alone
    (1, 6, 1, (3, 3), (1, 1), (1, 1), (1, 1), 28, 28),
    (5, 9, 1, (3, 2), (2, 1), (1, 0), (1, 2), 12, 11),
    (6, 10, 2, (2, 3), (1, 3), (0, 2), (2, 1), 9, 16),
    (20, 100, 1, (3, 3), (1, 1), (1, 1), (3, 3), 6, 6),  # dilation wider than the image
]


def problem(path: SimpleNamespace, case: tuple, bits: int, group: int, symmetric: bool) -> tuple:
    cin, cout, groups, kernel, *_ = case
    w = torch.randn(cout, cin // groups, *kernel)
    q, scales, zeros, _ = path.quantize(packed.weight_rows(w).contiguous(), bits, group, symmetric)
    k = w[0].numel()
    codes = path.unpack(q, bits, k)
    rows = reference.dequantize(codes, scales, zeros, group)
    return (q, scales, zeros), packed.weight_from_rows(rows, tuple(w.shape)), k


def images(case: tuple, batch: int) -> list[torch.Tensor]:
    """The same picture as NCHW, as channels-last, and as a view with odd strides."""
    x = torch.randn(batch, case[0], case[7], case[8])
    view = torch.randn(batch, case[0] + 1, case[7] + 2, case[8] * 2)[:, 1:, 1:-1, ::2]
    view.copy_(x)
    return [x, x.contiguous(memory_format=torch.channels_last), view]


@pytest.mark.sanitize
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("case", CASES)
def test_cases(path: SimpleNamespace, case: tuple, bits: int) -> None:
    _, cout, groups, kernel, stride, padding, dilation, *_ = case
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    weight, w, k = problem(path, case, bits, 32, bits == 4)
    bias = torch.randn(cout)
    for x in images(case, 3):
        got = path.conv2d(x, *weight, bias, bits, 32, kernel, stride, padding, dilation, groups)
        want = reference.conv(x, w, bias, **how)
        size = reference.conv(x.abs(), w.abs(), None, **how)
        reference.assert_within(got, want, (6 * k**0.5 + 2) * reference.U * size)
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        assert got.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.sanitize
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("case", CASES)
def test_int8_activations(path: SimpleNamespace, case: tuple, bits: int) -> None:
    _, cout, groups, kernel, stride, padding, dilation, *_ = case
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    weight, w, _ = problem(path, case, bits, 64, bits != 4)
    bias = torch.randn(cout)
    for x in images(case, 2):
        got = path.conv2d(x, *weight, bias, bits, 64, kernel, stride, padding, dilation, groups, 8)
        q, scale = quantize_activations(x.flatten(1), 0)
        assert (q.abs().amax(1) == 127).all()
        exact = (q.double() * scale.double()).view(x.shape)
        want = F.conv2d(exact, w, bias.double(), **how)
        size = F.conv2d(exact.abs(), w.abs(), bias.double().abs(), **how)
        reference.assert_within(got, want, reference.a8_factor(w[0].numel(), 64) * size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_activations(path: SimpleNamespace, dtype: torch.dtype) -> None:
    case = CASES[1]
    weight, w, _ = problem(path, case, 4, 0, True)
    x = torch.randn(2, 16, 14, 13).to(dtype)
    got = path.conv2d(x, *weight, None, 4, 0, case[3], case[4], case[5], case[6], 1)
    how = {"stride": case[4], "padding": case[5], "dilation": case[6]}
    size = reference.conv(x.abs(), w.abs(), None, **how)
    reference.assert_within(got, reference.conv(x, w, None, **how), torch.finfo(dtype).eps * size, dtype)


def test_large_planes_share_work_over_threads(path: SimpleNamespace) -> None:
    """Many tiles, few tiles, and fewer tiles than threads, where output channels are split too."""
    for cin, cout, size in ((8, 16, 70), (200, 130, 6), (3, 500, 3)):
        case = (cin, cout, 1, (3, 3), (1, 1), (1, 1), (1, 1), size, size)
        weight, w, k = problem(path, case, 4, 0, True)
        x = torch.randn(2, cin, size, size)
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(path.conv2d(x, *weight, None, 4, 0, (3, 3), (1, 1), (1, 1), (1, 1), 1))
        sums = reference.conv(x.abs(), w.abs(), None, padding=1)
        for got in results:
            reference.assert_within(got, reference.conv(x, w, None, padding=1), (6 * k**0.5 + 2) * reference.U * sums)
        if path.name != "plain":
            assert torch.equal(*results)


def test_empty_batch(path: SimpleNamespace) -> None:
    case = CASES[0]
    weight, _, _ = problem(path, case, 4, 0, True)
    x = torch.randn(0, 3, 9, 10)
    for act_bits in (None, 8):
        assert path.conv2d(x, *weight, None, 4, 0, (3, 3), (1, 1), (1, 1), (1, 1), 1, act_bits).shape == (0, 8, 9, 10)
