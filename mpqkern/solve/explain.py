"""Why nothing fits: what each budget needs at least, and a smallest set of demands that clash."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..scores.table import Scores
from .budget import Budget
from .clock import Clock
from .constraints import Constraints
from .linear import any_fit
from .problem import Problem, make_problem


class Infeasible(ValueError):
    """No assignment fits.

    `least` is what each budget needs at least, alone, under the pins and ties (None: these clash already);
    `conflict` is a set of demands that cannot hold together while any of them without the others can; with a
    time_limit it may hold more than that.
    """

    def __init__(self, message: str, least: dict[str, float | None], conflict: list[str]) -> None:
        super().__init__(message)
        self.least = least
        self.conflict = conflict


def fits(problem: Problem, time_limit: float | None) -> bool:
    try:
        return any_fit(problem.rows, problem.caps, problem.allowed, time_limit=time_limit) is not None
    except TimeoutError:  # not known to be infeasible
        return True


def explain(
    scores: Scores, budgets: Sequence[Budget], constraints: Constraints, time_limit: float | None = None
) -> Infeasible:
    """The error to raise for demands known to be infeasible, found by leaving out one demand after another."""
    clock = Clock(time_limit)
    problem = make_problem(scores, budgets, constraints)
    able = bool(problem.allowed.any(axis=1).all())
    least: dict[str, float | None] = {}
    texts = []
    for k, row in enumerate(problem.labels):
        least[row.label] = row.amount(int(problem.least()[k])) if able else None
        if able and k < len(budgets):
            need, unit = least[row.label], f" {row.unit}" if row.unit else ""
            texts.append(f"{row.label}={short(budgets[k].value)} (alone it needs at least {short(need)}{unit})")
    parts: list[tuple[str, Any]] = [("budget", k) for k in range(len(budgets))] + constraints.parts()
    for part in list(parts):
        rest = [p for p in parts if p != part]
        kept = [budgets[k] for kind, k in rest if kind == "budget"]
        if not fits(make_problem(scores, kept, constraints.keep(rest)), clock.left()):
            parts = rest
    conflict = [repr(budgets[key]) if kind == "budget" else constraints.text((kind, key)) for kind, key in parts]
    message = "no assignment fits"
    if texts:
        message += " " + ", ".join(texts)
    message += f"; these clash: {', '.join(conflict)}; wanted one of them looser"
    return Infeasible(message, least, conflict)


def short(value: float | None) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
