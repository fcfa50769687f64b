"""The worst single layer made as cheap as can be: a search over its cost, each step a question of what fits."""

from __future__ import annotations

import numpy as np

from .clock import Clock
from .linear import Result, any_fit, minimise


def minimise_max(
    worst: np.ndarray,
    cost: np.ndarray,
    rows: np.ndarray,
    caps: np.ndarray,
    allowed: np.ndarray,
    *,
    time_limit: float | None = None,
) -> Result | None:
    """The choice whose greatest `worst` [units, schemes] is least; of those, the one with the least sum of `cost`."""
    clock = Clock(time_limit)
    choice = any_fit(rows, caps, allowed, time_limit=clock.left())
    if choice is None:
        return None
    units, price = np.arange(len(cost)), np.zeros(len(rows))
    levels = np.unique(worst[allowed])
    low, high = 0, int(np.searchsorted(levels, worst[units, choice].max()))
    try:
        while low < high:
            middle = (low + high) // 2
            found = any_fit(rows, caps, allowed & (worst <= levels[middle]), time_limit=clock.left())
            if found is None:
                low = middle + 1
            else:
                choice, high = found, int(np.searchsorted(levels, worst[units, found].max()))
        result = minimise(cost, rows, caps, allowed & (worst <= levels[low]), time_limit=clock.left())
    except (TimeoutError, KeyboardInterrupt) as error:
        status = "limit" if isinstance(error, TimeoutError) else "interrupted"
        return Result(choice, float(levels[high]), float(levels[low]), status, price)
    return Result(result.choice, float(levels[low]), float(levels[low]), result.status, price)
