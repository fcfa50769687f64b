"""Samples: measured losses sample by sample, and what may be concluded from them about all other samples.

With L the loss of the reference, L_lb with scheme b in layer l alone and L_lb,mc with scheme c in layer m as well,

    alone(l)[b]      L_lb - L
    pair(l, m)[b, c] L_lb,mc - L_lb - L_mc + L

for each sample: differences of losses of the same sample, so what its own difficulty adds is gone before any error
is estimated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..measuring.bank import Item
from ..numbers import check_number
from ..scheme import Layer, Scheme
from .table import Scores

SHRINKS = (None, "error")
Tables = tuple[np.ndarray, np.ndarray | None]  # unary, pairwise


class Samples:
    """`batches` are the items of `perturbed`: of each batch the base, and that of each layer."""

    def __init__(
        self,
        layers: Sequence[Layer],
        schemes: Sequence[Scheme | None],
        batches: Sequence[tuple[Item, Mapping[int, Item]]],
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        self.layers, self.schemes, self.batches = list(layers), list(schemes), list(batches)
        self.provenance = dict(provenance or {})
        self.reference = np.concatenate([base["loss"] for base, _ in self.batches])
        self.count = len(self.reference)
        self._columns = [{layer: _columns(item) for layer, item in items.items()} for _, items in self.batches]

    def alone(self, layer: int) -> np.ndarray:
        """[schemes, samples]; zero where there was nothing to change."""
        parts = []
        for base, items in self.batches:
            part = np.zeros((len(self.schemes), len(base["loss"])))
            if layer in items:
                part[base["schemes"]] = items[layer]["loss"][:, 0] - base["loss"]
            parts.append(part)
        return np.concatenate(parts, axis=1)

    def pair(self, one: int, other: int) -> np.ndarray:
        """[schemes of one, schemes of the other, samples]; zero where they were not measured together."""
        parts = []
        for (base, items), columns in zip(self.batches, self._columns, strict=True):
            part = np.zeros((len(self.schemes), len(self.schemes), len(base["loss"])))
            for first, last in ((one, other), (other, one)):
                if first in columns.get(last, {}):
                    together = items[last]["loss"][:, columns[last][first]].transpose(1, 0, 2)
                    single = items[first]["loss"][:, :1] + items[last]["loss"][:, 0]
                    found = together - single + base["loss"]
                    part[np.ix_(base["schemes"], base["schemes"])] = found if first == one else found.swapaxes(0, 1)
            parts.append(part)
        return np.concatenate(parts, axis=2)

    def scores(self, *, trim: float = 0.0, shrink: str | None = None) -> Scores:
        """Means over the samples.

        trim    this share of the samples is left out of each mean at either end, against a few that decide it
        shrink  "error" multiplies each pair's mean m, with standard error e, by m^2 / (m^2 + e^2): what is
                within its noise goes towards the diagonal, and nothing becomes zero
        """
        check_number("trim", trim, "a share of the samples from 0 to below 0.5", lambda v: 0 <= v < 0.5)
        if shrink not in SHRINKS:
            raise ValueError(f"shrink={shrink!r}; wanted None or 'error'")
        out = int(trim * self.count)

        def mean(values: np.ndarray) -> np.ndarray:
            return np.sort(values, axis=-1)[..., out : self.count - out].mean(-1) if out else values.mean(-1)

        unary, pairwise = self._tables(mean)
        if shrink and pairwise is not None:
            noise = self.errors()[1] ** 2
            pairwise *= np.divide(pairwise**2, pairwise**2 + noise, out=np.zeros_like(noise), where=pairwise != 0)
        return self._made(unary, pairwise)

    def errors(self) -> Tables:
        """Standard errors of the means, in the shapes of `Scores.unary` and `Scores.pairwise`."""
        if self.count < 2:
            raise ValueError(f"there are standard errors of 2 samples or more, and here is {self.count}")
        return self._tables(lambda values: values.std(-1, ddof=1) / np.sqrt(self.count))

    def resample(self, generator: torch.Generator) -> Scores:
        """The scores of as many samples drawn from these with replacement: one replicate of a bootstrap."""
        drawn = torch.randint(self.count, (self.count,), generator=generator)
        weights = torch.bincount(drawn, minlength=self.count).double().numpy() / self.count
        return self._made(*self._tables(lambda values: values @ weights))

    def _tables(self, reduce: Callable[[np.ndarray], np.ndarray]) -> Tables:
        size = (len(self.layers), len(self.schemes))
        unary, pairwise = np.zeros(size), np.zeros(size + size)
        for one in range(size[0]):
            unary[one] = reduce(self.alone(one))
            for other in range(one):
                if self._together(one, other):
                    pairwise[other, :, one, :] = reduce(self.pair(other, one))
                    pairwise[one, :, other, :] = pairwise[other, :, one, :].T
        return unary, pairwise if any(map(any, (c.values() for c in self._columns))) else None

    def _together(self, one: int, other: int) -> bool:
        return any(one in columns.get(other, {}) or other in columns.get(one, {}) for columns in self._columns)

    def _made(self, unary: np.ndarray, pairwise: np.ndarray | None) -> Scores:
        return Scores(self.layers, self.schemes, unary, pairwise, self.provenance)


def _columns(item: Item) -> dict[int, list[int]]:
    """Of each layer changed before: the columns of its schemes in an item's losses, in the order they were tried."""
    found: dict[int, dict[int, int]] = {}
    for column, (layer, scheme) in enumerate(item["states"].tolist()):
        found.setdefault(layer, {})[scheme] = 1 + column
    return {layer: [by[scheme] for scheme in sorted(by)] for layer, by in found.items()}
