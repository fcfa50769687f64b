"""fuse: packed layers apply the activation that follows them, before their results are stored.

    conv -> identity -> relu -> next        becomes        conv(activation="relu") -> next

and, where the next one would round that by a fixed scale, conv(activation="relu", out_scale=next.act_scale), whose
results are integers; always where nothing else reads what lies between. It is the code of the modules around them that
changes: a module whose code calls a layer and then an activation gets a copy, of the same layers and tensors, with a
forward that is written anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..catalog import Forward, call, require_arguments
from ..held import held
from ..trees import copied
from .conv import PackedConv2d
from .linear import PackedLinear
from .module import PackedModule
from .trace import Untraceable, compiled, is_watched, shallow_copy, traced

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
SAME_AGAIN = 4  # times the distance of two runs of a module may lie between it and its graph


def fuse(model: nn.Module, batch: Any, *, forward: Forward | None = None) -> nn.Module:
    """A model that computes the same, whose packed layers apply the ReLU, ReLU6, SiLU or GELU (by the error function)
    that alone reads their results. For inference: `model`, in eval mode, stays as it is, and both hold the same layers
    and tensors. Convolutions that follow each other and have fixed scales hand on integers, with the same results.
    Save, cast, move, calibrate, swap or unswap `model`, and fuse it again.

    Modules whose code calls a packed layer and then an activation are of a new class, derived from their own, whose
    forward is a `torch.fx` graph of that code. It takes the module's attributes as they are now; tensors are read at
    each call. A module is left as it is if its code cannot be traced, writes to the module, sets an autocast or a
    gradient mode, or takes anything but one input, if somebody's hooks would see a difference, or if on `batch`
    (tensor, tuple or dict; `forward(model, batch)` is for models that are called in another way) the graph does not
    give exactly what the module does. The logger "mpqkern" tells which and why.

    While it traces, models must not run in other threads: torch.fx replaces `nn.Module.__call__` for a moment.

    >>> from mpqkern import swap_
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    >>> _ = swap_(model, 4)
    >>> fused = fuse(model, torch.randn(8, 64))
    >>> fusions(fused)
    {'0': 'relu'}
    """
    _require_ready(model, batch, forward)
    with held(model):
        graphs = _graphs(model)
        _drop_untrue(graphs, model, lambda: (forward or call)(model, batch))
    for name, module in model.named_modules():
        if module in graphs:
            done = ", ".join(f"{layer} + {what}" for layer, what in _rewrite(module, graphs[module]))
            log.info("%s: %s", name or "the model", done)
    return _fused(model, graphs, {})


def fusions(model: nn.Module) -> dict[str, str]:
    """What `fuse` has had layers do, by the layer's name: apply an activation, hand on integers ("int8"), or both."""
    return {
        f"{name}.{layer}" if name else layer: activation
        for name, module in model.named_modules()
        for layer, activation in getattr(type(module), "fusions_", ())
    }


