"""From values to pixels: linear and logarithmic axes with round ticks, and the row of layers that three plots share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .markup import coordinate, el, esc, number

ROOM = 1040  # pixels of a page's column; a row of layers fits it where its cells stay wide enough to see
GLYPH = 6.1  # pixels of a letter at 11 px


@dataclass(frozen=True)
class Axis:
    """`low` is drawn at pixel `start` and `high` at `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float, *, zero: bool = False) -> Axis:
        """An axis for all these values, finite; logarithmic where they are above zero and span a factor of 20."""
        found = list(values)
        low, high = min(found), max(found)
        if not zero and low > 0 and high / low > 20:
            room = (high / low) ** 0.04
            return cls(low / room, high * room, start, end, log=True)
        room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        return cls(min(low, 0.0), high, start, end) if zero else cls(low - room, high + room, start, end)

    def __call__(self, value: float) -> float:
        """
        >>> Axis(1, 100, 0, 200, log=True)(10)
        100.0
        """
        place = math.log if self.log else float
        span = place(self.high) - place(self.low)
        return self.start + (self.end - self.start) * ((place(value) - place(self.low)) / span if span else 0.5)

    def ticks(self, most: int = 6) -> list[float]:
        """
        >>> Axis(0, 47, 0, 1).ticks(), Axis(0.02, 30, 0, 1, log=True).ticks()
        ([0.0, 10.0, 20.0, 30.0, 40.0], [0.1, 1.0, 10.0])
        """
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 2, 5), (1, 3), (1,)):
                found = [float(f"{d}e{p}") for p in powers for d in digits]
                found = [v for v in found if self.low <= v <= self.high]
                if len(found) <= most:
                    return found
            return found[:: -(-len(found) // most)]
        raw = (self.high - self.low) / most or 1.0
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def rules(axis: Axis, left: float, right: float, *, text: Callable[[float], str] = number, most: int = 5) -> str:
    """Horizontal lines at the ticks of a vertical axis, labelled at their left."""
    return "".join(
        el("line", x1=left, x2=right, y1=axis(v), y2=axis(v), class_="grid")
        + label(text(v), left - 8, axis(v) + 4, "end")
        for v in axis.ticks(most)
    )


def posts(axis: Axis, top: float, bottom: float, *, text: Callable[[float], str] = number, most: int = 6) -> str:
    """Vertical lines at the ticks of a horizontal axis, labelled below."""
    return "".join(
        el("line", x1=axis(v), x2=axis(v), y1=top, y2=bottom, class_="grid")
        + label(text(v), axis(v), bottom + 17, "middle")
        for v in axis.ticks(most)
    )


def label(text: str, x: float, y: float, anchor: str | None = None, class_: str | None = None, angle: int = 0) -> str:
    place = {"transform": f"translate({coordinate(x)} {coordinate(y)}) rotate({angle})"} if angle else {"x": x, "y": y}
    return el("text", esc(text), **place, text_anchor=anchor, class_=class_)


def drawing(width: float, height: float, name: str, *content: str, shrinks: float = 0.85, class_: str = "") -> str:
    """An SVG of its natural size; on a narrow page it shrinks so far, then its box scrolls."""
    style = f"width:{coordinate(width)}px;min-width:{coordinate(width * shrinks)}px"
    box = f"0 0 {coordinate(width)} {coordinate(height)}"
    body = el("svg", *content, viewBox=box, role="img", aria_label=name, style=style)
    return el("div", body, class_=f"scroll {class_}".strip(), tabindex=0)


def shortened(name: str, most: int = 24) -> str:
    """The end of a name tells more than its beginning."""
    return name if len(name) <= most else "\u2026" + name[1 - most :]


@dataclass(frozen=True)
class Row:
    """Layers from left to right, one column each; names below are thinned until they do not touch."""

    names: Sequence[str]
    left: float = 92

    @property
    def step(self) -> float:
        return min(max((ROOM - self.left - 16) / max(len(self.names), 1), 3.2), 64.0)

    @property
    def right(self) -> float:
        return self.left + self.step * len(self.names)

    @property
    def width(self) -> float:
        return self.right + 16

    @property
    def _shown(self) -> list[int]:
        return list(range(0, len(self.names), math.ceil(15 / self.step)))

    @property
    def height(self) -> float:
        """Of the names."""
        longest = max((len(shortened(self.names[i])) for i in self._shown), default=0)
        return 16 + longest * GLYPH * math.sin(math.radians(60))

    def x(self, layer: int) -> float:
        return self.left + layer * self.step

    def labels(self, y: float) -> str:
        """Names under the row, their ends at `y`."""
        return "".join(
            label(shortened(self.names[i]), self.x(i) + self.step / 2 + 4, y + 12, "end", angle=-60)
            for i in self._shown
        )
