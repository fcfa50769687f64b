"""score: a model, some batches and a method in, a table of costs out."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..held import held
from ..measuring.bank import Bank
from ..measuring.meter import Meter, Work
from ..measuring.task import Forward, Loss, Task
from ..numbers import check_number
from ..rounding import Rounding, as_rounding
from ..scheme import Scheme
from ..version import __version__
from .run import Method, Run, as_schemes
from .table import Scores
from .variants import Variants

log = logging.getLogger("mpqkern")

# name: module, suffix of its functions, what it measures; no module: what only `assign` can do
METHODS: dict[str, tuple[str | None, str, str]] = {
    "ompq": ("ompq", "", "orthogonality of the layers' features; needs no labels"),
    "csmpq": ("csmpq", "", "class separability of the layers' features; needs no labels"),
    "clado": ("clado", "", "loss increase of each layer and of each pair of layers, measured"),
    "greedy": ("greedy", "", "search that rounds the layer that hurts least, measures again, and so on"),
    "limpq": ("limpq", "", "learned quantization steps, by training a copy at all widths at once; labels help"),
    "limpq_lite": ("limpq", "_lite", "the same with the weights as they are"),
    "single": ("single", "", "measured loss with one layer rounded"),
    "kl": ("single", "_kl", "measured divergence from the float model with one layer rounded; needs no labels"),
    "fisher": ("gradient", "_fisher", "squared loss gradient times squared change, at layer outputs (ModelOpt)"),
    "mpqco": ("gradient", "_mpqco", "squared slope of each label's log-probability along the rounding (MPQCO)"),
    "delta_loss": ("gradient", "_delta_loss", "loss gradient times rounding, weight by weight (AutoScheme)"),
    "hawq": ("hessian", "", "mean Hessian eigenvalue of a layer times its squared rounding error (HAWQ)"),
    "roundoff": ("roundoff", "", "relative rounding error of the weights; needs no data"),
    "size": ("roundoff", "_size", "bit widths alone; needs no data"),
    "uniform": (None, "", "the widest single scheme that fits; for assign only"),
    "random": (None, "", "random costs, a control; for assign only"),
    "reversed": (None, "", "importance of another method turned upside down, a control; for assign only"),
}


def methods() -> dict[str, str]:
    """What `score` can measure and `assign` can choose by, each in a line.

    >>> "size" in methods()
    True
    """
    return {name: summary for name, (_, _, summary) in METHODS.items()}


def score(
    model: nn.Module,
    batches: Any,
    *,
    method: str | Callable[..., Any] = "clado",
    bits: Sequence[Scheme | int | None] = (2, 4, 8),
    layers: Sequence[str] | None = None,
    forward: Forward | None = None,
    loss: str | Loss | None = None,
    rounding: str | Rounding = "minmax",
    bank: str | os.PathLike[str] | None = None,
    seed: int = 0,
    time_limit: float | None = None,
    max_evals: int | None = None,
    memory: int = 2**30,
    progress: bool | None = None,
    **options: Any,
) -> Scores:
    """What each layer costs under each scheme, by one of `methods()` or by a callable of your own.

    batches     a list (or any iterable) of tensors, (inputs, labels) pairs or dicts; see `Task`
    bits        the schemes to choose from: widths, `Scheme`s, or None for float
    layers      patterns of the layers to score; all that can be packed, by default
    forward     forward(model, batch) -> output, for models that are called in another way
    loss        "ce", "kl", or loss(output, batch) -> one loss a sample
    rounding    of the weights that are tried, as given to `swap_`; what looks at data sees the float model's
    bank        a folder for what is measured, and rounded to begin with: a run that was stopped goes on from there
    time_limit  seconds, and
    max_evals   evaluations, after which `Unfinished` is raised
    memory      bytes that the measurement may hold at once besides the model and the batches
    progress    a bar on stderr; None shows it on a terminal only
    options     of the method; see its own page

    The model is left as it was found, also after an exception. A callable is called as `method(run, **options)`
    with a `Run` and returns `Scores` or an array [layers, schemes].

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> score(model, torch.randn(32, 8), method="roundoff", bits=(2, 4, 8))
    Scores(2 layers, w2, w4, w8, unary)
    """
    chosen = method_of(method)
    chosen.check(options)
    meter = Meter(time_limit=time_limit, max_evals=max_evals, progress=progress)
    run = _run(model, batches, chosen, bits, layers, forward, loss, rounding, seed, memory, bank, options)
    run.meter = meter
    try:
        with held(model):
            if "rounding" not in chosen.afterwards:
                _round(run, bank, Meter(time_limit=time_limit, progress=progress))
            found = chosen.score(run, **options)
    finally:
        run.meter.end()
    if not isinstance(found, Scores):
        found = run.scores(found)
    if len(run.schemes) > 1 and not np.ptp(found.unary):
        log.warning("method %r finds all layers and schemes alike: an assignment by this is arbitrary", chosen.name)
    notes = {
        "method": chosen.name,
        "options": {k: _plain(v) for k, v in options.items()},
        "samples": run.task.samples,
        "loss": run.task.loss_name,
        "rounding": rounding if isinstance(rounding, str) else repr(rounding),
        "seed": seed,
        "seconds": run.meter.seconds,
        "evaluations": run.meter.evaluations,
        "fingerprint": run.bank.fingerprint,
        "mpqkern": __version__,
        "torch": torch.__version__,
    }
    return Scores(found.layers, found.schemes, found.unary, found.pairwise, {**notes, **found.provenance})


def plan(
    model: nn.Module,
    batches: Any,
    *,
    method: str | Callable[..., Any] = "clado",
    bits: Sequence[Scheme | int | None] = (2, 4, 8),
    layers: Sequence[str] | None = None,
    forward: Forward | None = None,
    loss: str | Loss | None = None,
    rounding: str | Rounding = "minmax",
    seed: int = 0,
    memory: int = 2**30,
    **options: Any,
) -> Work:
    """What `score` with these arguments would take: evaluations, seconds by a timed pass, bytes of memory.

    Rounding that looks at data comes before it, and is not counted.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> plan(model, torch.randn(32, 8), method="size").evaluations
    0
    """
    chosen = method_of(method)
    chosen.check(options)
    run = _run(model, batches, chosen, bits, layers, forward, loss, rounding, seed, memory, None, options)
    with held(model):
        work = chosen.work(run, **options)
    return Work(work.evaluations, work.forwards, work.bytes, work.forwards * run.seconds_a_pass())


def _run(
    model: nn.Module,
    batches: Any,
    method: Method,
    bits: Sequence[Scheme | int | None],
    layers: Sequence[str] | None,
    forward: Forward | None,
    loss: str | Loss | None,
    rounding: str | Rounding,
    seed: int,
    memory: int,
    bank: str | os.PathLike[str] | None,
    options: dict[str, Any],
) -> Run:
    schemes = as_schemes(bits)
    check_number("memory", memory, "bytes, above 0", lambda v: v > 0)
    check_number("seed", seed, "a whole number", whole=True)
    task = Task(model, batches, layers=layers, forward=forward, loss=loss)
    way = as_rounding(rounding)
    on = "" if way.needs == "nothing" else f" on {', '.join(task.digest(i) for i in range(len(task.batches)))}"
    depends = {
        **task.fingerprint(),
        "method": method.name,
        "options": repr(sorted((k, _plain(v)) for k, v in options.items() if k not in method.afterwards)),
        "schemes": ", ".join(repr(s) for s in schemes),
        "rounding": f"{way!r}{on}",
        "seed": str(seed),
    }
    depends = {name: value for name, value in depends.items() if name not in method.afterwards}
    folder = None if bank is None else Path(bank) / method.name
    items = Bank(folder, depends, {"attributes": task.attributes})
    return Run(task, schemes, Variants(task, schemes, way), items, Meter(), memory, seed)


def _round(run: Run, bank: str | os.PathLike[str] | None, meter: Meter) -> None:
    """Rounds all that will be tried, where that takes data; methods that share a bank share this as well."""
    way = run.variants.rounding
    if way.needs == "nothing":
        return
    depends = {name: text for name, text in run.task.fingerprint().items() if name != "loss"} | {
        "batches": ", ".join(run.task.digest(i) for i in range(len(run.task.batches))),
        "schemes": ", ".join(map(repr, run.schemes)),
        "rounding": repr(way.alone()),
        "seed": str(run.seed),
        "version": __version__,
    }
    store = Bank(None if bank is None else Path(bank) / "codes", depends, {"attributes": run.task.attributes})
    try:
        run.variants.prepare(store, meter, memory=run.memory, seed=run.seed)
    finally:
        meter.end()


def name_of(method: str | Callable[..., Any]) -> str:
    """What a method is called, in banks and tables."""
    return method if isinstance(method, str) else getattr(method, "__name__", type(method).__name__)


def method_of(method: str | Callable[..., Any]) -> Method:
    """By its name, or a callable of the user's own."""
    if callable(method):
        return Method(name_of(method), "", method, lambda run, **_: Work(0, 0.0, 0))
    file, suffix, summary = METHODS.get(method, (None, "", ""))
    if file is None:
        only = " measures nothing and is for assign only" if method in METHODS else ""
        names = ", ".join(name for name, (file, *_) in METHODS.items() if file is not None)
        raise ValueError(f"method={method!r}{only}; wanted one of {names}, or a callable")
    module = import_module(f".{file}", __package__)
    afterwards = getattr(module, "AFTERWARDS", ())
    return Method(method, summary, getattr(module, f"score{suffix}"), getattr(module, f"work{suffix}"), afterwards)


def _plain(value: Any) -> Any:
    """An option as JSON has it."""
    return value if isinstance(value, (int, float, str, bool, type(None))) else repr(value)
