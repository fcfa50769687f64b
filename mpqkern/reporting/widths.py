"""Bits of each layer along the network, and what they make of its bytes."""

from __future__ import annotations

import math

from .axes import Axis, Row, drawing, label, rows, rules
from .colors import width_class
from .given import Fact, Given, text
from .markup import el, esc, hover, number, paragraph, size

TITLE = "Bits along the network"
TOP, HIGH, GAP = 12, 130, 34  # pixels: above the plot, of a panel, between the two


def section(given: Given) -> str | None:
    facts = [fact for fact in given.facts if fact.chosen]
    if not facts:
        return None
    sized = any(fact.float_bytes is not None for fact in facts)
    note = "Layers in the model's order." + (" Below, bytes in float (pale) and as packed." if sized else "")
    return (
        paragraph(note)
        + legend(sorted({(f.bits, text(f.scheme)) for f in facts}))
        + rows([fact.name for fact in facts], lambda row, class_: _bars(facts, sized, row, class_))
    )


def _bars(facts: list[Fact], sized: bool, row: Row, class_: str) -> str:
    base = TOP + HIGH
    bottom = base + (GAP + HIGH if sized else 0)
    widths = sorted({fact.bits for fact in facts})
    heights = Axis(0, _level(max(widths)) + 0.3, base, TOP)
    marks = [label("bits", 4, TOP + 4)]
    for bits in widths:
        y = heights(_level(bits))
        marks.append(el("line", x1=row.left, x2=row.right, y1=y, y2=y, class_="grid"))
        marks.append(label("float" if bits > 8 else str(bits), row.left - 8, y + 4, "end"))
    sizes = Axis(0, max((f.float_bytes or 0 for f in facts), default=0) or 1, bottom, bottom - HIGH) if sized else None
    if sizes:
        marks += [label("bytes", 4, bottom - HIGH - 10), rules(sizes, row.left, row.right, text=size, most=4)]
    marks += [_column(row, i, fact, heights, sizes) for i, fact in enumerate(facts)]
    marks.append(el("line", x1=row.left, x2=row.right, y1=base, y2=base, class_="axis"))
    marks.append(row.labels(bottom))
    return drawing(row.width, bottom + row.height, "Bits and bytes of each layer", *marks, class_=class_)


def legend(schemes: list[tuple[int, str]]) -> str:
    """Of widths, with the name of each scheme."""
    keys = [
        el("span", el("svg", el("circle", cx=6, cy=6, r=6, class_=width_class(bits)), viewBox="0 0 12 12"), esc(name))
        for bits, name in schemes
    ]
    return el("div", *keys, class_="legend")


def _level(bits: int) -> float:
    """Doubling the width is one step up, so that 2, 4, 8 and float are told apart as easily as they count."""
    return 1 + math.log2(bits)


def _column(row: Row, i: int, fact: Fact, heights: Axis, sizes: Axis | None) -> str:
    x, wide = row.x(i), row.step
    thick = min(wide * 0.76, 44.0)
    bar = {"x": x + (wide - thick) / 2, "width": thick}
    y, end = heights(_level(fact.bits)), (sizes or heights).start
    parts = [
        hover(*_tale(fact)),
        el("rect", x=x, y=TOP, width=wide, height=end - TOP, class_="hit"),
        el("rect", **bar, y=y, height=heights.start - y, class_=width_class(fact.bits)),
    ]
    if sizes and fact.float_bytes is not None:
        y = sizes(fact.float_bytes)
        parts.append(el("rect", **bar, y=y, height=sizes.start - y, class_="ghost"))
    if sizes and fact.bytes is not None:
        y = sizes(fact.bytes)
        parts.append(el("rect", **bar, y=y, height=sizes.start - y, class_=width_class(fact.bits)))
    return el("g", *parts, class_="column")


def _tale(fact: Fact) -> list[str]:
    """What the pointer shows of a layer."""
    lines = [fact.name, fact.about] if fact.about else [fact.name]
    lines.append(text(fact.scheme) + (f": {fact.reason}" if fact.reason else ""))
    if fact.float_bytes is not None:
        lines.append(
            f"{fact.float_bytes:,} bytes in float" + (f", {fact.bytes:,} now" if fact.bytes is not None else "")
        )
    return lines + ([f"cost {number(fact.cost)}"] if fact.cost is not None else [])
