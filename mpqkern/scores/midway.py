"""Midway: one run of a model in which calls that were done before are skipped, and what it needs for that.

Skipped calls return what they returned before, as far as the rest of the run needs it: a *state*. Which outputs these
are is found by trying: a cut where the answer changes without an output needs it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_map

from ..measuring.task import Task
from ..trees import copied
from .calls import Calls, Key, forwards
from .nothing import Nothing, Shape
from .stacking import equal, joined, repeated, split

State = dict[Key, Any]  # outputs of the calls that are still needed
Filling = float | None


class AnotherWay(RuntimeError):
    """The model decides by its data which modules to call."""


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


class Midway:
    """One batch of a task, ready to be run again without the calls that are to be skipped."""

    def __init__(self, task: Task, index: int) -> None:
        self.task, self.index, self.size = task, index, task.sizes[index]
        self.batch = task.batches[index]
        self.calls = Calls(task, index)

    def run(
        self,
        skip: Sequence[Key],
        states: Sequence[State],
        capture: Sequence[Key] | None = None,
        stop: bool = False,
        filling: Filling = 0.0,
    ) -> tuple[list[Any], list[State]]:
        """Outputs and, with `capture`, new states; `stop` ends the run as soon as these are there.

        Skipped calls return what the states hold for them, or a tensor of the right shape: full of `filling`, or
        (None) with nothing in it, so that what the code between the modules does to it costs nothing.
        """
        n = len(states)
        given = {key: joined([state[key] for state in states]) for key in states[0]}
        found = {key: given[key] for key in capture or () if key in given}
        missing = set(capture or ()) - set(found)
        if stop and not missing:
            return [], self._states(found, n)
        inside = {key: self.calls[key].inside for key in skip}
        seen: Counter[int] = Counter()

        def wrap(number: int, original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                key = (number, seen[number])
                seen[number] += 1
                if key in inside:
                    seen.update(k[0] for k in inside[key])
                    if key not in given:
                        return self._placeholder(key, n, filling)
                    # The code that follows may write to it. What was joined for this run alone it may have.
                    return copied(given[key]) if n == 1 or key in found else given[key]
                output = original(*args, **kwargs)
                if key in missing:
                    missing.discard(key)
                    found[key] = copied(output)
                    if stop and not missing:
                        raise _Stop
                return output

            return forward

        counted = {key[0] for key in [*skip, *missing, *(k for keys in inside.values() for k in keys)]}
        modules = self.calls.modules
        with forwards([modules[number] for number in counted], [partial(wrap, number) for number in counted]):
            try:
                outputs = split(self.task.answer(repeated(self.batch, self.size, n)), self.size, n)
            except _Stop:
                outputs = []
        if missing:
            raise AnotherWay(f"the model took another way than on its first run: {len(missing)} calls are missing")
        return outputs, self._states(found, n) if capture is not None else []

    def needed(self, skip: Sequence[Key]) -> tuple[list[Key], Filling] | None:
        """Which of the skipped outputs the rest of the run needs, and what can stand for the others; None where it
        cannot be run from here.

        First guesses are the last output of all and the last one at each depth of the call tree, which is what
        chains and residual blocks need; then each of those is left out in turn, to see whether it is missed.
        """
        if not skip:
            return [], None
        try:
            clean = self.run([], [{}], skip, stop=True)[1][0]
        except RuntimeError:
            return None
        last = {self.calls[key].parent: key for key in skip}
        for guess in ([skip[-1]], list(last.values()), list(skip)):
            fillings = self._fillings(skip, clean, guess)
            if fillings:
                break
        else:
            return None
        for key in list(guess) if len(guess) > 1 else ():
            rest = [k for k in guess if k != key]
            found = self._fillings(skip, clean, rest)
            if found:
                guess, fillings = rest, found
        return guess, fillings[0]

    def _fillings(self, skip: Sequence[Key], clean: State, needed: Sequence[Key]) -> list[Filling]:
        """What can stand for the outputs that are not needed, if the run from a cut then gives the clean output.

        Nothing, or, where the code in between asks for a shape, zeros: tried as NaN, so that their use is seen.
        """
        state = {key: clean[key] for key in needed}
        for stands, tried in ((None, None), (0.0, torch.nan)):
            try:
                if equal(self.run(skip, [state], filling=tried)[0][0], self.calls.output):
                    return [stands]
            except Exception:  # the code in between stumbles over the placeholders
                continue
        return []

    def _states(self, found: State, n: int) -> list[State]:
        parts = {key: split(value, self.size, n) for key, value in found.items()}
        return [{key: values[i] for key, values in parts.items()} for i in range(n)]

    def _placeholder(self, key: Key, n: int, filling: Filling) -> Any:
        """Stands for an output that nobody needs."""

        def make(leaf: Any) -> Any:
            if not isinstance(leaf, Shape):
                return leaf
            shape = (leaf.shape[0] * n, *leaf.shape[1:]) if leaf.shape[:1] == (self.size,) else leaf.shape
            if filling is None:
                return Nothing(shape, leaf)
            blank = torch.zeros(shape, dtype=leaf.dtype, device=leaf.device)
            return blank.fill_(filling) if filling != 0 and leaf.dtype.is_floating_point else blank

        return tree_map(make, self.calls[key].shapes)
