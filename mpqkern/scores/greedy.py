"""Greedy search: round the layer that hurts least, measure the others again in the net so rounded, and so on.

Tsuji et al. 2021 (ACML, PMLR 157:886-901): layers ranked once, each rounded alone, do not see each other; so after
every layer that is rounded the damage of the remaining ones is measured anew. The abstract is all that this follows;
what it leaves open is an option here. If damages only grow as more layers are rounded (a supermodular set function),
greedy steps have the known guarantees of submodular optimisation and `lazy` changes no answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..measuring.meter import Work
from ..numbers import check_number
from .probe import FLOAT, Choice, Damage, Probe, expected
from .run import Run
from .table import FLOAT_BITS, Scores, widest_first
from .trajectory import Step, Trajectory

MODES = ("stagewise", "joint", "static")
NOISE = 1e-12  # by which a mean may be above `drop` through rounding alone
Move = tuple[int, int]  # a unit, and the scheme it is to take


@dataclass(frozen=True, eq=False)
class Rules:
    """What a search may do. A unit is a group of layers that share one scheme; arrays are [units, schemes].

    `order` has the schemes from the widest to the narrowest; a unit only moves on in it, and only where that saves
    something of `sizes`. `within(reach)` tells whether some choice among `reach` fits; no step is taken after which
    none does. `until(choice)`, a scheme for each unit, ends the search.
    """

    groups: Sequence[Sequence[int]]
    order: Sequence[int]
    sizes: np.ndarray
    allowed: np.ndarray
    within: Callable[[np.ndarray], bool] = field(default=lambda reach: True)
    until: Callable[[np.ndarray], bool] = field(default=lambda choice: False)

    @classmethod
    def free(cls, run: Run) -> Rules:
        """Every layer by itself, down to the narrowest scheme, by the bytes of its weight."""
        sizes = weight_bytes(run)
        groups = [[layer] for layer in range(len(sizes))]
        return cls(groups, widest_first(run.schemes), sizes, np.ones(sizes.shape, dtype=bool))

    def levels(self, mode: str) -> list[list[int]]:
        """The schemes to go through one after another, from the widest; all at once for a joint search."""
        return [list(self.order)] if mode == "joint" else [[scheme] for scheme in self.order]

    def start(self) -> np.ndarray:
        """The widest that each unit may have."""
        return np.array([next(b for b in self.order if able[b]) for able in self.allowed])

    def narrower(self, unit: int, scheme: int) -> np.ndarray:
        """bool [schemes]: where the unit may go from there."""
        later = np.zeros(len(self.order), dtype=bool)
        later[self.order[self.order.index(scheme) + 1 :]] = True
        return later & self.allowed[unit] & (self.sizes[unit] < self.sizes[unit, scheme])

    def evaluations(self, mode: str) -> int:
        """Choices that a search to the narrowest measures: exactly, if stagewise and not lazy, else at most."""
        narrower = [self.narrower(unit, scheme) for unit, scheme in enumerate(self.start())]
        moves = np.sum(narrower, axis=0)
        if mode == "stagewise":
            return 1 + int((moves * (moves + 1) // 2).sum())
        total = int(moves.sum())
        return 1 + (2 * total if mode == "static" else total * (total + 1) // 2)


def search(
    run: Run,
    rules: Rules | None = None,
    *,
    mode: str = "stagewise",
    metric: str = "loss",
    per_bit: bool | None = None,
    lazy: bool = False,
    refresh: int | None = None,
    drop: float | None = None,
) -> Trajectory:
    """The path from every unit at its widest scheme to the narrowest, or as far as `rules` and `drop` let it go.

    mode     "stagewise" (the paper's) takes every layer to one width before any goes to the next: with N layers
             N (N + 1) / 2 measurements a width; "joint" tries every narrower scheme of every layer at each step;
             "static" ranks once, by each layer rounded alone: the baseline that updating is compared with
    metric   "loss" of the task, because accuracies of a few hundred samples tie; "accuracy" (the paper's; ties go
             to the lower loss), or "kl", the divergence from the float model
    per_bit  compare damages by what they save, which joint searches need and do by default
    lazy     take a layer's last known damage for a lower bound and measure again only while it could be the least
             (Minoux 1978); exact where damages only grow on the way
    refresh  with `lazy`: measure everything again at each such number of steps
    drop     stop before the metric is worse than the float model's by more than this

    Ties go to the layer that comes first.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}; wanted 'stagewise', 'joint' or 'static'")
    check_number("refresh", refresh, "a number of steps, or None", lambda v: v > 0, whole=True, optional=True)
    if refresh is not None and not lazy:
        raise ValueError(f"refresh={refresh!r} with lazy={lazy!r}; wanted a number of steps, beside lazy=True")
    check_number("drop", drop, "0 or more, or None", lambda v: v >= 0, optional=True)
    rules = Rules.free(run) if rules is None else rules
    per_bit = mode == "joint" if per_bit is None else per_bit
    levels = rules.levels(mode)
    total = rules.evaluations(mode) + (drop is not None)
    run.meter.begin(f"{mode} search", total * len(run.task.batches))
    walk = _Walk(run, rules, Probe(run, metric), mode, per_bit, lazy, refresh)
    if not rules.within(walk.reach(levels)):
        raise ValueError("no path of ever narrower schemes leads to a choice that fits; wanted other limits")
    walk.begin()
    clean = (FLOAT,) * len(run.task.layers)
    worst = np.inf if drop is None else walk.probe(clean, [clean])[0].value + drop + NOISE
    if walk.damage.value > worst:
        raise ValueError(f"drop={drop!r} is passed by the widest schemes already; wanted more, or wider schemes")
    for rest in range(len(levels)):
        while not rules.until(walk.at) and (moves := walk.moves(levels[rest:])):
            move = walk.best(moves)
            if walk.after[move].value > worst:
                return walk.path
            walk.commit(move)
    return walk.path


