"""Exact choice of one scheme a layer when the cost of a pair of layers is more than the sum of both.

    minimise    sum_l unary[l, x_l] + sum_{l<m} pairwise[l, x_l, m, x_m]
    subject to  sum_l rows[k, l, x_l] <= caps[k]  for every k,   x_l allowed

That is 1/2 x'Gx for one-hot x and the matrix G with diagonal 2 * unary and the pairs beside it. G need not be positive
semidefinite. A local search finds a good answer; then branch and bound (csrc/host) proves it or finds a better one, in
stages that differ in how much of the cost is bounded as a convex form and how much as pairs: tight budgets want
pairs, loose ones want convexity. Stages end by counted work, so the answer does not depend on the machine's speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from . import highs
from .convexify import convexify
from .prepare import PROJECTIONS, ROUNDING, Task, checked, clipped, evaluate, is_seed, off_diagonal, projected, want

try:
    from .. import _host
except ImportError as error:  # without it the same problems are solved by HiGHS, slower
    _host = None
    why_no_host: str | None = str(error)
else:
    why_no_host = None

Progress = Callable[[float, float, float, int], None]  # incumbent, bound, seconds, nodes

GAP = 1e-9  # of the objective, beside ROUNDING: what "optimal" leaves open
NEGATIVE = 1e-6  # of the largest eigenvalue: below minus this a form counts as indefinite
RLT_LAYERS = 75  # beyond this HiGHS has too many products to be of use
MEMORY = 2**30  # bytes of stored nodes; beyond it the search goes depth-first
USUAL = 222  # unknowns (74 layers of 3 choices) that the amounts of work below are for
FIRST_WORK, SECOND_WORK = 1.6e8, 6e8  # entries of S and Q swept: at the root 1,600 and 6,000 times


@dataclass(frozen=True)
class Stage:
    """What was known at the end of one stage, in the caller's units."""

    name: str
    seconds: float
    nodes: int
    objective: float
    bound: float


@dataclass(frozen=True)
class Outcome:
    """`status`: "optimal" (bound >= objective - (1e-9 |objective| + 1e-11 max |cost|)), "feasible" (within rel_gap),
    "limit" (time ran out), "interrupted" (Ctrl-C) or "infeasible" (proven; no choice)."""

    choice: np.ndarray | None  # int64 [L]
    objective: float  # of the matrix that was minimised, see `psd`
    raw_objective: float  # of the costs as given
    bound: float  # no choice that fits has a lower `objective`
    status: str
    seconds: float
    nodes: int
    log: list[Stage] = field(default_factory=list)

    @property
    def gap(self) -> float:
        """What the bound leaves open, relative to the objective."""
        open_ = self.objective - self.bound
        return open_ / abs(self.objective) if self.choice is not None and self.objective else max(open_, 0.0)


def minimise(
    unary: np.ndarray,
    pairwise: np.ndarray | None,
    rows: np.ndarray,
    caps: np.ndarray,
    allowed: np.ndarray | None = None,
    *,
    psd: str = "none",
    time_limit: float | None = None,
    rel_gap: float = 0.0,
    seed: int = 0,
    on_progress: Progress | None = None,
    start: Sequence[int] | None = None,
    engine: str = "auto",
) -> Outcome:
    """The cheapest choice that fits, with proof.

    unary [L, B], pairwise [L, B, L, B] (symmetric; entries within a layer are ignored), rows [K, L, B], caps [K],
    allowed [L, B]. psd="clip" first replaces G by its nearest positive semidefinite matrix, "shift" adds its most
    negative eigenvalue to the diagonal. `start` is a choice to begin from. engine: "host" (compiled), "highs"
    (products in a mixed-integer program, at most 75 layers) or "auto". `on_progress` is called about every 50 ms.

    >>> toggle = np.array([[0.0, 1.0], [0.0, 2.0]])
    >>> together = np.zeros((2, 2, 2, 2))
    >>> together[0, 0, 1, 0] = together[1, 0, 0, 0] = 5.0  # both layers at choice 0 cost 5 more
    >>> minimise(toggle, together, np.zeros((0, 2, 2)), np.zeros(0)).choice.tolist()
    [1, 0]
    """
    began = time.perf_counter()
    unary, pairwise, rows, caps, allowed = checked(unary, pairwise, rows, caps, allowed)
    want("psd", psd, psd in PROJECTIONS, '"none", "clip" or "shift"')
    want("engine", engine, engine in ("auto", "host", "highs"), '"auto", "host" or "highs"')
    want("rel_gap", rel_gap, 0 <= rel_gap < np.inf, "a number >= 0")
    want("time_limit", time_limit, time_limit is None or time_limit >= 0, "None or seconds >= 0")
    want("seed", seed, is_seed(seed), "a whole number from 0 to 2**31 - 1")
    if engine == "host" and _host is None:
        raise RuntimeError(f"engine='host' needs the compiled mpqkern._host: {why_no_host}")
    used_unary, used_pairwise, form = projected(unary, pairwise, psd)
    task = Task(used_unary, used_pairwise, form, rows, caps, allowed)
    run = _Run(task, began, time_limit, rel_gap, seed, on_progress)
    if task.infeasible:
        return run.outcome(None, "infeasible", unary, pairwise)
    if start is not None:
        start = task.start_from(start)
    choice, status = (_by_rlt if engine == "highs" or _host is None else _by_tree)(run, start)
    return run.outcome(choice, status, unary, pairwise)


