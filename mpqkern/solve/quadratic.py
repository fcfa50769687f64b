"""Exact choice of one scheme a layer when the cost of a pair of layers is more than the sum of both.

    minimise    sum_l unary[l, x_l] + sum_{l<m} pairwise[l, x_l, m, x_m]
    subject to  sum_l rows[k, l, x_l] <= caps[k]  for every k,   x_l allowed

That is 1/2 x'Gx for one-hot x and the matrix G with diagonal 2 * unary and the pairs beside it. G need not be positive
semidefinite. A local search finds a good answer; then branch and bound (csrc/host) proves it or finds a better one, in
stages that differ in how much of the cost is bounded as a convex form and how much as pairs: tight budgets want
pairs, loose ones want convexity. Stages end by counted work, so the answer does not depend on the machine's speed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from . import highs
from .convexify import convexify

try:
    from .. import _host
except ImportError as error:  # without it the same problems are solved by HiGHS, slower
    _host = None
    why_no_host: str | None = str(error)
else:
    why_no_host = None

Progress = Callable[[float, float, float, int], None]  # incumbent, bound, seconds, nodes

GAP = 1e-9  # of the objective ...
ROUNDING = 1e-11  # ... plus this, of the largest cost: what "optimal" leaves open
FITS = 1e-12  # of the cap: what a sum of fractions may exceed it by; whole numbers must fit exactly
NEGATIVE = 1e-6  # of the largest eigenvalue: below minus this a form counts as indefinite
RLT_LAYERS = 75  # beyond this HiGHS has too many products to be of use
MEMORY = 2**30  # bytes of stored nodes; beyond it the search goes depth-first
USUAL = 222  # unknowns (74 layers of 3 choices) that the amounts of work below are for
FIRST_WORK, SECOND_WORK = 1.6e8, 6e8  # row entries: about 0.4 s and 1.5 s


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
    unary, pairwise, rows, caps, allowed = _checked(unary, pairwise, rows, caps, allowed)
    _want("psd", psd, psd in ("none", "clip", "shift"), '"none", "clip" or "shift"')
    _want("engine", engine, engine in ("auto", "host", "highs"), '"auto", "host" or "highs"')
    _want("rel_gap", rel_gap, 0 <= rel_gap < np.inf, "a number >= 0")
    _want("time_limit", time_limit, time_limit is None or time_limit >= 0, "None or seconds >= 0")
    if engine == "host" and _host is None:
        raise RuntimeError(f"engine='host' needs the compiled mpqkern._host: {why_no_host}")
    used_unary, used_pairwise, form = _projected(unary, pairwise, psd)
    task = _Task(used_unary, used_pairwise, form, rows, caps, allowed)
    run = _Run(task, began, time_limit, rel_gap, seed, on_progress)
    if task.infeasible:
        return run.outcome(None, "infeasible", unary, pairwise)
    if start is not None:
        start = task.start_from(start)
    choice, status = (_by_rlt if engine == "highs" or _host is None else _by_tree)(run, start)
    return run.outcome(choice, status, unary, pairwise)


class _Task:
    """The problem that is searched: costs scaled to 1, each layer's least use taken off, what cannot fit forbidden."""

    def __init__(
        self,
        unary: np.ndarray,
        pairwise: np.ndarray,
        form: np.ndarray | None,
        rows: np.ndarray,
        caps: np.ndarray,
        allowed: np.ndarray,
    ) -> None:
        self.whole, self.rows, self.caps = _row_kinds(rows, caps)
        self.exact_unary, self.exact_pairwise = unary, pairwise
        self.alive = allowed.copy()
        self.infeasible = not self._reduce()
        if self.infeasible:
            return
        pairs_alive = self.alive[:, :, None, None] & self.alive[None, None]
        self.unary, self.pairwise = np.where(self.alive, unary, 0.0), np.where(pairs_alive, pairwise, 0.0)
        self.scale = max(np.abs(self.unary).max(), np.abs(self.pairwise).max())
        self.rounding = ROUNDING / 10 if self.scale else 0.0  # of one bound
        self.scale = self.scale or 1.0
        self.unary /= self.scale
        self.pairwise /= self.scale
        self.form = None
        if form is not None:
            n = unary.size
            self.form = np.where(pairs_alive.reshape(n, n), form, 0.0) / self.scale

    def _reduce(self) -> bool:
        """Sets alive, use [K, L, B] and rest [K]; rows that always hold go. False: nothing fits."""
        slack = np.array([0.0 if whole else FITS * abs(cap) for whole, cap in zip(self.whole, self.caps, strict=True)])
        while True:
            if not self.alive.any(axis=1).all():
                return False
            least = [np.where(self.alive, row, row.max()).min(axis=1) for row in self.rows]
            rest = [cap - part.sum() for cap, part in zip(self.caps, least, strict=True)]
            use = [np.where(self.alive, row - part[:, None], 0) for row, part in zip(self.rows, least, strict=True)]
            if any(left < -spare for left, spare in zip(rest, slack, strict=True)):
                return False
            unfit = np.zeros_like(self.alive)
            for row, left, spare in zip(use, rest, slack, strict=True):
                unfit |= row > left + spare
            if not unfit.any():
                break
            self.alive &= ~unfit
        binding = [k for k in range(len(use)) if use[k].max(axis=1).sum() > rest[k]]
        self.use, self.rest = np.zeros((len(binding), *self.alive.shape)), np.zeros(len(binding))
        for at, k in enumerate(binding):
            unit = 1
            if self.whole[k]:  # in units of the common divisor, sums stay exact in float64 up to 2**53 of them
                unit = int(np.gcd.reduce(use[k], axis=None)) or 1
                left = int(rest[k]) // unit
                if left >= 2**53:
                    raise ValueError(f"caps[{k}] leaves {left} units; wanted less than 2**53 of them")
            else:
                left = max(rest[k], 0.0) + slack[k] / 2
            self.use[at], self.rest[at] = use[k] / unit, left
        return True

    def fits(self, choice: np.ndarray) -> bool:
        at = np.arange(len(choice))
        for whole, row, cap in zip(self.whole, self.rows, self.caps, strict=True):
            picked = row[at, choice]
            used = int(picked.sum()) if whole else math.fsum(picked.tolist())
            if used > cap + (0 if whole else FITS * abs(cap)):
                return False
        return bool(self.alive[at, choice].all())

    def start_from(self, start: Sequence[int]) -> np.ndarray:
        choice = np.asarray(start, dtype=np.int64)
        layers, width = self.alive.shape
        good = choice.shape == (layers,) and (choice >= 0).all() and (choice < width).all()
        _want("start", start, good, f"{layers} choices from 0 to {width - 1}")
        lightest = self.lightest()
        return np.where(self.alive[np.arange(layers), choice], choice, lightest)

    def lightest(self) -> np.ndarray:
        """The least sum of shares of all budgets; fits where there is only one."""
        shares = (self.use / np.where(self.rest > 0, self.rest, 1)[:, None, None]).sum(axis=0)
        return np.where(self.alive, shares, np.inf).argmin(axis=1)

    def arrays(self) -> dict[str, np.ndarray]:
        return {
            "unary": self.unary,
            "pairwise": self.pairwise,
            "use": self.use,
            "cap": self.rest,
            "allowed": self.alive.view(np.uint8),
        }


