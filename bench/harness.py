"""The head and the file of a bench's results; times themselves are those of mpqkern.latency.turns."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mpqkern
from mpqkern.latency.turns import Timing, copies, measure, read_bandwidth

__all__ = ["Timing", "copies", "environment", "measure", "read_bandwidth", "write"]


def environment() -> dict[str, Any]:
    """Machine, versions and commit, for the head of a result file."""
    found = mpqkern.capabilities()
    return {key: value for key, value in found.items() if key != "kernels"} | {"commit": _commit()}


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
