"""The safetensors file format, written whole and read with suspicion.

    8 bytes      length of the header, little endian
    header       JSON: name -> {"dtype", "shape", "data_offsets"}, and "__metadata__" of strings
    data         the tensors' bytes, without gaps

Every length is checked against the file before anything of that size is allocated.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .files import written

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class FileError(ValueError):
    """A file that is damaged, made by something else, or does not fit the model."""


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Writes all or nothing; returns the bytes of the tensors."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise ValueError(f"tensor {name!r} is {tensor.dtype}; wanted one of {', '.join(map(str, NAMES))}")
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with written(path) as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            out.write(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return offset


class Reader:
    """An open file: `names`, `metadata`, and each tensor when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = path.open("rb")
        try:
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        shape, dtype, _, _ = self._entries[name]
        return shape, dtype

    def tensor(self, name: str) -> Tensor:
        shape, dtype, begin, end = self._entries[name]
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        data = bytearray(end - begin)
        self._file.seek(self._data + begin)
        if self._file.readinto(data) != len(data):  # type: ignore[attr-defined]
            raise self.error("it ended while it was being read")
        return torch.frombuffer(data, dtype=dtype).view(shape)

    def error(self, what: str) -> FileError:
        return FileError(f"{self.path}: {what}")

    def _read_header(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        if size < 8:
            raise self.error(f"it has {size} bytes; wanted a safetensors file")
        (length,) = struct.unpack("<Q", self._file.read(8))
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise self.error(
                f"its header claims {length} bytes of a file of {size}; it is truncated or no safetensors file"
            )
        try:
            header = json.loads(self._file.read(length), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise self.error(f"its header is no JSON ({error})") from None
        if not isinstance(header, dict):
            raise self.error("its header is no JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self.error("its __metadata__ is no object of strings")
        self.metadata: dict[str, str] = metadata
        self._data = 8 + length
        self._entries = {name: self._entry(name, entry) for name, entry in header.items()}
        self.names = set(self._entries)
        end = 0
        for name, (_, _, begin, stop) in sorted(self._entries.items(), key=lambda item: item[1][2:]):
            if begin != end:
                raise self.error(f"tensor {name!r} begins at {begin}; wanted {end}, right after the one before")
            end = stop
        if end != size - self._data:
            raise self.error(
                f"its tensors take {end} bytes but it holds {size - self._data}; it is truncated or damaged"
            )

    def _entry(self, name: str, entry: Any) -> tuple[tuple[int, ...], torch.dtype, int, int]:
        try:
            dtype, shape, (begin, end) = (DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"])
            good = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
            good = good and all(_is_size(n) for n in (*shape, begin, end)) and begin <= end
        except (KeyError, TypeError, ValueError):
            good = False
        if not good:
            raise self.error(f"tensor {name!r} has a bad entry; wanted dtype, shape and data_offsets")
        if math.prod(shape) * dtype.itemsize != end - begin:
            raise self.error(f"tensor {name!r} is {dtype} {shape} but takes {end - begin} bytes")
        return tuple(shape), dtype, begin, end


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("it names one key twice")
    return result
