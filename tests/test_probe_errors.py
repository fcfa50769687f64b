"""probe_errors: what rounding costs each group of a weight, at every width and range."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mpqkern import ops, plain

from . import reference

WIDTHS = [1, 2, 3, 4, 5, 6, 7, 8]
FRACTIONS = torch.tensor([1.0, 0.8, 0.55, 0.2])
SEARCHED = torch.stack([torch.ones(()) - torch.ones(()) * i * plain.FRACTION_STEP for i in range(plain.FRACTIONS)])


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 32, 128])
def test_errors_are_those_of_the_grid(path: SimpleNamespace, group: int, symmetric: bool, dtype: str) -> None:
    for k in (1, 7, 8, 16, 31, 33, 257, 600):
        w = torch.randn(4, k) * torch.logspace(-2, 2, 4).unsqueeze(1)
        got = path.probe_errors(w, WIDTHS, group, symmetric, FRACTIONS, dtype)
        how = (group, symmetric)
        want = torch.stack([
            torch.stack([reference.rounding_error(w, b, *how, f, getattr(torch, dtype)) for f in FRACTIONS], -1)
            for b in WIDTHS
        ])  # fmt: skip
        # plain PyTorch works in fp64; kernels square and add in fp32, 8 to a lane
        reference.assert_within(got, want, (1e-12 if path.name == "plain" else 2.0**-19) * want)


@pytest.mark.sanitize
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_errors_equal_those_of_quantize_to_the_bit(path: SimpleNamespace, bits: int, symmetric: bool) -> None:
    w = torch.randn(5, 290)
    w[:, 7] *= 5
    for group in (0, 64):
        for dtype in ("float16", "float32"):
            errors = path.probe_errors(w, [bits], group, symmetric, SEARCHED, dtype)[0]
            for search, want in (("minmax", errors[..., 0]), ("mse", errors.amin(-1))):
                assert torch.equal(path.quantize(w, bits, group, symmetric, search, dtype)[3], want)


@pytest.mark.sanitize
def test_every_path_gives_the_same_errors(path: SimpleNamespace) -> None:
    """Every instruction set to the bit, so that the MSE search chooses alike; plain PyTorch up to fp32's rounding."""

    def results(module: object) -> list[torch.Tensor]:
        out = []
        for k in (1000, 1, 33, 47):
            w = torch.randn(6, k, generator=torch.Generator().manual_seed(k)) * torch.logspace(-4, 3, 6).unsqueeze(1)
            for symmetric in (True, False):
                for group in (0, 32):
                    out.append(module.probe_errors(w, WIDTHS, group, symmetric, FRACTIONS, "float32"))
                    out.extend(module.quantize(w, 2, group, symmetric, "mse"))
        return out

    got, wanted = results(path), results(plain)
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, rtol=2.0**-18, atol=0) if a.dtype == torch.float32 else torch.equal(a, b)
    if path.name != "plain":
        ops.isa("scalar")
        assert all(torch.equal(a, b) for a, b in zip(got, results(path), strict=True))


def test_weights_near_the_grid_and_far_from_one(path: SimpleNamespace) -> None:
    """Differences that fp32 would lose: weights a few units of their last place off their codes' values."""
    for dtype in ("float16", "float32"):
        for w in (torch.randn(6, 500), torch.rand(6, 500) - 1e-4, torch.rand(6, 500) * 1e-6 - 1e-9):
            _, scale, zero, _ = plain.quantize(w, 8, 0, False, "minmax", dtype)
            codes = (w / scale.float() + zero.float()).round().clamp(0, 255).double()
            near = (scale.double() * (codes - zero.double())).float()
            near[:, 0], near[:, 1] = w.amin(1), w.amax(1)  # the same range, so the same grid
            for bits in ([8], [4]):
                args = (near, bits, 0, False, FRACTIONS[:1], dtype)
                assert torch.allclose(path.probe_errors(*args), plain.probe_errors(*args), rtol=2.0**-18, atol=0)


def test_rows_of_nothing_and_single_values(path: SimpleNamespace) -> None:
    w = torch.zeros(3, 40)
    w[1] = 3.0
    for symmetric in (True, False):
        errors = path.probe_errors(w, [2, 8], 32, symmetric, FRACTIONS)
        assert errors.shape == (2, 3, 2, 4) and not errors[:, 0].any()
        assert (errors[:, 1, :, 0] <= (3 * 2.0**-10) ** 2 * 32).all()
    assert path.probe_errors(torch.empty(0, 40), [2, 8], 32, True, FRACTIONS).shape == (2, 0, 2, 4)
    assert path.probe_errors(w, [], 0, True, FRACTIONS).shape == (0, 3, 1, 4)
    assert path.probe_errors(w, [2], 0, True, FRACTIONS[:0]).shape == (1, 3, 1, 0)


def test_half_and_strided_weights(path: SimpleNamespace) -> None:
    for w in (torch.randn(5, 70).bfloat16(), torch.randn(5, 70).half(), torch.randn(70, 5).T):
        a, b = (path.probe_errors(v, [3], 32, False, FRACTIONS) for v in (w, w.float().contiguous()))
        assert torch.equal(a, b)


def test_errors_do_not_depend_on_threads(path: SimpleNamespace) -> None:
    w, results = torch.randn(300, 700), []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        results.append(path.probe_errors(w, [2, 4], 64, False, FRACTIONS))
    assert all(torch.equal(results[0], r) for r in results[1:])


def test_bad_weights_and_bad_arguments(path: SimpleNamespace) -> None:
    w, one = torch.randn(5, 70), torch.ones(1)
    wrong, op = (RuntimeError, ValueError), "mpqkern::probe_errors: "
    for value, place in ((torch.nan, 3), (torch.inf, 69), (-torch.inf, 64)):
        spoilt = w.clone()
        spoilt[3, place] = value
        with pytest.raises(wrong, match=op + "row 3 of weight is not finite.*wanted finite weights"):
            path.probe_errors(spoilt, [4], 32, True, one)
    large = torch.full((2, 40), 1e5)
    assert path.probe_errors(large, [8], 0, True, one).isfinite().all()  # a scale of 784 fits fp16
    with pytest.raises(wrong, match=op + "row 0 .*scale_dtype='float32' allows larger ones"):
        path.probe_errors(large, [8, 1], 0, True, one)  # one of 200000 does not
    cases = [
        ((w[0], [4], 0, True, one), r"weight .*wanted float32, float16 or bfloat16 \[N, K\]"),
        ((w, [4, 9], 0, True, one), r"bits.* 9.*wanted 1\.\.8"),
        ((w, [0], 0, True, one), r"bits.*0.*wanted 1\.\.8"),
        ((w, [4], 33, True, one), "group_size=33; wanted a multiple of 32, or 0"),
        ((w, [4], 0, True, one.double()), r"fractions .*wanted float32 \[F\]"),
        ((w, [4], 0, True, torch.tensor([1.0, 0.0])), "fractions.*0.*wanted above 0, at most 1"),
        ((w, [4], 0, True, torch.tensor([torch.nan])), "fractions.*nan.*wanted above 0, at most 1"),
        ((w, [4], 0, True, torch.tensor([1.5])), "fractions.*1.5.*wanted above 0, at most 1"),
        ((w, [4], 0, True, one, "int8"), "scale_dtype='int8'; wanted 'float16' or 'float32'"),
    ]
    for args, message in cases:
        with pytest.raises(wrong, match=op + message):
            path.probe_errors(*args)
