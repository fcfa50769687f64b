"""How the machine writes an instruction, learnt from what ptxas makes of kernels that hold it so many times. An
instruction has 128 bits: the lowest 12 tell its kind and its operands' kinds, the highest 23 when it may start."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from .assemble import assemble
from .cubin import Kernel

HEAD = """
.version 8.0
.target {target}
.address_size 64
.visible .entry probe(.param .u64 p)
{{
  .reg .b32 %r<100>;
  .reg .f32 %f<4>;
  .reg .b64 %rd<9>;
  .shared .align 16 .b8 s[32768];
  ld.param.u64 %rd1, [p];
  mov.u32 %r90, %tid.x;
  mul.wide.u32 %rd2, %r90, 128;
  add.u64 %rd3, %rd1, %rd2;
  cvta.to.global.u64 %rd4, %rd3;
  shl.b32 %r91, %r90, 7;
  mov.u32 %r92, s;
  add.u32 %r93, %r91, %r92;
  mov.u32 %r94, 0;
"""
COUNTS = (2, 3, 5, 7)  # of copies: no other kind of instruction is there just as often each time
OPCODE = (1 << 12) - 1
TIMING = 105  # bits from here on
ONLY_90A = ("HGMMA",)


@dataclass(frozen=True)
class Probe:
    """PTX: `before` once, `each` and then `use` for every copy (its first register {0}, the next ones, its first byte
    {4}), `after` once."""

    each: str
    use: str = ""
    before: str = ""
    after: str = ""

    def text(self, count: int, target: str) -> str:
        copies = [[*range(4 * i, 4 * i + 4), 16 * i] for i in range(count)]
        body = [self.before, *(part.format(*c) for part in (self.each, self.use) for c in copies), self.after]
        return HEAD.format(target=target) + "\n".join(body) + "\nret;\n}\n"


def product(op: str) -> Probe:
    """A chain, so that none can be left out."""
    before = "".join(f"ld.global.b32 %r{i}, [%rd4+{4 * i}];\n" for i in range(10))
    after = "".join(f"st.global.b32 [%rd4+{4 * i}], %r{i};\n" for i in range(4))
    d = "{{%r0, %r1, %r2, %r3}}"
    return Probe(f"mma.sync.aligned.{op} {d}, {{{{%r4, %r5, %r6, %r7}}}}, {{{{%r8, %r9}}}}, {d};", "", before, after)


def warpgroup_product(kind: str, left: str) -> Probe:
    """Of descriptors 10, 116, ..: of two that are the same one is left out."""
    before = "".join(f"mov.f32 %f{i}, 0f00000000;\nld.global.b32 %r{i}, [%rd4+{4 * i}];\n" for i in range(4))
    after = "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"
    after += "".join(f"st.global.f32 [%rd4+{4 * i}], %f{i};\n" for i in range(4))
    op = f"wgmma.mma_async.sync.aligned.m64n8k16.f32.{kind}.{kind} {{{{%f0, %f1, %f2, %f3}}}}"
    each = f"mov.u64 %rd5, 1{{4}};\n{op}, {left}, %rd5, 1, 1, 1, 0{', 0' if left == '%rd5' else ''};"
    return Probe(each, "", before + "wgmma.fence.sync.aligned;", after)


def load(op: str, count: int, address: str) -> Probe:
    """All are in flight before the first is used, so that their results are in different registers."""
    to = [f"%r{{{i}}}" for i in range(count)]
    use = "".join(f"xor.b32 %r94, %r94, {r};\n" for r in to)
    results = f"{{{{{', '.join(to)}}}}}" if count > 1 else to[0]
    return Probe(f"{op} {results}, [{address}+{{4}}];", use, "", "st.global.b32 [%rd4], %r94;")


def copy(op: str, size: int) -> Probe:
    after = "cp.async.wait_all;\nld.shared.b32 %r0, [%r93];\nst.global.b32 [%rd4], %r0;"
    return Probe(f"{op} [%r93+{{4}}], [%rd4+{{4}}], {size};", "", "", after)


WIDTHS = {8: ("u8", 1), 32: ("u32", 1), 64: ("v2.u32", 2), 128: ("v4.u32", 4)}
REGISTERS = "{{%r0, %r1, %r2, %r3}}"
# For each way in which an instruction takes its operands: its probes by bits (0 where there is one width only).
PROBES: dict[str, list[dict[int, list[Probe]]]] = {
    "HMMA": [{0: [product(f"m16n8k16.row.col.f32.{kind}.{kind}.f32") for kind in ("f16", "bf16")]}],
    "IMMA": [{0: [product(f"m16n8k32.row.col.s32.{kind}.s8.s32") for kind in ("u8", "s8")]}],
    "HGMMA": [{0: [warpgroup_product(kind, left) for kind in ("f16", "bf16")]} for left in ("%rd5", REGISTERS)],
    "LDSM": [{0: [load("ldmatrix.sync.aligned.m8n8.x4.shared.b16", 4, "%r93")]}],
    "LDG": [
        {
            bits: [load(f"ld.global{how}.{kind}", count, "%rd4") for how in ("", ".nc", ".nc.L1::no_allocate")]
            for bits, (kind, count) in WIDTHS.items()
        }
    ],
    "LDS": [{bits: [load(f"ld.shared.{kind}", count, "%r93")] for bits, (kind, count) in WIDTHS.items()}],
    "LDGSTS": [
        {
            32: [copy("cp.async.ca.shared.global", 4)],
            64: [copy("cp.async.ca.shared.global", 8)],
            128: [copy(f"cp.async.{how}.shared.global", 16) for how in ("ca", "cg")],
        }
    ],
}


@dataclass(frozen=True)
class Pattern:
    """Instructions whose bits under `mask` are `value`."""

    mask: int
    value: int

    def count(self, kernel: Kernel) -> int:
        here = np.ones(len(kernel.words), bool)
        for half in range(2):
            mask, value = (np.uint64(v >> 64 * half & (1 << 64) - 1) for v in (self.mask, self.value))
            here &= kernel.words[:, half] & mask == value
        return int(here.sum())


@cache
def learn(name: str, arch: str) -> dict[int, list[Pattern]]:
    """How `arch` writes an instruction, by its width in bits; none where `arch` has no such instruction."""
    patterns: dict[int, list[Pattern]] = {}
    for way in PROBES[name]:
        if name in ONLY_90A and arch != "sm_90a":
            continue
        for bits, pattern in _learn(name, way, arch).items():
            patterns.setdefault(bits, []).append(pattern)
    return patterns


def _learn(name: str, way: dict[int, list[Probe]], arch: str) -> dict[int, Pattern]:
    kernels: dict[int, list[list[Kernel]]] = {}  # width -> probe -> one for each count
    for bits, probes in way.items():
        texts = [probe.text(count, "sm_90a" if name in ONLY_90A else "sm_80") for probe in probes for count in COUNTS]
        found = [a.kernels["probe"] for a in assemble(texts, (arch,))]
        kernels[bits] = [found[i : i + len(COUNTS)] for i in range(0, len(found), len(COUNTS))]
    opcodes = set.intersection(*(_as_often(probe) for probes in kernels.values() for probe in probes))
    if len(opcodes) != 1:
        raise RuntimeError(f"{name} on {arch}: opcodes {sorted(map(hex, opcodes))}; wanted one")
    opcode = opcodes.pop()
    words = {bits: [w for probe in probes for k in probe for w in _of(k, opcode)] for bits, probes in kernels.items()}
    field = _telling_apart(list(words.values()))
    if (field >> 64).bit_count() > 4 or field & (1 << 64) - 1:
        raise RuntimeError(f"{name} on {arch}: widths differ in bits {field:#x}; wanted a few of the upper half")
    return {bits: Pattern(OPCODE | field, opcode | some[0] & field) for bits, some in words.items()}


def _as_often(kernels: list[Kernel]) -> set[int]:
    counted = list(zip(kernels, COUNTS, strict=True))
    return {o for o in kernels[0].opcodes.tolist() if all((k.opcodes == o).sum() == n for k, n in counted)}


def _of(kernel: Kernel, opcode: int) -> list[int]:
    chosen: NDArray = kernel.words[kernel.opcodes == opcode]
    return [int(high) << 64 | int(low) for low, high in chosen]


def _telling_apart(classes: list[list[int]]) -> int:
    """The bits that never differ within a class, and do between some."""
    within = between = 0
    for words in classes:
        for w in words:
            within |= w ^ words[0]
        between |= words[0] ^ classes[0][0]
    return between & ~within & ((1 << TIMING) - 1) & ~OPCODE
