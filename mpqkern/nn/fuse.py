"""fuse: packed layers apply the activation that follows them, before their results are stored.

    conv -> identity -> relu -> next        becomes        conv(activation="relu") -> next

where nothing else reads what lies between. Modules whose code calls both, the layer and what follows, are traced
(torch.fx), one by one, with the modules inside them kept whole; all others are as they were.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from .. import plain
from ..catalog import Forward, call, float_outputs, input_of
from ..held import HOOKS, held, hooked
from .module import PackedModule

log = logging.getLogger("mpqkern")

MODULES = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.GELU: "gelu"}
FUNCTIONS = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.gelu: "gelu",
}
METHODS = {"relu": "relu", "relu_": "relu"}
SAME_AGAIN = 4  # times the distance of two runs of the model may lie between it and the fused one


def fuse(model: nn.Module, batch: Any, *, forward: Forward | None = None) -> nn.Module:
    """A model that computes the same, whose packed layers apply the ReLU, ReLU6, SiLU or GELU (by the error function)
    that alone reads their results. For inference: `model`, in eval mode, stays as it is, and both hold the same layers
    and tensors.

    What is changed are the modules whose code calls a packed layer and then an activation: those become
    `torch.fx.GraphModule`s. A module stays as it is if its code cannot be traced, if it takes anything but one input,
    or if somebody's hooks would see a difference. Save, swap or unswap the model that was fused, and fuse it again.

    `batch` (tensor, tuple or dict; `forward(model, batch)` is for models that are called in another way) is a trial of
    the new code: with activations apart from layers its outputs have to be what they were, else nothing is returned.

    >>> from mpqkern import swap_
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    >>> _ = swap_(model, 4)
    >>> fused = fuse(model, torch.randn(8, 64))
    >>> [(node.target, node.kwargs) for node in fused.graph.nodes if node.op == "call_module"]
    [('0', {'activation': 'relu'}), ('2', {})]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={type(model).__name__}; wanted a torch.nn.Module")
    if not _holds_packed(model):
        raise ValueError("model has no packed layer; wanted one that swap_ has worked on")
    if model.training:
        raise ValueError("model is in training mode; wanted model.eval()")
    fused = _fused(model, "", {})
    _require_same(model, fused, batch, forward or call)
    return fused


def calls(module: nn.Module) -> Iterator[torch.fx.Node]:
    """The calls of layers that apply an activation, in the code that `fuse` has made for `module`."""
    if isinstance(module, torch.fx.GraphModule):
        yield from (node for node in module.graph.nodes if node.op == "call_module" and "activation" in node.kwargs)


def _holds_packed(module: nn.Module) -> bool:
    return any(isinstance(m, PackedModule) for m in module.modules())


def _fused(module: nn.Module, name: str, done: dict[int, nn.Module]) -> nn.Module:
    """`module` with all that lies below it, copied as far as it changes."""
    if isinstance(module, PackedModule) or not _holds_packed(module):
        return module
    if id(module) not in done:
        new = copy.copy(module)
        new._modules = {}
        done[id(module)] = new
        for key, child in module._modules.items():
            new._modules[key] = child and _fused(child, f"{name}.{key}" if name else key, done)
        done[id(module)] = _rewritten(new, name)
    return done[id(module)]


def _rewritten(module: nn.Module, name: str) -> nn.Module:
    """The module as a graph in which layers apply activations; itself where none can."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    plainly = [p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters]
    if plainly != [True, True] or "forward" in vars(module):  # self and one input: no default would be taken for good
        return module
    try:
        graph = _Tracer().trace(module)
    except Exception as error:  # whatever a module's code does to something that is no tensor
        log.info("%s is left as it is: %s", name or "the model", error)
        return module
    found = False
    for node in graph.nodes:
        activation = _activation(module, node)
        layer = _layer_before(module, node) if activation else None
        if layer is None:
            continue
        layer.kwargs = {**layer.kwargs, "activation": activation}
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
        found = True
    if not found:
        return module
    new = torch.fx.GraphModule(module, graph, type(module).__name__)
    new.training = module.training
    for key in (*HOOKS, "_is_full_backward_hook"):
        if key in vars(module):
            vars(new)[key] = vars(module)[key]
    return new


class _Tracer(torch.fx.Tracer):
    """Goes into no module but those that have neither packed layers nor tensors of their own, such as activations."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        held_inside = next(m.parameters(), None) is not None or next(m.buffers(), None) is not None
        return held_inside or super().is_leaf_module(m, module_qualified_name)


def _activation(module: nn.Module, node: torch.fx.Node) -> str | None:
    """Which one a node applies to its first argument."""
    if len(node.args) == 0 or not isinstance(node.args[0], torch.fx.Node):
        return None
    if node.op == "call_module":
        called = module.get_submodule(node.target)
        known = MODULES.get(type(called))
        exact = getattr(called, "approximate", "none") == "none"
        return known if known and exact and not _is_watched(called) else None
    only_in_place = len(node.args) == 1 and set(node.kwargs) <= {"inplace"}
    known = {"call_function": FUNCTIONS, "call_method": METHODS}.get(node.op, {}).get(node.target)
    return known if known and only_in_place else None


def _layer_before(module: nn.Module, node: torch.fx.Node) -> torch.fx.Node | None:
    """The call of a packed layer whose results, past identities, the node alone reads."""
    before = node.args[0]
    while before.op == "call_module" and len(before.users) == 1 and len(before.args) == 1 and not before.kwargs:
        called = module.get_submodule(before.target)
        if _is_watched(called):
            return None
        if isinstance(called, PackedModule):
            return before
        if type(called) is not nn.Identity:
            return None
        before = before.args[0]
    return None


def _is_watched(module: nn.Module) -> bool:
    return any(vars(module).get(name) for name in HOOKS) or "forward" in vars(module)


def _require_same(model: nn.Module, fused: nn.Module, batch: Any, forward: Forward) -> None:
    """Whether the new code computes what the old one did, with activations apart from layers."""

    def apart(layer: PackedModule, args: tuple[Any, ...], named: dict[str, Any], y: Tensor) -> Tensor | None:
        activation = named.get("activation")
        return None if activation is None else plain.ACTIVATIONS[activation](layer.forward(input_of(args, named)))

    def run(of: nn.Module) -> list[Tensor]:
        with held(of):
            return float_outputs(forward(of, batch))

    once, again = run(model), run(model)
    layers = [m for m in fused.modules() if isinstance(m, PackedModule)]
    with hooked(m.register_forward_hook(apart, prepend=True, with_kwargs=True) for m in layers):
        new = run(fused)
    if not once:
        raise ValueError("the model's output holds no float tensor to compare; wanted at least one")
    same = [y.shape for y in once] == [y.shape for y in new]
    if not same or not all(_near(*ys) for ys in zip(once, again, new, strict=True)):
        raise ValueError("the model's code depends on more than its inputs; wanted one that torch.fx traces")


def _near(once: Tensor, again: Tensor, new: Tensor) -> bool:
    """Equal, where the model repeats itself."""
    if torch.equal(once.nan_to_num(), new.nan_to_num()) and torch.equal(once.isnan(), new.isnan()):
        return True
    return float((new - once).abs().max()) <= SAME_AGAIN * float((again - once).abs().max())
