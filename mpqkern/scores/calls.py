"""Calls: which modules a model calls, in which order and within which, and how to put something in their place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..measuring.task import Task
from ..trees import bytes_in
from .nothing import Shape, Watch
from .stacking import can_stack

Key = tuple[int, int]  # index of a module, and which of its calls this is


@dataclass
class Call:
    """One call of a module. `start` and `end` are of a clock that ticks at each start and end of a call."""

    key: Key
    parent: Key | None
    start: int
    end: int = -1
    inside: list[Key] = field(default_factory=list)  # calls within this one
    shapes: Any = None  # the output, each tensor replaced by its Shape
    stacks: bool = False  # whether outputs of several states can be joined along the batch axis
    bytes: int = 0

    @property
    def place(self) -> tuple[Any, ...]:
        """The same for the same call on another batch."""
        return self.key, self.parent, self.start, self.end, self.stacks


class Calls:
    """All calls of one clean run on a batch, `in_order` of their starts, and its `output`.

    `looked` tells whether the model has read numbers out of tensors, as decisions by data do.
    """

    def __init__(self, task: Task, index: int) -> None:
        self.modules = list(dict.fromkeys(task.model.modules()))[1:]  # all but the model itself
        self.in_order: list[Call] = []
        self._running: list[Call] = []
        self._seen: Counter[int] = Counter()
        self._clock, self._size = count(), task.sizes[index]
        wrappers = [partial(self._noting, number) for number in range(len(self.modules))]
        with forwards(self.modules, wrappers), Watch() as watch:
            self.output = task.answer(task.batches[index])
        self.looked = watch.looked
        self._by_key = {call.key: call for call in self.in_order}

    def __getitem__(self, key: Key) -> Call:
        return self._by_key[key]

    def of(self, modules: Sequence[nn.Module]) -> list[Call]:
        """The calls of these modules."""
        wanted = set(map(id, modules))
        return [call for call in self.in_order if id(self.modules[call.key[0]]) in wanted]

    def done_before(self, start: int) -> list[Key]:
        """The outermost calls that had ended by then, in order."""
        done = [call for call in self.in_order if call.end < start]
        ended = {call.key for call in done}
        return [call.key for call in done if call.parent not in ended]

    def _noting(self, number: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            running = self._running
            call = Call((number, self._seen[number]), running[-1].key if running else None, next(self._clock))
            self._seen[number] += 1
            for outer in running:
                outer.inside.append(call.key)
            self.in_order.append(call)
            running.append(call)
            try:
                output = original(*args, **kwargs)
            finally:
                running.pop()
            call.end = next(self._clock)
            call.shapes = tree_map(lambda x: Shape(x) if isinstance(x, Tensor) else x, output)
            call.stacks = can_stack(output, self._size)
            call.bytes = bytes_in(output)
            return output

        return forward


class forwards:
    """Context: `forward` of each module replaced by what its wrapper makes of it."""

    def __init__(self, modules: Sequence[nn.Module], wrappers: Sequence[Callable[[Any], Any]]) -> None:
        self.modules, self.wrappers = modules, wrappers

    def __enter__(self) -> None:
        self.before = [module.__dict__.get("forward") for module in self.modules]
        for module, wrapper in zip(self.modules, self.wrappers, strict=True):
            vars(module)["forward"] = wrapper(module.forward)  # past Module.__setattr__, which is slow

    def __exit__(self, *_: object) -> None:
        for module, before in zip(self.modules, self.before, strict=True):
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                vars(module)["forward"] = before
