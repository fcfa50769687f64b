"""The ops as torch sees them: schemas, fakes, gradients, autocast, compilation, and errors that explain."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import mpqkern  # noqa: F401
from mpqkern import ops, plain

mpq = torch.ops.mpqkern
K, N, GROUP = 70, 12, 32
STATIC = torch.tensor([0.02])
CONV = ((3, 3), (2, 1), (1, 2), (1, 1), 2)  # kernel, stride, padding, dilation, groups


def weight(k: int = K, symmetric: bool = False) -> tuple[torch.Tensor, ...]:
    return mpq.quantize(torch.randn(N, k), 4, GROUP, symmetric)[:3]


def samples() -> dict[str, list[tuple]]:
    q, s, z = weight()
    cq, cs, cz = weight(3 * 3 * 4)
    x, image = torch.randn(3, 5, K), torch.randn(2, 8, 6, 9)
    last = image.contiguous(memory_format=torch.channels_last)
    byte = torch.randint(-127, 128, last.shape, dtype=torch.int8).contiguous(memory_format=torch.channels_last)
    return {
        "pack": [(torch.randint(0, 4, (3, 45), dtype=torch.uint8), 2)],
        "unpack": [(q, 4, K)],
        "dequantize": [(q, s, z, 4, GROUP, K), (q, s, None, 4, GROUP, K)],
        "quantize": [(torch.randn(5, 40), 2, 0, True), (torch.randn(5, 70), 8, 64, False, "mse", "float32")],
        "linear": [
            (x, q, s, z, None, 4, GROUP),
            (x.requires_grad_(), q, s, z, torch.randn(N, requires_grad=True), 4, GROUP, 8),
            (torch.randn(0, K, dtype=torch.bfloat16), q, s, None, torch.randn(N), 4, GROUP),
            (x.requires_grad_(), q, s, z, torch.randn(N, requires_grad=True), 4, GROUP, 8, torch.tensor([0.01])),
            (x.detach().half(), q, s, z, None, 4, GROUP, 8, torch.tensor([0.01, 0.02, 0.03])),
        ],
        "fragments": [(q, 4, K)],
        "linear_fragments": [
            (x.requires_grad_(), q, s, z, torch.randn(N), 4, GROUP, None, None, mpq.fragments(q, 4, K)),
            (x.requires_grad_(), q, s, z, torch.randn(N), 4, GROUP, 8, None, mpq.fragments(q, 4, K)),
        ],
        "conv2d": [
            (image, cq, cs, cz, None, 4, GROUP, *CONV),
            (last.requires_grad_(), cq, cs, cz, torch.randn(N, requires_grad=True), 4, GROUP, *CONV, 8),
            (last.requires_grad_(), cq, cs, cz, None, 4, GROUP, *CONV, 8, torch.tensor([0.01])),
        ],
        "conv2d_fragments": [
            (last.requires_grad_(), cq, cs, cz, torch.randn(N), 4, GROUP, *CONV, 8, None, mpq.fragments(cq, 4, 36)),
            (image, cq, cs, cz, None, 4, GROUP, *CONV, None, None, mpq.fragments(cq, 4, 36)),
        ],
        "linear_activated": [
            (x.requires_grad_(), q, s, z, torch.randn(N, requires_grad=True), 4, GROUP, None, None, None, "silu"),
            (x.requires_grad_(), q, s, None, None, 4, GROUP, 8, STATIC, mpq.fragments(q, 4, K), "relu"),
        ],
        "conv2d_activated": [
            (image, cq, cs, cz, torch.randn(N, requires_grad=True), 4, GROUP, *CONV, None, None, None, "relu6"),
            (last.requires_grad_(), cq, cs, cz, None, 4, GROUP, *CONV, 8, STATIC, mpq.fragments(cq, 4, 36), "gelu"),
        ],
        "conv2d_bytes": [
            (last.detach(), cq, cs, cz, torch.randn(N), 4, GROUP, *CONV, STATIC, None, "relu", STATIC),
            (byte, cq, cs, cz, None, 4, GROUP, *CONV, STATIC, mpq.fragments(cq, 4, 36), "gelu", STATIC),
            (byte, cq, cs, cz, None, 4, GROUP, *CONV, STATIC, None, None, None),
            (byte.contiguous(), cq, cs, cz, None, 4, GROUP, *CONV, STATIC, None, None, None),
            (last.detach()[..., :5], cq, cs, cz, None, 4, GROUP, *CONV, STATIC, None, None, None),
        ],
        "gram": [([image, last.detach(), torch.randn(2, 5).half()],), ([torch.randn(7, 3)], False)],
        "orthogonality": [([torch.randn(6, 3), torch.randn(6, 8, 2)], True, True), ([torch.randn(3, 4)],)],
        "probe_errors": [
            (torch.randn(5, 70), [2, 3, 8], 32, False, torch.tensor([1.0, 0.7])),
            (torch.randn(0, 9).half(), [4], 0, True, torch.ones(1), "float32"),
        ],
        "probe_linear": [
            (torch.randn(2, 3, 9), torch.randn(4, 5, 9), torch.randn(5)),
            (torch.randn(0, 9).half(), torch.randn(1, 5, 9).half()),
        ],
        "probe_conv2d": [
            (image, torch.randn(3, N, 4, 3, 3), torch.randn(N), *CONV[1:]),
            (last.detach().half(), torch.randn(2, N, 4, 3, 3).half(), None, *CONV[1:]),
        ],
    }  # fmt: skip


@pytest.mark.parametrize("op", ops.SCHEMAS)
def test_opcheck(op: str) -> None:
    for args in samples()[op]:
        result = torch.library.opcheck(getattr(mpq, op).default, args)
        assert set(result.values()) == {"SUCCESS"}


def test_errors_say_nothing_of_where_the_build_was() -> None:
    with pytest.raises(RuntimeError) as error:
        mpq.unpack(torch.zeros(2, 3, dtype=torch.uint8), 3, 4)
    assert str(Path(__file__).resolve().parent.parent) not in str(error.value)


def test_schemas_in_python_and_in_the_compiled_part_are_the_same() -> None:
    for name, schema in ops.SCHEMAS.items():
        wanted = torch._C.parse_schema(f"mpqkern::{name}{schema}")
        assert str(getattr(mpq, name).default._schema) == str(wanted)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(K,), (4, K), (2, 3, K)])
def test_linear_gradients(shape: tuple[int, ...], bias: bool) -> None:
    q, s, z = weight()
    x = torch.randn(shape, requires_grad=True)
    b = torch.randn(N, requires_grad=True) if bias else None
    w = mpq.dequantize(q, s, z, 4, GROUP, K)
    inputs = [t for t in (x, b) if t is not None]
    y = mpq.linear(x, q, s, z, b, 4, GROUP)
    seed = torch.randn_like(y)
    got = torch.autograd.grad(y, inputs, seed)
    want = torch.autograd.grad(F.linear(x, w, b), inputs, seed)
    assert all(torch.allclose(a, c, rtol=1e-5, atol=1e-5) for a, c in zip(got, want, strict=True))


@pytest.mark.parametrize("act_bits", [None, 8])
def test_conv_gradients(act_bits: int | None) -> None:
    cq, cs, cz = weight(36)
    x, b = torch.randn(2, 8, 6, 9, requires_grad=True), torch.randn(N, requires_grad=True)
    w = plain.packed.weight_from_rows(mpq.dequantize(cq, cs, cz, 4, GROUP, 36), (N, 4, 3, 3))
    y = mpq.conv2d(x, cq, cs, cz, b, 4, GROUP, *CONV, act_bits)
    seed = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, b], seed)
    want = torch.autograd.grad(F.conv2d(x, w, b, *CONV[1:]), [x, b], seed)
    assert all(torch.allclose(a, c, rtol=1e-4, atol=1e-4) for a, c in zip(got, want, strict=True))


def test_a_gradient_for_scales_is_refused() -> None:
    q, s, z = weight()
    with pytest.raises(RuntimeError, match="no gradient with respect to scales, zeros or act_scale"):
        mpq.linear(torch.randn(2, K), q, s.float().requires_grad_(), z.float(), None, 4, GROUP)
    with pytest.raises(RuntimeError, match="no gradient with respect to scales, zeros or act_scale"):
        mpq.linear(torch.randn(2, K), q, s, z, None, 4, GROUP, 8, torch.ones(1, requires_grad=True))


def test_autocast_casts_activations_and_leaves_the_weight_alone() -> None:
    q, s, z = weight()
    x, b = torch.randn(3, K), torch.randn(N)
    with torch.autocast("cpu", torch.bfloat16):
        y = mpq.linear(x, q, s.float(), z.float(), b, 4, GROUP)
        image = mpq.conv2d(torch.randn(1, 8, 6, 9), *weight(36), None, 4, GROUP, *CONV)
    assert y.dtype == image.dtype == torch.bfloat16
    assert torch.equal(y, mpq.linear(x.bfloat16(), q, s.float(), z.float(), b, 4, GROUP))


def both(x: torch.Tensor, image: torch.Tensor, w: tuple, cw: tuple) -> torch.Tensor:
    y = mpq.linear(x, *w, None, 4, GROUP).sum() + mpq.conv2d(image, *cw, None, 4, GROUP, *CONV).relu().sum()
    return (
        y
        + mpq.linear(x, *w, None, 4, GROUP, 8, STATIC).sum()
        + mpq.conv2d(image, *cw, None, 4, GROUP, *CONV, 8, STATIC).sum()
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph_with_dynamic_sizes(backend: str) -> None:
    torch._dynamo.reset()
    w, cw = weight(), weight(36)
    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend=backend)
    for rows in (4, 7, 2):
        args = torch.randn(rows, K), torch.randn(rows, 8, 5 + rows, 9), w, cw
        assert torch.allclose(compiled(*args), both(*args), rtol=1e-4)


def test_exports_with_a_dynamic_batch() -> None:
    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor, q: torch.Tensor, s: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return mpq.linear(x, q, s, z, None, 4, GROUP)

    w = weight()
    program = torch.export.export(
        Net(), (torch.randn(4, K), *w), dynamic_shapes=({0: torch.export.Dim("rows")}, None, None, None)
    )
    x = torch.randn(9, K)
    assert torch.allclose(program.module()(x, *w), Net()(x, *w))
    assert any("mpqkern.linear" in str(node.target) for node in program.graph.nodes)


def broken(**change: object) -> tuple:
    """linear's arguments with one of them spoilt."""
    q, s, z = weight()
    args = {
        "x": torch.randn(2, K),
        "q": q,
        "s": s,
        "z": z,
        "bias": torch.randn(N),
        "bits": 4,
        "group": GROUP,
        "act": None,
        "fixed": None,
    }
    return tuple((args | change).values())


