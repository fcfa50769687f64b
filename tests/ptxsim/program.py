"""Reads PTX: kernels as lists of instructions, with the source line of each."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np

U32, U64 = np.uint32, np.uint64
DTYPES: dict[str, type] = {
    "pred": np.bool_,
    "s8": np.int8,
    "u8": np.uint8,
    "b8": np.uint8,
    "s16": np.int16,
    "u16": np.uint16,
    "b16": np.uint16,
    "f16": np.float16,
    "s32": np.int32,
    "u32": U32,
    "b32": U32,
    "f32": np.float32,
    "f16x2": U32,
    "bf16": np.uint16,  # as bits: NumPy has no such type
    "bf16x2": U32,
    "s64": np.int64,
    "u64": U64,
    "b64": U64,
    "f64": np.float64,
}


class PtxError(Exception):
    """What a kernel did wrong, or what the interpreter does not know."""


@dataclass(slots=True)
class Instruction:
    op: str  # "setp.ge.s64"
    parts: list[str]  # ["setp", "ge", "s64"]
    args: list[str]
    guard: str | None  # the predicate register of "@%p1" or "@!%p1"
    negated: bool
    where: str  # "weight.cu:20", from nvcc -lineinfo
    ends_run: bool = False  # a label follows: other threads may join there

    @property
    def type(self) -> str:
        return self.parts[-1]

    def fail(self, message: str) -> NoReturn:
        raise PtxError(f"{self.where}: {self.op}: {message}")


@dataclass
class Kernel:
    code: list[Instruction]
    labels: dict[str, int]
    registers: dict[str, str]  # "%rd" or a single name -> type
    params: list[tuple[str, int]]  # name, bytes
    shared: dict[str, tuple[int, int]]  # name -> bytes (0: sized at the launch), alignment
    # instruction, no wgmma -> what it reads and writes of the registers of wgmma (warpgroup.py)
    registers_of_products: dict[int, tuple[list[str], list[str]]] = field(default_factory=dict)


# A statement ends with ';', a label with ':', .loc with its line; the braces of inline assembly are scopes.
STATEMENT = re.compile(
    r"\.loc\s+(?P<file>\d+)\s+(?P<line>\d+)[^\n]*"
    r"|(?P<label>[$\w]+):(?!:)"
    r"|(?P<code>(?:@!?%?\w+\s+)?[a-z][\w.:]*[^;{}]*(?:\{[^{}]*\}[^;{}]*)*);"
)
NAME = re.compile(r"%\w+")
PARAM = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?")


def parse(text: str) -> dict[str, Kernel]:
    """Every kernel of a PTX module, by its mangled name."""
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text))
    text = re.sub(r"//[^\n]*", "", text)
    shared = {
        name: (int(size or 0), int(align))
        for align, name, size in re.findall(r"\.shared \.align (\d+) \.b8 ([\w$]+)\[(\d*)\]", text)
    }
    kernels = {}
    for found in re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)[^{]*\{", text, re.S):
        end, depth = found.end(), 1
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        body = text[found.end() : end - 1]
        registers = {name: type for type, name in re.findall(r"\.reg\s+\.(\w+)\s+(%\w+)<\d+>", body)}
        registers |= {name: type for type, name in re.findall(r"\.reg\s+\.(\w+)\s+([%\w]+)\s*;", body)}
        params = [
            (name, int(count or 1) * np.dtype(DTYPES[type]).itemsize) for type, name, count in PARAM.findall(found[2])
        ]
        mine = {
            name: size for name, size in shared.items() if re.search(rf"(?<![\w$]){re.escape(name)}(?![\w$])", body)
        }
        code, labels = _code(body, files)
        kernels[found[1]] = Kernel(code, labels, registers, params, mine, _around_products(code))
    return kernels


def _around_products(code: list[Instruction]) -> dict[int, tuple[list[str], list[str]]]:
    """Kernel.registers_of_products; registers to which those of products are moved are of them."""
    of_products = {n for x in code if x.op.startswith("wgmma.mma") for arg in x.args[:2] for n in NAME.findall(arg)}
    if not of_products:
        return {}
    moves = [x.args for x in code if x.parts[0] == "mov"]
    while more := {to for to, source in moves if source in of_products} - of_products:
        of_products |= more
    found = {}
    for at, x in enumerate(code):
        if x.parts[0] == "wgmma":
            continue
        first = 0 if x.parts[0] in ("st", "red", "bar", "bra") else 1  # what follows is read
        writes, reads = (
            [n for arg in args for n in NAME.findall(arg) if n in of_products]
            for args in (x.args[:first], x.args[first:])
        )
        if reads or writes:
            found[at] = (reads, writes)
    return found


def _code(body: str, files: dict[str, str]) -> tuple[list[Instruction], dict[str, int]]:
    body = re.sub(r"^\s*\.(reg|shared|local|pragma)\b[^;]*;", "", body, flags=re.M)
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    where = "?"
    for found in STATEMENT.finditer(body):
        if found["line"]:
            if found["line"] != "0":
                where = f"{files.get(found['file'], '?').split('/')[-1]}:{found['line']}"
        elif found["label"]:
            labels[found["label"]] = len(code)
        else:
            guard = re.match(r"@(!?)(%?\w+)\s+(.*)", found["code"], re.S)
            op, _, rest = " ".join((guard[3] if guard else found["code"]).split()).partition(" ")
            args = [a.strip() for a in re.findall(r"\s*(?:\{[^}]*\}|\[[^\]]*\]|[^,{}]+)", rest)]
            negated = bool(guard and guard[1])
            name = guard[2] if guard else None
            code.append(Instruction(op, op.split("."), [a for a in args if a], name, negated, where))
    for at in labels.values():
        if at:
            code[at - 1].ends_run = True
    return code, labels
