"""Replay: runs a model from the middle, for many perturbed states at once, without tracing its code.

A perturbation of layer j leaves everything computed before j as it was. So the model's own `forward` is called
again, but modules that were done before j return what they returned before: their *state*. Only whole calls are
skipped, the outermost ones, so a state is small: after the third block of a residual network it is that block's
output. Which outputs are still needed is found by trying: a cut where the answer changes without an output needs it.

States are stacked along the batch axis as far as memory allows. With one state a run the numbers are, bit for bit,
those of the full forward pass; with more they may differ in the last bits where a kernel's order of sums depends
on the batch size.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from ..measuring.task import Task
from .nothing import Nothing, Shape, Watch
from .stacking import can_stack, close, copied, equal, joined, repeated, split

log = logging.getLogger("mpqkern")

Key = tuple[int, int]  # index of a module, and which of its calls this is
State = dict[Key, Any]  # outputs of the calls that are still needed
Filling = float | None


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


class AnotherWay(RuntimeError):
    """The model decides by its data which modules to call."""


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


class Replay:
    """One batch of a task, ready to be run from just before any layer; use it while the model is `held`.

    `order` has the layers by their first call (those never called are left out); position p is the cut before
    `order[p]`, and `depth` how many there are. Where `why_not` says why the model cannot be cut, only whole runs
    are possible.
    """

    def __init__(self, task: Task, index: int, like: Replay | None = None) -> None:
        """`like` is of another batch: if the same modules are called here, its cuts are tried first."""
        self.task, self.index, self.size = task, index, task.sizes[index]
        self.batch = task.batches[index]
        self.modules = list(dict.fromkeys(task.model.modules()))[1:]  # all but the model itself
        self.calls, self.output = self._trace()
        self._by_key = {call.key: call for call in self.calls}
        number = {id(module): i for i, module in enumerate(self.modules)}
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for layer, modules in enumerate(task.modules):
            own = {number[id(module)] for module in modules}
            starts = [call.start for call in self.calls if call.key[0] in own]
            if starts:
                first[layer] = min(starts)
                last[layer] = max(starts)
        self.order = sorted(first, key=first.__getitem__)
        self.skips = [self._done_before(first[layer]) for layer in self.order]
        self._first, self._last = first, last
        self.live: list[list[Key]] = []
        self.fillings: list[Filling] = []
        self.why_not: str | None = None
        adopted = self._adopts(like)
        if not adopted:
            self._find_cuts()
        live = {key for keys in self.live for key in keys}
        self.stackable = all(map(can_stack, [self.batch, self.output], [self.size] * 2)) and all(
            self._by_key[key].stacks for key in live
        )
        self.stackable &= not self._watch.looked  # it decides by what is in the whole batch
        if adopted:
            self.stackable &= like.stackable
        elif self.why_not is None and self.depth > 1:
            self._try_out()

    @property
    def depth(self) -> int:
        return len(self.order)

    def pending(self, layer: int, position: int) -> bool:
        """Whether a layer is called again after this cut: a state that it has changed needs it changed there too."""
        return self._last[layer] >= self._first[self.order[position]]

    def macs(self) -> list[int]:
        """Multiply-adds of a sample from each position to the end."""
        own = [self.task.layers[layer].macs or 0 for layer in self.order]
        return [sum(own[p:]) for p in range(self.depth)]

    def state_bytes(self, position: int) -> int:
        """Of one state at a cut."""
        return sum(self._by_key[key].bytes for key in self.live[position])

    def run_bytes(self) -> int:
        """What one state takes while it runs: about its three largest outputs."""
        return sum(sorted(call.bytes for call in self.calls)[-3:])

    def start(self) -> State:
        """The state at position 0."""
        return self._run([], [{}], self.live[0], stop=True)[1][0]

    def advance(self, position: int, states: Sequence[State], chunk: int = 1) -> list[State]:
        """The states at the next position, under the weights that the model has now; `chunk` states a run."""
        how = {"capture": self.live[position + 1], "stop": True, "filling": self.fillings[position]}
        return [s for part in self._chunks(states, chunk) for s in self._run(self.skips[position], part, **how)[1]]

    def finish(self, position: int, states: Sequence[State], chunk: int = 1) -> list[Any]:
        """The model's answer for each state."""
        skip, filling = self.skips[position], self.fillings[position]
        return [output for part in self._chunks(states, chunk) for output in self._run(skip, part, filling=filling)[0]]

    def finish_and_advance(self, position: int, state: State) -> tuple[Any, State | None]:
        """Both at once, for one state; no state after the last position."""
        last = position + 1 == self.depth
        capture, filling = None if last else self.live[position + 1], self.fillings[position]
        outputs, states = self._run(self.skips[position], [state], capture, filling=filling)
        return outputs[0], None if last else states[0]

    def _chunks(self, states: Sequence[State], chunk: int) -> list[Sequence[State]]:
        chunk = max(chunk, 1) if self.stackable else 1
        return [states[i : i + chunk] for i in range(0, len(states), chunk)]

    # ---- one run ---------------------------------------------------------------------------------------

    def _run(
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
        inside = {key: self._by_key[key].inside for key in skip}
        seen: Counter[int] = Counter()

        def wrap(number: int, original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                key = (number, seen[number])
                seen[number] += 1
                if key in inside:
                    seen.update(k[0] for k in inside[key])
                    # a copy, as the code that follows may write to it
                    return copied(given[key]) if key in given else self._placeholder(key, n, filling)
                output = original(*args, **kwargs)
                if key in missing:
                    found[key] = copied(output)
                    missing.discard(key)
                    if stop and not missing:
                        raise _Stop
                return output

            return forward

        counted = {key[0] for key in [*skip, *missing, *(k for keys in inside.values() for k in keys)]}
        with _forwards([self.modules[number] for number in counted], [partial(wrap, number) for number in counted]):
            try:
                outputs = split(self.task.answer(repeated(self.batch, self.size, n)), self.size, n)
            except _Stop:
                outputs = []
        if missing:
            raise AnotherWay(f"the model took another way than on its first run: {len(missing)} calls are missing")
        return outputs, self._states(found, n) if capture is not None else []

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

        return tree_map(make, self._by_key[key].shapes)

    # ---- finding the cuts ------------------------------------------------------------------------------

    def _trace(self) -> tuple[list[Call], Any]:
        """All calls of one clean run in order of their starts, and its output."""
        calls: list[Call] = []
        running: list[Call] = []
        seen: Counter[int] = Counter()
        clock = count()

        def wrap(number: int, original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                call = Call((number, seen[number]), running[-1].key if running else None, next(clock))
                seen[number] += 1
                for outer in running:
                    outer.inside.append(call.key)
                calls.append(call)
                running.append(call)
                try:
                    output = original(*args, **kwargs)
                finally:
                    running.pop()
                call.end = next(clock)
                call.shapes = tree_map(lambda x: Shape(x) if isinstance(x, Tensor) else x, output)
                call.stacks = can_stack(output, self.size)
                call.bytes = sum(x.nbytes for x in tree_flatten(output)[0] if isinstance(x, Tensor))
                return output

            return forward

        wrappers = [partial(wrap, number) for number in range(len(self.modules))]
        with _forwards(self.modules, wrappers), Watch() as self._watch:
            return calls, self.task.answer(self.batch)

    def _find_cuts(self) -> None:
        for layer, skip in zip(self.order, self.skips, strict=True):
            found = self._needed(skip)
            if found is None:
                self.why_not = f"what comes before {self.task.layers[layer].name} cannot be left out"
                if not equal(self.task.answer(self.batch), self.output):
                    log.warning("the model's answers differ from run to run: so will the scores")
                break
            self.live.append(found[0])
            self.fillings.append(found[1])

    def _try_out(self) -> None:
        """Sends a state with the first layer changed all the way, alone and stacked beside the clean one.

        Shapes do not tell whether samples are mixed, and a clean run not whether something is handed on past the
        calls: in an attribute, in an object that is no tensor, by a hook.
        """
        layer = self.order[0]
        weight = self.task.modules[layer][0].weight
        clean = weight.data
        changed = clean * -1.5
        try:
            weight.data = changed
            whole = self.task.answer(self.batch)
            weight.data = clean
            before = [self.start()]
            weight.data = changed
            _, state = self.finish_and_advance(0, before[0])
            weight.data = clean
            before = self.advance(0, before)
            for position in range(1, self.depth):
                pending = self.pending(layer, position)
                self.task.run(self.batch)  # what earlier runs have left behind is clean
                weight.data = changed if pending else clean
                if not equal(self.finish(position, [state])[0], whole):
                    self.why_not = "what a layer changes reaches later ones past the outputs of modules"
                    return
                together = self.finish(position, [*before, state], 2) if self.stackable and not pending else []
                if together and not (close(together[0], self.output) and close(together[1], whole)):
                    self.stackable = False
                if position + 1 < self.depth:
                    state = self.advance(position, [state])[0]
                    weight.data = clean
                    before = self.advance(position, before)
        except Exception as error:
            self.why_not = f"a run from the middle failed with {type(error).__name__}: {error}"
        finally:
            weight.data = clean

    def _adopts(self, like: Replay | None) -> bool:
        """Takes the cuts of another batch if the calls are the same and going from cut to cut gives the output."""
        if like is None or like.why_not or [_place(c) for c in like.calls] != [_place(c) for c in self.calls]:
            return False
        state: State = {}
        steps = zip([[], *self.skips], [None, *(None if f is None else torch.nan for f in like.fillings)], strict=True)
        try:
            for (skip, filling), capture in zip(steps, [*like.live, None], strict=True):
                outputs, states = self._run(skip, [state], capture, stop=capture is not None, filling=filling)
                state = states[0] if states else {}
            same = equal(outputs[0], self.output)
        except Exception:
            same = False  # the code in between stumbles over the placeholders
        if same:
            self.live, self.fillings = like.live, like.fillings
        return same

    def _done_before(self, start: int) -> list[Key]:
        """The outermost calls that had ended by then, in order."""
        done = [call for call in self.calls if call.end < start]
        ended = {call.key for call in done}
        return [call.key for call in done if call.parent not in ended]

    def _needed(self, skip: Sequence[Key]) -> tuple[list[Key], Filling] | None:
        """Which of the skipped outputs the rest of the run needs, and what can stand for the others; None where it
        cannot be run from here.

        First guesses are the last output of all and the last one at each depth of the call tree, which is what
        chains and residual blocks need; then each of those is left out in turn, to see whether it is missed.
        """
        if not skip:
            return [], None
        try:
            clean = self._run([], [{}], skip, stop=True)[1][0]
        except RuntimeError:
            return None
        last = {self._by_key[key].parent: key for key in skip}
        for guess in ([skip[-1]], list(last.values()), list(skip)):
            if self._same(skip, clean, guess):
                break
        else:
            return None
        for key in list(guess) if len(guess) > 1 else ():
            rest = [k for k in guess if k != key]
            if self._same(skip, clean, rest):
                guess = rest
        return guess, None if self._same(skip, clean, guess, filling=None) else 0.0

    def _same(self, skip: Sequence[Key], clean: State, needed: Sequence[Key], filling: Filling = torch.nan) -> bool:
        """Whether the run from a cut gives the clean output, with `filling` in place of what is not needed."""
        try:
            outputs, _ = self._run(skip, [{key: clean[key] for key in needed}], filling=filling)
            return equal(outputs[0], self.output)
        except Exception:
            return False  # the code in between stumbles over the placeholders


def _place(call: Call) -> tuple[Any, ...]:
    return call.key, call.parent, call.start, call.end, call.stacks


class _forwards:
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
