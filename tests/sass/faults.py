"""What must not be in a kernel, and what must."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .assemble import Assembled
from .opcodes import learn
from .table import title


@dataclass(frozen=True)
class Demand:
    """Kernels with such a title hold at least so many of each instruction of so many bits (0: of any)."""

    titles: str
    instructions: dict[str, tuple[int, int]]
    archs: str = "sm_.*"

    def meets(self, name: str, arch: str) -> bool:
        return re.match(self.titles, name) is not None and re.fullmatch(self.archs, arch) is not None


# Copies and reads of tiles are 16 bytes wide; who multiplies matrices does it in tensor cores.
DEMANDS = (
    Demand("few: kernel", {"HMMA": (8, 0), "LDG": (8, 128), "LDS": (4, 128)}),
    Demand(r"many: kernel<\d, __", {"HMMA": (16, 0), "LDSM": (4, 0), "LDGSTS": (3, 128), "LDS": (2, 128)}),
    Demand(r"many: kernel<\d, Int8", {"IMMA": (16, 0), "LDSM": (4, 0), "LDGSTS": (3, 128), "LDS": (2, 128)}),
    Demand(".*warpgroup", {"HGMMA": (2, 0)}, "sm_90a"),  # one may be no more than the end of a group
    Demand("conv_bytes: bytes", {"IMMA": (8, 0)}),
    Demand(r"conv_bytes: bytes<\d, ByPieces", {"LDGSTS": (1, 128)}),
    Demand("conv_halves: halves", {"HMMA": (8, 0), "LDSM": (2, 0)}),
    Demand("conv_tiles: tiles", {"LDS": (8, 128)}),
    Demand("gram: products", {"LDS": (8, 128)}),
    Demand("gram_halves: products", {"HMMA": (16, 0), "LDSM": (12, 0), "LDG": (2, 128)}),
)


def faults(done: Assembled) -> list[str]:
    found = [f"{done.arch}: {line}" for line in done.complaints]
    for name, kernel in done.kernels.items():
        name = title(done.text, name)
        for amount, what in ((kernel.spills, "spills"), (kernel.stack, "stack or local memory")):
            if amount:
                found.append(f"{name} on {done.arch}: {amount} bytes of {what}; wanted none")
        for demand in DEMANDS:
            if not demand.meets(name, done.arch):
                continue
            for op, (least, bits) in demand.instructions.items():
                count = sum(pattern.count(kernel) for pattern in learn(op, done.arch)[bits])
                if count < least:
                    wide = f" of {bits} bits" if bits else ""
                    found.append(f"{name} on {done.arch}: {count} {op}{wide}; wanted at least {least}")
    return found
