"""Cross-layer problems small enough to enumerate, and a search that can be held short."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest

from mpqkern.solve import quadratic
from mpqkern.solve.prepare import evaluate
from mpqkern.solve.quadratic import Outcome, minimise

needs_host = pytest.mark.skipif(quadratic._host is None, reason=f"no mpqkern._host: {quadratic.why_no_host}")


KINDS = ("indefinite", "psd", "spread", "equal", "zero")


@dataclass
class Case:
    unary: np.ndarray
    pairwise: np.ndarray
    rows: np.ndarray
    caps: np.ndarray
    allowed: np.ndarray

    def solve(self, **options: object) -> Outcome:
        return minimise(self.unary, self.pairwise, self.rows, self.caps, self.allowed, **options)

    def fits(self, choice: np.ndarray) -> bool:
        at = np.arange(len(choice))
        within = all(row[at, choice].sum() <= cap for row, cap in zip(self.rows, self.caps, strict=True))
        return within and bool(self.allowed[at, choice].all())

    def enumerate(self) -> tuple[float, np.ndarray | None]:
        best, arg = np.inf, None
        for picks in itertools.product(*(np.flatnonzero(row) for row in self.allowed)):
            choice = np.array(picks)
            if self.fits(choice) and (value := evaluate(self.unary, self.pairwise, choice)) < best:
                best, arg = value, choice
        return best, arg

    def largest(self) -> float:
        return max(np.abs(self.unary).max(), np.abs(self.pairwise).max())

    def scaled(self, factor: float) -> Case:
        return Case(self.unary * factor, self.pairwise * factor, self.rows, self.caps, self.allowed)


def split(matrix: np.ndarray, layers: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """unary and pairwise of 1/2 x'Gx."""
    pairs = matrix.reshape(layers, width, layers, width).copy()
    for layer in range(layers):
        pairs[layer, :, layer] = 0
    return matrix.diagonal().reshape(layers, width) / 2, pairs


def case(seed: int, layers: int, width: int, budgets: int, kind: str = "indefinite") -> Case:
    """Random costs; whole uses, and caps that are the exact use of some choice."""
    rng = np.random.default_rng(seed)
    n = layers * width
    normal = rng.normal(size=(n, n))
    matrix = normal @ normal.T if kind == "psd" else normal + normal.T
    if kind == "spread":  # magnitudes from 1e-12 to 1e6
        size = 10.0 ** rng.integers(-6, 4, n)
        matrix *= np.sqrt(np.outer(size, size)) * 1e-3
    if kind == "equal":
        matrix = np.ones((n, n))
    if kind == "zero":
        matrix = np.zeros((n, n))
    rows = rng.integers(1, 50, (budgets, layers, width))
    picks = rng.integers(0, width, layers)
    caps = rows[:, np.arange(layers), picks].sum(axis=1)
    if seed % 7 == 3 and budgets:
        caps[0] = rows[0].min(axis=1).sum() - (seed % 2)  # just the least use, or one less
    if seed % 4 == 1:
        rows, caps = rows / 8.0, caps / 8.0 + 0.01
    allowed = np.ones((layers, width), dtype=bool)
    if seed % 3 == 2:
        allowed = rng.random((layers, width)) < 0.7
        allowed[np.arange(layers), picks] = True
    if seed % 11 == 5:  # one choice left
        allowed[0] = np.arange(width) == picks[0]
    return Case(*split(matrix, layers, width), rows, caps, allowed)


def hard() -> Case:
    """A spin glass: no bound closes it within a minute."""
    return case(4, 60, 3, 1)


class Shy:
    """_host with a shorter local search and smaller trees; `calls` has what both were asked for."""

    def __init__(self, kicks: int, work: float = np.inf) -> None:
        self.host, self.kicks, self.work, self.calls = quadratic._host, kicks, work, []

    def local_search(self, **k: object) -> dict:
        self.calls.append(k)
        return self.host.local_search(**k | {"kicks": self.kicks})

    def tree(self, **k: object) -> dict:
        self.calls.append(k)
        return self.host.tree(**k | {"work": min(k["work"], self.work)})
