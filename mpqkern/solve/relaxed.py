"""OMPQ's own recipe: continuous widths from the LP, then rounded.

max sum_l c_l b_l under one size limit with b_l between the least and the greatest width (arXiv 2109.07865, eq. 9)
is the LP over the convex hull of each layer's choices; at most one layer a budget ends between two widths.
Kept for comparison: rounding "exact" skips all this and is what to use.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from . import highs, hull
from .linear import reduce
from .problem import spent

ROUNDINGS = ("exact", "nearest", "floor", "dfs")
MAX_DFS = 18  # layers between two widths: 2**18 combinations


def relaxed_widths(
    cost: np.ndarray,
    rows: np.ndarray,
    caps: np.ndarray,
    allowed: np.ndarray,
    bits: Sequence[int],
    *,
    time_limit: float | None = None,
) -> tuple[np.ndarray, float] | None:
    """Continuous width of each unit and the LP's value, a bound on any assignment; None: infeasible."""
    reduced = reduce(cost, rows, caps, allowed)
    if (reduced.rest < 0).any():
        return None
    if len(rows) == 1:
        shares, _, _ = hull.relax(reduced.cost, reduced.use[0], allowed, reduced.rest[0])
    elif len(rows):
        solved = highs.lp(reduced.cost, reduced.use, allowed, reduced.rest, time_limit=time_limit)
        if solved is None:
            return None
        shares = solved[0]
    else:
        shares = np.eye(cost.shape[1])[np.where(allowed, cost, np.inf).argmin(axis=1)]
    return shares @ np.asarray(bits, dtype=np.float64), float((shares * np.where(allowed, cost, 0.0)).sum())


def round_widths(
    widths: np.ndarray,
    how: str,
    cost: np.ndarray,
    rows: np.ndarray,
    caps: np.ndarray,
    allowed: np.ndarray,
    bits: Sequence[int],
) -> np.ndarray:
    """One choice a unit.

    "nearest" rounds halves to even and may exceed the budget; "floor" rounds down and spends what is left where
    it saves most; "dfs" takes, of all ways to round up or down, the one that fills the first budget most.
    """
    below, above = _neighbours(widths, allowed, np.asarray(bits))
    if how == "nearest":
        width = np.asarray(bits, dtype=np.float64)
        down, up = widths - width[below], width[above] - widths
        even = np.rint(widths) == width[above]
        return np.where((up < down) | ((up == down) & even), above, below)
    if how == "floor":
        return _spend(below, cost, rows, caps, allowed)
    between = np.flatnonzero(below != above)
    if len(between) > MAX_DFS:
        raise ValueError(f"rounding='dfs' has {len(between)} layers to round; wanted at most {MAX_DFS}")
    best, most = below, -1
    for ups in itertools.product((True, False), repeat=len(between)):
        choice = below.copy()
        choice[between] = np.where(ups, above[between], below[between])
        total = spent(rows, choice)
        if (total <= caps).all() and (len(rows) == 0 or total[0] > most):
            best, most = choice, total[0] if len(rows) else 0
    return best


def _neighbours(widths: np.ndarray, allowed: np.ndarray, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The allowed choices just below and above each width."""
    near = 1e-9
    below = np.where(allowed & (bits <= widths[:, None] + near), bits, -1).argmax(axis=1)
    above = np.where(allowed & (bits >= widths[:, None] - near), bits, 10**6).argmin(axis=1)
    return below, above


def _spend(choice: np.ndarray, cost: np.ndarray, rows: np.ndarray, caps: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """While something fits that costs less: the change that saves most for its share of what is left."""
    choice, units = choice.copy(), np.arange(len(choice))
    while True:
        more = rows - rows[:, units, choice][:, :, None]
        slack = caps - spent(rows, choice)
        gain = cost[units, choice][:, None] - cost
        able = allowed & (gain > 0) & (more <= slack[:, None, None]).all(axis=0)
        if not able.any():
            return choice
        share = (np.maximum(more, 0) / np.maximum(slack, 1)[:, None, None]).sum(axis=0)
        rate = np.where(able, gain / np.maximum(share, 1e-300), -1.0)
        u, b = np.unravel_index(rate.argmax(), rate.shape)
        choice[u] = b