class _Run:
    """The clock, the best choice and bound so far, and what the caller hears of them."""

    def __init__(
        self,
        task: _Task,
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
            best, known = min(value, self.value), max(bound, self.bound)
            self.on_progress(best * scale, known * scale, time.perf_counter() - self.began, self.nodes + nodes)

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


def evaluate(unary: np.ndarray, pairwise: np.ndarray, choice: np.ndarray) -> float:
    """The cost of a choice, its terms added exactly."""
    at = np.arange(len(choice))
    pairs = pairwise[at, choice][:, at, choice]
    return math.fsum(unary[at, choice].tolist() + pairs[np.triu_indices(len(at), 1)].tolist())


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
        form, lowest = _clipped(costs)
        near, exact = lowest >= -NEGATIVE, lowest >= 0
        form = costs if exact else form
    stages = [
        ("tree, half convex", 0.5, FIRST_WORK * max(1.0, n / USUAL)),
        ("tree, three quarters convex", 0.75, SECOND_WORK * (n / USUAL) ** 2),
        ("tree, reformulated", 0.95 if near else 0.75, np.inf),
    ]
    for name, share, work in stages:
        if work == np.inf:
            pairs = _off_diagonal(2 * form, *task.unary.shape)
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


def _projected(unary: np.ndarray, pairwise: np.ndarray, psd: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Costs and, unless psd is "none", the semidefinite form [n, n] whose one-hot values they are."""
    if psd == "none":
        return unary, pairwise, None
    n = unary.size
    matrix = pairwise.reshape(n, n) + np.diag(2 * unary.ravel())
    if psd == "shift":
        matrix[np.diag_indices(n)] += max(0.0, -np.linalg.eigvalsh(matrix)[0])
        form = matrix / 2
    else:
        form = _clipped(matrix / 2)[0]
    return form.diagonal().reshape(unary.shape).copy(), _off_diagonal(2 * form, *unary.shape), form


def _clipped(form: np.ndarray) -> tuple[np.ndarray, float]:
    """The nearest positive semidefinite matrix, and the lowest eigenvalue of `form` as a share of the largest."""
    values, vectors = np.linalg.eigh(form)
    clipped = (vectors * np.maximum(values, 0)) @ vectors.T
    return (clipped + clipped.T) / 2, float(values[0] / max(np.abs(values).max(), 1e-300))


def _off_diagonal(matrix: np.ndarray, layers: int, width: int) -> np.ndarray:
    """[L, B, L, B] with zeros within a layer."""
    pairs = matrix.reshape(layers, width, layers, width).copy()
    at = np.arange(layers)
    pairs[at, :, at, :] = 0
    return pairs


def _row_kinds(rows: np.ndarray, caps: np.ndarray) -> tuple[list[bool], list[np.ndarray], list[int | float]]:
    """Which rows hold whole numbers (compared exactly, as int64), the rows, and their caps."""
    whole, kept, limits = [], [], []
    for row, cap in zip(rows, caps, strict=True):
        if cap == np.inf:
            continue
        integers = bool((row == np.floor(row)).all()) and float(np.abs(row).max()) * len(row) < 2**62
        whole.append(integers)
        kept.append(row.astype(np.int64) if integers else row.astype(np.float64))
        most = 2**62  # a cap beyond any sum is that sum's cap, too
        limits.append(int(min(max(np.floor(cap), -most), most)) if integers else float(cap))
    return whole, kept, limits


def _checked(
    unary: np.ndarray, pairwise: np.ndarray | None, rows: np.ndarray, caps: np.ndarray, allowed: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The arguments in their final types; infinite costs of choices that are not allowed become zero."""
    unary = np.array(unary, dtype=np.float64)
    _want("unary.shape", unary.shape, unary.ndim == 2 and unary.size > 0, "(L, B), both at least 1")
    layers, width = unary.shape
    allowed = np.ones(unary.shape, dtype=bool) if allowed is None else np.array(allowed, dtype=bool)
    _want("allowed.shape", allowed.shape, allowed.shape == unary.shape, f"{unary.shape} like unary")
    for layer in np.flatnonzero(~allowed.any(axis=1))[:1]:
        raise ValueError(f"allowed[{layer}] has no choice; wanted one or more in every layer")
    shape = (layers, width, layers, width)
    pairwise = np.zeros(shape) if pairwise is None else np.array(pairwise, dtype=np.float64)
    _want("pairwise.shape", pairwise.shape, pairwise.shape == shape, f"{shape} like unary")
    unary[~allowed & ~np.isfinite(unary)] = 0
    forbidden = ~(allowed[:, :, None, None] & allowed[None, None])
    pairwise[forbidden & ~np.isfinite(pairwise)] = 0
    at = np.arange(layers)
    pairwise[at, :, at, :] = 0
    for name, costs in (("unary", unary), ("pairwise", pairwise)):
        bad = costs[~np.isfinite(costs)]
        if bad.size:
            raise ValueError(f"{name} holds {bad[0]}; wanted finite costs wherever allowed")
    skew = np.abs(pairwise - pairwise.transpose(2, 3, 0, 1)).max()
    _want("pairwise", f"off symmetry by {skew:.3g}", skew <= 1e-9 * np.abs(pairwise).max(), "a symmetric array")
    pairwise = (pairwise + pairwise.transpose(2, 3, 0, 1)) / 2
    rows, caps = np.asarray(rows), np.atleast_1d(np.asarray(caps))
    _want("caps.shape", caps.shape, caps.ndim == 1, "(K,)")
    want = (len(caps), layers, width)
    _want("rows.shape", rows.shape, rows.shape == want, f"{want} like caps and unary")
    for name, values in (("rows", rows), ("caps", caps)):
        if values.dtype.kind not in "biuf" or np.isnan(values).any():
            raise ValueError(f"{name} has dtype {values.dtype} or holds a NaN; wanted real numbers")
    if np.isinf(rows).any():
        raise ValueError("rows hold an infinity; wanted finite uses (forbid a choice through allowed)")
    return unary, pairwise, rows, caps, allowed


def _want(argument: str, value: object, good: object, wanted: str) -> None:
    if not good:
        raise ValueError(f"{argument}={value!r}; wanted {wanted}")
