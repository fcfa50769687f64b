"""The frontier: the least cost for every budget of one kind, each point with its certificate."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..scheme import Scheme
from ..scores.table import Scores
from . import hull
from .assignment import Assignment
from .budget import MAX_SUM, Budget, Row, is_finite, make_row
from .constraints import Choice, Constraints
from .entry import make_assignment, naming, solve
from .explain import Infeasible, explain, short
from .linear import any_fit
from .problem import Problem, make_problem

FORMAT, VERSION = "mpqkern-frontier", 1


@dataclass(frozen=True, eq=False)
class Frontier:
    """Points by rising use: no assignment spends at most `use[i]` and costs less than `bound[i]`.

    `front[i]` is the `Assignment` of a point, `front.knee` the index of the one farthest below the line
    between the ends: a proposal where more budget stops to pay. `status` is "complete", or "interrupted" where
    Ctrl-C has left the higher limits out.
    """

    kind: str
    use: list[float]  # in the budget's unit
    objective: list[float]
    bound: list[float]
    problem: Problem | None = field(repr=False)  # None: it was read from a file
    choices: np.ndarray = field(repr=False)  # [points, units]
    states: list[str] = field(repr=False)
    prices: list[list[float] | None] = field(repr=False)  # of the problem's rows, as `solve` found them
    status: str = "complete"
    answers: list[Assignment] | None = field(default=None, repr=False)  # as they were read, and
    table: dict[str, dict[Scheme | None, float]] | None = field(default=None, repr=False)  # what choices spend

    def __len__(self) -> int:
        return len(self.use)

    def __getitem__(self, i: int | slice) -> Assignment | list[Assignment]:
        if isinstance(i, slice):
            return [self[k] for k in range(len(self))[i]]
        if self.answers is not None:
            return self.answers[i]
        return make_assignment(
            self.problem,
            self.choices[i],
            self.bound[i],
            self.states[i],
            self.prices[i],
            time.perf_counter(),
            value=self.objective[i],  # by what was minimised: with psd or "minimax" not the sum of the scores
        )

    def __iter__(self) -> Iterator[Assignment]:
        return (self[i] for i in range(len(self)))

    @property
    def spends(self) -> dict[str, dict[Scheme | None, float]]:
        """What each scheme spends in each layer, in the budget's unit."""
        if self.table is not None:
            return self.table
        scores, row = self.problem.scores, self.problem.labels[0]
        amounts = [[row.amount(int(v)) for v in line] for line in row.values]
        return {
            name: dict(zip(scores.schemes, line, strict=True)) for name, line in zip(scores.names, amounts, strict=True)
        }

    def use_of(self, schemes: Mapping[str, Scheme | None]) -> float | None:
        """What an assignment would spend; None where it is of other layers or schemes."""
        spends = self.spends
        if set(schemes) != set(spends) or any(s not in spends[name] for name, s in schemes.items()):
            return None
        return float(sum(spends[name][s] for name, s in schemes.items()))

    @property
    def knee(self) -> int:
        """Where use and objective, both as shares of their range, are farthest below the chord (Kneedle)."""
        use, value = np.array(self.use), np.array(self.objective)
        wide, high = np.ptp(use), np.ptp(value)
        if len(use) < 3 or wide == 0 or high == 0:
            return 0
        return int(((value.max() - value) / high - (use - use.min()) / wide).argmax())

    def to_json(self) -> str:
        """One JSON object, a point a line; `choice` has each layer's scheme as a place in the list of schemes."""
        answers, spends = list(self), self.spends
        layers = list(spends)
        schemes = list(spends[layers[0]])
        points = [
            {
                "use": self.use[i],
                "objective": answer.objective,
                "bound": self.bound[i] if math.isfinite(self.bound[i]) else None,
                "status": answer.status,
                "costs": dict(answer.costs),
                "prices": {name: price for name, price in answer.prices.items() if math.isfinite(price)},
                "choice": [schemes.index(answer.schemes[name]) for name in layers],
            }
            for i, answer in enumerate(answers)
        ]
        head = {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "status": self.status,
            "knee": self.knee,
            "layers": layers,
            "schemes": [None if s is None else s.to_dict() for s in schemes],
            "spends": [list(spends[name].values()) for name in layers],
        }
        top = "".join(f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items())
        return f'{{\n{top}  "points": [\n' + ",\n".join(f"    {json.dumps(p)}" for p in points) + "\n  ]\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Frontier:
        """What `to_json` wrote; its answers have no scores to `explain` them by."""
        try:
            values = json.loads(text)
            known = values["format"], values["version"]
            status = values["status"]
            points = values["points"]
            schemes = [None if s is None else Scheme.from_dict(s) for s in values["schemes"]]
            answers = [
                Assignment(
                    {name: schemes[b] for name, b in zip(values["layers"], p["choice"], strict=True)},
                    **{key: p[key] for key in ("objective", "bound", "status", "costs", "prices")},
                )
                for p in points
            ]
            bounds = [-math.inf if p["bound"] is None else p["bound"] for p in points]
            lists = [p["use"] for p in points], [p["objective"] for p in points], bounds
            choices = np.array([p["choice"] for p in points])
            rows = [dict(zip(schemes, line, strict=True)) for line in values["spends"]]
            spends = dict(zip(values["layers"], rows, strict=True))
        except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
            raise ValueError(f"text={text[:40]!r}... is no frontier ({error}); wanted what to_json wrote") from None
        if known != (FORMAT, VERSION):
            raise ValueError(f"text is {known[0]!r} version {known[1]!r}; wanted {FORMAT!r} version {VERSION}")
        states = [p["status"] for p in points]
        return cls(values["kind"], *lists, None, choices, states, [None] * len(points), status, answers, spends)


