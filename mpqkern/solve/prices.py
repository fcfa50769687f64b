"""What a little more of each budget would save, where costs of layers depend on each other.

No LP has the cross-layer problem's value, so no price of it is exact. Near an answer there is one that is: seen
from one layer, with all others as they are, every scheme has a plain cost, its own and its pairs with the others.
The LP over those costs has prices, and these are given. They are local: they hold while changes are few enough
for what these do to each other not to matter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np

from . import highs, hull
from .linear import reduce


def local_prices(
    unary: np.ndarray,
    pairwise: np.ndarray,
    choice: Sequence[int],
    rows: np.ndarray,
    caps: np.ndarray,
    allowed: np.ndarray,
) -> np.ndarray:
    """Price >= 0 of one unit of each row at a choice that fits; 0 where a row cannot be exceeded."""
    units = np.arange(len(choice))
    beside = unary + pairwise[:, :, units, np.asarray(choice)].sum(axis=2)
    reduced = reduce(beside, rows, caps, allowed)
    binding = np.where(allowed, reduced.use, 0).max(axis=2).sum(axis=1) > reduced.rest
    use, rest = reduced.use[binding], reduced.rest[binding]
    price = np.zeros(len(rows))
    if len(use) == 1:
        price[binding] = hull.relax(reduced.cost, use[0], allowed, rest[0])[1]
    elif len(use):
        with contextlib.suppress(TimeoutError):  # HiGHS gave up: no prices
            solved = highs.lp(reduced.cost, use, allowed, rest)
            if solved is not None:  # None: by HiGHS's tolerances not even the choice fits
                price[binding] = solved[1]
    return price
