"""Reads what ptxas wrote: its log, and the machine code in the ELF file."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass
class Kernel:
    """Bytes of spills, stack and static shared memory; `words` [instructions][2], the low 64 bits first."""

    name: str
    registers: int
    shared: int
    stack: int
    spills: int
    words: NDArray

    @property
    def opcodes(self) -> NDArray:
        """The kind of each instruction, with the kinds of its operands."""
        return self.words[:, 0] & np.uint64(0xFFF)


USED = re.compile(
    r"Compiling entry function '(?P<name>[^']+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<more>[^\n]*)",
    re.S,
)


def read(elf: bytes, log: str) -> dict[str, Kernel]:
    """Kernels by their mangled names."""
    code = sections(elf)
    kernels = {}
    for found in USED.finditer(log):
        shared = re.search(r"(\d+) bytes smem", found["more"])
        kernels[found["name"]] = Kernel(
            found["name"],
            int(found["registers"]),
            int(shared[1]) if shared else 0,
            int(found["stack"]),
            int(found["stores"]) + int(found["loads"]),
            np.frombuffer(code[f".text.{found['name']}"], np.uint64).reshape(-1, 2),
        )
    return kernels


def sections(elf: bytes) -> dict[str, bytes]:
    """The sections of a 64-bit ELF file that hold bytes."""
    (table,), (size, count, names) = struct.unpack_from("<Q", elf, 40), struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    text = headers[names][4]
    return {
        elf[text + name : elf.index(b"\0", text + name)].decode(): elf[at : at + length]
        for name, kind, _, _, at, length in headers
        if kind != 8  # takes memory only
    }


# What ptxas says where nothing is wrong. C7519 tells of a wgmma.fence that it put in itself, which costs nothing.
HARMLESS = re.compile(
    r"ptxas info\s+: (\d+ bytes gmem|Compiling entry|Function properties|Used \d+ registers|Compile time|\(C7519\))"
    r"|\s+\d+ bytes stack frame"
)


def complaints(log: str) -> list[str]:
    """All else: warnings, and what it calls information about products that wait for each other (C7510 and kin)."""
    return [line for line in log.splitlines() if line.strip() and not HARMLESS.match(line)]
