"""HiGHS for what has more than one budget: LP with prices, and the integer program on a small core.

HiGHS's tolerances are absolute (1e-7), so costs of 1e-9 would be noise to it and it would call any answer
optimal: each unit's least cost is taken off, and costs are scaled so that the LP value is near 1e4.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from .clock import Clock
from .lazy import highspy

TARGET = 1e4  # of the scaled LP value; anything from 1e3 to 1e5 is safe
TOLERANCE = 1e-6  # HiGHS's, of a budget
TINY = 1e-290  # the least cost that scaling raises: a scale is a float, too
MAX_COST = 1e7  # scaled; the simplex gives up on duals of 1e9
Progress = Callable[[float, float, float, int], object]  # objective, bound, seconds, nodes


def lp(
    cost: np.ndarray,
    use: np.ndarray,
    allowed: np.ndarray,
    rest: np.ndarray,
    *,
    time_limit: float | None = None,
    seed: int = 0,
    verbose: bool = False,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Shares [units, schemes] and a price >= 0 per budget at the LP optimum; None: nothing fits.

    TimeoutError: the limit came first, or HiGHS gave up.

    `cost` and `use` have each unit's least already taken off, so all entries are >= 0.
    """
    clock = Clock(time_limit)
    some = np.maximum(cost[allowed & (cost > 0)], TINY)
    most = MAX_COST / some.max() if len(some) else 1.0
    scale = min(1e3 / float(np.median(some)), most) if len(some) else 1.0
    for _ in range(3):
        if clock.over():
            raise TimeoutError("there was no time for the linear program; wanted more")
        solver = _pass(scale * np.where(allowed, cost, 0.0), use, allowed, rest, False, seed, verbose)
        if time_limit is not None:
            solver.setOptionValue("time_limit", max(clock.left(), 0.01))
        if run(solver):
            raise KeyboardInterrupt
        status = solver.getModelStatus()
        if status == highspy.HighsModelStatus.kInfeasible:
            return None
        if status != highspy.HighsModelStatus.kOptimal:
            raise TimeoutError(f"the linear program ended with {solver.modelStatusToString(status)}; wanted more time")
        value = solver.getInfo().objective_function_value
        if TARGET / 30 <= value <= TARGET * 30 or value < 1e-9 or scale >= most:
            break
        scale = min(scale * TARGET / value, most)
    solution = solver.getSolution()
    shares = np.zeros(cost.shape)
    shares[allowed] = solution.col_value
    duals = np.array(solution.row_dual)[len(cost) :]
    return shares, np.maximum(-duals, 0.0) / scale / np.where(rest > 0, rest, 1)


def integer(
    cost: np.ndarray,
    use: np.ndarray,
    allowed: np.ndarray,
    rest: np.ndarray,
    *,
    value: float,
    time_limit: float | None,
    rel_gap: float,
    seed: int = 0,
    verbose: bool = False,
    on_progress: Progress | None = None,
) -> tuple[np.ndarray | None, float, str]:
    """(choice or None, lower bound, "optimal" | "limit" | "interrupted" | "infeasible"); `value`: about the optimum."""
    scale = TARGET / value if value > 0 else 1.0
    solver = _pass(scale * np.where(allowed, cost, 0.0), use, allowed, rest, True, seed, verbose)
    solver.setOptionValue("mip_rel_gap", rel_gap)
    solver.setOptionValue("mip_abs_gap", 0.0)
    if time_limit is not None:
        solver.setOptionValue("time_limit", max(time_limit, 0.01))
    tell = on_progress and (
        lambda news: on_progress(
            news.mip_primal_bound / scale, news.mip_dual_bound / scale, news.running_time, news.mip_node_count
        )
    )
    interrupted = run(solver, tell)
    status = solver.getModelStatus()
    if status == highspy.HighsModelStatus.kInfeasible:
        return None, np.inf, "infeasible"
    info = solver.getInfo()
    choice = None
    if info.primal_solution_status == 2:  # without one, HiGHS hands out a vector of zeros
        shares = np.zeros(cost.shape)
        shares[allowed] = solver.getSolution().col_value
        choice = shares.argmax(axis=1)
    if interrupted or status == highspy.HighsModelStatus.kInterrupt:
        return choice, info.mip_dual_bound / scale, "interrupted"
    done = status == highspy.HighsModelStatus.kOptimal
    return choice, info.mip_dual_bound / scale, "optimal" if done else "limit"


