"""Meter: how far a measurement is, how long it will take, and when it has to stop."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from tqdm import tqdm

from ..numbers import check_number

log = logging.getLogger("mpqkern")


@dataclass(frozen=True)
class Work:
    """What a measurement will take."""

    evaluations: int  # losses, features or gradients of one batch
    forwards: float  # the same in full passes over all samples; a backward pass counts as two
    bytes: int  # held at once, besides the model and its batches
    seconds: float | None = None  # by a timed pass; None: not timed

    def __str__(self) -> str:
        time = "" if self.seconds is None else f", about {self.seconds:.3g} s"
        passes = f"{self.forwards:.4g} full passes"
        return f"{self.evaluations} evaluations ({passes}){time}, {self.bytes / 2**20:.3g} MiB"


class Unfinished(TimeoutError):
    """A limit was reached; what is measured is in the bank, if there is one, and the same call goes on from there."""


class Meter:
    """Counts evaluations, shows a bar on a terminal, and raises `Unfinished` at a limit."""

    def __init__(
        self, *, time_limit: float | None = None, max_evals: int | None = None, progress: bool | None = None
    ) -> None:
        for name, value, whole in (("time_limit", time_limit, False), ("max_evals", max_evals, True)):
            wanted = f"a {'whole ' * whole}number above 0, or None"
            check_number(name, value, wanted, lambda v: v > 0, whole=whole, optional=True)
        self.time_limit, self.max_evals, self.progress = time_limit, max_evals, progress
        self.started, self.evaluations, self._bar = time.perf_counter(), 0, None
        self._done = self._total = 0  # of what `begin` announced; a hidden bar does not count

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def begin(self, title: str, total: int) -> None:
        """A bar for `total` evaluations; none where stderr is no terminal, unless `progress` asks for it."""
        self.end()
        quiet = None if self.progress is None else not self.progress
        self._done, self._total = 0, total
        self._bar = tqdm(total=total, desc=title, unit="eval", disable=quiet, dynamic_ncols=True)

    def step(self, name: str, evaluations: int = 1, *, made: bool = True) -> None:
        """After each item; `made` is False for one that was in the bank already, which no limit counts."""
        self._done += evaluations
        if self._bar is not None:
            self._bar.set_postfix_str(name, refresh=False)
            self._bar.update(evaluations)
        if not made:
            return
        self.evaluations += evaluations
        if self.max_evals is not None and self.evaluations >= self.max_evals:
            self._stop(f"max_evals={self.max_evals}")
        if self.time_limit is not None and self.seconds >= self.time_limit:
            self._stop(f"time_limit={self.time_limit}")

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _stop(self, limit: str) -> None:
        if self._done < self._total:
            done = f"{self._done} of {self._total} evaluations"
            raise Unfinished(f"{limit} was reached after {done}; the same call with its bank goes on from there")
