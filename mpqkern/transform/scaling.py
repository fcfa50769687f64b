"""scaling: one factor a channel, taken out of the layer that makes the channel and put into those that read it.

    W1 -> W1 / s (rows, with the bias)        W2 -> W2 * s (columns)

keeps W2 f(W1 x) where f(s y) = s f(y) for every s > 0, as for relu.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from .graph import Edge, Node
from .rewriting import Change, assign_


def rows(scale: Tensor, weight: Tensor) -> Tensor:
    """`scale` [outputs], shaped so that it multiplies a weight [outputs, ...] row by row."""
    return scale.view(-1, *[1] * (weight.dim() - 1))


def columns(scale: Tensor, module: nn.Module) -> Tensor:
    """`scale` [inputs], shaped so that it multiplies the weight of a Linear or Conv2d input by input.

    In a convolution of G groups the weight is [outputs, inputs / G, ...]: the outputs of a group have their own inputs.
    """
    weight = module.weight
    if not isinstance(module, nn.Conv2d):
        return scale
    by_group = scale.view(module.groups, 1, -1).expand(-1, weight.shape[0] // module.groups, -1)
    return by_group.reshape(*weight.shape[:2], 1, 1)


def row_ranges(weight: Tensor) -> Tensor:
    """max |w| over each output's weights."""
    return weight.abs().flatten(1).amax(1) if weight.dim() > 1 else weight.abs()


def column_ranges(weight: Tensor, module: nn.Module) -> Tensor:
    """max |w| over each input's weights; [inputs]."""
    if not isinstance(module, nn.Conv2d):
        return weight.abs().amax(0)
    by_group = weight.abs().flatten(2).amax(2).view(module.groups, -1, weight.shape[1])
    return by_group.amax(1).flatten()


def by_producer(values: Tensor, edge: Edge, channels: int) -> Tensor:
    """The largest of the consumer's values, at least 0, for each channel of the producer."""
    found = torch.zeros(channels, dtype=values.dtype, device=values.device)
    return found.scatter_reduce(0, edge.index.to(values.device), values, "amax")


def rescale(producer: Node, consumers: list[tuple[Node, Edge]], scale: Tensor) -> Change:
    """The change that divides the producer's channels by `scale` (fp64) and multiplies it into the consumers."""

    def make(undo: ExitStack) -> None:
        for parameter in producer.module._parameters.values():
            if parameter is not None:
                assign_(parameter, parameter.detach().double() / rows(scale, parameter), undo)
        for node, edge in consumers:
            factor = columns(scale[edge.index.to(scale.device)], node.module)
            assign_(node.module.weight, node.module.weight.detach().double() * factor, undo)

    names = ", ".join(node.name for node, _ in consumers)
    note = f"{scale.numel()} channels divided by {float(scale.min()):.3g} to {float(scale.max()):.3g}"
    return Change(f"{producer.name} -> {names}", note, make)
