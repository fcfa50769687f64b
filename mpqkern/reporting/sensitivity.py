"""What each layer costs under each scheme, as colours: layers from left to right, schemes from top to bottom."""

from __future__ import annotations

import math

import numpy as np

from ..scores.table import widest_first
from .axes import Row, drawing, label
from .colors import AMOUNTS, amount_class, is_deep
from .given import Given, text
from .markup import details, el, hover, number, paragraph, table

TITLE = "Sensitivity"
HIGH, TOP, KEY = 30, 8, 46  # pixels: of a cell, above, and of the key to the colours
FLOOR = 1e-6  # costs below this share of the largest have the palest colour, as those of 0 and below


def section(given: Given) -> str | None:
    scores = given.scores
    if scores is None:
        return None
    row, order = Row(scores.names), widest_first(scores.schemes)
    shade = Shade(scores.unary)
    marks, chosen = [], []
    facts = {fact.name: fact for fact in given.facts}
    for r, b in enumerate(order):
        y = TOP + r * HIGH
        marks.append(label(text(scores.schemes[b]), row.left - 8, y + HIGH / 2 + 4, "end"))
        for i, name in enumerate(scores.names):
            value = float(scores.unary[i, b])
            title = hover(f"{name} at {text(scores.schemes[b])}: {number(value)}")
            color = shade(value)
            marks.append(el("rect", title, x=row.x(i), y=y, width=row.step, height=HIGH, class_=color))
            if row.step >= 46:
                deep = "deep" if is_deep(color) else "pale"
                marks.append(label(f"{value:.2g}", row.x(i) + row.step / 2, y + HIGH / 2 + 4, "middle", class_=deep))
            if facts[name].chosen and facts[name].scheme == scores.schemes[b]:
                chosen.append(chosen_mark(row, i, y, HIGH))
    bottom = TOP + len(order) * HIGH
    marks += [*chosen, row.labels(bottom), shade.key(row.left, bottom + row.height + 8)]
    method = scores.provenance.get("method")
    note = f"Cost of each scheme in each layer{f' by {method}' if method else ''}, darker where it hurts more."
    head = ("layer", *(text(scores.schemes[b]) for b in order), "chosen")
    rows = [
        (n, *(number(float(scores.unary[i, b])) for b in order), text(facts[n].scheme) if facts[n].chosen else "")
        for i, n in enumerate(scores.names)
    ]
    return (
        paragraph(note, "The chosen ones are framed." if chosen else "")
        + drawing(row.width, bottom + row.height + KEY, "Cost of each scheme in each layer", *marks)
        + details("All costs as a table", table(head, rows, left=(0, len(head) - 1)))
    )


def chosen_mark(row: Row, layer: int, y: float, high: float) -> str:
    """A frame; where cells are narrow, a bar across the middle."""
    if row.step >= 9:
        inner = {"x": row.x(layer) + 2, "y": y + 2, "width": row.step - 4, "height": high - 4}
        return el("rect", **inner, rx=2, class_="frame under") + el("rect", **inner, rx=2, class_="frame")
    return el("rect", x=row.x(layer), y=y + high / 2 - 2, width=row.step, height=4.0, class_="bar")


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

    def key(self, x: float, y: float) -> str:
        """The colours with the costs at both ends."""
        wide = 16
        cells = [
            el("rect", x=x + i * wide, y=y, width=wide, height=12, class_=amount_class((i + 0.5) / AMOUNTS))
            for i in range(AMOUNTS)
        ]
        end = label(f"{number(self.high)} (log scale)", x + AMOUNTS * wide + 6, y + 10)
        return label(f"\u2264 {number(self.low)}", x - 6, y + 10, "end") + "".join(cells) + end
