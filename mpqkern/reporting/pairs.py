"""What pairs of layers cost together beyond what each costs alone: a triangle of signed colours."""

from __future__ import annotations

import math

import numpy as np

from ..scores.table import widest_first
from .axes import GLYPH, drawing, label, shortened
from .colors import NONE, SIGNS, sign_class
from .given import Given, text
from .markup import details, el, hover, number, paragraph, table

TITLE = "Pairs of layers"
HOVERED = 48  # layers up to which every cell can be pointed at
LEFT, TOP = 8, 8  # pixels
STRONGEST = 12  # pairs in the table
MARKED = 100  # of the pairs of more layers, so many can be pointed at


def section(given: Given) -> str | None:
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
    names = scores.names
    i, j = np.tril_indices(len(at), -1)
    strong = np.argsort(-np.abs(costs[i, j]), kind="stable")
    order = [(int(i[k]), int(j[k])) for k in strong if costs[i[k], j[k]]]
    rows = [
        (names[b], text(used[b]), names[a], text(used[a]), number(float(costs[a, b]))) for a, b in order[:STRONGEST]
    ]
    which = "the chosen schemes" if known else f"all layers at {text(narrowest)}"
    note = f"Pairs under {which}: red, their errors add up to more than each alone; blue, they cancel in part."
    total = f"Together, all pairs cost {number(float(costs.sum() / 2))}."
    return (
        paragraph(note, total)
        + _triangle(names, costs, order)
        + details("The strongest pairs", table(("layer", "scheme", "and", "scheme", "cost"), rows, left=(0, 1, 2, 3)))
    )


def _triangle(names: list[str], costs: np.ndarray, order: list[tuple[int, int]]) -> str:
    n, top = len(names), float(np.abs(costs).max())
    size = max(2, min(26, 720 // n))
    every = math.ceil(13 / size)  # names stand on the diagonal, for the cells to their left and below
    shares = np.sign(costs) * np.sqrt(np.abs(costs) / top) if top else np.zeros_like(costs)
    marks = []
    if n > HOVERED:
        runs = _runs(np.rint(shares * NONE).astype(int))
        marks.append(el("g", runs, transform=f"translate({LEFT} {TOP + size / 2}) scale({size})", class_="runs"))
    for a, b in order[:MARKED] if n > HOVERED else np.argwhere(np.tri(n, k=-1)).tolist():
        color = sign_class(float(shares[a, b])) if n <= HOVERED else "hit"
        title = hover(f"{names[b]} and {names[a]}: {number(float(costs[a, b]))}")
        marks.append(el("rect", title, x=LEFT + b * size, y=TOP + a * size, width=size, height=size, class_=color))
    outline = f"M{LEFT} {TOP + size}" + f"h{size}v{size}" * (n - 1) + f"H{LEFT}z"
    marks.append(el("path", d=outline, class_="outline"))
    start = LEFT + (5 if size > 12 else 12)
    shown = dict(list(enumerate(shortened(names)))[::every])
    marks += [label(name, start + a * size, TOP + (a + 0.5) * size + 4) for a, name in shown.items()]
    right = max(start + a * size + len(name) * GLYPH for a, name in shown.items())
    bottom = TOP + n * size
    marks.append(_key(LEFT, bottom + 14, top))
    return drawing(max(right, LEFT + 14 * SIGNS) + 16, bottom + 46, "What pairs of layers cost together", *marks)


def _runs(levels: np.ndarray) -> str:
    """One path for each colour, in cells: neighbours of one colour are one stroke; what is next to nothing is left.

    Moves are relative within a line, which halves the text.
    """
    strokes: dict[int, list[str]] = {}
    for a in range(1, len(levels)):
        line, ends = levels[a, :a], {}
        cuts = np.flatnonzero(np.diff(line)) + 1
        for start, end in zip([0, *cuts.tolist()], [*cuts.tolist(), a], strict=True):
            if level := int(line[start]):
                move = f"m{start - ends[level]} 0" if level in ends else f"M{start} {a}"
                strokes.setdefault(level, []).append(f"{move}h{end - start}")
                ends[level] = end
    return "".join(el("path", d="".join(d), class_=f"d{NONE + level}") for level, d in sorted(strokes.items()))


def _key(x: float, y: float, top: float) -> str:
    """Colours of -top, -top/4, 0, top/4 and top: shares are drawn by their square root."""
    cells = [
        el("rect", x=x + 14 * i, y=y, width=14, height=12, class_=sign_class((i - NONE) / NONE)) for i in range(SIGNS)
    ]
    ends = [(0, -top, "start"), (NONE, 0.0, "middle"), (SIGNS - 1, top, "end")]
    texts = [label(number(v), x + 14 * i + {"start": 0, "middle": 7, "end": 14}[a], y + 27, a) for i, v, a in ends]
    return "".join(cells) + "".join(texts)
