"""OMPQ: a layer whose features resemble those of the others is less important (Ma et al. 2023, arXiv 2109.07865).

With K_i the Gram matrix [N, N] of the samples' features in layer i, of L layers in the order in which they run:

    ORM_ij  = <K_i, K_j> / (|K_i| |K_j|)    orthogonality metric (eq. 5): 0 orthogonal, 1 dependent
    gamma_i = sum of ORM_ij over j != i     (eq. 6)
    theta_i = exp(-beta gamma_i)            (eq. 7)
    c_i     = mean of theta_j over j >= i   a layer is part of all the features after it (eq. 8)
    maximise sum_i c_i b_i under the budgets

No labels, quantizer or gradients enter: one forward pass a batch. `solve(scores, Budget(...), relaxation="lp",
rounding="nearest")` is the published search to the letter; without these two the assignment is exact and fits.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..held import held
from ..measuring.bank import Item
from ..measuring.meter import Work
from ..measuring.task import Forward, Task
from ..plain import u_centred
from . import features, importance
from .run import Run
from .table import Scores

log = logging.getLogger("mpqkern")

# of the mean similarity x = gamma / (L - 1), in [0, 1]; each is taken as its excess over the value at 1
DECREASES = {
    "log": lambda x: -np.log(np.maximum(x, 1e-9)),
    "linear": lambda x: -x,
    "cubic": lambda x: -(x**3),
    "negexp": lambda x: -np.exp(x),
}
MOST = 1024  # samples in a batch, by the kernel that makes Gram matrices
AFTERWARDS = ("beta", "decrease", "later", "objective", "schemes", "rounding")


def score(
    run: Run,
    *,
    taps: str = "layer",
    sample_dim: int = 0,
    center: bool = True,
    debiased: bool = False,
    beta: float | None = None,
    decrease: str = "exp",
    later: bool = True,
    objective: str = "linear",
) -> Scores:
    """Importance of each layer from one forward pass; ORM is averaged over batches, weighted by their samples.

    taps       "layer", a layer's own output, or "block", after norm, activation and shortcut as in the paper
    sample_dim 1 for models that compute on [sequence, samples, ...]: layers with such outputs
    center     the mean over the samples is taken from the features, as the authors' code does; the paper's formula
               does not, and finds features after a ReLU nearly all alike
    debiased   the unbiased estimate of the same (Song et al. 2012), which does not grow as batches get smaller
    beta       how fast importance falls; None: theta goes from 1 to 1/e, whatever the number of layers. The authors
               use 3.3 to 100, where in the end a single layer counts, and 1e-9, where gamma does not count
    decrease   "exp", or what the authors compare it with: "log", "linear", "cubic", "negexp", of the mean similarity
    later      c_i is the mean over the layers from i on; False: theta_i itself
    objective  "linear" in the widths, as in the paper, or "convex"
    """
    _check(run.task, taps, center, debiased)
    importance.check_objective(objective)
    keys = [run.key(index, "orm") for index in range(len(run.task.batches))]
    run.meter.begin("ompq", len(keys))
    items = run.bank.measure(
        keys, lambda key: _measure(run.task, keys.index(key), taps, center, debiased, sample_dim), run.meter
    )
    matrix, order = _average(run.task, items)
    gamma = matrix[np.ix_(order, order)].sum(1) - 1
    theta = _theta(gamma, beta, decrease)
    factors = np.zeros(len(matrix))  # of layers that the first batch does not reach
    factors[order] = np.cumsum(theta[::-1])[::-1] / np.arange(len(theta), 0, -1) if later else theta
    notes = {"order": [run.task.layers[i].name for i in order], "gamma": gamma.tolist(), "theta": theta.tolist()}
    return importance.table(run, factors, objective, **notes)


def work(run: Run, **options: Any) -> Work:
    most = max(run.task.sizes)
    widest = max((layer.macs or 0) // layer.params * layer.weight_shape[0] for layer in run.task.layers)
    return Work(len(run.task.batches), 1.0, 8 * most * (len(run.task.layers) * most + widest))


def orm(
    model: nn.Module,
    batches: Any,
    *,
    taps: str = "layer",
    sample_dim: int = 0,
    center: bool = True,
    debiased: bool = False,
    layers: Sequence[str] | None = None,
    forward: Forward | None = None,
) -> np.ndarray:
    """float64 [L, L]: how alike the features of any two layers are, in the order of `catalog(model)`.

    Centred, this is linear CKA (Kornblith et al. 2019, arXiv 1905.00414).

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> orm(model, torch.randn(32, 8)).shape
    (2, 2)
    """
    task = Task(model, batches, layers=layers, forward=forward)
    _check(task, taps, center, debiased)
    with held(model):
        items = [_measure(task, index, taps, center, debiased, sample_dim) for index in range(len(task.batches))]
    return _average(task, items)[0]


def _check(task: Task, taps: str, center: bool, debiased: bool) -> None:
    features.check_taps(taps)
    if debiased and not center:
        raise ValueError("debiased=True with center=False; wanted center=True, which the estimate contains")
    least = 4 if debiased else 2 if center else 1
    if min(task.sizes) < least:
        raise ValueError(f"a batch holds {min(task.sizes)} samples; wanted at least {least} in each")
    if max(task.sizes) > MOST:
        raise ValueError(f"a batch holds {max(task.sizes)} samples; wanted at most {MOST} in each, and more batches")


def _measure(task: Task, index: int, taps: str, center: bool, debiased: bool, sample_dim: int) -> Item:
    """Of one batch. A layer that is called several times has the outputs of all calls side by side."""
    samples = task.sizes[index]
    grams = torch.zeros(len(task.layers), samples, samples, dtype=torch.float64, device=task.device)

    def take(layer: int, feature: Tensor) -> None:
        grams[layer] += torch.ops.mpqkern.gram([feature], center)[0]

    order = features.visit(task, index, taps, take, sample_dim)
    if debiased:
        grams = u_centred(grams)
    norms = grams.flatten(1).norm(dim=1)
    unit = grams.flatten(1) / torch.where(norms > 0, norms, 1.0)[:, None]
    matrix = (unit @ unit.T).clamp_(-1, 1).fill_diagonal_(1)
    return {"orm": matrix.cpu().numpy(), "order": np.array(order)}


def _average(task: Task, items: Sequence[Item]) -> tuple[np.ndarray, list[int]]:
    """ORM, and the layers in the order in which the first batch calls them."""
    matrix = np.average([item["orm"] for item in items], axis=0, weights=task.sizes)
    order = items[0]["order"].tolist()
    alone = [task.layers[i].name for i in order if np.count_nonzero(matrix[i]) == 1]
    if alone and len(order) > 1:
        log.warning("%s resemble no other layer, as features do that are the same for all samples", ", ".join(alone))
    return matrix, order


def _theta(gamma: np.ndarray, beta: float | None, decrease: str) -> np.ndarray:
    if decrease == "exp":
        return importance.decayed(gamma, beta)
    if decrease not in DECREASES:
        raise ValueError(f"decrease={decrease!r}; wanted 'exp', 'log', 'linear', 'cubic' or 'negexp'")
    mean = np.clip(gamma / max(len(gamma) - 1, 1), 0, 1)
    return DECREASES[decrease](mean) - DECREASES[decrease](1.0)
