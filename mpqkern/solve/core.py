"""The few units that reduced costs leave undecided, solved exactly in integers (csrc/host/knapsack.h).

Costs become int64 with the last bit worth 2**-60 of their total spread, finer than the sum of floats; use is
int64 anyway. So "cheaper", "as cheap" and "fits" are exact, whatever the scale of the scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .problem import spent

try:
    from .. import _host
except ImportError:  # without it HiGHS does the same, slower
    _host = None

WORK = 4e8  # numbers touched before the search is given up: about half a second
SPEED = 8e8  # about as many a second


@dataclass(frozen=True)
class Core:
    """Units with their choices in `allowed`; cost >= 0 and use >= 0 have each unit's least taken off."""

    cost: np.ndarray  # int64 [units, schemes]
    use: np.ndarray  # int64 [budgets, units, schemes]
    rest: np.ndarray  # int64 [budgets]: what all units together may spend
    allowed: np.ndarray  # bool [units, schemes]

    def fits(self, choice: np.ndarray) -> bool:
        return bool((spent(self.use, choice) <= self.rest).all())


@dataclass(frozen=True)
class Found:
    choice: np.ndarray | None  # the best that is known
    done: bool  # nothing that fits costs less or, when there is no choice, nothing fits
    first: bool  # of those that cost as much it is the first in order of units and choices


def cheapest(core: Core, known: np.ndarray | None, *, any: bool = False, time_limit: float | None = None) -> Found:
    """The cheapest choice that fits, or as far as WORK and time go; `known` is one that fits. any: the first met."""
    if _host is None:
        return Found(known, False, False)
    work = WORK if time_limit is None else min(WORK, max(time_limit, 0.0) * SPEED)
    found = _host.cheapest(**vars(core), known=[] if known is None else known.tolist(), any=any, work=work)
    choice = np.array(found["choice"], dtype=np.int64) if found["choice"] else None
    return Found(choice, found["done"], found["first"])


def whole(cost: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """int64 costs: a power of two times the costs."""
    spread = float(np.where(allowed, cost, 0.0).max(axis=1).sum())
    if spread == 0.0:
        return np.zeros(cost.shape, dtype=np.int64)
    power = 60 - int(np.frexp(spread)[1])
    return np.rint(np.ldexp(np.where(allowed, cost, 0.0), power)).astype(np.int64)
