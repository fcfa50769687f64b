"""Drawings as SVG in the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .axes import DESK, PHONE, Room
from .marks import Circle, Drawing, Group, Line, Mark, Path, Rect, Runs, Tale, Text
from .markup import coordinate, el, esc, hover

FEW = 60  # layers that fit a phone; a longer row scrolls there


def fitted(draw: Callable[[Room], Drawing], layers: int = 0) -> str:
    """A drawing for desks, and one for phones where a row of so many layers fits; the page shows either."""
    if layers > FEW:
        return markup(draw(DESK))
    return markup(draw(DESK), "wide") + markup(draw(PHONE), "narrow")


def markup(drawing: Drawing, class_: str = "") -> str:
    """An SVG of its natural size; on a narrow page it shrinks so far, then its box scrolls."""
    width = drawing.width
    style = f"width:{coordinate(width)}px;min-width:{coordinate(width * drawing.shrinks)}px"
    box = f"0 0 {coordinate(width)} {coordinate(drawing.height)}"
    marks = map(element, drawing.marks)
    body = el("svg", *marks, viewBox=box, role="img", aria_label=drawing.name, style=style)
    return el("div", body, class_=f"scroll {class_}".strip(), tabindex=0)


def element(mark: Mark) -> str:
    match mark:
        case Line():
            return el("line", x1=mark.x1, x2=mark.x2, y1=mark.y1, y2=mark.y2, class_=mark.class_)
        case Rect():
            box = {"x": mark.x, "y": mark.y, "width": mark.width, "height": mark.height, "rx": mark.rx}
            return el("rect", *_tale(mark.tale), **box, class_=mark.class_)
        case Circle():
            return el("circle", *_tale(mark.tale), cx=mark.cx, cy=mark.cy, r=mark.r, class_=mark.class_)
        case Text():
            return _text(mark)
        case Path():
            return el("path", d=_steps(mark.points) + ("z" if mark.closed else ""), class_=mark.class_)
        case Runs():
            place = f"translate({coordinate(mark.x)} {coordinate(mark.y + mark.size / 2)}) scale({mark.size})"
            strokes = (el("path", d=_strokes(runs), class_=class_) for class_, runs in mark.runs.items())
            return el("g", *strokes, transform=place, class_="runs")
        case Group():
            return el("g", *_tale(mark.tale), *map(element, mark.marks), class_=mark.class_)


def _tale(lines: Tale) -> list[str]:
    return [hover(*lines)] if lines else []


def _text(mark: Text) -> str:
    place = {"x": mark.x, "y": mark.y}
    if mark.angle:
        turned = f"translate({coordinate(mark.x)} {coordinate(mark.y)}) rotate({coordinate(mark.angle)})"
        place = {"transform": turned}
    return el("text", esc(mark.text), **place, text_anchor=mark.anchor, class_=mark.class_)


def _steps(points: Sequence[tuple[float, float]]) -> str:
    """
    >>> _steps([(0, 1), (5, 1), (5, 2.25), (6, 3)])
    'M0 1H5V2.2L6 3'
    """
    (x, y), *rest = points
    steps = [f"M{coordinate(x)} {coordinate(y)}"]
    for to_x, to_y in rest:
        if to_y == y:
            steps.append(f"H{coordinate(to_x)}")
        elif to_x == x:
            steps.append(f"V{coordinate(to_y)}")
        else:
            steps.append(f"L{coordinate(to_x)} {coordinate(to_y)}")
        x, y = to_x, to_y
    return "".join(steps)


def _strokes(runs: Sequence[tuple[int, int, int]]) -> str:
    """One stroke for each run, in cells; moves are relative within a line, which halves the text.

    >>> _strokes([(1, 0, 1), (1, 3, 5), (2, 0, 2)])
    'M0 1h1m2 0h2M0 2h2'
    """
    strokes, line, at = [], None, 0
    for a, start, end in runs:
        move = f"m{start - at} 0" if a == line else f"M{start} {a}"
        strokes.append(f"{move}h{end - start}")
        line, at = a, end
    return "".join(strokes)
