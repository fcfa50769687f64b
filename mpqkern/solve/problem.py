"""The arrays a solver works on: tied layers merged into one, budgets as integer rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..scores.table import Scores
from .budget import MAX_SUM, Budget, Row
from .constraints import Constraints


@dataclass(frozen=True, eq=False)
class Problem:
    """min cost(x) over one choice a unit, `sum_u values[k, u, x_u] <= caps[k]`, choices from `allowed`."""

    scores: Scores
    labels: list[Row]  # the rows before ties were merged: labels and units
    groups: list[list[int]]  # layers of each unit
    unary: np.ndarray  # float64 [units, schemes]
    pairwise: np.ndarray | None  # float64 [units, schemes, units, schemes]
    rows: np.ndarray  # int64 [budgets, units, schemes]
    caps: np.ndarray  # int64 [budgets]
    allowed: np.ndarray  # bool [units, schemes]

    def expand(self, choice: Sequence[int] | np.ndarray) -> np.ndarray:
        """One choice (or any number) a layer from one a unit."""
        choice = np.asarray(choice)
        layers = np.empty(len(self.scores.layers), dtype=choice.dtype)
        for group, value in zip(self.groups, choice, strict=True):
            layers[group] = value
        return layers

    def use(self, choice: Sequence[int]) -> np.ndarray:
        """What a choice per unit spends of every budget, exactly."""
        return spent(self.rows, choice)

    def least(self) -> np.ndarray:
        """The least that can be spent of each budget when it is the only one."""
        return np.where(self.allowed, self.rows, MAX_SUM).min(axis=2).sum(axis=1)


def spent(rows: np.ndarray, choice: Sequence[int]) -> np.ndarray:
    return rows[:, np.arange(rows.shape[1]), np.asarray(choice)].sum(axis=1)


def make_problem(scores: Scores, budgets: Sequence[Budget], constraints: Constraints) -> Problem:
    rows, taken = [], set()
    for row in [b.row(scores.layers, scores.schemes) for b in budgets] + constraints.rows(scores):
        label, count = row.label, 1
        while label in taken:
            count += 1
            label = f"{row.label}#{count}"
        taken.add(label)
        rows.append(Row(label, row.values, row.cap, row.per, row.unit))
    groups = constraints.groups(scores)
    allowed = constraints.allowed(scores)
    size = (len(groups), len(scores.schemes))
    values = np.zeros((len(rows), *size), dtype=np.int64)
    for k, row in enumerate(rows):
        values[k] = [row.values[group].sum(axis=0) for group in groups]
    unary, pairwise = _merge(scores, groups)
    return Problem(
        scores,
        rows,
        groups,
        unary,
        pairwise,
        values,
        np.array([min(max(row.cap, -MAX_SUM), MAX_SUM) for row in rows], dtype=np.int64),
        np.array([allowed[group].all(axis=0) for group in groups]),
    )


def _merge(scores: Scores, groups: list[list[int]]) -> tuple[np.ndarray, np.ndarray | None]:
    """Costs of units: within a tied group all layers have the same choice, so their pairs become unary."""
    unary = np.array([scores.unary[group].sum(axis=0) for group in groups])
    if scores.pairwise is None:
        return unary, None
    if len(groups) == len(scores.layers):
        return unary, scores.pairwise
    width = len(scores.schemes)
    left = np.array([scores.pairwise[group].sum(axis=0) for group in groups])
    pairwise = np.array([left[:, :, group].sum(axis=2) for group in groups])  # [unit m, unit l, b, c]
    pairwise = np.ascontiguousarray(pairwise.transpose(1, 2, 0, 3))
    for u in range(len(groups)):
        unary[u] += pairwise[u, range(width), u, range(width)] / 2
        pairwise[u, :, u, :] = 0.0
    return unary, (pairwise + pairwise.transpose(2, 3, 0, 1)) / 2
