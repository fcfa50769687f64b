"""The second copy of codes that kernels read: its order, the ops that take it, and that modules keep it up to date."""

from __future__ import annotations

import copy
import io
import itertools
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from mpqkern import PackedConv2d, PackedLinear, Scheme, load, ops, packed, plain, save, swap_

mpq = torch.ops.mpqkern
BITS = (2, 4, 8)
needs_kernels = pytest.mark.skipif(ops.why_plain is not None, reason=f"no compiled kernels: {ops.why_plain}")


# ---- the order


@pytest.mark.sanitize
@pytest.mark.parametrize("bits", BITS)
def test_order(path: SimpleNamespace, bits: int) -> None:
    """Panels of 32 rows, [word][row]; what is past the last row may be anything, and is that row."""
    for n, k in ((1, 1), (32, 64), (33, 70), (95, 290), (0, 40)):
        q = packed.pack(torch.randint(0, 2**bits, (n, k), dtype=torch.uint8), bits)
        words, got = q.view(torch.int32), path.fragments(q, bits, k)
        for row, word in itertools.product(range(n), range(words.shape[1])):
            assert got[(row // 32 * words.shape[1] + word) * 32 + row % 32] == words[row, word], (n, k, row, word)
        assert got.numel() == -(-n // 32) * 32 * words.shape[1]
        assert torch.equal(got, plain.fragments(q, bits, k))


# ---- ops


@needs_kernels
@pytest.mark.parametrize("op", ["linear", "conv2d"])
def test_wrong_fragments_are_refused(op: str) -> None:
    q, scales, zeros, _ = mpq.quantize(torch.randn(40, 64), 4, 0, True)
    f = mpq.fragments(q, 4, 64)
    x = torch.randn(3, 64, 1, 1) if op == "conv2d" else torch.randn(3, 64)
    sizes = ([1, 1], [1, 1], [0, 0], [1, 1], 1) if op == "conv2d" else ()
    call = getattr(mpq, f"{op}_fragments")
    for bad in (f[1:], f.float(), f.view(2, -1), f.repeat_interleave(2)[::2]):
        with pytest.raises(RuntimeError, match=r"fragments is .*; wanted contiguous int32 \[512\]"):
            call(x, q, scales, zeros, None, 4, 0, *sizes, 8, None, bad)


@needs_kernels
@pytest.mark.sanitize
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", (1, 2, 3))
def test_panels_that_are_read_by_turns_are_as_one_by_one(rows: int, bits: int) -> None:
    """Few rows, one scale for each of the weight: panels far apart go together, but for those that are left."""
    for n, k in ((128, 16), (300, 70), (420, 1100)):
        q, scales, zeros, _ = mpq.quantize(torch.randn(n, k), bits, 0, False)
        x, bias, fragments = torch.randn(rows, k), torch.randn(n), mpq.fragments(q, bits, k)
        for dtype, activation in itertools.product((torch.float32, torch.bfloat16), ("relu6", "gelu")):
            how = x.to(dtype), q, scales, zeros, bias, bits, 0, 8, None
            got, wanted = (mpq.linear_activated(*how, f, activation) for f in (fragments, None))
            assert torch.equal(got, wanted), (n, k, dtype, activation)


@needs_kernels
def test_the_number_of_rows_does_not_matter() -> None:
    """A row of activations gives the same results alone as among others."""
    for bits, group in itertools.product(BITS, (32, 0)):
        q, scales, zeros, _ = mpq.quantize(torch.randn(70, 330), bits, group, False)
        f, x = mpq.fragments(q, bits, 330), torch.randn(50, 330)
        whole = mpq.linear_fragments(x, q, scales, zeros, None, bits, group, 8, None, f)
        for m in (1, 2, 3, 7, 20):
            part = mpq.linear_fragments(x[:m], q, scales, zeros, None, bits, group, 8, None, f)
            assert torch.equal(part, whole[:m]), (bits, group, m)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_same_with_fragments(bias: bool, dtype: torch.dtype) -> None:
    for bits, (n, k), m in itertools.product(BITS, ((32, 64), (45, 70), (96, 290)), (1, 3, 13, 40)):
        q, scales, zeros, _ = mpq.quantize(torch.randn(n, k), bits, 32, False)
        x, b = torch.randn(m, k).to(dtype), torch.randn(n) if bias else None
        want = mpq.linear(x, q, scales, zeros, b, bits, 32, 8)
        assert torch.equal(
            mpq.linear_fragments(x, q, scales, zeros, b, bits, 32, 8, None, mpq.fragments(q, bits, k)), want
        )


def test_fragments_are_ignored_where_there_is_no_use_for_them(path: SimpleNamespace) -> None:
    q, scales, zeros, _ = mpq.quantize(torch.randn(20, 70), 4, 32, False)
    x = torch.randn(3, 70, requires_grad=True)
    args, f = (q, scales, zeros, torch.randn(20), 4, 32, None, None), mpq.fragments(q, 4, 70)
    want, got = mpq.linear(x, *args), path.linear_fragments(x, *args, f)
    assert torch.equal(got, want)
    slope = torch.randn(3, 20)
    assert torch.equal(*(torch.autograd.grad(y, x, slope)[0] for y in (got, want)))


@needs_kernels
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "conv",
    [
        lambda: nn.Conv2d(16, 45, 3, padding=1),
        lambda: nn.Conv2d(64, 32, 3, stride=2, padding=1, bias=False),
        lambda: nn.Conv2d(10, 64, (2, 3), dilation=(1, 2)),
        lambda: nn.Conv2d(48, 40, 1),
        lambda: nn.Conv2d(32, 64, 3, groups=2),
    ],
)
def test_conv2d_is_the_same_with_fragments(conv: Callable[[], nn.Conv2d], bits: int) -> None:
    for group, order in itertools.product((None, 32), (torch.contiguous_format, torch.channels_last)):
        layer = PackedConv2d.from_float(conv(), Scheme(bits, act_bits=8, group_size=group, symmetric=False))
        x = torch.randn(2, layer.in_channels, 9, 11).contiguous(memory_format=order)
        got = layer(x)
        assert layer.fragments is not None
        layer.keeps_fragments = False
        layer.derive_()
        assert layer.fragments is None and torch.equal(layer(x), got)


# ---- modules


def make_layer(bits: int = 4) -> PackedLinear:
    return PackedLinear.from_float(nn.Linear(70, 20), Scheme(bits, group_size=32, act_bits=8))


def mpq_linear(layer: PackedLinear, x: Tensor) -> Tensor:
    """Without fragments."""
    return mpq.linear(x, layer.qweight, layer.scales, layer.zeros, layer.bias, layer.scheme.bits, 32, 8)


def current(layer: nn.Module) -> bool:
    f = layer.fragments
    return f is not None and torch.equal(f, plain.fragments(layer.qweight, layer.scheme.bits, layer.k))


@needs_kernels
def test_which_modules_have_fragments() -> None:
    assert current(make_layer()) and current(PackedConv2d.from_float(nn.Conv2d(3, 17, 3), Scheme(4, act_bits=8)))
    for layer, scheme in (
        (nn.Linear(8, 8), Scheme(4)),
        (nn.Conv2d(8, 8, 3, groups=8), Scheme(4, act_bits=8)),
        (nn.Conv2d(32, 40, 3, groups=2), Scheme(4, act_bits=8)),  # 20 rows a group
        (nn.Conv2d(4, 128, 3, groups=4), Scheme(4, act_bits=8)),  # depthwise
        (nn.Linear(8, 16), Scheme(4, act_bits=8)),  # half a panel
        (nn.Linear(8, 8, device="meta"), Scheme(4, act_bits=8)),
    ):
        kind = PackedLinear if isinstance(layer, nn.Linear) else PackedConv2d
        made = kind.empty_like(layer, scheme)
        made.derive_()
        assert made.fragments is None


@needs_kernels
def test_modules_keep_fragments_up_to_date() -> None:
    layer, other = make_layer(), make_layer()
    before = layer.fragments
    assert current(layer)
    layer.load_state_dict(other.state_dict())
    assert current(layer) and not torch.equal(layer.fragments, before)
    layer.load_state_dict(make_layer().state_dict(), assign=True)
    assert current(layer)
    for change in (layer.half, lambda: layer.pack_(torch.randn(20, 70))):
        change()
        assert current(layer)
    assert current(copy.deepcopy(layer))


@needs_kernels
def test_fragments_of_another_weight_are_never_used() -> None:
    layer, other, x = make_layer(), make_layer(), torch.randn(5, 70)
    layer.qweight = other.qweight
    assert layer.fragments is None
    assert torch.equal(layer(x), mpq_linear(layer, x))
    layer.derive_()
    assert current(layer)
    layer.qweight.zero_()
    assert layer.fragments is None
    assert torch.equal(layer(x), mpq_linear(layer, x))
    assert current(layer), "made anew by the call"
    swapped = torch.func.functional_call(layer, {"qweight": other.qweight + 1}, (x,))
    assert current(layer) and not torch.equal(swapped, layer(x))


@needs_kernels
def test_an_old_weight_is_not_kept_alive() -> None:
    layer = make_layer()
    old = weakref.ref(layer.qweight)
    layer.qweight = layer.qweight.to("meta")
    assert old() is None


@needs_kernels
def test_layers_that_share_a_weight_share_fragments() -> None:
    """And keep them when the weight is loaded, once for each."""
    first, second = nn.Linear(70, 20), nn.Linear(70, 20)
    second.weight = first.weight
    model, x = nn.Sequential(first, nn.Linear(20, 70), second), torch.randn(3, 70)
    swap_(model, {"*": Scheme(4, act_bits=8)})
    assert model[0].fragments is model[2].fragments is not None
    model.load_state_dict(model.state_dict())
    model(x)
    assert current(model[0]) and current(model[2])


@needs_kernels
def test_fragments_are_not_saved(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(70, 20), nn.ReLU(), nn.Linear(20, 18))

    model, x = make(), torch.randn(3, 70)
    swap_(model, {"*": Scheme(4, act_bits=8)})
    want = model(x)
    assert not any("fragments" in name for name in (*model.state_dict(), *dict(model.named_buffers())))
    save(model, tmp_path / "model.safetensors")
    loaded = load(make, tmp_path / "model.safetensors")
    assert current(loaded[0]) and current(loaded[2]) and torch.equal(loaded(x), want)

    with_them, without = io.BytesIO(), io.BytesIO()
    torch.save(model, with_them)
    for layer in (model[0], model[2]):
        layer.keeps_fragments = False
        layer.derive_()
        del layer.keeps_fragments
    torch.save(model, without)
    assert len(with_them.getvalue()) == len(without.getvalue())
    with_them.seek(0)
    old = io.BytesIO()
    torch.save(model, old, _use_new_zipfile_serialization=False)  # reads tensors after it has made modules
    old.seek(0)
    for file in (with_them, old):
        loaded = torch.load(file, weights_only=False)
        assert torch.equal(loaded(x), want) and current(loaded[0])


@needs_kernels
def test_copies_of_a_compiled_layer_are_layers_of_their_own() -> None:
    layer, x = make_layer(), torch.randn(5, 70)
    layer.compile(backend="eager")
    layer(x)
    twin = copy.deepcopy(layer)
    twin.load_state_dict(make_layer().state_dict())
    assert torch.equal(twin(x), mpq_linear(twin, x))
    torch.save(layer, io.BytesIO())


@needs_kernels
@pytest.mark.parametrize("how", ["export", "strict export", "symbolic", "jit"])
def test_programs_do_not_keep_fragments(how: str) -> None:
    layer, x = nn.Sequential(make_layer()), torch.randn(5, 70)
    if "export" in how:
        traced = torch.export.export(layer, (x,), strict="strict" in how).module()
    else:
        traced = torch.fx.symbolic_trace(layer) if how == "symbolic" else torch.jit.trace(layer, x)
    graph = traced.inlined_graph if how == "jit" else traced.graph
    assert "linear" in str(graph) and "linear_fragments" not in str(graph)
    assert not any(t.dtype == torch.int32 for t in traced.state_dict().values())
    assert torch.equal(traced(x), layer(x))


@needs_kernels
def test_compiled_modules_use_fragments(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, seen = make_layer(), torch.randn(5, 70), []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Tensor]:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    assert torch.equal(torch.compile(layer, backend=backend, fullgraph=True)(x), layer(x))
    assert any("linear_fragments" in target for target in seen)
