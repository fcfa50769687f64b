"""What a swap did, layer by layer: bytes, error, and the reason where a layer stayed in float.

`swap_` makes it; `audit` fills in what was predicted and what was measured. It knows no models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

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
    # what follows is there after an `audit`
    predicted_bytes: int | None = None  # by the scheme
    disk_bytes: int | None = None  # in the saved file
    predicted_ms: float | None = None
    ms: float | None = None  # in the packed model
    float_ms: float | None = None  # in the float one
    score: float | None = None  # what the scores say that the scheme costs
    rise: float | None = None  # of the loss, with this layer alone packed


@dataclass(frozen=True)
class Whole:
    """The model as a whole, where that is not the sum of the rows."""

    file_bytes: int | None = None  # with all that is not packed, and the header
    predicted_ms: float | None = None
    ms: float | None = None
    float_ms: float | None = None
    method: str | None = None  # that made the scores
    score: float | None = None  # the objective: of all layers, and of their pairs
    loss: str | None = None  # what `rise` is measured in
    rise: float | None = None
    float_loss: float | None = None


@dataclass(frozen=True)
class Ledger:
    """Printed, a table; `rows` for programs, also one by one or by name; `to_json` for files."""

    rows: Sequence[Row] = field(default_factory=tuple)
    whole: Whole = field(default_factory=Whole)

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

    @property
    def sized_as_predicted(self) -> bool | None:
        """Whether every packed layer takes what its scheme says, to the byte; None before a file was looked at."""
        known = [row for row in self.packed if row.disk_bytes is not None]
        return all(row.disk_bytes == row.predicted_bytes for row in known) if known else None

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no layer {name!r}; wanted one of {', '.join(repr(row.name) for row in self.rows)}")

    def __contains__(self, name: object) -> bool:
        return any(row.name == name for row in self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def to_json(self) -> str:
        """One JSON object, a layer a line."""
        rows = ",\n".join("    " + json.dumps(asdict(row)) for row in self.rows)
        sizes = f'  "bytes": {self.bytes},\n  "float_bytes": {self.float_bytes},\n'
        return f'{{\n{sizes}  "whole": {json.dumps(asdict(self.whole))},\n  "layers": [\n{rows}\n  ]\n}}'

    @classmethod
    def from_json(cls, text: str) -> Ledger:
        """What `to_json` wrote.

        >>> ledger = Ledger((Row("head", "linear", (10, 64), Scheme(4), 2560, 342, 0.1),))
        >>> Ledger.from_json(ledger.to_json()) == ledger
        True
        """
        try:
            values = json.loads(text)
            return cls(tuple(_row(row) for row in values["layers"]), Whole(**values.get("whole", {})))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"text={text[:40]!r}... is no ledger ({error}); wanted what to_json wrote") from None

    @property
    def columns(self) -> list[Column]:
        """As they are shown: those that no row can fill are left out."""
        return [column for column in _columns(self) if column.always or any(column.cells)]

    def __str__(self) -> str:
        columns = self.columns
        lines = [[c.heading for c in columns], *zip(*(c.cells for c in columns), strict=True)]
        lines.append([c.total for c in columns])
        return table(lines, left=[i for i, c in enumerate(columns) if c.left])


@dataclass(frozen=True)
class Column:
    """One of the printed table, as text."""

    heading: str
    cells: list[str]
    total: str = ""
    left: bool = False
    always: bool = True


def _columns(ledger: Ledger) -> list[Column]:
    """Every column that there may be."""
    rows, whole = ledger.rows, ledger.whole

    def cells(name: str, show: Callable[[Any], str]) -> list[str]:
        return ["" if getattr(row, name) is None else show(getattr(row, name)) for row in rows]

    def total(value: Any, show: Callable[[Any], str]) -> str:
        return "" if value is None else show(value)

    disk = None if whole.file_bytes is None else sum(row.disk_bytes or 0 for row in rows)
    notes = [f"{ledger.float_bytes / ledger.bytes:.2f}x smaller"] if ledger.bytes else []
    if whole.ms and whole.float_ms:
        notes.append(f"{whole.float_ms / whole.ms:.2f}x as fast")
    if whole.file_bytes is not None:
        notes.append(f"file {whole.file_bytes:,} bytes")
    return [
        Column("layer", cells("name", str), "total", left=True),
        Column("weight", ["x".join(map(str, row.weight_shape)) for row in rows], left=True),
        Column("scheme", [str(row.scheme or "float") for row in rows], left=True),
        Column("float bytes", cells("float_bytes", _whole), _whole(ledger.float_bytes)),
        Column("bytes", cells("bytes", _whole), _whole(ledger.bytes)),
        Column("on disk", cells("disk_bytes", _whole), total(disk, _whole), always=False),
        Column("float ms", cells("float_ms", _ms), total(whole.float_ms, _ms), always=False),
        Column("ms expected", cells("predicted_ms", _ms), total(whole.predicted_ms, _ms), always=False),
        Column("ms", cells("ms", _ms), total(whole.ms, _ms), always=False),
        Column("rel. error", cells("error", "{:.4f}".format)),
        Column(f"by {whole.method or 'score'}", cells("score", _short), total(whole.score, _short), always=False),
        Column(f"{whole.loss or 'loss'} +", cells("rise", _short), total(whole.rise, _short), always=False),
        Column("", [f"float: {row.reason}" if row.reason else "" for row in rows], ", ".join(notes), left=True),
    ]


def _whole(value: int) -> str:
    return f"{value:,}"


def _ms(value: float) -> str:
    return f"{value:.3f}"


def _short(value: float) -> str:
    return f"{value:.3g}"


def _row(values: dict[str, Any]) -> Row:
    known = {f.name for f in fields(Row)}
    given = {key: value for key, value in values.items() if key in known}
    scheme = None if given["scheme"] is None else Scheme.from_dict(given["scheme"])
    return Row(**given | {"weight_shape": tuple(given["weight_shape"]), "scheme": scheme})


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
