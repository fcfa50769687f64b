"""Every other library's kernel that is installed computes what its own quantized weight says, and the table is right.

One that is not installed is skipped; so is what torch has for other processors only.
"""

from __future__ import annotations

from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench import tables
from bench.peers import Peer, build, conv, errors, grid, linear, spread_out, top_of_range
from mpqkern import Scheme

# Largest error to the exact result of the stored weight: rounding of activations to 8 bits, to 7, of the result to 8.
PRECISION = {"fp32": 1e-5, "int8": 0.03}
BFLOAT = 0.02
SCHEMES = [Scheme(b, group_size=g, act_bits=a) for b, g in ((2, 32), (4, None), (8, 64)) for a in (None, 8)]
LINEAR = [linear.FLOAT, *(linear.ours(s) for s in SCHEMES), linear.ours(SCHEMES[2], first=True), *linear.PEERS]
CONVS = {"3x3 stride 2": (2, 16, 24, 9, 3, 2, 1), "depthwise": (1, 32, 32, 8, 3, 1, 32), "1x1": (1, 32, 8, 7, 1, 1, 1)}


def made(peer: Peer, weight: torch.Tensor, x: torch.Tensor, copies: int = 2):  # type: ignore[no-untyped-def]
    found, missing = build([peer], weight, x, lambda _: copies)
    reason = missing.get(peer.name, "")
    if reason.startswith(("ModuleNotFoundError", "ImportError", "NotImplementedError")):
        pytest.skip(reason)
    assert not reason
    return found[peer.name]


def checkered(weight: torch.Tensor) -> torch.Tensor:
    """Zeros between all neighbours of a row: many libraries add two products in 16 bits on older processors."""
    sizes = weight.shape[1:]
    return weight * (sum(torch.arange(n).view(-1, *[1] * (len(sizes) - 1 - d)) for d, n in enumerate(sizes)) % 2)


def close(peer: Peer) -> float:
    return BFLOAT if "bf16" in peer.name else PRECISION[peer.arithmetic]


@pytest.mark.parametrize("peer", LINEAR, ids=lambda peer: peer.name)
@pytest.mark.parametrize("m", [1, 5])
def test_linear(peer: Peer, m: int) -> None:
    weight, x = checkered(torch.randn(64, 512) / 512**0.5), torch.randn(m, 512)
    found = made(peer, weight, x)
    assert errors(found, F.linear, weight, x)["own_error"] < close(peer)
    assert torch.equal(found.call(0).clone(), found.call(1)), "a copy computes as the first does"
    step = 2.0 ** (1 - min(peer.bits, 16))  # between neighbours of its grid, relative to the largest of a group
    assert (found.values - weight).abs().max() <= 1.1 * step * weight.abs().max()


@pytest.mark.parametrize("case", CONVS)
@pytest.mark.parametrize("name", [p.name for p in conv.racers(conv.Shape(1, 1, 1), [Scheme(4), Scheme(8, act_bits=8)])])
def test_conv(case: str, name: str) -> None:
    shape, weight, x = conv.layer(*CONVS[case])
    peer = next(p for p in conv.racers(shape, [Scheme(4), Scheme(8, act_bits=8)]) if p.name == name)
    weight = checkered(weight)
    found = made(peer, weight, x)
    assert found.call(1).shape == shape(x, weight).shape
    assert errors(found, shape, weight, x)["own_error"] < close(peer)


def test_a_sum_that_stops_is_seen() -> None:
    def short(weight, x, copies):  # type: ignore[no-untyped-def]
        found = linear.torch_float(weight, x, copies)
        return type(found)(lambda i: found.call(i).clamp(min=-100.0), found.values)

    weight, x = torch.randn(8, 400), torch.randn(3, 400)
    assert top_of_range(Peer("short", 32, "fp32", short), F.linear, weight, x) == pytest.approx(
        100 / (0.99 * 400), 0.01
    )
    assert top_of_range(linear.FLOAT, F.linear, weight, x) == pytest.approx(1, abs=1e-5)


def test_the_absent_is_said() -> None:
    def absent(weight, x, copies):  # type: ignore[no-untyped-def]
        import a_library_that_nobody_has  # noqa: F401

    x = torch.randn(1, 32)
    found, missing = build([Peer("absent", 4, "int8", absent), linear.FLOAT], torch.randn(4, 32), x, lambda _: 2)
    assert list(found) == ["float"]
    assert "a_library_that_nobody_has" in missing["absent"]


def test_bytes_to_read() -> None:
    weight = torch.empty(64, 512)
    assert linear.FLOAT.bytes(weight) == 64 * 512 * 4
    for scheme in SCHEMES:
        zero = 2  # the one that a symmetric weight stores
        assert linear.ours(scheme).bytes(weight) == scheme.bytes(weight.shape) - zero


def test_grid_and_fields() -> None:
    weight = torch.randn(6, 64)
    for bits in (2, 4, 8):
        codes, scales = grid(weight, bits, 32)
        assert (spread_out(codes, scales) - weight).abs().max() <= scales.max() * 1.001
        packed = torch.from_numpy(linear.fields(codes, bits)).int()
        back = torch.stack([packed >> at & 2**bits - 1 for at in range(0, 8, bits)], -1).flatten(1)
        assert torch.equal(back - 2 ** (bits - 1), codes.int())


def test_table_of_widths() -> None:
    def row(what: str, bits: int, us: float, m: int = 1, ours: bool = False, right: float = 1.0):  # type: ignore[no-untyped-def]
        return {"shape": "8x8", "m": m, "what": what, "bits": bits, "ours": ours, "us": us, "of_right": right}

    rows = [
        *(row("float", 32, 90), row("w4", 4, 30, ours=True), row("w4 channels_last", 4, 10, ours=True)),
        *(row("w2", 2, 10, ours=True), row("four", 4, 20), row("eight", 8, 5), row("w4 dequantized first", 4, 1)),
        *(row("float", 32, 90, m=4), row("w4", 4, 60, m=4, ours=True), row("four", 4, 20, m=4, right=0.6)),
    ]
    assert tables.markdown(rows, exact=True).splitlines() == [
        "| weight | M=1 | M=4 |",
        "|---|---|---|",
        "| 8x8, w4 | 9.0x, 2.00 of four | 1.5x, 1.50 of float |",
        "| 8x8, w2 | 9.0x, 0.50 of eight |  |",
    ]
    assert "0.33 of four" in tables.markdown(rows)


def test_whole_networks_have_the_layers_that_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(tables.__file__).parent)  # as the benches see each other
    layers, vision = import_module("layers"), import_module("models.vision")
    assert set(vision.MAKE) == set(layers.NETWORKS)
    for name, make in vision.MAKE.items():
        convs = [m for m in make().modules() if isinstance(m, torch.nn.Conv2d)]
        found = Counter((c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0], c.groups) for c in convs)
        listed: Counter[tuple[int, ...]] = Counter()
        for layer, times in layers.NETWORKS[name].items():
            listed[layer.cin, layer.cout, layer.kernel, layer.stride, layer.groups] += times
        assert found == listed