class _Run:
    """The clock, the best choice and bound so far, and what the caller hears of them."""

    def __init__(
        self,
        task: Task,
        began: float,
        time_limit: float | None,
        rel_gap: float,
        seed: int,
        on_progress: Progress | None,
    ) -> None:
        self.task, self.began, self.seed, self.on_progress = task, began, seed, on_progress
        self.end = np.inf if time_limit is None else began + time_limit
        self.gap = max(rel_gap, GAP)
        self.nodes = 0
        self.value, self.bound = np.inf, -np.inf  # of the scaled problem
        self.choice: np.ndarray | None = None
        self.log: list[Stage] = []

    def left(self) -> float:
        return max(self.end - time.perf_counter(), 0.0)

    def progress(self) -> Callable[[float, float, float, int], None] | None:
        if self.on_progress is None:
            return None
        scale = self.task.scale

        def report(value: float, bound: float, _: float, nodes: int) -> None:
            self.bound = max(self.bound, bound - self.task.rounding)  # what was shown holds, also if this is the end
            best = min(value, self.value)
            self.on_progress(best * scale, self.bound * scale, time.perf_counter() - self.began, self.nodes + nodes)

        return report

    def take(self, choice: Sequence[int], value: float) -> None:
        if len(choice) and value < self.value and self.task.fits(np.asarray(choice)):
            self.choice, self.value = np.asarray(choice, dtype=np.int64), value

    def note(self, name: str) -> None:
        scale = self.task.scale
        seconds = time.perf_counter() - self.began
        self.log.append(Stage(name, seconds, self.nodes, self.value * scale, self.bound * scale))

    def outcome(self, choice: np.ndarray | None, status: str, unary: np.ndarray, pairwise: np.ndarray) -> Outcome:
        """Values on the costs as given. A status that is not given follows from the bound."""
        seconds, task = time.perf_counter() - self.began, self.task
        if choice is None:
            proven = task.infeasible or status == "infeasible"
            bound = np.inf if proven else self.bound * task.scale
            return Outcome(
                None, np.inf, np.inf, bound, "infeasible" if proven else status, seconds, self.nodes, self.log
            )
        if not task.fits(choice):
            raise AssertionError(f"the search returned {choice.tolist()}, which does not fit")
        value = evaluate(task.exact_unary, task.exact_pairwise, choice)
        bound = min(self.bound * task.scale, value)
        if status in ("optimal", "feasible"):
            proven = bound >= value - (GAP * abs(value) + ROUNDING * task.scale)
            status = "optimal" if proven else "feasible"
        raw = evaluate(unary, pairwise, choice)
        return Outcome(choice, value, raw, bound, status, seconds, self.nodes, self.log)


def _by_tree(run: _Run, start: np.ndarray | None) -> tuple[np.ndarray | None, str]:
    """Local search, then up to three trees; each keeps the best choice and the best bound of those before."""
    try:
        status = _first_choice(run, start)
        if status is None:
            status = _prove(run)
    except KeyboardInterrupt:
        if run.choice is None:
            raise
        status = "interrupted"
    return run.choice, status


