"""One budget: the lower convex hulls of all units, sorted, are the LP for every limit at once.

Each unit's choices are points (use, cost). Only those on the lower convex hull matter to the LP relaxation
(Sinha and Zoltners 1979), and walking all hull steps by falling gain per use passes through every optimum of
the LP: after each whole step the solution is integral and *supported*, so it is exactly optimal for its use.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Step:
    """Unit `unit` moves from one hull choice to the next: `use` more, `gain` cheaper."""

    unit: int
    before: int
    after: int
    use: int
    gain: float


def hull_steps(cost: np.ndarray, use: np.ndarray, allowed: np.ndarray) -> tuple[np.ndarray, list[Step]]:
    """The choice of least use in each unit, and all steps from there, best gain per use first."""
    start = np.empty(len(cost), dtype=np.int64)
    steps: list[Step] = []
    order = np.lexsort((cost, use)).tolist()  # by use, then cost, then choice
    for unit, (c, w, open_) in enumerate(zip(cost.tolist(), use.tolist(), allowed.tolist(), strict=True)):
        hull: list[int] = []
        for b in order[unit]:
            if not open_[b]:
                continue
            if hull and c[b] >= c[hull[-1]]:
                continue  # costs no less for no less use
            while len(hull) > 1:
                p, q = hull[-2], hull[-1]
                if (c[p] - c[q]) * (w[b] - w[q]) > (c[q] - c[b]) * (w[q] - w[p]):
                    break
                hull.pop()  # q is not below the line from p to b
            hull.append(b)
        start[unit] = hull[0]
        steps += [Step(unit, p, q, w[q] - w[p], c[p] - c[q]) for p, q in itertools.pairwise(hull)]
    steps.sort(key=lambda s: s.gain / s.use, reverse=True)  # stable, so of equals the first unit and choice
    return start, steps


def relax(cost: np.ndarray, use: np.ndarray, allowed: np.ndarray, cap: int) -> tuple[np.ndarray, float, np.ndarray]:
    """The LP optimum under one limit that the start fits: shares [units, schemes], price, a fitting choice.

    At most one unit is split between two choices. The fitting choice is the LP's, with that unit rounded
    down and the rest of the limit filled by later steps.
    """
    choice, steps = hull_steps(cost, use, allowed)
    units = np.arange(len(cost))
    rest = int(cap) - int(use[units, choice].sum())
    shares = np.zeros(cost.shape)
    price, split, blocked = 0.0, None, set()
    for step in steps:
        if step.unit in blocked:
            continue
        if step.use <= rest:
            choice[step.unit] = step.after
            rest -= step.use
            continue
        if split is None:
            price, split = step.gain / step.use, (step, rest / step.use)
            shares[units, choice] = 1.0
        blocked.add(step.unit)
    if split is None:
        shares[units, choice] = 1.0
    else:
        step, part = split
        shares[step.unit, step.before], shares[step.unit, step.after] = 1.0 - part, part
    return shares, price, choice
