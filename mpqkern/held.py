"""held: whatever is measured on a model inside this context, the model is as it was afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class held:
    """Context: eval mode, gradients only if asked for; on leaving it, however that happens, everything is as found.

    Modes, hooks, replaced forwards, which tensors the parameters hold, `requires_grad`, `.grad`, the values of
    buffers, the random states of torch (CPU and GPUs), Python and NumPy, torch's gradient mode. Weights may be
    exchanged inside (`parameter.data = other`) but not written to: they are not copied.
    """

    def __init__(self, model: nn.Module, *, grad: bool = False) -> None:
        self.model, self.grad = model, grad

    def __enter__(self) -> None:
        self._modules = [_Module(module) for module in self.model.modules()]
        self._parameters = [(p, p.data, p.requires_grad, p.grad) for p in self.model.parameters()]
        self._was_grad = torch.is_grad_enabled()
        self._rng, self._python_rng, self._numpy_rng = torch.get_rng_state(), random.getstate(), np.random.get_state()
        self._gpu_rng = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        # In eval mode torch's transformer layers read their weights without calling the layers that hold them.
        self._fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        # Compiled code would be compiled anew for every change; the model's own code does the same.
        compiled = any(
            type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
            for module in self.model.modules()
        )
        self._stance = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        self._stance.__enter__()
        torch.set_grad_enabled(self.grad)
        for module in self.model.modules():
            module.training = False

    def __exit__(self, *_: object) -> None:
        self._stance.__exit__(None, None, None)
        for module in self._modules:
            module.restore()
        for parameter, data, needs, grad in self._parameters:
            if parameter.data_ptr() != data.data_ptr() or parameter.shape != data.shape:
                parameter.data = data
            if parameter.requires_grad != needs:  # one that was made in inference mode refuses to be asked
                parameter.requires_grad_(needs)
            parameter.grad = grad
        torch.backends.mha.set_fastpath_enabled(self._fast)
        torch.set_grad_enabled(self._was_grad)
        torch.set_rng_state(self._rng)
        random.setstate(self._python_rng)
        np.random.set_state(self._numpy_rng)
        if self._gpu_rng:
            torch.cuda.set_rng_state_all(self._gpu_rng)


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Context: hooks that are registered as `handles` are asked for; on leaving it, however that happens, they are off.

    >>> layer = nn.ReLU()
    >>> with hooked(m.register_forward_hook(lambda *call: print("called")) for m in [layer]):
    ...     _ = layer(torch.ones(1))
    called
    >>> _ = layer(torch.ones(1))
    """
    with ExitStack() as undo:
        for handle in handles:
            undo.enter_context(handle)
        yield


NARROW = 16  # channels: floats in the widest vector


@contextmanager
def sound_backward(*models: nn.Module) -> Iterator[None]:
    """Context for backward passes: oneDNN is off, in all of the process, where it could spoil gradients of weights.

    In channels-last memory, with strides and kernels of one pixel, it takes its scratch for larger than it is if there
    are fewer channels than floats in a vector (github.com/uxlfoundation/oneDNN/issues/6035): gradients are wrong, what
    lies beside the scratch is written to, threads wait forever. Convolutions that are no modules are not seen.
    """
    spoilt = any(
        isinstance(m, nn.Conv2d)
        and set(m.kernel_size) == {1}
        and set(m.stride) != {1}
        and m.in_channels < NARROW
        and m.groups == 1
        for model in models
        for m in model.modules()
    )
    was = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = was and not spoilt  # `flags` would set precisions for good on leaving
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = was


class _Module:
    """What one module was like."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.training = module, module.training
        self.forward = module.__dict__.get("forward")
        self.hooks = {name: dict(module.__dict__[name]) for name in HOOKS if module.__dict__.get(name) is not None}
        self.parameters = dict(module._parameters)
        self.buffers = dict(module._buffers)
        # packed weights are constants: no copies of those
        constant = "qweight" in module._buffers
        self.values: dict[str, Tensor] = {
            k: t.detach().clone() for k, t in module._buffers.items() if t is not None and not constant
        }

    def restore(self) -> None:
        module: Any = self.module
        module.training = self.training
        if self.forward is not None:
            module.__dict__["forward"] = self.forward
        else:
            module.__dict__.pop("forward", None)
        for name, hooks in self.hooks.items():
            _refill(module.__dict__[name], hooks)
        _refill(module._parameters, self.parameters)
        _refill(module._buffers, self.buffers)
        for name, value in self.values.items():
            buffer = module._buffers[name]
            if not torch.equal(buffer, value):
                buffer.copy_(value)


def _refill(found: dict, before: dict) -> None:
    """In place: handles of hooks and torch itself hold on to these very dictionaries."""
    found.clear()
    found.update(before)
