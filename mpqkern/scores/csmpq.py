"""CSMPQ: TF-IDF over channels, the samples being the documents (Wang et al. 2023, arXiv 2212.10220).

With z [N, C] a layer's features after a ReLU, averaged over all but samples and channels, for each channel c:

    m_c     = mean_n z_nc;  I_nc = [z_nc >= m_c];  S_c = sum_n I_nc
    TF_nc   = kappa z_nc / sum_c' z_nc'           kappa = 1 + ln(C / balance), or 1
    tf_c    = sum_n TF_nc I_nc / S_c
    idf_c   = ln(N / (S_c + 1))
    gamma   = mean_c tf_c idf_c                   the layer's class separability, in which no class enters
    maximise sum_i theta_i b_i under the budgets  theta = gamma, or a falling function of it

All statistics are over the samples of all batches together; only z is kept of each. Channels are the second axis of
what a convolution gives and the last one of a linear layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..measuring.bank import Item
from ..measuring.meter import Work
from ..measuring.task import Task
from ..numbers import check_number
from . import features, importance
from .run import Run
from .table import Scores

DIRECTIONS = ("increasing", "decreasing")
AFTERWARDS = ("direction", "beta", "balance", "objective", "schemes", "rounding")


def score(
    run: Run,
    *,
    taps: str = "layer",
    sample_dim: int = 0,
    direction: str = "increasing",
    beta: float | None = None,
    balance: float | None = None,
    objective: str = "linear",
) -> Scores:
    """Importance of each layer from one forward pass.

    taps       "layer", a layer's own output, or "block", after norm, activation and shortcut as in the paper
    sample_dim 1 for models that compute on [sequence, samples, ...]: layers with such outputs
    direction  "increasing": theta = gamma, as the paper has it and its code for training; "decreasing":
               theta = exp(-beta gamma), as the code for quantization after training has it
    beta       for "decreasing"; None: from 1 to 1/e over the layers. The authors use 1 and 3.3, which for their
               gamma of about 0.01 hardly tells layers apart
    balance    gamma falls as 1 / C with the number of channels; a number here makes up for a part of that
    objective  "linear" in the widths, as in the paper, or "convex"
    """
    features.check_taps(taps)
    importance.check_objective(objective)
    if direction not in DIRECTIONS:
        raise ValueError(f"direction={direction!r}; wanted 'increasing' or 'decreasing'")
    check_number("balance", balance, "a number of channels above 0, or None", lambda v: v > 0, optional=True)
    if run.task.samples < 2:
        raise ValueError("the batches hold 1 sample; wanted at least 2")
    keys = [run.key(index, "pooled") for index in range(len(run.task.batches))]
    run.meter.begin("csmpq", len(keys))
    items = run.bank.measure(keys, lambda key: _measure(run.task, keys.index(key), taps, sample_dim), run.meter)
    reached = [i for i in range(len(run.task.layers)) if all(str(i) in item for item in items)]
    gamma = np.array([separability(np.concatenate([item[str(i)] for item in items]), balance) for i in reached])
    # where every sample has the same, gamma is a little below 0: there is nothing to lose
    theta = np.maximum(gamma, 0.0) if direction == "increasing" else importance.decayed(gamma, beta)
    factors = np.zeros(len(run.task.layers))  # of layers that a batch does not reach
    factors[reached] = theta
    notes = {"order": [run.task.layers[i].name for i in reached], "gamma": gamma.tolist(), "theta": theta.tolist()}
    return importance.table(run, factors, objective, **notes)


def work(run: Run, **options: Any) -> Work:
    channels = sum(layer.weight_shape[0] for layer in run.task.layers)
    return Work(len(run.task.batches), 1.0, 4 * run.task.samples * channels)


def separability(pooled: np.ndarray, balance: float | None = None) -> float:
    """gamma of pooled features [samples, channels], all of them >= 0.

    Below, each channel has one sample above its mean, with 3/4 of what that sample has: 3/4 ln(3/2).

    >>> round(separability(np.array([[1.0, 3.0], [3.0, 1.0], [0.0, 0.0]])), 4)
    0.3041
    """
    z = np.asarray(pooled, dtype=np.float64)
    samples, channels = z.shape
    kappa = 1.0 if balance is None else 1.0 + np.log(channels / balance)
    above = z >= np.minimum(z.mean(0), z.max(0))  # where all are the same, their mean may be rounded up
    count = above.sum(0)
    sums = z.sum(1, keepdims=True)
    share = np.divide(z, sums, out=np.zeros_like(z), where=sums > 0)
    return float(np.mean(kappa * (share * above).sum(0) / count * np.log(samples / (count + 1))))


def _measure(task: Task, index: int, taps: str, sample_dim: int) -> Item:
    """Pooled features of one batch by layer; of several calls of a layer, the channels side by side."""
    found: dict[int, list[Tensor]] = {}

    def take(layer: int, feature: Tensor) -> None:
        found.setdefault(layer, []).append(_pooled(feature, task.layers[layer].kind))

    features.visit(task, index, taps, take, sample_dim)
    return {str(layer): torch.cat(parts, dim=1).cpu().numpy() for layer, parts in sorted(found.items())}


def _pooled(feature: Tensor, kind: str) -> Tensor:
    """fp32 [N, C], summed in fp64."""
    if kind == "conv2d":
        feature = feature.movedim(-3, -1)
    places = list(range(1, feature.dim() - 1))
    positive = feature.clamp(min=0)
    return (positive.mean(places, dtype=torch.float64) if places else positive).float()
