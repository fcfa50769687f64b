"""equalize_: evens out the ranges of weights across pairs of layers (Nagel et al. 2019, arXiv 1906.04721).

    r1[i] = max |W1| over the weights of output i,   r2[i] = max |W2| over the weights of input i,
    s[i] = sqrt(r1[i] r2[i]) / r2[i],   W1[i] -> W1[i] / s[i],   W2[:, i] -> W2[:, i] s[i]

after which both ranges are sqrt(r1 r2) (their equation 11). A layer in the middle of a chain, as a depthwise
convolution is, belongs to two pairs, so the pairs are gone through again until nothing moves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..numbers import check_number
from .graph import Edge, Node, graph, unshared
from .rewriting import Forward, Report, Row, Trial
from .scaling import by_producer, column_ranges, columns, rescale, row_ranges, rows

STILL = 1e-4  # a factor that differs from 1 by less does not move a code of 8 bits
Pair = tuple[Node, Node, Edge]


def equalize_(model: nn.Module, batches: Any, *, iterations: int = 100, forward: Forward | None = None) -> Report:
    """Gives the channels between two layers the same range of weights on both sides, in place.

    A pair is a Linear or Conv2d whose output only one other reads, directly or through relu, leaky relu, pooling,
    views and the like, depthwise convolutions included. ReLU6 clips where a scale would move the clip: such pairs stay,
    and so does everything else, with the reason in the report. What the model computes stays the same up to rounding.
    It goes at most `iterations` times through all pairs. Fold batch norms first. `batches` and `forward` are as in
    `fold_batchnorm_`, and as there it is all or nothing.

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> model[0].weight.data = torch.tensor([[8.0, 0.0], [0.0, 1.0]])
    >>> model[2].weight.data = torch.tensor([[0.5, 1.0]])
    >>> _ = equalize_(model, torch.randn(4, 2))
    >>> print(model[0].weight.detach(), model[2].weight.detach())
    tensor([[2., 0.],
            [0., 1.]]) tensor([[2., 1.]])
    """
    check_number("iterations", iterations, "a whole number, at least 1", lambda v: v >= 1, whole=True)
    trial = Trial(model, batches, forward)
    nodes = graph(model, lambda: trial.run(trial.batches[0]))
    pairs: list[Pair] = []
    left = []
    for node in nodes.values():
        if not node.is_layer:
            continue
        reason = unshared(node, nodes)
        if reason is None and len(node.edges) > 1:
            reason = f"it feeds {node.edges[0].consumer} and {node.edges[1].consumer}"
        if reason is None:
            pairs.append((node, nodes[node.edges[0].consumer], node.edges[0]))
        else:
            left.append(Row(node.name, False, reason))
    scales = _scales(pairs, iterations)
    changes = [rescale(a, [(b, edge)], s) for (a, b, edge), s in zip(pairs, scales, strict=True)]
    return trial.rewrite(changes, left)


def _scales(pairs: list[Pair], iterations: int) -> list[Tensor]:
    """fp64 [channels] for each pair: the product of what all rounds ask for."""
    weights = {node.name: node.module.weight.detach().double() for a, b, _ in pairs for node in (a, b)}
    scales = [torch.ones_like(row_ranges(weights[a.name])) for a, _, _ in pairs]
    for _ in range(iterations):
        moved = 0.0
        for i, (a, b, edge) in enumerate(pairs):
            step = _step(weights[a.name], weights[b.name], b.module, edge)
            weights[a.name] = weights[a.name] / rows(step, weights[a.name])
            weights[b.name] = weights[b.name] * columns(step[edge.index.to(step.device)], b.module)
            scales[i] = scales[i] * step
            moved = max(moved, float((step - 1).abs().max()))
        if moved < STILL:
            break
    return scales


def _step(first: Tensor, second: Tensor, reader: nn.Module, edge: Edge) -> Tensor:
    """s of one pair; 1 for a channel that one side has no weight for."""
    r1 = row_ranges(first)
    r2 = by_producer(column_ranges(second, reader), edge, r1.numel())
    alive = (r1 > 0) & (r2 > 0)
    return torch.where(alive, (r1 / r2.where(alive, r1)).sqrt(), torch.ones_like(r1))
