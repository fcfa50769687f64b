"""Observers: where 8-bit activations should saturate, judged from the values that stream by.

Each watches one layer, or one group of a layer's inputs, in bounded memory. What it answers is a limit: the largest
value that still has an integer of its own, 127. The scale is limit / 127.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..numbers import check_number

# The uniform steps, in standard deviations, with the least squared error for a normal distribution and 2^bits levels
# at odd multiples of half a step (Max 1960).
STEPS = {1: 1.596, 2: 0.996, 3: 0.586, 4: 0.335, 5: 0.188, 6: 0.104, 7: 0.057, 8: 0.031}
MOST = 127  # the largest integer of 8 bits
BINS = 2048  # of a histogram: 16 a step of the scale that saturates nothing, never fewer than 8
FRACTIONS = 100  # of the largest value, which `Mse` tries as limits: 1, 0.99, ... 0.01


class Observer(ABC):
    """Made once for each layer or group; `update` is called with the inputs of every call of the layer."""

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Takes in fp32 values, at least one and all finite, in any shape."""

    @abstractmethod
    def limit(self) -> float:
        """The largest value to represent; 0 when all were 0."""


class Max(Observer):
    """The largest of all values: nothing that was seen saturates.

    >>> seen = Max()
    >>> seen.update(torch.tensor([0.5, -2.0]))
    >>> seen.limit()
    2.0
    """

    def __init__(self) -> None:
        self.top = 0.0

    def update(self, x: Tensor) -> None:
        self.top = max(self.top, float(x.abs().max()))

    def limit(self) -> float:
        return self.top


class Ema(Observer):
    """The exponential moving average of each call's largest value, from the first one on."""

    def __init__(self, momentum: float = 0.9) -> None:
        check_number("momentum", momentum, "a number from 0 to below 1", lambda v: 0 <= v < 1)
        self.momentum = momentum
        self.average: float | None = None

    def update(self, x: Tensor) -> None:
        top = float(x.abs().max())
        old = top if self.average is None else self.average
        self.average = self.momentum * old + (1 - self.momentum) * top

    def limit(self) -> float:
        return self.average or 0.0


class Gauss(Observer):
    """127 of the steps that are best for a normal distribution of the same root mean square (see `STEPS`).

    That is the standard deviation of the values and their mirror images, so it also fits what a ReLU has halved.
    """

    def __init__(self) -> None:
        self.squares, self.count = 0.0, 0

    def update(self, x: Tensor) -> None:
        self.squares += float(x.double().square().sum())
        self.count += x.numel()

    def limit(self) -> float:
        return MOST * STEPS[8] * (self.squares / max(self.count, 1)) ** 0.5


class Histogram(Observer):
    """Counts |x| in equal bins from 0 to `top`. A value beyond doubles `top`: pairs of bins become one, and no count
    is moved by guess. Exact zeros, which every scale represents, are counted apart."""

    def __init__(self) -> None:
        self.top, self.largest, self.zeros = 0.0, 0.0, 0
        self.counts = torch.zeros(BINS, dtype=torch.int64)

    def update(self, x: Tensor) -> None:
        values = x.abs().flatten().double()
        largest = float(values.max())
        self.largest = max(self.largest, largest)
        zero = values == 0
        self.zeros += int(zero.sum())
        if largest == 0:
            return
        if self.top == 0:
            self.top = largest
        while self.top < largest:
            pairs = self.counts.view(-1, 2).sum(1)
            self.counts = torch.cat([pairs, torch.zeros_like(pairs)])
            self.top *= 2
        bins = (values[~zero] / self.top * BINS).long().clamp(max=BINS - 1)
        self.counts += torch.bincount(bins, minlength=BINS).cpu()


class Percentile(Histogram):
    """The value that `percent` of all |x| do not exceed; the largest, where that many are 0."""

    def __init__(self, percent: float = 99.99) -> None:
        check_number("percent", percent, "a number above 0, at most 100", lambda v: 0 < v <= 100)
        super().__init__()
        self.percent = percent

    def limit(self) -> float:
        below = self.counts.cumsum(0).double() + self.zeros
        wanted = self.percent / 100 * float(below[-1])
        if wanted <= self.zeros:
            return self.largest
        bin = min(int(torch.searchsorted(below, wanted)), BINS - 1)
        share = 1 - (float(below[bin]) - wanted) / max(int(self.counts[bin]), 1)
        return min((bin + share) * self.top / BINS, self.largest)


class Mse(Histogram):
    """The limit, of a hundred fractions of the largest value, with the least squared error of rounding.

    >>> seen = Mse()
    >>> seen.update(torch.cat([torch.linspace(-1, 1, 9999), torch.tensor([1.3])]))
    >>> round(seen.limit(), 1)  # the one far out saturates, and all the others are rounded more finely
    1.2
    """

    def __init__(self, most: int = MOST) -> None:
        super().__init__()
        self.most = most

    def limit(self) -> float:
        limits = self.largest * torch.arange(FRACTIONS, 0, -1, dtype=torch.float64) / FRACTIONS
        if self.largest == 0:
            return 0.0
        scales = (limits / self.most).unsqueeze(1)
        edges = torch.linspace(0, self.top, BINS + 1, dtype=torch.float64) / scales
        # values are taken to lie evenly in their bin
        mean = _squared_distance(edges, self.most).diff() / edges.diff()
        errors = (mean * self.counts).sum(1) * scales.squeeze(1).square()
        return float(limits[errors.argmin()])


def _squared_distance(t: Tensor, most: int) -> Tensor:
    """The integral from 0 to t >= 0 of the squared distance to the nearest of 0, 1, ... most."""
    nearest = t.round().clamp(max=most)
    return nearest / 12 + (t - nearest) ** 3 / 3


OBSERVERS: dict[str, type[Observer]] = {"max": Max, "percentile": Percentile, "mse": Mse, "ema": Ema, "gauss": Gauss}