class _Walk:
    """The search at one point of its path: the scheme of each unit, and what is known of the steps from there."""

    def __init__(
        self, run: Run, rules: Rules, probe: Probe, mode: str, per_bit: bool, lazy: bool, refresh: int | None
    ) -> None:
        self.rules, self.probe, self.layers, self.schemes = rules, probe, run.task.layers, run.schemes
        self.mode, self.per_bit, self.lazy, self.refresh = mode, per_bit, lazy, refresh
        self.at = rules.start()
        self.path = Trajectory(self.layers, self.schemes, probe.metric, [])
        self.known: dict[Move, tuple[float, float]] = {}  # what a move added when last measured, by what it saves
        self.after: dict[Move, Damage] = {}  # of moves from the present point

    def begin(self) -> None:
        """Measures the start of the path and, for a static search, all moves from there."""
        choice = self._choice()
        self.damage = self.probe(choice, [choice])[0]
        self.path.steps.append(self._step((), choice))
        if self.mode == "static":
            narrower = (self.rules.narrower(unit, scheme) for unit, scheme in enumerate(self.at))
            self._measure([(unit, int(b)) for unit, mask in enumerate(narrower) for b in np.flatnonzero(mask)])

    def moves(self, levels: Sequence[Sequence[int]]) -> list[Move]:
        """To the schemes of the first level, such that a choice that fits stays within reach."""
        able = [(u, b) for u in range(len(self.at)) for b in levels[0] if self.rules.narrower(u, self.at[u])[b]]
        found, reach = [], self.reach(levels)
        for unit, scheme in able:
            before, reach[unit] = reach[unit].copy(), self._from(unit, scheme, levels)
            if self.rules.within(reach):
                found.append((unit, scheme))
            reach[unit] = before
        return found

    def reach(self, levels: Sequence[Sequence[int]]) -> np.ndarray:
        """bool [units, schemes]: what each unit can still take."""
        return np.array([self._from(unit, scheme, levels) for unit, scheme in enumerate(self.at)])

    def best(self, moves: list[Move]) -> Move:
        """The one that adds least."""
        if self.mode != "static":
            full = not self.lazy or (self.refresh is not None and len(self.path) % self.refresh == 0)
            self._measure([m for m in moves if (full or m not in self.known) and m not in self.after])
        while (move := min(moves, key=self._rank)) not in self.after:
            added = self.known[move]
            self._measure([move])
            if self.mode == "static":
                self.known[move] = added
                break
        return move

    def commit(self, move: Move) -> None:
        unit, scheme = move
        self.damage, self.at[unit] = self.after[move], scheme
        self.after = {}
        if self.mode != "static":
            self.known = {m: added for m, added in self.known.items() if m[0] != unit}
        self.path.steps.append(self._step(self.rules.groups[unit], self._choice()))

    def _measure(self, moves: Sequence[Move]) -> None:
        if not moves:
            return
        for move, damage in zip(moves, self.probe(self._choice(), [self._choice(m) for m in moves]), strict=True):
            (unit, scheme), sizes = move, self.rules.sizes
            saved = float(sizes[unit, self.at[unit]] - sizes[unit, scheme]) if self.per_bit else 1.0
            self.after[move] = damage
            self.known[move] = ((damage.value - self.damage.value) / saved, (damage.loss - self.damage.loss) / saved)

    def _rank(self, move: Move) -> tuple[float, float, Move]:
        return (*self.known[move], move)

    def _from(self, unit: int, scheme: int, levels: Sequence[Sequence[int]]) -> np.ndarray:
        mask = np.zeros(self.rules.sizes.shape[1], dtype=bool)
        mask[[b for level in levels for b in level]] = True
        mask &= self.rules.narrower(unit, scheme)
        mask[scheme] = True
        return mask

    def _choice(self, move: Move | None = None) -> Choice:
        choice = [FLOAT] * len(self.layers)
        for unit, group in enumerate(self.rules.groups):
            for layer in group:
                choice[layer] = move[1] if move is not None and move[0] == unit else int(self.at[unit])
        return tuple(choice)

    def _step(self, changed: Sequence[int], choice: Choice) -> Step:
        size = float(self.rules.sizes[np.arange(len(self.at)), self.at].sum())
        return Step(tuple(changed), choice, self.damage.value, self.damage.loss, size)


