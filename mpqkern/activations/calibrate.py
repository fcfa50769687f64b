"""calibrate_activations_: fixed scales for the 8-bit activations of a packed model, from batches that it meets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import packed, select
from ..catalog import Forward, batches_of, feed, input_of
from ..held import held, hooked
from ..ledger import table
from ..measuring.observers import MOST, OBSERVERS, Observer
from ..nn import PackedConv2d, PackedModule
from ..nn.fuse import fusions

log = logging.getLogger("mpqkern")


@dataclass(frozen=True)
class ActivationRow:
    """What was found for one layer. Errors are relative, |rounded - x| / |x|, over all inputs."""

    name: str
    scale: tuple[float, ...] = ()  # one, or one a group
    clipped: float = 0.0  # share of the values that saturate
    error: float = 0.0  # with the fixed scale
    dynamic_error: float = 0.0  # with each row's or sample's own
    reason: str | None = None  # why it stays dynamic


@dataclass(frozen=True)
class ActivationReport:
    """Printed, a table; `rows` for programs."""

    rows: tuple[ActivationRow, ...]

    def __getitem__(self, name: str) -> ActivationRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no layer {name!r}; wanted one of {', '.join(repr(row.name) for row in self.rows)}")

    def __contains__(self, name: object) -> bool:
        return any(row.name == name for row in self.rows)

    def __iter__(self) -> Iterator[ActivationRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        lines = [("layer", "scale", "clipped", "rel. error", "dynamic", "")]
        for row in self.rows:
            if row.reason:
                lines.append((row.name, "", "", "", "", f"dynamic: {row.reason}"))
                continue
            scale = f"{max(row.scale):.3g}" + (f" (largest of {len(row.scale)})" if len(row.scale) > 1 else "")
            lines.append((row.name, scale, f"{row.clipped:.3%}", f"{row.error:.4f}", f"{row.dynamic_error:.4f}", ""))
        return table(lines, left=(0, 5))


def calibrate_activations_(
    model: nn.Module,
    batches: Any,
    *,
    observer: str | Callable[[], Observer] = "mse",
    granularity: str = "tensor",
    layers: Sequence[str] | None = None,
    forward: Forward | None = None,
) -> ActivationReport:
    """Gives the layers of `model` that were packed with `act_bits=8` fixed activation scales.

    batches      as for `mpqkern.score`: tensors, (inputs, labels) pairs or dicts
    observer     "max", "percentile" (99.99 of |x|), "mse", "ema", "gauss", or a function that makes an `Observer`,
                 as in `lambda: Percentile(99.9)`
    granularity  "tensor": a scale a layer; "group": in linear layers one for each group of the weight
    layers       patterns of the layers to calibrate; the others are as before
    forward      forward(model, batch), for models that are called in another way

    The model runs twice over the batches: with dynamic scales, to find the fixed ones, and with those, to measure
    what they do. All or nothing: on any error the model is as before. Layers that the batches never reach, or reach
    with zeros only, stay dynamic, with a warning.

    >>> from mpqkern import Scheme, swap_
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> _ = swap_(model, {"*": Scheme(8, act_bits=8)})
    >>> report = calibrate_activations_(model, torch.randn(256, 64), observer="max")
    >>> report["0"].clipped, model[2].act_scale.shape
    (0.0, torch.Size([1]))
    """
    if granularity not in ("tensor", "group"):
        raise ValueError(f"granularity={granularity!r}; wanted 'tensor' or 'group'")
    make = OBSERVERS.get(observer) if isinstance(observer, str) else observer
    if make is None or not callable(make):
        raise ValueError(f"observer={observer!r}; wanted one of {', '.join(OBSERVERS)} or a function that makes one")
    if forward is not None and not callable(forward):
        raise TypeError(f"forward={forward!r}; wanted a function of the model and a batch")
    if fusions(model):
        raise ValueError("model is fused; wanted the model that fuse was given, to be fused again afterwards")
    chosen = _chosen(model, layers)
    given = batches_of(batches, model)

    def run() -> None:
        for batch in given:
            feed(model, batch) if forward is None else forward(model, batch)

    watched = {name: _Watched(name, m, make, granularity) for name, m in chosen.items()}
    with held(model):
        for module in chosen.values():
            module.act_scale = None
        with _hooks(chosen, lambda name, x: watched[name].observe(x)):
            run()
        scales = {name: watch.scale() for name, watch in watched.items()}
        for name, module in chosen.items():
            module.set_act_scale_(scales[name])
        with _hooks(chosen, lambda name, x: watched[name].measure(x)):
            run()
    for name, module in chosen.items():
        module.act_scale = scales[name]
    report = ActivationReport(tuple(watch.row(scales[name]) for name, watch in watched.items()))
    for row in report.rows:
        if row.reason:
            log.warning("%s keeps dynamic activation scales: %s", row.name or "the model", row.reason)
    return report


def _chosen(model: nn.Module, layers: Sequence[str] | None) -> dict[str, PackedModule]:
    found = {
        name: m for name, m in model.named_modules() if isinstance(m, PackedModule) and m.scheme.act_bits is not None
    }
    if not found:
        raise ValueError("model has no layer with 8-bit activations; wanted one packed as Scheme(..., act_bits=8)")
    if layers is None:
        return found
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise TypeError(f"layers={layers!r}; wanted a list of patterns")
    kinds = {
        name: select.type_names(c for c in type(m).__mro__ if c not in (nn.Module, object)) for name, m in found.items()
    }
    wanted = {name for pattern in layers for name in select.matches(pattern, kinds)}
    return {name: m for name, m in found.items() if name in wanted}


def _hooks(layers: dict[str, PackedModule], see: Callable[[str, Tensor], None]) -> AbstractContextManager[None]:
    """Within it, `see(name, x)` is called with every input that holds anything."""

    def hook(name: str) -> Callable[..., None]:
        def watch(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            x = input_of(args, named)
            if x.numel():
                see(name, x.detach())

        return watch

    return hooked(m.register_forward_pre_hook(hook(name), with_kwargs=True) for name, m in layers.items())


class _Watched:
    """One layer: its observers, and sums over what it meets."""

    def __init__(self, name: str, module: PackedModule, make: Callable[[], Observer], granularity: str) -> None:
        self.name, self.module = name, module
        self.observers = [make() for _ in range(module.act_groups if granularity == "group" else 1)]
        if not isinstance(self.observers[0], Observer):
            raise TypeError(f"observer= made {self.observers[0]!r}; wanted something with update(x) and limit()")
        self.reached = False
        self.dynamic, self.static = _Error(), _Error()
        self.clipped = 0

    def observe(self, x: Tensor) -> None:
        if not bool(x.isfinite().all()):
            raise ValueError(f"layer {self.name!r} meets values that are not finite; wanted batches without such")
        self.reached = True
        parts = x.float().split(self.module.group_size, -1) if len(self.observers) > 1 else [x.float()]
        for seen, part in zip(self.observers, parts, strict=True):
            seen.update(part)
        self.dynamic.add(x, self.module.rounded_input(x))

    def scale(self) -> Tensor | None:
        """None where there is nothing to go by. A group that met only zeros takes the largest scale of the others."""
        limits = torch.tensor([seen.limit() for seen in self.observers], dtype=torch.float64)
        scale = (limits / MOST).float().to(self.module.scales.device)
        return torch.where(scale > 0, scale, scale.max()) if bool((scale > 0).any()) else None

    def measure(self, x: Tensor) -> None:
        if self.module.act_scale is None:
            return
        self.static.add(x, self.module.rounded_input(x))
        k = 1 if isinstance(self.module, PackedConv2d) else x.shape[-1]
        steps = x.float() / packed.spread(self.module.act_scale, self.module.group_size, k)
        self.clipped += int((steps.abs() >= MOST + 0.5).sum())

    def row(self, scale: Tensor | None) -> ActivationRow:
        if scale is None:
            return ActivationRow(self.name, reason="met only zeros" if self.reached else "not reached by these batches")
        share = self.clipped / self.static.count
        return ActivationRow(self.name, tuple(scale.tolist()), share, self.static.relative(), self.dynamic.relative())


class _Error:
    """Sums of squares of values and of what rounding changes them by."""

    def __init__(self) -> None:
        self.values, self.changes, self.count = 0.0, 0.0, 0

    def add(self, x: Tensor, rounded: Tensor) -> None:
        exact = x.double()
        self.values += float(exact.square().sum())
        self.changes += float((rounded - exact).square().sum())
        self.count += x.numel()

    def relative(self) -> float:
        return (self.changes / self.values) ** 0.5 if self.values else 0.0
