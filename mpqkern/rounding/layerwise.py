"""layer_by_layer: statistics of a layer's inputs, its codes, and on to the next, which meets what this one has done."""

from __future__ import annotations

import logging
from collections.abc import Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..catalog import input_of
from ..held import hooked
from ..measuring.task import Task
from .damping import ENOUGH
from .free import MinMax
from .grid import Codes
from .method import Rounding
from .partition import Part, called_once, parts
from .statistics import Statistics, bytes_of, input_rows
from .stretch import Enough, Stretch
from .twin import Twin

if TYPE_CHECKING:
    from .calibrate import Calibration

log = logging.getLogger("mpqkern")


def layer_by_layer(job: Calibration) -> None:
    """Rounds all layers. What the model never calls is rounded by its weights alone."""
    if job.rounding.needs == "nothing" and not job.correct_bias:
        for layer in range(len(job.schemes)):
            if not job.recall(layer):
                job.put(layer, _rounded(job, layer, None))
        return
    order = call_order(job)
    by_weights_alone(job, set(range(len(job.schemes))) - {layer for stage in order for layer in stage})
    once = called_once(job.task)
    blocks = [part for part in parts(job.task, "block") if len(part.layers) > 1]
    how = {"products": job.rounding.mismatch, "sums": job.correct_bias, "memory": job.memory, "seed": job.seed}
    floats = job.rounding.mismatch or job.correct_bias
    home: Part | None = None
    stretch = whole = Stretch(job.task, job.twin, once=once)
    for stage in order:
        left = [layer for layer in stage if not job.recall(layer)]
        if not left:
            continue
        block = next((part for part in blocks if set(left) <= set(part.layers)), None)
        if block is None:
            stretch = whole
        elif block is not home:
            stretch = Stretch(job.task, job.twin, block, once, floats=floats, memory=job.memory)
        home = block
        twin = job.twin if job.done else None
        for layer, statistics in collect(job.task, left, twin, stretch=stretch, **how).items():
            job.put(layer, _rounded(job, layer, statistics))


def by_weights_alone(job: Calibration, layers: Set[int]) -> None:
    """Rounds what the model never calls."""
    for layer in sorted(layers):
        log.warning("the batches do not reach %s: it is rounded by its weights alone", job.task.layers[layer].name)
        if not job.recall(layer):
            job.put(layer, _rounded(job, layer, None))


def _rounded(job: Calibration, layer: int, statistics: Statistics | None) -> Codes:
    codes = codes_by(job.rounding, job, layer, statistics)
    if statistics is None or not job.correct_bias:
        return codes
    return replace(codes, shift=shift(job.rows(layer), codes, statistics))


def codes_by(method: Rounding, job: Calibration, layer: int, statistics: Statistics | None) -> Codes:
    """By `method`, or from the weights alone where that lacks the statistics it needs."""
    if statistics is None and method.needs != "nothing":
        method = MinMax()
    try:
        return method.round(job.rows(layer), job.schemes[layer], statistics)
    except (RuntimeError, ValueError) as error:
        name = job.task.layers[layer].name
        raise ValueError(f"layer {name!r} cannot be rounded to {job.schemes[layer]}: {error}") from error


def shift(rows: Tensor, codes: Codes, statistics: Statistics) -> Tensor:
    """fp32 [N]: the mean error of each output."""
    x, y = (t[:, :, None] / statistics.count for t in (statistics.x, statistics.y))
    w, q = (t.double().unflatten(0, (len(x), -1)) for t in (rows, codes.values()))
    return (w @ x - q @ y).flatten().float()


def call_order(job: Calibration) -> list[list[int]]:
    """Layers in the order of their first calls; those that are called with the same tensor in a row come together."""
    stages: list[list[int]] = []
    seen: set[int] = set()
    last: list[Any] = [None]  # the tensor that the layer before was called with, and its version

    def hook(layer: int) -> Any:
        def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = input_of(args, kwargs)
            if layer not in seen:
                seen.add(layer)
                if last[0] is not None and x is last[0][0] and x._version == last[0][1]:
                    stages[-1].append(layer)
                else:
                    stages.append([layer])
                # a tensor of inference mode does not say whether it was written to
                last[0] = None if x.is_inference() else (x, x._version)

        return look

    with hooked(
        module.register_forward_pre_hook(hook(layer), with_kwargs=True)
        for layer, modules in enumerate(job.task.modules)
        for module in modules
    ):
        for batch in job.task.batches:  # a model may call other layers for other batches
            last[0] = None
            job.task.run(batch)
            if len(seen) == len(job.schemes):
                break
    return stages


def collect(
    task: Task,
    layers: Sequence[int],
    twin: Twin | None = None,
    *,
    stretch: Stretch | None = None,
    products: bool = True,
    sums: bool = True,
    memory: int,
    seed: int,
) -> dict[int, Statistics]:
    """Of each layer that the batches reach: Y is what it meets in the twin, X in the float model.

    Without a twin both are what it meets in the float model. `products` and `sums` tell in which of them X is wanted;
    elsewhere Y stands for it. `stretch` makes the passes, whole ones by default.
    """
    first = {layer: task.modules[layer][0] for layer in layers}
    needed = sum(bytes_of(module) for module in first.values())
    if needed > memory:
        names = ", ".join(task.layers[layer].name for layer in layers)
        raise ValueError(f"memory={memory}; wanted at least {needed} bytes for the statistics of {names}")
    apart = {"products": twin is not None and products, "sums": twin is not None and sums}
    found = {layer: Statistics.of(module, **apart) for layer, module in first.items()}
    stretch = stretch or Stretch(task, twin)
    for index in range(len(task.batches)):
        ys = _inputs(stretch, index, layers, seed, rounded=True)
        xs = _inputs(stretch, index, layers, seed, rounded=False) if any(apart.values()) else ys
        fold = index % 2 if len(task.batches) > 1 else None
        for layer, statistics in found.items():
            rows = sum(y.shape[1] for y in ys[layer])
            if index == 0 and rows * len(task.batches) < ENOUGH * statistics.h.shape[-1]:
                statistics.split()
            same = [y.shape for y in ys[layer]] == [x.shape for x in xs[layer]]  # not where rounding changes the way
            for y, x in zip(ys[layer], xs[layer] if same else ys[layer], strict=True):
                statistics.add(y, x, fold)
    for layer, statistics in found.items():
        if not statistics.h.isfinite().all():
            raise ValueError(f"layer {task.layers[layer].name!r} meets infinities or NaN; wanted finite inputs")
    return {layer: statistics for layer, statistics in found.items() if statistics.count}


def _inputs(
    stretch: Stretch, index: int, layers: Sequence[int], seed: int, *, rounded: bool
) -> dict[int, list[Tensor]]:
    """Rows [G, M, K] that each layer meets in batch `index`, call by call; the same positions whenever it is asked."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    modules = stretch.task.modules
    ends = {m for layer in layers for m in modules[layer]} <= stretch.once  # nothing more to see after them

    def hook(layer: int) -> Any:
        def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
            draw = torch.Generator().manual_seed(hash((seed, index, layer, len(found[layer]))) % 2**63)
            found[layer].append(input_rows(module, input_of(args, kwargs).detach(), draw))
            if ends and all(len(found[other]) == len(modules[other]) for other in layers):
                raise Enough

        return look

    handles = (m.register_forward_pre_hook(hook(layer), with_kwargs=True) for layer in layers for m in modules[layer])
    with hooked(handles):
        stretch.run(index, rounded=rounded)
    return found
