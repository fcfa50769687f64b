"""Measured damage of one layer at a time: the mean increase of the loss while all other layers stay in float.

The baseline that every measured method has to beat. `score` takes the task's loss, `score_kl` the Kullback-Leibler
divergence from the float model's answers, which needs no labels (Xu et al. 2021, arXiv 2112.11438, on language
models).
"""

from __future__ import annotations

import numpy as np

from ..measuring.meter import Work
from .probe import FLOAT, Probe, expected
from .run import Run
from .table import Scores


def score(run: Run) -> Scores:
    """unary[l, b]: mean loss with layer l alone at scheme b, less that of the float model."""
    return _singles(run, "loss")


def score_kl(run: Run) -> Scores:
    """The same by the divergence from the float model, whatever the task's loss."""
    return _singles(run, "kl")


def _singles(run: Run, metric: str) -> Scores:
    size = (len(run.task.layers), len(run.schemes))
    clean = (FLOAT,) * size[0]
    alone = [(*clean[:layer], b, *clean[layer + 1 :]) for layer in range(size[0]) for b in range(size[1])]
    run.meter.begin("single layers", (1 + len(alone)) * len(run.task.batches))
    base, *found = Probe(run, metric)(clean, [clean, *alone])
    return run.scores(np.array([damage.value - base.value for damage in found]).reshape(size))


def work(run: Run) -> Work:
    return expected(run, 1 + len(run.task.layers) * len(run.schemes))


work_kl = work
