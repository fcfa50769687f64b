"""probe_linear and probe_conv2d as GPUs have them, in one product of torch's: their CUDA kernels, reached past the
dispatcher with CPU tensors, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mpqkern import ops, plain

from . import reference
from .test_cuda import needs_gpu
from .test_probe_products import CONV, CONV_ERRORS, LINEAR, LINEAR_ERRORS, TYPES, geometry, images


def past_the_dispatcher(op: str, *args: object) -> Tensor:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return getattr(torch.ops.mpqkern, op).default.redispatch(keys, *args)


def on_gpu(op: str, *args: object) -> Tensor:
    return getattr(torch.ops.mpqkern, op)(*(a.cuda() if isinstance(a, Tensor) else a for a in args)).cpu()


@pytest.fixture(params=["stacked", pytest.param("gpu", marks=needs_gpu)])
def probe(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    return on_gpu if request.param == "gpu" else past_the_dispatcher


@pytest.mark.parametrize("shape", LINEAR)
@pytest.mark.parametrize("dtype", TYPES)
def test_linear(probe: Callable[..., Tensor], shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, n, k = shape
    x, weights, bias = torch.randn(m, k).to(dtype), torch.randn(3, n, k).to(dtype), torch.randn(n).to(dtype)
    for b in (bias, None):
        got = probe("probe_linear", x, weights, b)
        assert got.shape == (3, m, n) and got.is_contiguous()
        for y, w in zip(got, weights, strict=True):
            add, size = (0, 0) if b is None else (b.double(), b.double().abs())
            bound = reference.sum_bound(x.float(), w.float(), k) + 2 * reference.U * size
            reference.assert_within(y, x.double() @ w.double().T + add, bound, dtype)


def steps(t: Tensor) -> list[int]:
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", CONV)
@pytest.mark.parametrize("dtype", TYPES)
def test_conv(probe: Callable[..., Tensor], shape: tuple, last: bool, dtype: torch.dtype) -> None:
    """The right variant, channel and order of memory, and fp32 sums: TF32 would be caught."""
    x, weights, bias = (t.to(dtype) for t in images(shape, 3, last))
    how = geometry(shape)
    named = dict(zip(("stride", "padding", "dilation", "groups"), how, strict=True))
    for b in (bias, None):
        got = probe("probe_conv2d", x, weights, b, *how)
        want = plain.probe_conv2d(x, weights, b, *how)
        assert got.shape == want.shape and steps(got) == steps(want)
        for y, w in zip(got, weights, strict=True):
            exact, size = (
                reference.conv(*(None if t is None else f(t.double()) for t in (x, w, b)), **named)
                for f in (lambda t: t, torch.abs)
            )
            # a bias of halves may be added to a sum that is rounded already
            more = 0 if dtype == torch.float32 or b is None else torch.finfo(dtype).eps / reference.U
            reference.assert_within(y, exact, (6 * w[0].numel() ** 0.5 + 2 + more) * reference.U * size, dtype)


def test_shapes_of_inputs(probe: Callable[..., Tensor]) -> None:
    w, x = torch.randn(3, 6, 20), torch.randn(2, 20, 5).transpose(1, 2)
    for inputs, weights in ((x, w), (x, w.mT.contiguous().mT), (x[0, 0], w), (x[:, :0], w), (x, w[:0]), (x, w[:, :0])):
        want = plain.probe_linear(inputs, weights)
        torch.testing.assert_close(probe("probe_linear", inputs, weights, None), want)
    image, filters, how = torch.randn(2, 4, 6, 6), torch.randn(3, 6, 2, 3, 3), ([1, 1], [0, 0], [1, 1], 2)
    turned = image.transpose(2, 3).contiguous().transpose(2, 3)
    for inputs, weights in ((image, filters), (turned, filters), (image[:0], filters), (image, filters[:0]),
                            (image, filters[:, :0])):  # fmt: skip
        want = plain.probe_conv2d(inputs, weights, None, *how) if weights.numel() else None
        got = probe("probe_conv2d", inputs, weights, None, *how)
        assert got.shape == (len(weights), len(inputs), weights.shape[1], 4, 4)
        if want is not None:
            torch.testing.assert_close(got, want)


class Calls(TorchDispatchMode):
    """What reaches torch, and how much memory it makes."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.names: list[str] = []
        self.storages = {t.untyped_storage().data_ptr(): t for t in known}  # kept: an address is not used twice
        self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        at = out.untyped_storage().data_ptr()
        self.made += 0 if at in self.storages else out.untyped_storage().nbytes() // out.itemsize
        self.storages[at] = out
        return out


def test_x_is_neither_copied_nor_read_again_for_each_variant() -> None:
    """One product in all, and nothing the size of its input made on the way."""
    x, w, bias = torch.randn(64, 32), torch.randn(5, 2, 32), torch.randn(2)
    with Calls(x, w, bias) as calls:
        ops.stacked.probe_linear(x, w, bias)
    assert sum("bmm" in name for name in calls.names) == 1 and calls.made == 5 * 64 * 2
    image, filters = torch.randn(2, 16, 9, 9), torch.randn(5, 2, 16, 1, 1)
    with Calls(image, filters) as calls:
        ops.stacked.probe_conv2d(image, filters, None, [1, 1], [0, 0], [1, 1], 1)
    products = [name for name in calls.names if "convolution" in name]
    assert len(products) == 1 and calls.made == 2 * 5 * 2 * 2 * 81  # its results, and these in order
    assert not any("item" in name or "_to_copy" in name or "nonzero" in name for name in calls.names)  # no waiting


def test_convolutions_refuse_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever torch was told: the last argument is what cuDNN may do."""
    seen = []
    real = torch.ops.aten._convolution
    monkeypatch.setattr(torch.ops.aten, "_convolution", lambda *args: seen.append(args[9:]) or real(*args))
    ops.stacked.probe_conv2d(torch.randn(1, 3, 4, 4), torch.randn(2, 2, 3, 3, 3), None, [1, 1], [0, 0], [1, 1], 1)
    ((benchmark, deterministic, _, tf32),) = seen
    assert deterministic and not benchmark and not tf32


@pytest.mark.parametrize("op,args,message", [("probe_linear", *e) for e in LINEAR_ERRORS]
                         + [("probe_conv2d", *e) for e in CONV_ERRORS])  # fmt: skip
def test_errors(op: str, args: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=f"mpqkern::{op}: {message}"):
        past_the_dispatcher(op, *args)
