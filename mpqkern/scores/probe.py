"""Probe: the loss of whole choices of schemes, each run from where it first differs from one that is committed.

A search tries many small changes to one net. All that comes before a change is the same for all of them, so it is
computed once, as states of a `Replay`, and kept as far as memory allows; once a change is committed, what comes
before it is still good. Every run holds one state, so each loss is, bit for bit, that of a full forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from ..measuring.bank import Item
from ..measuring.meter import Work
from ..measuring.task import digest
from .replay import AnotherWay, State
from .run import Run

METRICS = ("loss", "accuracy", "kl")
FLOAT = -1  # in a choice: the layer as it is
Choice = tuple[int, ...]  # a scheme for each layer


class Damage(NamedTuple):
    """Means over all samples; lower is better."""

    value: float  # of the metric; for accuracy, the share of wrong answers
    loss: float


class Probe:
    """Measures choices by the task's loss, by accuracy, or by the divergence from the float model ("kl").

    Each choice is one item a batch in the run's bank, under the contents of both: whoever asks again is answered
    from there, whatever path led to the question.
    """

    def __init__(self, run: Run, metric: str = "loss") -> None:
        if metric not in METRICS:
            raise ValueError(f"metric={metric!r}; wanted 'loss', 'accuracy' or 'kl'")
        run.task.prepare(answers=metric == "kl" or (metric == "accuracy" and run.task.labels(0) is None))
        self.run, self.metric = run, metric
        self._heads = [run.key(index, metric) for index in range(len(run.task.batches))]
        self._nets: dict[int, _Net] = {}

    def __call__(self, committed: Choice, choices: Sequence[Choice]) -> list[Damage]:
        """The damage of each choice; it is fastest where they differ from `committed` in late layers only."""
        wanted = {
            f"{head}/{digest(choice)}": (index, choice) for index, head in enumerate(self._heads) for choice in choices
        }
        shown = {key: self._title(committed, choice) for key, (_, choice) in wanted.items()}
        items = self.run.bank.measure(shown, lambda key: self._measured(committed, *wanted[key]), self.run.meter)
        found = dict(zip(wanted, items, strict=True))
        return [self._mean([found[f"{head}/{digest(choice)}"] for head in self._heads]) for choice in choices]

    def _title(self, committed: Choice, choice: Choice) -> str:
        """The layers in which a choice differs from what is committed."""
        pairs = zip(self.run.task.layers, choice, committed, strict=True)
        new = [f"{layer.name} {self.run.schemes[b] or 'float'}" for layer, b, was in pairs if b != was]
        return ", ".join(new[:2]) + ", ..." * (len(new) > 2) if new else "reference"

    def _measured(self, committed: Choice, index: int, choice: Choice) -> Item:
        if index not in self._nets:
            self._nets[index] = _Net(self.run, index, self.run.memory // len(self._heads))
        task, output = self.run.task, self._nets[index].output(committed, choice)
        item = {"loss": task.losses(output, index).cpu().numpy()}
        if self.metric != "loss":
            values = task.mistakes if self.metric == "accuracy" else task.divergences
            item["value"] = values(output, index).cpu().numpy()
        return item

    def _mean(self, items: Sequence[Item]) -> Damage:
        loss = float(np.concatenate([item["loss"] for item in items]).mean())
        if self.metric == "loss":
            return Damage(loss, loss)
        return Damage(float(np.concatenate([item["value"] for item in items]).mean()), loss)


def expected(run: Run, evaluations: int, steps: int = 1) -> Work:
    """What so many choices take, committed in so many steps, if the changes are spread evenly over the layers."""
    replay, batches = run.replay(0), len(run.task.batches)
    if replay.why_not is not None or not replay.depth:
        return Work(evaluations * batches, float(evaluations), replay.run_bytes())
    rest = replay.macs()
    share = sum(rest) / len(rest) / max(rest[0], 1)
    states = batches * sum(replay.state_bytes(p) for p in range(replay.depth))
    return Work(evaluations * batches, evaluations * share + steps, min(states, run.memory) + replay.run_bytes())


class _Net:
    """One batch in the committed net: its states before the layers, as many as fit into `memory` bytes."""

    def __init__(self, run: Run, index: int, memory: int) -> None:
        self.run, self.index, self.memory = run, index, memory
        self.replay = run.replay(index)
        self.place = {layer: position for position, layer in enumerate(self.replay.order)}
        self.committed: Choice = ()
        self.states: dict[int, State] = {}  # by position, the oldest first

    def output(self, committed: Choice, choice: Choice) -> Any:
        if self.replay.why_not is not None or not self.replay.depth:
            with self._applied(choice):
                return self.run.task.run(self.replay.batch)
        position = self._first(committed, choice)
        try:
            state = self._state(committed, position)
            with self._applied(choice):
                return self.replay.finish(position, [state])[0]
        except AnotherWay:
            with self._applied(choice):
                return self.run.task.run(self.replay.batch)

    def _state(self, committed: Choice, position: int) -> State:
        if committed != self.committed:
            good = self._first(self.committed, committed) if self.committed else -1
            self.states = {p: state for p, state in self.states.items() if p <= good}
            self.committed = committed
        at = max((p for p in self.states if p <= position), default=-1)
        if at == position:
            return self.states[at]
        with self._applied(committed):
            state = self.states[at] if at >= 0 else self._keep(0, self.replay.start())
            for p in range(max(at, 0), position):
                state = self._keep(p + 1, self.replay.advance(p, [state])[0])
        return state

    def _keep(self, position: int, state: State) -> State:
        self.states[position] = state
        while len(self.states) > 1 and sum(map(self.replay.state_bytes, self.states)) > self.memory:
            del self.states[next(iter(self.states))]
        return state

    def _first(self, a: Choice, b: Choice) -> int:
        """The cut before the first layer in which they differ; layers that the batch does not reach change nothing."""
        last = self.replay.depth - 1
        return min((self.place.get(i, last) for i in range(len(a)) if a[i] != b[i]), default=last)

    @contextmanager
    def _applied(self, choice: Choice) -> Iterator[None]:
        with self.run.variants.applied({layer: b for layer, b in enumerate(choice) if b != FLOAT}):
            yield
