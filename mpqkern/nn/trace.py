"""traced: the code of one module as a torch.fx graph, modules inside it kept whole, if that says all it does.

Tracing runs the code once on something that is no tensor. It does so on a copy, so that nothing of the module's own is
written to, and gives up where a graph would leave something out: what the code writes to its module, a gradient mode or
an autocast that it sets, an argument that has a default.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import nn

from ..held import HOOKS


class Untraceable(Exception):
    """Why a module's code makes no graph."""


def traced(module: nn.Module) -> torch.fx.Graph:
    """The graph of `type(module).forward`, a function of one input; raises `Untraceable`.

    >>> [node.op for node in traced(nn.Sequential(nn.Linear(2, 2), nn.ReLU())).nodes]
    ['placeholder', 'call_module', 'call_module', 'output']
    """
    parameters = inspect.signature(type(module).forward).parameters.values()
    plainly = [p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters]
    if plainly != [True, True]:  # self and one input: a default would be taken for good
        raise Untraceable("it takes more than one input")
    if "forward" in vars(module):
        raise Untraceable("its forward was replaced on the instance")
    probe = _probe(module)
    with torch.enable_grad(), torch.autocast("cpu", torch.float16):  # unlike what code is likely to set
        try:
            graph = _Tracer().trace(probe)
        except Exception as error:  # whatever code does to something that is no tensor
            raise Untraceable(f"torch.fx cannot trace it: {error}") from None
    if not _unchanged(module, probe):
        raise Untraceable("its code writes to the module")
    return graph


def is_watched(module: nn.Module) -> bool:
    """Whether somebody's own code runs when it is called."""
    return any(vars(module).get(name) for name in HOOKS) or "forward" in vars(module)


def shallow_copy(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """Another module, of the same tensors and modules inside, with lists and dictionaries of its own."""
    new = object.__new__(kind)
    vars(new).update({name: _copied(value) for name, value in vars(module).items()})
    return new


class _Tracer(torch.fx.Tracer):
    """Enters plain sequences, and modules that hold no tensors, such as activations of others' making."""

    proxy_buffer_attributes = True  # read at each call, not taken for constants

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not _is_entered(m)

    def trace(self, *args: Any, **kwargs: Any) -> torch.fx.Graph:
        self._modes = _modes()
        return super().trace(*args, **kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> torch.fx.Node:
        if _modes() != self._modes:
            raise Untraceable("it sets the gradient mode or an autocast")
        return super().create_node(*args, **kwargs)


def _modes() -> tuple[object, ...]:
    autocast = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


def _is_entered(module: nn.Module) -> bool:
    if is_watched(module):
        return False
    if type(module) is nn.Sequential:
        return True
    holds = next(module.parameters(), None) is not None or next(module.buffers(), None) is not None
    return not holds and not type(module).__module__.startswith("torch.nn")


def _probe(module: nn.Module) -> nn.Module:
    """A copy to run code on, with copies of the modules that tracing enters."""
    new = shallow_copy(module, type(module))
    for name, child in module._modules.items():
        if child is not None and _is_entered(child):
            new._modules[name] = _probe(child)
    return new


def _unchanged(module: nn.Module, probe: nn.Module) -> bool:
    entered = {name for name, child in probe._modules.items() if child is not module._modules.get(name)}
    if not all(name in module._modules and _unchanged(module._modules[name], probe._modules[name]) for name in entered):
        return False
    before, after = ({**vars(m), "_modules": {k: v for k, v in m._modules.items() if k not in entered}}
                     for m in (module, probe))  # fmt: skip
    return _same(before, after)


def _copied(value: Any) -> Any:
    """Containers are copied, with those in them; what they hold is not."""
    if isinstance(value, dict):
        made = value.copy()
        made.update({key: _copied(item) for key, item in value.items()})
        return made
    if type(value) in (list, tuple, set):
        return type(value)(_copied(item) for item in value)
    return value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if type(a) in (list, tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return a is b or (type(a) is set and a == b)


def compiled(graph: torch.fx.Graph, name: str) -> Callable[..., Any]:
    """The graph as a function `forward(self, input)`."""
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(compile(code.src, f"<{name}>", "exec"), names)
    return names["forward"]
