"""The head and the file of a bench's results; times themselves are those of mpqkern.latency.turns."""

from __future__ import annotations

import ctypes
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mpqkern
from mpqkern.latency.turns import Timing, copies, measure, read_bandwidth

__all__ = ["Timing", "copies", "environment", "keep_memory", "measure", "read_bandwidth", "write"]

M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1


def environment() -> dict[str, Any]:
    """Machine, versions and commit, for the head of a result file."""
    found = mpqkern.capabilities()
    return {key: value for key, value in found.items() if key != "kernels"} | {"commit": _commit()}


def keep_memory() -> None:
    """What one call frees serves the next. Left to itself, glibc gets pieces of over 32 MiB from the system each time,
    and having their pages cleared takes up to four times as long as a convolution that fills them."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def write(path: str | Path | None, results: Mapping[str, Any]) -> None:
    """Where to (`out` among the arguments) is nobody else's business."""
    if path is None:
        return
    asked = {name: value for name, value in results.get("arguments", {}).items() if name != "out"}
    told = {"environment": environment(), **results} | ({"arguments": asked} if asked else {})
    Path(path).write_text(json.dumps(told, indent=1) + "\n")


def _commit() -> str:
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")
