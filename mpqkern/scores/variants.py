"""Variants: the weights and activations that packed layers would compute with, put into the float model for a while."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from .. import packed
from ..catalog import input_of
from ..measuring.task import Task
from ..rounding import MinMax, Rounding, as_rounding
from ..rounding.grid import Codes
from ..rounding.layerwise import collect
from ..rounding.statistics import bytes_of
from ..rounding.twin import as_weight, computing_with, input_hook
from ..scheme import Scheme
from .nothing import Nothing

CACHE_BYTES = 2**30


class Variants:
    """`weight(l, b)` is the weight of layer l as scheme b stores it; `applied({l: b})` makes the model use it.

    The same rounding as `swap_`; 1, 3, 5, 6 and 7 bits, which no kernel stores, follow the same formula. What
    was made is kept up to `CACHE_BYTES`. Rounding that looks at a layer's inputs sees those of the float model,
    all in `prepare`, and its codes are kept.
    """

    def __init__(self, task: Task, schemes: Sequence[Scheme | None], rounding: str | Rounding = "minmax") -> None:
        self.task, self.schemes, self.rounding = task, list(schemes), as_rounding(rounding)
        self._kept: OrderedDict[tuple[int, int], Tensor] = OrderedDict()
        self._codes: dict[tuple[int, int], Codes] = {}

    def prepare(self, *, memory: int, seed: int) -> None:
        """Rounds all layers to all schemes where that takes data; the model has to be `held`."""
        if self.rounding.needs == "nothing" or self._codes:
            return
        sizes = [bytes_of(modules[0]) for modules in self.task.modules]
        for layers in _parts(sizes, memory):
            statistics = collect(self.task, layers, memory=memory, seed=seed)
            for layer in layers:
                method = self.rounding.alone() if layer in statistics else MinMax()
                rows = packed.weight_rows(self.parameter(layer).detach()).float().cpu()
                for b, scheme in enumerate(self.schemes):
                    if scheme is not None:
                        self._codes[layer, b] = method.round(rows, scheme, statistics.get(layer))

    def parameter(self, layer: int) -> nn.Parameter:
        return self.task.modules[layer][0].weight

    def weight(self, layer: int, scheme: int) -> Tensor:
        """In the weight's own shape and type. Call it only while the model holds its float weights."""
        key = (layer, scheme)
        if key not in self._kept:
            self._kept[key] = self._made(layer, scheme)
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
                wanted, modules = self.schemes[scheme], self.task.modules[layer]
                hooks = []
                if wanted is not None and wanted.act_bits is not None:
                    hooks.append(_unless_nothing(input_hook(wanted, self.task.layers[layer].kind)))
                undo.enter_context(computing_with(self.parameter(layer), weights[layer], modules, *hooks))
            yield

    def _made(self, layer: int, scheme: int) -> Tensor:
        weight, wanted = self.parameter(layer).detach(), self.schemes[scheme]
        if wanted is None:
            return weight
        if self.rounding.needs != "nothing":
            return as_weight(self._codes[layer, scheme], weight)
        return as_weight(self.rounding.round(packed.weight_rows(weight).float(), wanted), weight)


def _unless_nothing(hook: Any) -> Any:
    """Calls that are skipped have no input to round."""
    return lambda module, args, kwargs: (
        None if isinstance(input_of(args, kwargs), Nothing) else hook(module, args, kwargs)
    )


def _parts(sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices in order, as many at a time as fit."""
    part: list[int] = []
    for i, size in enumerate(sizes):
        if part and sum(sizes[j] for j in part) + size > most:
            yield part
            part = []
        part.append(i)
    if part:
        yield part
