"""How much to trust the inputs that were seen: a damping that holds on those that were not.

With few rows for many columns, weights that fit these very inputs best do harm on others. So half of the inputs are
left out, and what was found on the rest is tried on them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..numbers import check_number
from .statistics import Statistics

DAMPINGS = (0.01, 0.1, 1.0)  # of H's mean diagonal; the first where there are rows enough
ENOUGH = 20  # rows for each column
ROWS = 64  # of the weight that are tried


def check_damp(damp: float | None) -> None:
    check_number("damp", damp, "a number above 0, or None", lambda v: v > 0, optional=True)


def damping(rows: Tensor, statistics: Statistics, attempt: Callable[[Tensor, Statistics, float], Tensor]) -> float:
    """The one of `DAMPINGS` whose `attempt(rows, statistics, damping)`, values [N, K], does best on other inputs."""
    if statistics.half is None:
        return DAMPINGS[0]
    if len(statistics.h) == 1 and len(rows) > ROWS:
        rows = rows[:: -(-len(rows) // ROWS)]
    folds = [(seen, other) for seen, other in statistics.folds() if seen.count and other.count]
    found = {d: sum(other.excess(rows, attempt(rows, seen, d)) for seen, other in folds) for d in DAMPINGS}
    return min(found, key=found.__getitem__)
