"""What plots are made of: plain marks in pixels, y downwards. `svg` writes them into the page, `png` into pictures.

A mark looks as its classes say (`colors.look`); later classes win. Its tale, lines of text, is what a browser shows
under the pointer; a picture has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Tale = Sequence[str]


@dataclass(frozen=True)
class Line:
    x1: float
    y1: float
    x2: float
    y2: float
    class_: str


@dataclass(frozen=True)
class Rect:
    x: float
    y: float
    width: float
    height: float
    class_: str
    tale: Tale = ()
    rx: float | None = None  # radius of its corners in a page


@dataclass(frozen=True)
class Circle:
    cx: float
    cy: float
    r: float
    class_: str
    tale: Tale = ()


@dataclass(frozen=True)
class Path:
    """Straight from point to point."""

    points: Sequence[tuple[float, float]]
    class_: str
    closed: bool = False


@dataclass(frozen=True)
class Text:
    """`y` is where letters stand, `anchor` (start, middle, end) what of the text is at `x`, `angle` turns clockwise."""

    text: str
    x: float
    y: float
    anchor: str | None = None
    class_: str | None = None
    angle: float = 0


@dataclass(frozen=True)
class Runs:
    """Many square cells: for each class, (line, first column, column after the last) of neighbours side by side."""

    x: float
    y: float
    size: float  # of a cell
    runs: Mapping[str, Sequence[tuple[int, int, int]]]


@dataclass(frozen=True)
class Group:
    """Marks that share a tale."""

    marks: Sequence[Mark]
    tale: Tale
    class_: str | None = None


Mark = Line | Rect | Circle | Path | Text | Runs | Group


@dataclass(frozen=True)
class Drawing:
    width: float
    height: float
    name: str  # for those who do not see it
    marks: Sequence[Mark]
    shrinks: float = 0.85  # as far as this on a narrow page
