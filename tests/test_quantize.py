"""quantize: the grid that min-max or the MSE search chooses, its codes and its error."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mpqkern import plain

from . import reference

BITS = (2, 4, 8)
GRIDS = [(g, s) for g in (0, 32, 128) for s in (True, False)]


def unpacked(path: SimpleNamespace, w: torch.Tensor, bits: int, group: int, *rest: object) -> tuple[torch.Tensor, ...]:
    q, scales, zeros, errors = path.quantize(w, bits, group, *rest)
    codes = path.unpack(q, bits, w.shape[1])
    return codes, scales, zeros, errors, reference.dequantize(codes, scales, zeros, group)


def assert_codes_and_grids_equal_plain(path: SimpleNamespace, *args: object) -> None:
    *got, error = path.quantize(*args)
    *want, exact = plain.quantize(*args)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.allclose(error, exact, rtol=2.0**-18, atol=0)


@pytest.mark.sanitize
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group,symmetric", GRIDS)
def test_minmax_rounds_to_the_nearest_code(path: SimpleNamespace, bits: int, group: int, symmetric: bool) -> None:
    w = torch.randn(7, 150)
    codes, scales, zeros, errors, back = unpacked(path, w, bits, group, symmetric)
    step = scales.double().repeat_interleave(group or 160, 1)[:, :150]
    # half a step, and what rounding scale and zero to fp16 moves the ends of the range by
    slack = step * (2**bits) * 2.0**-11 * 2
    assert ((w.double() - back).abs() <= step / 2 + slack).all()
    assert zeros.shape == ((1,) if symmetric else scales.shape) and scales.dtype == torch.float16
    total = (w.double() - back).square().sum()
    assert abs(errors.double().sum() - total) <= 1e-6 * total
    assert codes.min() == 0 and codes.max() == 2**bits - 1


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group,symmetric", GRIDS)
def test_minmax_equals_plain_to_the_bit(path: SimpleNamespace, bits: int, group: int, symmetric: bool) -> None:
    w = torch.randn(9, 131) * torch.logspace(-3, 3, 9).unsqueeze(1)
    for dtype in ("float16", "float32"):
        assert_codes_and_grids_equal_plain(path, w, bits, group, symmetric, "minmax", dtype)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_weights_next_to_half_a_code_round_as_the_division_does(
    path: SimpleNamespace, bits: int, symmetric: bool, dtype: str
) -> None:
    """A product with 1 / scale would put some of them on the other side."""
    w = torch.rand(40, 300) * 2 - 1
    w[:, 0], w[:, 1] = torch.rand(40) + 1, -torch.rand(40) - 1  # they set the range
    _, scale, zero, _ = plain.quantize(w, bits, 0, symmetric, "minmax", dtype)
    half = torch.randint(0, 2**bits - 1, (40, 298)) + 0.5
    w[:, 2:] = (half.double() - zero.double().view(-1, 1)).mul(scale.double()).float().clamp(-1, 1)
    for _ in range(3):
        assert_codes_and_grids_equal_plain(path, w, bits, 0, symmetric, "minmax", dtype)
        w[:, 2:] = torch.nextafter(w[:, 2:], torch.tensor(torch.inf))


@pytest.mark.sanitize
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_mse_beats_minmax_and_every_searched_range(path: SimpleNamespace, bits: int, symmetric: bool) -> None:
    w = torch.randn(6, 256)
    w[:, 3] *= 4  # an outlier, worth clipping at few bits
    errors = path.quantize(w, bits, 64, symmetric, "mse")[3]
    assert (errors <= path.quantize(w, bits, 64, symmetric, "minmax")[3] * (1 + 1e-6)).all()
    best = torch.full_like(errors, torch.inf)
    for i in range(plain.FRACTIONS):  # the search, one fraction at a time: quantize what a clamp leaves
        f = 1 - i * plain.FRACTION_STEP
        groups = w.view(6, 4, 64)
        lo, hi = groups.amin(-1, True).clamp(max=0) * f, groups.amax(-1, True).clamp(min=0) * f
        if symmetric:
            hi = torch.maximum(groups.abs().amax(-1, True) * f, hi)
            lo = -hi
        scale = ((hi - lo) / (2**bits - 1)).half().float()
        zero = torch.full_like(scale, (2**bits - 1) / 2) if symmetric else (-lo / scale).half().float()
        codes = (groups / scale + zero).clamp(0, 2**bits - 1).round()
        best = torch.minimum(best, (groups - scale * (codes - zero)).square().sum(-1))
    assert ((errors - best).abs() <= 1e-3 * best + 1e-9).all()


def test_mse_wins_much_at_two_bits(path: SimpleNamespace) -> None:
    w = torch.randn(4, 512)
    mse, minmax = (path.quantize(w, 2, 0, True, search)[3].sum() for search in ("mse", "minmax"))
    assert mse < 0.75 * minmax


def test_special_rows(path: SimpleNamespace) -> None:
    w = torch.zeros(4, 40)
    w[1] = 3.0  # constant
    w[2] = -2.0
    w[3, 5] = 1e-30  # below what fp16 can scale
    for symmetric in (True, False):
        for search in ("minmax", "mse"):
            _, _, _, errors, back = unpacked(path, w, 4, 32, symmetric, search)
            assert (back[0] == 0).all() and back.isfinite().all()
            assert (back - w).abs().max() <= 3 * 2.0**-10
            assert errors.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(path: SimpleNamespace, value: float) -> None:
    w = torch.randn(5, 40)
    w[3, 39] = value
    with pytest.raises((ValueError, RuntimeError), match=r"row 3 of weight is not finite.*wanted finite weights"):
        path.quantize(w, 4, 0, True)


def test_fp16_scales_that_would_overflow_are_refused(path: SimpleNamespace) -> None:
    w = torch.full((2, 32), 1e9)
    with pytest.raises((ValueError, RuntimeError), match="scale_dtype='float32' allows larger ones"):
        path.quantize(w, 4, 0, True)
    back = unpacked(path, w, 4, 0, True, "minmax", "float32")[-1]
    assert torch.allclose(back.float(), w)


def test_fp16_scales_are_rounded_to_nearest_even(path: SimpleNamespace) -> None:
    """Ties of normal and subnormal numbers, their neighbours, and the ends of the range."""
    n = torch.arange(1, 60, dtype=torch.float64)
    wanted = torch.cat([1 + (n + 0.5) / 1024, (n + 0.5) * 2.0**-24, n * 2.0**-25, torch.tensor([65504.0, 65519.0])])
    wanted = torch.cat([wanted, wanted * (1 + 2.0**-20), wanted * (1 - 2.0**-20)]).float()
    scales = path.quantize(wanted.unsqueeze(1) * 1.5, 2, 0, True)[1]
    assert torch.equal(scales.squeeze(1), (wanted * 1.5 / 1.5).half())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights(path: SimpleNamespace, dtype: torch.dtype) -> None:
    w = torch.randn(5, 70).to(dtype)
    for a, b in zip(path.quantize(w, 4, 32, False), path.quantize(w.float(), 4, 32, False), strict=True):
        assert torch.equal(a, b)


def test_no_rows(path: SimpleNamespace) -> None:
    q, scales, _, errors = path.quantize(torch.empty(0, 40), 4, 32, True)
    assert q.shape == (0, 32) and scales.shape == errors.shape == (0, 2)
