"""Activations that layers apply to their results: ReLUs to the bit, SiLU and GELU within 4 u of what they are given."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mpqkern as mq
from mpqkern import ops
from mpqkern.plain import ACTIVATIONS

from . import reference
from .test_conv import problem
from .test_conv_paths import DENSE, DEPTHWISE, orders

FIRST = torch.tensor([0.0, -0.0, 1e-40, 6.0, 88.5, -88.5, -87.0, 3e38, -3e38, torch.inf, torch.nan])
LARGE, INFINITE = 7, 9


def assert_activated(got: torch.Tensor, before: torch.Tensor, activation: str, path: SimpleNamespace) -> None:
    units = 8 if path.name == "plain" else 4  # torch's own GELU takes 6.4
    want = ACTIVATIONS[activation](before.double())
    if activation.startswith("relu"):
        assert torch.equal(got, want.float())
    else:
        reference.assert_within(got, want, units * reference.U * before.double().abs() + 1e-36)


@pytest.mark.sanitize
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("act_bits", [None, 8])
def test_linear(path: SimpleNamespace, act_bits: int | None, activation: str) -> None:
    """Few rows and many, full panels and others, with a bias and without, weights so small that torch multiplies."""
    for m, n, k in ((1, 33, 130), (3, 64, 96), (5, 7, 40), (40, 65, 130), (70, 8, 32)):
        weight = path.quantize(torch.randn(n, k), 4, 32, False)[:3]
        for bias in (None, torch.randn(n)):
            x = 3 * torch.randn(m, k)
            before = torch.ops.mpqkern.linear(x, *weight, bias, 4, 32, act_bits)
            made = path.fragments(weight[0], 4, k)
            for fragments in (None, made):
                got = path.linear_activated(x, *weight, bias, 4, 32, act_bits, None, fragments, activation)
                assert_activated(got, before, activation, path)


@pytest.mark.sanitize
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("case", [*DEPTHWISE[::2], *DENSE[::2]])
def test_conv2d(path: SimpleNamespace, case: tuple, act_bits: int | None, activation: str) -> None:
    cin, cout, groups, kernel, stride, padding, dilation, height, width = case
    for symmetric in (True, False):
        weight, _, _ = problem(path, case, 4, 0, symmetric)
        x, bias = 2 * torch.randn(2, cin, height, width), torch.randn(cout)
        for y in orders(x):
            how = (4, 0, kernel, stride, padding, dilation, groups, act_bits)
            before = torch.ops.mpqkern.conv2d(y, *weight, bias, *how)
            got = path.conv2d_activated(y, *weight, bias, *how, None, None, activation)
            assert_activated(got, before, activation, path)
            assert got.stride() == before.stride()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("act_bits", [None, 8])
def test_half_precision(act_bits: int | None, activation: str, dtype: torch.dtype) -> None:
    """Rounded once, after the activation: no further from it than rounding before it, too, would be."""
    linear = mq.PackedLinear.from_float(nn.Linear(96, 40), mq.Scheme(8, act_bits=act_bits)).to(dtype)
    conv = mq.PackedConv2d.from_float(nn.Conv2d(8, 40, 3), mq.Scheme(8, act_bits=act_bits)).to(dtype)
    for layer, x in ((linear, torch.randn(40, 96)), (conv, torch.randn(2, 8, 9, 9))):
        before = layer(x.to(dtype)).double()
        off = (layer(x.to(dtype), activation).double() - ACTIVATIONS[activation](before)).abs()
        assert (off <= 2 * torch.finfo(dtype).eps * before.abs() + torch.finfo(dtype).smallest_normal).all()


@pytest.mark.sanitize
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_size_of_argument(path: SimpleNamespace, activation: str) -> None:
    """From the bias of a layer of zeros; also infinities and what is no number."""
    values = torch.cat([FIRST, torch.linspace(-20, 20, 5001), *(s * torch.logspace(-30, 2, 300) for s in (1, -1))])
    n = len(values)
    q, scales = path.pack(torch.zeros(n, 1, dtype=torch.uint8), 8), torch.zeros(n, 1)
    for act_bits in (None, 8):
        got = path.linear_activated(torch.zeros(1, 1), q, scales, None, values, 8, 0, act_bits, None, None, activation)
        assert torch.equal(got[0].isnan(), values.isnan()) or path.name == "plain"
        finite = values.abs() < 1e38
        assert_activated(got[0][finite], values[finite], activation, path)
        if path.name != "plain":  # where torch's own GELU is NaN at infinity
            assert got[0][INFINITE] == (6 if activation == "relu6" else torch.inf)
            assert got[0][LARGE] == (6 if activation == "relu6" else values[LARGE])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_same_on_every_instruction_set_and_for_every_number_of_threads(activation: str) -> None:
    linear = mq.PackedLinear.from_float(nn.Linear(200, 130), mq.Scheme(4, act_bits=8))
    conv = mq.PackedConv2d.from_float(nn.Conv2d(32, 32, 3, groups=32), mq.Scheme(4, act_bits=8))
    inputs = torch.randn(64, 200), torch.randn(4, 32, 40, 40)
    found = []
    for isa in ops.ISAS[1:]:
        try:
            ops.isa(isa)
        except RuntimeError:
            continue
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append([layer(x, activation) for layer, x in zip((linear, conv), inputs, strict=True)])
    ops.isa("best")
    assert found if ops.why_plain is None else not found
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("act_scale", [None, torch.tensor([0.01])])
def test_gradients(activation: str, act_scale: torch.Tensor | None) -> None:
    """Those of the layer and then the activation."""
    scheme = mq.Scheme(8, act_bits=None if act_scale is None else 8)
    linear, conv = (
        mq.PackedLinear.from_float(nn.Linear(20, 12), scheme),
        mq.PackedConv2d.from_float(nn.Conv2d(4, 12, 3), scheme),
    )
    for layer, x in ((linear, 9 * torch.randn(9, 20)), (conv, 9 * torch.randn(2, 4, 7, 7))):
        layer.bias = nn.Parameter(layer.bias)
        layer.set_act_scale_(act_scale)
        grads = []
        for run in (lambda y, f=layer: f(y, activation), lambda y, f=layer: ACTIVATIONS[activation](f(y))):
            y = x.clone().requires_grad_()
            layer.bias.grad = None
            (run(y) + 1).square().sum().backward()
            grads.append((y.grad, layer.bias.grad))
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            assert want.abs().max() > 0


def test_names_of_activations(path: SimpleNamespace) -> None:
    weight = path.quantize(torch.randn(8, 32), 4, 0, True)[:3]
    with pytest.raises((ValueError, RuntimeError), match="activation='tanh'; wanted 'relu', 'relu6', 'silu' or 'gelu'"):
        path.linear_activated(torch.randn(1, 32), *weight, None, 4, 0, None, None, None, "tanh")
    with pytest.raises(ValueError, match=r"activation=ReLU\(\); wanted 'relu'"):
        mq.PackedLinear.from_float(nn.Linear(8, 8), mq.Scheme(8))(torch.randn(1, 8), nn.ReLU())
    with pytest.raises((ValueError, RuntimeError), match="activation=''; wanted"):
        images = torch.randn(1, 8, 4, 4)
        path.conv2d_activated(images, *weight, None, 4, 0, (2, 2), (1, 1), (0, 0), (1, 1), 1, None, None, None, "")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivatives(activation: str) -> None:
    layer, x = mq.PackedLinear.from_float(nn.Linear(20, 12), mq.Scheme(8)), torch.randn(9, 20)
    found = []
    for run in (lambda y: layer(y, activation), lambda y: ACTIVATIONS[activation](layer(y))):
        y = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(run(y).square().sum(), y, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), y)[0])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
    assert found[1].abs().max() > 0


def test_sizes_are_still_checked() -> None:
    layer = mq.PackedLinear.from_float(nn.Linear(20, 12), mq.Scheme(8))
    with pytest.raises(ValueError, match="in_features=20"):
        layer(torch.randn(2, 21), "relu")


def test_exported() -> None:
    layer = mq.PackedLinear.from_float(nn.Linear(64, 48), mq.Scheme(4, act_bits=8))
    x = torch.randn(5, 64)
    made = torch.export.export(nn.Sequential(Wrapped(layer)), (x,))
    assert "linear_activated" in str(made.graph)
    assert torch.equal(made.module()(x), layer(x, "silu"))


class Wrapped(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, activation="silu")
