"""What gpu_speed.py times with, and what it holds times against."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

CALLS = 50  # in a graph, at least
Row = dict[str, Any]


@dataclass(frozen=True)
class Device:
    """A clock and its sizes; on the CPU, a stand-in that shows whether everything runs."""

    kind: str
    rounds: int

    @property
    def cuda(self) -> bool:
        return self.kind == "cuda"

    def copies(self, bytes_each: float) -> int:
        """How many copies miss the cache each time."""
        cache = torch.cuda.get_device_properties(0).L2_cache_size if self.cuda else 2**16
        return max(2, min(64, int(4 * cache / max(1, bytes_each)) + 1))

    def seconds(self, call: Callable[[int], object], copies: int = 1) -> dict[str, Any]:
        """Of one `call(i)`, i counting up: the median, its spread, and how it was timed."""
        count = -(-CALLS // copies) * copies if self.cuda else 2
        if not self.cuda:
            return summary([self.wall(call, count) for _ in range(self.rounds)], "wall")
        torch.cuda.synchronize()  # the other stream reads what this one made
        with torch.cuda.stream(torch.cuda.Stream()):  # libraries pick kernels and take workspaces in their first calls
            for i in range(3):
                call(i)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.calls(call, count)
        except RuntimeError:  # a call that waits for the GPU fits into no graph
            torch.cuda.synchronize()
            return summary([self.events(lambda: self.calls(call, count), count) for _ in range(self.rounds)], "eager")
        for _ in range(3):
            graph.replay()
        return summary([self.events(graph.replay, count) for _ in range(self.rounds)], "graph")

    @staticmethod
    def calls(call: Callable[[int], object], count: int) -> None:
        for i in range(count):
            call(i)

    @staticmethod
    def events(work: Callable[[], object], count: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count

    def wall(self, call: Callable[[int], object], count: int) -> float:
        start = time.perf_counter()
        self.calls(call, count)
        return (time.perf_counter() - start) / count


def summary(times: Sequence[float], how: str) -> dict[str, Any]:
    """
    >>> summary([1.0, 2.0, 4.0], "graph")
    {'us': 2000000.0, 'spread': 0.5, 'timed': 'graph'}
    """
    middle = median(times)
    return {"us": middle * 1e6, "spread": median(abs(t - middle) for t in times) / middle, "timed": how}


def ceilings(device: Device) -> dict[str, float]:
    """Bytes and float operations a second; a copy counts what it reads and what it writes."""
    size, side = (2**30, 8192) if device.cuda else (2**22, 128)
    source = torch.randn(size // 4, device=device.kind)
    target = torch.empty_like(source)
    copied = device.seconds(lambda i: target.copy_(source))["us"]
    read = min(device.seconds(lambda i, f=f: f(source))["us"] for f in (torch.sum, torch.amax))
    found = {"copy": 2 * size * 1e6 / copied, "read": size * 1e6 / read}
    for dtype in (torch.float16, torch.bfloat16):
        a, b = (torch.randn(side, side, device=device.kind).to(dtype) for _ in range(2))
        found[short(dtype)] = 2 * side**3 * 1e6 / device.seconds(lambda i, a=a, b=b: a @ b)["us"]
    return found


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rates(row: Row, peak: dict[str, float], *, bytes: float, operations: float = 0) -> Row:
    """With what the time means.

    >>> rates({"us": 2.0, "dtype": "float16"}, {"read": 4e9, "float16": 1e9}, bytes=4e3, operations=1e3)
    {'us': 2.0, 'dtype': 'float16', 'gb_s': 2.0, 'of_read': 0.5, 'tflop_s': 0.0005, 'of_matmul': 0.5}
    """
    a_second = 1e6 / row["us"]
    out = row | {"gb_s": bytes * a_second / 1e9, "of_read": bytes * a_second / peak["read"]}
    if operations and row["dtype"] in peak:
        of = operations * a_second
        out |= {"tflop_s": of / 1e12, "of_matmul": of / peak[row["dtype"]]}
    return out
