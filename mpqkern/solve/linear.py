"""Exact choice of one scheme a unit at least total cost under any number of linear budgets.

LP first (one budget: convex hulls; several: HiGHS), which gives prices and so a bound on every choice by its
reduced cost; a good answer by rounding and exchanges; then all choices whose bound exceeds that answer go. What
is left is solved in whole numbers (see `core`), by HiGHS where that is too much work.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import highs, hull
from .clock import Clock
from .core import Core, cheapest, whole
from .problem import spent

EXCHANGED = 100  # choices of least reduced cost that pairwise exchanges try


@dataclass(frozen=True)
class Result:
    choice: np.ndarray
    objective: float
    bound: float  # no choice that fits costs less
    status: str  # "optimal", "feasible" (within rel_gap), "limit" (out of time) or "interrupted" (Ctrl-C)
    price: np.ndarray  # per budget: what one unit of its row more would save, by the LP


@dataclass(frozen=True)
class Reduced:
    """The same problem with each unit's least cost and least use taken off, over what is still allowed."""

    offset: float
    cost: np.ndarray  # float64 [units, schemes], >= 0
    use: np.ndarray  # int64 [budgets, units, schemes], >= 0
    rest: np.ndarray  # int64 [budgets]


def minimise(
    cost: np.ndarray,
    rows: np.ndarray,
    caps: np.ndarray,
    allowed: np.ndarray,
    *,
    rel_gap: float = 0.0,
    time_limit: float | None = None,
    seed: int = 0,
    verbose: bool = False,
    on_progress: highs.Progress | None = None,
) -> Result | None:
    """The cheapest choice that fits, the first in lexicographic order among equals; None: nothing fits.

    TimeoutError: there was no time to find a choice or a proof that there is none.
    """
    clock = Clock(time_limit)
    alive = allowed.copy()
    best: np.ndarray | None = None
    while True:
        if not alive.any(axis=1).all():
            return None
        reduced = reduce(cost, rows, caps, alive)
        if (reduced.rest < 0).any():
            return None
        binding = np.where(alive, reduced.use, 0).max(axis=2).sum(axis=1) > reduced.rest
        price = np.zeros(len(rows))
        if not binding.any():
            choice = np.where(alive, cost, np.inf).argmin(axis=1)
            return _result(cost, choice, price)
        if best is None:
            alive &= ~_dominated(cost, reduced.use[binding], alive)
        relaxed = _relax(reduced, binding, alive, clock, seed, verbose)
        start = None
        if relaxed is not None:  # else nothing fits, up to HiGHS's tolerance: whole numbers decide
            price[binding], start = relaxed
        start = best if start is None or (best is not None and _total(cost, best) <= _total(cost, start)) else start
        best = None if start is None else exchange(reduced, alive, price, start, clock)
        bound, gaps, slop = _bounds(reduced, alive, price)
        value = np.inf if best is None else _total(reduced.cost, best)
        total = value + reduced.offset
        if rel_gap and best is not None and value - bound <= rel_gap * abs(total):
            return Result(best, _total(cost, best), min(total, bound + reduced.offset), "feasible", price)
        spread = _spread(reduced.cost, alive)
        alive &= (bound + gaps <= value + slop) & (reduced.cost <= value + slop)
        if _spread(reduced.cost, alive) * 2**10 >= spread:
            break  # else once more, on the finer scale of the costs that are left
    limits = {"clock": clock, "rel_gap": rel_gap, "seed": seed, "verbose": verbose}
    return _finish(cost, rows, caps, alive, price, best, bound + reduced.offset, limits, on_progress)


def any_fit(
    rows: np.ndarray, caps: np.ndarray, allowed: np.ndarray, *, time_limit: float | None = None
) -> np.ndarray | None:
    """Some choice that fits, or None, which is a proof that there is none; TimeoutError: neither was found."""
    if not allowed.any(axis=1).all():
        return None
    reduced = reduce(np.zeros(allowed.shape), rows, caps, allowed)
    if (reduced.rest < 0).any():
        return None
    if len(rows) == 0:
        return allowed.argmax(axis=1)
    shares = np.where(allowed, reduced.use, 0) / np.maximum(reduced.rest, 1)[:, None, None]
    result = minimise(shares.sum(axis=0), rows, caps, allowed, rel_gap=np.inf, time_limit=time_limit)
    if result is not None and result.status == "interrupted":
        raise KeyboardInterrupt  # whoever asked has more to do
    return None if result is None else result.choice


