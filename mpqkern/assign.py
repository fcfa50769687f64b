"""assign: a model, some batches and budgets in, an assignment out: scored and solved, searched for, or a control."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from .numbers import check_number
from .scores import greedy
from .scores.entry import method_of, score
from .scores.run import Run
from .scores.table import Scores, widest_first
from .scores.trajectory import Trajectory
from .solve import Assignment, Budget, solve
from .solve.constraints import Choice, Constraints
from .solve.entry import make_assignment
from .solve.linear import any_fit
from .solve.problem import Problem, make_problem

FRAME = [name for name in inspect.signature(score).parameters if name not in ("model", "batches", "method", "options")]
SEARCH = ("mode", "metric", "per_bit", "lazy", "refresh", "drop")  # options of greedy.search


@dataclass(frozen=True)
class _Demand:
    """What is asked for: a model measured on batches, and what an answer has to respect."""

    model: nn.Module
    batches: Any
    budgets: Sequence[Budget]
    constraints: Mapping[str, Any]
    sizes: Scores  # the layers and schemes, with costs that mean nothing

    def problem(self, scores: Scores) -> Problem:
        given = {name: value for name, value in self.constraints.items() if value is not None}
        return make_problem(scores, self.budgets, Constraints(**given))

    def solve(self, scores: Scores, **solver: Any) -> Assignment:
        return solve(scores, *self.budgets, **self.constraints, **solver)


def assign(
    model: nn.Module,
    batches: Any,
    *budgets: Budget,
    method: str | Callable[..., Any] = "clado",
    pins: Mapping[str, Choice] | None = None,
    forbid: Mapping[str, Choice | Sequence[Choice]] | None = None,
    ties: Sequence[Sequence[str]] | None = None,
    at_most: Mapping[Choice, int] | None = None,
    first_last: Choice = None,
    scores: Scores | None = None,
    solver: Mapping[str, Any] | None = None,
    **options: Any,
) -> Assignment:
    """The schemes for a model's layers that fit all budgets, by one of `methods()`.

    Most methods are `score` and then `solve`: `options` go to the first, `solver` to the second. The others:

    greedy    the search of `mpqkern.scores.greedy` (its options: mode, metric, per_bit, lazy, refresh, drop),
              followed until all budgets hold; without any, as far as `drop` allows. The objective is the damage
              measured at its end, the mean of its metric (for accuracy, the share of wrong answers); `path` has
              all the steps. Joint searches, and what is narrower, go by the share of the budgets that is saved
    uniform   the widest scheme that all layers can have; a layer that may not have it takes the next narrower
              one that it may have, or else the next wider
    random    the least cost for random costs: a scheme costs more than the next wider one by independent
              exponential steps (`seed` decides), so that answers spend the budget as those of a method do
    reversed  the scores of the method `of`, with the rows of the most and the least sensitive layer exchanged, of
              the second most and second least, and so on; the objective is by the true scores

    Demands that nothing can meet raise `Infeasible` before anything is measured. With `scores`, of the same layers
    and schemes, the answer is judged by these: objective, and a bound that `solve` proves.

    >>> from mpqkern import Budget
    >>> model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> assign(model, Tensor(4, 32), Budget(avg_bits=4), method="uniform").bits
    {'0': 4, '2': 4}
    """
    constraints = {"pins": pins, "forbid": forbid, "ties": ties, "at_most": at_most, "first_last": first_last}
    if not isinstance(batches, (Tensor, tuple, list, Mapping)):
        batches = list(batches)  # it is read more than once
    frame = {name: options[name] for name in ("bits", "layers", "forward", "loss") if name in options}
    sizes = score(model, batches, method="size", **frame)
    demand = _Demand(model, batches, budgets, constraints, sizes)
    demand.solve(sizes)  # says at once if nothing fits
    if isinstance(method, str) and method in SEARCHES:
        check_options(method, options)
        search, _ = SEARCHES[method]
        answer = search(demand, options, dict(solver or {}))
    else:
        answer = demand.solve(score(model, batches, method=method, **options), **(solver or {}))
    return answer if scores is None else _judged(answer, scores, demand, dict(solver or {}))


# ---- searches and controls: (demand, options, options of solve) -> Assignment ------------------------------


def _greedy(demand: _Demand, options: dict[str, Any], solver: dict[str, Any]) -> Assignment:
    start, found = time.perf_counter(), {}
    own = {name: options[name] for name in SEARCH if name in options}

    def greedy_(run: Run) -> Scores:
        found["path"] = greedy.search(run, _rules(demand, run, own.get("drop") is None), **own)
        return demand.sizes

    # The name picks the folder of the bank, and what is measured depends on no option: all searches share it.
    greedy_.__name__ = "greedy"
    frame = {name: value for name, value in options.items() if name not in SEARCH}
    score(demand.model, demand.batches, method=greedy_, **frame)
    path: Trajectory = found["path"]
    problem = demand.problem(demand.sizes)
    choice = np.array(path[-1].choice)[[group[0] for group in problem.groups]]
    if (problem.use(choice) > problem.caps).any():
        raise ValueError(f"drop={own['drop']!r} was passed before the budgets held; wanted a larger drop or budget")
    return replace(_heuristic(problem, choice, start), objective=path[-1].value, path=path)


def _rules(demand: _Demand, run: Run, stop: bool) -> greedy.Rules:
    """The budgets as a search sees them; `stop` ends it at once where there are none."""
    problem = demand.problem(demand.sizes)
    rows, caps, count = problem.rows, problem.caps, len(demand.budgets)
    if count:
        sizes = np.tensordot([1 / max(abs(int(cap)), 1) for cap in caps[:count]], rows[:count].astype(np.float64), 1)
    else:
        layers = greedy.weight_bytes(run)
        sizes = np.array([layers[group].sum(axis=0) for group in problem.groups])

    def within(reach: np.ndarray) -> bool:
        narrowest = np.where(reach, sizes, np.inf).argmin(axis=1)
        return bool((problem.use(narrowest) <= caps).all()) or any_fit(rows, caps, reach) is not None

    def until(choice: np.ndarray) -> bool:
        return bool((problem.use(choice) <= caps).all()) and (stop or len(rows) > 0)

    order = widest_first(run.schemes)
    return greedy.Rules(problem.groups, order, sizes, problem.allowed, within, until)


def _uniform(demand: _Demand, options: dict[str, Any], solver: dict[str, Any]) -> Assignment:
    start, problem = time.perf_counter(), demand.problem(demand.sizes)
    order = widest_first(demand.sizes.schemes)
    for i, scheme in enumerate(order):
        nearest = [scheme, *order[i + 1 :], *reversed(order[:i])]
        choice = [next(b for b in nearest if able[b]) for able in problem.allowed]
        if (problem.use(choice) <= problem.caps).all():
            return _heuristic(problem, choice, start)
    raise ValueError("no single scheme fits, though a mixture does; wanted another method or other limits")


def _random(demand: _Demand, options: dict[str, Any], solver: dict[str, Any]) -> Assignment:
    start, sizes, seed = time.perf_counter(), demand.sizes, options.get("seed", 0)
    check_number("seed", seed, "a whole number of 0 or more", lambda v: v >= 0, whole=True)
    costs = np.empty(sizes.unary.shape)
    costs[:, widest_first(sizes.schemes)] = np.random.default_rng(seed).exponential(size=costs.shape).cumsum(1)
    answer = demand.solve(Scores(sizes.layers, sizes.schemes, costs))
    problem, choice = demand.problem(sizes), _choice(answer, sizes)
    return _heuristic(problem, choice[[group[0] for group in problem.groups]], start)


def _reversed(demand: _Demand, options: dict[str, Any], solver: dict[str, Any]) -> Assignment:
    own = {name: value for name, value in options.items() if name != "of"}
    true = score(demand.model, demand.batches, method=options.get("of", "clado"), **own)
    rank = np.argsort(np.ptp(true.unary, axis=1), kind="stable")
    other = np.empty_like(rank)
    other[rank] = rank[::-1]
    pairwise = None if true.pairwise is None else true.pairwise[other][:, :, other]
    answer = demand.solve(Scores(true.layers, true.schemes, true.unary[other], pairwise), **solver)
    return _judged(answer, true, demand, solver)


SEARCHES: dict[str, tuple[Callable[..., Assignment], tuple[str, ...] | None]] = {  # with their options; None: any
    "greedy": (_greedy, SEARCH),
    "uniform": (_uniform, ()),
    "random": (_random, ()),
    "reversed": (_reversed, None),
}


def check_options(method: str | Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise for an option that the method does not have, before anything is measured."""
    if callable(method) or method not in SEARCHES:
        method_of(method).check({name: value for name, value in options.items() if name not in FRAME})
        return
    _, own = SEARCHES[method]
    for name in options if own is not None else ():
        if name not in FRAME and name not in own:
            wanted = ", ".join([*own, *FRAME])
            raise TypeError(f"{name}={options[name]!r} is no option of method {method!r}; wanted one of {wanted}")


