"""Perturbed: the losses of a model with one layer changed and with two, measured batch by batch into the bank.

    item  KEY/base   loss [samples] of the reference; order: its layers as they are called; schemes: what is tried
    item  KEY/j      loss [schemes, 1 + states, samples] with layer j changed: alone in column 0, then together
                     with each of states [states, 2], the (layer, scheme) changed before it

The naive engine runs the whole model for each. The frontier walks through it once: before layer j it holds the state
of the unchanged model and one for each scheme of each earlier layer; with layer j changed it runs the rest of the
model from all of them, which are the losses of j alone and of all pairs that end in j; then all states move on to the
next layer, unchanged. So a pair costs what comes after its second layer: about a third of the naive passes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from ..measuring.bank import Bank, Item, mine
from ..trees import bytes_in
from .replay import AnotherWay, Replay, State
from .run import Run

log = logging.getLogger("mpqkern")

ENGINES = ("frontier", "naive")
# What is stacked in one run on a CPU: beyond its caches larger batches are slower, not faster.
CPU_STACK_BYTES = 2**23
Change = tuple[int, int]  # layer, scheme
Found = tuple[int, list[Change], np.ndarray]  # layer, what was changed before it, the losses


@dataclass(frozen=True)
class Design:
    """Which losses are wanted."""

    engine: str
    schemes: list[int]  # to try in each layer
    base: dict[int, int]  # scheme of each layer that is not changed; none for float
    mates: np.ndarray  # bool [layers, layers], symmetric: the pairs

    def before(self, order: Sequence[int], position: int) -> list[int]:
        """Layers that are measured together with the one at `position` and come before it."""
        return [i for i in order[:position] if self.mates[i, order[position]]]

    def kept(self, order: Sequence[int], position: int) -> list[int]:
        """Layers whose states are still needed at `position`."""
        return [i for i in order[:position] if self.mates[i, order[position:]].any()]

    def losses(self, order: Sequence[int]) -> int:
        """1 + LK + K^2 for each pair; with all pairs 1 + LK + L(L-1)/2 K^2."""
        tried = len(self.schemes)
        return 1 + sum(tried * (1 + tried * len(self.before(order, p))) for p in range(len(order)))

    def passes(self, replay: Replay) -> float:
        """The same in full forward passes, by multiply-adds."""
        order, rest = replay.order, [*replay.macs(), 0]
        if engine_of(self, replay) == "naive" or not rest[0]:
            return float(self.losses(order))
        tried, macs = len(self.schemes), 0
        for p in range(replay.depth):
            macs += tried * (1 + tried * len(self.before(order, p))) * rest[p]
            if p + 1 < replay.depth:
                macs += (1 + tried * len(set(self.kept(order, p + 1)) - {order[p]})) * (rest[p] - rest[p + 1])
        return 1 + macs / rest[0]

    def bytes(self, replay: Replay) -> int:
        """Of all states at the cut where they take most; twice, as new ones come beside the old."""
        if engine_of(self, replay) == "naive":
            return 0
        tried, order = len(self.schemes), replay.order
        held = [(1 + tried * len(self.kept(order, p))) * replay.state_bytes(p) for p in range(replay.depth)]
        return 2 * max(held, default=0)


def engine_of(design: Design, replay: Replay) -> str:
    """Models that cannot be cut are run whole."""
    return "naive" if replay.why_not else design.engine


def fitted(run: Run, design: Design) -> Run:
    """The same run, in smaller batches where the states of a whole one would not fit into its memory."""
    largest = int(np.argmax([bytes_in(batch) for batch in run.task.batches]))
    replay = run.replay(largest)
    wanted = design.bytes(replay) + replay.run_bytes()
    if wanted <= run.memory:
        return run
    most = max(1, replay.size * run.memory // wanted)
    log.info("batches of at most %d samples, as %d would take %d MiB", most, replay.size, wanted >> 20)
    return replace(run, task=run.task.split(most))


def measured(run: Run, design: Design) -> None:
    """Afterwards the bank has all items of all batches. Ranks share the batches between them."""
    run.task.prepare()
    layers, batches = range(len(run.task.layers)), range(len(run.task.batches))
    reached = [layer for layer in layers if run.task.layers[layer].macs]
    share = mine(batches)
    run.meter.begin("losses", len(share) * design.losses(reached))
    with run.bank.shared([run.key(i, part) for i in batches for part in ("base", *layers)]):
        for index in share:
            _batch(run, index, design)


def items(bank: Bank, batch: str) -> tuple[Item, dict[int, Item]]:
    """What was measured on a batch: the base, and the items of its layers in the order of their calls."""
    base = bank[f"{batch}/base"]
    return base, {int(layer): bank[f"{batch}/{layer}"] for layer in base["order"]}


def _batch(run: Run, index: int, design: Design) -> None:
    bank, meter = run.bank, run.meter
    names = [layer.name for layer in run.task.layers]
    first, done = run.key(index, "base"), []
    if first in bank:
        done = [int(layer) for layer in bank[first]["order"] if run.key(index, int(layer)) in bank]
        meter.step("reference", made=False)
        for layer in done:
            meter.step(names[layer], _losses_in(bank[run.key(index, layer)]), made=False)
        if len(done) == len(bank[first]["order"]):
            return
    replay = run.replay(index)
    if first not in bank:
        with run.variants.applied(design.base):
            loss = run.task.losses(run.task.run(replay.batch), index)
        order, passes = np.array(replay.order, dtype=np.int64), design.passes(replay)
        bank.put(first, loss=_array(loss), order=order, schemes=np.array(design.schemes), passes=passes)
        meter.step("reference")
    if replay.why_not and design.engine == "frontier":
        log.info("every loss by a whole pass: %s", replay.why_not)
    missing = set(replay.order) - set(done)

    def keep(walk: Iterator[Found]) -> None:
        for layer, states, losses in walk:
            key = run.key(index, layer)
            bank.put(key, loss=losses, states=np.array(states, dtype=np.int64).reshape(-1, 2))
            missing.discard(layer)
            meter.step(names[layer], _losses_in(bank[key]))

    try:
        if engine_of(design, replay) == "frontier":
            keep(_frontier(run, replay, design, set(missing)))
    except AnotherWay as error:
        log.info("the rest by whole passes: %s", error)
    keep(_naive(run, replay, design, set(missing)))


def _naive(run: Run, replay: Replay, design: Design, missing: set[int]) -> Iterator[Found]:
    for position, layer in enumerate(replay.order):
        if layer not in missing:
            continue
        others = [(i, b) for i in design.before(replay.order, position) for b in design.schemes]
        losses = np.empty((len(design.schemes), 1 + len(others), replay.size))
        for row, scheme in enumerate(design.schemes):
            for column, other in enumerate([{}, *({i: b} for i, b in others)]):
                with run.variants.applied({**design.base, **other, layer: scheme}):
                    losses[row, column] = _array(run.task.losses(run.task.run(replay.batch), replay.index))
        yield layer, others, losses


def _frontier(run: Run, replay: Replay, design: Design, missing: set[int]) -> Iterator[Found]:
    task, applied, base = run.task, run.variants.applied, design.base
    states: dict[Change, State] = {}
    with applied(base):
        clean = replay.start()
    for position, layer in enumerate(replay.order):
        chunk, earlier = _chunk(run, replay, design, position), design.before(replay.order, position)
        kept = design.kept(replay.order, position + 1) if position + 1 < replay.depth else []
        others = [change for change in states if change[0] in earlier]
        losses = np.empty((len(design.schemes), 1 + len(others), replay.size))
        added: dict[Change, State] = {}
        for row, scheme in enumerate(design.schemes):
            changed = {**base, layer: scheme}
            with applied(changed):
                if layer in missing:
                    output, state = replay.finish_and_advance(position, clean)
                    losses[row, 0] = _array(task.losses(output, replay.index))
                elif layer in kept:
                    [state] = replay.advance(position, [clean])
            if layer in kept:
                added[layer, scheme] = state
            for part, again in _parts(replay, position, others if layer in missing else [], chunk):
                with applied({**changed, **again}):
                    outputs = replay.finish(position, [states[change] for change in part], chunk)
                for change, output in zip(part, outputs, strict=True):
                    losses[row, 1 + others.index(change)] = _array(task.losses(output, replay.index))
        if layer in missing:
            yield layer, others, losses
        if not missing.intersection(replay.order[position + 1 :]):
            return
        following: dict[Change, State] = {}
        for part, again in _parts(replay, position, [c for c in states if c[0] in kept], chunk):
            with applied({**base, **again}):
                moved = replay.advance(position, [states[change] for change in part], chunk)
            following.update(zip(part, moved, strict=True))
        with applied(base):
            [clean] = replay.advance(position, [clean])
        states = {**following, **added}


def _parts(replay: Replay, position: int, changes: Sequence[Change], chunk: int) -> Iterator[tuple[list[Change], dict]]:
    """Changes to run at once, and what has to stay changed meanwhile: layers that are called again."""
    settled = [change for change in changes if not replay.pending(change[0], position)]
    for start in range(0, len(settled), chunk):
        yield settled[start : start + chunk], {}
    for layer, scheme in changes:
        if replay.pending(layer, position):
            yield [(layer, scheme)], {layer: scheme}


def _chunk(run: Run, replay: Replay, design: Design, position: int) -> int:
    """States in one run from a cut."""
    room = run.memory - design.bytes(replay)
    if run.task.device.type == "cpu":
        room = min(room, CPU_STACK_BYTES)
    return max(1, room // max(replay.run_bytes(position), 1))


def _losses_in(item: Item) -> int:
    return item["loss"].shape[0] * item["loss"].shape[1]


def _array(loss: Tensor) -> np.ndarray:
    return loss.detach().cpu().numpy()
