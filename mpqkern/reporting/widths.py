"""Bits of each layer along the network, and what they make of its bytes."""

from __future__ import annotations

import math
from dataclasses import replace

from .axes import GLYPH, Axis, Room, Row, rules
from .colors import width_class
from .given import Fact, Given, text
from .marks import Circle, Drawing, Group, Line, Mark, Rect, Text
from .markup import el, esc, number, paragraph, size
from .svg import element, fitted

TITLE = "Bits along the network"
TOP, HIGH, GAP = 12, 130, 34  # pixels: above the plot, of a panel, between the two


def section(given: Given) -> str | None:
    facts = _facts(given)
    if not facts:
        return None
    note = "Layers in the model's order." + (" Below, bytes in float (pale) and as packed." if _sized(facts) else "")
    bars = fitted(lambda room: _bars(facts, Row([fact.name for fact in facts], room)), len(facts))
    return paragraph(note) + _legend(_schemes(facts)) + bars


def drawings(given: Given, room: Room) -> list[Drawing]:
    facts = _facts(given)
    return [_keyed(_bars(facts, Row([fact.name for fact in facts], room)), facts)] if facts else []


def _facts(given: Given) -> list[Fact]:
    return [fact for fact in given.facts if fact.chosen]


def _sized(facts: list[Fact]) -> bool:
    return any(fact.float_bytes is not None for fact in facts)


def _schemes(facts: list[Fact]) -> list[tuple[int, str]]:
    """Widths, with the name of each scheme."""
    return sorted({(fact.bits, text(fact.scheme)) for fact in facts})


def _bars(facts: list[Fact], row: Row) -> Drawing:
    base, sized = TOP + HIGH, _sized(facts)
    bottom = base + (GAP + HIGH if sized else 0)
    widths = sorted({fact.bits for fact in facts})
    heights = Axis(0, _level(max(widths)) + 0.3, base, TOP)
    marks: list[Mark] = [Text("bits", 4, TOP + 4)]
    for bits in widths:
        y = heights(_level(bits))
        marks.append(Line(row.left, y, row.right, y, "grid"))
        marks.append(Text("float" if bits > 8 else str(bits), row.left - 8, y + 4, "end"))
    sizes = Axis(0, max((f.float_bytes or 0 for f in facts), default=0) or 1, bottom, bottom - HIGH) if sized else None
    if sizes:
        marks += [Text("bytes", 4, bottom - HIGH - 10), *rules(sizes, row.left, row.right, text=size, most=4)]
    marks += [_column(row, i, fact, heights, sizes) for i, fact in enumerate(facts)]
    marks += [Line(row.left, base, row.right, base, "axis"), *row.labels(bottom)]
    return Drawing(row.width, bottom + row.height, "Bits and bytes of each layer", marks)


def _legend(schemes: list[tuple[int, str]]) -> str:
    """Above the drawing in a page, where it wraps."""
    keys = [
        el("span", el("svg", element(Circle(6, 6, 6, width_class(bits))), viewBox="0 0 12 12"), esc(name))
        for bits, name in schemes
    ]
    return el("div", *keys, class_="legend")


def _keyed(bars: Drawing, facts: list[Fact]) -> Drawing:
    """With the legend below, for where nothing stands around the drawing."""
    keys = [(width_class(bits), name) for bits, name in _schemes(facts)]
    keys += [("ghost", "bytes in float")] if _sized(facts) else []
    marks, x, y = list(bars.marks), 10.0, bars.height + 20.0
    for class_, name in keys:
        wide = 16 + len(name) * GLYPH + 16
        if x > 10 and x + wide > bars.width:
            x, y = 10.0, y + 18
        marks += [Circle(x, y - 4, 5, class_), Text(name, x + 10, y)]
        x += wide
    return replace(bars, height=y + 8, marks=marks)


def _level(bits: int) -> float:
    """Doubling the width is one step up, so that 2, 4, 8 and float are told apart as easily as they count."""
    return 1 + math.log2(bits)


def _column(row: Row, i: int, fact: Fact, heights: Axis, sizes: Axis | None) -> Group:
    thick = min(row.step * 0.76, 44.0)
    x = row.x(i) + (row.step - thick) / 2
    end = (sizes or heights).start

    def bar(axis: Axis, value: float, class_: str) -> Rect:
        return Rect(x, axis(value), thick, axis.start - axis(value), class_)

    color = width_class(fact.bits)
    marks = [Rect(row.x(i), TOP, row.step, end - TOP, "hit"), bar(heights, _level(fact.bits), color)]
    if sizes and fact.float_bytes is not None:
        marks.append(bar(sizes, fact.float_bytes, "ghost"))
    if sizes and fact.bytes is not None:
        marks.append(bar(sizes, fact.bytes, color))
    return Group(marks, _tale(fact), "column")


def _tale(fact: Fact) -> list[str]:
    """What the pointer shows of a layer."""
    lines = [fact.name, fact.about] if fact.about else [fact.name]
    lines.append(text(fact.scheme) + (f": {fact.reason}" if fact.reason else ""))
    if fact.float_bytes is not None:
        lines.append(
            f"{fact.float_bytes:,} bytes in float" + (f", {fact.bytes:,} now" if fact.bytes is not None else "")
        )
    return lines + ([f"cost {number(fact.cost)}"] if fact.cost is not None else [])
