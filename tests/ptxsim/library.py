"""Builds the CUDA sources with tests/ptxsim/fakecudart.c and runs their launches in the interpreter."""

from __future__ import annotations

import ctypes as c
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from . import arithmetic, atomics, warp, warpgroup  # noqa: F401  (they fill the table of instructions)
from .block import Block, Dim
from .memory import Global, Traffic
from .program import Kernel, PtxError, parse

ROOT = Path(__file__).resolve().parent.parent.parent
LAUNCH_FAILED = 719  # cudaErrorLaunchFailure


# -lineinfo: errors name source lines. Not compressed: the PTX is read out of the library as text.
FLAGS = "-std=c++17 -O3 -lineinfo --no-compress -Xcompiler -fPIC"


def _flags(source: Path) -> list[str]:
    arch = "compute_90a" if source.name.startswith("warpgroup") else "compute_80"  # the oldest that has its kernels
    return [*FLAGS.split(), "-gencode", f"arch={arch},code={arch}"]


def build() -> Path | None:
    """The library, made anew of the sources that changed; None where there is no nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    version = subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout

    def compiled(source: Path) -> Path:
        flags = _flags(source)
        made_of = [version, " ".join(flags).encode(), *(path.read_bytes() for path in _includes(source))]
        return _make(_kept(source.stem, ".o", made_of), [nvcc, *flags, "-c", str(source)])

    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), Path(__file__).with_name("fakecudart.c")]
    with _alone(), ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(compiled, sources))
        out = _kept("kernels", ".so", [str(path).encode() for path in objects])
        return _make(out, [nvcc, "-shared", "-cudart", "none", *map(str, objects)])


@contextmanager
def _alone() -> Iterator[None]:
    """Of several processes that test at a time the first one builds, and the others find what it has made."""
    lock = ROOT / "build" / "ptxsim" / ".lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def _includes(path: Path) -> list[Path]:
    """`path` and all that it includes of ours."""
    found = [path]
    for source in found:  # which grows on the way
        for name in re.findall(r'^#include "(.+)"', source.read_text(), re.M):
            header = (source.parent / name).resolve()
            if header not in found:
                found.append(header)
    return found


def _kept(name: str, suffix: str, made_of: list[bytes]) -> Path:
    return ROOT / "build" / "ptxsim" / f"{name}-{hashlib.sha256(b'|'.join(made_of)).hexdigest()[:16]}{suffix}"


def _make(out: Path, command: list[str]) -> Path:
    if not out.is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        mine = out.with_name(f"{os.getpid()}-{out.name}")  # several runs may build at a time
        done = subprocess.run([*command, "-o", mine], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
        mine.replace(out)
    return out


class Placed(Protocol):
    """An argument that is not a number or an array: a structure that holds addresses of arrays."""

    def place(self, memory: Global) -> c.Structure: ...


class Library:
    """The launchers of csrc/cuda, called with NumPy arrays."""

    def __init__(self, path: Path) -> None:
        self.path, self.lib = path, c.CDLL(str(path))
        self.memory, self.cost = Global(), Traffic()
        self.error: Exception | None = None
        self.most_blocks = 1 << 31  # of a grid in x; fewer make blocks stride
        self.kernels: dict[str, Kernel] = {}
        self.lib.sim_fatbin.restype = c.POINTER(c.c_char)
        size = c.c_uint64()
        for i in range(self.lib.sim_fatbins()):  # one for each source
            blob = c.string_at(self.lib.sim_fatbin(i, c.byref(size)), size.value)
            at = blob.index(b".version")
            self.kernels |= parse(blob[at : blob.index(b"\0", at)].decode())
        kind = c.CFUNCTYPE(c.c_int, c.c_char_p, c.POINTER(c.c_uint), c.c_size_t, c.POINTER(c.c_void_p))
        self._launch = kind(self._run)  # kept: C holds only a pointer
        self.lib.sim_set_launch(self._launch)
        self._shared_of = c.CFUNCTYPE(c.c_size_t, c.c_char_p)(self._static_shared)
        self.lib.sim_set_shared_of(self._shared_of)

    def call(self, launcher: str, *args: Any) -> Traffic:
        """Calls a launcher; the arrays among `args`, and those of structures, are all the memory there is."""
        self.memory, self.cost, self.error = Global(), Traffic(), None
        rc = getattr(self.lib, launcher)(*[self._argument(a) for a in args])
        if self.error is not None:
            raise self.error
        if rc:
            raise PtxError(f"{launcher} returned {rc}; wanted 0")
        return self.cost

    def _argument(self, a: Any) -> Any:
        if a is None:
            return c.c_void_p(None)
        if isinstance(a, int):
            return c.c_int64(a)
        if isinstance(a, np.ndarray):
            return c.c_void_p(self.memory.place(a))
        return c.byref(a.place(self.memory))

    def _static_shared(self, name: bytes) -> int:
        return sum(size for size, _ in self.kernels[name.decode()].shared.values())

    def _run(self, name: bytes, shape: Any, dynamic: int, args: Any) -> int:
        try:
            kernel = self.kernels[name.decode()]
            values = [c.string_at(args[i], size) for i, (_, size) in enumerate(kernel.params)]
            grid: Dim = (min(shape[0], self.most_blocks), shape[1], shape[2])
            block: Dim = tuple(shape[3:6])
            with np.errstate(all="ignore"):
                for z, y, x in product(*map(range, reversed(grid))):
                    Block(kernel, self.memory, values, (x, y, z), block, grid, dynamic, self.cost).run()
        except Exception as error:  # ctypes would swallow it
            self.error = error
            return LAUNCH_FAILED
        return 0
