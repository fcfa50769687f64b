"""Does every CUDA kernel compute what plain PyTorch computes? Each once, at shapes that divide nothing, in seconds.

python bench/gpu_check.py
compute-sanitizer --tool racecheck python bench/gpu_check.py      # what these shapes are for

Most of it is to the bit: weights, activations and scales are small integers, so that all sums are exact in whatever
order they are added. fp16 products of packed weights are right only where the tensor cores take subnormal numbers for
what they are: there the bits of a code are an fp16 as they stand.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mpqkern import capabilities, packed, plain
from mpqkern.scheme import padded

HALVES = torch.float16, torch.bfloat16
FLOATS = torch.float32, *HALVES
BITS = 2, 4, 8
N, K = 40, 200  # rows end inside a strip of 16, columns inside a group of 128
ROWS = 1, 9, 33, 65, 130  # of activations: every number of columns that linear_plan knows
CONVS = (
    (12, 20, 3, 1, 1),
    (16, 40, 1, 1, 1),
    (3, 16, 5, 2, 1),
    (32, 72, 3, 1, 2),
    (24, 24, 3, 2, 24),
)  # channels, kernel, stride, groups
Case = tuple[str, str, tuple[Any, ...], float]  # a name, an op, its arguments, the relative error that it may have


def whole(*shape: int, low: int = -1, high: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(low, high + 1, shape).to(dtype)


def weight(bits: int, group: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scales of 1 and 2, whole zeros."""
    groups = -(-padded(k) // group) if group else 1
    codes = torch.randint(2**bits, (n, k), dtype=torch.uint8)
    zeros = whole(n, groups, low=0, high=2**bits - 1, dtype=torch.float16)
    return packed.pack(codes, bits), whole(n, groups, low=1, high=2, dtype=torch.float16), zeros


def layouts() -> Iterator[Case]:
    for bits in BITS:
        codes = torch.randint(2**bits, (N, K), dtype=torch.uint8)
        q, scales, zeros = weight(bits, 64, N, K)
        yield f"pack {bits}", "pack", (codes, bits), 0
        yield f"unpack {bits}", "unpack", (q, bits, K), 0
        yield f"dequantize {bits}", "dequantize", (q, scales, zeros, bits, 64, K), 0


def linears() -> Iterator[Case]:
    for dtype in HALVES:
        for bits in BITS:
            for group in (32, 128, 0):
                q, scales, zeros = weight(bits, group, N, K)
                for m in ROWS:
                    name = f"linear {bits} bits, group {group}, {m} x {str(dtype).removeprefix('torch.')}"
                    args = (whole(m, K, dtype=dtype), q, scales, zeros, whole(N, dtype=dtype), bits, group)
                    yield name, "linear", args, 0
                    yield f"{name}, 8-bit activations", "linear", (*args, 8, torch.ones(1)), 0


def convolutions() -> Iterator[Case]:
    for channels, n, kernel, stride, groups in CONVS:
        k = kernel**2 * channels // groups
        how = ([kernel] * 2, [stride] * 2, [kernel // 2] * 2, [1, 1], groups)
        for dtype in FLOATS:
            for bits in BITS:
                for form in (torch.contiguous_format, torch.channels_last):
                    x = whole(2, channels, 11, 9, dtype=dtype).contiguous(memory_format=form)
                    name = f"conv {channels}>{n} k{kernel} {bits} bits, {dtype}, {form}".replace("torch.", "")
                    args = (x, *weight(bits, 0, n, k), whole(n, dtype=dtype), bits, 0, *how)
                    yield name, "conv2d", args, 0
                    yield f"{name}, 8-bit activations", "conv2d", (*args, 8, torch.ones(1)), 0
                    if dtype == torch.float32:
                        args = (torch.randn(x.shape).to(x), *weight(bits, 32, n, k), None, bits, 32, *how, 8)
                        yield f"{name}, a scale a sample", "conv2d", args, 1e-6


def analysis() -> Iterator[Case]:
    rows = torch.randn(N, K)
    for bits in BITS:
        for search in ("minmax", "mse"):
            yield f"quantize {bits} {search}", "quantize", (rows, bits, 64, False, search), 1e-5
    fractions = torch.tensor([1.0, 0.8])
    yield "probe_errors", "probe_errors", (rows, list(BITS), 64, True, fractions), 1e-5
    for n in (5, 33, 70):
        for dtype in FLOATS:
            features = [whole(n, 300, low=-3, high=3, dtype=dtype) for _ in range(2)]
            yield f"gram {n} {dtype}", "gram", (features, False), 0
            yield f"gram {n} {dtype} centred", "gram", (features, True), 1e-5
    yield "orthogonality", "orthogonality", ([torch.randn(33, 300), torch.randn(33, 130)],), 1e-5


def probes() -> Iterator[Case]:
    for dtype in FLOATS:
        for m in (1, 33):
            args = (whole(m, K, dtype=dtype), whole(3, N, K, dtype=dtype))
            for bias in (None, whole(N, dtype=dtype)):
                yield (
                    f"probe_linear {m} x {dtype}, {'no ' if bias is None else ''}bias",
                    "probe_linear",
                    (*args, bias),
                    0,
                )
        for channels, n, kernel, stride, groups in CONVS:
            how = ([stride] * 2, [kernel // 2] * 2, [1, 1], groups)
            for form in (torch.contiguous_format, torch.channels_last):
                x = whole(2, channels, 11, 9, dtype=dtype).contiguous(memory_format=form)
                weights = whole(3, n, channels // groups, kernel, kernel, dtype=dtype)
                name = f"probe_conv2d {channels}>{n} k{kernel}, {dtype}, {form}".replace("torch.", "")
                yield name, "probe_conv2d", (x, weights, whole(n, dtype=dtype), *how), 0
    # what TF32 would round away
    x, weights = whole(2, 16, 11, 9, low=-4095, high=4095), whole(3, 8, 16, 1, 1)
    yield "probe_conv2d in fp32", "probe_conv2d", (x, weights, None, [1, 1], [0, 0], [1, 1], 1), 0


def on(device: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)  # keeps the order of memory
    return [on(device, v) for v in value] if isinstance(value, list) else value


def wrong(case: Case, device: str) -> str | None:
    """What is wrong with the op's result, if anything."""
    _, op, args, bar = case
    want = getattr(plain, op)(*args)
    got = getattr(torch.ops.mpqkern, op)(*(on(device, a) for a in args))
    pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
    for g, w in ((g.cpu(), w) for g, w in pairs):
        if g.shape != w.shape or g.dtype != w.dtype:
            return f"{g.dtype} {list(g.shape)}, not {w.dtype} {list(w.shape)}"
        error = (g.double() - w.double()).norm() / w.double().norm().clamp(min=1e-30)
        if not error <= bar:
            return f"relative error {float(error):.1e}, more than {bar:.0e}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.device == "cuda" and not capabilities()["cuda_built"]:
        print("mpqkern was built without CUDA kernels")
        return 1
    done, failed = 0, []
    for part in (layouts, linears, convolutions, analysis, probes):
        for case in part():
            try:
                problem = wrong(case, args.device)
            except Exception as error:  # the next kernels are still worth a look
                problem = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            done += 1
            if problem is not None:
                failed.append(case[0])
                print(f"{case[0]}: {problem}")
    lost = any(name.startswith("linear") and name.endswith(" x float16") for name in failed)
    print(f"fp16 subnormals: {'lost' if lost else 'as they are'}")
    print(f"{done - len(failed)} of {done} calls are right on {args.device}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
