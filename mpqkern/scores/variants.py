"""Variants: the weights and activations that packed layers would compute with, put into the float model for a while."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import packed, plain
from ..scheme import PACKABLE_BITS, Scheme
from .nothing import Nothing
from .task import Task

ROUNDINGS = ("minmax", "mse")
CACHE_BYTES = 2**30


class Variants:
    """`weight(l, b)` is the weight of layer l as scheme b stores it; `applied({l: b})` makes the model use it.

    The same rounding as `swap_`; 1, 3, 5, 6 and 7 bits, which no kernel stores, follow the same formula. What
    was made is kept up to `CACHE_BYTES`.
    """

    def __init__(self, task: Task, schemes: Sequence[Scheme | None], rounding: str = "minmax") -> None:
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding={rounding!r}; wanted 'minmax' or 'mse'")
        self.task, self.schemes, self.rounding = task, list(schemes), rounding
        self._kept: OrderedDict[tuple[int, int], Tensor] = OrderedDict()

    def parameter(self, layer: int) -> nn.Parameter:
        return self.task.modules[layer][0].weight

    def weight(self, layer: int, scheme: int) -> Tensor:
        """In the weight's own shape and type. Call it only while the model holds its float weights."""
        key = (layer, scheme)
        if key not in self._kept:
            weight, wanted = self.parameter(layer).detach(), self.schemes[scheme]
            self._kept[key] = weight if wanted is None else rounded(weight, wanted, self.rounding)
            while sum(t.nbytes for t in self._kept.values()) > CACHE_BYTES and len(self._kept) > 1:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def change(self, layer: int, scheme: int) -> Tensor:
        """What rounding adds to the weight."""
        return self.weight(layer, scheme) - self.parameter(layer).detach()

    @contextmanager
    def applied(self, choice: Mapping[int, int]) -> Iterator[None]:
        """Within it the model computes with scheme `choice[l]` in each layer l that is named. Does not nest."""
        weights = {layer: self.weight(layer, scheme) for layer, scheme in choice.items()}
        with ExitStack() as undo:
            for layer, scheme in choice.items():
                parameter = self.parameter(layer)
                undo.callback(setattr, parameter, "data", parameter.data)
                parameter.data = weights[layer]
                wanted = self.schemes[scheme]
                if wanted is not None and wanted.act_bits is not None:
                    hook = _activation_hook(wanted, self.task.layers[layer].kind)
                    for module in self.task.modules[layer]:
                        undo.callback(module.register_forward_pre_hook(hook).remove)
            yield


def rounded(weight: Tensor, scheme: Scheme, rounding: str = "minmax") -> Tensor:
    """The weight that a layer packed by `scheme` computes with.

    >>> rounded(torch.tensor([[-1.5, 0.4, 1.5]]), Scheme(2))
    tensor([[-1.5000,  0.5000,  1.5000]])
    """
    rows = packed.weight_rows(weight)
    args = (rows, scheme.bits, scheme.group_size or 0, scheme.symmetric, rounding, scheme.scale_dtype)
    if scheme.bits in PACKABLE_BITS:
        qweight, scales, zeros, _ = torch.ops.mpqkern.quantize(*args)
        found = torch.ops.mpqkern.dequantize(qweight, scales, zeros, scheme.bits, scheme.group_size or 0, rows.shape[1])
    else:
        codes, scales, zeros, _ = plain.fit(*args)
        found = packed.values(codes, scales, zeros, scheme.group_size or 0)
    return packed.weight_from_rows(found, weight.shape).to(weight.dtype)


def rounded_input(x: Tensor, scheme: Scheme, kind: str) -> Tensor:
    """The input that a packed layer computes with: a scale a row and group, for images one a sample."""
    grouped, size = (x.float().flatten(1), 0) if kind == "conv2d" else (x.float(), scheme.group_size or 0)
    q, scale = plain.quantize_activations(grouped, size, scheme.act_bits)
    return (q * packed.spread(scale, size, grouped.shape[-1])).view(x.shape).to(x.dtype)


def _activation_hook(scheme: Scheme, kind: str) -> Callable[[nn.Module, tuple], Any]:
    """Rounds a layer's input; its gradient passes straight through, as rounding has no slope of its own."""

    def hook(module: nn.Module, args: tuple) -> tuple | None:
        x = args[0]
        if isinstance(x, Nothing):
            return None  # of a call that is skipped
        back = rounded_input(x.detach(), scheme, kind)
        return (x + (back - x.detach()) if torch.is_grad_enabled() else back, *args[1:])

    return hook
