"""Features: what the layers of a model compute, handed out one by one and dropped at once.

    taps="layer"  a layer's own output, before any norm or activation that follows it
    taps="block"  what that output has become when the next module with weights reads it: the last tensor of the same
                  shape that was computed from it. So norm, activation and shortcut count, pooling and views do not;
                  the last convolution of a residual block, and the one in its shortcut, have the block's output.

No code is traced: "block" follows tensors through whatever operations the model runs, functional or in place; only
torch's higher-order operators (flex attention) refuse to be watched.
A feature is valid only during the call that hands it out, as the model may write to it afterwards. Samples come
first in it; a layer that is called on several rows a sample, [samples * rows, ...], gives [samples, rows, ...].
With sample_dim=1 layers whose outputs are [rows, samples, ...], as in models that take sequences first, give the same.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import count
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ..measuring.task import Task
from ..trees import stored

TAPS = ("layer", "block")
Take = Callable[[int, Tensor], None]
Call = tuple[int, int]  # a layer, and a number of its own


def check_taps(taps: str) -> None:
    if taps not in TAPS:
        raise ValueError(f"taps={taps!r}; wanted 'layer' or 'block'")


def check_sample_dim(sample_dim: int) -> None:
    if isinstance(sample_dim, bool) or sample_dim not in (0, 1):
        raise ValueError(f"sample_dim={sample_dim!r}; wanted 0 or 1")


def visit(task: Task, index: int, taps: str, take: Take, sample_dim: int = 0) -> list[int]:
    """Runs a batch, with `take(layer, feature)` for each call of a layer; returns the layers by their first call.

    Use it while the model is `held`.
    """
    check_taps(taps)
    check_sample_dim(sample_dim)
    order: dict[int, None] = {}

    def give(layer: int, feature: Tensor) -> None:
        take(layer, _by_sample(feature, task.sizes[index], task.layers[layer].name, sample_dim))

    def ended(layer: int, module: nn.Module, args: tuple, output: Tensor) -> None:
        order.setdefault(layer)
        if taps == "layer":
            give(layer, output)
        else:
            flow.begin(layer, output)

    def read(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        flow.end(flow.behind_any(_storages((args, kwargs))))

    with ExitStack() as undo:
        for layer, modules in enumerate(task.modules):
            for module in modules:
                undo.callback(module.register_forward_hook(partial(ended, layer)).remove)
        if taps == "block":
            flow = undo.enter_context(_Flow(give))
            for module in task.model.modules():
                if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
                    undo.callback(module.register_forward_pre_hook(read, with_kwargs=True).remove)
        task.run(task.batches[index])
        if taps == "block":
            flow.end(list(flow.open))
    return list(order)


class _Flow(TorchDispatchMode):
    """Which calls of layers each tensor was computed from, until the next module with weights has read them.

    Noted for storages, not tensors, so that views and writes to a part of a tensor are followed too.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here; to say so, torch would import its compiler, which takes seconds

    def __init__(self, done: Take) -> None:
        super().__init__()
        self.done = done
        self.open: dict[Call, Tensor] = {}  # what the output of each call has become by now
        self.behind: dict[StorageWeakRef, set[Call]] = {}
        self.number, self.busy = count(), False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.busy:
            return output
        storages = _storages((args, kwargs))
        calls = self.behind_any(storages)
        for tensor in stored(output):
            place = StorageWeakRef(tensor.untyped_storage())
            self.behind[place] = calls
            if tensor.is_floating_point():  # masks do not count
                # Nor does what was in this memory before: for views nothing has come, for writes only what is written.
                came = self.behind_any(storages - {place})
                self.open.update((call, tensor) for call in came if self.open[call].shape == tensor.shape)
        return output

    def behind_any(self, storages: set[StorageWeakRef]) -> set[Call]:
        return {call for storage in storages for call in self.behind.get(storage, ()) if call in self.open}

    def begin(self, layer: int, output: Tensor) -> None:
        call = (layer, next(self.number))
        self.open[call] = output
        self.behind[StorageWeakRef(output.untyped_storage())] = {call}

    def end(self, calls: Any) -> None:
        self.busy = True  # what is done with a feature is none of the model's business
        for call in sorted(calls):
            self.done(call[0], self.open.pop(call))
        self.busy = False


def _storages(values: Any) -> set[StorageWeakRef]:
    return {StorageWeakRef(tensor.untyped_storage()) for tensor in stored(values)}


def _by_sample(feature: Tensor, samples: int, name: str, sample_dim: int) -> Tensor:
    if sample_dim == 1 and feature.dim() > 2 and feature.shape[1] == samples:
        return feature.transpose(0, 1)
    if feature.dim() == 0 or feature.shape[0] % samples:
        raise ValueError(
            f"layer {name!r} gives {list(feature.shape)} for a batch of {samples}; wanted samples as the first "
            "axis, sample_dim=1 where they are the second, or layers= without it"
        )
    return feature if feature.shape[0] == samples else feature.unflatten(0, (samples, -1))
