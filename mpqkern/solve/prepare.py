"""Cross-layer problems made ready for a search: checked, projected, scaled to 1, and what cannot fit forbidden."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

PROJECTIONS = ("none", "clip", "shift")
ROUNDING = 1e-11  # of the largest cost: what sums of floats may be off by
FITS = 1e-12  # of the cap: what a sum of fractions may exceed it by; whole numbers must fit exactly


class Task:
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
        want("start", start, good, f"{layers} choices from 0 to {width - 1}")
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


def evaluate(unary: np.ndarray, pairwise: np.ndarray, choice: np.ndarray) -> float:
    """The cost of a choice, its terms added exactly."""
    at = np.arange(len(choice))
    pairs = pairwise[at, choice][:, at, choice]
    return math.fsum(unary[at, choice].tolist() + pairs[np.triu_indices(len(at), 1)].tolist())


def projected(unary: np.ndarray, pairwise: np.ndarray, psd: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Costs and, unless psd is "none", the semidefinite form [n, n] whose one-hot values they are."""
    if psd == "none":
        return unary, pairwise, None
    n = unary.size
    matrix = pairwise.reshape(n, n) + np.diag(2 * unary.ravel())
    if psd == "shift":
        matrix[np.diag_indices(n)] += max(0.0, -np.linalg.eigvalsh(matrix)[0])
        form = matrix / 2
    else:
        form = clipped(matrix / 2)[0]
    return form.diagonal().reshape(unary.shape).copy(), off_diagonal(2 * form, *unary.shape), form


def clipped(form: np.ndarray) -> tuple[np.ndarray, float]:
    """The nearest positive semidefinite matrix, and the lowest eigenvalue of `form` as a share of the largest."""
    values, vectors = np.linalg.eigh(form)
    clipped = (vectors * np.maximum(values, 0)) @ vectors.T
    return (clipped + clipped.T) / 2, float(values[0] / max(np.abs(values).max(), 1e-300))


def off_diagonal(matrix: np.ndarray, layers: int, width: int) -> np.ndarray:
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


def checked(
    unary: np.ndarray, pairwise: np.ndarray | None, rows: np.ndarray, caps: np.ndarray, allowed: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The arguments in their final types; infinite costs of choices that are not allowed become zero."""
    unary = np.array(unary, dtype=np.float64)
    want("unary.shape", unary.shape, unary.ndim == 2 and unary.size > 0, "(L, B), both at least 1")
    layers, width = unary.shape
    allowed = np.ones(unary.shape, dtype=bool) if allowed is None else np.array(allowed, dtype=bool)
    want("allowed.shape", allowed.shape, allowed.shape == unary.shape, f"{unary.shape} like unary")
    for layer in np.flatnonzero(~allowed.any(axis=1))[:1]:
        raise ValueError(f"allowed[{layer}] has no choice; wanted one or more in every layer")
    shape = (layers, width, layers, width)
    pairwise = np.zeros(shape) if pairwise is None else np.array(pairwise, dtype=np.float64)
    want("pairwise.shape", pairwise.shape, pairwise.shape == shape, f"{shape} like unary")
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
    want("pairwise", f"off symmetry by {skew:.3g}", skew <= 1e-9 * np.abs(pairwise).max(), "a symmetric array")
    pairwise = (pairwise + pairwise.transpose(2, 3, 0, 1)) / 2
    rows, caps = np.asarray(rows), np.atleast_1d(np.asarray(caps))
    want("caps.shape", caps.shape, caps.ndim == 1, "(K,)")
    shape = (len(caps), layers, width)
    want("rows.shape", rows.shape, rows.shape == shape, f"{shape} like caps and unary")
    for name, values in (("rows", rows), ("caps", caps)):
        if values.dtype.kind not in "biuf" or np.isnan(values).any():
            raise ValueError(f"{name} has dtype {values.dtype} or holds a NaN; wanted real numbers")
    if np.isinf(rows).any():
        raise ValueError("rows hold an infinity; wanted finite uses (forbid a choice through allowed)")
    return unary, pairwise, rows, caps, allowed


def is_seed(value: object) -> bool:
    """What all the searches take, HiGHS's among them."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and 0 <= value < 2**31


def want(argument: str, value: object, good: object, wanted: str) -> None:
    if not good:
        raise ValueError(f"{argument}={value!r}; wanted {wanted}")
