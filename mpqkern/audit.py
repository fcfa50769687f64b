"""audit: was it as predicted? A ledger with the bytes of the file, the milliseconds and the losses beside what was
expected of them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from . import tensorfile
from .catalog import batches_of
from .checkpoint import read_note
from .held import held
from .latency import Latency
from .latency.measure import time_layers
from .ledger import Ledger, Row, Whole
from .measuring.task import Forward, Loss, Task
from .nn import PackedModule
from .scores.table import Scores

BUFFERS = ("qweight", "scales", "zeros")  # what `Scheme.bytes` counts


def audit(
    ledger: Ledger,
    model: nn.Module,
    batches: Any = None,
    *,
    float_model: nn.Module | None = None,
    latency: Latency | None = None,
    scores: Scores | None = None,
    file: str | os.PathLike[str] | None = None,
    forward: Forward | None = None,
    loss: str | Loss | None = None,
    rounds: int = 15,
) -> Ledger:
    """The ledger that `swap_` returned for `model`, with what was predicted and what is so beside each other.

    Bytes       predicted by each scheme, and as they lie in `file`, written by `save`
    ms          predicted by `latency`, and measured on the first batch, as `measure_latency` does: in turn with the
                float model, if there is one
    error       predicted by `scores`, and the rise of the loss (see `Task`: with labels cross-entropy, else the
                divergence from the float model) when this layer alone is packed; of the whole, the objective and the
                loss of the packed model. That takes `float_model`, the model as it was before the swap, and a pass
                over all batches for each layer. Scores that are no losses are in units of their own

    Whatever is not given is left out. Neither model is changed.

    >>> import torch, copy
    >>> from mpqkern import swap_
    >>> model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), torch.randn(8, 64)
    >>> before = copy.deepcopy(model)
    >>> ledger = audit(swap_(model, {"*": 4}), model, x, float_model=before, rounds=1)
    >>> ledger.whole.loss, ledger.whole.rise > 0, ledger["0"].ms > 0
    ('kl', True, True)
    """
    _check(ledger, model)
    rows = {row.name: row for row in ledger.rows}
    whole = ledger.whole
    for row in ledger.packed:
        rows[row.name] = replace(row, predicted_bytes=row.scheme.bytes(row.weight_shape) if row.bytes else 0)
    if file is not None:
        whole = replace(whole, file_bytes=Path(file).stat().st_size)
        for name, size in _disk_bytes(Path(file), list(rows.values())).items():
            rows[name] = replace(rows[name], disk_bytes=size)
    if latency is not None:
        plan = {name: rows[name].scheme for name in latency if name in rows}
        whole = replace(whole, predicted_ms=latency.predict(plan))
        for name, scheme in plan.items():
            rows[name] = replace(rows[name], predicted_ms=latency.cost(name, scheme))
    if scores is not None:
        whole = _with_scores(rows, whole, scores)
    if batches is not None:
        given = batches_of(batches, model)
        whole = _with_times(rows, whole, model, float_model, given[0], forward, rounds)
        if float_model is not None and ledger.packed:
            whole = _with_losses(rows, whole, model, float_model, given, forward, loss)
    return Ledger(tuple(rows.values()), whole)


def _check(ledger: Ledger, model: nn.Module) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    for row in ledger.packed:
        found = modules.get(row.name)
        if not isinstance(found, PackedModule) or found.scheme != row.scheme:
            there = found.scheme if isinstance(found, PackedModule) else type(found).__name__
            raise ValueError(f"layer {row.name!r} is {there} in model; wanted the model of this ledger, {row.scheme}")


def _disk_bytes(path: Path, rows: list[Row]) -> dict[str, int]:
    """By the file's header. What shares another's tensors takes nothing."""
    with tensorfile.Reader(path) as file:
        aliases = read_note(file)["aliases"]
        found = {}
        for row in rows:
            names = [f"{row.name}.{key}" for key in (BUFFERS if row.scheme else ("weight",))]
            missing = [name for name in names if name not in file.names and name not in aliases]
            if missing and row.scheme:
                raise file.error(f"it lacks {missing[0]!r}; wanted the file of this model")
            here = [file.shape_and_dtype(name) for name in names if name in file.names]
            found[row.name] = sum(math.prod(shape) * dtype.itemsize for shape, dtype in here)
    return found


def _with_scores(rows: dict[str, Row], whole: Whole, scores: Scores) -> Whole:
    choice = []
    for layer, name in enumerate(scores.names):
        scheme = rows[name].scheme if name in rows else None
        if name in rows and scheme in scores.schemes:
            choice.append(scores.schemes.index(scheme))
            rows[name] = replace(rows[name], score=float(scores.unary[layer, choice[-1]]))
    total = scores.cost(choice) if len(choice) == len(scores.names) else None
    return replace(whole, method=scores.provenance.get("method"), score=total)


def _with_times(
    rows: dict[str, Row],
    whole: Whole,
    model: nn.Module,
    float_model: nn.Module | None,
    batch: Any,
    forward: Forward | None,
    rounds: int,
) -> Whole:
    models = {"ms": model} | ({} if float_model is None else {"float_ms": float_model})
    total, inside = time_layers(models, list(rows), batch, forward=forward, rounds=rounds)
    for what in models:
        for name, ms in inside[what].items():
            rows[name] = replace(rows[name], **{what: ms})
    return replace(whole, **total)


def _with_losses(
    rows: dict[str, Row],
    whole: Whole,
    model: nn.Module,
    float_model: nn.Module,
    batches: list[Any],
    forward: Forward | None,
    loss: str | Loss | None,
) -> Whole:
    packed = [name for name, row in rows.items() if row.scheme is not None]
    task = Task(float_model, batches, layers=packed, forward=forward, loss=loss)
    task.prepare()

    def mean(run: Callable[[Any], Any]) -> float:
        return sum(float(task.losses(run(b), i).sum()) for i, b in enumerate(task.batches)) / task.samples

    with held(float_model), held(model):
        base = mean(task.run)
        for layer, modules in zip(task.layers, task.modules, strict=True):
            places = {
                name: model.get_submodule(name)
                for name, module in float_model.named_modules(remove_duplicate=False)
                if any(module is m for m in modules)
            }
            with _placed(float_model, places):
                rows[layer.name] = replace(rows[layer.name], rise=mean(task.run) - base)
        task.model = model  # the same batches, the same way to call it
        rise = mean(task.run) - base
    return replace(whole, loss=task.loss_name, rise=rise, float_loss=base)


@contextmanager
def _placed(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within it `model` has these modules at these names."""
    places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in modules]
    before = [owner._modules[key] for owner, key in places]
    try:
        for (owner, key), module in zip(places, modules.values(), strict=True):
            owner._modules[key] = module
        yield
    finally:
        for (owner, key), module in zip(places, before, strict=True):
            owner._modules[key] = module
