"""solve: scores and budgets in, a proven assignment out."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..numbers import check_number
from ..scores.table import Scores
from . import linear, relaxed
from .assignment import Assignment
from .budget import Budget
from .clock import Clock
from .constraints import Choice, Constraints
from .explain import explain
from .highs import Progress
from .minimax import minimise_max
from .prepare import PROJECTIONS, is_seed, projected
from .prices import local_prices
from .problem import Problem, make_problem

log = logging.getLogger("mpqkern")

OBJECTIVES = ("sum", "minimax")
NEVER_NEGATIVE = ("ce", "kl")  # losses


def solve(
    scores: Scores,
    *budgets: Budget,
    pins: Mapping[str, Choice] | None = None,
    forbid: Mapping[str, Choice | Sequence[Choice]] | None = None,
    ties: Sequence[Sequence[str]] | None = None,
    at_most: Mapping[Choice, int] | None = None,
    first_last: Choice = None,
    objective: str = "sum",
    relaxation: str | None = None,
    rounding: str = "exact",
    psd: str = "none",
    time_limit: float | None = None,
    rel_gap: float = 0.0,
    seed: int = 0,
    on_progress: Progress | None = None,
    verbose: bool = False,
) -> Assignment:
    """The assignment of least cost that fits all budgets, with a proof; `Infeasible` if there is none.

    pins        {pattern: scheme or bits}; patterns are names, globs, "re:..." or types
    forbid      {pattern: schemes or bits}
    ties        [[pattern, ...], ...]: the layers of a list share one scheme
    at_most     {scheme or bits: k}
    first_last  scheme or bits of the first and last layer, as most papers fix them to 8
    objective   "sum", or "minimax": the worst single layer, then the sum
    relaxation  "lp" takes OMPQ's route of continuous widths, then `rounding`: "nearest" (may be over
                budget, and says so), "floor" or "dfs" (with several budgets, so may these) or "exact"
    psd         what to do with the negative part of pairwise scores; "none" solves them as they are
    time_limit  seconds, about; the best assignment until then has status "limit". After Ctrl-C it has "interrupted"
    on_progress is called with (objective, bound, seconds, nodes) while a long search runs
    rel_gap     good enough is this close to the bound; 0 asks for the optimum

    >>> from mpqkern import Layer
    >>> layers = [Layer("stem", "conv2d", (8, 3, 3, 3), 216), Layer("head", "linear", (10, 8), 80)]
    >>> scores = Scores(layers, [2, 4, 8], [[0.9, 0.2, 0.0], [0.5, 0.1, 0.0]])
    >>> best = solve(scores, Budget(avg_bits=4.5))
    >>> best.bits, best.status
    ({'stem': 4, 'head': 4}, 'optimal')
    >>> solve(scores, Budget(avg_bits=4.5), pins={"head": 8}).bits
    {'stem': 2, 'head': 8}
    """
    _check(scores, budgets, objective, relaxation, rounding, psd, time_limit, rel_gap, seed, on_progress)
    start, clock = time.perf_counter(), Clock(time_limit)
    constraints = Constraints(pins or {}, forbid or {}, ties or (), at_most or {}, first_last)
    problem = make_problem(scores, budgets, constraints)
    arrays = (problem.unary, problem.rows, problem.caps, problem.allowed)
    limits = {"rel_gap": rel_gap, "seed": seed, "on_progress": on_progress}
    if relaxation == "lp" and rounding != "exact":
        bits = scores.bits
        found = None
        if problem.allowed.any(axis=1).all():
            with naming(time_limit):
                found = relaxed.relaxed_widths(*arrays, bits, time_limit=clock.left())
        if found is None:
            raise explain(scores, budgets, constraints, clock.left())
        widths, bound = found
        choice = relaxed.round_widths(widths, rounding, *arrays, bits)
        over = (problem.use(choice) > problem.caps).any()
        value = scores.cost(problem.expand(choice))
        status = "over budget" if over else "optimal" if value <= bound else "feasible"
        names = zip(scores.names, problem.expand(widths).tolist(), strict=True)
        return make_assignment(problem, choice, min(bound, value), status, None, start, dict(names))
    if scores.pairwise is not None:
        budget = (problem.rows, problem.caps, problem.allowed)
        with naming(time_limit):
            if linear.any_fit(*budget, time_limit=clock.left()) is None:
                raise explain(scores, budgets, constraints, clock.left())
        from . import quadratic

        outcome = quadratic.minimise(
            problem.unary, problem.pairwise, *budget, psd=psd, time_limit=clock.left(), **limits
        )
        if outcome.choice is None:
            raise TimeoutError(f"time_limit={time_limit!r} passed before any assignment was found; wanted longer")
        # With psd the objective is that of the projected scores: the bound and the prices hold for them only.
        value = None if psd == "none" else outcome.objective
        if psd == "none":
            _doubt(scores, outcome.objective)
        unary, pairwise, _ = projected(problem.unary, problem.pairwise, psd)
        prices = local_prices(unary, pairwise, outcome.choice, *budget)
        return make_assignment(problem, outcome.choice, outcome.bound, outcome.status, prices, start, value=value)
    if objective == "minimax":
        worst = np.array([scores.unary[group].max(axis=0) for group in problem.groups])
        with naming(time_limit):
            result = minimise_max(worst, *arrays, time_limit=clock.left())
    else:
        with naming(time_limit):
            result = linear.minimise(*arrays, time_limit=clock.left(), verbose=verbose, **limits)
    if result is None:
        raise explain(scores, budgets, constraints, clock.left())
    value = result.objective if objective == "minimax" else None
    prices = None if objective == "minimax" else result.price
    return make_assignment(problem, result.choice, result.bound, result.status, prices, start, value=value)


def _doubt(scores: Scores, cost: float) -> None:
    """Pairs that were measured where the loss no longer grows with the error add up to what no loss can be."""
    start = scores.provenance.get("loss0")
    if scores.provenance.get("loss") not in NEVER_NEGATIVE or start is None:
        return
    if start + cost < -np.abs(scores.unary).max():  # below zero by more than noise: than any layer costs alone
        log.warning(
            "these pairs promise a %s loss of %.3g, and there is none below 0: their errors are too large to add up. "
            'Better: psd="clip", scores of a rounding that errs less (rounding="gptq"), or no layer at the least bits',
            scores.provenance["loss"], start + cost,
        )  # fmt: skip


@contextlib.contextmanager
def naming(time_limit: float | None) -> Iterator[None]:
    """A TimeoutError from within says which limit it was that the caller gave."""
    try:
        yield
    except TimeoutError as error:
        raise TimeoutError(f"time_limit={time_limit!r}: {error}") from None


def make_assignment(
    problem: Problem,
    choice: Sequence[int],
    bound: float,
    status: str,
    price: np.ndarray | None,
    start: float,
    widths: dict[str, float] | None = None,
    value: float | None = None,
) -> Assignment:
    """The answer in words; every budget is checked once more, in whole numbers."""
    scores, layers = problem.scores, problem.expand(choice)
    used = problem.use(choice)
    if status != "over budget" and (
        (used > problem.caps).any() or not problem.allowed[np.arange(len(choice)), choice].all()
    ):
        raise AssertionError(f"the solver returned {list(map(int, choice))}, which spends {used} of {problem.caps}")
    value = scores.cost(layers) if value is None else value
    # Linear proofs are exact in integers; the float sums beside them differ in the last bits.
    exact = status == "optimal" and problem.pairwise is None
    bound = value if exact else min(float(bound), value)
    prices = {} if price is None else {row.label: row.price(p) for row, p in zip(problem.labels, price, strict=True)}
    return Assignment(
        schemes={name: scores.schemes[b] for name, b in zip(scores.names, layers, strict=True)},
        objective=value,
        bound=bound,
        status=status,
        costs={row.label: row.amount(u) for row, u in zip(problem.labels, used, strict=True)},
        slack={
            row.label: row.amount(row.cap - int(u))
            for row, u in zip(problem.labels, used, strict=True)
            if row.cap is not None
        },
        prices=prices,
        seconds=time.perf_counter() - start,
        relaxed=widths,
        _problem=problem,
    )


def _check(
    scores: Any,
    budgets: Sequence[Any],
    objective: str,
    relaxation: str | None,
    rounding: str,
    psd: str,
    time_limit: float | None,
    rel_gap: float,
    seed: Any,
    on_progress: Any,
) -> None:
    if not isinstance(scores, Scores):
        raise ValueError(f"scores={scores!r}; wanted Scores")
    for budget in budgets:
        if not isinstance(budget, Budget):
            raise ValueError(f"budget={budget!r}; wanted a Budget, for instance Budget(avg_bits=4)")
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r}; wanted 'sum' or 'minimax'")
    if relaxation not in (None, "lp"):
        raise ValueError(f"relaxation={relaxation!r}; wanted None or 'lp'")
    if rounding not in relaxed.ROUNDINGS:
        raise ValueError(f"rounding={rounding!r}; wanted one of {', '.join(relaxed.ROUNDINGS)}")
    if rounding != "exact" and relaxation is None:
        raise ValueError(f"rounding={rounding!r} without a relaxation; wanted relaxation='lp' beside it")
    check_number("time_limit", time_limit, "seconds above 0, or None", lambda v: v > 0, optional=True)
    check_number("rel_gap", rel_gap, "0 or more, and finite", lambda v: 0 <= v < math.inf)
    if not is_seed(seed):
        raise ValueError(f"seed={seed!r}; wanted a whole number from 0 to 2**31 - 1")
    if psd not in PROJECTIONS:
        raise ValueError(f"psd={psd!r}; wanted one of {', '.join(PROJECTIONS)}")
    if on_progress is not None and not callable(on_progress):
        raise TypeError(f"on_progress={on_progress!r}; wanted a function, or None")
    if scores.pairwise is not None and (objective != "sum" or relaxation):
        raise ValueError(
            f"objective={objective!r}, relaxation={relaxation!r} with pairwise scores; wanted 'sum' and None"
        )
    if relaxation and (objective != "sum" or len(set(scores.bits)) < len(scores.bits)):
        raise ValueError(
            "relaxation='lp' with objective='minimax' or several schemes of one width; wanted one per width"
        )
