"""A quadratic form that agrees with the pairs of a problem and is convex where it matters, chosen for its bound.

Every layer takes one choice, so x'Dx for a D with blocks on layers only is linear, x'diag(D), at every assignment:

    sum_i u_i x_i + x'Ox = sum_i (u_i + D_ii) x_i + x'(O - D)x,   O = pairwise / 2

and the right side may be minimised over shares 0 <= x <= 1 wherever O - D is positive semidefinite on differences
of one-hot vectors. The D with the greatest minimum is the dual of a semidefinite program; here a log barrier climbs
towards it (quadratic convex reformulation with the freedom of whole blocks).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from .highs import run
from .lazy import highspy

STALL = 3e-3  # of the incumbent: three rounds that gain less than this together are the last
SHRINK = 0.45  # of the barrier's weight, each Newton step
STEPS = 4  # Newton steps between two relaxations
MIX = 1e-3  # added to every share, so that no direction is without weight
ITERATIONS = 30  # an unknown: HiGHS's active-set QP solver can cycle where budgets are tight
RIDGE = 1e-10  # on HiGHS's Hessian (largest entry 1): its QP solver does not check convexity, and wants some


@dataclass(frozen=True)
class Convex:
    bound: float  # of sum unary + 1/2 sum pairwise over all that fits
    form: np.ndarray  # [n, n]: O - D of the best round


def convexify(
    unary: np.ndarray,
    pairwise: np.ndarray,
    use: np.ndarray,
    cap: np.ndarray,
    allowed: np.ndarray,
    *,
    rounds: int,
    incumbent: float,
    end: float = np.inf,
) -> Convex | None:
    """The best of `rounds` rounds, or of those begun before `end` (perf_counter); None: not one succeeded.

    Costs are scaled to 1, `use` [K, L, B] is nonnegative.
    """
    layers, width = unary.shape
    n, r = unary.size, width - 1
    if r == 0 or layers < 2:
        return None
    basis = _differences(width)
    cross = pairwise.reshape(n, n) / 2
    inner = np.einsum("br,lbmc,cs->lrms", basis, cross.reshape(layers, width, layers, width), basis)
    inner = inner.reshape(layers * r, layers * r)
    spectrum = np.linalg.eigvalsh(inner)
    start = 1.05 * max(0.0, -spectrum[0]) + 1e-3 * max(abs(spectrum[0]), abs(spectrum[-1]), 1e-300)
    blocks = np.tile(-start * np.eye(r), (layers, 1, 1))  # D, on differences
    best: Convex | None = None
    bounds: list[float] = []
    mean = None
    weight = None
    for _ in range(rounds + 1):
        form, linear = _reformulate(cross, unary, basis, blocks)
        relaxed = relax(form, linear, use, cap, allowed, end - time.perf_counter())
        if relaxed is None:
            return best
        bound, shares = relaxed
        bounds.append(bound)
        if best is None or bound > best.bound:
            best = Convex(bound, form)
        gained = max(bounds) - max(bounds[:-3]) if len(bounds) > 8 else np.inf
        if gained < STALL * abs(incumbent) or len(bounds) > rounds or time.perf_counter() >= end:
            break
        mean = shares if mean is None else (mean + shares) / 2
        blocks, weight = _climb(inner, blocks, basis, mean, weight)
    return best


def relax(
    form: np.ndarray, linear: np.ndarray, use: np.ndarray, cap: np.ndarray, allowed: np.ndarray, seconds: float = np.inf
) -> tuple[float, np.ndarray] | None:
    """min x'form x + linear'x over shares within the budgets: a lower bound and the minimiser [L, B].

    The bound does not trust the solver: it is the tangent at its answer, minimised with its prices, which is valid
    whatever answer and prices >= 0 are.
    """
    layers, width = allowed.shape
    n, budgets = allowed.size, len(cap)
    convex, tilt = _everywhere(form, layers, width)
    tilt += linear.ravel()
    scale = max(np.abs(convex).max(), np.abs(tilt).max(), 1e-300)
    share = use.reshape(budgets, n) / cap[:, None]
    model = highspy.HighsModel()
    program, hessian = model.lp_, model.hessian_
    program.num_col_, program.num_row_ = n, layers + budgets
    program.col_cost_ = tilt / scale
    program.col_lower_, program.col_upper_ = np.zeros(n), allowed.ravel().astype(float)
    program.row_lower_ = np.concatenate([np.ones(layers), np.full(budgets, -np.inf)])
    program.row_upper_ = np.ones(layers + budgets)
    entries = np.concatenate([np.ones((1, n)), share]).T
    rows = np.concatenate([np.arange(n)[:, None] // width, layers + np.tile(np.arange(budgets), (n, 1))], axis=1)
    program.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    program.a_matrix_.start_ = np.arange(0, entries.size + 1, budgets + 1, dtype=np.int32)
    program.a_matrix_.index_, program.a_matrix_.value_ = rows.astype(np.int32).ravel(), entries.ravel()
    lower = np.tril_indices(n)
    order = np.lexsort(lower)  # column by column
    hessian.dim_, hessian.format_ = n, highspy.HessianFormat.kTriangular
    hessian.start_ = np.concatenate([[0], np.cumsum(np.arange(n, 0, -1))]).astype(np.int32)
    hessian.index_ = lower[0][order].astype(np.int32)
    hessian.value_ = (2 * (convex / scale + RIDGE * np.eye(n)))[lower][order]
    solver = highspy.Highs()
    solver.silent()
    solver.setOptionValue("threads", 1)
    solver.setOptionValue("qp_iteration_limit", ITERATIONS * n)
    solver.setOptionValue("time_limit", max(seconds, 0.01))
    solver.passModel(model)
    # In a thread of its own: the caller's may have run HiGHS with another number of threads, and then HiGHS refuses.
    # Ctrl-C waits for the end: QPs ask nobody meanwhile.
    if run(solver):
        raise KeyboardInterrupt
    solution = solver.getSolution()
    shares = np.clip(np.array(solution.col_value), 0, 1).reshape(layers, width) * allowed
    if not solution.value_valid or not (shares.sum(axis=1) > 0.5).all():
        return None
    shares /= shares.sum(axis=1, keepdims=True)  # the tangent must touch within the simplices: convexity ends there
    price = np.zeros(budgets)
    if solution.dual_valid:
        price = scale * np.maximum(-np.array(solution.row_dual)[layers:], 0)
    x = shares.ravel()
    slope = 2 * (form @ x) + linear.ravel()
    paid = (slope + price @ share).reshape(layers, width)
    bound = -(x @ form @ x) + np.where(allowed, paid, np.inf).min(axis=1).sum() - price.sum()
    return float(bound), shares


def _everywhere(form: np.ndarray, layers: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A form that is convex everywhere, and linear terms with which it is x'form x, but for a constant, on shares.

    `form` is symmetric. HiGHS's QP solver leaves the simplices on its way, and gives up where a form is not convex
    there.
    """
    n = layers * width
    blocks = form.reshape(layers, width, layers, width)
    blocks = blocks - blocks.mean(axis=1, keepdims=True)  # of shares, their differences from equal ones are left
    slope = 2 * blocks.mean(axis=3).sum(axis=2).ravel()
    blocks = blocks - blocks.mean(axis=3, keepdims=True)
    at = np.arange(layers)
    blocks[at, :, at, :] += np.abs(np.einsum("lblb->lb", blocks)).mean() / width
    whole = blocks.reshape(n, n)
    return (whole + whole.T) / 2, slope