def _heuristic(problem: Problem, choice: Sequence[int], start: float) -> Assignment:
    """Counted and checked, but without a claim."""
    made = make_assignment(problem, choice, 0.0, "heuristic", None, start)
    return replace(made, objective=None, bound=None, _problem=None)


def _judged(answer: Assignment, scores: Scores, demand: _Demand, solver: dict[str, Any]) -> Assignment:
    """The same schemes, with their cost by `scores` and the bound that `solve` proves for these."""
    limits = {name: solver[name] for name in ("time_limit", "rel_gap", "seed", "on_progress") if name in solver}
    choice, problem = _choice(answer, scores), demand.problem(scores)
    bound, value = demand.solve(scores, **limits).bound, scores.cost(choice)
    status = "over budget" if answer.status == "over budget" else "optimal" if value <= bound else "heuristic"
    units = choice[[group[0] for group in problem.groups]]
    judged = make_assignment(problem, units, bound, status, None, time.perf_counter())
    return replace(judged, seconds=answer.seconds, relaxed=answer.relaxed, path=answer.path)


def _choice(answer: Assignment, scores: Scores) -> np.ndarray:
    """Which of the schemes that were scored each layer has."""
    if set(scores.names) != set(answer.schemes) or not set(answer.schemes.values()) <= set(scores.schemes):
        raise ValueError(f"scores={scores!r} are of other layers or schemes than the answer's; wanted the same")
    return np.array([scores.schemes.index(answer.schemes[name]) for name in scores.names])
