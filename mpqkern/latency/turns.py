"""Calls timed in turn: measuring fairly on machines that are never quite idle.

All contenders run in turn in every round, so that a slow spell hits them alike; what is reported is the median over
rounds, its spread (median absolute deviation), and ratios within this one run. Before a turn's clock starts, a look at
much other memory takes away what the one before has left, caches full of results that have yet to be written to memory,
which made the next contender up to half slower; then some calls warm up. With one thread the clock is the process's
own CPU time, which other processes do not lengthen. Weights rotate through copies that together exceed the caches, as
they do in a real network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch

ROTATE_BYTES = 64 * 2**20  # more than the last-level cache


@dataclass(frozen=True)
class Timing:
    seconds: float  # median
    spread: float  # median absolute deviation / median
    rounds: int


def copies(bytes_each: int) -> int:
    """How many copies of a weight to rotate through."""
    return max(2, min(256, -(-ROTATE_BYTES // max(1, bytes_each))))


def measure(
    calls: Mapping[str, Callable[[int], object]], *, rounds: int = 15, min_seconds: float = 2e-3
) -> dict[str, Timing]:
    """Times `call(i)` for each contender, i counting up so that it can rotate its data."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    repeats, samples, turn = {}, {name: [] for name in calls}, dict.fromkeys(calls, 0)
    for name, call in calls.items():  # warm up, and find how many calls fill min_seconds
        start, count = time.perf_counter(), 0
        while count < 2 or time.perf_counter() - start < min_seconds:
            call(count)
            count += 1
        repeats[name] = count
    other = torch.ones(ROTATE_BYTES // 4, dtype=torch.float32, device="cpu")
    for _ in range(rounds):
        for name, call in calls.items():
            other.sum()
            for _ in range(1 + repeats[name] // 2):
                call(turn[name])
                turn[name] += 1
            start = clock()
            for _ in range(repeats[name]):
                call(turn[name])
                turn[name] += 1
            samples[name].append((clock() - start) / repeats[name])
    result = {}
    for name, values in samples.items():
        middle = median(values)
        result[name] = Timing(middle, median(abs(v - middle) for v in values) / middle, rounds)
    return result


def read_bandwidth(size: int = 2**29) -> float:
    """Bytes a second that this many threads read from `size` bytes of memory: the roofline of one activation row.

    The best of one stream (a dot product) and of eight (a matrix of eight long rows times a vector).
    """
    x, v = torch.ones(8, size // 32), torch.ones(size // 32)
    with torch.inference_mode():
        found = measure({"dot": lambda i: torch.dot(x.view(-1), x.view(-1)), "mv": lambda i: torch.mv(x, v)}, rounds=5)
    return max(4 * x.numel() / found["dot"].seconds, 4 * (x.numel() + v.numel()) / found["mv"].seconds)
