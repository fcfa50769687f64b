"""From values to pixels: linear and logarithmic axes with round ticks, and the row of layers that three plots share."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from .colors import NONE, SIGNS, sign_class
from .marks import Line, Mark, Rect, Text
from .markup import number

GLYPH = 6.1  # pixels of a letter at 11 px


@dataclass(frozen=True)
class Room:
    """What a drawing has to fit: pixels of its width, pixels left of a row of layers, and letters of a layer's name."""

    width: float
    left: float = 92  # also for names that lean out
    letters: int = 24


# A row of layers fits where its cells stay wide enough to see, else it is wider. 96 pixels on paper are an inch.
DESK, PHONE, PAPER = Room(1040), Room(352, 58, 14), Room(704)


@dataclass(frozen=True)
class Axis:
    """`low` is drawn at pixel `start` and `high` at `end`.

    `bend` is None for a linear axis, else asinh(value / bend) is what is drawn evenly: as good as a logarithm beyond
    the bend, and straight through zero within.
    """

    low: float
    high: float
    start: float
    end: float
    bend: float | None = None

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float, *, bent: bool = True) -> Axis:
        """An axis for all these finite values; bent where most of them would be pressed against one end."""
        found = sorted(values)
        low, high = found[0], found[-1]
        sizes = sorted(abs(v) for v in found)
        middle = sizes[len(sizes) // 2]
        bend = max(sizes[0], sizes[-1] / 1e4) if bent and sizes[-1] > 10 * middle else None
        axis = cls(low, high, start, end, bend)
        room = 0.05 * (axis._place(high) - axis._place(low))
        if not room:
            room = 0.1 * abs(axis._place(high)) or 1.0
        return cls(axis._value(axis._place(low) - room), axis._value(axis._place(high) + room), start, end, bend)

    def _place(self, value: float) -> float:
        return value if self.bend is None else math.asinh(value / self.bend)

    def _value(self, place: float) -> float:
        return place if self.bend is None else math.sinh(place) * self.bend

    def __call__(self, value: float) -> float:
        """
        >>> Axis(0, 100, 0, 200)(25), round(Axis(1, 100, 0, 200, bend=1e-3)(10), 3)
        (50.0, 100.0)
        """
        low, high = self._place(self.low), self._place(self.high)
        return self.start + (self.end - self.start) * ((self._place(value) - low) / (high - low))

    def ticks(self, most: int = 6) -> list[float]:
        """
        >>> Axis(0, 47, 0, 1).ticks(), Axis(-0.02, 30, 0, 1, bend=0.05).ticks()
        ([0.0, 10.0, 20.0, 30.0, 40.0], [0.0, 0.1, 1.0, 10.0])
        """
        if self.bend is None:
            return self._even(most)
        first = math.ceil(math.log10(self.bend) - 1e-9)
        last = math.floor(math.log10(max(abs(self.low), abs(self.high))) + 1e-9)
        powers = [float(f"1e{p}") for p in range(last, first - 1, -1)]
        powers = powers[:: -(-len(powers) // most)] if powers else []
        return [v for v in (*(-p for p in powers), 0.0, *powers[::-1]) if self.low <= v <= self.high]

    def _even(self, most: int) -> list[float]:
        raw = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def rules(axis: Axis, left: float, right: float, *, text: Callable[[float], str] = number, most: int = 5) -> list[Mark]:
    """Horizontal lines at the ticks of a vertical axis, labelled at their left."""
    found: list[Mark] = []
    for v in axis.ticks(most):
        found += [Line(left, axis(v), right, axis(v), "grid"), Text(text(v), left - 8, axis(v) + 4, "end")]
    return found


def posts(axis: Axis, top: float, bottom: float, *, text: Callable[[float], str] = number, most: int = 6) -> list[Mark]:
    """Vertical lines at the ticks of a horizontal axis, labelled below."""
    found: list[Mark] = []
    for v in axis.ticks(most):
        found += [Line(axis(v), top, axis(v), bottom, "grid"), Text(text(v), axis(v), bottom + 17, "middle")]
    return found


def signs(x: float, y: float, ends: tuple[str, str, str]) -> list[Mark]:
    """The key to colours of signs: what the lowest, the middle and the highest stand for."""
    cells = [Rect(x + 14 * i, y, 14, 12, sign_class((i - NONE) / NONE)) for i in range(SIGNS)]
    places = ((0, "start"), (SIGNS / 2, "middle"), (SIGNS, "end"))
    return [*cells, *(Text(end, x + 14 * i, y + 27, a) for end, (i, a) in zip(ends, places, strict=True))]


def shortened(names: Sequence[str], most: int = 24) -> list[str]:
    """Names without the parts that all begin with; of what is still too long, the end, which tells more.

    >>> shortened(["model.layers.0.q", "model.layers.1.q"]), shortened(["a.b"]), shortened(["abcdef"], 4)
    (['\u20260.q', '\u20261.q'], ['a.b'], ['\u2026def'])
    """
    common = os.path.commonprefix(list(names)).rpartition(".")[0] if len(names) > 1 else ""
    cut = len(common) + 1 if common else 0
    short = ["\u2026" + name[cut:] if cut else name for name in names]
    return [name if len(name) <= most else "\u2026" + name[1 - most :] for name in short]


@dataclass(frozen=True)
class Row:
    """Layers from left to right, one column each; names below are thinned until they do not touch."""

    names: Sequence[str]
    room: Room

    @property
    def left(self) -> float:
        return self.room.left

    @property
    def step(self) -> float:
        return min(max((self.room.width - self.left - 16) / max(len(self.names), 1), 2.4), 94.0)

    @property
    def right(self) -> float:
        return self.left + self.step * len(self.names)

    @property
    def width(self) -> float:
        return self.right + 16

    @cached_property
    def _shown(self) -> dict[int, str]:
        """Names that are written, by layer."""
        return dict(list(enumerate(shortened(self.names, self.room.letters)))[:: math.ceil(20 / self.step)])

    @property
    def height(self) -> float:
        """Of the names."""
        longest = max(map(len, self._shown.values()), default=0)
        return 16 + longest * GLYPH * math.sin(math.radians(60))

    def x(self, layer: int) -> float:
        return self.left + layer * self.step

    def labels(self, y: float) -> list[Text]:
        """Names under the row, their ends at `y`."""
        return [Text(name, self.x(i) + self.step / 2 + 4, y + 12, "end", angle=-60) for i, name in self._shown.items()]
