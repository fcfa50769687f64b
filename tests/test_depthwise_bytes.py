"""Depthwise convolutions of 8-bit activations: sums are exact, whatever the filter, its zeros and its edges."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

LAST, ONE = torch.channels_last, torch.ones(1)
KERNELS = [
    (1, 1),
    (2, 1),
    pytest.param((3, 3), marks=pytest.mark.sanitize),
    (1, 4),
    pytest.param((5, 5), marks=pytest.mark.sanitize),
    (3, 6),
    (7, 7),
    pytest.param((4, 9), marks=pytest.mark.sanitize),
]
STEPS = [  # stride, padding, dilation
    ((1, 1), (0, 0), (1, 1)),
    ((1, 1), (2, 3), (2, 1)),
    ((2, 2), (1, 1), (1, 1)),
    ((1, 2), (4, 6), (2, 1)),
    ((2, 1), (0, 5), (1, 2)),
    ((1, 3), (1, 1), (1, 1)),
]
ZEROS = {
    2: (1.5, 0.0, 2.0, 70.0),
    4: (7.5, 0.0, 15.0, 3.25, 32.0, 50.0, 100.0),
    8: (127.5, 128.0, 64.5, 190.5, 64.0, 191.5, 0.0, 255.0, 40.25),
}


def integers(*shape: int) -> Tensor:
    """Of 8 bits, most of them as large as can be."""
    return torch.where(torch.rand(shape) < 0.6, torch.randn(shape).sign() * 127, torch.randint(-127, 128, shape))


@pytest.mark.parametrize("stride,padding,dilation", STEPS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_sums_are_exact(path: SimpleNamespace, kernel: tuple, stride: tuple, padding: tuple, dilation: tuple) -> None:
    """Scales of 1: each result is the sum itself, from any order of memory, floats or bytes."""
    taps = kernel[0] * kernel[1]
    for channels, width in ((16, 24), (35, 29), (40, 31)):
        x = integers(2, channels, 21, width)
        for bits, zeros in ZEROS.items():
            codes = torch.randint(2**bits, (channels, taps), dtype=torch.uint8)
            codes[:5] = 2**bits - 1
            codes[5:8] = 0
            for zero in zeros:
                w = (codes.double() - torch.tensor(zero).double()).view(channels, 1, *kernel)
                bias = torch.randint(-500, 500, (channels,)).float()
                how = (bias, stride, padding, dilation, channels)
                want = F.conv2d(x.double(), w, bias.double(), *how[1:]).float()
                packed = (path.pack(codes, bits), torch.ones(channels, 1), torch.tensor([zero]), bias)
                geometry = (bits, 0, kernel, stride, padding, dilation, channels)
                last = x.contiguous(memory_format=LAST)
                for images in (x, last):
                    assert torch.equal(path.conv2d(images, *packed, *geometry, 8, ONE), want), (bits, zero)
                q = last.to(torch.int8)
                assert torch.equal(path.conv2d_bytes(q, *packed, *geometry, ONE, None, None, None), want), (bits, zero)
                small = path.conv2d_bytes(q, *packed, *geometry, ONE, None, None, torch.tensor([64.0]))
                assert torch.equal(small, (want / 64).round().clamp(-127, 127).to(torch.int8)), (bits, zero)


@pytest.mark.parametrize("stride,width", [((2, 1), 400), ((1, 2), 401), ((1, 1), 900)])
def test_bands_of_rows(path: SimpleNamespace, stride: tuple[int, int], width: int) -> None:
    """So large that rows are worked on in several bands, planes and channels side by side."""
    channels, kernel, padding, dilation = 35, (5, 3), (3, 1), (2, 1)
    x, codes = integers(1, channels, 60, width), torch.randint(16, (channels, 15), dtype=torch.uint8)
    want = F.conv2d(x.double(), (codes - 7.5).double().view(-1, 1, *kernel), None, stride, padding, dilation, channels)
    packed = (path.pack(codes, 4), torch.ones(channels, 1), torch.tensor([7.5]), None)
    how = (4, 0, kernel, stride, padding, dilation, channels)
    last = x.contiguous(memory_format=LAST)
    for images in (x, last):
        assert torch.equal(path.conv2d(images, *packed, *how, 8, ONE), want.float())
    small = path.conv2d_bytes(last.to(torch.int8), *packed, *how, ONE, None, None, torch.tensor([32.0]))
    assert torch.equal(small, (want / 32).round().clamp(-127, 127).to(torch.int8))


@pytest.mark.parametrize("zeros", [[7.5, 0.0], [0.0, 200.0], [3.0, 7.25]])
def test_each_channel_has_its_zero(path: SimpleNamespace, zeros: list[float]) -> None:
    codes, x = torch.randint(16, (32, 9), dtype=torch.uint8), integers(2, 32, 12, 13)
    zero = torch.tensor(zeros * 16)[:, None]
    want = F.conv2d(x.double(), (codes - zero).double().view(32, 1, 3, 3), None, 1, 1, 1, 32).float()
    packed, how = (path.pack(codes, 4), torch.ones(32, 1), zero, None), (4, 0, (3, 3), (1, 1), (1, 1), (1, 1), 32, 8)
    for images in (x, x.contiguous(memory_format=LAST)):
        assert torch.equal(path.conv2d(images, *packed, *how, ONE), want)


@pytest.mark.parametrize("scale", [1.0, 0.7, 3e-5])
def test_halves_are_rounded_to_even(path: SimpleNamespace, scale: float) -> None:
    """As the quotient is, also right beside them; what lies beyond 127 is cut, however far."""
    codes, s = torch.full((16, 1), 3, dtype=torch.uint8), torch.tensor([scale])
    halves = (torch.arange(-140, 140) + 0.5) * s
    beside = torch.cat([halves.nextafter(torch.tensor(torch.inf)), halves, halves.nextafter(torch.tensor(-torch.inf))])
    far = torch.tensor([127.49, 1e3, 5e6, 9e6, 1.2e7, 12582912.0, 2e7, 1e20, 3e38 * min(scale, 1)]) * s
    x = torch.cat([beside, far, -far, torch.zeros(30)])
    x = x[: len(x) // 32 * 32].view(-1, 1, 4, 8).expand(-1, 16, -1, -1)
    want = (x / s).round().clamp(-127, 127)
    packed, how = (path.pack(codes, 2), 1 / s.expand(16, 1), torch.zeros(1), None), (2, 0, (1, 1), (1, 1), (0, 0))
    for images in (x, x.contiguous(memory_format=LAST)):
        got = path.conv2d(images, *packed, *how, (1, 1), 16, 8, s)
        torch.testing.assert_close(got / 3, want, rtol=1e-6, atol=0)
