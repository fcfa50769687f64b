"""HAWQ's score: the mean curvature of the loss in a layer's weights, times how far rounding moves them.

    score[l, b] = Tr(H_l) / n_l  |Q_b(w_l) - w_l|^2          (Dong et al. 2020, arXiv 1911.03852)

with H_l the Hessian of the mean loss in the n_l weights of layer l. It also is the Hessian-weighted perturbation that
Xu et al. (2021, arXiv 2112.11540) choose precisions of language models by.

Traces are Hutchinson's: for v of random signs, E[v'Hv] = Tr(H). One v spans all layers at once, and the layers' parts
of v * Hv estimate their own blocks: what they catch of other blocks is zero in the mean.
"""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..held import sound_backward
from ..measuring.bank import Item
from ..measuring.meter import Work
from ..numbers import check_number
from .gradient import graph_bytes
from .run import Run
from .table import Scores

ROUND = 4  # probes of a batch that share one graph of its gradient


def score(run: Run, *, tol: float = 0.02, max_probes: int = 64) -> Scores:
    """Mean Hessian eigenvalue of each layer times its squared rounding error; blind to how activations are rounded.

    tol         probing stops once a round of 4 more probes a batch changes the traces by less than this, all layers'
                changes together relative to all traces; 1e-3, which HAWQ's authors ask for, takes ten times the probes
    max_probes  a batch, at most

    A trace below zero, which is noise or a saddle, counts as zero: rounding is not taken for a gain. The traces are in
    the provenance, each with its standard error over the rounds.
    """
    check_number("tol", tol, "0 or more", lambda v: v >= 0)
    check_number("max_probes", max_probes, "a whole number of at least 1", lambda v: v >= 1, whole=True)
    task, names = run.task, [layer.name for layer in run.task.layers]
    rounds = -(-max_probes // ROUND)
    share = np.array(task.sizes) / task.samples
    task.prepare()
    run.meter.begin("hawq", rounds * len(task.batches))
    found: list[np.ndarray] = []  # traces by each round
    for number in range(rounds):
        by_key = {run.key(index, number): index for index in range(len(task.batches))}
        keys = [run.key(index, number) for index in range(len(task.batches))]
        items = run.bank.measure(keys, lambda key, n=number, at=by_key: _probed(run, at[key], n), run.meter)
        found.append(sum(weight * item["products"].mean(0) for weight, item in zip(share, items, strict=True)))
        if number > 0 and _change(found) <= tol:
            break
    traces = np.mean(found, axis=0)
    spread = (np.std(found, axis=0, ddof=1) / len(found) ** 0.5).tolist() if len(found) > 1 else [None] * len(names)
    sizes = np.array([layer.params for layer in task.layers])
    schemes = range(len(run.schemes))
    errors = np.array(
        [[float(run.variants.change(i, b).double().square().sum()) for b in schemes] for i in range(len(names))]
    )
    return run.scores(
        (traces.clip(min=0) / sizes)[:, None] * errors,
        traces=dict(zip(names, traces.tolist(), strict=True)),
        trace_errors=dict(zip(names, spread, strict=True)),
        probes=ROUND * len(found),
    )


def work(run: Run, *, tol: float = 0.02, max_probes: int = 64) -> Work:
    """The most it can take. A round is a forward pass, a gradient (2) and, for each probe, one through both (4)."""
    rounds = -(-max_probes // ROUND)
    weights = sum(run.variants.parameter(i).nbytes for i in range(len(run.task.layers)))
    return Work(rounds * len(run.task.batches), rounds * (3.0 + 4.0 * ROUND), 2 * graph_bytes(run) + 3 * weights)


def _change(found: list[np.ndarray]) -> float:
    """How much the latest round has changed the means, relative to them."""
    now, before = np.mean(found, axis=0), np.mean(found[:-1], axis=0)
    return float(np.abs(now - before).sum() / max(np.abs(now).sum(), np.finfo(float).tiny))


def _probed(run: Run, index: int, number: int) -> Item:
    """float64 [ROUND, layers]: v'Hv of one batch's mean loss, split over the layers."""
    task = run.task
    for parameter in task.model.parameters():
        parameter.requires_grad_(False)
    weights = [run.variants.parameter(layer) for layer in range(len(task.layers))]
    for weight in weights:
        weight.requires_grad_(True)
    draw = run.generator(index, "probes", number)
    products = np.zeros((ROUND, len(weights)))
    # fused attention has no second derivative
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), ExitStack() as undo:
        loss = task.losses(task.run(task.batches[index]), index).mean()
        if not loss.requires_grad:
            raise ValueError("the loss has no gradient; wanted a forward and a loss that torch can differentiate")
        undo.enter_context(sound_backward(task.model))
        grads = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
        curved = [grad for grad in grads if grad.requires_grad]
        for i in range(ROUND):
            signs = [_signs(weight, draw) for weight in weights]
            if not curved:
                continue  # a loss that is linear in every weight
            sides = [v for v, grad in zip(signs, grads, strict=True) if grad.requires_grad]
            hv = torch.autograd.grad(curved, weights, sides, retain_graph=True, materialize_grads=True)
            products[i] = [float((v.double() * h.double()).sum()) for v, h in zip(signs, hv, strict=True)]
    return {"products": products}


def _signs(weight: Tensor, draw: torch.Generator) -> Tensor:
    """+1 and -1, each with the same chance."""
    return (torch.randint(0, 2, weight.shape, generator=draw) * 2 - 1).to(weight)
