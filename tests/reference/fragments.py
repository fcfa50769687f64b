"""The weight layout of the CUDA matrix kernels, one code at a time, as csrc/cuda/fragments.h draws it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def words(n: int, kp: int, bits: int) -> int:
    return -(-n // 16) * -(-kp * bits // 256) * 128


def of_codes(codes: NDArray, bits: int) -> NDArray:
    """int32 [strips, tiles, 32 lanes, 4 words] of codes [N, K]."""
    n, k = codes.shape
    depth = 256 // bits
    out = np.zeros((-(-n // 16), -(-k // depth), 32, 4), np.uint32)
    row, column = np.meshgrid(np.arange(n), np.arange(k), indexing="ij")
    g, p = row % 8, row // 8 % 2
    o, c, h, f, block = column % 2, column // 2 % 4, column // 8 % 2, column // 16 % 2, column % depth // 32
    word = {2: block, 4: 2 * block + h, 8: 2 * h + p}[bits]
    shift = 16 * o + 8 * f + {2: 4 * h + 2 * p, 4: 4 * p, 8: 0 * p}[bits]
    np.bitwise_or.at(
        out, (row // 16, column // depth, 4 * g + c, word), codes.astype(np.uint32) << shift.astype(np.uint32)
    )
    return out.view(np.int32)
