"""What this machine can do at best, which benchmarks hold their figures against: the one home of rooflines.

    python bench/roofline.py [--threads 1]

Arithmetic and eight streams of reading are timed in roofline.cpp, compiled on the fly. Without a compiler, or on
another processor than x86, torch's own products stand in for reading, and there are no arithmetic peaks.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import measure

BYTES = 256 * 2**20  # read by each thread: far more than the caches
TIMES = 2_000_000  # rounds of multiply-adds: some milliseconds, long beside the start of a thread


@dataclass(frozen=True)
class Peaks:
    """Of all threads together, a second."""

    read: float  # bytes from memory
    fp32: float | None  # multiply-adds; None: not known
    int8: float | None

    def seconds(self, read: float, macs: float, arithmetic: str) -> float:
        """No kernel is faster that reads so many bytes and does so many multiply-adds of one kind."""
        peak = {"fp32": self.fp32, "int8": self.int8}[arithmetic]
        return max(read / self.read, macs / peak if peak else 0.0)

    def __str__(self) -> str:
        known = [f"{peak / 1e9:.0f} G {name} multiply-adds/s" for name, peak in
                 (("fp32", self.fp32), ("int8", self.int8)) if peak]  # fmt: skip
        return ", ".join([f"memory reads {self.read / 1e9:.1f} GB/s", *known])


def peaks(rounds: int = 5) -> Peaks:
    """Medians, for as many threads as torch uses now."""
    threads = torch.get_num_threads()
    library = compiled()
    data = [torch.ones(BYTES // 4) for _ in range(threads if library else 1)]
    with torch.inference_mode(), ThreadPoolExecutor(threads) as pool:
        if library is None:
            rows, ones = data[0].view(8, -1), torch.ones(BYTES // 32)
            calls = {"dot": lambda i: torch.dot(data[0], data[0]), "mv": lambda i: torch.mv(rows, ones)}
            return Peaks(max(BYTES / t.seconds for t in measure(calls, rounds=rounds).values()), None, None)

        def all_at_once(work: Callable[[int], int]) -> Callable[[int], object]:
            return (lambda i: work(0)) if threads == 1 else (lambda i: list(pool.map(work, range(threads))))

        found = measure(
            {
                "1 stream": all_at_once(lambda t: library.read_memory(data[t].data_ptr(), BYTES, 1)),
                "8 streams": all_at_once(lambda t: library.read_memory(data[t].data_ptr(), BYTES, 8)),
                "fp32": all_at_once(lambda t: library.multiply_add_fp32(TIMES)),
                "int8": all_at_once(lambda t: library.multiply_add_int8(TIMES)),
            },
            rounds=rounds,
        )
    reading = min(found["1 stream"].seconds, found["8 streams"].seconds)
    macs = {kind: threads * getattr(library, f"multiply_add_{kind}")(TIMES) for kind in ("fp32", "int8")}
    return Peaks(threads * BYTES / reading, *(macs[kind] / found[kind].seconds for kind in macs))


def compiled() -> ctypes.CDLL | None:
    """roofline.cpp as a library for this very processor, or None."""
    source = Path(__file__).with_suffix(".cpp")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "roofline.so"
        command = [os.environ.get("CXX", "c++"), "-O3", "-march=native", "-fPIC", "-shared", source, "-o", built]
        try:
            subprocess.run(command, capture_output=True, check=True)
            library = ctypes.CDLL(str(built))
        except (OSError, subprocess.CalledProcessError):
            return None
    library.read_memory.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for function in (library.read_memory, library.multiply_add_fp32, library.multiply_add_int8):
        function.restype = ctypes.c_int64
    for function in (library.multiply_add_fp32, library.multiply_add_int8):
        function.argtypes = (ctypes.c_int64,)
    return library


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    print(peaks())
