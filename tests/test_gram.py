"""gram and orthogonality: inner products of samples, whatever shape and order their features have."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mpqkern import plain

from . import reference

# Samples around the tiles (2, 3 or 5 rows, groups of two), columns around a vector, a chunk of 512 and 16 slices.
SAMPLES = (1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 13, 32, 33, 70)
COLUMNS = (1, 7, 15, 16, 17, 511, 512, 513, 1025, 8200, 16500)


def assert_gram(path: SimpleNamespace, features: list[torch.Tensor], center: bool) -> None:
    got = path.gram(features, center)
    assert got.shape == (len(features), features[0].shape[0], features[0].shape[0])
    for k, x in zip(got, features, strict=True):
        reference.assert_within(k, *reference.gram(x, center), torch.float64)
        assert torch.equal(k, k.T)


@pytest.mark.sanitize
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("n", SAMPLES)
def test_shapes(path: SimpleNamespace, n: int, center: bool) -> None:
    assert_gram(path, [torch.randn(n, p) + 3 for p in COLUMNS[n % 2 :: 2]], center)


@pytest.mark.sanitize
@pytest.mark.parametrize("n", [1, 6, 12])
def test_element_types_together(path: SimpleNamespace, n: int) -> None:
    features = [torch.randn(n, 3, p).to(t) for p in (5, 171, 400) for t in (torch.bfloat16, torch.float16)]
    assert_gram(path, [*features, torch.randn(n, 20)], True)
    assert_gram(path, [*features, torch.randn(n)], False)


@pytest.mark.sanitize
@pytest.mark.parametrize("center", [True, False])
def test_bf16(path: SimpleNamespace, center: bool) -> None:
    """Odd columns, and around a vector of pairs and a chunk of 1024; offsets that centring has to survive."""
    for n in (*range(1, 12), 33, 70):
        for p, offset in ((1, 0), (31, 100), (33, 0), (1023, 3), (2049, 100)):
            assert_gram(path, [(torch.randn(n, p) + offset).bfloat16()], center)
    image = torch.randn(7, 5, 9, 11).bfloat16()
    assert_gram(path, [image, image.contiguous(memory_format=torch.channels_last), image[..., ::2]], center)


@pytest.mark.sanitize
def test_bf16_means_that_only_some_samples_or_columns_have(path: SimpleNamespace) -> None:
    """The first 1024 columns have no offset and the rest have; all but one sample lie close together."""
    late = torch.randn(9, 3000)
    late[:, 1024:] += 100
    close = 8 + torch.randn(9, 2000) / 32
    close[4] += 200
    assert_gram(path, [late.bfloat16(), close.bfloat16()], True)


@pytest.mark.sanitize
def test_layouts(path: SimpleNamespace) -> None:
    """Every order of dense samples is the same feature, samples may lie apart, and others are copied."""
    x = torch.randn(6, 5, 7, 9)
    wide = torch.randn(12, 5, 7, 9)
    last = x.contiguous(memory_format=torch.channels_last)
    turned = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    apart, holes, copied = wide[::2], torch.randn(6, 5, 7, 18)[..., ::2], x[:1].expand(6, -1, -1, -1)
    assert_gram(path, [x, last, turned, apart, holes, copied, x.transpose(0, 1)[:, :, 0].transpose(0, 1)], True)
    assert_gram(path, [holes, apart], False)
    assert_gram(path, [wide.permute(1, 0, 2, 3)], True)


def test_dense_samples_are_read_where_they_are(path: SimpleNamespace) -> None:
    if path.name == "plain":
        pytest.skip("plain PyTorch converts to fp64")
    big = torch.randn(8, 64, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.profiler.profile(profile_memory=True) as profile:
        path.gram([big])
    assert sum(e.cpu_memory_usage for e in profile.events() if e.cpu_memory_usage > 0) < 4096


def test_no_columns(path: SimpleNamespace) -> None:
    assert not path.gram([torch.empty(5, 0), torch.empty(5, 3, 0, 2)]).any()


def test_many_samples(path: SimpleNamespace) -> None:
    assert_gram(path, [torch.randn(n, 700) for n in (1024,)], True)


def test_constant_features_are_nothing_and_offsets_do_not_matter(path: SimpleNamespace) -> None:
    constant = torch.full((7, 1), 0.1) * torch.rand(1, 900)
    assert not path.gram([constant]).any()
    x = torch.randint(-8, 9, (10, 600)).float()
    assert torch.allclose(path.gram([x + 2.0**15]), path.gram([x]), rtol=1e-12)


def test_nan_and_infinity_show(path: SimpleNamespace) -> None:
    for value in (torch.nan, torch.inf):
        x = torch.randn(5, 40)
        x[2, 33] = value
        assert not path.gram([x])[0].isfinite().any()
        k = path.gram([x], False)[0]
        assert not k[2].isfinite().any() and k[:2, :2].isfinite().all() and k[3:, 3:].isfinite().all()
        for debiased in (False, True):
            m = path.orthogonality([x, torch.randn(5, 4)], True, debiased)
            assert m[0].isnan().all() and m[1, 1] == 1


@pytest.mark.sanitize
def test_results_do_not_depend_on_threads_or_repetition(path: SimpleNamespace) -> None:
    if path.name == "plain":
        pytest.skip("torch's own products")
    for n, p in ((5, 9000), (32, 20000), (33, 700)):
        x = [torch.randn(n, p), torch.randn(n, p).half(), torch.randn(n, p).bfloat16()]
        results = []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append((path.gram(x), path.orthogonality(x)))
        assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


# ---- orthogonality


@pytest.mark.sanitize
@pytest.mark.parametrize("center,debiased", [(True, False), (False, False), (True, True), (False, True)])
def test_orthogonality(path: SimpleNamespace, center: bool, debiased: bool) -> None:
    base = torch.randn(12, 300)
    features = [torch.randn(12, p).relu() for p in (1, 10, 2000)] + [base, base @ torch.randn(300, 40), base.relu()]
    grams = [reference.gram(x, center or debiased)[0] for x in features]
    inner = torch.tensor([[reference.hsic(a, b, debiased) for b in grams] for a in grams], dtype=torch.float64)
    want = inner / (inner.diag().sqrt().unsqueeze(1) * inner.diag().sqrt())
    got = path.orthogonality(features, center, debiased)
    assert got.dtype == torch.float64 and torch.allclose(got, want, rtol=0, atol=1e-5)
    assert torch.equal(got, got.T) and (got.diagonal() == 1).all()
    assert got.max() <= 1 + 1e-12 and got.min() >= (-1 if debiased else 0) - 1e-12


def test_orthogonality_is_the_norm_of_the_cross_product(path: SimpleNamespace) -> None:
    x, y = torch.randn(9, 30, dtype=torch.float64), torch.randn(9, 50, dtype=torch.float64)
    norm = torch.linalg.matrix_norm
    want = norm(y.T @ x) ** 2 / (norm(x.T @ x) * norm(y.T @ y))
    assert torch.allclose(path.orthogonality([x.float(), y.float()], False)[0, 1], want, rtol=1e-5)


def test_rotations_and_scales_do_not_matter(path: SimpleNamespace) -> None:
    x, turn = torch.randn(8, 60), torch.linalg.qr(torch.randn(60, 60)).Q
    m = path.orthogonality([x, x @ turn, 100 * x, torch.randn(8, 5)])
    assert torch.allclose(m[:3, :3], torch.ones(3, 3, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(m[3, :3], m[3, 0].expand(3), atol=1e-5)


@pytest.mark.parametrize("debiased", [True, False])
def test_features_that_hold_nothing_are_orthogonal_to_all(path: SimpleNamespace, debiased: bool) -> None:
    nothing = [torch.zeros(6, 5), torch.full((6, 3), 0.1), torch.empty(6, 0)]
    alike = [torch.eye(6)] if debiased else []  # all pairs of samples equally far apart: unbiased, that is nothing
    m = path.orthogonality([*nothing, *alike, torch.randn(6, 40)], True, debiased)
    assert torch.equal(m, torch.eye(len(m), dtype=torch.float64))


def test_debiased_noise_averages_to_nothing(path: SimpleNamespace) -> None:
    features = [torch.randn(8, 4000) for _ in range(40)]
    for debiased, low, high in ((False, 0.9, 1), (True, -0.05, 0.05)):
        m = path.orthogonality(features, True, debiased)
        assert low <= m[~torch.eye(40, dtype=torch.bool)].mean() <= high


ERRORS = [
    ([torch.ones(3, 2), torch.ones(4, 2)], r"features\[1\] .*; wanted .* \[3, ...\]"),
    ([torch.ones(3, 2), torch.ones(3, 2, dtype=torch.int32)], r"features\[1\] .*; wanted float32, float16"),
    ([torch.tensor(1.0)], r"features\[0\] .*; wanted 1\.\.1024 samples"),
    ([torch.ones(0, 2)], r"features\[0\] .*; wanted 1\.\.1024 samples"),
    ([torch.ones(1025, 1)], r"features\[0\] .*; wanted 1\.\.1024 samples"),
]


@pytest.mark.parametrize("features,message", ERRORS)
def test_errors(features: list[torch.Tensor], message: str) -> None:
    for module in (torch.ops.mpqkern, plain):
        for op in ("gram", "orthogonality"):
            with pytest.raises((RuntimeError, ValueError), match=f"mpqkern::{op}: {message}"):
                getattr(module, op)(features)


def test_debiased_wants_four_samples(path: SimpleNamespace) -> None:
    with pytest.raises((RuntimeError, ValueError), match=r"features.*3.*wanted at least 4 with debiased=True"):
        path.orthogonality([torch.randn(3, 5)], True, True)


def test_no_features() -> None:
    for module in (torch.ops.mpqkern, plain):
        with pytest.raises((RuntimeError, ValueError), match="features"):
            module.gram([])
