"""Bit assignment problems that look like measured ones: CLADO-like matrices, layer sizes, budgets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mpqkern.solve.prepare import projected

BITS = {2: (4, 8), 3: (2, 4, 8), 4: (2, 3, 4, 8), 6: (2, 3, 4, 5, 6, 8)}


@dataclass(eq=False)
class Instance:
    """minimise unary + pairs subject to rows <= caps; arrays as in mpqkern.solve.quadratic.minimise."""

    name: str
    unary: np.ndarray  # [L, B]
    pairwise: np.ndarray | None  # [L, B, L, B]
    rows: np.ndarray  # int64 [K, L, B]
    caps: np.ndarray  # int64 [K]
    psd: str = "none"

    @cached_property
    def costs(self) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """What is minimised, after `psd`: unary, pairwise, and as one form [n, n] for solvers that want convexity."""
        if self.pairwise is None:
            return self.unary, None, None
        unary, pairwise, form = projected(self.unary, self.pairwise, self.psd)
        n = unary.size
        return unary, pairwise, pairwise.reshape(n, n) / 2 + np.diag(unary.ravel()) if form is None else form

    def objective(self, choice: np.ndarray) -> float:
        unary, pairwise, _ = self.costs
        layers = np.arange(len(choice))
        value = float(unary[layers, choice].sum())
        if pairwise is not None:
            value += 0.5 * float(pairwise[layers[:, None], choice[:, None], layers, choice].sum())
        return value


def sizes(layers: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Parameters and multiply-adds of a four-stage network: parameters grow, multiply-adds stay level."""
    stage = np.minimum(4 * np.arange(layers) // layers, 3)
    params = (64 * 2**stage) ** 2 * rng.choice([1, 1, 9 / 4, 9], layers) * rng.uniform(0.7, 1.3, layers)
    macs = params * (56 / 2**stage) ** 2 * rng.uniform(0.8, 1.2, layers)
    return np.round(params).astype(np.int64), np.round(macs).astype(np.int64)


def linear(layers: int, choices: int, budgets: int, average: float, seed: int = 0) -> Instance:
    """Costs that fall by about 4 for each bit, under budgets of bits and of bit operations."""
    rng = np.random.default_rng(seed)
    bits = np.array(BITS[choices])
    params, macs = sizes(layers, rng)
    scale = np.exp(rng.normal(0, 1, layers)) * params / params.mean()
    unary = scale[:, None] * 4.0 ** (2 - bits) * np.exp(0.2 * rng.normal(size=(layers, choices)))
    rows = [params[:, None] * bits, macs[:, None] * bits * 8, np.round(params**0.5).astype(np.int64)[:, None] * bits]
    caps = [int(average * params.sum()), int(average * macs.sum() * 8), int(average * np.round(params**0.5).sum())]
    return Instance(
        f"linear L{layers} B{choices} K{budgets}", unary, None, np.array(rows[:budgets]), np.array(caps[:budgets])
    )


def quadratic(
    layers: int,
    choices: int,
    average: float,
    *,
    project: bool = True,
    noise: float = 0.0,
    near: float = 0.15,
    budgets: int = 1,
    seed: int = 0,
) -> Instance:
    """1/2 x'Gx from error vectors whose neighbours are correlated (by `near`) and which share a direction; `noise`
    adds symmetric measurement noise, which makes G indefinite unless it is projected."""
    rng = np.random.default_rng(seed)
    bits = np.array(BITS[choices])
    params, macs = sizes(layers, rng)
    scale = np.exp(rng.normal(0, 1, layers)) * (params / params.mean()) ** 0.3
    scale /= scale.mean()
    distance = np.abs(np.subtract.outer(np.arange(layers), np.arange(layers)))
    alike = near * np.exp(-(distance - 1) / 4.0)
    np.fill_diagonal(alike, 1)
    alike = 0.95 * clipped(alike) + 0.05
    latent = np.linalg.cholesky(alike + 1e-9 * np.eye(layers)) @ rng.normal(size=(layers, 256))
    errors = np.empty((layers, choices, 256))
    for j, b in enumerate(bits):
        size = np.sqrt(scale) * 2.0 ** (2 - b) * np.exp(0.15 * rng.normal(size=layers))
        errors[:, j] = size[:, None] * (0.8 * latent + 0.6 * rng.normal(size=(layers, 256)))
    flat = errors.reshape(layers * choices, 256)
    matrix = flat @ flat.T / 256
    if noise:
        d, n = np.sqrt(np.diag(matrix)), rng.normal(size=matrix.shape)
        matrix = matrix + noise * (n + n.T) / 2**0.5 * np.outer(d, d) * (1 - np.eye(len(matrix)))
    notes = [f"L{layers} B{choices} avg {average}", "psd" if project else "raw"]
    notes += [f"{noise:.0%} noise"] * (noise > 0) + ["strong"] * (near > 0.15) + [f"K{budgets}"] * (budgets > 1)
    return from_matrix(" ".join(notes), matrix, [params, macs][:budgets], bits, average, project)


def measured(path: Path, average: float, *, project: bool) -> Instance:
    """From a file of measured losses: Ltilde [LB, LB] (pairs; singles on the diagonal), bits, sizes."""
    data = np.load(path)
    table = data["Ltilde"]
    single = np.diag(table)
    matrix = table - single[:, None] - single[None, :]
    np.fill_diagonal(matrix, 2 * single)
    kind = "psd" if project else "raw"
    params = data["sizes"].astype(np.int64)
    return from_matrix(
        f"{path.stem} avg {average} {kind}", matrix, [params], data["bits"].astype(np.int64), average, project
    )


def from_matrix(
    name: str, matrix: np.ndarray, counts: list[np.ndarray], bits: np.ndarray, average: float, project: bool
) -> Instance:
    """CLADO's convention: 1/2 x'Gx, nothing between two choices of one layer. A budget for each of `counts`."""
    layers, choices = len(counts[0]), len(bits)
    tensor = ((matrix + matrix.T) / 2).reshape(layers, choices, layers, choices).copy()
    own = np.arange(layers)
    tensor[own, :, own, :] = 0
    rows = np.array([np.outer(count, bits) for count in counts], dtype=np.int64)
    caps = np.array([int(average * count.sum()) for count in counts])
    unary = np.diag(matrix).reshape(layers, choices) / 2
    return Instance(name, unary, tensor, rows, caps, psd="clip" if project else "none")


def clipped(matrix: np.ndarray) -> np.ndarray:
    """The nearest positive semidefinite matrix."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * np.maximum(values, 0)) @ vectors.T
