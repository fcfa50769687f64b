"""The inputs of a part's layers while it is reconstructed: how they are rounded, and with which scales to begin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..catalog import input_of, kind_of
from ..measuring.observers import Mse
from ..scheme import Scheme
from .adaround import Runner, Scales
from .examples import Example, taken
from .grid import Codes
from .partition import Part
from .twin import Hook, input_hook, largest

if TYPE_CHECKING:
    from .calibrate import Calibration


@contextmanager
def rounding_inputs(job: Calibration, part: Part) -> Iterator[Scales]:
    """Within it the part's layers round their inputs as the kernels do, by the scales that they find in what this
    yields; gradients pass straight through."""
    scales: Scales = {}
    with ExitStack() as undo:
        for layer, module in _that_round(job, part):
            hook = _hook(job.schemes[layer], kind_of(module), scales, layer)
            undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield scales


def first_scales(
    job: Calibration, part: Part, starts: dict[int, Codes], examples: Sequence[Example], runner: Runner
) -> Scales:
    """Those with the least squared error of what each layer meets in the part as it starts, its inputs rounded by
    their maxima. None for a layer that meets only zeros, or what is not finite."""
    seen = {layer: Mse(largest(job.schemes[layer].act_bits)) for layer, _ in _that_round(job, part)}
    rows = {layer: codes.values().to(job.rows(layer).device) for layer, codes in starts.items()}
    with ExitStack() as undo:
        for layer, module in _that_round(job, part):
            watch = _watch(seen, layer)
            handle = module.register_forward_pre_hook(watch, prepend=True, with_kwargs=True)  # before it is rounded
            undo.callback(handle.remove)
        for example in examples:
            runner(example, taken(example.given, example.size, None), rows, {})
    limits = {layer: observer.limit() / observer.most for layer, observer in seen.items()}
    scales = {layer: torch.tensor([limit], device=rows[layer].device) for layer, limit in limits.items()}
    return {layer: scale for layer, scale in scales.items() if scale > 0}


def _that_round(job: Calibration, part: Part) -> Iterator[tuple[int, nn.Module]]:
    for layer in part.layers:
        if job.schemes[layer].act_bits is not None:
            yield from ((layer, module) for module in job.task.modules[layer])


def _hook(scheme: Scheme, kind: str, scales: Scales, layer: int) -> Hook:
    return lambda module, args, kwargs: input_hook(scheme, kind, scales.get(layer))(module, args, kwargs)


def _watch(seen: dict[int, Mse], layer: int) -> Hook:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = input_of(args, kwargs)
        if layer in seen and isinstance(x, Tensor) and x.numel():
            if bool(x.isfinite().all()):
                seen[layer].update(x.float())
            else:
                del seen[layer]

    return hook
