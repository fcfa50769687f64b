"""Ten-line references: slow, obvious, and written without looking at the kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

U = 2.0**-24  # unit roundoff of fp32


def pack(codes: Tensor, bits: int) -> Tensor:
    """Each row as one big little-endian number, code k at bit k * bits, filled up to 32 codes."""
    width = -(-codes.shape[1] // 32) * 32 * bits // 8
    rows = []
    for row in codes.tolist():
        number = sum(code << (k * bits) for k, code in enumerate(row))
        rows.append(list(number.to_bytes(width, "little")))
    return torch.tensor(rows, dtype=torch.uint8).view(codes.shape[0], width)


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, group: int) -> Tensor:
    """fp64 weights from codes, `group` 0 being the whole row."""
    n, k = codes.shape
    out = torch.zeros(n, k, dtype=torch.float64)
    for i in range(k):
        g = i // group if group else 0
        zero = zeros.double() if zeros.numel() == 1 else zeros[:, g].double()
        out[:, i] = scales[:, g].double() * (codes[:, i].double() - zero)
    return out


def linear_a8(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, group: int, fixed: Tensor | None = None
) -> Tensor:
    """int8 activations per row and group, or by fixed scales; integer sums, fp64 around them."""
    k = codes.shape[1]
    y = torch.zeros(x.shape[0], codes.shape[0], dtype=torch.float64)
    for g, start in enumerate(range(0, k, group or k)):
        part = slice(start, min(k, start + (group or k)))
        scale = x[:, part].abs().amax(1, keepdim=True) / 127 if fixed is None else fixed[g % len(fixed)].view(1, 1)
        q = torch.where(scale > 0, x[:, part] / scale, 0).round().clamp(-127, 127).long()
        dots, sums = q @ codes[:, part].long().T, q.sum(1, keepdim=True)
        zero = zeros.double() if zeros.numel() == 1 else zeros[:, g].double()
        y += scale.double() * scales[:, g].double() * (dots.double() - sums.double() * zero)
    return y


def rounding_error(w: Tensor, bits: int, group: int, symmetric: bool, fraction: Tensor, dtype: torch.dtype) -> Tensor:
    """Squared error [N, groups] of rounding to a grid over `fraction` of each group's range, group by group."""
    top, columns = float(2**bits - 1), []
    for part in w.float().split(group or w.shape[1], dim=1):
        lo, hi = part.amin(1, keepdim=True).clamp(max=0), part.amax(1, keepdim=True).clamp(min=0)
        if symmetric:
            scale, zero = torch.maximum(hi, -lo) * fraction / (top / 2), torch.tensor(top / 2)
        else:
            scale = (hi - lo) * fraction / top
            zero = (-lo * fraction / scale.to(dtype).float()).clamp(0, top).to(dtype).float()
        scale = scale.to(dtype).float()
        back = scale.double() * ((part / scale + zero).clamp(0, top).round().double() - zero.double())
        columns.append((part.double() - back).square().sum(1))
    return torch.stack(columns, 1)


def conv(x: Tensor, w: Tensor, bias: Tensor | None, **how: object) -> Tensor:
    return F.conv2d(x.double(), w.double(), None if bias is None else bias.double(), **how)


def gram(x: Tensor, center: bool) -> tuple[Tensor, Tensor]:
    """fp64 Gram matrix of the samples, and a bound on what fp32 sums over 512 columns may differ by.

    Kernels sum products of x less its first sample, rounded once each (2 u), and centre afterwards, which
    averages the errors of rows and columns into every entry. bf16 as it is has no more: products are exact, a lane
    sums 64 of them, and its norms are at most twice the centred ones.
    """
    f = x.reshape(x.shape[0], -1).double()
    shifted = f - f[:1] if center else f
    bound = (6 * 512**0.5 + 2) * U * (shifted.abs() @ shifted.abs().T)
    if center:
        bound = bound + bound.mean(0) + bound.mean(1, keepdim=True) + bound.mean()
        f = f - f.mean(0)
    return f @ f.T, bound


def gram_of_halves(x: Tensor, center: bool) -> tuple[Tensor, Tensor]:
    """The same of 16-bit features in tensor cores: csrc/cuda/gram_halves.cu derives the bound for features as they are,
    which centring, done afterwards, averages into every entry. Where it would leave a sample less than a quarter of its
    squared norm, the bound is that of fp32."""
    want, bound = gram(x, center)
    f = x.reshape(x.shape[0], -1).double()
    if not center or (f.square().sum(1) <= 4 * want.diag()).all():
        bound = 168 * U * (f.abs() @ f.abs().T)
        if center:
            bound = bound + bound.mean(0) + bound.mean(1, keepdim=True) + bound.mean()
    return want, bound


def hsic(k: Tensor, m: Tensor, debiased: bool) -> float:
    """Of two centred Gram matrices, up to a factor; unbiased: Song et al. 2012, equation 5."""
    if not debiased:
        return float((k * m).sum())
    n = k.shape[0]
    k, m = (a - a.diag().diag() for a in (k, m))
    return float((k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * k.sum(0) @ m.sum(0))


def sum_bound(x: Tensor, w: Tensor, k: int) -> Tensor:
    """fp32 sums of k products in any order: 6 sqrt(k) u sum |x||w| (Higham & Mary 2019)."""
    return 6 * k**0.5 * U * F.linear(x.double().abs(), w.double().abs())


def a8_factor(k: int, group: int) -> float:
    """Error of a product with 8-bit activations over sum |x| |w|: integer sums are exact over a group, or 256 and more
    of it; fp32 joins these spans, with 3 roundings each."""
    spans = -(-k // min(group or k, 256))
    return (6 * spans**0.5 + 3) * U


def assert_within(got: Tensor, want: Tensor, bound: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """|got - want| <= bound + the rounding of the result (and of adding a bias) to its type."""
    assert got.shape == want.shape and got.dtype == dtype
    allowed = bound + torch.finfo(dtype).eps * want.abs() + torch.finfo(dtype).tiny
    excess = ((got.double() - want).abs() / allowed).nan_to_num(torch.inf)
    assert got.numel() == 0 or excess.max() <= 1, f"largest error is {float(excess.max()):.3g} of its bound"
