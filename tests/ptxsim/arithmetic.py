"""Instructions that compute: each thread for itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .block import Block, opcode
from .program import DTYPES, U32, U64, Instruction

ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
UNKNOWN = {"sat", "ftz", "approx", "rz", "rm", "rp", "NaN", "cc"}  # modifiers that would change a result


def from_bf16(bits: NDArray) -> NDArray:
    return (bits.view(np.uint16).astype(U32) << U32(16)).view(np.float32)


def to_bf16(v: NDArray) -> NDArray:
    """Bits of the nearest bf16, ties to even."""
    with np.errstate(over="ignore"):
        bits = v.astype(np.float32).view(U32)
    rounded = (bits + U32(0x7FFF) + (bits >> U32(16) & U32(1))) >> U32(16)
    return np.where(np.isnan(v), U32(0x7FFF), rounded).astype(np.uint16)


def refuse(x: Instruction, *more: str) -> None:
    for part in x.parts[1:]:
        if part in UNKNOWN or part in more:
            x.fail(f"a modifier that tests/ptxsim does not know, .{part}")


def elementwise(name: str, f: Callable[..., Any], of_floats: Callable[..., Any] | None = None) -> None:
    @opcode(name)
    def run(b: Block, x: Instruction, m: NDArray) -> None:
        refuse(x, "hi", "wide")
        kind = x.type
        g = of_floats if of_floats and kind[0] == "f" else f
        args = [b.value(a, kind) for a in x.args[1:]]
        if kind in ("f16", "f16x2"):
            args = [a.view(np.float16).astype(np.float64) for a in args]
            b.put(x.args[0], g(*args).astype(np.float16).view(DTYPES[kind]), m)
        else:
            b.put(x.args[0], g(*args), m)


elementwise("add", np.add)
elementwise("sub", np.subtract)
elementwise("min", np.minimum, np.fmin)
elementwise("max", np.maximum, np.fmax)
elementwise("neg", np.negative)
elementwise("abs", np.abs)
elementwise("and", np.bitwise_and)
elementwise("or", np.bitwise_or)
elementwise("xor", np.bitwise_xor)
elementwise("not", np.invert)
elementwise("sqrt", np.sqrt)


def product(b: Block, x: Instruction) -> NDArray:
    kind = x.type
    a, c = b.value(x.args[1], kind), b.value(x.args[2], kind)
    if "wide" in x.parts:
        wide = DTYPES[f"{kind[0]}{2 * int(kind[1:])}"]
        return a.astype(wide) * c.astype(wide)
    if "hi" in x.parts:
        if kind not in ("s32", "u32"):
            x.fail("a type that tests/ptxsim does not know here")
        return (a.astype(np.int64) * c.astype(np.int64) >> 32).astype(DTYPES[kind])
    return a * c


@opcode("mul")
def multiply(b: Block, x: Instruction, m: NDArray) -> None:
    refuse(x)
    if x.type in ("f16", "f16x2"):
        a, c = (b.value(o, x.type).view(np.float16) for o in x.args[1:])
        b.put(x.args[0], (a * c).view(DTYPES[x.type]), m)
    else:
        b.put(x.args[0], product(b, x), m)


@opcode("mad")
def multiply_add(b: Block, x: Instruction, m: NDArray) -> None:
    refuse(x)
    p = product(b, x)
    b.put(x.args[0], p + b.value(x.args[3], f"{x.type[0]}{8 * p.dtype.itemsize}"), m)


@opcode("fma")
def fused_multiply_add(b: Block, x: Instruction, m: NDArray) -> None:
    refuse(x)
    if x.type == "bf16x2":
        a, c, d = (from_bf16(b.value(o, x.type)).astype(np.float64) for o in x.args[1:])
        b.put(x.args[0], to_bf16(a * c + d).view(U32), m)
        return
    if x.type not in ("f32", "f16", "f16x2"):
        x.fail("a type that tests/ptxsim does not know here")
    narrow = np.float32 if x.type == "f32" else np.float16
    # the product is exact in fp64; the sum is rounded there and once more, which can differ in the last bit
    a, c, d = (b.value(o, x.type).view(narrow).astype(np.float64) for o in x.args[1:])
    b.put(x.args[0], (a * c + d).astype(narrow).view(DTYPES[x.type]), m)


@opcode("div")
def divide(b: Block, x: Instruction, m: NDArray) -> None:
    refuse(x, "full")
    a, c = b.value(x.args[1], x.type), b.value(x.args[2], x.type)
    if x.type[0] == "f":
        b.put(x.args[0], a / c, m)
        return
    one = np.where(c == 0, np.ones_like(c), c)
    q = a // one
    if x.type[0] == "s":  # towards zero
        q = q + ((a % one != 0) & ((a < 0) != (one < 0))).astype(q.dtype)
    b.put(x.args[0], np.where(c == 0, np.invert(np.zeros_like(q)), q), m)


@opcode("rem")
def remainder(b: Block, x: Instruction, m: NDArray) -> None:
    a, c = b.value(x.args[1], x.type), b.value(x.args[2], x.type)
    b.put(x.args[0], np.fmod(a, np.where(c == 0, np.ones_like(c), c)), m)


@opcode("shl", "shr")
def shift(b: Block, x: Instruction, m: NDArray) -> None:
    a, by = b.value(x.args[1], x.type), b.value(x.args[2], "u32")
    width = a.dtype.itemsize * 8
    within = np.minimum(by, width - 1).astype(a.dtype)
    if x.parts[0] == "shr" and a.dtype.kind == "i":
        b.put(x.args[0], a >> within, m)
    else:
        shifted = a << within if x.parts[0] == "shl" else a >> within
        b.put(x.args[0], np.where(by < width, shifted, np.zeros_like(a)), m)


@opcode("cvt")
def convert(b: Block, x: Instruction, m: NDArray) -> None:
    refuse(x)
    to, source = x.parts[-2:]
    if to == "f16x2":  # the first source goes to the upper half
        v = np.stack([b.value(x.args[2], source), b.value(x.args[1], source)], 1).astype(np.float16)
        b.put(x.args[0], v.view(U32).reshape(-1), m)
        return
    v = b.value(x.args[1], source)
    if "bf16" in (to, source):
        if (to, source) == ("bf16", "f32") and x.parts[1] == "rn":
            b.put(x.args[0], to_bf16(v), m)
        elif (to, source) == ("f32", "bf16"):
            b.put(x.args[0], from_bf16(v), m)
        else:
            x.fail("a conversion that tests/ptxsim does not know")
        return
    if source[0] == "f":
        if x.parts[1] in ROUND:
            v = ROUND[x.parts[1]](v)
        if to[0] != "f":
            limits = np.iinfo(DTYPES[to])
            v = np.clip(np.nan_to_num(v.astype(np.float64)), limits.min, limits.max)
    b.put(x.args[0], v.astype(DTYPES[to]), m)


@opcode("setp")
def compare(b: Block, x: Instruction, m: NDArray) -> None:
    refuse(x)
    a, c = b.value(x.args[1], x.type), b.value(x.args[2], x.type)
    how = x.parts[1]
    unordered = x.type[0] == "f" and how.endswith("u")  # true when an operand is not a number
    compared = COMPARE.get(how.removesuffix("u") if unordered else how)
    if compared is None or "|" in x.args[0]:
        x.fail("a comparison that tests/ptxsim does not know")
    v = compared(a, c)
    if x.type[0] == "f":
        nan = np.isnan(a) | np.isnan(c)
        v = v | nan if unordered else v & ~nan
    if len(x.args) > 3:
        q = b.value(x.args[3].lstrip("!"), "pred")
        q = ~q if x.args[3][0] == "!" else q
        v = {"and": v & q, "or": v | q, "xor": v ^ q}[x.parts[2]]
    b.put(x.args[0], v, m)


@opcode("selp")
def select(b: Block, x: Instruction, m: NDArray) -> None:
    a, c = b.value(x.args[1], x.type), b.value(x.args[2], x.type)
    b.put(x.args[0], np.where(b.register(x.args[3]), a, c), m)


@opcode("lop3")
def logic(b: Block, x: Instruction, m: NDArray) -> None:
    a, c, d = (b.value(o, "b32") for o in x.args[1:4])
    table, r = int(x.args[4], 0), np.zeros(b.count, U32)
    for i in range(8):
        if table >> i & 1:
            r |= (a if i & 4 else ~a) & (c if i & 2 else ~c) & (d if i & 1 else ~d)
    b.put(x.args[0], r, m)


@opcode("prmt")
def permute_bytes(b: Block, x: Instruction, m: NDArray) -> None:
    low, high, selector = (b.value(o, "b32").astype(U64) for o in x.args[1:4])
    if x.parts != ["prmt", "b32"] or (selector & U64(0x8888)).any():
        x.fail("a mode that tests/ptxsim does not know")
    v, r = high << U64(32) | low, np.zeros(b.count, U64)
    for i in range(4):
        r |= (v >> (selector >> U64(4 * i) & U64(7)) * U64(8) & U64(255)) << U64(8 * i)
    b.put(x.args[0], r.astype(U32), m)


@opcode("bfe")
def extract_bits(b: Block, x: Instruction, m: NDArray) -> None:
    if x.type != "u32":
        x.fail("a type that tests/ptxsim does not know here")
    a, first, count = (b.value(o, "u32").astype(np.int64) for o in x.args[1:])
    b.put(x.args[0], (a >> first & (1 << count) - 1).astype(U32), m)


@opcode("bfi")
def insert_bits(b: Block, x: Instruction, m: NDArray) -> None:
    if x.type != "b32":
        x.fail("a type that tests/ptxsim does not know here")
    a, into, first, count = (b.value(o, "u32").astype(np.int64) for o in x.args[1:])
    field = ((1 << count) - 1) << first
    b.put(x.args[0], (into & ~field | a << first & field).astype(U32), m)