def reduce(cost: np.ndarray, rows: np.ndarray, caps: np.ndarray, allowed: np.ndarray) -> Reduced:
    least_cost = np.where(allowed, cost, np.inf).min(axis=1)
    least_use = np.where(allowed, rows, np.iinfo(np.int64).max).min(axis=2)
    return Reduced(
        float(least_cost.sum()),
        np.where(allowed, cost - least_cost[:, None], 0.0),
        np.where(allowed, rows - least_use[:, :, None], 0),
        caps - least_use.sum(axis=1),
    )


def exchange(reduced: Reduced, allowed: np.ndarray, price: np.ndarray, choice: np.ndarray, clock: Clock) -> np.ndarray:
    """Better choices in one or two units at a time, among those of least reduced cost, while there are any and time."""
    choice = choice.copy()
    units = np.arange(len(choice))
    priced = np.where(allowed, reduced.cost + np.tensordot(price, reduced.use.astype(np.float64), 1), np.inf)
    for _ in range(2 * len(choice)):
        if clock.over():
            break
        extra = priced - priced[units, choice][:, None]
        extra[units, choice] = np.inf
        near = np.argsort(extra, axis=None, kind="stable")[:EXCHANGED]
        near = near[np.isfinite(extra.ravel()[near])]
        u, b = np.divmod(near, allowed.shape[1])
        gain = reduced.cost[u, choice[u]] - reduced.cost[u, b]
        more = reduced.use[:, u, b] - reduced.use[:, u, choice[u]]
        slack = (reduced.rest - spent(reduced.use, choice))[:, None]
        pairs = np.where(u[:, None] != u, gain[:, None] + gain, 0.0)
        alone = np.diag_indices(len(u))
        pairs[alone] = gain
        fits = (more[:, :, None] + more[:, None, :] <= slack[:, :, None]).all(axis=0)
        fits[alone] = (more <= slack).all(axis=0)
        pairs = np.where(fits, pairs, 0.0)
        if pairs.size == 0 or pairs.max() <= 1e-14 * (1e-300 + _total(reduced.cost, choice)):
            break
        for i in set(np.unravel_index(pairs.argmax(), pairs.shape)):
            choice[u[i]] = b[i]
    return choice