def score(
    run: Run,
    *,
    mode: str = "stagewise",
    metric: str = "loss",
    per_bit: bool | None = None,
    lazy: bool = False,
    refresh: int | None = None,
) -> Scores:
    """Marginal costs along the path to the narrowest: unary[l, b] is what the steps of layer l down to b added.

    So a layer's cost is that of rounding it beside the layers that the search had rounded before. A scheme that the
    path left out, because a joint search jumped over it or because it saves nothing, costs what the next narrower
    one does, or else the most that any step there did. Options are those of `search`; the path itself is
    `Trajectory.from_dict(scores.provenance["trajectory"])`. To follow it until budgets hold: `assign`.
    """
    rules = Rules.free(run)
    path = search(run, rules, mode=mode, metric=metric, per_bit=per_bit, lazy=lazy, refresh=refresh)
    unary = np.full(rules.sizes.shape, np.nan)
    for before, step in zip([None, *path.steps], path.steps, strict=False):
        for layer, scheme in enumerate(step.choice):
            if before is None:
                unary[layer, scheme] = 0.0
            elif layer in step.changed:
                unary[layer, scheme] = unary[layer, before.choice[layer]] + step.value - before.value
    for row in unary:
        last = row[~np.isnan(row)].max(initial=0.0)
        for scheme in reversed(rules.order):
            last = row[scheme] = last if np.isnan(row[scheme]) else row[scheme]
    return run.scores(unary, trajectory=path.to_dict())


def work(
    run: Run,
    *,
    mode: str = "stagewise",
    metric: str = "loss",
    per_bit: bool | None = None,
    lazy: bool = False,
    refresh: int | None = None,
) -> Work:
    rules = Rules.free(run)
    steps = len(run.task.layers) * (len(run.schemes) - 1)
    return expected(run, rules.evaluations(mode), steps)


def weight_bytes(run: Run) -> np.ndarray:
    """Of each layer's weight under each scheme: as packed, or, where a scheme does not pack, parameters times bits."""
    layers, schemes = run.task.layers, run.schemes
    try:
        packed = [[4 * la.params if s is None else s.bytes(la.weight_shape) for s in schemes] for la in layers]
        return np.array(packed, dtype=np.float64)
    except ValueError:
        return np.array([[la.params * (FLOAT_BITS if s is None else s.bits) / 8 for s in schemes] for la in layers])
