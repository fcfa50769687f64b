"""What a swap did, layer by layer: bytes, error, and the reason where a layer stayed in float."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from .scheme import Scheme


@dataclass(frozen=True)
class Row:
    name: str
    kind: str
    weight_shape: tuple[int, ...]
    scheme: Scheme | None  # None: still in float
    float_bytes: int
    bytes: int  # as stored now; 0 when another row holds the same tensors
    error: float | None = None  # relative: |weight - packed| / |weight|
    reason: str | None = None  # why it is in float


@dataclass(frozen=True)
class Ledger:
    """Printed, a table; `rows` for programs, `to_json` for files."""

    rows: Sequence[Row] = field(default_factory=tuple)

    @property
    def packed(self) -> list[Row]:
        return [row for row in self.rows if row.scheme is not None]

    @property
    def left(self) -> list[Row]:
        """The rows that stayed in float, each with its reason."""
        return [row for row in self.rows if row.scheme is None]

    @property
    def float_bytes(self) -> int:
        return sum(row.float_bytes for row in self.rows if row.bytes)

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def to_json(self) -> str:
        """One JSON object, a layer a line."""
        rows = ",\n".join("    " + json.dumps(asdict(row)) for row in self.rows)
        sizes = f'  "bytes": {self.bytes},\n  "float_bytes": {self.float_bytes},\n'
        return f'{{\n{sizes}  "layers": [\n{rows}\n  ]\n}}'

    def __str__(self) -> str:
        lines = [("layer", "weight", "scheme", "float bytes", "bytes", "rel. error", "")]
        for row in self.rows:
            error = "" if row.error is None else f"{row.error:.4f}"
            shape = "x".join(map(str, row.weight_shape))
            note = f"float: {row.reason}" if row.reason else ""
            lines.append(
                (row.name, shape, str(row.scheme or "float"), f"{row.float_bytes:,}", f"{row.bytes:,}", error, note)
            )
        ratio = f"{self.float_bytes / self.bytes:.2f}x smaller" if self.bytes else ""
        lines.append(("total", "", "", f"{self.float_bytes:,}", f"{self.bytes:,}", "", ratio))
        return table(lines, left=(0, 1, 2, 6))


def table(lines: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Lines of cells as aligned text, the first a heading; columns in `left` start at their left."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rule = ["-" * w for w in widths]
    rows = [lines[0], rule, *lines[1:]]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
