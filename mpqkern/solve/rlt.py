"""The cross-layer problem as a mixed-integer program for HiGHS: one variable y_ij for every product x_i x_j.

    sum_c y[l, b, m, c] = x[l, b]  and  sum_b y[l, b, m, c] = x[m, c]  for l < m,  y >= 0,  x in {0, 1}

(level-1 RLT: the only linearisation strong enough to be worth its size). Independent of mpqkern._host, so each
checks the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .clock import Clock
from .highs import run
from .lazy import highspy

TARGET = 1e4  # of the scaled LP value: HiGHS's tolerances are absolute
TRUST = 1e-6  # of the objective's spread: HiGHS's feasibility tolerance, taken off its bound


@dataclass(frozen=True)
class Found:
    choice: np.ndarray | None
    bound: float
    status: str  # "optimal", "limit", "interrupted" or "infeasible"


def solve(
    unary: np.ndarray,
    pairwise: np.ndarray,
    use: np.ndarray,
    cap: np.ndarray,
    allowed: np.ndarray,
    *,
    start: np.ndarray | None,
    time_limit: float | None,
    rel_gap: float,
    seed: int,
) -> Found:
    """`cap` [K] positive, `use` [K, L, B] nonnegative; `start` is a hint."""
    clock, layers = Clock(time_limit), len(unary)
    unit, option = np.nonzero(allowed)
    n = len(unit)
    # Every layer and every pair of layers picks exactly one entry, so its least entry is a constant.
    own = unary[unit, option]
    least = np.where(allowed, unary, np.inf).min(axis=1)
    own, offset = own - least[unit], least.sum()
    i, j = np.nonzero(unit[:, None] < unit[None, :])
    pairs = pairwise[unit[i], option[i], unit[j], option[j]]
    block = unit[i] * layers + unit[j]
    floor = np.full(layers * layers, np.inf)
    np.minimum.at(floor, block, pairs)
    pairs, offset = pairs - floor[block], offset + floor[np.isfinite(floor)].sum()
    cost = np.concatenate([own, pairs])

    entries = [(unit, np.arange(n), np.ones(n))]  # (row, column, value): one choice a layer,
    row = layers + np.arange(len(cap))
    at_k, at_i = np.nonzero(use[:, unit, option])  # budgets,
    entries.append((row[at_k], at_i, (use[:, unit, option] / cap[:, None])[at_k, at_i]))
    link = layers + len(cap)  # and both sums of every block of products
    y = n + np.arange(len(i))
    for x, other in ((i, j), (j, i)):
        key, at = np.unique(x * layers + unit[other], return_inverse=True)
        entries.append((link + at, y, np.ones(len(y))))
        entries.append((link + np.arange(len(key)), key // layers, -np.ones(len(key))))
        link += len(key)
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = len(cost), link
    model.col_lower_, model.col_upper_ = np.zeros(len(cost)), np.ones(len(cost))
    equal = np.concatenate([np.ones(layers), np.ones(len(cap)), np.zeros(link - layers - len(cap))])
    model.row_upper_ = equal
    model.row_lower_ = np.where((np.arange(link) >= layers) & (np.arange(link) < layers + len(cap)), -np.inf, equal)
    rows, columns, values = (np.concatenate(part) for part in zip(*entries, strict=True))
    order = np.argsort(columns, kind="stable")
    model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    starts = np.concatenate([[0], np.cumsum(np.bincount(columns, minlength=len(cost)))])
    model.a_matrix_.start_ = starts.astype(np.int32)
    model.a_matrix_.index_, model.a_matrix_.value_ = rows[order].astype(np.int32), values[order]

    scale = TARGET / max(cost.max(initial=0.0), 1e-300) if cost.max(initial=0.0) > 0 else 1.0
    for _ in range(3):  # until the LP value is where tolerances of 1e-7 are small
        solver = _pass(model, cost * scale, seed, clock.left())
        if run(solver):
            raise KeyboardInterrupt
        if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            break
        value = solver.getInfo().objective_function_value
        if TARGET / 30 < value < TARGET * 30 or value <= 1e-9 * TARGET:
            break
        scale *= TARGET / value
    model.integrality_ = [highspy.HighsVarType.kInteger] * n + [highspy.HighsVarType.kContinuous] * len(i)
    solver = _pass(model, cost * scale, seed, clock.left())
    solver.setOptionValue("mip_rel_gap", rel_gap)
    solver.setOptionValue("mip_abs_gap", 0.0)
    if start is not None:
        hint = highspy.HighsSolution()
        x = (start[unit] == option).astype(float)
        hint.col_value = np.concatenate([x, x[i] * x[j]]).tolist()
        solver.setSolution(hint)
    interrupted = run(solver)
    status = solver.getModelStatus()
    if status == highspy.HighsModelStatus.kInfeasible:
        return Found(None, np.inf, "infeasible")
    info = solver.getInfo()
    choice = None
    if info.primal_solution_status == 2:  # without one, HiGHS hands out a vector of zeros
        shares = np.zeros(unary.shape)
        shares[unit, option] = solver.getSolution().col_value[:n]
        choice = shares.argmax(axis=1)
    bound = info.mip_dual_bound
    spread = max(abs(info.objective_function_value), 1.0) if choice is not None else abs(bound)
    bound = (bound - TRUST * spread) / scale + offset if np.isfinite(bound) else -np.inf
    if interrupted or status == highspy.HighsModelStatus.kInterrupt:
        return Found(choice, bound, "interrupted")
    return Found(choice, bound, "optimal" if status == highspy.HighsModelStatus.kOptimal else "limit")


def _pass(model: highspy.HighsLp, cost: np.ndarray, seed: int, time_limit: float | None) -> highspy.Highs:
    model.col_cost_ = cost
    solver = highspy.Highs()
    solver.silent()
    solver.setOptionValue("random_seed", int(seed))
    if time_limit is not None:
        solver.setOptionValue("time_limit", max(time_limit, 0.01))
    solver.passModel(model)
    return solver