def frontier(
    scores: Scores,
    kind: str = "bytes",
    *,
    count: str | None = None,
    table: Any = None,
    rows: Any = None,
    at: Sequence[float] | None = None,
    points: int = 16,
    pins: Mapping[str, Choice] | None = None,
    forbid: Mapping[str, Choice | Sequence[Choice]] | None = None,
    ties: Sequence[Sequence[str]] | None = None,
    at_most: Mapping[Choice, int] | None = None,
    first_last: Choice = None,
    **options: Any,
) -> Frontier:
    """Least cost against one budget, given by its `kind` ("bytes", "avg_bits", "ms", ...).

    Without `at`, all supported points from one sweep over the convex hulls: each is exactly optimal for what it
    spends. `at` asks for limits of your own, each solved exactly, so points between the supported ones come
    out too; one that nothing fits is an `Infeasible` error that names it. Pairwise scores, `at_most`,
    objective="minimax" and a relaxation have no such sweep: there, `points` limits are spread evenly. More
    options go to `solve` for each limit (so time_limit is for one); the sweep has no use for any. Limits are
    solved from the least up; Ctrl-C ends that, and the points until then are the answer.

    >>> from mpqkern import Layer
    >>> layers = [Layer("stem", "conv2d", (8, 3, 3, 3), 216), Layer("head", "linear", (10, 8), 80)]
    >>> scores = Scores(layers, [2, 4, 8], [[0.9, 0.2, 0.0], [0.5, 0.1, 0.0]])
    >>> frontier(scores, "bytes", count="nominal").use
    [74.0, 94.0, 148.0, 188.0, 296.0]
    """
    _check(kind, table, rows, at, points)
    constraints = Constraints(pins or {}, forbid or {}, ties or (), at_most or {}, first_last)
    row = make_row(kind, scores.layers, scores.schemes, count=count, source=table if kind == "ms" else rows)
    top = Budget(limit=int(row.values.max(axis=1).sum()), rows=row.values, name=kind)
    problem = make_problem(scores, [top], constraints)
    time_limit = options.get("time_limit")
    with naming(time_limit):
        if any_fit(problem.rows, problem.caps, problem.allowed, time_limit=time_limit) is None:
            raise explain(scores, [], constraints, time_limit)
    problem = _counted(problem, row)
    plain = options.get("objective", "sum") == "sum" and options.get("relaxation") is None
    if at is None and problem.pairwise is None and not at_most and plain:
        for name in options.keys() - {"objective", "relaxation"}:
            raise ValueError(f"{name}={options[name]!r} is for searches, and this frontier needs none; wanted at=")
        choices = _sweep(problem)
        values = [float(problem.unary[np.arange(len(c)), c].sum()) for c in choices]
        uses = [float(row.amount(int(problem.use(c)[0]))) for c in choices]
        count = len(choices)
        states = ["optimal"] * count
        return Frontier(kind, uses, values, list(values), problem, np.array(choices), states, [None] * count)
    limits = _spread(problem, points) if at is None else sorted({_within(row.total(v)) for v in at})
    demands = {"pins": pins, "forbid": forbid, "ties": ties, "at_most": at_most, "first_last": first_last}
    found: list[Assignment] = []
    status = "complete"
    for limit in limits:
        last = found[-1].costs[kind] if found else None
        if last == limit and found[-1].status == "optimal":
            continue  # the last answer spends exactly this
        budget = Budget(limit=limit, rows=row.values, name=kind)
        try:
            answer = solve(scores, budget, **demands, **options)
        except Infeasible as error:
            if at is None:
                continue  # less than `at_most` lets anything spend
            raise _unmet(error, budget, row) from None
        except KeyboardInterrupt:
            if not found:
                raise
            status = "interrupted"
            break
        if answer.costs[kind] != last:
            found.append(answer)
        if answer.status == "interrupted":
            status = "interrupted"
            break
    index = [group[0] for group in problem.groups]
    picks = [[scores.schemes.index(s) for s in a.schemes.values()] for a in found]
    uses = [float(row.amount(int(a.costs[kind]))) for a in found]
    return Frontier(
        kind,
        uses,
        [a.objective for a in found],
        [a.bound for a in found],
        problem,
        np.array(picks)[:, index],
        [a.status for a in found],
        [list(a.prices.values()) or None for a in found],
        status,
    )


