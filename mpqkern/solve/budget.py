"""Budget: one limit on an assignment, and the row of whole numbers it means.

Every row is int64 in a unit fine enough to be exact (bits, bytes, bit operations, picoseconds), so that
"fits" is a comparison of integers. Limits are read as the decimals they were written as: 0.1 is 1/10.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ..scheme import Layer, Scheme, rows
from ..scores.table import FLOAT_BITS

KINDS = ("avg_bits", "bytes", "mbytes", "fraction", "gbops", "ms", "limit")
COUNTS = {kind: ("packed", "nominal") for kind in ("avg_bits", "bytes", "mbytes", "fraction")} | {
    "gbops": ("macs", "gates")
}
PICOSECONDS = 10**9  # in a millisecond
MAX_SUM = 2**61  # rows add up below this, so int64 never overflows, and a limit beyond it is always or never met


@dataclass(frozen=True, eq=False)
class Row:
    """A budget as arithmetic: `sum_l values[l, x_l] <= cap`; divided by `per`, in the budget's unit."""

    label: str
    values: np.ndarray  # int64 [layers, schemes]
    cap: int | None  # of any size; None: no limit, just counted
    per: Fraction = Fraction(1)
    unit: str = ""

    def total(self, amount: float) -> int:
        """The largest total that is no more than an amount in the budget's unit."""
        return int(_decimal(amount) * self.per // 1)

    def price(self, price: float) -> float:
        """A price of one unit of this row as that of one in the budget's unit."""
        try:
            return float(Fraction(float(price)) * self.per) if math.isfinite(price) else float(price)
        except OverflowError:  # rows of 1e-310 have such prices
            return math.inf

    def amount(self, total: int) -> float | int:
        """A total of this row in the budget's unit."""
        value = Fraction(int(total)) / self.per
        return value.numerator if value.denominator == 1 and self.unit in ("bytes", "") else float(value)


@dataclass(frozen=True, eq=False, kw_only=True)
class Budget:
    """One limit; give exactly one of these.

    avg_bits  bits per parameter
    bytes     bytes of all the weights scored; `mbytes`: the same in MiB (2**20 bytes, as papers' "Mb")
    fraction  of what the weights take in float32
    gbops     weight bits x activation bits x multiply-adds / 1e9; no act_bits counts as 32
    ms        milliseconds; `table` holds them: an array [layers, schemes], or a .npy or .json file of one
              (JSON may be {layer: {scheme: ms}}, too). With `batch`, {batch: such a table}
    limit     on the sum of `rows`, an array [layers, schemes] of your own

    `count` says how bytes are counted: "packed", as stored with scales, zeros and padding (not for widths
    that do not pack), or "nominal", parameters x bits. By default averages are nominal, all else packed.
    A layer that stays in float counts 32 bits a parameter. Bit operations count as "macs", above, or as
    "gates": logic gates of array multipliers and of the adders behind them, in 1e9 (CLADO, arXiv 2307.05657).

    >>> Budget(avg_bits=4.0)
    Budget(avg_bits=4.0)
    >>> layers = [Layer("head", "linear", (10, 100), 1000)]
    >>> Budget(bytes=500).row(layers, [Scheme(2), Scheme(4)]).values
    array([[342, 662]])
    """

    avg_bits: float | None = None
    bytes: int | None = None
    mbytes: float | None = None
    fraction: float | None = None
    gbops: float | None = None
    ms: float | None = None
    limit: float | None = None
    count: str | None = None
    table: Any = None
    batch: int | None = None
    rows: Any = None
    name: str | None = None

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            found = ", ".join(f"{kind}={getattr(self, kind)!r}" for kind in given) or "none"
            raise ValueError(f"Budget limits given: {found}; wanted exactly one of {', '.join(KINDS)}")
        value = getattr(self, given[0])
        if not is_finite(value) or (value < 0 and given[0] != "limit"):
            raise ValueError(f"{given[0]}={value!r}; wanted a finite number, not negative")
        if self.name is not None and not (isinstance(self.name, str) and self.name):
            raise ValueError(f"name={self.name!r}; wanted text that is not empty, or None")
        _check_count(given[0], self.count)
        if self.batch is not None and given[0] != "ms":
            raise ValueError(f"batch={self.batch!r} with {given[0]}=; wanted ms= with batch=")
        for argument, kind in (("table", "ms"), ("rows", "limit")):
            if (getattr(self, argument) is None) == (kind in given):
                wanted = f"{argument}= beside {kind}=" if kind in given else f"{kind}= with {argument}="
                raise ValueError(f"Budget({given[0]}={value!r}); wanted {wanted}")

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def value(self) -> float:
        return getattr(self, self.kind)

    def row(self, layers: Sequence[Layer], schemes: Sequence[Scheme | None]) -> Row:
        """What each choice spends, and the limit, as whole numbers."""
        source = self.table if self.kind == "ms" else self.rows
        row = make_row(self.kind, layers, schemes, count=self.count, source=source, batch=self.batch)
        return Row(self.name or row.label, row.values, row.total(self.value), row.per, row.unit)

    def __repr__(self) -> str:
        given = {key: getattr(self, key) for key in (self.kind, "count", "batch")}
        return f"Budget({', '.join(f'{key}={value!r}' for key, value in given.items() if value is not None)})"


def make_row(
    kind: str,
    layers: Sequence[Layer],
    schemes: Sequence[Scheme | None],
    *,
    count: str | None = None,
    source: Any = None,
    batch: int | None = None,
) -> Row:
    """The row of one kind of budget, without a limit."""
    _check_count(kind, count)
    total = sum(layer.params for layer in layers)
    if kind in ("avg_bits", "bytes", "mbytes", "fraction"):
        if total == 0 and kind in ("avg_bits", "fraction"):
            raise ValueError(f"{kind} of layers that have no parameters is not defined; wanted bytes or mbytes")
        nominal = (count or ("nominal" if kind == "avg_bits" else "packed")) == "nominal"
        values = [[_nominal_bits(la, s) if nominal else _packed_bytes(la, s) * 8 for s in schemes] for la in layers]
        if kind == "bytes" and not nominal:  # whole bytes: shown as such
            return Row(kind, _int64([[bits // 8 for bits in line] for line in values]), None, unit="bytes")
        per = {"avg_bits": total, "bytes": 8, "mbytes": 8 * 2**20, "fraction": FLOAT_BITS * total}[kind]
        unit = {"avg_bits": "bits", "bytes": "bytes", "mbytes": "MiB", "fraction": "of float32"}[kind]
        return Row(kind, _int64(values), None, Fraction(per), unit)
    if kind == "gbops":
        missing = [layer.name for layer in layers if layer.macs is None]
        if missing:
            raise ValueError(f"gbops: layer {missing[0]!r} has no macs; wanted layers cataloged with a batch")
        gates = count == "gates"
        values = [[_gates(layer, s) if gates else _bops(layer, s) for s in schemes] for layer in layers]
        return Row(kind, _int64(values), None, Fraction(10**9), "10^9 gates" if gates else "GBOPs")
    if kind == "ms":
        array = _table(source, batch, layers, schemes)
        with np.errstate(over="ignore"):
            ticks = np.rint(array * PICOSECONDS)
        if not np.isfinite(ticks).all() or (array < 0).any():
            raise ValueError(f"table ranges from {array.min()} to {array.max()}; wanted finite milliseconds, none < 0")
        label = kind if batch is None else f"ms at batch {batch}"
        return Row(label, _int64(ticks.tolist()), None, Fraction(PICOSECONDS), "ms")
    if kind == "limit":
        array = _shaped("rows", np.asarray(source), layers, schemes)
        if array.dtype.kind not in "iuf":
            raise ValueError(f"rows holds {array.dtype}; wanted floats, or integers of at most 64 bits")
        if array.dtype.kind != "f":
            return Row(kind, _int64(array.tolist()), None)
        if not np.isfinite(array).all():
            raise ValueError(
                "rows holds a number that is not finite; wanted numbers only (to rule a choice out: forbid)"
            )
        with np.errstate(over="ignore"):
            most = np.abs(array).max(axis=1).sum()
        if not np.isfinite(most):
            raise ValueError(f"rows holds {array.flat[np.abs(array).argmax()]}; wanted numbers whose sum is a float")
        # A decimal unit keeps written decimals exact: 0.1 + 0.2 fits 0.3. 15 digits are what a float holds.
        digits = 15 - int(np.ceil(np.log10(max(most, 1e-300))))
        per = Fraction(10) ** digits
        return Row(
            kind, _int64([[round(_decimal(v) * per) for v in line] for line in array.tolist()]), None, per, "rows"
        )
    raise ValueError(f"kind={kind!r}; wanted one of {', '.join(KINDS)}")


def _check_count(kind: str, count: str | None) -> None:
    known = COUNTS.get(kind, ())
    if count is not None and count not in known:
        raise ValueError(f"count={count!r} with {kind}; wanted {' or '.join(map(repr, known)) or 'none'}")


def is_finite(value: Any) -> bool:
    """Whether it is a number, within the range of floats."""
    if not isinstance(value, (int, float, np.integer, np.floating)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond all floats
        return False


def _decimal(value: float) -> Fraction:
    """0.1 as 1/10, not as the double next to it."""
    return Fraction(str(value))


def _nominal_bits(layer: Layer, scheme: Scheme | None) -> int:
    return layer.params * (FLOAT_BITS if scheme is None else scheme.bits)


def _packed_bytes(layer: Layer, scheme: Scheme | None) -> int:
    if scheme is None:
        return layer.params * FLOAT_BITS // 8
    try:
        return scheme.bytes(layer.weight_shape)
    except ValueError as error:
        raise ValueError(f"count='packed' for {scheme}: {error}; wanted count='nominal' for such a scheme") from None


def _widths(scheme: Scheme | None) -> tuple[int, int]:
    """Bits of weights and of activations."""
    return (FLOAT_BITS, FLOAT_BITS) if scheme is None else (scheme.bits, scheme.act_bits or FLOAT_BITS)


def _bops(layer: Layer, scheme: Scheme | None) -> int:
    weight, act = _widths(scheme)
    return layer.macs * weight * act


def _gates(layer: Layer, scheme: Scheme | None) -> int:
    """A product is weight - 1 additions of 5 act - 3 gates; of K products, K - 1 are added on."""
    weight, act = _widths(scheme)
    outputs = layer.macs // max(rows(layer.weight_shape)[1], 1)
    return layer.macs * (weight - 1) * (5 * act - 3) + (layer.macs - outputs) * (3 * act + 3 * weight + 29)


def _table(source: Any, batch: int | None, layers: Sequence[Layer], schemes: Sequence[Scheme | None]) -> np.ndarray:
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.suffix == ".json":
            source = json.loads(path.read_text())
        elif path.suffix == ".npy":
            source = np.load(path, allow_pickle=False)
        else:
            raise ValueError(f"table={str(path)!r}; wanted a .npy or .json file, or an array")
    batches = _batches(source)
    there = ", ".join(map(str, batches))
    if batch is not None:
        if batch not in batches:
            wanted = f"one of its batches: {there}" if batches else "a table {batch: table for it}"
            raise ValueError(f"batch={batch!r} is not in table; wanted {wanted}")
        source = batches[batch]
    elif batches and not any(layer.name in source for layer in layers):
        raise ValueError(f"table holds the batches {there}; wanted batch= one of them")
    if isinstance(source, Mapping):
        names = ["float" if s is None else str(s) for s in schemes]
        for layer in layers:
            for name in names:
                if name not in source.get(layer.name, {}):
                    raise ValueError(f"table has no entry for layer {layer.name!r} as {name!r}; wanted one for each")
        source = [[source[layer.name][name] for name in names] for layer in layers]
    try:
        array = np.asarray(source, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"table is no array of numbers ({error}); wanted milliseconds") from None
    return _shaped("table", array, layers, schemes)


def _batches(source: Any) -> dict[int, Any]:
    """What {batch: table} holds; JSON makes its keys strings. A table of layers called "0" and "1" looks the same."""
    if not isinstance(source, Mapping) or not all(str(key).isdecimal() for key in source):
        return {}
    return {int(key): table for key, table in source.items()}


def _shaped(argument: str, array: np.ndarray, layers: Sequence[Layer], schemes: Sequence[Scheme | None]) -> np.ndarray:
    wanted = [len(layers), len(schemes)]
    if list(array.shape) != wanted:
        raise ValueError(f"{argument} has the shape {list(array.shape)}; wanted {wanted} (layers, schemes)")
    return array


def _int64(values: list[list[int]]) -> np.ndarray:
    if sum(max(abs(int(v)) for v in line) for line in values) >= MAX_SUM:
        raise ValueError("a budget's row adds up beyond 2**61; wanted smaller numbers")
    return np.array([[int(v) for v in line] for line in values], dtype=np.int64)
