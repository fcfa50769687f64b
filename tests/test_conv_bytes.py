"""Convolutions that hand integers on: the same, to the bit, as if each rounded what the one before it gave."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpqkern as mq
from mpqkern import packed
from mpqkern.nn.fuse import fusions
from mpqkern.plain import SPOILED

from .test_conv import problem
from .test_conv_paths import DENSE, DEPTHWISE

LAST = torch.channels_last
IN, OUT = torch.tensor([0.03]), torch.tensor([0.05])


def rounded(y: Tensor, scale: Tensor) -> Tensor:
    return (y / scale).round().clamp(-127, 127).to(torch.int8)


@pytest.mark.sanitize
@pytest.mark.parametrize("bits,group,symmetric", [(4, 0, True), (8, 32, False), (2, 0, False)])
@pytest.mark.parametrize("case", DEPTHWISE + DENSE)
def test_in_and_out(path: SimpleNamespace, case: tuple, bits: int, group: int, symmetric: bool) -> None:
    cin, cout, groups, kernel, stride, padding, dilation, height, width = case
    weight, _, _ = problem(path, case, bits, group, symmetric)
    bias, x = torch.randn(cout), torch.randn(3, cin, height, width).contiguous(memory_format=LAST)
    how = (bits, group, kernel, stride, padding, dilation, groups)
    q = rounded(x, IN).contiguous(memory_format=LAST)
    for activation in (None, "relu6", "silu"):
        # the op by which these are served: plain PyTorch calls it, too
        y = torch.ops.mpqkern.conv2d(x, *weight, bias, *how, 8, IN)
        if activation:
            y = torch.ops.mpqkern.conv2d_activated(x, *weight, bias, *how, 8, IN, None, activation)
        from_floats = path.conv2d_bytes(x, *weight, bias, *how, IN, None, activation, OUT)
        from_bytes = path.conv2d_bytes(q, *weight, bias, *how, IN, None, activation, OUT)
        floats = path.conv2d_bytes(q, *weight, bias, *how, IN, None, activation, None)
        if path.name != "plain" or not activation:
            assert torch.equal(from_floats, rounded(y, OUT)) and torch.equal(from_bytes, from_floats)
            assert torch.equal(floats, y)
        assert from_floats.is_contiguous(memory_format=LAST) and floats.dtype == torch.float32
        assert (from_floats.int() - rounded(y, OUT).int()).abs().max() <= 1 and y.abs().max() > 2 * OUT


@pytest.mark.sanitize
@pytest.mark.parametrize("cin,cout,groups", [(16, 16, 16), (8, 40, 1), (6, 12, 6)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_samples_that_are_not_finite(path: SimpleNamespace, cin: int, cout: int, groups: int, bad: float) -> None:
    case = (cin, cout, groups, (3, 3))
    weight, _, _ = problem(path, case, 4, 0, True)
    x = torch.randn(4, cin, 6, 5).contiguous(memory_format=LAST)
    x[1, 0, 0, 0], x[2, -1, -1, -1] = bad, -bad
    how = (*weight, None, 4, 0, (3, 3), (1, 1), (1, 1), (1, 1), groups, IN, None, "relu")
    q = path.conv2d_bytes(x, *how, OUT)
    assert (q[1:3] == SPOILED).all() and (q[::3] != SPOILED).all() and q[0].any()
    if cin == cout:
        again = path.conv2d_bytes(q, *how, OUT)
        assert (again[1:3] == SPOILED).all() and (again[::3] != SPOILED).all()
        y = path.conv2d_bytes(q, *how, None)
        assert y[1:3].isnan().all() and y[::3].isfinite().all()


@pytest.mark.sanitize
@pytest.mark.parametrize(
    "cin,cout,groups", [(8, 1, 1), (16, 7, 1), (24, 16, 1), (80, 24, 1), (8, 40, 1), (16, 48, 2), (32, 32, 32)]
)
def test_ties_and_far_values(path: SimpleNamespace, cin: int, cout: int, groups: int) -> None:
    """Steps that are powers of two: an eighth of all results lies between two integers. Others are far off, infinite
    until a ReLU is applied, or of a sample that is not finite, beside others in a tile."""
    scale, out = torch.tensor([0.25]), torch.tensor([0.5])
    for kernel in (1, 3):
        w = 0.5 * torch.randint(-7, 9, (cout, cin // groups, kernel, kernel)) - 0.25
        w[:, 0, 0, 0] = -3.75  # the lowest code
        weight = path.quantize(packed.weight_rows(w).contiguous(), 4, 0, True)[:3]
        bias = 0.0625 * torch.randint(-9, 9, (cout,))
        x = (0.25 * torch.randint(-20, 20, (4, cin, 3, 5))).contiguous(memory_format=LAST)
        x[1, 0, 0, 0] = torch.nan
        how = (4, 0, (kernel, kernel), (1, 1), (0, 0), (1, 1), groups)
        for activation, far in ((None, 3e37), ("relu", 3e37), ("relu", -torch.inf), ("relu6", torch.inf)):
            bias[cout // 2] = far
            if activation is None:
                bias[-1] = -far
                y = torch.ops.mpqkern.conv2d(x, *weight, bias, *how, 8, scale)
                ties = ((y[[0, 2, 3]] / out).frac().abs() == 0.5).float().mean()
                assert cout < 16 or ties > 0.03
            else:
                y = torch.ops.mpqkern.conv2d_activated(x, *weight, bias, *how, 8, scale, None, activation)
            q = path.conv2d_bytes(x, *weight, bias, *how, scale, None, activation, out)
            assert (q[1] == SPOILED).all() and torch.equal(q[[0, 2, 3]], rounded(y[[0, 2, 3]], out))


@pytest.mark.sanitize
@pytest.mark.parametrize("groups,cout", [(16, 16), (1, 40), (16, 32)])
@pytest.mark.parametrize("size", [1, 2, 20])
def test_any_layout(path: SimpleNamespace, size: int, groups: int, cout: int) -> None:
    """Images of one pixel lie in both orders at once, and make more than one where they are padded."""
    case = (16, cout, groups, (3, 3))
    weight, _, _ = problem(path, case, 4, 0, True)
    x = torch.randn(2, 16, size, size)
    how = (*weight, torch.randn(cout), 4, 0, (3, 3), (1, 1), (2, 2), (1, 1), groups)
    want = torch.ops.mpqkern.conv2d(x, *how, 8, IN)
    for floats in (x, x.contiguous(memory_format=LAST), x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(path.conv2d_bytes(floats, *how, IN, None, None, OUT), rounded(want, OUT))
        q = rounded(floats, IN)
        assert torch.equal(path.conv2d_bytes(q, *how, IN, None, None, OUT), rounded(want, OUT))
        assert torch.equal(path.conv2d_bytes(q, *how, IN, None, None, None), want)


@pytest.mark.parametrize("groups", [1, 16])
@pytest.mark.parametrize("scale", [0.0, -0.05, 1e-40, 1e-33, 1e33, 3.3e38, 3.4e38])
def test_scales_of_any_size(path: SimpleNamespace, scale: float, groups: int) -> None:
    """Results are biases, close to half a step, where the scale is so large that all else is lost beside it."""
    weight, _, _ = problem(path, (16, 16, groups, (3, 3)), 4, 0, True)
    bias = (scale * (0.5 + 2**-24 * torch.arange(-8, 8).double())).float()
    x = torch.randn(1, 16, 6, 6).contiguous(memory_format=LAST)
    how = (4, 0, (3, 3), (1, 1), (0, 0), (1, 1), groups)
    q = path.conv2d_bytes(x, *weight, bias, *how, IN, None, None, torch.tensor([scale]))
    y = torch.ops.mpqkern.conv2d(x, *weight, bias, *how, 8, IN)
    assert torch.equal(q, rounded(y, torch.tensor([scale])) if scale > 0 else torch.zeros_like(q))
    assert q.unique().numel() > 1 or scale <= 0


def test_any_number_of_threads() -> None:
    model, x = chain(nn.Conv2d(8, 48, 1), nn.ReLU(), nn.Conv2d(48, 48, 3, groups=48), nn.Conv2d(48, 8, 1))
    fused, found = mq.fuse(model, x), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(fused(x))
    assert torch.equal(*found) and list(fusions(fused).values()) == ["relu, int8", "int8"]


def chain(*layers: nn.Module, batch: int = 2, size: int = 20) -> tuple[nn.Module, Tensor]:
    """Packed, with fixed scales; and an input in the order in which integers are handed on."""
    model, x = nn.Sequential(*layers).eval(), torch.randn(batch, layers[0].in_channels, size, size)
    mq.swap_(model, mq.Scheme(4, act_bits=8))
    mq.calibrate_activations_(model, [x])
    return model, x.contiguous(memory_format=LAST)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.GELU(), nn.Identity()])
def test_fused(activation: nn.Module) -> None:
    model, x = chain(nn.Conv2d(8, 48, 1), activation, nn.Conv2d(48, 48, 3, 2, 1, groups=48), activation,
                     nn.Conv2d(48, 16, 3), nn.Conv2d(16, 16, 3, groups=2), nn.Tanh())  # fmt: skip
    fused, seen = mq.fuse(model, x), []
    assert [what.endswith("int8") for what in fusions(fused).values()] == [True] * 3
    y = fused(x)
    if isinstance(activation, (nn.ReLU, nn.ReLU6, nn.Identity)):
        assert torch.equal(y, model(x)) and torch.equal(fused(x.contiguous()), model(x.contiguous()))
    assert mq.verify(fused, x).ok and mq.verify(fused, x.contiguous()).ok
    fused[2].register_forward_pre_hook(lambda layer, args: seen.append(args[0].dtype))
    for z in (x, x.contiguous()):  # in the other order floats are handed on
        fused(z)
    assert seen == [torch.int8, torch.float32]
    x[1] = torch.nan
    assert fused(x)[1].isnan().all() and torch.equal(fused(x)[0], y[0])
    assert mq.verify(fused, x).ok


def test_results_that_are_not_finite() -> None:
    model, x = chain(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    fused = mq.fuse(model, x)
    model[0].bias[3] = torch.inf
    assert fused(x).isnan().all() and model(x).isnan().all() and mq.verify(fused, x).ok
    model[0].bias[3], model[0].act_scale[0] = 3.3e38, 1e36  # more than a float holds, where the sums are positive
    assert fused(1e38 * x).isnan().all() and mq.verify(fused, 1e38 * x).ok


def test_verify_takes_arguments_by_position() -> None:
    class Calls(nn.Module):
        def __init__(self, *layers: nn.Module) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](self.layers[0](x, "relu", self.layers[1].act_scale))

    model, x = chain(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    assert mq.verify(Calls(model[0], model[2]).eval(), x).ok


def test_what_is_handed_on_as_floats() -> None:
    tail = nn.Conv2d(16, 8, 3)
    for between, why in (([nn.MaxPool2d(2)], "a pool"), ([], "padding")):
        second = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect" if why == "padding" else "zeros")
        model, x = chain(nn.Conv2d(8, 16, 3), *between, second, copy.deepcopy(tail))
        fused = mq.fuse(model, x)
        assert list(fusions(fused)) == [str(1 + len(between))], why
        assert torch.equal(fused(x), model(x))
    model, x = chain(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3))
    handle = model[1].register_forward_pre_hook(lambda layer, args: None)  # would see integers
    assert mq.fuse(model, x) is model
    handle.remove()
    assert fusions(mq.fuse(model, x)) == {"0": "int8"}
    model[1].set_act_scale_(None)
    assert mq.fuse(model, x) is model


@pytest.mark.parametrize("context", [lambda: torch.autocast("cpu", torch.bfloat16), torch.enable_grad])
def test_contexts(context) -> None:  # type: ignore[no-untyped-def]
    model, x = chain(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    fused, seen = mq.fuse(model, x), []
    fused[2].register_forward_pre_hook(lambda layer, args: seen.append(args[0].dtype))
    with context():
        y = x.clone(memory_format=torch.preserve_format).requires_grad_(context is torch.enable_grad)
        torch.testing.assert_close(fused(y), model(y), rtol=0.02, atol=0.02)
    assert seen == [torch.float32 if context is torch.enable_grad else torch.bfloat16, *seen[1:]]


def test_scales_are_read_at_each_call() -> None:
    model, x = chain(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    fused = mq.fuse(model, x)
    for scale in (torch.tensor([0.1]), None):
        model[2].set_act_scale_(scale)
        assert torch.equal(fused(x), model(x))


def test_the_first_layer_without_a_scale_of_its_own() -> None:
    model, x = chain(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    fused = mq.fuse(model, x)
    model[0].set_act_scale_(None)
    assert torch.equal(fused(x), model(x))


def test_gradients_of_a_bias() -> None:
    for learns in (0, 2):
        model, x = chain(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
        fused, found = mq.fuse(model, x), []
        for run in (model, fused):
            model[learns].bias = model[learns].bias.detach().requires_grad_()
            run(x).square().sum().backward()
            found.append(model[learns].bias.grad)
        torch.testing.assert_close(*found)


def test_the_order_of_memory_is_kept() -> None:
    """Through one channel, and through one pixel, where floats lie in both orders."""
    channel = nn.Conv2d(8, 1, 3), nn.Conv2d(1, 16, 3), nn.Conv2d(16, 8, 3)
    pixel = nn.Conv2d(8, 16, 20), nn.Conv2d(16, 16, 3, padding=2, groups=16), nn.Conv2d(16, 8, 1)
    for layers in (channel, pixel):
        model, x = chain(*layers)
        fused = mq.fuse(model, x)
        assert torch.equal(fused(x), model(x)) and fused(x).stride() == model(x).stride()


def test_by_hand() -> None:
    layer = mq.PackedConv2d.from_float(nn.Conv2d(8, 8, 4, padding="same"), mq.Scheme(4, act_bits=8))
    layer.set_act_scale_(IN)
    x = torch.randn(2, 8, 6, 6)
    q = rounded(x, IN)
    assert torch.equal(layer(q), layer(x)) and torch.equal(layer(q[0]), layer(x[0]))
    assert mq.verify(nn.Sequential(layer).eval(), q[0]).ok
    q[1] = SPOILED
    assert layer(q)[1].isnan().all() and torch.equal(layer(q)[0], layer(x)[0])


def test_vmap() -> None:
    model, x = chain(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    fused = mq.fuse(model, x)
    assert torch.equal(torch.func.vmap(fused)(x.unsqueeze(1)), torch.func.vmap(model)(x.unsqueeze(1)))


def test_exported_and_compiled() -> None:
    model, x = chain(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    fused = mq.fuse(model, x)
    with torch.no_grad():
        made = torch.export.export(fused, (x,))
        assert "conv2d_bytes" not in str(made.graph) and torch.equal(made.module()(x), fused(x))
        assert torch.equal(torch.compile(fused, backend="aot_eager", fullgraph=True)(x), fused(x))


def test_errors() -> None:
    model, x = chain(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    with pytest.raises(ValueError, match="model is fused; wanted the model that fuse was given"):
        mq.calibrate_activations_(mq.fuse(model, x), [x])
    q = rounded(x, IN)
    with pytest.raises(ValueError, match="input is int8, and the layer has no act_scale; wanted floats"):
        mq.PackedConv2d.from_float(nn.Conv2d(8, 4, 3), mq.Scheme(4, act_bits=8))(q)
    for scale in (torch.ones(2), torch.ones(1).double()):
        with pytest.raises(RuntimeError, match=r"conv2d_bytes: out_scale is .*; wanted float32 \[1\]"):
            model[0](x, None, scale)
    weight = (model[0].qweight, model[0].scales, model[0].zeros, None, 4, 0, (3, 3), (1, 1), (0, 0), (1, 1), 1)
    with pytest.raises(RuntimeError, match=r"conv2d_bytes: x is float16 .*; wanted int8 or float32 \[batch"):
        torch.ops.mpqkern.conv2d_bytes(x.half(), *weight, IN, None, None, None)


def test_the_numbers_are_those_of_floats() -> None:
    """Against the float model: handing on integers is no further from it than rounding in place is."""
    torch.manual_seed(1)
    float_model = nn.Sequential(nn.Conv2d(8, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3)).eval()
    model, x = copy.deepcopy(float_model), torch.randn(4, 8, 16, 16)
    mq.swap_(model, mq.Scheme(8, act_bits=8))
    mq.calibrate_activations_(model, [x])
    want = float_model(x)
    got = mq.fuse(model, x)(x.contiguous(memory_format=LAST))
    assert F.mse_loss(got, want) < 1e-3 * want.square().mean()
