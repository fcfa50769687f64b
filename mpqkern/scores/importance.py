"""Importance: one factor a layer, for methods that do not look at quantizers, made into a table of costs.

Both published searches maximise sum_l c_l b_l, so that every bit of width is worth c_l ("linear"). There each layer
but one ends at the least or the greatest width. `objective="convex"` gives a width of b bits the cost c_l 4^-b
instead, as rounding errors have it, so that each further bit is worth a quarter of the one before.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from ..numbers import check_number
from .run import Run
from .table import Scores

log = logging.getLogger("mpqkern")

OBJECTIVES = ("linear", "convex")
FLAT = 1e-6  # factors that differ by less than this share do not tell layers apart


def check_objective(objective: str) -> None:
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r}; wanted 'linear' or 'convex'")


def decayed(gamma: np.ndarray, beta: float | None) -> np.ndarray:
    """exp(-beta gamma) times a constant that makes the greatest factor 1; None: the least is 1/e then.

    Without the constant all factors would be 0 in floating point where beta gamma is above 745, as it is in OMPQ's
    published ResNet-18 search. A positive constant does not change which assignment is best.

    >>> decayed(np.array([15.0, 16.0, 15.5]), 1.0).round(3)
    array([1.   , 0.368, 0.607])
    """
    check_number("beta", beta, "a number of 0 or more, or None", lambda v: np.isfinite(v) and v >= 0, optional=True)
    above = gamma - gamma.min()
    if beta is None:
        beta = 1.0 / above.max() if above.max() > 0 else 0.0
    return np.exp(-beta * above)


def table(run: Run, factors: np.ndarray, objective: str, **notes: Any) -> Scores:
    """Costs from factors >= 0, which are scaled to a greatest one of 1; notes and factors go to the provenance."""
    top = factors.max()
    factors = factors / top if top > 0 else np.ones_like(factors)
    if factors.max() - factors.min() <= FLAT and len(factors) > 1:
        log.warning("importance is the same in all layers: the assignment will depend on their sizes alone")
    bits = run.widths()
    value = bits.max() - bits if objective == "linear" else 0.25**bits - 0.25 ** bits.max()
    return run.scores(np.outer(factors, value), **notes, importance=factors.tolist())
