"""smooth_: takes outliers of activations into the weights (Xiao et al. 2022, arXiv 2211.10438).

    s[j] = max |X_j|^alpha / max |W_j|^(1 - alpha),   X_j -> X_j / s[j],   W_j -> W_j s[j]      (their equation 4)

for input channel j of a layer with activations X and weights W. 8-bit activations share one scale over a row's
channels, so a few large channels leave few codes to the others; weights are even and have room. X / s costs nothing at
run time: whatever makes X, a norm or a layer, makes it smaller.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..catalog import input_of
from ..held import held
from ..numbers import check_number
from .graph import Edge, Node, graph, unshared
from .rewriting import Forward, Report, Row, Trial
from .scaling import by_producer, column_ranges, rescale

KNOWN = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.RMSNorm)  # weight and bias multiply and shift the output


def smooth_(model: nn.Module, batches: Any, *, alpha: float = 0.5, forward: Forward | None = None) -> Report:
    """Evens out activations before they are rounded to 8 bits (`Scheme(8, act_bits=8)`), in place.

    The scale goes into the weight and bias of the norm, Linear or Conv2d whose output feeds nothing but Linear and
    Conv2d layers, directly or through relu and the like; layers that read the same output, as queries, keys and values
    do, share one scale. Norms of other makes count if their output scales with their weight, which is tried. What has
    no such layers after it stays, with the reason in the report. `alpha` is how much of the range moves into the
    weights, 0 to 1. Ranges are taken over all `batches`; they and `forward` are as in `fold_batchnorm_`, and as there
    it is all or nothing.

    >>> model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 4))
    >>> model[0].weight.data[3] = 50.0
    >>> print(smooth_(model, torch.randn(8, 16)).done[0].name, bool(model[0].weight[3] < 10))
    0 -> 1 True
    """
    check_number("alpha", alpha, "a number from 0 to 1", lambda v: 0 <= v <= 1)
    trial = Trial(model, batches, forward)
    nodes = graph(model, lambda: trial.run(trial.batches[0]))
    reasons = {node.name: _reason(node, nodes) for node in nodes.values()}
    groups = {n.name: [(nodes[e.consumer], e) for e in n.edges] for n in nodes.values() if reasons[n.name] is None}
    ranges, fixed = _watch(trial, nodes, groups)
    changes = []
    for name, consumers in groups.items():
        producer = nodes[name]
        channels = producer.module.weight.shape[0]
        large = _largest(channels, [(ranges[node.name], edge) for node, edge in consumers])
        weights = [(column_ranges(node.module.weight.detach().double(), node.module), edge) for node, edge in consumers]
        if name in fixed:
            reasons[name] = "its output does not scale with its weight"
        elif not large.isfinite().all():
            reasons[name] = "its output is not finite"
        else:
            changes.append(rescale(producer, consumers, _scale(large, _largest(channels, weights), alpha)))
    left = [Row(name, False, reason) for name, reason in reasons.items() if reason is not None]
    return trial.rewrite(changes, left)


def _reason(node: Node, nodes: dict[str, Node]) -> str | None:
    if node.module._parameters.get("weight") is None and node.trouble is None:
        return "it has no weight that could take a scale"
    return unshared(node, nodes)


def _watch(
    trial: Trial, nodes: dict[str, Node], groups: dict[str, list[tuple[Node, Edge]]]
) -> tuple[dict[str, Tensor], set[str]]:
    """max |X_j| over all batches for each consumer, fp64; the producers whose weight does not scale their output."""
    ranges: dict[str, Tensor] = {}
    fixed: set[str] = set()

    def read(node: Node, module: nn.Module, args: tuple, kwargs: dict) -> None:
        now = input_of(args, kwargs).detach().abs().movedim(node.axis, 0).flatten(1).amax(1).double()
        ranges[node.name] = torch.maximum(ranges[node.name], now) if node.name in ranges else now

    def tried(node: Node, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not _scales_along(node, args, kwargs):
            fixed.add(node.name)

    with held(trial.model):  # which takes the hooks off again
        hooks = [(node.module, partial(read, node)) for group in groups.values() for node, _ in group]
        hooks += [(nodes[n].module, partial(tried, nodes[n])) for n in groups if type(nodes[n].module) not in KNOWN]
        for module, hook in hooks:
            module.register_forward_pre_hook(hook, with_kwargs=True)
        for batch in trial.batches:
            trial.run(batch)
    return ranges, fixed


def _scales_along(node: Node, args: tuple, kwargs: dict) -> bool:
    """Whether twice the weight and bias in every other channel makes twice the output there; that is exact."""
    module = node.module
    twice = 1.0 + torch.arange(module.weight.numel(), device=module.weight.device) % 2

    def output() -> Tensor:
        copies = [x.clone() if isinstance(x, Tensor) else x for x in (*args, *kwargs.values())]
        return module.forward(*copies[: len(args)], **dict(zip(kwargs, copies[len(args) :], strict=True)))

    plain = output()
    kept = [
        (p, p.data) for p in (module.weight, module.bias if "bias" in module._parameters else None) if p is not None
    ]
    try:
        for parameter, data in kept:
            parameter.data = data * twice.to(data.dtype)
        scaled = output()
    finally:
        for parameter, data in kept:
            parameter.data = data
    axis = node.axis % plain.dim()
    wanted = plain * twice.to(plain.dtype).view(-1, *[1] * (plain.dim() - axis - 1))
    return torch.equal(scaled, wanted)


def _largest(channels: int, values: list[tuple[Tensor, Edge]]) -> Tensor:
    """For each of the producer's channels, the largest of what its consumers have for it."""
    return torch.stack([by_producer(v, edge, channels) for v, edge in values]).amax(0)


def _scale(x: Tensor, w: Tensor, alpha: float) -> Tensor:
    """s; 1 for a channel that is always 0 or that no weight reads."""
    alive = (x > 0) & (w > 0)
    one = torch.ones_like(x)
    return torch.where(alive, x.where(alive, one) ** alpha / w.where(alive, one) ** (1 - alpha), one)
