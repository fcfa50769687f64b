"""How much to trust the inputs that were seen: a damping that holds on those that were not.

With few rows for many columns, weights that fit these very inputs best do harm on others. So half of the inputs are
left out, and what was found on the rest is tried on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..numbers import check_flag, check_number
from ..scheme import Scheme
from .grid import SEARCHES, Codes, Grid
from .method import Rounding
from .statistics import Statistics

DAMPINGS = (0.01, 0.1, 1.0)  # of H's mean diagonal; the first where there are rows enough
ENOUGH = 20  # rows for each column
ROWS = 64  # of the weight that are tried


def damping(rows: Tensor, statistics: Statistics, attempt: Callable[[Tensor, Statistics, float], Tensor]) -> float:
    """The one of `DAMPINGS` whose `attempt(rows, statistics, damping)`, values [N, K], does best on other inputs."""
    if statistics.half is None:
        return DAMPINGS[0]
    if len(statistics.h) == 1 and len(rows) > ROWS:
        rows = rows[:: -(-len(rows) // ROWS)]
    folds = [(seen, other) for seen, other in statistics.folds() if seen.count and other.count]
    found = {d: sum(other.excess(rows, attempt(rows, seen, d)) for seen, other in folds) for d in DAMPINGS}
    return min(found, key=found.__getitem__)


@dataclass(frozen=True, kw_only=True)
class Damped(Rounding):
    """What roundings towards the float layer's output on the float model's inputs have in common.

    damp      of H's mean diagonal is added to the diagonals of H and G; None: 0.01, or where inputs are few, what does
              best on inputs left out
    grid      of the weights to round: "minmax", "mse", or "output" (the range with the least error of the output)
    mismatch  False aims at the float layer's output on the inputs that it will meet instead
    """

    needs: ClassVar[str] = "inputs"

    damp: float | None = None
    grid: str = "output"
    mismatch: bool = True

    def __post_init__(self) -> None:
        check_number("damp", self.damp, "a number above 0, or None", lambda v: v > 0, optional=True)
        if self.grid not in SEARCHES:
            raise ValueError(f"grid={self.grid!r}; wanted 'minmax', 'mse' or 'output'")
        check_flag("mismatch", self.mismatch)

    def round(self, rows: Tensor, scheme: Scheme, statistics: Statistics | None = None) -> Codes:
        if statistics is None:
            raise ValueError(f"statistics=None; wanted those of the layer's inputs, which {self.name!r} needs")

        def attempt(some: Tensor, seen: Statistics, damp: float) -> Tensor:
            grid, codes = self.codes(some, scheme, seen, damp)
            return grid.values(codes)

        grid, codes = self.codes(rows, scheme, statistics, self.damp or damping(rows, statistics, attempt))
        return grid.chosen(codes)

    def codes(self, rows: Tensor, scheme: Scheme, statistics: Statistics, damp: float) -> tuple[Grid, Tensor]:
        """A grid and fp64 codes on it, for a damping that is settled."""
        raise TypeError(f"{type(self).__name__} is abstract; wanted one of its subclasses")
