"""measure_latency: times layers where they are, with the inputs, caches and neighbours that they have in the model."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import chain
from statistics import median
from typing import Any

import torch
from torch import nn

from ..catalog import Candidate, Forward, batches_of, candidates, feed, input_of, kind_of
from ..held import held, hooked
from ..nn import swap_
from ..numbers import check_number
from ..scheme import Scheme
from .kept import Kept
from .table import FLOAT, Latency

WARM_UP = 3  # passes before any is counted
GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode")


def measure_latency(
    model: nn.Module,
    batch: Any,
    *,
    bits: Sequence[Scheme | int] = (2, 4, 8),
    forward: Forward | None = None,
    rounds: int = 15,
    cache: bool | str | os.PathLike[str] = True,
) -> Latency:
    """Milliseconds of each layer of `model` in float and with each scheme, on this machine and this many threads.

    batch    what to time the model on: a tensor, an (inputs, labels) pair or a dict. Times are for its size
    bits     widths or `Scheme`s that pack
    forward  forward(model, batch), for models that are called in another way
    rounds   passes to take the median of; with each, all variants run in turn, so that a slow spell hits them alike
    cache    whether to keep times on disk, by machine, version, threads, and shape of layer and input; or a folder
             for them. The default one is $MPQKERN_CACHE or ~/.cache/mpqkern

    With one thread on a CPU it is the time of the thread that counts, which other processes do not lengthen. Layers
    of equal shape share one time. The model is not touched: copies of it, one a scheme, are packed.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> latency = measure_latency(model, torch.randn(1, 64), bits=(4,), rounds=1, cache=False)
    >>> sorted(latency["0"]), latency.predict({"0": Scheme(4)}) > 0
    (['float', 'w4'], True)
    """
    check_number("rounds", rounds, "a whole number, at least 1", lambda v: v > 0, whole=True)
    schemes = [Scheme(b) if isinstance(b, int) and not isinstance(b, bool) else b for b in bits]
    for scheme in schemes:
        if not isinstance(scheme, Scheme):
            raise TypeError(f"bits={bits!r}; wanted widths or Schemes")
        scheme.require_packable()
    (given,) = batches_of([batch], model)
    call = feed if forward is None else forward
    able = [c for c in candidates(model) if c.reason is None]
    with torch.inference_mode(), held(model):
        shapes = _shapes(model, able, lambda: call(model, given))
        device = _device(model)
        kept = Kept(cache, device)
        names = [c.name for c in able]
        missing = [
            n for n in names if any(kept.get(shapes[n], t) is None for t in (FLOAT, *map(str, schemes))) and shapes[n]
        ]
        variants = {FLOAT: model}
        for scheme in schemes:
            variants[str(scheme)] = other = copy.deepcopy(model)
            swap_(other, dict.fromkeys(names, scheme))
        total, found = _timed(variants, missing, lambda m: call(m, given), _Clock(device), rounds)
    for name in missing:
        alike = [n for n in missing if shapes[n] == shapes[name]]
        for text in variants:
            kept.put(shapes[name], text, median(found[text][n] for n in alike))
    kept.save()
    ms = {n: {t: kept.get(shapes[n], t) or 0.0 for t in variants} for n in names}  # 0: never called
    return Latency(ms, total[FLOAT], total)


def time_layers(
    models: Mapping[str, nn.Module],
    names: Sequence[str],
    batch: Any,
    *,
    forward: Forward | None = None,
    rounds: int = 15,
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Milliseconds of each model as a whole, and of its layers `names`; the models run in turn in every round."""
    check_number("rounds", rounds, "a whole number, at least 1", lambda v: v > 0, whole=True)
    call = feed if forward is None else forward
    with torch.inference_mode(), ExitStack() as stack:
        for model in models.values():
            stack.enter_context(held(model))
        first = next(iter(models.values()))
        (given,) = batches_of([batch], first)
        return _timed(models, names, lambda m: call(m, given), _Clock(_device(first)), rounds)


def _device(model: nn.Module) -> torch.device:
    return next((t.device for t in chain(model.parameters(), model.buffers())), torch.device("cpu"))


def _shapes(model: nn.Module, able: Sequence[Candidate], run: Callable[[], Any]) -> dict[str, str]:
    """What a layer's time depends on: itself, and the inputs of its calls; "" where there are none."""
    calls: dict[str, list[str]] = {c.name: [] for c in able}

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
            x = input_of(args, kwargs)
            last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
            calls[name].append(f"{list(x.shape)}{'-last' * last}:{x.dtype}")

        return see

    with hooked(c.module.register_forward_pre_hook(hook(c.name), with_kwargs=True) for c in able):
        run()
    return {c.name: f"{_geometry(c.module)} on {' '.join(calls[c.name])}" if calls[c.name] else "" for c in able}


def _geometry(module: nn.Module) -> str:
    more = [f"{key}={getattr(module, key)}" for key in GEOMETRY if hasattr(module, key)]
    weight = f"{list(module.weight.shape)}:{module.weight.dtype}"
    return " ".join([kind_of(module), weight, f"bias={module.bias is not None}", *more])


class _Clock:
    """Seconds of this thread's work, or of the wall where several threads or a GPU share it."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device if device.type == "cuda" else None
        self.read = time.thread_time if self.gpu is None and torch.get_num_threads() == 1 else time.perf_counter

    def __call__(self) -> float:
        if self.gpu is not None:
            torch.cuda.synchronize(self.gpu)
        return self.read()


def _timed(
    variants: Mapping[str, nn.Module], names: Sequence[str], run: Callable[[nn.Module], Any], clock: Any, rounds: int
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Median ms of each variant as a whole, and of each of its layers."""
    whole: dict[str, list[float]] = {text: [] for text in variants}
    inside: dict[str, dict[str, list[float]]] = {text: {name: [] for name in names} for text in variants}
    for turn in range(-WARM_UP, rounds):
        for text, model in variants.items():
            run(model)  # another variant has just had the caches
            start = clock()
            run(model)
            seconds = clock() - start
            spent = dict.fromkeys(names, 0.0)
            if names:
                with _stopwatches({name: model.get_submodule(name) for name in names}, spent, clock):
                    run(model)
            if turn >= 0:
                whole[text].append(seconds)
                for name, value in spent.items():
                    inside[text][name].append(value)
    return (
        {text: 1e3 * median(values) for text, values in whole.items()},
        {text: {name: 1e3 * median(v) for name, v in layers.items()} for text, layers in inside.items()},
    )


@contextmanager
def _stopwatches(
    layers: Mapping[str, nn.Module], spent: dict[str, float], clock: Callable[[], float]
) -> Iterator[None]:
    """Adds the time of each layer's calls to `spent`."""
    began: dict[str, float] = {}

    def start(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            began[name] = clock()

        return hook

    def stop(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            spent[name] += clock() - began[name]

        return hook

    watched: AbstractContextManager = hooked(
        handle
        for name, module in layers.items()
        for handle in (
            module.register_forward_pre_hook(start(name)),
            module.register_forward_hook(stop(name), prepend=True),
        )
    )
    with watched:
        yield
