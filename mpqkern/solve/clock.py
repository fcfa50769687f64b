"""What is left of a time limit, for calls that share one."""

from __future__ import annotations

import time


class Clock:
    """Seconds left of a limit from now on; None: no limit."""

    def __init__(self, limit: float | None) -> None:
        self._end = None if limit is None else time.perf_counter() + limit

    def left(self) -> float | None:
        return None if self._end is None else max(self._end - time.perf_counter(), 0.0)

    def over(self) -> bool:
        return self._end is not None and time.perf_counter() >= self._end
