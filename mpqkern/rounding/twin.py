"""The fake-quantized twin: the float model, made to compute with the numbers of its packed self for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import packed, plain
from ..catalog import input_of, kind_of
from ..scheme import Scheme
from .grid import Codes
from .method import Rounding, as_rounding

Hook = Callable[..., Any]
Hooks = tuple[Hook, ...]


@contextmanager
def computing_with(
    parameter: nn.Parameter, weight: Tensor, modules: Sequence[nn.Module], *hooks: Hook
) -> Iterator[None]:
    """Within it `parameter` holds `weight`, and what goes into `modules` passes through `hooks`."""
    with ExitStack() as undo:
        undo.callback(setattr, parameter, "data", parameter.data)
        parameter.data = weight
        for module in modules:
            for hook in hooks:
                undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


class Twin:
    """Layers as they will be packed; `with twin:` the model computes as if they were. Bit for bit the same weights,
    inputs rounded as the kernels round them."""

    def __init__(self) -> None:
        self._layers: dict[str, tuple[list[nn.Module], Tensor, Hooks, Tensor | None]] = {}
        self._undo = ExitStack()

    def put(self, name: str, modules: Sequence[nn.Module], codes: Codes, scheme: Scheme) -> None:
        """From now on with this layer; not inside the context."""
        weight = modules[0].weight.detach()
        values = as_weight(codes, weight)
        shift = None if codes.shift is None else codes.shift.to(weight)
        hooks = () if scheme.act_bits is None else (input_hook(scheme, kind_of(modules[0]), codes.act_scale),)
        self._layers[name] = (list(modules), values, hooks, shift)

    def __enter__(self) -> None:
        with ExitStack() as undo:
            for modules, values, hooks, shift in self._layers.values():
                undo.enter_context(computing_with(modules[0].weight, values, modules, *hooks))
                if shift is not None:
                    for module in modules:
                        undo.callback(module.register_forward_hook(shift_hook(shift, kind_of(module))).remove)
            self._undo = undo.pop_all()

    def __exit__(self, *_: object) -> None:
        self._undo.close()


def rounded(weight: Tensor, scheme: Scheme, rounding: str | Rounding = "minmax") -> Tensor:
    """The weight that a layer packed by `scheme` computes with, where rounding looks at nothing but the weight.

    >>> rounded(torch.tensor([[-1.5, 0.4, 1.5]]), Scheme(2))
    tensor([[-1.5000,  0.5000,  1.5000]])
    """
    return as_weight(as_rounding(rounding).round(packed.weight_rows(weight).float(), scheme), weight)


def as_weight(codes: Codes, like: Tensor) -> Tensor:
    """What codes stand for, in the shape and type of the weight `like`."""
    return packed.weight_from_rows(codes.values().to(like.device), tuple(like.shape)).to(like.dtype)


def rounded_input(x: Tensor, scheme: Scheme, kind: str, scale: Tensor | None = None) -> Tensor:
    """The input that a packed layer computes with: a scale a row and group, for images one a sample, or one for all."""
    grouped, size = (x.float().flatten(1), 0) if kind == "conv2d" else (x.float(), scheme.group_size or 0)
    fixed = None if scale is None else scale.detach().to(x.device)
    q, scale = plain.quantize_activations(grouped, size, scheme.act_bits, fixed)
    return (q * packed.spread(scale, size, grouped.shape[-1])).view(x.shape).to(x.dtype)


def saturated(x: Tensor, scale: Tensor, act_bits: int) -> Tensor:
    """The input rounded by a fixed scale, with gradients for both that take the rounding for a constant shift of
    x / scale: what lies beyond the range moves with the scale alone (Esser et al. 2020, arXiv 1902.08153)."""
    most = largest(act_bits)
    steps = (x.float() / scale).clamp(-most, most)
    return ((steps + (steps.round() - steps).detach()) * scale).to(x.dtype)


def largest(act_bits: int) -> int:
    """The largest integer of a rounded input."""
    return max(2 ** (act_bits - 1) - 1, 1)


def input_hook(scheme: Scheme, kind: str, scale: Tensor | None = None) -> Hook:
    """Rounds a layer's input, by `scale` if there is one; its gradient passes straight through, as rounding has no
    slope of its own."""

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        x = input_of(args, kwargs)
        if not isinstance(x, Tensor):
            return None  # of a call that is skipped
        if scale is not None and torch.is_grad_enabled():
            return (saturated(x, scale.to(x.device), scheme.act_bits),), {}
        back = rounded_input(x.detach(), scheme, kind, scale)
        return (x + (back - x.detach()) if torch.is_grad_enabled() else back,), {}

    return hook


def shift_hook(shift: Tensor, kind: str) -> Hook:
    """Adds to a layer's output what would be added to its bias."""
    by = shift.view(-1, 1, 1) if kind == "conv2d" else shift
    return lambda module, args, output: output + by if isinstance(output, Tensor) else None