def _first_choice(run: _Run, start: np.ndarray | None) -> str | None:
    task = run.task
    kicks = 3000 if task.unary.size <= 500 else 1500

    def search(choice: np.ndarray) -> bool:
        found = _host.local_search(
            **task.arrays(), choice=choice.tolist(), kicks=kicks, seed=run.seed, seconds=run.left(),
            progress=run.progress(),
        )  # fmt: skip
        if found["value"] < np.inf:
            run.take(found["choice"], found["value"])
        return found["interrupted"]

    interrupted = search(task.lightest() if start is None else start)
    if run.choice is None and start is not None and not interrupted:
        interrupted = search(task.lightest())
    if run.choice is None and not interrupted and run.left() > 0:  # several budgets: repairing can fail
        limit = None if np.isinf(run.end) else run.left()
        choice, _, status = highs.integer(
            np.zeros(task.unary.shape), task.use, task.alive, task.rest, value=0.0, time_limit=limit, rel_gap=0.0,
            seed=run.seed,
        )  # fmt: skip
        if status == "infeasible":
            return status
        if status == "interrupted":
            raise KeyboardInterrupt
        if choice is not None and task.fits(choice):  # within HiGHS's tolerance is not yet within the budget
            interrupted = search(choice)
    run.note("local search")
    return "interrupted" if interrupted else None


def _prove(run: _Run) -> str:
    task = run.task
    n = task.unary.size
    form, near, exact = task.form, True, True
    if form is None:
        costs = task.pairwise.reshape(n, n) / 2 + np.diag(task.unary.ravel())
        form, lowest = clipped(costs)
        near, exact = lowest >= -NEGATIVE, lowest >= 0
        form = costs if exact else form
    stages = [
        ("tree, half convex", 0.5, FIRST_WORK * max(1.0, n / USUAL)),
        ("tree, three quarters convex", 0.75, SECOND_WORK * (n / USUAL) ** 2),
        ("tree, reformulated", 0.95 if near else 0.75, np.inf),
    ]
    for name, share, work in stages:
        if work == np.inf:
            pairs = off_diagonal(2 * form, *task.unary.shape)
            better = convexify(
                form.diagonal().reshape(task.unary.shape).copy(), pairs, task.use, task.rest, task.alive,
                rounds=30 if n <= 300 else 16, incumbent=run.value if run.choice is not None else 0.0, end=run.end,
            )  # fmt: skip
            if better is not None:
                form = better.form
                if exact:  # else the form's pairs are not the problem's, and neither is the bound
                    run.bound = max(run.bound, better.bound - task.rounding)
            run.note("reformulation")
        result = _host.tree(
            **task.arrays(), incumbent=None if run.choice is None else run.choice.tolist(), form=form, share=share,
            relative=run.gap, absolute=task.rounding, work=work, memory=MEMORY, seconds=run.left(),
            progress=run.progress(),
        )  # fmt: skip
        run.nodes += result["nodes"]
        run.take(result["choice"], result["value"])
        run.bound = max(run.bound, result["bound"] - task.rounding)
        run.note(name)
        if result["finished"]:
            return "infeasible" if run.choice is None else "optimal"
        if result["interrupted"]:
            return "interrupted"
        if run.left() <= 0:
            break
    return "limit"


def _by_rlt(run: _Run, start: np.ndarray | None) -> tuple[np.ndarray | None, str]:
    from .rlt import solve

    task = run.task
    layers = len(task.unary)
    if layers > RLT_LAYERS:
        raise ValueError(
            f"unary has {layers} layers; without mpqkern._host ({why_no_host}) wanted at most {RLT_LAYERS}"
        )
    limit = None if np.isinf(run.end) else run.left()
    found = solve(**task.arrays(), start=start, time_limit=limit, rel_gap=run.gap, seed=run.seed)
    run.bound = found.bound
    if found.choice is not None:
        run.take(found.choice, evaluate(task.unary, task.pairwise, found.choice))
    run.note("products by HiGHS")
    return run.choice, found.status
