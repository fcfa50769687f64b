"""What each layer costs under each scheme, as colours: layers from left to right, schemes from top to bottom."""

from __future__ import annotations

import math

import numpy as np

from ..scores.table import Scores, widest_first
from .axes import GLYPH, Row, drawing, label, rows
from .colors import AMOUNTS, amount_class
from .given import Given, text
from .markup import details, el, hover, number, paragraph, table

TITLE = "Sensitivity"
HIGH, TOP, KEY = 30, 8, 46  # pixels: of a cell, above, and of the key to the colours
FLOOR = 1e-6  # costs below this share of the largest have the palest colour, as those of 0 and below


def section(given: Given) -> str | None:
    scores = given.scores
    if scores is None:
        return None
    order = widest_first(scores.schemes)
    facts = {fact.name: fact for fact in given.facts}
    schemes = {n: text(facts[n].scheme) for n in scores.names if facts[n].chosen}
    method = scores.provenance.get("method")
    note = f"Cost of each scheme in each layer{f' by {method}' if method else ''}; colours are on a logarithmic scale."
    head = ("layer", *(text(scores.schemes[b]) for b in order), "chosen")
    lines = [
        (n, *(number(float(scores.unary[i, b])) for b in order), schemes.get(n, "")) for i, n in enumerate(scores.names)
    ]
    return (
        paragraph(note, "The chosen ones are framed." if schemes else "")
        + rows(scores.names, lambda row, class_: _map(scores, order, schemes, row, class_))
        + details("All costs as a table", table(head, lines, left=(0, len(head) - 1)))
    )


def _map(scores: Scores, order: list[int], chosen: dict[str, str], row: Row, class_: str) -> str:
    shade, marks, frames = Shade(scores.unary), [], []
    for r, b in enumerate(order):
        y, scheme = TOP + r * HIGH, text(scores.schemes[b])
        marks.append(label(scheme, row.left - 8, y + HIGH / 2 + 4, "end"))
        for i, name in enumerate(scores.names):
            value = float(scores.unary[i, b])
            color = shade(value)
            marks.append(cell(row, i, y, f"{name} at {scheme}: {number(value)}", f"{value:.2g}", color))
            if chosen.get(name) == scheme:
                frames.append(chosen_mark(row, i, y))
    bottom = TOP + len(order) * HIGH
    marks += [*frames, row.labels(bottom), shade.key(bottom + row.height + 8)]
    return drawing(row.width, bottom + row.height + KEY, "Cost of each scheme in each layer", *marks, class_=class_)


def cell(row: Row, layer: int, y: float, tale: str, short: str, color: str) -> str:
    """A colour that tells its figure under the pointer, and at once where there is room."""
    rect = el("rect", hover(tale), x=row.x(layer), y=y, width=row.step, height=HIGH, class_=color)
    if row.step < 46:
        return rect
    return rect + label(short, row.x(layer) + row.step / 2, y + HIGH / 2 + 4, "middle", class_="on")


def chosen_mark(row: Row, layer: int, y: float) -> str:
    """A frame; where cells are narrow, a bar across the middle."""
    if row.step >= 9:
        inner = {"x": row.x(layer) + 2, "y": y + 2, "width": row.step - 4, "height": HIGH - 4}
        return el("rect", **inner, rx=2, class_="frame under") + el("rect", **inner, rx=2, class_="frame")
    return el("rect", x=row.x(layer), y=y + HIGH / 2 - 2, width=row.step, height=4.0, class_="bar")


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

    def key(self, y: float) -> str:
        """The colours with the costs at both ends."""
        low, wide = f"\u2264 {number(self.low)}", 14
        x = 12 + len(low) * GLYPH
        cells = [
            el("rect", x=x + i * wide, y=y, width=wide, height=12, class_=amount_class((i + 0.5) / AMOUNTS))
            for i in range(AMOUNTS)
        ]
        return label(low, 4, y + 10) + "".join(cells) + label(number(self.high), x + AMOUNTS * wide + 6, y + 10)
