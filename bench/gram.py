"""What do the looks at a float model cost: Gram matrices, orthogonality, rounding errors, many weights at once?

python bench/gram.py                                     # everything, about 3 minutes
python bench/gram.py --only gram products --isa avx2 --out gram.json

Baselines, all in the same run: torch.mm and a plain read of memory for Grams; two Grams for every ordered pair of
layers, as the authors of OMPQ (arXiv 2109.07865) compute it, for orthogonality; a read of the weight for rounding
errors; a loop over F.linear or F.conv2d, with inputs in the same order of dimensions, for many weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from harness import copies, measure, write
from roofline import peaks

from mpqkern import ops
from mpqkern.ledger import table

mpq = torch.ops.mpqkern
Calls = dict[str, Callable[[int], object]]
# The outputs of ResNet-18's stem, blocks' convolutions and classifier at 224 x 224 pixels, elements a sample.
RESNET18 = [802816] + 4 * [200704] + 4 * [100352] + 4 * [50176] + 4 * [25088] + [1000]
LINEAR = [(1, 1024, 1024), (8, 1024, 1024), (64, 1024, 1024), (256, 4096, 1024)]  # M, N, K
# batch, channels, size, rows, kernel, stride, groups: ResNet-18's, a pointwise, a depthwise
CONV = [
    (8, 3, 224, 64, 7, 2, 1),
    (8, 64, 56, 64, 3, 1, 1),
    (8, 64, 56, 128, 3, 2, 1),
    (8, 128, 28, 128, 3, 1, 1),
    (8, 256, 14, 256, 3, 1, 1),
    (8, 512, 7, 512, 3, 1, 1),
    (8, 256, 14, 1024, 1, 1, 1),
    (8, 144, 56, 144, 3, 1, 144),
]
VARIANTS = 3


def last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def grams() -> Iterator[tuple[str, Calls, int]]:
    """Cases: a name, calls (the baseline first), and the bytes that a call has to read, 0 where that is little."""
    for n in (32, 64, 128, 256):
        for dtype in (torch.float32, torch.bfloat16):
            features = [torch.randn(n, 64, 56, 56).to(dtype) for _ in range(2)]
            flat, turned = [f.flatten(1) for f in features], [last(f) for f in features]
            calls: Calls = {
                "torch.mm": lambda i, f=flat: torch.mm(f[i % 2], f[i % 2].T),
                "gram": lambda i, f=features: mpq.gram([f[i % 2]]),
                "gram, channels last": lambda i, f=turned: mpq.gram([f[i % 2]]),
            }
            yield f"n={n}, {dtype}".replace("torch.", ""), calls, features[0].nbytes


def pairwise(features: list[torch.Tensor]) -> torch.Tensor:
    """Centred Grams of both layers for every ordered pair."""

    def centred(x: torch.Tensor) -> torch.Tensor:
        k = x @ x.T
        return k - k.mean(0) - k.mean(1, keepdim=True) + k.mean()

    out = torch.empty(len(features), len(features))
    for i, x in enumerate(features):
        for j, y in enumerate(features):
            k, m = centred(x), centred(y)
            out[i, j] = (k * m).sum() / (k.norm() * m.norm())
    return out


def orthogonality() -> Iterator[tuple[str, Calls, int]]:
    features = [torch.randn(32, p).relu() for p in RESNET18]
    assert (pairwise(features[9:]) - mpq.orthogonality(features[9:])).abs().max() < 1e-4
    calls: Calls = {"every pair": lambda _: pairwise(features), "orthogonality": lambda _: mpq.orthogonality(features)}
    yield "ResNet-18, n=32", calls, 4 * 32 * sum(RESNET18)


def errors() -> Iterator[tuple[str, Calls, int]]:
    weights, one = [torch.randn(4096, 4096) for _ in range(2)], torch.ones(1)
    for group in (128, 0):
        calls: Calls = {"read": lambda i: torch.dot(weights[i % 2].view(-1), weights[i % 2].view(-1))}
        for bits in ([4], [2, 4, 8]):
            calls[f"probe_errors {bits}"] = lambda i, b=bits, g=group: mpq.probe_errors(weights[i % 2], b, g, True, one)
        calls["quantize to 4"] = lambda i, g=group: mpq.quantize(weights[i % 2], 4, g, True)
        yield f"4096x4096, group {group or 'row'}", calls, 4 * weights[0].numel()


def products() -> Iterator[tuple[str, Calls, int]]:
    for m, n, k in LINEAR:
        x, bytes_each = torch.randn(m, k), 4 * VARIANTS * n * k
        stacks = [torch.randn(VARIANTS, n, k) for _ in range(copies(bytes_each))]
        calls: Calls = {
            "loop": lambda i, x=x, s=stacks: [F.linear(x, w) for w in s[i % len(s)]],
            "probe": lambda i, x=x, s=stacks: mpq.probe_linear(x, s[i % len(s)]),
        }
        yield f"linear M={m} {n}x{k}", calls, bytes_each
    for batch, channels, size, n, kernel, stride, groups in CONV:
        pad, how = kernel // 2, ([stride] * 2, [kernel // 2] * 2, [1, 1], groups)
        stacks = [torch.randn(VARIANTS, n, channels // groups, kernel, kernel) for _ in range(2)]
        for name, order in (("", torch.Tensor.contiguous), (", channels last", last)):
            x, filters = order(torch.randn(batch, channels, size, size)), [[order(w) for w in s] for s in stacks]

            def loop(i: int, x=x, filters=filters, how=(stride, pad, 1, groups)) -> torch.Tensor:  # type: ignore[no-untyped-def]
                return torch.stack([F.conv2d(x, w, None, *how) for w in filters[i % 2]])

            calls = {"loop": loop, "probe": lambda i, x=x, s=stacks, how=how: mpq.probe_conv2d(x, s[i % 2], None, *how)}
            shape = f"{channels}x{size}x{size} to {n}, {kernel}x{kernel}/{stride}"
            yield f"conv {shape}{f', {groups} groups' if groups > 1 else ''}{name}", calls, 0


PARTS = {"gram": grams, "orthogonality": orthogonality, "errors": errors, "products": products}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--isa", default="", choices=["", *ops.ISAS[1:]], help="a lower instruction set")
    parser.add_argument("--out", help="write JSON here")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    if args.isa:
        ops.isa(args.isa)
    bandwidth, rows = peaks().read, []
    print(f"{ops.isa()}, {args.threads} thread(s); memory reads {bandwidth / 1e9:.1f} GB/s")
    lines = [("case", "what", "ms", "+-", "x baseline", "of memory")]
    for part in args.only:
        for case, calls, read in PARTS[part]():
            with torch.inference_mode():
                times = measure(calls, rounds=args.rounds)
            base = next(iter(times.values())).seconds
            for what, t in times.items():
                rows.append({
                    "part": part, "case": case, "what": what, "ms": t.seconds * 1e3, "spread": t.spread,
                    "speedup": base / t.seconds, "memory_roofline": read / bandwidth / t.seconds or None,
                })  # fmt: skip
                cells = f"{t.seconds * 1e3:.2f}", f"{t.spread:.0%}", f"{base / t.seconds:.2f}"
                lines.append((case, what, *cells, f"{read / bandwidth / t.seconds:.2f}" if read else ""))
    print(table(lines, left=(0, 1)))
    write(args.out, {"bench": "gram", "arguments": vars(args), "bytes_per_second": bandwidth, "rows": rows})


if __name__ == "__main__":
    main()