ERRORS = [
    ({"x": torch.randn(2, 200)}, r"qweight .*; wanted uint8 \[N, 112\] for k=200 at bits=4"),
    ({"x": torch.zeros(2, K, dtype=torch.int32)}, "x .*; wanted float32, float16 or bfloat16"),
    ({"x": torch.tensor(1.0)}, r"x .*; wanted float32, float16 or bfloat16 \[..., K\]"),
    ({"x": torch.zeros(3, 0)}, "k=0; wanted at least 1"),
    ({"q": torch.zeros(N, 48)}, "qweight .*; wanted uint8"),
    ({"s": torch.ones(N, 4)}, r"scales .*; wanted .*\[12, 3\] for k=70, group_size=32"),
    ({"s": torch.ones(N, 3, dtype=torch.int32)}, "scales .* float16 (n)?or float32"),
    ({"z": torch.ones(N, 1)}, r"zeros .*wanted"),
    ({"z": torch.ones(N, 3, dtype=torch.bfloat16)}, "zeros .*wanted"),
    ({"bias": torch.ones(N + 1)}, r"bias .*wanted .*\[12\]"),
    ({"bits": 3}, "bits=3; wanted 2, 4 or 8"),
    ({"group": 33}, "group_size=33; wanted a multiple of 32, or 0"),
    ({"group": -32}, "group_size=-32; wanted a multiple of 32, or 0"),
    ({"act": 4}, "act_bits=4; wanted None or 8"),
    ({"fixed": torch.ones(1)}, "act_bits=None with an act_scale; wanted 8"),
    ({"act": 8, "fixed": torch.ones(2)}, r"act_scale is float32 \[2\]; wanted float32 \[1\] or \[3\]"),
    ({"act": 8, "fixed": torch.ones(0)}, r"act_scale is float32 \[0\]; wanted float32 \[1\] or \[3\]"),
    ({"act": 8, "fixed": torch.ones(1, 3)}, r"act_scale is float32 \[1, 3\]; wanted float32 \[1\] or \[3\]"),
    ({"act": 8, "fixed": torch.ones(3).half()}, r"act_scale is float16 \[3\]; wanted float32 \[1\] or \[3\]"),
]  # fmt: skip


