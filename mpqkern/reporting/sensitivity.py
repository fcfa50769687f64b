"""What each layer costs under each scheme, as colours: layers from left to right, schemes from top to bottom."""

from __future__ import annotations

import math

import numpy as np

from ..scores.table import widest_first
from .axes import GLYPH, Room, Row
from .colors import AMOUNTS, amount_class
from .given import Given, text
from .marks import Drawing, Mark, Rect, Text
from .markup import details, number, paragraph, table
from .svg import fitted

TITLE = "Sensitivity"
HIGH, TOP, KEY = 30, 8, 46  # pixels: of a cell, above, and of the key to the colours
FIGURED = 46  # pixels of a cell from which on its figure is in it
FLOOR = 1e-6  # costs below this share of the largest have the palest colour, as those of 0 and below


def section(given: Given) -> str | None:
    scores = given.scores
    if scores is None:
        return None
    order, schemes = widest_first(scores.schemes), given.chosen
    method = scores.provenance.get("method")
    note = f"Cost of each scheme in each layer{f' by {method}' if method else ''}; colours are on a logarithmic scale."
    head = ("layer", *(text(scores.schemes[b]) for b in order), "chosen")
    lines = [
        (n, *(number(float(scores.unary[i, b])) for b in order), schemes.get(n, "")) for i, n in enumerate(scores.names)
    ]
    return (
        paragraph(note, "The chosen ones are framed." if set(scores.names) & set(schemes) else "")
        + fitted(lambda room: _map(given, room), len(scores.names))
        + details("All costs as a table", table(head, lines, left=(0, len(head) - 1)))
    )


def drawings(given: Given, room: Room) -> list[Drawing]:
    return [_map(given, room)] if given.scores is not None else []


def _map(given: Given, room: Room) -> Drawing:
    scores, order = given.scores, widest_first(given.scores.schemes)
    row, shade = Row(scores.names, room), Shade(scores.unary)
    marks: list[Mark] = []
    frames: list[Mark] = []
    for r, b in enumerate(order):
        y, scheme = TOP + r * HIGH, text(scores.schemes[b])
        marks.append(Text(scheme, row.left - 8, y + HIGH / 2 + 4, "end"))
        for i, name in enumerate(scores.names):
            value = float(scores.unary[i, b])
            marks += cell(row, i, y, f"{name} at {scheme}: {number(value)}", f"{value:.2g}", shade(value))
            if given.chosen.get(name) == scheme:
                frames += chosen_marks(row, i, y)
    bottom = TOP + len(order) * HIGH
    marks += [*frames, *row.labels(bottom), *shade.key(bottom + row.height + 8)]
    return Drawing(row.width, bottom + row.height + KEY, "Cost of each scheme in each layer", marks)


def cell(row: Row, layer: int, y: float, tale: str, short: str, color: str) -> list[Mark]:
    """A colour that tells its figure under the pointer, and at once where there is room."""
    rect = Rect(row.x(layer), y, row.step, HIGH, color, (tale,))
    if row.step < FIGURED:
        return [rect]
    return [rect, Text(short, row.x(layer) + row.step / 2, y + HIGH / 2 + 4, "middle", f"on-{color}")]


def chosen_marks(row: Row, layer: int, y: float) -> list[Mark]:
    """A frame; where cells are narrow, a bar across the middle."""
    x = row.x(layer)
    if row.step >= 9:
        return [Rect(x + 2, y + 2, row.step - 4, HIGH - 4, f"frame{under}", rx=2) for under in (" under", "")]
    return [Rect(x, y + HIGH / 2 - 2, row.step, 4.0, "bar")]


class Shade:
    """Colours on a logarithmic scale, over six decades at most."""

    def __init__(self, costs: np.ndarray) -> None:
        high = float(costs.max())
        above = costs[costs > max(high, 0.0) * FLOOR]
        self.low, self.high = (float(above.min()), high) if above.size else (1.0, 1.0)

    def __call__(self, cost: float) -> str:
        if cost <= self.low:
            return amount_class(0.0)
        return amount_class(math.log(cost / self.low) / math.log(self.high / self.low))

    def key(self, y: float) -> list[Mark]:
        """The colours with the costs at both ends."""
        low, wide = f"\u2264 {number(self.low)}", 14
        x = 12 + len(low) * GLYPH
        cells = [Rect(x + i * wide, y, wide, 12, amount_class((i + 0.5) / AMOUNTS)) for i in range(AMOUNTS)]
        return [Text(low, 4, y + 10), *cells, Text(number(self.high), x + AMOUNTS * wide + 6, y + 10)]
