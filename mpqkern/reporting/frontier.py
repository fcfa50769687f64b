"""The least cost for every budget, each point with its certificate, and where the assignment is among them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ..solve import Frontier
from .axes import Axis, Room, posts, rules
from .given import Given
from .marks import Circle, Drawing, Group, Line, Mark, Path, Text
from .markup import details, number, paragraph, size, table
from .svg import fitted

TITLE = "Frontier"
UNITS = {"avg_bits": "bits a parameter", "bytes": "bytes", "mbytes": "MiB", "fraction": "share of float32"}
UNITS |= {"gbops": "GBOPs", "ms": "ms", "limit": "budget"}
MANY = 60  # points from which on they are drawn small
MOST = 120  # points that can be pointed at and are in the table; the line has all
HIGH, LOW = 400, 320  # pixels: where there is room beside it, and on phones


def section(given: Given) -> str | None:
    front = given.frontier
    if front is None or not len(front):
        return None
    unit = UNITS.get(front.kind, front.kind)
    proven = sum(_gap(front, i) == 0 for i in range(len(front)))
    note = f"Least cost against {unit}. {proven} of {len(front)} points are proven optimal"
    note += "." if proven == len(front) else "; the others are hollow, and a line goes down to what is proven."
    shown = _shown(front)
    use = number if front.kind != "bytes" else lambda v: f"{v:,.0f}"
    rows = [
        (
            use(front.use[i]),
            number(front.objective[i]),
            number(front.bound[i]),
            _certificate(front, i),
            _place(front, i),
        )
        for i in shown
    ]
    name = "All points" if len(shown) == len(front) else f"{len(shown)} of the {len(front)} points"
    return (
        paragraph(note)
        + fitted(lambda room: _plot(given, room))
        + details(name, table((unit, "objective", "bound", "certificate", ""), rows, left=(3, 4)))
    )


def drawings(given: Given, room: Room) -> list[Drawing]:
    return [_plot(given, room)] if given.frontier is not None and len(given.frontier) else []


def _chosen(given: Given) -> tuple[float, float] | None:
    """(use, objective) of the assignment, counted as the frontier counts; None where it cannot be told."""
    found = given.assignment
    if found is None or found.objective is None or not math.isfinite(found.objective):
        return None
    use = given.frontier.use_of(found.schemes)
    return None if use is None else (use, found.objective)


def _shown(front: Frontier) -> list[int]:
    """All points, or of very many those nearest to evenly spread budgets, with the ends and the knee."""
    if len(front) <= MOST:
        return list(range(len(front)))
    spread = np.linspace(min(front.use), max(front.use), MOST - 3)
    nearest = np.abs(np.subtract.outer(spread, front.use)).argmin(axis=1)
    return sorted({0, front.knee, len(front) - 1, *nearest.tolist()})


def _gap(front: Frontier, i: int) -> float:
    """Of the objective; infinite where no bound is known."""
    if front.states[i] == "optimal":
        return 0.0
    bound, value = front.bound[i], front.objective[i]
    if bound is None or not math.isfinite(bound):
        return math.inf
    return max(0.0, value - bound) / max(abs(value), 1e-300)


def _certificate(front: Frontier, i: int) -> str:
    gap = _gap(front, i)
    return "proven optimal" if gap == 0 else f"gap {100 * gap:.3g} %" if math.isfinite(gap) else "no bound"


def _place(front: Frontier, i: int) -> str:
    return "knee" if i == front.knee and len(front) > 2 else ""


def _plot(given: Given, room: Room) -> Drawing:
    front, chosen = given.frontier, _chosen(given)
    unit, width, height = UNITS.get(front.kind, front.kind), room.width, HIGH if room.width > 400 else LOW
    left, right, top, bottom = 68, width - 16, 24, height - 48
    bounds = [b for b, v in zip(front.bound, front.objective, strict=True) if _near(b, v)]
    values = [*front.objective, *bounds, *([chosen[1]] if chosen else [])]
    x = Axis.over([*front.use, *([chosen[0]] if chosen else [])], left, right, bent=False)
    y = Axis.over(values, bottom, top)
    tick: Callable[[float], str] = size if front.kind == "bytes" else number
    marks = [*rules(y, left, right), *posts(x, top, bottom, text=tick, most=max(3, int(width // 130)))]
    marks += [Text("objective" + (" (log scale)" if y.bend else ""), 4, 14), Text(unit, right, height - 8, "end")]
    marks.append(Path(_stairs(front, x, y), "stairs"))
    marks += [_point(front, i, x, y, 2.5 if len(front) > MANY else 4.5) for i in _shown(front)]
    knee = front.knee if len(front) > 2 else None
    if knee is not None:
        marks.append(_named("knee", x(front.use[knee]), y(front.objective[knee]), below=True))
    if chosen:
        marks += _ring(chosen, unit, x, y, tick)
    return Drawing(width, height, f"Objective against {unit}", marks)


def _near(bound: float | None, value: float) -> bool:
    """Whether to make room for a bound: not where it is so far off that the curve would be flat, or unknown."""
    return bound is not None and math.isfinite(bound) and (value <= 0 or bound > value / 100)


def _stairs(front: Frontier, x: Axis, y: Axis) -> list[tuple[float, float]]:
    """Between two budgets the answer of the smaller one holds."""
    steps = [(x(front.use[0]), y(front.objective[0]))]
    for use, value in zip(front.use[1:], front.objective[1:], strict=True):
        steps += [(x(use), steps[-1][1]), (x(use), y(value))]
    return steps


def _point(front: Frontier, i: int, x: Axis, y: Axis, radius: float) -> Group:
    at, bound, gap = (x(front.use[i]), y(front.objective[i])), front.bound[i], _gap(front, i)
    tale = [
        f"{front.use[i]:,.10g} {UNITS.get(front.kind, front.kind)}",
        f"objective {number(front.objective[i])}",
        *([f"bound {number(bound)}"] if math.isfinite(gap) else []),
        _certificate(front, i),
    ]
    marks: list[Mark] = [Circle(*at, 12.0, "hit")]
    if gap > 0:
        end = y(bound) if _near(bound, front.objective[i]) and bound >= y.low else y.start
        marks.append(Line(*at, at[0], end, "whisker"))
    marks.append(Circle(*at, radius, "point" if gap == 0 else "point open"))
    return Group(marks, tale, "column")


def _ring(chosen: tuple[float, float], unit: str, x: Axis, y: Axis, tick: Callable[[float], str]) -> list[Mark]:
    at = x(chosen[0]), y(chosen[1])
    tale = ("the assignment", f"{chosen[0]:,.10g} {unit}", f"objective {number(chosen[1])}")
    return [Circle(*at, 8.0, "ring", tale), _named(f"chosen: {tick(chosen[0])}", *at, below=False)]


def _named(text: str, x: float, y: float, *, below: bool) -> Text:
    """A name beside a point: above the curve, which falls, or below it."""
    return Text(text, x - 10, y + 20, "end", "strong") if below else Text(text, x + 11, y - 9, None, "strong")
