"""Variants: the weights and activations that packed layers would compute with, put into the float model for a while."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from .. import packed
from ..catalog import input_of
from ..measuring.bank import Bank, Item
from ..measuring.meter import Meter
from ..measuring.task import Task
from ..rounding import MinMax, Rounding, as_rounding
from ..rounding.grid import Codes
from ..rounding.layerwise import collect
from ..rounding.statistics import Statistics, bytes_of
from ..rounding.twin import as_weight, computing_with, input_hook
from ..scheme import Scheme
from .nothing import Nothing

CACHE_BYTES = 2**30


class Variants:
    """`weight(l, b)` is the weight of layer l as scheme b stores it; `applied({l: b})` makes the model use it.

    The same rounding as `swap_`; 1, 3, 5, 6 and 7 bits, which no kernel stores, follow the same formula. What
    was made is kept up to `CACHE_BYTES`. Rounding that looks at a layer's inputs sees those of the float model,
    all in `prepare`, and its codes are kept, in the bank if there is one.
    """

    def __init__(self, task: Task, schemes: Sequence[Scheme | None], rounding: str | Rounding = "minmax") -> None:
        self.task, self.schemes, self.rounding = task, list(schemes), as_rounding(rounding)
        self._kept: OrderedDict[tuple[int, int], Tensor] = OrderedDict()
        self._codes: dict[tuple[int, int], Codes] = {}

    def prepare(self, bank: Bank, meter: Meter, *, memory: int, seed: int) -> None:
        """Rounds all layers to all schemes where that takes data; the model has to be `held`."""
        if self.rounding.needs == "nothing" or self._codes:
            return
        schemes = {b: scheme for b, scheme in enumerate(self.schemes) if scheme is not None}
        wanted = {f"{layer}/{b}": (layer, b) for layer in range(len(self.task.layers)) for b in schemes}
        parts = self._parts([layer for key, (layer, _) in wanted.items() if key not in bank], memory)
        seen: dict[int, Statistics | None] = {}  # of one part; None: the batches do not reach the layer

        def make(key: str) -> Item:
            layer, b = wanted[key]
            if layer not in seen:
                seen.clear()  # before others come
                part = next(part for part in parts if layer in part)
                seen.update(dict.fromkeys(part) | collect(self.task, part, memory=memory, seed=seed))
            method = MinMax() if seen[layer] is None else self.rounding.alone()
            return method.round(self._rows(layer).float().cpu(), schemes[b], seen[layer]).arrays()

        meter.begin(self.rounding.name, len(wanted))
        shown = {key: f"{self.task.layers[layer].name} {schemes[b]}" for key, (layer, b) in wanted.items()}
        items = bank.measure(shown, make, meter)
        for (layer, b), item in zip(wanted.values(), items, strict=True):
            codes = Codes.read(item, *self._rows(layer).shape, schemes[b])
            if codes is None:
                name = self.task.layers[layer].name
                raise ValueError(f"bank={str(bank.path)!r} holds no codes for layer {name!r}; wanted another folder")
            self._codes[layer, b] = codes

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
        try:
            return as_weight(self.rounding.round(self._rows(layer).float(), wanted), weight)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"layer {self.task.layers[layer].name!r} cannot be rounded to {wanted}: {error}"
            ) from error

    def _rows(self, layer: int) -> Tensor:
        return packed.weight_rows(self.parameter(layer).detach())

    def _parts(self, layers: Iterable[int], most: int) -> list[list[int]]:
        """These layers in order, as many at a time as their statistics fit."""
        parts: list[list[int]] = []
        room = 0
        for layer in dict.fromkeys(layers):
            needed = bytes_of(self.task.modules[layer][0])
            if not parts or needed > room:
                parts.append([])
                room = most
            parts[-1].append(layer)
            room -= needed
        return parts


def _unless_nothing(hook: Any) -> Any:
    """Calls that are skipped have no input to round."""
    return lambda module, args, kwargs: (
        None if isinstance(input_of(args, kwargs), Nothing) else hook(module, args, kwargs)
    )
