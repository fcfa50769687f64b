"""Methods under the same budgets: a dot for each in a panel for each budget, and the table of all figures."""

from __future__ import annotations

import math

from ..compare import CONTROLS, Comparison, Outcome
from .axes import GLYPH, Axis, Room, posts, shortened
from .given import Given
from .marks import Circle, Drawing, Group, Line, Mark, Rect, Text
from .markup import details, el, number, paragraph, table
from .svg import markup

TITLE = "Methods compared"
HIGH, TOP, WIDE = 20, 30, 340  # pixels: of a method's line, above, and of a panel


def section(given: Given) -> str | None:
    found = given.comparison
    if found is None or not found.outcomes:
        return None
    panels = [markup(panel) for panel in _panels(found)]
    note = f"{found.metric} on held-out data, lower is better; the line is the float model's. Best methods on top."
    return paragraph(note) + el("div", *panels, "", class_="panels") + _table(found)


def drawings(given: Given, room: Room) -> list[Drawing]:
    """One for each budget; as many side by side as the room has place for."""
    return _panels(given.comparison) if given.comparison is not None else []


def _panels(found: Comparison) -> list[Drawing]:
    values = [o.metrics[found.metric] for o in found.outcomes] + [found.metrics[found.metric]]
    finite = [v for v in values if math.isfinite(v)]
    order = _order(found)
    return [_panel(found, budget, order, finite) for budget in _budgets(found)] if finite else []


def _budgets(found: Comparison) -> list[str]:
    return list(dict.fromkeys(o.budget for o in found.outcomes))


def _order(found: Comparison) -> list[str]:
    """Methods by their mean rank over the budgets."""
    ranks: dict[str, list[int]] = {}
    for budget in _budgets(found):
        outcomes = [o for o in found.outcomes if o.budget == budget]
        for o in outcomes:
            rank = sum(p.metrics[found.metric] < o.metrics[found.metric] for p in outcomes)
            ranks.setdefault(o.method, []).append(rank)
    return sorted(ranks, key=lambda method: sum(ranks[method]) / len(ranks[method]))


def _panel(found: Comparison, budget: str, order: list[str], values: list[float]) -> Drawing:
    names = dict(zip(order, shortened(order, 16), strict=True))
    left = 16 + max(map(len, names.values())) * GLYPH
    bottom = TOP + HIGH * len(order)
    x = Axis.over(values, left, WIDE - 14)
    base = found.metrics[found.metric]
    marks: list[Mark] = [Text(_short(budget), 4, 14, None, "strong"), Text(found.metric, WIDE - 14, 14, "end")]
    marks += posts(x, TOP, bottom, most=4)
    if math.isfinite(base):
        line = Line(x(base), TOP, x(base), bottom, "float")
        marks.append(Group([line], [f"float: {number(base)}"]))
    outcomes = {o.method: o for o in found.outcomes if o.budget == budget}
    for k, method in enumerate(order):
        y = TOP + (k + 0.5) * HIGH
        marks.append(Text(names[method], left - 8, y + 4, "end"))
        if method in outcomes and math.isfinite(value := outcomes[method].metrics[found.metric]):
            marks.append(Line(left, y, x(value), y, "grid"))
            hit = Rect(left, y - HIGH / 2, WIDE - left, HIGH, "hit")
            dot = Circle(x(value), y, 4.5, "point open" if method in CONTROLS else "point")
            marks.append(Group([hit, dot], _tale(outcomes[method]), "column"))
    return Drawing(WIDE, bottom + 26, f"{found.metric} of each method, {budget}", marks, shrinks=1.0)


def _tale(o: Outcome) -> list[str]:
    metrics = [f"{name} {number(value)}" for name, value in o.metrics.items()]
    return [f"{o.method}, {o.budget}", *metrics, f"{o.bytes:,.0f} bytes", f"{number(o.seconds)} s"]


def _table(found: Comparison) -> str:
    others = [name for name in found.metrics if name != found.metric]
    head = ("budget", "method", "bytes", found.metric, *others, "seconds", "tau", *(f"beats {c}" for c in CONTROLS))
    rows = [("", "float", "", *(number(found.metrics[n]) for n in (found.metric, *others)), *[""] * 4)]
    for budget in _budgets(found):
        for o in sorted((o for o in found.outcomes if o.budget == budget), key=lambda o: o.metrics[found.metric]):
            shares = [found.wins(o.method, control) for control in CONTROLS]
            tau = found.tau.get(o.method)
            rows.append(
                (
                    _short(budget),
                    o.method,
                    f"{o.bytes:,.0f}",
                    *(number(o.metrics[n]) for n in (found.metric, *others)),
                    f"{o.seconds:.2f}",
                    "" if tau is None else f"{tau:.2f}",
                    *("" if s is None else f"{s:.0%}" for s in shares),
                )
            )
    note = "tau: Kendall's rank correlation of a method's scores with the damage each layer does alone."
    return details("All figures", table(head, rows, left=(0, 1)), paragraph(note))


def _short(budget: str) -> str:
    """`Budget(avg_bits=4)` without what goes without saying."""
    return budget.removeprefix("Budget(").removesuffix(")") if budget.startswith("Budget(") else budget