@pytest.mark.parametrize("change,message", ERRORS)
def test_linear_errors_name_argument_value_and_wish(change: dict, message: str) -> None:
    for op in (mpq.linear, plain.linear):
        with pytest.raises((RuntimeError, ValueError), match="mpqkern::linear: .*" + message):
            op(*broken(**change))


CONV_ERRORS = [  # argument's place, its spoilt value, the message
    (0, torch.zeros(8, 6, 9), r"x .*; wanted float32, float16 or bfloat16 \[batch, channels, height, width\]"),
    (0, torch.zeros(2, 8, 2, 9), "x.*kernel"),
    (0, torch.zeros(2, 8, 6, 0), "x.*height and width of at least 1"),
    (7, (3,), "kernel_size"),
    (7, (3, 0), "kernel_size.*0"),
    (8, (0, 1), "stride.*0"),
    (9, (-1, 0), "padding.*-1"),
    (10, (1, 0), "dilation.*0"),
    (11, 3, "groups=3; wanted a divisor of x's 8 channels"),
    (11, 0, "groups=0; wanted a divisor"),
    (11, 8, "qweight"),
    (13, torch.ones(1), "act_bits=None with an act_scale; wanted 8"),
    (12, (8, torch.ones(2)), r"act_scale is float32 \[2\]; wanted float32 \[1\]$"),
    (12, (8, torch.ones(1).double()), r"act_scale is float64 \[1\]; wanted float32 \[1\]$"),
]


