"""What every kernel takes of a multiprocessor, as a page of the documentation, which tests read back as a budget."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import CDLL, c_char_p, c_void_p, string_at
from dataclasses import dataclass
from itertools import product

import torch

from .. import ptxsim
from ..cuda_linear import HALVES, Case, Interpreted
from .assemble import ARCHS, ROOT, assemble, modules

PAGE = ROOT / "docs" / "cuda-kernels.md"
# of a multiprocessor: threads, blocks, bytes of shared memory
LIMITS = {
    "sm_80": (2048, 32, 164 << 10),
    "sm_86": (1536, 16, 100 << 10),
    "sm_89": (1536, 24, 100 << 10),
    "sm_90": (2048, 32, 228 << 10),
    "sm_90a": (2048, 32, 228 << 10),
}
REGISTERS, REGISTERS_AT_ONCE = 1 << 16, 8  # of a multiprocessor; a thread gets a multiple of
SHARED_AT_ONCE, SHARED_OF_SYSTEM = 128, 1 << 10  # bytes: a block gets a multiple of, and this much more


@dataclass
class Row:
    threads: int  # at most, and 0 where __launch_bounds__ does not tell
    shared: int  # bytes
    dynamic: int  # bytes more that launches ask for
    registers: dict[str, int]  # by architecture

    def blocks(self, arch: str) -> int:
        """How many a multiprocessor holds at a time."""
        threads, blocks, shared = LIMITS[arch]
        each = up(self.shared + self.dynamic, SHARED_AT_ONCE) + SHARED_OF_SYSTEM
        warps = REGISTERS // (32 * up(self.registers[arch], REGISTERS_AT_ONCE)) // 4 * 4  # four schedulers share them
        return min(blocks, threads // self.threads, shared // each, warps // (self.threads // 32))


def up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def demangled(name: str) -> str:
    """By the C++ library that torch needs too."""
    demangle = CDLL("libstdc++.so.6").__cxa_demangle
    demangle.restype, demangle.argtypes = c_void_p, [c_char_p, c_void_p, c_void_p, c_void_p]
    found = demangle(name.encode(), None, None, None)
    return string_at(found).decode() if found else name  # a C name stays


def title(module: str, name: str) -> str:
    """many: kernel<4, __half, 128, false>"""
    source = re.search(r'\.file\s+1 "(?:[^"]*/)?(\w+)\.\w+"', module)[1]  # type: ignore[index]
    plain = demangled(name).replace("(anonymous namespace)::", "").replace("mpq::", "").removeprefix("void ")
    return f"{source}: {re.sub(r'^[a-z]+_kernel::', '', plain.partition('(')[0])}"


@contextmanager
def launches(library: ptxsim.Library) -> Iterator[dict[str, int]]:
    """By kernel, the shared memory that launches ask for; meanwhile nothing is launched."""
    asked: dict[str, int] = {}

    def note(name: bytes, shape: object, dynamic: int, args: object) -> int:
        asked[name.decode()] = dynamic
        return 0

    instead = type(library._launch)(note)
    library.lib.sim_set_launch(instead)
    try:
        yield asked
    finally:
        library.lib.sim_set_launch(library._launch)


def dynamic_bytes(library: ptxsim.Library) -> dict[str, int]:
    """Of all kernels that ask for any."""
    calls, x = Interpreted(library), {t: torch.zeros(40, 256, dtype=t) for t in HALVES}
    with launches(library) as asked:
        for bits, group in product((2, 4, 8), (0, 32)):
            case = Case(16, 256, bits, group, "mid")
            for columns in (32, 64, 128):
                for t in HALVES:
                    calls.many(case, x[t], columns)
                    if columns > 32:
                        calls.warpgroup(case, x[t], columns)
                calls.int8(case, x[t], columns)
    return asked


def rows(library: ptxsim.Library) -> dict[str, Row]:
    """By title, of all kernels of the library."""
    dynamic, found = dynamic_bytes(library), {}
    for done in assemble(modules(library.path)):
        for name, kernel in done.kernels.items():
            head = re.search(rf"\.entry {re.escape(name)}\(.*?\{{", done.text, re.S)[0]  # type: ignore[index]
            threads = re.search(r"\.maxntid (\d+)", head)
            row = Row(int(threads[1]) if threads else 0, kernel.shared, dynamic.get(name, 0), {})
            found.setdefault(title(done.text, name), row).registers[done.arch] = kernel.registers
    return dict(sorted(found.items()))


# ---- the page

HEAD = f"""\
# CUDA kernels: registers and shared memory

What `ptxas` (CUDA {{version}}) makes of every kernel: threads of a block, bytes of shared memory of a block and how
many more its launch asks for, then for each architecture the registers of a thread, and the blocks that a
multiprocessor holds at a time by all of these. Blank is what a launch decides, and an architecture without the kernel.
No kernel spills registers or has local memory.

Where there is `nvcc`, `python -m tests.sass` writes this page. It is a budget too: tests fail where a kernel asks for
more shared memory than it says here, or for more registers once these are rounded up to {REGISTERS_AT_ONCE}, the step
in which a multiprocessor hands them out.
"""
COLUMNS = ("kernel", "threads", "shared", "at launch", *ARCHS)


def page(table: dict[str, Row], version: str) -> str:
    lines, source = [HEAD.format(version=version)], None
    for name, row in table.items():
        if name.partition(":")[0] != source:
            source = name.partition(":")[0]
            lines += [f"\n## {source}\n", f"| {' | '.join(COLUMNS)} |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
        each = [_taken(row, a) for a in ARCHS]
        cells = [f"`{name.partition(': ')[2]}`", row.threads or "", row.shared, row.dynamic or "", *each]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _taken(row: Row, arch: str) -> str:
    if arch not in row.registers:
        return ""  # not made for it
    return f"{row.registers[arch]}, {row.blocks(arch)}" if row.threads else str(row.registers[arch])


def budgets(text: str) -> dict[str, Row]:
    """What a page says."""
    found, source = {}, ""
    for line in text.splitlines():
        if line.startswith("## "):
            source = line[3:]
        elif line.startswith("| `"):
            name, threads, shared, dynamic, *each = (cell.strip() for cell in line.strip("|").split("|"))
            registers = {a: int(cell.partition(",")[0]) for a, cell in zip(ARCHS, each, strict=True) if cell}
            row = Row(int(threads or 0), int(shared), int(dynamic or 0), registers)
            found[f"{source}: {name.strip('`')}"] = row
    return found
