"""Run: everything a method gets to work with, and what a method is."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..held import held
from ..measuring.bank import Bank
from ..measuring.meter import Meter, Work
from ..measuring.task import Task, digest
from ..scheme import Scheme
from .replay import Replay
from .table import FLOAT_BITS, Scores
from .variants import Variants

TRACED_SAMPLES = 3


@dataclass
class Run:
    """A task, the schemes to score, and the means: quantizer, bank, meter, memory, seed."""

    task: Task
    schemes: list[Scheme | None]
    variants: Variants
    bank: Bank
    meter: Meter
    memory: int  # bytes that a method may hold besides the model and the batches
    seed: int
    _traced: Replay | None = field(default=None, init=False, repr=False)

    def widths(self) -> np.ndarray:
        """Bits of each scheme; 32 for float."""
        return np.array([FLOAT_BITS if s is None else s.bits for s in self.schemes], dtype=np.float64)

    def replay(self, index: int) -> Replay:
        """A batch to be run from the middle. Where to cut is sought on a few samples, then tried on this batch."""
        if self._traced is not None and (self._traced.task, self._traced.index) == (self.task, index):
            return self._traced
        self._traced = self._traced or Replay(self.task.split(TRACED_SAMPLES), 0)
        found = Replay(self.task, index, like=self._traced)
        if not found.why_not:
            self._traced = found
        return found

    def key(self, index: int, *parts: str | int) -> str:
        """Names an item of a batch by the contents of the batch."""
        return "/".join(map(str, (self.task.digest(index), *parts)))

    def generator(self, index: int, *parts: str | int) -> torch.Generator:
        """Random numbers for one item of a batch: the same ones in whatever order the items are made."""
        return torch.Generator().manual_seed(int(digest([self.seed, self.task.digest(index), *parts]), 16))

    def seconds_a_pass(self) -> float:
        """One forward pass over all samples, by the median of timed passes over the first batch: a single one may be
        a hundred times too long where other programs want the same cores."""
        times: list[float] = []
        with held(self.task.model):
            self.task.run(self.task.batches[0])
            while not times or (len(times) < 5 and sum(times) < 1):
                start = time.perf_counter()
                self.task.run(self.task.batches[0])
                times.append(time.perf_counter() - start)
        return statistics.median(times) / self.task.sizes[0] * self.task.samples

    def scores(self, unary: Any, pairwise: Any = None, **notes: Any) -> Scores:
        """The table [layers, schemes]; notes go to its provenance."""
        return Scores(self.task.layers, self.schemes, unary, pairwise, notes)


@dataclass(frozen=True)
class Method:
    """`score(run, **options)` measures; `work(run, **options)` says beforehand what that takes."""

    name: str
    summary: str
    score: Callable[..., Scores]
    work: Callable[..., Work]
    afterwards: Sequence[str] = ()  # what acts on measurements only: a bank serves all values of it

    def check(self, options: dict[str, Any]) -> None:
        """Raise for an option that the method does not have."""
        parameters = list(inspect.signature(self.score).parameters.values())[1:]
        if any(p.kind == p.VAR_KEYWORD for p in parameters):
            return
        known = [p.name for p in parameters]
        for name in options:
            if name not in known:
                wanted = f"one of {', '.join(known)}" if known else "none"
                raise TypeError(f"{name}={options[name]!r} is no option of method {self.name!r}; wanted {wanted}")


def as_schemes(bits: Sequence[Scheme | int | None]) -> list[Scheme | None]:
    """Bit widths, schemes or None (float), as schemes."""
    if isinstance(bits, (int, Scheme)) or not len(bits):
        raise ValueError(f"bits={bits!r}; wanted a sequence of bit widths or schemes, for instance (2, 4, 8)")
    found = [Scheme(b) if isinstance(b, int) and not isinstance(b, bool) else b for b in bits]
    for scheme in found:
        if scheme is not None and not isinstance(scheme, Scheme):
            raise ValueError(f"bits: found {scheme!r}; wanted bit widths, Scheme objects or None")
    return found
