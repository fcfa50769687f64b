"""Milliseconds of each layer and scheme as measured, and what stays in float because that is faster."""

from __future__ import annotations

import math

from ..latency import Latency
from ..latency.table import FLOAT
from .axes import Row, drawing, label, rows
from .colors import sign_class
from .given import Given, text
from .markup import details, listed, number, paragraph, table
from .sensitivity import HIGH, TOP, cell, chosen_mark

TITLE = "Latency"
RANGE = 8.0  # times faster or slower: the ends of the colours


def section(given: Given) -> str | None:
    latency = given.latency
    if latency is None or not len(latency):
        return None
    texts = [FLOAT, *dict.fromkeys(t for row in latency.values() for t in row if t != FLOAT)]
    chosen = {fact.name: text(fact.scheme) for fact in given.facts if fact.chosen}
    plot = rows(list(latency), lambda row, class_: _map(latency, texts, chosen, row, class_))
    return _words(given, chosen) + plot + details("All milliseconds", _table(given, texts, chosen))


def _words(given: Given, chosen: dict[str, str]) -> str:
    latency = given.latency
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


def _map(latency: Latency, texts: list[str], chosen: dict[str, str], row: Row, class_: str) -> str:
    marks, frames = [], []
    for r, scheme in enumerate(texts):
        y = TOP + r * HIGH
        marks.append(label(scheme, row.left - 8, y + HIGH / 2 + 4, "end"))
        for i, name in enumerate(latency):
            if scheme not in latency[name]:
                continue
            ms, plain = latency[name][scheme], latency[name][FLOAT]
            speed = f", {plain / ms:.2f}x float's speed" if scheme != FLOAT and ms > 0 else ""
            color = sign_class(-_share(plain, ms))
            marks.append(cell(row, i, y, f"{name} at {scheme}: {number(ms)} ms{speed}", f"{ms:.2g}", color))
            if chosen.get(name) == scheme:
                frames.append(chosen_mark(row, i, y))
    bottom = TOP + len(texts) * HIGH
    marks += [*frames, row.labels(bottom)]
    name = "Milliseconds of each scheme in each layer"
    return drawing(row.width, bottom + row.height, name, *marks, class_=class_)


def _share(plain: float, ms: float) -> float:
    """-1..1 from RANGE times slower to RANGE times faster, by the logarithm."""
    if plain <= 0 or ms <= 0:
        return 0.0
    return max(-1.0, min(1.0, math.log(plain / ms) / math.log(RANGE)))


def _table(given: Given, texts: list[str], chosen: dict[str, str]) -> str:
    latency = given.latency
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
