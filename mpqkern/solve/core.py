"""The few units that reduced costs leave undecided, solved exactly in integers.

Costs become int64 with the last bit worth 2**-60 of their total spread, finer than the sum of floats; use is
int64 anyway. So "cheaper", "as cheap" and "fits" are exact, whatever the scale of the scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_STATES = 20_000
MAX_NODES = 4_000


@dataclass(frozen=True)
class Core:
    """Units with their choices in `allowed`; cost >= 0 and use >= 0 have each unit's least taken off."""

    cost: np.ndarray  # int64 [units, schemes]
    use: np.ndarray  # int64 [budgets, units, schemes]
    rest: np.ndarray  # int64 [budgets]: what all units together may spend
    allowed: np.ndarray  # bool [units, schemes]
    price: np.ndarray  # float64 [budgets], in units of cost: any price >= 0 gives a valid bound

    @property
    def reduced(self) -> np.ndarray:
        """cost + price * use: what a choice costs when the budget is bought."""
        priced = self.cost + np.tensordot(self.price, self.use.astype(np.float64), 1)
        return np.where(self.allowed, priced, np.inf)

    def slop(self) -> float:
        """More than rounding can make of any bound here; bounds prune only beyond it."""
        priced = np.where(self.allowed, self.reduced, 0.0)
        return 1.0 + 2.0**-46 * float(priced.max(axis=1).sum() + self.price @ self.rest)


def whole(cost: np.ndarray, allowed: np.ndarray) -> tuple[np.ndarray, int]:
    """int64 costs, and the power of two they were multiplied by."""
    spread = float(np.where(allowed, cost, 0.0).max(axis=1).sum())
    if spread == 0.0:
        return np.zeros(cost.shape, dtype=np.int64), 0
    power = 60 - int(np.frexp(spread)[1])
    return np.rint(np.ldexp(np.where(allowed, cost, 0.0), power)).astype(np.int64), power


def enumerate_core(core: Core, best: int) -> tuple[np.ndarray | None, int, bool] | None:
    """The cheapest choice that costs at most `best`: (choice, cost, whether others might cost as much).

    Partial choices of growing sets of units, pruned by the budget, by the Lagrangian bound, and for one budget
    by dominance. (None, best, ...) when none costs that little; None when there are too many to keep.
    """
    units = len(core.cost)
    reduced, slop = core.reduced, core.slop()
    second = np.sort(reduced, axis=1)[:, 1] - reduced.min(axis=1) if core.cost.shape[1] > 1 else np.zeros(units)
    order = np.argsort(-np.where(np.isfinite(second), second, 1e300), kind="stable")
    later_cost = np.append(np.cumsum(reduced.min(axis=1)[order][::-1])[::-1], 0.0)
    least = np.where(core.allowed, core.use, np.iinfo(np.int64).max).min(axis=2)
    later_use = np.concatenate(
        [np.cumsum(least[:, order][:, ::-1], axis=1)[:, ::-1], np.zeros((len(least), 1))], axis=1
    )
    later_use = later_use.astype(np.int64)
    cost = np.zeros(1, dtype=np.int64)
    use = np.zeros((len(core.rest), 1), dtype=np.int64)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    tie = False
    for depth, unit in enumerate(order):
        options = np.flatnonzero(core.allowed[unit])
        new_cost = (cost[:, None] + core.cost[unit, options]).ravel()
        new_use = (use[:, :, None] + core.use[:, unit, options][:, None, :]).reshape(len(use), -1)
        slack = core.rest[:, None] - new_use
        keep = (slack >= later_use[:, depth + 1, None]).all(axis=0)
        keep &= new_cost + later_cost[depth + 1] - core.price @ slack <= best + slop
        kept = np.flatnonzero(keep)
        if len(kept) == 0:
            return None, best, tie
        cost, use = new_cost[kept], new_use[:, kept]
        sort = np.lexsort((cost, *use[::-1]))  # by use, then by cost
        if len(use) == 1 and len(sort) > 1:
            falling = np.minimum.accumulate(cost[sort])
            sort, dropped = sort[np.append(True, cost[sort][1:] < falling[:-1])], len(sort)
            tie |= dropped > len(sort) and _equal_dropped(cost, kept, sort)
        elif len(sort) > 1:
            same = (np.diff(use[:, sort], axis=1) == 0).all(axis=0)
            tie |= bool((same & (np.diff(cost[sort]) == 0)).any())
            sort = sort[np.append(True, ~same)]
        if len(sort) > MAX_STATES:
            return None
        cost, use = cost[sort], use[:, sort]
        trail.append((kept[sort] // len(options), options[kept[sort] % len(options)]))
    at = int(cost.argmin())
    found = int(cost[at])
    if found > best:
        return None, best, tie
    tie |= int((cost == found).sum()) > 1
    choice = np.empty(units, dtype=np.int64)
    for unit, (parent, option) in zip(order[::-1], trail[::-1], strict=True):
        choice[unit], at = option[at], parent[at]
    return choice, found, tie


def _equal_dropped(cost: np.ndarray, kept: np.ndarray, sort: np.ndarray) -> bool:
    """Whether a dropped partial choice cost as much as one that stayed."""
    gone = np.ones(len(kept), dtype=bool)
    gone[sort] = False
    return bool(np.isin(cost[gone], cost[sort]).any())


def first_of_equals(core: Core, best: int) -> np.ndarray | None:
    """The first choice in order of units and choices that costs exactly `best`; None: not found in time."""
    units = len(core.cost)
    reduced, slop = core.reduced, core.slop()
    later_cost = np.append(np.cumsum(reduced.min(axis=1)[::-1])[::-1], 0.0).tolist()
    cheapest = np.where(core.allowed, core.cost, np.iinfo(np.int64).max).min(axis=1)
    later_least = [*np.cumsum(cheapest[::-1])[::-1].tolist(), 0]
    least = np.where(core.allowed, core.use, np.iinfo(np.int64).max).min(axis=2)
    later_use = [[*np.cumsum(line[::-1])[::-1].tolist(), 0] for line in least]
    budgets, price, rest = range(len(core.rest)), core.price.tolist(), core.rest.tolist()
    options = [
        [(b, int(core.cost[u, b]), [int(core.use[k, u, b]) for k in budgets]) for b in np.flatnonzero(core.allowed[u])]
        for u in range(units)
    ]
    choice = [0] * units
    nodes = 0
    stack = [(0, 0, rest, iter(options[0]))]
    while stack:
        depth, cost, left, rests = stack[-1]
        entry = next(rests, None)
        if entry is None:
            stack.pop()
            continue
        nodes += 1
        if nodes > MAX_NODES:
            return None
        b, own, uses = entry
        slack = [left[k] - uses[k] for k in budgets]
        if any(slack[k] < later_use[k][depth + 1] for k in budgets) or cost + own + later_least[depth + 1] > best:
            continue
        if cost + own + later_cost[depth + 1] - sum(price[k] * slack[k] for k in budgets) > best + slop:
            continue
        choice[depth] = b
        if depth + 1 == units:
            return np.array(choice)
        stack.append((depth + 1, cost + own, slack, iter(options[depth + 1])))
    return None
