"""DAQ's quantizer: its table of steps, its formulas, and the order of errors that it exists for."""

from __future__ import annotations

import pytest
import torch

from mpqkern.activations.gauss import gauss_quantize
from mpqkern.measuring.observers import STEPS


def normal_error(step: torch.Tensor, bits: int) -> torch.Tensor:
    """E (x - q(x))^2 of N(0, 1) for each step, from closed integrals over the positive cells."""
    count = 2 ** (bits - 1)
    cells = torch.arange(count, dtype=torch.float64)
    low = cells * step.unsqueeze(1)
    high = torch.cat([low[:, 1:], torch.full_like(low[:, :1], 40.0)], 1)
    level = (cells + 0.5) * step.unsqueeze(1)
    density = lambda t: torch.exp(-t * t / 2) / (2 * torch.pi) ** 0.5  # noqa: E731
    below = torch.special.ndtr
    mass = below(high) - below(low)
    first = density(low) - density(high)
    second = mass + low * density(low) - high * density(high)
    return 2 * (second - 2 * level * first + level**2 * mass).sum(1)


@pytest.mark.parametrize("bits", STEPS)
def test_the_table_holds_the_best_steps_for_a_normal_distribution(bits: int) -> None:
    steps = STEPS[bits] * torch.linspace(0.9, 1.1, 401, dtype=torch.float64)
    best = float(steps[normal_error(steps, bits).argmin()])
    assert STEPS[bits] == pytest.approx(best, rel=0.01)


def heavy(seed: int = 0) -> torch.Tensor:
    """Laplacian channels of very different means and spreads."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(3, 16, 48, 48, generator=generator) - 0.5
    x = -u.sign() * (1 - 2 * u.abs()).clamp(min=1e-6).log()
    spread, mean = torch.logspace(-1, 0.5, 16).view(1, -1, 1, 1), torch.linspace(-1, 1, 16).view(1, -1, 1, 1)
    return (x + mean) * spread


def min_max(x: torch.Tensor, bits: int, dims: tuple[int, ...]) -> torch.Tensor:
    low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return ((x - low) / step).round() * step + low


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_errors_fall_from_tensor_to_channel_to_gauss(bits: int) -> None:
    x = heavy()
    found = [min_max(x, bits, (0, 1, 2, 3)), min_max(x, bits, (2, 3)), gauss_quantize(x, bits)]
    tensor, channel, gauss = (float((q - x).square().sum()) for q in found)
    assert tensor > 1.2 * channel and channel > 1.2 * gauss


def test_signed_channels_follow_the_formula() -> None:
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64) + 1
    for bits, wide in ((3, True), (4, False), (1, False), (8, True)):
        got = gauss_quantize(x, bits, wide=wide)
        for sample in range(2):
            for channel in range(3):
                v = x[sample, channel]
                step, top = STEPS[bits - wide] * v.std(correction=0), 2**bits / 2 - 0.5
                want = (((v - v.mean()) / step + 0.5).round() - 0.5) * step
                want = want.clamp(-top * step, top * step) + v.mean()
                assert torch.allclose(got[sample, channel], want, atol=1e-5)
                assert len(got[sample, channel].unique()) <= 2**bits


def test_rectified_channels_keep_their_zeros() -> None:
    x = torch.randn(2, 3, 9, 9).relu()
    x[0, 1] = 0
    for bits, wide in ((4, True), (2, False)):
        got = gauss_quantize(x, bits, wide=wide)
        for v, q in zip(x.flatten(0, 1), got.flatten(0, 1), strict=True):
            step = STEPS[bits - wide] * v[v > 0].std(correction=0) if (v > 0).any() else torch.ones(())
            assert torch.allclose(q, (v / step).round().clamp(0, 2**bits - 1) * step, atol=1e-6)
        assert not got[x == 0].any()


def test_groups_of_32_channels_share_their_deviation() -> None:
    x = torch.randn(2, 40, 4, 4) * torch.linspace(0.5, 2, 40).view(-1, 1, 1)
    got = gauss_quantize(x, 3, granularity="group")
    for part in (slice(0, 32), slice(32, 40)):  # the second is filled up with channels that count for nothing
        merged = gauss_quantize(x[:, part].reshape(2, 1, -1, 4), 3)
        assert torch.allclose(got[:, part], merged.view_as(x[:, part]), atol=1e-5)


def test_rounded_deviations_cost_little() -> None:
    x = heavy()
    exact, rounded = (float((gauss_quantize(x, 4, std_bits=bits) - x).square().mean()) for bits in (None, 4))
    assert exact != rounded < 2 * exact
    steps = [float(c.unique().diff().amax()) for c in gauss_quantize(x[:1], 2, std_bits=2)[0]]
    assert len({round(s, 4) for s in steps}) <= 5  # 4 levels, and the least deviation that stands in for those below


def test_types_constants_and_nothing() -> None:
    x = torch.randn(1, 2, 4, 4)
    assert gauss_quantize(x.bfloat16(), 4).dtype == torch.bfloat16
    assert torch.equal(gauss_quantize(torch.full((1, 2, 3, 3), 1.5), 4), torch.full((1, 2, 3, 3), 1.5))
    assert gauss_quantize(torch.zeros(0, 2, 3, 3), 4).shape == (0, 2, 3, 3)
    assert torch.equal(gauss_quantize(torch.zeros(1, 2, 3, 3), 4), torch.zeros(1, 2, 3, 3))


def test_errors() -> None:
    x = torch.randn(1, 2, 4, 4)
    with pytest.raises(ValueError, match=r"x is torch.float32 \[2, 4\]; wanted floats \[batch"):
        gauss_quantize(x[0, :, 0], 4)
    with pytest.raises(ValueError, match="granularity='row'; wanted 'channel' or 'group'"):
        gauss_quantize(x, 4, granularity="row")
    with pytest.raises(ValueError, match=r"bits=1; wanted a whole number from 2 to 9 with wide=True"):
        gauss_quantize(x, 1)
    with pytest.raises(ValueError, match=r"std_bits=9; wanted a whole number from 1 to 8 with wide=False"):
        gauss_quantize(x, 4, wide=False, std_bits=9)
