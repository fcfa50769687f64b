"""What pairs of layers cost together beyond what each costs alone: a triangle of signed colours."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..scheme import Scheme
from ..scores.table import widest_first
from .axes import GLYPH, Room, shortened, signs
from .colors import NONE, SIGNS, sign_class
from .given import Given, text
from .marks import Drawing, Mark, Path, Rect, Runs, Text
from .markup import details, number, paragraph, table
from .svg import markup

TITLE = "Pairs of layers"
HOVERED = 48  # layers up to which every cell can be pointed at
LEFT, TOP = 8, 8  # pixels
STRONGEST = 12  # pairs in the table
MARKED = 100  # of the pairs of more layers, so many can be pointed at


@dataclass(frozen=True)
class Pairs:
    names: list[str]
    used: list[Scheme | None]  # the scheme of each layer that pairs are about
    chosen: bool  # whether those are the chosen ones
    costs: np.ndarray  # [layers, layers]
    order: list[tuple[int, int]]  # of the pairs that cost anything, strongest first; the later layer comes first


def section(given: Given) -> str | None:
    found = _pairs(given)
    if found is None:
        return None
    names, used, costs = found.names, found.used, found.costs
    rows = [
        (names[b], text(used[b]), names[a], text(used[a]), number(float(costs[a, b])))
        for a, b in found.order[:STRONGEST]
    ]
    which = "the chosen schemes" if found.chosen else f"all layers at {text(used[0])}"
    note = f"Pairs under {which}: red, their errors add up to more than each alone; blue, they cancel in part."
    total = f"Together, all pairs cost {number(float(costs.sum() / 2))}."
    return (
        paragraph(note, total)
        + markup(_triangle(found))
        + details("The strongest pairs", table(("layer", "scheme", "and", "scheme", "cost"), rows, left=(0, 1, 2, 3)))
    )


def drawings(given: Given, room: Room) -> list[Drawing]:
    """One, as large as its cells make it."""
    found = _pairs(given)
    return [] if found is None else [_triangle(found)]


def _pairs(given: Given) -> Pairs | None:
    scores = given.scores
    if scores is None or scores.pairwise is None or len(scores.layers) < 2:
        return None
    facts = {fact.name: fact for fact in given.facts}
    schemes = [facts[n].scheme if facts[n].chosen else "" for n in scores.names]  # "": unknown, and no scheme
    known = all(s in scores.schemes for s in schemes)
    narrowest = scores.schemes[widest_first(scores.schemes)[-1]]
    used = schemes if known else [narrowest] * len(schemes)
    at = np.array([scores.schemes.index(s) for s in used])
    layers = np.arange(len(at))
    costs = scores.pairwise[layers, at][:, layers, at]
    i, j = np.tril_indices(len(at), -1)
    strong = np.argsort(-np.abs(costs[i, j]), kind="stable")
    order = [(int(i[k]), int(j[k])) for k in strong if costs[i[k], j[k]]]
    return Pairs(scores.names, used, known, costs, order)


def _triangle(found: Pairs) -> Drawing:
    names, costs = found.names, found.costs
    n, top = len(names), float(np.abs(costs).max())
    size = max(2, min(26, 720 // n))
    every = math.ceil(13 / size)  # names stand on the diagonal, for the cells to their left and below
    shares = np.sign(costs) * np.sqrt(np.abs(costs) / top) if top else np.zeros_like(costs)
    marks: list[Mark] = []
    if n > HOVERED:
        marks.append(Runs(LEFT, TOP, size, _runs(np.rint(shares * NONE).astype(int))))
    for a, b in found.order[:MARKED] if n > HOVERED else np.argwhere(np.tri(n, k=-1)).tolist():
        color = sign_class(float(shares[a, b])) if n <= HOVERED else "hit"
        tale = f"{names[b]} and {names[a]}: {number(float(costs[a, b]))}"
        marks.append(Rect(LEFT + b * size, TOP + a * size, size, size, color, (tale,)))
    stairs = [(LEFT + (i + j) * size, TOP + (i + 1) * size) for i in range(n) for j in (0, 1)]
    marks.append(Path([*stairs[:-1], (LEFT, TOP + n * size)], "outline", closed=True))
    start = LEFT + (5 if size > 12 else 12)
    shown = dict(list(enumerate(shortened(names)))[::every])
    marks += [Text(name, start + a * size, TOP + (a + 0.5) * size + 4) for a, name in shown.items()]
    right = max(start + a * size + len(name) * GLYPH for a, name in shown.items())
    bottom = TOP + n * size
    # shares are drawn by their square root: half of the way to the end is a quarter of top
    marks += signs(LEFT, bottom + 14, (number(-top), number(0.0), number(top)))
    return Drawing(max(right, LEFT + 14 * SIGNS) + 16, bottom + 46, "What pairs of layers cost together", marks)


def _runs(levels: np.ndarray) -> dict[str, list[tuple[int, int, int]]]:
    """Neighbours of one colour, a run each; what is next to nothing is left."""
    found: dict[int, list[tuple[int, int, int]]] = {}
    for a in range(1, len(levels)):
        line = levels[a, :a]
        cuts = (np.flatnonzero(np.diff(line)) + 1).tolist()
        for start, end in zip([0, *cuts], [*cuts, a], strict=True):
            if level := int(line[start]):
                found.setdefault(level, []).append((a, start, end))
    return {f"d{NONE + level}": found[level] for level in sorted(found)}
