"""How fast is a packed linear, against torch's fp32, against dequantizing first, and against other libraries?

python bench/linear.py                                   # every cell, about 3 minutes
python bench/linear.py --m 1 16 --bits 4 --shapes 4096x4096 --isa avx2 --out linear.json
python bench/linear.py --peers --a8 --out peers.json     # with what is installed of bench/peers; then bench/tables.py
pytest bench/linear.py --benchmark-only                  # the same calls under pytest-benchmark

race.py says what the columns mean. --isa binds mpqkern only; the roof is that of the processor.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from peers import Peer, build
from peers.linear import FLOAT, PEERS, ours
from race import Cell, report

from mpqkern import Scheme, ops

BITS = (2, 4, 8)
SHAPES = ("1024x1024", "4096x4096", "4096x11008")  # N x K
ROWS = (1, 4, 16, 64, 256)


def size(text: str) -> tuple[int, int]:
    n, k = map(int, text.split("x"))
    return n, k


def contenders(schemes: list[Scheme], *, peers: bool = False) -> list[Peer]:
    """torch's float product first, then mpqkern's, then those of others for the same widths."""
    found = [FLOAT]
    for scheme in schemes:
        found += [ours(scheme)] + ([ours(scheme, first=True)] if scheme.act_bits is None else [])
    widths = {FLOAT.bits, *(scheme.bits for scheme in schemes)}
    return found + [peer for peer in PEERS if peers and peer.bits in widths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--m", type=int, nargs="+", default=ROWS, help="rows of activations")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="NxK")
    parser.add_argument("--bits", type=int, nargs="+", default=BITS)
    parser.add_argument("--group", type=int, nargs="+", default=[128], help="group sizes, 0 for the whole row")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--a8", action="store_true", help="with 8-bit activations, too")
    parser.add_argument("--peers", action="store_true", help="with other libraries, too; they take float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--isa", default="", choices=["", *ops.ISAS[1:]], help="a lower instruction set")
    parser.add_argument("--out", help="write JSON here")
    args = parser.parse_args()
    if args.peers and args.dtype != "float32":
        parser.error(f"--dtype {args.dtype} with --peers; wanted float32")
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    if args.isa:
        ops.isa(args.isa)
    schemes = [
        Scheme(b, group_size=group or None, act_bits=a)
        for b in args.bits
        for group in args.group
        for a in ((None, 8) if args.a8 else (None,))
    ]
    racers, dtype = contenders(schemes, peers=args.peers), getattr(torch, args.dtype)

    def cells() -> Iterator[Cell]:
        for shape in args.shapes:
            n, k = size(shape)
            weight = (torch.randn(n, k) / k**0.5).to(dtype)
            for m in args.m:
                yield Cell({"shape": shape, "m": m}, racers, F.linear, weight, torch.randn(m, k).to(dtype))

    report("linear", cells(), args)


@pytest.mark.parametrize("what", ["float", "w2g128", "w4g128", "w8g128"])
@pytest.mark.parametrize("m", [1, 64])
def test_linear(benchmark, m: int, what: str) -> None:  # type: ignore[no-untyped-def]
    torch.set_num_threads(1)
    weight, x = torch.randn(1024, 1024) / 32, torch.randn(m, 1024)
    built, _ = build(contenders([Scheme(b, group_size=128) for b in BITS]), weight, x, lambda _: 16)
    benchmark.group = f"linear 1024x1024 M={m}"
    turn = iter(range(10**9))
    assert benchmark(lambda: built[what].call(next(turn))).shape == (m, 1024)


if __name__ == "__main__":
    main()
