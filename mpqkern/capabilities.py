"""What runs here: torch, CUDA, instruction set, and which kernel serves each (op, bits, device)."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from . import ops
from .ledger import table
from .scheme import PACKABLE_BITS
from .version import __version__


def capabilities() -> dict[str, Any]:
    """Plain data, ready for JSON; `python -m mpqkern env` prints it."""
    isa = ops.isa()
    cuda = torch.cuda.is_available()
    devices = ["cpu"] + (["cuda"] if cuda else [])
    return {
        "mpqkern": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "isa": isa,
        "isa_asked_for": os.environ.get("MPQKERN_ISA"),
        "compiled": ops.why_plain is None,
        "why_not_compiled": ops.why_plain,
        "cuda_built": any(ops.has_kernel(op, "cuda") for op in ops.SCHEMAS),
        "kernels": [
            {"op": op, "bits": bits, "device": device, **_kernel(op, device, isa)}
            for device in devices
            for op in ops.SCHEMAS
            for bits in (PACKABLE_BITS if "int bits" in ops.SCHEMAS[op] else (None,))  # None: any
        ],
    }


def _kernel(op: str, device: str, isa: str) -> dict[str, str | None]:
    if device != "cpu" and op in ops.STACKED:
        return {"kernel": "torch", "why": "cuBLAS and cuDNN do it best"}
    if ops.why_plain is not None:
        return {"kernel": "plain", "why": ops.why_plain}
    if not ops.has_kernel(op, device):
        return {"kernel": "plain", "why": "for GPUs" if device == "cpu" else "the build had no nvcc"}
    return {"kernel": isa if device == "cpu" else "cuda", "why": None}


def describe(found: dict[str, Any]) -> str:
    """The same as text: facts, then one line for each op and device."""
    facts = [(key, str(value)) for key, value in found.items() if key != "kernels"]
    width = max(len(key) for key, _ in facts)
    lines = [("op", "device", "bits", "kernel", "why")]
    served: dict[tuple[str, ...], list[str]] = {}
    for k in found["kernels"]:
        key = (k["op"], k["device"], k["kernel"], k["why"] or "")
        served.setdefault(key, []).append("any" if k["bits"] is None else str(k["bits"]))
    lines += [(op, device, " ".join(bits), kernel, why) for (op, device, kernel, why), bits in served.items()]
    return (
        "\n".join(f"{key.ljust(width)}  {value}" for key, value in facts) + "\n\n" + table(lines, left=(0, 1, 2, 3, 4))
    )


def processor() -> str:
    try:
        with Path("/proc/cpuinfo").open() as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
