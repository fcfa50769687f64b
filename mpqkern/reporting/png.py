"""Drawings as PNG, drawn by matplotlib; imported when the first one is asked for."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib import style
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle as Disc
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.text import Text as Letters
from matplotlib.transforms import Affine2D, Transform

from .axes import PAPER
from .colors import PRINT, look, variables
from .marks import Circle, Drawing, Group, Line, Mark, Path, Rect, Runs, Text
from .markup import printable

DPI = 200
INCH = 96  # pixels of a drawing, as in a page
POINT = 72 / INCH
LETTERS = 0.9 * POINT  # of DejaVu, which is wider than the fonts that drawings leave room for
MARGIN = 8 / INCH
GAP = 24  # pixels between drawings
ANCHORS = {None: "left", "start": "left", "middle": "center", "end": "right"}
COLORS = variables(PRINT)


def png(drawings: Sequence[Drawing]) -> bytes:
    """As many side by side as fit the paper, cut to what is drawn, on white; the same bytes each time."""
    wide, high = (max(sizes) + GAP for sizes in zip(*((d.width, d.height) for d in drawings), strict=True))
    columns = max(1, min(len(drawings), int((PAPER.width + GAP) // wide)))
    width, height = columns * wide, -(-len(drawings) // columns) * high
    file = io.BytesIO()
    with style.context("default"):  # whatever settings of matplotlib are in force around
        figure = Figure((width / INCH, height / INCH), facecolor=COLORS["page"])
        FigureCanvasAgg(figure)
        for i, drawing in enumerate(drawings):
            left, top = i % columns * wide, i // columns * high
            place = Affine2D().translate(left, top - height).scale(1 / width, -1 / height)
            _draw(figure, drawing.marks, place + figure.transFigure)
        told = {"Title": drawings[0].name, "Software": None}
        figure.savefig(file, format="png", dpi=DPI, bbox_inches="tight", pad_inches=MARGIN, metadata=told)
    return file.getvalue()


def _draw(figure: Figure, marks: Sequence[Mark], place: Transform) -> None:
    for mark in marks:
        if isinstance(mark, Group):
            _draw(figure, mark.marks, place)
            continue
        for artist in _artists(mark):
            artist.set(transform=place, zorder=1)  # drawn in the order in which they come
            figure.add_artist(artist)


def _artists(mark: Mark) -> list[Artist]:
    match mark:
        case Line():
            looks = look("line", mark.class_)
            color, width = _color(looks, "stroke"), looks["stroke-width"] * POINT
            return [Line2D([mark.x1, mark.x2], [mark.y1, mark.y2], color=color, lw=width, solid_capstyle="butt")]
        case Rect():
            corners = _corners(mark.x, mark.y, mark.x + mark.width, mark.y + mark.height)
            return _seen(PathPatch(Outline(corners, closed=True)), "rect", mark.class_)
        case Circle():
            return _seen(Disc((mark.cx, mark.cy), mark.r), "circle", mark.class_)
        case Path():
            points = [*mark.points, mark.points[0]] if mark.closed else mark.points
            return _seen(PathPatch(Outline(points, closed=mark.closed)), "path", mark.class_)
        case Runs():
            cells = [(class_, PathPatch(_cells(mark, runs), snap=True)) for class_, runs in mark.runs.items()]
            return [artist for class_, patch in cells for artist in _seen(patch, "rect", class_)]
        case Text():
            return [_letters(mark)]
    raise TypeError(f"a mark is of type {type(mark).__name__}; wanted one of {Mark}")


def _seen(patch: Any, tag: str, class_: str) -> list[Artist]:
    """With its looks; nothing of what is there for a pointer only."""
    looks = look(tag, class_)
    if looks.get("fill-opacity") == 0:
        return []
    width = looks.get("stroke-width", 1) * POINT
    patch.set(facecolor=_color(looks, "fill"), edgecolor=_color(looks, "stroke") if width else "none", linewidth=width)
    patch.set_joinstyle("miter")
    return [patch]


def _color(looks: dict[str, Any], kind: str) -> str | tuple[str, float]:
    name = looks.get(kind, "none")
    return "none" if name == "none" else (COLORS[name], looks.get(f"{kind}-opacity", 1.0))


def _corners(left: float, top: float, right: float, bottom: float) -> list[tuple[float, float]]:
    """All four and back; rounded, so that neighbours share theirs and no line of white comes between them."""
    left, top, right, bottom = (round(v, 3) for v in (left, top, right, bottom))
    return [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]


def _cells(mark: Runs, runs: Sequence[tuple[int, int, int]]) -> Outline:
    """All runs of one class as one outline."""
    x, y, size = mark.x, mark.y, mark.size
    places = [
        place
        for a, start, end in runs
        for place in _corners(x + start * size, y + a * size, x + end * size, y + (a + 1) * size)
    ]
    codes = [Outline.MOVETO, Outline.LINETO, Outline.LINETO, Outline.LINETO, Outline.CLOSEPOLY]
    return Outline(places, codes * len(runs))


def _letters(mark: Text) -> Letters:
    looks = look("text", mark.class_)
    return Letters(
        mark.x,
        mark.y,
        printable(mark.text),
        color=_color(looks, "fill"),
        fontsize=looks["font-size"] * LETTERS,
        fontweight="bold" if looks.get("font-weight", 400) >= 600 else "normal",
        horizontalalignment=ANCHORS[mark.anchor],
        verticalalignment="baseline",
        rotation=-mark.angle,
        rotation_mode="anchor",
        parse_math=False,  # a dollar is a dollar
    )