def _check(kind: str, table: Any, rows: Any, at: Any, points: Any) -> None:
    for argument, value, owner in (("table", table, "ms"), ("rows", rows, "limit")):
        if (value is None) == (kind == owner):
            wanted = f"{argument}= beside it" if kind == owner else f"kind={owner!r} with {argument}="
            raise ValueError(f"kind={kind!r}; wanted {wanted}")
    if at is not None:
        many = isinstance(at, (Sequence, np.ndarray)) and not isinstance(at, str) and np.ndim(at) == 1
        if not many or len(at) == 0 or not all(map(is_finite, at)):
            raise ValueError(f"at={at!r}; wanted a list of one or more finite limits")
    if not isinstance(points, (int, np.integer)) or isinstance(points, bool) or points < 1:
        raise ValueError(f"points={points!r}; wanted a whole number, 1 or more")


def _within(total: int) -> int:
    """No row adds up to more, or to less."""
    return min(max(total, -MAX_SUM), MAX_SUM)


def _unmet(error: Infeasible, budget: Budget, row: Row) -> Infeasible:
    """The same error in the units of the frontier, whose single limits are whole numbers."""
    limit, need = (row.amount(int(total)) for total in (budget.limit, error.least[budget.name]))
    shown = f"{budget.name}={short(limit)}"
    conflict = [shown if part == repr(budget) else part for part in error.conflict]
    unit = f" {row.unit}" if row.unit else ""
    message = f"no assignment fits {shown} (alone it needs at least {short(need)}{unit})"
    message += f"; these clash: {', '.join(conflict)}; wanted other limits in at="
    return Infeasible(message, {**error.least, budget.name: need}, conflict)


def _sweep(problem: Problem) -> list[np.ndarray]:
    choice, steps = hull.hull_steps(problem.unary, problem.rows[0], problem.allowed)
    choices = [choice.copy()]
    for step in steps:
        choice[step.unit] = step.after
        choices.append(choice.copy())
    return choices


def _spread(problem: Problem, points: int) -> list[int]:
    low = int(problem.least()[0])
    high = int(np.where(problem.allowed, problem.rows[0], -1).max(axis=1).sum())
    return sorted({low + (high - low) * i // max(points - 1, 1) for i in range(points)})


def _counted(problem: Problem, row: Row) -> Problem:
    """The same problem with its first row counted in the budget's unit and without a limit of its own."""
    labels = [Row(row.label, row.values, None, row.per, row.unit), *problem.labels[1:]]
    fields = {**vars(problem), "labels": labels}
    return Problem(**fields)
