"""conv2d where its ways end: tails of vectors, bands, tiles; the largest integers; samples that are not finite."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mpqkern import ops, packed
from mpqkern.plain import quantize_activations

from . import reference
from .test_conv import problem

# channels in, out, groups, kernel, stride, padding, dilation, height, width
DEPTHWISE = [
    (16, 16, 16, (3, 3), (1, 1), (1, 1), (1, 1), 7, 7),  # one vector of channels, turned planes
    (33, 33, 33, (5, 5), (1, 1), (2, 2), (1, 1), 6, 9),  # a tail of one channel
    (40, 40, 40, (3, 3), (2, 2), (1, 1), (1, 1), 33, 35),  # rows in place when channels run fastest
    (32, 32, 32, (5, 5), (2, 2), (2, 2), (1, 1), 20, 41),  # rows copied
    (17, 17, 17, (3, 3), (1, 1), (0, 1), (1, 1), 16, 16),  # planes too large to be turned as floats
    (16, 16, 16, (7, 3), (3, 2), (3, 4), (1, 3), 19, 23),  # no kernel of its own
    (16, 16, 16, (2, 4), (1, 1), (5, 6), (2, 1), 3, 4),  # results that meet nothing but padding
    (3, 3, 3, (3, 3), (1, 1), (1, 1), (1, 1), 90, 110),  # several bands of a plane
    (64, 64, 64, (3, 3), (1, 1), (1, 1), (1, 1), 62, 50),  # several bands of rows
    (18, 36, 18, (3, 3), (1, 1), (1, 1), (1, 1), 8, 8),  # two results a channel
    (20, 20, 20, (3, 3), (1, 1), (1, 2), (1, 1), 23, 140),  # rows of several vectors of bytes
    (16, 16, 16, (3, 3), (2, 2), (1, 1), (1, 1), 9, 128),  # and nothing else
    (16, 16, 16, (3, 3), (1, 1), (1, 1), (1, 1), 3, 700),  # rows longer than what is turned at once
    (16, 16, 16, (2, 4), (1, 1), (5, 20), (2, 1), 3, 13),  # more padding than there are pixels
]
DENSE = [
    (32, 33, 1, (1, 1), (1, 1), (0, 0), (1, 1), 9, 15),  # pixels are patches
    (24, 70, 1, (1, 1), (1, 1), (0, 0), (1, 1), 5, 31),  # and padded to whole blocks
    (20, 65, 1, (1, 1), (2, 3), (0, 0), (1, 1), 10, 13),
    (48, 18, 3, (1, 1), (1, 1), (0, 0), (1, 1), 6, 11),
    (16, 13, 1, (3, 3), (1, 1), (0, 0), (1, 1), 12, 37),  # read in place
    (48, 50, 1, (3, 3), (1, 1), (1, 1), (1, 1), 8, 8),  # several blocks of k, a tail of a tile
    # Taps where they lie, with 8-bit activations: a row of several tiles, spans across taps, channels of a group, gaps.
    (16, 33, 1, (1, 3), (1, 1), (0, 1), (1, 1), 2, 600),
    (80, 40, 1, (3, 3), (2, 2), (1, 1), (1, 1), 11, 13),
    (96, 64, 2, (3, 2), (2, 1), (1, 1), (1, 2), 9, 14),
    (3, 64, 1, (7, 7), (2, 2), (3, 3), (1, 1), 40, 42),
    (64, 6, 2, (3, 3), (2, 1), (1, 2), (1, 2), 9, 14),
    # Output rows of one and two of the largest tiles; padding around each row, and above and below alone.
    (32, 40, 1, (3, 3), (1, 1), (1, 1), (1, 1), 5, 14),
    (16, 34, 1, (3, 1), (1, 1), (2, 0), (1, 1), 4, 28),
]
# Products of floats: pieces of a patch that take two products, k's that are decoded twice, a panel of one vector.
FLOATS = [
    (96, 40, 1, (3, 3), (1, 1), (1, 1), (1, 1), 5, 13),
    (160, 41, 1, (3, 3), (2, 1), (1, 2), (1, 2), 6, 7),
    (1200, 6, 1, (1, 1), (1, 1), (0, 0), (1, 1), 9, 8),
    (24, 50, 1, (1, 1), (1, 1), (0, 0), (1, 1), 23, 41),  # planes that are columns, in two parts
    (40, 100, 2, (1, 1), (1, 1), (0, 0), (1, 1), 8, 16),
    (1040, 7, 1, (1, 1), (1, 1), (0, 0), (1, 1), 12, 11),
    (3, 35, 1, (5, 5), (1, 2), (2, 2), (1, 1), 31, 50),  # patches are copied, in two parts
    (12, 70, 2, (3, 2), (1, 1), (1, 0), (2, 1), 9, 9),
    (1, 34, 1, (3, 3), (1, 1), (0, 0), (1, 1), 12, 12),
]
# At least 128 meetings of each activation: below that no sums of 16 bits start with what is taken from them.
BLOCKS = [
    (64, 20, 1, (3, 3), (1, 1), (1, 1), (1, 1), 7, 9),  # pixels of one block
    (128, 16, 1, (3, 3), (2, 1), (2, 3), (2, 3), 9, 13),  # of two, taps that lie apart
    (192, 130, 1, (1, 1), (1, 1), (0, 0), (1, 1), 5, 7),
    (200, 129, 1, (1, 1), (1, 1), (0, 0), (1, 1), 3, 11),  # the last block is shorter
    (64, 33, 1, (3, 3), (1, 2), (1, 1), (1, 1), 8, 11),  # pixels that do not lie side by side
    (64, 72, 1, (3, 3), (2, 2), (1, 1), (1, 1), 9, 12),
    (64, 66, 1, (2, 3), (1, 3), (1, 3), (1, 2), 6, 19),
    (20, 130, 1, (3, 3), (1, 1), (1, 1), (1, 1), 21, 19),  # copied, a few at a time
    (128, 260, 2, (3, 3), (1, 1), (1, 1), (1, 1), 6, 4),  # and in groups
]


def orders(x: torch.Tensor) -> list[torch.Tensor]:
    return [x, x.contiguous(memory_format=torch.channels_last)]


def geometry(case: tuple) -> dict[str, object]:
    return {"stride": case[4], "padding": case[5], "dilation": case[6], "groups": case[2]}


@pytest.mark.sanitize
@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("group,symmetric", [(0, True), (32, False)])
@pytest.mark.parametrize("case", DEPTHWISE + DENSE)
def test_tails(path: SimpleNamespace, case: tuple, group: int, symmetric: bool, act_bits: int | None) -> None:
    cin, cout, groups, kernel, stride, padding, dilation, height, width = case
    weight, w, k = problem(path, case, 4, group, symmetric)
    x, bias, how = torch.randn(2, cin, height, width), torch.randn(cout), geometry(case)
    exact = x.double()
    if act_bits:
        q, scale = quantize_activations(x.flatten(1), 0)
        exact = (q.double() * scale.double()).view(x.shape)
    want = F.conv2d(exact, w, bias.double(), **how)
    size = F.conv2d(exact.abs(), w.abs(), bias.double().abs(), **how)
    for y in orders(x):
        got = path.conv2d(y, *weight, bias, 4, group, kernel, stride, padding, dilation, groups, act_bits)
        factor = reference.a8_factor(k, group) if act_bits else (6 * k**0.5 + 2) * reference.U
        reference.assert_within(got, want, factor * size)


@pytest.mark.sanitize
@pytest.mark.parametrize("bits,group,symmetric", [(2, 0, True), (4, 64, False), (8, 32, False)])
@pytest.mark.parametrize("case", [*DENSE, *FLOATS])
def test_products_of_floats(path: SimpleNamespace, case: tuple, bits: int, group: int, symmetric: bool) -> None:
    """Each result is one chain of multiply-adds over k, whatever the way, the order of memory and the threads."""
    cin, cout, groups, kernel, stride, padding, dilation, height, width = case
    weight, w, k = problem(path, case, bits, group, symmetric)
    x, bias, how = torch.randn(3, cin, height, width), torch.randn(cout), geometry(case)
    want = F.conv2d(x.double(), w, bias.double(), **how).clamp_min(0)
    size = F.conv2d(x.double().abs(), w.abs(), bias.double().abs(), **how)
    rows = path.dequantize(*weight, bits, group, k)
    floats = packed.weight_from_rows(rows, (cout, cin // groups, *kernel))[None]
    results = []
    for threads, y in itertools.product((1, 3), orders(x)):
        torch.set_num_threads(threads)
        got = path.conv2d_activated(
            y, *weight, bias, bits, group, kernel, stride, padding, dilation, groups, None, None, None, "relu"
        )
        reference.assert_within(got, want, (6 * k**0.5 + 2) * reference.U * size)
        results += [got, path.probe_conv2d(y, floats, bias, stride, padding, dilation, groups)[0].clamp_min(0)]
    if path.name != "plain":
        assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.sanitize
@pytest.mark.parametrize("group", [0, 32, 64])
@pytest.mark.parametrize("case", BLOCKS)
def test_blocks_of_sums(path: SimpleNamespace, case: tuple, group: int) -> None:
    """Integers, and codes and activations at their limits: every step is exact in fp32, so results must be, too."""
    cin, cout, groups, kernel, stride, padding, dilation, height, width = case
    shape = (cout, cin // groups, *kernel)
    k = cin // groups * kernel[0] * kernel[1]
    x, bias = torch.randint(-127, 128, (4, cin, height, width)).float(), torch.randint(-99, 99, (cout,)).float()
    x[2], x[3] = 127, -127
    codes = torch.randint(0, 16, (cout, k), dtype=torch.uint8)
    codes[::3], codes[1::3] = 0, 15
    zeros = torch.randint(0, 64, (cout, -(-k // group) if group else 1)) / 4
    rows = codes - packed.spread(zeros, group, k)
    want = F.conv2d(x.double(), packed.weight_from_rows(rows, shape).double(), bias.double(), **geometry(case))
    weight, one, step = (path.pack(codes, 4), torch.ones_like(zeros), zeros), torch.ones(1), torch.tensor([2.0**12])
    how = (4, group, kernel, stride, padding, dilation, groups)
    rounded, fragments = (want / step).round().clamp(-127, 127), path.fragments(weight[0], 4, k)
    for threads, y in itertools.product((1, 3), orders(x)):
        torch.set_num_threads(threads)
        assert torch.equal(path.conv2d(y, *weight, bias, *how, 8, one).double(), want)
        for given in (y, y.to(torch.int8).contiguous(memory_format=torch.channels_last)):
            for panels in (None, fragments):
                got = path.conv2d_bytes(given, *weight, bias, *how, one, panels, None, step)
                assert torch.equal(got.double(), rounded) and got.unique().numel() > 9


@pytest.mark.sanitize
@pytest.mark.parametrize("cin,cout,groups,kernel", [(16, 16, 16, (16, 16)), (4, 4, 4, (17, 17)), (128, 3, 1, (3, 3))])
@pytest.mark.parametrize("zero", [0.0, 254.5, 100.25])
def test_largest_integers(
    path: SimpleNamespace, cin: int, cout: int, groups: int, kernel: tuple[int, int], zero: float
) -> None:
    """Every code and activation at its limit: no sum of products wraps, saturates or is rounded on its way."""
    k = cin // groups * kernel[0] * kernel[1]
    codes = torch.full((cout, k), 255 if zero < 128 else 0, dtype=torch.uint8)
    codes[:, -1] = 1
    weight = (path.pack(codes, 8), torch.ones(cout, 1), torch.tensor([zero]))
    for sign in (1, -1):
        x = torch.full((1, cin, kernel[0] + 1, kernel[1]), 127.0 * sign)
        want = 127 * sign * (codes[0].double() - zero).sum()
        for y in orders(x):
            got = path.conv2d(y, *weight, None, 8, 0, kernel, (1, 1), (0, 0), (1, 1), groups, 8, torch.ones(1))
            slack = 0 if groups > 1 else reference.a8_factor(k, 0) * want.abs()  # fp32 joins the spans of a long row
            reference.assert_within(got, want.expand(got.shape), slack)


UNMET = [  # the last row meets no tap
    (channels, channels, channels, (1, 1), (2, 2), (0, 0), (1, 1), side, side) for channels, side in ((16, 8), (17, 18))
]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("case", [*(DEPTHWISE[i] for i in (0, 2, 4, 5, 9, 10)), *UNMET, DENSE[0], DENSE[5], DENSE[9]])
def test_a_sample_that_is_not_finite_spoils_only_itself(path: SimpleNamespace, case: tuple, threads: int) -> None:
    torch.set_num_threads(threads)
    weight, _, _ = problem(path, case, 4, 0, True)
    x = torch.randn(4, case[0], *case[7:])
    x[1, -1, -1, -1], x[2, 0, 0, 0] = torch.nan, -torch.inf
    for y in orders(x):
        for scale in (None, torch.tensor([0.02])):
            got = path.conv2d(y, *weight, None, 4, 0, case[3], *case[4:7], case[2], 8, scale)
            assert got[1:3].isnan().all()
            alone = path.conv2d(y[::3], *weight, None, 4, 0, case[3], *case[4:7], case[2], 8, scale)
            assert alone.isfinite().all() and torch.equal(got[::3], alone)


@pytest.mark.parametrize("channels", [3, 16])
def test_rows_between_bands_that_meet_no_tap_count(path: SimpleNamespace, channels: int) -> None:
    """Every other row is left out by all results; sample i is not finite in the i-th of those."""
    case = (channels, channels, channels, (1, 1), (2, 2), (0, 0), (1, 1), 61, 201)
    weight, _, _ = problem(path, case, 4, 0, True)
    x = torch.randn(31, channels, 61, 201)
    for i in range(30):
        x[i, i % channels, 2 * i + 1, i] = torch.nan
    for y in orders(x):
        got = path.conv2d(y, *weight, None, 4, 0, case[3], *case[4:7], case[2], 8, torch.tensor([0.02]))
        assert got[:30].isnan().all() and got[30].isfinite().all()


@pytest.mark.parametrize("act_bits,scale", [(None, None), (8, None), (8, torch.tensor([0.02]))])
@pytest.mark.parametrize("case", [*DEPTHWISE[2:5], *DEPTHWISE[7:], DENSE[0], DENSE[4], DENSE[6]])
def test_any_number_of_threads_gives_the_same_bits(
    path: SimpleNamespace, case: tuple, act_bits: int | None, scale: torch.Tensor | None
) -> None:
    if path.name == "plain":
        pytest.skip("torch's own products may depend on threads")
    weight, _, _ = problem(path, case, 2, 0, False)
    for x in orders(torch.randn(3, case[0], *case[7:])):
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(path.conv2d(x, *weight, None, 2, 0, case[3], *case[4:7], case[2], act_bits, scale))
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("case", DEPTHWISE + DENSE + BLOCKS)
def test_every_instruction_set_gives_the_same_bits(case: tuple, group: int) -> None:
    if ops.why_plain is not None:
        pytest.skip(f"no compiled kernels: {ops.why_plain}")
    cin, cout, groups, kernel, stride, padding, dilation, height, width = case
    k = cin // groups * kernel[0] * kernel[1]
    q, scales, zeros, _ = torch.ops.mpqkern.quantize(torch.randn(cout, k), 4, group, True)
    args = (q, scales, zeros, torch.randn(cout), 4, group, kernel, stride, padding, dilation, groups, 8)
    inputs, results = orders(torch.randn(2, cin, height, width)), {}
    try:
        for name in ops.ISAS[1:]:
            try:
                ops.isa(name)
            except RuntimeError:  # this processor has it not
                continue
            results[name] = [torch.ops.mpqkern.conv2d(x, *args) for x in inputs]
    finally:
        ops.isa("best")
    for name, found in results.items():
        assert all(map(torch.equal, found, results["scalar"])), name


@pytest.mark.sanitize
@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("case", [DEPTHWISE[0], DEPTHWISE[4], DEPTHWISE[11], DENSE[0], DENSE[4]])
def test_views_that_share_or_skip_memory(path: SimpleNamespace, case: tuple, act_bits: int | None) -> None:
    """One sample, channel or row for all, every other column, and the last rows of a larger image."""
    weight, _, _ = problem(path, case, 4, 0, True)
    height, width = case[7:]
    x = torch.randn(2, case[0], height + 2, 2 * width)
    views = [x[:1, :, 2:, width:].expand(3, -1, -1, -1), x[:, :1, 2:, width:].expand(-1, case[0], -1, -1)]
    views.append(x[:, :1, 2:, width:].contiguous().expand(-1, case[0], -1, -1))
    row = x[:, :, :1, width:].expand(-1, -1, height, -1)
    for view in [*views, row, x[..., 2:, ::2], x[..., 2:, width:]]:
        args = (*weight, None, 4, 0, case[3], *case[4:7], case[2], act_bits)
        assert torch.equal(path.conv2d(view, *args), path.conv2d(view.contiguous(), *args))
