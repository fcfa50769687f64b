"""Replay: runs a model from the middle, for many perturbed states at once, without tracing its code.

A perturbation of layer j leaves everything computed before j as it was. So the model's own `forward` is called
again, but modules that were done before j return what they returned before: their *state*. Only whole calls are
skipped, the outermost ones, so a state is small: after the third block of a residual network it is that block's
output.

States are stacked along the batch axis as far as the caller says. With one state a run the numbers are, bit for bit,
those of the full forward pass; with more they may differ in the last bits where a kernel's order of sums depends
on the batch size.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from ..measuring.task import Task
from .calls import Key
from .midway import AnotherWay, Filling, Midway, State
from .stacking import can_stack, close, equal

__all__ = ["AnotherWay", "Replay", "State"]

log = logging.getLogger("mpqkern")


class Replay(Midway):
    """One batch of a task, ready to be run from just before any layer; use it while the model is `held`.

    `order` has the layers by their first call (those never called are left out); position p is the cut before
    `order[p]`, and `depth` how many there are. Where `why_not` says why the model cannot be cut, only whole runs
    are possible.
    """

    def __init__(self, task: Task, index: int, like: Replay | None = None) -> None:
        """`like` is of another batch: if the same modules are called here, its cuts are tried first."""
        super().__init__(task, index)
        starts = {layer: [c.start for c in self.calls.of(modules)] for layer, modules in enumerate(task.modules)}
        self._first = {layer: min(found) for layer, found in starts.items() if found}
        self._last = {layer: max(found) for layer, found in starts.items() if found}
        self.order = sorted(self._first, key=self._first.__getitem__)
        self.skips = [self.calls.done_before(self._first[layer]) for layer in self.order]
        self.live: list[list[Key]] = []
        self.fillings: list[Filling] = []
        self.why_not: str | None = None
        adopted = self._adopts(like)
        if not adopted:
            self._find_cuts()
        live = {key for keys in self.live for key in keys}
        self.stackable = all(map(can_stack, [self.batch, self.calls.output], [self.size] * 2)) and all(
            self.calls[key].stacks for key in live
        )
        self.stackable &= not self.calls.looked  # it decides by what is in the whole batch
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
        return sum(self.calls[key].bytes for key in self.live[position])

    def run_bytes(self, position: int = 0) -> int:
        """What one state takes while it runs from a cut: about the three largest of what it has and makes."""
        start = self._first[self.order[position]] if self.depth else 0
        live = self.live[position] if position < len(self.live) else ()
        made = [call.bytes for call in self.calls.in_order if call.end >= start]
        return sum(sorted([*made, *(self.calls[key].bytes for key in live)])[-3:])

    def start(self) -> State:
        """The state at position 0."""
        return self.run([], [{}], self.live[0], stop=True)[1][0]

    def advance(self, position: int, states: Sequence[State], chunk: int = 1) -> list[State]:
        """The states at the next position, under the weights that the model has now; `chunk` states a run."""
        how = {"capture": self.live[position + 1], "stop": True, "filling": self.fillings[position]}
        return [s for part in self._chunks(states, chunk) for s in self.run(self.skips[position], part, **how)[1]]

    def finish(self, position: int, states: Sequence[State], chunk: int = 1) -> list[Any]:
        """The model's answer for each state."""
        skip, filling = self.skips[position], self.fillings[position]
        return [output for part in self._chunks(states, chunk) for output in self.run(skip, part, filling=filling)[0]]

    def finish_and_advance(self, position: int, state: State) -> tuple[Any, State | None]:
        """Both at once, for one state; no state after the last position."""
        last = position + 1 == self.depth
        capture, filling = None if last else self.live[position + 1], self.fillings[position]
        outputs, states = self.run(self.skips[position], [state], capture, filling=filling)
        return outputs[0], None if last else states[0]

    def _chunks(self, states: Sequence[State], chunk: int) -> list[Sequence[State]]:
        chunk = max(chunk, 1) if self.stackable else 1
        return [states[i : i + chunk] for i in range(0, len(states), chunk)]

    # ---- finding the cuts ------------------------------------------------------------------------------

    def _find_cuts(self) -> None:
        for layer, skip in zip(self.order, self.skips, strict=True):
            found = self.needed(skip)
            if found is None:
                self.why_not = f"what comes before {self.task.layers[layer].name} cannot be left out"
                if not equal(self.task.answer(self.batch), self.calls.output):
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
                output, following = self.finish_and_advance(position, state)
                if not equal(output, whole):
                    self.why_not = "what a layer changes reaches later ones past the outputs of modules"
                    return
                together = self.finish(position, [*before, state], 2) if self.stackable and not pending else []
                if together and not (close(together[0], self.calls.output) and close(together[1], whole)):
                    self.stackable = False
                if position + 1 < self.depth:
                    state, weight.data = following, clean
                    before = self.advance(position, before)
        except Exception as error:
            self.why_not = f"a run from the middle failed with {type(error).__name__}: {error}"
        finally:
            weight.data = clean

    def _adopts(self, like: Replay | None) -> bool:
        """Takes the cuts of another batch if the calls are the same and going from cut to cut gives the output."""
        if like is None or like.why_not or like._places() != self._places():
            return False
        state: State = {}
        steps = zip([[], *self.skips], [None, *(None if f is None else torch.nan for f in like.fillings)], strict=True)
        try:
            for (skip, filling), capture in zip(steps, [*like.live, None], strict=True):
                outputs, states = self.run(skip, [state], capture, stop=capture is not None, filling=filling)
                state = states[0] if states else {}
            same = equal(outputs[0], self.calls.output)
        except Exception:
            same = False  # the code in between stumbles over the placeholders
        if same:
            self.live, self.fillings = like.live, like.fillings
        return same

    def _places(self) -> list[tuple[Any, ...]]:
        return [call.place for call in self.calls.in_order]
