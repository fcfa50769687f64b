"""Data-free baselines: how far rounding moves the weights, and bit widths alone.

With Q_b(w) a layer's weight at b bits and e_b = |Q_b(w) - w|^2, `kind` is one of

    "error"     e_b
    "relative"  e_b / |w|^2, the inverse of the signal-to-noise ratio
    "ratio"     e_b / e_widest: MixQuant's idea (Kloberdanz and Le 2023, arXiv 2309.17341). For min-max grids it is
                close to ((2^widest - 1) / (2^b - 1))^2 in every layer, so it hardly tells layers apart.
"""

from __future__ import annotations

import numpy as np

from ..measuring.meter import Work
from .run import Run
from .table import Scores

KINDS = ("error", "relative", "ratio")


def score(run: Run, *, kind: str = "relative") -> Scores:
    """Squared rounding error of each weight; no data is used."""
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}; wanted 'error', 'relative' or 'ratio'")
    layers = range(len(run.task.layers))
    errors = np.array(
        [[float(run.variants.change(i, b).double().square().sum()) for b in range(len(run.schemes))] for i in layers]
    )
    if kind == "error":
        return run.scores(errors, kind=kind)
    norms = np.array([float(run.variants.parameter(i).detach().double().square().sum()) for i in layers])
    widest = int(run.widths().argmax())
    base = norms if kind == "relative" else errors[:, widest]
    return run.scores(errors / np.where(base > 0, base, 1.0)[:, None], kind=kind)


def work(run: Run, *, kind: str = "relative") -> Work:
    return Work(0, 0.0, 0)


def score_size(run: Run) -> Scores:
    """Every bit of width is worth the same in every layer: the answer depends on sizes alone.

    The control that a method has to beat: it is what OMPQ's objective becomes when its importance factors are
    all equal.
    """
    bits = run.widths()
    return run.scores(np.tile(bits.max() - bits, (len(run.task.layers), 1)))


def work_size(run: Run) -> Work:
    return Work(0, 0.0, 0)