def _require_ready(model: nn.Module, batch: Any, forward: Forward | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={type(model).__name__}; wanted a torch.nn.Module")
    if fusions(model):
        raise ValueError("model is fused already; wanted the model that fuse was given")
    if not _holds_packed(model):
        raise ValueError("model has no packed layer; wanted one that swap_ has worked on")
    if model.training:
        raise ValueError("model is in training mode; wanted model.eval()")
    if any(type(m).__name__ == "OptimizedModule" or m._compiled_call_impl is not None for m in model.modules()):
        raise ValueError("model is compiled; wanted it fused first and compiled then")
    if forward is None:
        require_arguments(model, batch)


def _holds_packed(module: nn.Module) -> bool:
    return any(isinstance(m, PackedModule) for m in module.modules())


def _graphs(model: nn.Module) -> dict[nn.Module, torch.fx.Graph]:
    """The graphs of all modules in which something can be fused."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedModule) or not _holds_packed(module):
            continue
        try:
            graph = traced(module)
        except Untraceable as reason:
            log.info("%s is left as it is: %s", name or "the model", reason)
            continue
        if any(_pair(module, node) or _hand_over(module, node) for node in graph.nodes):
            found[module] = graph
    return found


def _drop_untrue(graphs: dict[nn.Module, torch.fx.Graph], model: nn.Module, run: Callable[[], Any]) -> None:
    """Leaves those that give what their modules do each time that `run` calls these, at least once."""
    names = {module: name for name, module in model.named_modules()}
    true: dict[nn.Module, bool] = {}
    given: list[Any] = []
    inside = False  # a graph that runs for comparison

    def enter(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not inside:
            given.append(copied((*args, *named.values())))

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal inside
        if inside:
            return
        args, inside = given.pop(), True
        try:
            other = compiled(graphs[module], "trial")(module, *copied(args))
            same = _near(output, other, lambda: module.forward(*copied(args)))
        except Exception as error:  # of code that found something else than when it was traced
            log.info("%s: %s", names[module] or "the model", error)
            same = False
        finally:
            inside = False
        true[module] = true.get(module, True) and same

    for module in graphs:  # which `held` takes off again
        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave, prepend=True)
    run()
    for module in [m for m in graphs if not true.get(m)]:
        why = "its graph gives something else" if module in true else "the batch does not reach it"
        log.info("%s is left as it is: %s", names[module] or "the model", why)
        del graphs[module]


def _near(output: Any, other: Any, again: Callable[[], Any]) -> bool:
    """Equal, where the module repeats itself."""
    ours, theirs = tree_flatten(output), tree_flatten(other)
    if ours[1] != theirs[1]:
        return False
    pairs = [(a, b) for a, b in zip(ours[0], theirs[0], strict=True) if not _equal(a, b)]
    if not pairs:
        return True
    if not all(isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape for a, b in pairs):
        return False
    repeated = [r for a, r in zip(ours[0], tree_flatten(again())[0], strict=True) if any(a is p for p, _ in pairs)]
    allowed = [SAME_AGAIN * float((r - a).abs().max()) for (a, _), r in zip(pairs, repeated, strict=True)]
    return all(float((b - a).abs().max()) <= most for (a, b), most in zip(pairs, allowed, strict=True))


def _equal(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is b or bool(a == b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    same = a == b
    return bool((same | (a.isnan() & b.isnan()) if a.is_floating_point() else same).all())


def _fused(module: nn.Module, graphs: dict[nn.Module, torch.fx.Graph], done: dict[nn.Module, nn.Module]) -> nn.Module:
    """`module` with all that lies below it, copied as far as it changes."""
    if not any(m in graphs for m in module.modules()):
        return module
    if module not in done:
        kind = _kind(module, graphs[module]) if module in graphs else type(module)
        done[module] = new = shallow_copy(module, kind)
        for name, child in module._modules.items():
            if child is not None:
                new._modules[name] = _fused(child, graphs, done)
    return done[module]


def _kind(module: nn.Module, graph: torch.fx.Graph) -> type[nn.Module]:
    """The module's class with the graph for a forward."""
    kind, name = type(module), f"Fused{type(module).__name__}"
    own = {"forward": compiled(graph, name), "fusions_": _pairs(graph), "__reduce_ex__": _reduce}
    return type(kind)(name, (kind,), {**own, "__module__": kind.__module__})


def _reduce(self: nn.Module, protocol: object) -> tuple[Any, ...]:
    """For copies and pickles, which know only the class of before."""
    before = object.__new__(type(self).__mro__[1])
    vars(before).update(vars(self))
    return _again, (before,)


def _again(module: nn.Module) -> nn.Module:
    graph = traced(module)
    _rewrite(module, graph)
    return shallow_copy(module, _kind(module, graph))


def _pairs(graph: torch.fx.Graph) -> tuple[tuple[str, str], ...]:
    calls = [node for node in graph.nodes if node.op == "call_module" and node.meta.get("fused")]
    return tuple((node.target, ", ".join(node.meta["fused"])) for node in calls)


def _rewrite(module: nn.Module, graph: torch.fx.Graph) -> tuple[tuple[str, str], ...]:
    """Has layers apply what follows them, and hand on integers: which, and what."""
    for node in graph.nodes:
        pair = _pair(module, node)
        if pair is not None:
            layer, activation = pair
            layer.kwargs, layer.meta["fused"] = {"activation": activation}, [activation]
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in graph.nodes:
        layer = _hand_over(module, node)
        if layer is not None:
            with graph.inserting_before(layer):
                scale = graph.get_attr(f"{node.target}.act_scale")
            layer.kwargs = {**layer.kwargs, "out_scale": scale}
            layer.meta["fused"] = [*layer.meta.get("fused", ()), "int8"]
    return _pairs(graph)


def _pair(module: nn.Module, node: torch.fx.Node) -> tuple[torch.fx.Node, str] | None:
    """The call of a layer to whose results, past identities, the node alone applies an activation, and which."""
    activation = _activation(module, node)
    layer = _layer_before(module, node) if activation else None
    return None if layer is None or layer.kwargs else (layer, activation)


def _hand_over(module: nn.Module, node: torch.fx.Node) -> torch.fx.Node | None:
    """The call of a convolution whose results, or those of its activation, the node alone reads, another convolution:
    both have fixed scales, and that one pads with zeros alone."""
    if node.op != "call_module" or not _has_fixed_scale(module.get_submodule(node.target)):
        return None
    if len(node.args) != 1 or module.get_submodule(node.target)._pad_before is not None:
        return None
    layer = _layer_before(module, node)
    given = layer is not None and set(layer.kwargs) <= {"activation"} and layer.meta.get("fused", not layer.kwargs)
    return layer if given and _has_fixed_scale(module.get_submodule(layer.target)) else None


def _has_fixed_scale(module: nn.Module) -> bool:
    return type(module) is PackedConv2d and module.act_scale is not None and not is_watched(module)


def _layer_before(module: nn.Module, node: torch.fx.Node) -> torch.fx.Node | None:
    """The call of a packed layer whose results, past identities, the node alone reads."""
    before = node.args[0] if node.args else None
    while isinstance(before, torch.fx.Node) and before.op == "call_module" and len(before.users) == 1:
        called = module.get_submodule(before.target)
        if len(before.args) != 1 or is_watched(called):
            return None
        if type(called) in (PackedLinear, PackedConv2d):
            return before
        if type(called) is not nn.Identity or before.kwargs:
            return None
        before = before.args[0]
    return None


def _activation(module: nn.Module, node: torch.fx.Node) -> str | None:
    """Which one a node applies to its first argument."""
    if len(node.args) != 1 or not isinstance(node.args[0], torch.fx.Node):
        return None
    if node.op == "call_module":
        called = module.get_submodule(node.target)
        exact = getattr(called, "approximate", "none") == "none"
        return MODULES.get(type(called)) if exact and not is_watched(called) else None
    known = {"call_function": FUNCTIONS, "call_method": METHODS}.get(node.op, {})
    return known.get(node.target) if set(node.kwargs) <= {"inplace"} else None