def _relax(
    reduced: Reduced, binding: np.ndarray, alive: np.ndarray, clock: Clock, seed: int, verbose: bool
) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Prices of the binding budgets and, if rounding finds one, a choice that fits all of them."""
    use, rest = reduced.use[binding], reduced.rest[binding]
    if len(use) == 1:
        _, price, choice = hull.relax(reduced.cost, use[0], alive, rest[0])
        return np.array([price]), choice
    try:
        solved = highs.lp(reduced.cost, use, alive, rest, time_limit=clock.left(), seed=seed, verbose=verbose)
    except TimeoutError:
        return _one_for_all(reduced.cost, use, rest, alive)
    if solved is None:
        return None
    shares, price = solved
    weight = (use / np.maximum(rest, 1)[:, None, None]).sum(axis=0)
    choice = np.where(alive & (shares > 1e-7), weight, np.inf).argmin(axis=1)
    return price, _repair(use, rest, alive, choice, clock)


def _one_for_all(
    cost: np.ndarray, use: np.ndarray, rest: np.ndarray, alive: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """The same without HiGHS: one budget stands for all, the sum of their shares for prices (any are valid), the
    greatest share, rounded up, for a choice."""
    shares = np.minimum(np.where(alive, use, 0) / np.maximum(rest, 1)[:, None, None], 2.0)  # above 1 nothing fits
    shares = np.ceil(np.ldexp(shares, 40)).astype(np.int64)
    price = hull.relax(cost, shares.sum(axis=0), alive, len(rest) * 2**40)[1]
    choice = hull.relax(cost, shares.max(axis=0), alive, 2**40)[2]
    return np.ldexp(price, 40) / np.maximum(rest, 1), choice if (spent(use, choice) <= rest).all() else None


def _repair(
    use: np.ndarray, rest: np.ndarray, alive: np.ndarray, choice: np.ndarray, clock: Clock
) -> np.ndarray | None:
    """Moves that lower the relative overrun most, until all budgets hold; None: stuck, or out of time."""
    choice, units = choice.copy(), np.arange(len(choice))
    scale = np.maximum(rest, 1)[:, None, None]
    for _ in range(4 * len(choice)):
        total = spent(use, choice)
        if (total <= rest).all():
            return choice
        if clock.over():
            return None
        after = total[:, None, None] + use - use[:, units, choice][:, :, None]
        over = np.where(alive, (np.maximum(after - rest[:, None, None], 0) / scale).sum(axis=0), np.inf)
        if over.min() >= (np.maximum(total - rest, 0) / scale[:, 0, 0]).sum():
            return None
        u, b = np.unravel_index(over.argmin(), over.shape)
        choice[u] = b
    return None


def _finish(
    cost: np.ndarray,
    rows: np.ndarray,
    caps: np.ndarray,
    alive: np.ndarray,
    price: np.ndarray,
    best: np.ndarray | None,
    bound: float,
    limits: dict,
    on_progress: highs.Progress | None,
) -> Result | None:
    """The units with more than one choice left, in integers, or by HiGHS."""
    reduced = reduce(cost, rows, caps, alive)
    if (reduced.rest < 0).any():
        return None
    open_units = np.flatnonzero(alive.sum(axis=1) > 1)
    choice = alive.argmax(axis=1)
    if len(open_units) == 0:
        return _result(cost, choice, price)
    part = alive[open_units]
    costs = whole(reduced.cost[open_units], part)
    core = Core(costs, reduced.use[:, open_units], reduced.rest, part)
    clock: Clock = limits.pop("clock")
    try:
        known = None if best is None else best[open_units]
        found = cheapest(core, known, any=np.isinf(limits["rel_gap"]), time_limit=clock.left())
    except KeyboardInterrupt:
        if best is None:
            raise
        return Result(best, _total(cost, best), min(_total(cost, best), bound), "interrupted", price)
    if found.choice is not None:
        choice[open_units] = found.choice if found.first else _sort_twins(core, found.choice)
        best = choice.copy()
    if found.done:
        return None if best is None else _result(cost, best, price)
    value = 0.0 if best is None else _total(reduced.cost, best)
    args = (reduced.cost[open_units], core.use, part, core.rest)
    tell = on_progress and (lambda total, low, *rest: on_progress(total + reduced.offset, low + reduced.offset, *rest))
    picked, low, status = highs.integer(*args, value=value, on_progress=tell, time_limit=clock.left(), **limits)
    if status == "infeasible":
        if best is None and highs.clearly_infeasible(*args[1:], time_limit=clock.left()):
            return None
        low = -np.inf
    if picked is not None and core.fits(picked):
        choice[open_units] = _sort_twins(core, picked)
        if best is None or _total(cost, choice) <= _total(cost, best):
            best = choice
    elif status == "optimal":
        status = "limit"  # over a budget by less than HiGHS's tolerance: this proves no more than the bound
    if best is None and status == "interrupted":
        raise KeyboardInterrupt
    if best is None:
        raise TimeoutError(
            "found neither an assignment nor a proof that there is none; wanted more time or looser budgets"
        )
    total = _total(cost, best)
    if status == "optimal" and not limits["rel_gap"]:
        return Result(best, total, total, "optimal", price)
    status = {"optimal": "feasible", "interrupted": "interrupted"}.get(status, "limit")
    return Result(best, total, min(total, max(bound, low + reduced.offset)), status, price)


def _bounds(reduced: Reduced, alive: np.ndarray, price: np.ndarray) -> tuple[float, np.ndarray, float]:
    """The Lagrangian bound, how much more each choice makes it, and what rounding may have done to both."""
    priced = reduced.cost + np.tensordot(price, reduced.use.astype(np.float64), 1)
    least = np.where(alive, priced, np.inf).min(axis=1)
    slop = 2.0**-46 * float(np.where(alive, priced, 0.0).max(axis=1).sum() + price @ reduced.rest)
    return float(least.sum() - price @ reduced.rest), priced - least[:, None], slop


def _dominated(cost: np.ndarray, use: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """Choices beaten in cost and every budget by another of their unit; of equals, all but the first."""
    cheaper = cost[:, :, None] <= cost[:, None, :]
    cheaper &= (cost[:, :, None] < cost[:, None, :]) | np.triu(np.ones((cost.shape[1],) * 2, dtype=bool), 1)
    lighter = (use[:, :, :, None] <= use[:, :, None, :]).all(axis=0)
    return (cheaper & lighter & alive[:, :, None]).any(axis=1)


def _sort_twins(core: Core, choice: np.ndarray) -> np.ndarray:
    """Among units equal in everything the earlier get the earlier choices."""
    choice = choice.copy()
    twins: dict[bytes, list[int]] = {}
    for unit in range(len(choice)):
        key = core.cost[unit].tobytes() + core.use[:, unit].tobytes() + core.allowed[unit].tobytes()
        twins.setdefault(key, []).append(unit)
    for units in twins.values():
        choice[units] = np.sort(choice[units])
    return choice


def _result(cost: np.ndarray, choice: np.ndarray, price: np.ndarray) -> Result:
    total = _total(cost, choice)
    return Result(choice, total, total, "optimal", price)


def _total(cost: np.ndarray, choice: np.ndarray) -> float:
    return float(cost[np.arange(len(cost)), choice].sum())


def _spread(cost: np.ndarray, alive: np.ndarray) -> float:
    return float(np.where(alive, cost, 0.0).max(axis=1).sum())
