"""Milliseconds of each layer and scheme as measured, and what stays in float because that is faster."""

from __future__ import annotations

import math

from ..latency import Latency
from ..latency.table import FLOAT
from .axes import Room, Row, signs
from .colors import SIGNS, sign_class
from .given import Given
from .marks import Drawing, Mark, Text
from .markup import details, listed, number, paragraph, table
from .sensitivity import FIGURED, HIGH, KEY, TOP, cell, chosen_marks
from .svg import fitted

TITLE = "Latency"
RANGE = 8.0  # times faster or slower: the ends of the colours


def section(given: Given) -> str | None:
    latency = given.latency
    if latency is None or not len(latency):
        return None
    plot = fitted(lambda room: _map(given, room), len(latency))
    return _words(given) + plot + details("All milliseconds", _table(given))


def drawings(given: Given, room: Room) -> list[Drawing]:
    return [_map(given, room)] if given.latency is not None and len(given.latency) else []


def _texts(latency: Latency) -> list[str]:
    """Schemes that any layer was timed with."""
    return [FLOAT, *dict.fromkeys(t for row in latency.values() for t in row if t != FLOAT)]


def _words(given: Given) -> str:
    latency, chosen = given.latency, given.chosen
    slow = [name for name in latency if latency.fastest(name) == FLOAT]
    note = f"Of {number(latency.total)} ms in float, {number(latency.rest)} ms are spent outside of these layers."
    note += " Blue is faster than float, red is slower."
    if slow:
        note += f" {len(slow)} of {len(latency)} layers are fastest in float."
    kept = [name for name in slow if chosen.get(name) == FLOAT]
    lost = [n for n in latency if latency[n].get(chosen.get(n, FLOAT), 0.0) > latency[n][FLOAT]]
    lines = [paragraph(note)]
    if kept:
        lines.append(paragraph(f"In float, which is fastest there: {listed(kept)}."))
    if lost:
        worst = [f"{n} ({latency[n][FLOAT] / latency[n][chosen[n]]:.2f}x of float's speed)" for n in lost]
        lines.append(paragraph(f"Smaller, but slower than float as chosen: {listed(worst)}."))
    return "".join(lines)


def _map(given: Given, room: Room) -> Drawing:
    latency, texts = given.latency, _texts(given.latency)
    row = Row(list(latency), room)
    marks: list[Mark] = []
    frames: list[Mark] = []
    for r, scheme in enumerate(texts):
        y = TOP + r * HIGH
        marks.append(Text(scheme, row.left - 8, y + HIGH / 2 + 4, "end"))
        for i, name in enumerate(latency):
            if scheme not in latency[name]:
                continue
            ms, plain = latency[name][scheme], latency[name][FLOAT]
            speed = f", {plain / ms:.2f}x float's speed" if scheme != FLOAT and ms > 0 else ""
            color = sign_class(-_share(plain, ms))
            marks += cell(row, i, y, f"{name} at {scheme}: {number(ms)} ms{speed}", f"{ms:.2g}", color)
            if given.chosen.get(name) == scheme:
                frames += chosen_marks(row, i, y)
    bottom = TOP + len(texts) * HIGH
    ends = (f"{RANGE:.0f}x faster", "float", f"{RANGE:.0f}x slower")
    key = bottom + row.height + 8
    marks += [*frames, *row.labels(bottom), *signs(4, key, ends)]
    marks += [Text("milliseconds", 14 * SIGNS + 16, key + 10)] if row.step >= FIGURED else []
    return Drawing(row.width, bottom + row.height + KEY, "Milliseconds of each scheme in each layer", marks)


def _share(plain: float, ms: float) -> float:
    """-1..1 from RANGE times slower to RANGE times faster, by the logarithm."""
    if plain <= 0 or ms <= 0:
        return 0.0
    return max(-1.0, min(1.0, math.log(plain / ms) / math.log(RANGE)))


def _table(given: Given) -> str:
    latency, texts, chosen = given.latency, _texts(given.latency), given.chosen
    lines = [
        (name, *(_ms(row.get(t)) for t in texts), latency.fastest(name), chosen.get(name, ""))
        for name, row in latency.items()
    ]
    lines.append(("the rest", *(_ms(latency.rest) for _ in texts), "", ""))
    whole = {t: [row.get(t) for row in latency.values()] for t in texts}
    summed = {t: None if None in ms else latency.rest + sum(ms) for t, ms in whole.items()}
    lines.append(("predicted, all layers", *(_ms(summed[t]) for t in texts), "", ""))
    if latency.whole:
        lines.append(("measured, all layers", *(_ms(latency.whole.get(t)) for t in texts), "", ""))
    return table(("layer", *texts, "fastest", "chosen"), lines, left=(0, len(texts) + 1, len(texts) + 2))


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