@pytest.mark.parametrize("place,value,message", CONV_ERRORS)
def test_conv_errors(place: int, value: object, message: str) -> None:
    args = list(samples()["conv2d"][0])
    args += [None, None]
    args[9] = (0, 0)
    if place == 12:
        args[12:] = value
    else:
        args[place] = value
    for op in (mpq.conv2d, plain.conv2d):
        with pytest.raises((RuntimeError, ValueError), match="mpqkern::conv2d: .*" + message):
            op(*args)


def test_other_errors() -> None:
    for module in (mpq, plain):
        wrong = (RuntimeError, ValueError)
        with pytest.raises(wrong, match=r"codes.*4.*wanted 0\.\.3 at bits=2"):
            module.pack(torch.full((1, 8), 4, dtype=torch.uint8), 2)
        with pytest.raises(wrong, match=r"codes .*wanted uint8 \[N, K\]"):
            module.pack(torch.zeros(4, dtype=torch.uint8), 2)
        with pytest.raises(wrong, match="search='best'; wanted 'minmax' or 'mse'"):
            module.quantize(torch.randn(2, 8), 4, 0, True, "best")
        with pytest.raises(wrong, match="scale_dtype='int8'; wanted 'float16' or 'float32'"):
            module.quantize(torch.randn(2, 8), 4, 0, True, "mse", "int8")
        with pytest.raises(wrong, match=r"weight .*wanted float32, float16 or bfloat16 \[N, K\]"):
            module.quantize(torch.randn(8), 4, 0, True)
        with pytest.raises(wrong, match=r"qweight .*wanted uint8 \[N, 16\] for k=5 at bits=4"):
            module.unpack(torch.zeros(2, 17, dtype=torch.uint8), 4, 5)


@pytest.mark.skipif(ops.why_plain is not None, reason="no compiled kernels")
def test_an_unknown_isa_is_refused() -> None:
    with pytest.raises(RuntimeError, match="want='neon' is unknown"):
        ops.isa("neon")
    assert ops.isa() in ops.ISAS
