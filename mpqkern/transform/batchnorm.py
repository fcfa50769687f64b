"""fold_batchnorm_: batch norms become part of the layers before them.

    gamma (W x + b - mean) / sqrt(var + eps) + beta  =  (a W) x + (a (b - mean) + beta),   a = gamma / sqrt(var + eps)

with a, mean, beta per output channel (Jacob et al. 2018, arXiv 1712.05877, section 3.2). In fp64, rounded once.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..held import HOOKS
from .graph import Node, graph, rival
from .rewriting import Change, Forward, Report, Row, Trial, assign_

KINDS = (nn.BatchNorm1d, nn.BatchNorm2d)


def fold_batchnorm_(model: nn.Module, batches: Any, *, forward: Forward | None = None) -> Report:
    """Folds each BatchNorm1d and BatchNorm2d that alone reads a Linear or Conv2d into it, in place.

    An nn.Identity takes the norm's place, name, mode and hooks; the layer gets a bias if it had none. What the model
    computes in eval mode stays the same; in training mode the norm's statistics would no longer be learned. Norms that
    cannot be folded stay, with the reason in the report. `batches` is a tensor, an (inputs, labels) pair, a dict, or a
    list of those; `forward(model, batch)` runs anything else. Who feeds whom is seen on the first one, so a model that
    runs other layers on other data needs a first batch that reaches all of them. All or nothing: on any error, also if
    the outputs for any batch change by more than rounding explains, the model is as before.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
    >>> print([row.name for row in fold_batchnorm_(model, torch.randn(2, 3, 8, 8)).done], model[1])
    ['0 -> 1'] Identity()
    """
    trial = Trial(model, batches, forward)
    nodes = graph(model, lambda: trial.run(trial.batches[0]))
    changes, left = [], []
    for node in nodes.values():
        if "running_mean" not in node.module._buffers:
            continue
        found = _producer(node, nodes)
        if isinstance(found, str):
            left.append(Row(node.name, False, found))
        else:
            changes.append(_fold(model, found, node))
    return trial.rewrite(changes, left)


def _producer(norm: Node, nodes: dict[str, Node]) -> Node | str:
    """The layer that the norm can be folded into, or why there is none."""
    module = norm.module
    if type(module) not in KINDS:
        return f"a {type(module).__name__} is not folded"
    if module.running_mean is None:
        return "it has no running statistics (track_running_stats=False)"
    if norm.blocked:
        return norm.blocked
    edges = [(node, edge) for node in nodes.values() for edge in node.edges if edge.consumer == norm.name]
    if not edges or not edges[0][0].is_layer:
        return "no Linear or Conv2d feeds it directly"
    (layer, edge), *_ = edges
    if layer.blocked:
        return f"{layer.name} feeds it: {layer.blocked}"
    if edge.ops:
        return f"{edge.ops[0]} lies between {layer.name} and it"
    if layer.others or len(layer.edges) > 1:
        other = next((e.consumer for e in layer.edges if e is not edge), None) or layer.others[0]
        return f"the output of {layer.name} also goes into {other}"
    if not torch.equal(edge.index, torch.arange(layer.module.weight.shape[0])):
        return f"the channels of {layer.name} are rearranged before it"
    return rival(layer, norm, nodes) or layer


def _fold(model: nn.Module, layer: Node, norm: Node) -> Change:
    places = [name for name, module in model.named_modules(remove_duplicate=False) if module is norm.module]
    scale, shift = _affine(norm.module)

    def make(undo: ExitStack) -> None:
        module, weight = layer.module, layer.module.weight
        bias = shift if module.bias is None else shift + scale * module.bias.detach().double()
        if module.bias is None:
            learned = weight if norm.module.bias is None else norm.module.bias
            undo.callback(module._parameters.update, bias=None)
            module.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=learned.requires_grad)
        else:
            assign_(module.bias, bias, undo)
        assign_(weight, weight.detach().double() * scale.view(-1, *[1] * (weight.dim() - 1)), undo)
        identity = _identity(norm.module)
        for name in places:
            parent, _, key = name.rpartition(".")
            modules = model.get_submodule(parent)._modules
            undo.callback(modules.__setitem__, key, norm.module)
            modules[key] = identity

    low, high = float(scale.abs().min()), float(scale.abs().max())
    return Change(f"{layer.name} -> {norm.name}", f"weights scaled by {low:.3g} to {high:.3g}", make)


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The norm in eval mode as scale * x + shift, fp64 [channels]."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


def _identity(norm: nn.Module) -> nn.Identity:
    new = nn.Identity()
    new.training = norm.training
    for name in (*HOOKS, "_is_full_backward_hook"):
        if name in norm.__dict__:  # the very dictionaries: handles go on working
            new.__dict__[name] = norm.__dict__[name]
    return new
