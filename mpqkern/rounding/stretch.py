"""Stretch: as much of a model as has to run so that the layers of one part are called.

Layer after layer is rounded, and each looks at all batches. What comes before a block does not change while its
layers are rounded, so its inputs are kept and only the block runs.
"""

from __future__ import annotations

import logging
from collections.abc import Set
from contextlib import nullcontext, suppress
from typing import Any

from torch import Tensor, nn

from ..held import hooked
from ..measuring.task import Task
from ..trees import bytes_in, copied, tensors
from .examples import Given, close
from .partition import Part
from .twin import Twin

log = logging.getLogger("mpqkern")

TOLERANCE = 1e-4  # of the largest output, between a call in the model and the same call again


class Enough(BaseException):
    """Ends a pass when nothing more is to be seen. No `except Exception` of a model's own code stops it."""


class Stretch:
    """Passes over the batches: through the whole model, or through a part of it from inputs that were kept."""

    def __init__(
        self,
        task: Task,
        twin: Twin | None,
        part: Part | None = None,
        once: Set[nn.Module] = frozenset(),
        *,
        floats: bool = True,
        memory: int = 0,
    ) -> None:
        """Without a part, or where its inputs take more than `memory` bytes, all passes are whole ones.

        `once` has the modules that a pass calls just once; `floats` is whether passes through the float model are
        asked for as well.
        """
        self.task, self.twin, self.once = task, twin, once
        self._kept: dict[bool, list[Given]] = {}  # whether in the twin: what the module is given, by batch
        self._chain = part.chains[0] if part is not None and len(part.chains) == 1 else ()
        if self._chain and once.issuperset(self._chain):
            self._keep([True, False] if floats else [True], memory)

    def run(self, index: int, *, rounded: bool) -> None:
        """Calls the part's layers for batch `index`, in the twin if `rounded`; hooks may end it by `Enough`."""
        with self._as(rounded), suppress(Enough):
            if self._kept:
                self._play(self._kept[rounded][index])
            else:
                self.task.run(self.task.batches[index])

    def _play(self, given: Given) -> Any:
        args, kwargs = copied(given)
        for module in self._chain:
            output = module(*args, **kwargs)
            args, kwargs = (output,), {}
        return output

    def _as(self, rounded: bool) -> Any:
        return self.twin if rounded and self.twin is not None else nullcontext()

    def _keep(self, ways: list[bool], memory: int) -> None:
        kept: dict[bool, list[Given]] = {}
        used, first = 0, {}
        for rounded in ways:
            kept[rounded] = []
            for index in range(len(self.task.batches)):
                calls = self._calls(index, rounded)
                used += sum(bytes_in(given) for given, _ in calls)
                if len(calls) != 1 or used > memory:
                    return
                kept[rounded].append(calls[0][0])
                first.setdefault(rounded, calls[0][1])
        self._kept = kept
        for rounded, wanted in first.items():  # by now the model has seen other batches
            if not self._again(rounded, wanted):
                log.warning("a block answers otherwise when it is called alone: whole passes are made for its layers")
                self._kept = {}
                return

    def _calls(self, index: int, rounded: bool) -> list[tuple[Given, Any]]:
        """What the module is given in a pass over a batch, and what it returns."""
        given: list[Given] = []
        found: list[tuple[Given, Any]] = []

        def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
            given.append(copied((args, kwargs)))

        def end(module: nn.Module, args: tuple, output: Any) -> None:
            found.append((given.pop(), tensors(copied(output))))
            raise Enough

        first, last = self._chain[0], self._chain[-1]
        handles = [first.register_forward_pre_hook(begin, with_kwargs=True), last.register_forward_hook(end)]
        with hooked(handles), self._as(rounded), suppress(Enough):
            self.task.run(self.task.batches[index])
        return found

    def _again(self, rounded: bool, wanted: list[Tensor]) -> bool:
        with self._as(rounded):
            got = tensors(self._play(self._kept[rounded][0]))
        return len(got) == len(wanted) and all(close(a, b, TOLERANCE) for a, b in zip(got, wanted, strict=True))
