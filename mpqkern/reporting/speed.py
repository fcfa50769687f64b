"""Milliseconds of each layer and scheme as measured, and what stays in float because that is faster."""

from __future__ import annotations

import math

from ..latency.table import FLOAT
from .axes import Row, drawing, label
from .colors import sign_class
from .given import Given, text
from .markup import details, el, hover, number, paragraph, table
from .sensitivity import HIGH, TOP, chosen_mark

TITLE = "Latency"
RANGE = 8.0  # times faster or slower: the ends of the colours


def section(given: Given) -> str | None:
    latency = given.latency
    if latency is None or not len(latency):
        return None
    texts = [FLOAT, *dict.fromkeys(t for row in latency.values() for t in row if t != FLOAT)]
    chosen = {fact.name: text(fact.scheme) for fact in given.facts if fact.chosen}
    return (
        _words(given, chosen) + _map(given, texts, chosen) + details("All milliseconds", _table(given, texts, chosen))
    )


def _words(given: Given, chosen: dict[str, str]) -> str:
    latency = given.latency
    slow = [name for name in latency if latency.fastest(name) == FLOAT]
    note = f"Of {number(latency.total)} ms in float, {number(latency.rest)} ms are spent outside of these layers."
    note += " Blue is faster than float, red is slower."
    if slow:
        note += f" {len(slow)} of {len(latency)} layers are fastest in float."
    kept = [name for name in slow if chosen.get(name) == FLOAT]
    lost = [
        n
        for n in latency
        if chosen.get(n, FLOAT) in latency[n] and latency[n][chosen.get(n, FLOAT)] > latency[n][FLOAT]
    ]
    lines = [paragraph(note)]
    if kept:
        lines.append(paragraph(f"In float because nothing is faster: {', '.join(kept)}."))
    if lost:
        worst = ", ".join(f"{n} ({latency[n][FLOAT] / latency[n][chosen[n]]:.2f}x of float's speed)" for n in lost)
        lines.append(paragraph(f"Smaller, but slower than float as chosen: {worst}."))
    return "".join(lines)


def _map(given: Given, texts: list[str], chosen: dict[str, str]) -> str:
    latency = given.latency
    row, marks, frames = Row(list(latency)), [], []
    for r, scheme in enumerate(texts):
        y = TOP + r * HIGH
        marks.append(label(scheme, row.left - 8, y + HIGH / 2 + 4, "end"))
        for i, name in enumerate(latency):
            if scheme not in latency[name]:
                continue
            ms, plain = latency[name][scheme], latency[name][FLOAT]
            share = _share(plain, ms)
            speed = "" if scheme == FLOAT else f", {plain / ms:.2f}x float's speed" if ms > 0 else ""
            title = hover(f"{name} at {scheme}: {number(ms)} ms{speed}")
            marks.append(el("rect", title, x=row.x(i), y=y, width=row.step, height=HIGH, class_=sign_class(-share)))
            if row.step >= 46:
                deep = "deep" if abs(share) > 0.6 else "pale"
                marks.append(label(f"{ms:.2g}", row.x(i) + row.step / 2, y + HIGH / 2 + 4, "middle", class_=deep))
            if chosen.get(name) == scheme:
                frames.append(chosen_mark(row, i, y, HIGH))
    bottom = TOP + len(texts) * HIGH
    return drawing(
        row.width, bottom + row.height, "Milliseconds of each scheme in each layer", *marks, *frames, row.labels(bottom)
    )


def _share(plain: float, ms: float) -> float:
    """-1..1 from RANGE times slower to RANGE times faster, by the logarithm."""
    if plain <= 0 or ms <= 0:
        return 0.0
    return max(-1.0, min(1.0, math.log(plain / ms) / math.log(RANGE)))


def _table(given: Given, texts: list[str], chosen: dict[str, str]) -> str:
    latency = given.latency
    rows = [
        (name, *(_ms(row.get(t)) for t in texts), latency.fastest(name), chosen.get(name, ""))
        for name, row in latency.items()
    ]
    rows.append(("the rest", *(_ms(latency.rest) for _ in texts), "", ""))
    whole = {t: [row.get(t) for row in latency.values()] for t in texts}
    summed = {t: None if None in ms else latency.rest + sum(ms) for t, ms in whole.items()}
    rows.append(("predicted, all layers", *(_ms(summed[t]) for t in texts), "", ""))
    if latency.whole:
        rows.append(("measured, all layers", *(_ms(latency.whole.get(t)) for t in texts), "", ""))
    return table(("layer", *texts, "fastest", "chosen"), rows, left=(0, len(texts) + 1, len(texts) + 2))


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