def run(solver: highspy.Highs, tell: Callable[[Any], object] | None = None) -> bool:
    """Solves; whether Ctrl-C ended it. `tell` is called with HiGHS's news of a program with whole numbers.

    HiGHS has a thread of its own, so that this one hears of Ctrl-C. (highspy's own way is for one solver at a time.)
    """
    done, stop, raised = threading.Event(), threading.Event(), []

    def heard(event: Any) -> None:
        try:
            if tell is not None and not stop.is_set():
                tell(event.data_out)
        except BaseException as error:
            raised.append(error)
            stop.set()
        if stop.is_set():
            event.data_in.user_interrupt = True

    def work() -> None:
        try:
            solver.run()
        except BaseException as error:
            raised.append(error)
        finally:
            done.set()

    def asked(event: Any) -> None:
        event.data_in.user_interrupt = stop.is_set()

    solver.cbMipInterrupt += heard
    solver.cbSimplexInterrupt += asked
    solver.cbIpmInterrupt += asked
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    interrupted = False
    while not done.is_set():
        try:
            done.wait(0.1)
        except KeyboardInterrupt:
            interrupted = True
            stop.set()
    thread.join()
    if raised:
        raise raised[0]
    return interrupted


def clearly_infeasible(
    use: np.ndarray, allowed: np.ndarray, rest: np.ndarray, *, time_limit: float | None = None
) -> bool:
    """Whether nothing fits even budgets that are larger by more than HiGHS's tolerance, so that this cannot be why."""
    loose = rest * (1 + 10 * TOLERANCE)
    limits = {"value": 0.0, "time_limit": time_limit, "rel_gap": 0.0}
    status = integer(np.zeros(allowed.shape), use, allowed, loose, **limits)[2]
    if status == "interrupted":
        raise KeyboardInterrupt
    return status == "infeasible"


def _pass(
    cost: np.ndarray, use: np.ndarray, allowed: np.ndarray, rest: np.ndarray, whole: bool, seed: int, verbose: bool
) -> highspy.Highs:
    """The model in column order: one row a unit (its shares add up to 1), one a budget, each divided by its rest."""
    budgets, units = use.shape[:2]
    unit, _ = np.nonzero(allowed)
    n = len(unit)
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = n, units + budgets
    model.col_cost_ = cost[allowed]
    model.col_lower_, model.col_upper_ = np.zeros(n), np.ones(n)
    model.row_lower_ = np.concatenate([np.ones(units), np.full(budgets, -np.inf)])
    model.row_upper_ = np.concatenate([np.ones(units), np.where(rest > 0, 1.0, 0.0)])
    index = np.empty((n, budgets + 1), dtype=np.int32)
    index[:, 0], index[:, 1:] = unit, units + np.arange(budgets)
    entry = np.ones((n, budgets + 1))
    entry[:, 1:] = (use[:, allowed] / np.where(rest > 0, rest, 1)[:, None]).T
    model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    model.a_matrix_.start_ = np.arange(0, entry.size + 1, budgets + 1, dtype=np.int32)
    model.a_matrix_.index_, model.a_matrix_.value_ = index.ravel(), entry.ravel()
    if whole:
        model.integrality_ = [highspy.HighsVarType.kInteger] * n
    solver = highspy.Highs()
    if not verbose:
        solver.silent()
    solver.setOptionValue("random_seed", int(seed))
    solver.passModel(model)
    return solver
