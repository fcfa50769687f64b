"""Who has seen whose accesses to shared memory, where threads meet at mbarriers and not at barriers of the block."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Order:
    """Times are counts of instructions. A warp has seen all that another did up to `seen[warp, other]`, and of its
    own lanes what they did before they last met. A barrier of the block is not recorded here: Shared.epoch is."""

    def __init__(self, warps: int, size: int, now: int) -> None:
        self.now = now
        self.seen = np.full((warps, warps), -1, np.int64)
        self.wrote = np.full(size, -1, np.int64)
        self.read = np.full((warps, size), -1, np.int64)  # last, by each warp

    def record(self, places: NDArray, threads: NDArray, write: bool) -> None:
        if write:
            self.wrote[places] = self.now
        else:
            self.read[threads // 32, places] = self.now

    def after_write(self, places: NDArray, threads: NDArray, writer: NDArray) -> NDArray:
        """Which of these accesses come after the last write for sure."""
        return self.wrote[places] <= self.seen[threads // 32, writer // 32]

    def after_reads(self, places: NDArray, threads: NDArray) -> NDArray:
        return (self.read[:, places] <= self.seen[threads // 32].T).all(0)

    def meet(self, mask: NDArray) -> None:
        """Lanes of each warp have met."""
        for w in np.nonzero(mask.reshape(-1, 32).any(1))[0]:
            self.seen[w, w] = self.now

    def shown(self, mask: NDArray) -> NDArray:
        """What these threads' arrival tells: a lane alone can answer for its warp up to where its lanes met."""
        lanes = mask.reshape(-1, 32)
        all_of = self.seen[lanes.any(1)].max(0)
        for w in np.nonzero(lanes.all(1))[0]:
            all_of[w] = self.now
        return all_of

    def learn(self, mask: NDArray, shown: NDArray) -> None:
        some = mask.reshape(-1, 32).any(1)
        self.seen[some] = np.maximum(self.seen[some], shown)