def _differences(width: int) -> np.ndarray:
    """[B, B - 1]: an orthonormal basis of the vectors that sum to zero."""
    full = np.hstack([np.ones((width, 1)), np.eye(width)[:, : width - 1]])
    return np.linalg.qr(full)[0][:, 1:]


def _reformulate(
    cross: np.ndarray, unary: np.ndarray, basis: np.ndarray, blocks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """O - D and the linear terms that make up for D."""
    layers, width = unary.shape
    own = np.einsum("br,lrs,cs->lbc", basis, blocks, basis)
    form = cross.copy()
    at = np.arange(layers)
    form.reshape(layers, width, layers, width)[at, :, at, :] -= own
    return form, unary + np.einsum("lbb->lb", own)


def _climb(
    inner: np.ndarray, blocks: np.ndarray, basis: np.ndarray, shares: np.ndarray, weight: float | None
) -> tuple[np.ndarray, float]:
    """A few Newton steps of max <D, W> + weight * logdet(inner - D), the weight shrinking; W from the shares."""
    layers, r = blocks.shape[:2]
    x = (shares + MIX) / (shares + MIX).sum(axis=1, keepdims=True)
    spread = np.einsum("lb,bc->lbc", x, np.eye(x.shape[1])) - x[:, :, None] * x[:, None, :]
    spread = np.einsum("br,lbc,cs->lrs", basis, spread, basis)
    first = weight is None
    weight = 0.1 * abs((spread * blocks).sum()) / (layers * r) if weight is None else 3 * weight
    p, q = np.triu_indices(r)
    twice = np.where(p == q, 1.0, 2.0)  # an off-diagonal unknown stands for two entries
    at = np.arange(layers)
    for _ in range(STEPS + 6 * first):
        weight *= SHRINK
        inverse = np.linalg.inv(_less(inner, blocks))
        tiles = ((inverse + inverse.T) / 2).reshape(layers, r, layers, r).transpose(0, 2, 1, 3)
        gradient = (spread - weight * tiles[at, at])[:, p, q] * twice
        # <E_a, M^-1 E_b M^-1> for symmetric units E_a at (p, q) of layer l and E_b at (s, t) of layer m.
        ps, qt = tiles[:, :, p[:, None], p[None, :]], tiles[:, :, q[:, None], q[None, :]]
        pt, qs = tiles[:, :, p[:, None], q[None, :]], tiles[:, :, q[:, None], p[None, :]]
        hessian = (ps * qt + pt * qs) * (twice[:, None] * twice[None, :] / 2) * weight
        k = len(p)
        hessian = hessian.transpose(0, 2, 1, 3).reshape(layers * k, layers * k)
        hessian[np.diag_indices(layers * k)] += 1e-12 * np.trace(hessian) / (layers * k)
        step = np.linalg.solve(hessian, gradient.ravel())
        decrement = max(float(gradient.ravel() @ step) / weight, 0.0)
        change = np.zeros_like(blocks)
        change[:, p, q] = change[:, q, p] = step.reshape(layers, k)
        length = 1.0 if decrement < 0.3 else 1 / (1 + np.sqrt(decrement))
        while not _definite(_less(inner, blocks + length * change)):
            length /= 2
        blocks = blocks + length * change
    return blocks, weight


def _less(inner: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    layers, r = blocks.shape[:2]
    out = inner.copy()
    at = np.arange(layers)
    out.reshape(layers, r, layers, r)[at, :, at, :] -= blocks
    return out


def _definite(matrix: np.ndarray) -> bool:
    try:
        np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return False
    return True
