"""How fast is a packed linear, against torch's fp32 and against dequantizing first?

python bench/linear.py                                   # every cell, about 3 minutes
python bench/linear.py --m 1 16 --bits 4 --shapes 4096x4096 --isa avx2 --out linear.json
pytest bench/linear.py --benchmark-only                  # the same calls under pytest-benchmark
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import copies, measure, read_bandwidth, write

from mpqkern import Scheme, ops
from mpqkern.ledger import table

BITS = (2, 4, 8)
SHAPES = ("1024x1024", "4096x4096", "4096x11008")  # N x K
ROWS = (1, 4, 16, 64, 256)


def size(text: str) -> tuple[int, int]:
    n, k = map(int, text.split("x"))
    return n, k


def contenders(
    n: int, k: int, m: int, schemes: list[Scheme], dtype: torch.dtype
) -> tuple[dict[str, Callable[[int], object]], dict[str, float]]:
    """Calls by name, and each packed one's largest error relative to the largest exact result."""
    element = torch.finfo(dtype).bits // 8
    floats = [torch.randn(n, k).to(dtype) / k**0.5 for _ in range(copies(element * n * k))]
    x = torch.randn(m, k).to(dtype)
    exact = F.linear(x.double(), floats[0].double())
    calls: dict[str, Callable[[int], object]] = {"float": lambda i: F.linear(x, floats[i % len(floats)])}
    errors = {}
    for scheme in schemes:
        group, count = scheme.group_size or 0, copies(scheme.bytes((n, k)))
        made = [torch.ops.mpqkern.quantize(w, scheme.bits, group, scheme.symmetric)[:3] for w in floats[:count]]
        # further copies of the same values: it is the addresses that matter
        packed = [tuple(t.clone() for t in made[i % len(made)]) for i in range(count)]

        def run(i: int, packed=packed, s=scheme, group=group) -> torch.Tensor:  # type: ignore[no-untyped-def]
            return torch.ops.mpqkern.linear(x, *packed[i % len(packed)], None, s.bits, group, s.act_bits)

        def first(i: int, packed=packed, s=scheme, group=group) -> torch.Tensor:  # type: ignore[no-untyped-def]
            return F.linear(x, torch.ops.mpqkern.dequantize(*packed[i % len(packed)], s.bits, group, k).to(dtype))

        calls[str(scheme)] = run
        if scheme.act_bits is None:
            calls[f"{scheme} dequantized first"] = first
        errors[str(scheme)] = float((run(0).double() - exact).abs().max() / exact.abs().max())
    return calls, errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--m", type=int, nargs="+", default=ROWS, help="rows of activations")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="NxK")
    parser.add_argument("--bits", type=int, nargs="+", default=BITS)
    parser.add_argument("--group", type=int, default=128, help="group size, 0 for the whole row")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--a8", action="store_true", help="with 8-bit activations, too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--isa", default="", choices=["", *ops.ISAS[1:]], help="a lower instruction set")
    parser.add_argument("--out", help="write JSON here")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    if args.isa:
        ops.isa(args.isa)
    schemes = [
        Scheme(b, group_size=args.group or None, act_bits=a)
        for b in args.bits
        for a in ((None, 8) if args.a8 else (None,))
    ]
    bandwidth, rows = read_bandwidth(), []
    print(f"{ops.isa()}, {args.threads} thread(s), {args.dtype}; memory reads {bandwidth / 1e9:.1f} GB/s")
    for shape in args.shapes:
        n, k = size(shape)
        for m in args.m:
            with torch.inference_mode():
                calls, errors = contenders(n, k, m, schemes, getattr(torch, args.dtype))
                times = measure(calls, rounds=args.rounds)
            for name, t in times.items():
                scheme = next((s for s in schemes if str(s) == name.split()[0]), None)
                weight = scheme.bytes((n, k)) if scheme else n * k * torch.finfo(getattr(torch, args.dtype)).bits // 8
                rows.append({
                    "shape": shape, "m": m, "what": name, "us": t.seconds * 1e6, "spread": t.spread,
                    "speedup": times["float"].seconds / t.seconds, "memory_roofline": weight / bandwidth / t.seconds,
                    "error": errors.get(name),
                })  # fmt: skip
    lines = [("N x K", "M", "what", "us", "+-", "x float", "of memory", "error to fp32")]
    for r in rows:
        error = "" if r["error"] is None else f"{r['error']:.4f}"
        lines.append((r["shape"], str(r["m"]), r["what"], f"{r['us']:.0f}", f"{r['spread']:.0%}", f"{r['speedup']:.2f}",
                      f"{r['memory_roofline']:.2f}", error))  # fmt: skip
    print(table(lines, left=(0, 2)))
    write(args.out, {"bench": "linear", "arguments": vars(args), "bytes_per_second": bandwidth, "rows": rows})


@pytest.mark.parametrize("what", ["float", "w2g128", "w4g128", "w8g128"])
@pytest.mark.parametrize("m", [1, 64])
def test_linear(benchmark, m: int, what: str) -> None:  # type: ignore[no-untyped-def]
    torch.set_num_threads(1)
    schemes = [Scheme(b, group_size=128) for b in BITS if what == f"w{b}g128"]
    calls, errors = contenders(1024, 1024, m, schemes, torch.float32)
    benchmark.group = f"linear 1024x1024 M={m}"
    turn = iter(range(10**9))
    benchmark(lambda: calls[what](next(turn)))
    assert all(error < 1 for error in errors.values())


if __name__ == "__main__":
    main()
