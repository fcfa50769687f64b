"""Kept: times on disk, so that what was measured once on a machine need not be measured again."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
from hashlib import sha256
from pathlib import Path

import torch

from .. import ops
from ..capabilities import processor
from ..measuring.bank import write_file
from ..version import __version__

log = logging.getLogger("mpqkern")


class Kept:
    """Milliseconds by shape and scheme. One file for each machine, version and number of threads."""

    def __init__(self, cache: bool | str | os.PathLike[str], device: torch.device) -> None:
        where = {
            "mpqkern": __version__,
            "torch": torch.__version__,
            "machine": f"{platform.machine()} {processor()}",
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {ops.isa()}",
            "threads": torch.get_num_threads(),
        }
        self.where, self.path = where, None
        self.ms: dict[str, dict[str, float]] = {}
        if cache is not False:
            folder = Path(os.environ.get("MPQKERN_CACHE", "~/.cache/mpqkern") if cache is True else cache).expanduser()
            if folder.exists() and not folder.is_dir():
                raise ValueError(f"cache={str(folder)!r} is a file; wanted a folder")
            self.path = folder / f"latency-{sha256(json.dumps(where).encode()).hexdigest()[:16]}.json"
            self.ms = _read(self.path, where)

    def get(self, shape: str, scheme: str) -> float | None:
        return self.ms.get(shape, {}).get(scheme)

    def put(self, shape: str, scheme: str, ms: float) -> None:
        self.ms.setdefault(shape, {})[scheme] = ms

    def save(self) -> None:
        """Together with what others have written meanwhile. That nothing can be written is no reason to fail."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            ms = _read(self.path, self.where)
            for shape, row in self.ms.items():
                ms.setdefault(shape, {}).update(row)
            write_file(self.path, json.dumps({"where": self.where, "ms": ms}, indent=1).encode())
        except OSError as error:
            log.warning("latencies are not kept: %s", error)


def _read(path: Path, where: dict) -> dict[str, dict[str, float]]:
    try:
        found = json.loads(path.read_text())
        if found["where"] != where:
            raise ValueError("it is of another machine")
        ms = {str(shape): {str(s): float(v) for s, v in row.items()} for shape, row in found["ms"].items()}
        if not all(math.isfinite(v) and v >= 0 for row in ms.values() for v in row.values()):
            raise ValueError("it holds times that are none")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s cannot be used and is measured anew: %s", path, error)
        return {}
    return ms
