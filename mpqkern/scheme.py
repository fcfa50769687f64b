"""What a layer is and how its weight is stored. No torch in here: the solver uses these types too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

PACKABLE_BITS = (2, 4, 8)
BLOCK = 32  # codes; a packed row is a whole number of blocks, and so is a group
SCALE_BYTES = {"float16": 2, "float32": 4}


@dataclass(frozen=True)
class Scheme:
    """How one weight is stored and computed with.

    `weight = scale * (code - zero)`, one scale for `group_size` consecutive weights of an output row
    (None: for the whole row). A symmetric weight has one zero, (2**bits - 1) / 2, so 2 bits hold
    -1.5, -0.5, 0.5 and 1.5 scales; an asymmetric one has a zero beside each scale. With `act_bits=8`
    activations are rounded to 8 bits as they arrive and products are exact integers.

    >>> Scheme(4, group_size=64)
    Scheme(bits=4, act_bits=None, group_size=64, symmetric=True, scale_dtype='float16')
    >>> Scheme(4, group_size=64).bytes((10, 100))  # 10 rows of 128 codes, 2 scales each, one zero
    682
    >>> print(Scheme(2, act_bits=8), Scheme(4, group_size=32, symmetric=False))
    w2a8 w4g32-asym
    """

    bits: int
    act_bits: int | None = None
    group_size: int | None = None
    symmetric: bool = True
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        _check("bits", self.bits, _is_int(self.bits) and 1 <= self.bits <= 8, "an integer from 1 to 8")
        _check(
            "act_bits",
            self.act_bits,
            self.act_bits is None or (_is_int(self.act_bits) and 1 <= self.act_bits <= 8),
            "None or an integer from 1 to 8",
        )
        _check(
            "group_size",
            self.group_size,
            self.group_size is None
            or (_is_int(self.group_size) and 0 < self.group_size < 2**31 and self.group_size % BLOCK == 0),
            f"None (the whole row) or a positive multiple of {BLOCK}",
        )
        _check("symmetric", self.symmetric, isinstance(self.symmetric, bool), "True or False")
        _check(
            "scale_dtype",
            self.scale_dtype,
            isinstance(self.scale_dtype, str) and self.scale_dtype in SCALE_BYTES,
            "'float16' or 'float32'",
        )

    def require_packable(self) -> None:
        """Raise unless kernels exist for this scheme; a search may use others as well."""
        _check("bits", self.bits, self.bits in PACKABLE_BITS, "2, 4 or 8: only these pack")
        _check("act_bits", self.act_bits, self.act_bits in (None, 8), "None or 8: only these compute")

    def groups(self, k: int) -> int:
        """Scales of one row of `k` weights."""
        return -(-padded(k) // (self.group_size or padded(k) or 1))

    def shapes(self, weight_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Shapes of the packed tensors of a weight [N, K] or [N, channels, height, width]."""
        self.require_packable()
        n, k = rows(weight_shape)
        scales = (n, self.groups(k))
        return {
            "qweight": (n, padded(k) * self.bits // 8),
            "scales": scales,
            "zeros": (1,) if self.symmetric else scales,
        }

    def bytes(self, weight_shape: Sequence[int]) -> int:
        """Exact bytes of the packed weight: codes with their padding, scales and zeros."""
        sizes = {name: math.prod(shape) for name, shape in self.shapes(weight_shape).items()}
        return sizes["qweight"] + SCALE_BYTES[self.scale_dtype] * (sizes["scales"] + sizes["zeros"])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Scheme:
        known = [f.name for f in fields(cls)]
        for name in values:
            _check("scheme", dict(values), name in known, f"only the keys {', '.join(known)}")
        _check("scheme", dict(values), "bits" in values, "a value for bits")
        return cls(**values)

    def __str__(self) -> str:
        text = f"w{self.bits}"
        if self.act_bits:
            text += f"a{self.act_bits}"
        if self.group_size:
            text += f"g{self.group_size}"
        return text + ("" if self.symmetric else "-asym")


@dataclass(frozen=True)
class Layer:
    """A module that can be packed: where it is, what it multiplies, how much."""

    name: str
    kind: str  # "linear" or "conv2d"
    weight_shape: tuple[int, ...]
    params: int
    macs: int | None = None  # multiply-adds of one forward pass of the batch it was measured with


def padded(k: int) -> int:
    """A row of `k` codes, filled up to whole blocks."""
    return (k + BLOCK - 1) // BLOCK * BLOCK


def rows(weight_shape: Sequence[int]) -> tuple[int, int]:
    """[N, K] of a weight: output rows and the length of each."""
    return weight_shape[0], math.prod(weight_shape[1:])


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(argument: str, value: object, good: bool, wanted: str) -> None:
    if not good:
        raise ValueError(f"{argument}={value!r}; wanted {wanted}")
