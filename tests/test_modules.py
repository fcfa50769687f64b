"""PackedLinear and PackedConv2d as drop-in modules."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from mpqkern import PackedConv2d, PackedLinear, PackedModule, Scheme, swap_

from . import reference

SCHEMES = [
    Scheme(2, group_size=32),
    Scheme(4, symmetric=False),
    Scheme(8, act_bits=8),
    Scheme(4, scale_dtype="float32"),
]
CONVS = [
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": "same", "bias": False},
    {"kernel_size": (4, 2), "padding": "same", "dilation": (1, 3)},
    {"kernel_size": 3, "padding": "valid", "stride": 2},
    {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect", "stride": (2, 1)},
    {"kernel_size": (3, 4), "padding": "same", "padding_mode": "circular"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"},
    {"kernel_size": 5, "padding": 2, "groups": 8},
    {"kernel_size": 1, "groups": 2},
]


def layers(scheme: Scheme) -> list[tuple[nn.Module, PackedModule, torch.Tensor]]:
    linear, conv = nn.Linear(45, 7), nn.Conv2d(8, 16, 3, padding=1)
    return [
        (linear, PackedLinear.from_float(linear, scheme), torch.randn(4, 45)),
        (conv, PackedConv2d.from_float(conv, scheme), torch.randn(2, 8, 6, 6)),
    ]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_forward_is_the_float_layer_on_the_dequantized_weight(scheme: Scheme) -> None:
    for _, packed, x in layers(scheme):
        y, z = packed(x), packed.to_float()(x).detach()
        tolerance = 1e-5 if scheme.act_bits is None else 0.03
        assert torch.allclose(y, z, atol=tolerance * float(z.abs().max()))
        assert torch.equal(packed.weight, packed.dequantize()) and packed.weight.shape == packed.weight_shape


@pytest.mark.parametrize("how", CONVS, ids=str)
def test_every_convolution(how: dict) -> None:
    conv = nn.Conv2d(8, 16, **how)
    packed = PackedConv2d.from_float(conv, Scheme(4, group_size=32))
    conv.weight.data = packed.weight
    x = torch.randn(3, 8, 9, 7)
    assert torch.allclose(packed(x), conv(x), atol=1e-5)
    assert torch.allclose(packed(x[0]), conv(x[0]), atol=1e-5)  # without a batch
    assert torch.allclose(packed.to_float()(x), conv(x), atol=1e-6)
    for wrong in ((3, 9, 9, 7), (8, 9), (1, 3, 8, 9, 7)):
        with pytest.raises(ValueError, match=r"wanted \[batch, in_channels=8, height, width\]"):
            packed(torch.randn(wrong))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_bytes_are_the_schemes(scheme: Scheme) -> None:
    for _, packed, _ in layers(scheme):
        assert packed.packed_bytes() == scheme.bytes(packed.weight_shape)
        state = packed.state_dict()
        assert list(state) == ["qweight", "scales", "zeros", "bias"]
        assert all(type(t) is torch.Tensor for t in state.values())
        assert not list(packed.parameters())


def same(a: nn.Module, b: nn.Module, x: torch.Tensor) -> bool:
    return torch.equal(a(x), b(x))


def test_copies_pickles_and_state_dicts() -> None:
    for _, packed, x in layers(Scheme(4, group_size=32)):
        assert same(copy.deepcopy(packed), packed, x)
        assert same(pickle.loads(pickle.dumps(packed)), packed, x)
        file = io.BytesIO()
        torch.save(packed.state_dict(), file)
        file.seek(0)
        fresh = copy.deepcopy(packed)
        for buffer in fresh.buffers():
            buffer.zero_()
        assert not same(fresh, packed, x)
        fresh.load_state_dict(torch.load(file, weights_only=True))
        assert same(fresh, packed, x)
        assert same(packed.share_memory(), fresh, x) and packed.qweight.is_shared()


def test_casts_touch_the_bias_and_the_reported_weight_only() -> None:
    for _, packed, x in layers(Scheme(4, scale_dtype="float32", symmetric=False)):
        before = packed.weight.clone()
        for cast in (torch.float16, torch.bfloat16, torch.float32):
            packed.to(cast)
            assert packed.scales.dtype == packed.zeros.dtype == torch.float32 and packed.qweight.dtype == torch.uint8
            assert packed.bias.dtype == packed.weight.dtype == cast
            assert packed(x.to(cast)).dtype == cast
        assert torch.equal(packed.half().float().weight, before)
        assert packed.to("meta").qweight.is_meta
        assert packed.to_empty(device="cpu").scales.dtype == torch.float32


def test_half_scales_survive_float() -> None:
    packed = PackedLinear.from_float(nn.Linear(32, 4), Scheme(4)).float().double()
    assert packed.scales.dtype == torch.float16 and packed.weight.dtype == torch.float64
    assert packed(torch.randn(2, 32)).dtype == torch.float32


def test_autocast() -> None:
    for _, packed, x in layers(Scheme(4)):
        with torch.autocast("cpu", torch.bfloat16):
            assert packed(x).dtype == torch.bfloat16


def test_gradients_flow_to_the_input() -> None:
    for _, packed, x in layers(Scheme(4)):
        x.requires_grad_()
        packed(x).square().sum().backward()
        got, x.grad = x.grad, None
        packed.to_float()(x).square().sum().backward()
        assert torch.allclose(got, x.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layer", [nn.Linear(40, 12), nn.Conv2d(40, 12, 1)], ids=["linear", "conv"])
def test_a_bias_may_become_a_parameter(layer: nn.Module) -> None:
    packed = (PackedLinear if isinstance(layer, nn.Linear) else PackedConv2d).from_float(layer, Scheme(4))
    x = torch.randn(2, 40) if isinstance(layer, nn.Linear) else torch.randn(2, 40, 3, 3)
    before = packed(x)
    packed.bias = nn.Parameter(packed.bias + 1)
    after = packed(x)
    after.sum().backward()
    torch.testing.assert_close(after, before + 1)
    assert packed.bias.grad.unique().tolist() == [after.numel() / 12]


def test_compiles_and_exports_whole() -> None:
    net = nn.Sequential(
        PackedConv2d.from_float(nn.Conv2d(3, 8, 3, padding="same"), Scheme(4)),
        nn.ReLU(),
        PackedConv2d.from_float(nn.Conv2d(8, 8, (4, 3), padding="same", padding_mode="reflect"), Scheme(2)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        PackedLinear.from_float(nn.Linear(8, 5), Scheme(8, act_bits=8)),
    )
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 5):
        x = torch.randn(batch, 3, 10, 8 + batch)
        assert torch.allclose(compiled(x), net(x), atol=1e-6)
    x = torch.randn(2, 3, 10, 9)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    wide = torch.randn(6, 3, 10, 9)
    assert torch.allclose(program.module()(wide), net(wide), atol=1e-6)


def test_an_input_of_the_wrong_width_is_refused_though_its_padded_width_fits() -> None:
    packed = PackedLinear.from_float(nn.Linear(45, 7), Scheme(4))
    with pytest.raises(ValueError, match=r"input is \[2, 50\]; wanted \[..., in_features=45\]"):
        packed(torch.randn(2, 50))


def test_representation_shows_the_scheme() -> None:
    linear, conv = (packed for _, packed, _ in layers(Scheme(4, group_size=32, act_bits=8)))
    assert "in_features=45, out_features=7, bias=True, bits=4, group_size=32" in repr(linear)
    assert "padding=(1, 1)" in repr(conv) and "act_bits=8" in repr(conv)


def test_bits_without_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="bits=3; wanted 2, 4 or 8"):
        PackedLinear(8, 8, Scheme(3))
    with pytest.raises(ValueError, match="act_bits=6; wanted None or 8"):
        PackedLinear(8, 8, Scheme(4, act_bits=6))


def test_packing_a_weight_of_the_wrong_kind_leaves_the_module_alone() -> None:
    linear = nn.Linear(40, 5)
    packed = PackedLinear.from_float(linear, Scheme(4))
    before = copy.deepcopy(packed.state_dict())
    linear.weight.data[1, 2] = torch.nan
    with pytest.raises((RuntimeError, ValueError), match="row 1"):
        packed.pack_(linear.weight)
    assert all(torch.equal(before[k], v) for k, v in packed.state_dict().items())
    x = torch.randn(3, 40)
    want = x.double() @ packed.weight.double().T + packed.bias.double()
    reference.assert_within(packed(x), want, reference.sum_bound(x, packed.weight, 40) + 1e-7)


@pytest.mark.parametrize("rounding", ["minmax", "gptq"])
def test_packed_tensors_own_their_memory(rounding: str) -> None:
    model = nn.Sequential(nn.Linear(64, 48))
    swap_(model, {"0": 4}, rounding=rounding, batches=torch.randn(8, 64))
    for tensor in model[0].state_dict().values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
