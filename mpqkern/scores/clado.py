"""CLADO: the loss increase of each layer and of each pair of layers (Deng et al. 2023, arXiv 2307.05657).

To second order a change Delta of the weights costs g'Delta + 1/2 Delta' H Delta. Split by layers this is a quadratic
form in the choice x, 1/2 x'Gx, and forward passes alone give G by the four-point identity: with L the loss,

    G[lb, lb] = 2 (L(w + D_lb) - L(w))
    G[lb, mc] = L(w + D_lb + D_mc) - L(w + D_lb) - L(w + D_mc) + L(w)

In `Scores` this is unary[l, b] = G[lb, lb] / 2 and pairwise[l, b, m, c] = G[lb, mc]: the cost of an assignment that
changes at most two layers is the increase that was measured, not an approximation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..measuring.bank import Bank
from ..measuring.meter import Work
from . import perturbed
from .perturbed import Design
from .run import Run
from .samples import Samples
from .table import Scores, widest_first

PAIRS = ("all", "block", "none")
BASELINES = ("float", "widest")
AFTERWARDS = ("trim", "shrink")


def score(
    run: Run,
    *,
    engine: str = "frontier",
    pairs: str = "all",
    baseline: str = "float",
    trim: float = 0.0,
    shrink: str | None = None,
) -> Scores:
    """Mean loss increases, by Task's loss: "ce" is the paper's, "kl" its variant without labels.

    engine    "frontier" runs only what comes after the later layer of each pair; "naive" is the paper's loop of
              whole passes. The losses are the same up to the order of sums in kernels
    pairs     "all" is the paper's; "block" only within the smallest module around a layer that holds another
              one too (the model itself does not count); "none" is its diagonal-only control
    baseline  "float": changes start from the model as it is, as in the paper; "widest": from all layers at the
              widest scheme, which costs nothing there, so one scheme fewer is measured in each layer
    trim, shrink  see `Samples.scores`; the paper takes plain means: 0 and None

    Standard errors of `unary` are in the provenance, and "loss0", the loss with nothing changed; `samples` has those
    of pairs, and all losses.
    """
    design = _design(run, engine, pairs, baseline)
    run = perturbed.fitted(run, design)
    perturbed.measured(run, design)
    batches = [run.key(index) for index in range(len(run.task.batches))]
    found = _samples(run.bank, batches, run.task.layers, run.schemes)
    passes = sum(float(base["passes"]) * len(base["loss"]) for base, _ in found.batches) / found.count
    notes = {
        "batches": batches,
        "losses": design.losses(found.batches[0][0]["order"].tolist()),
        "forwards": passes,
        "unary_errors": found.errors()[0].tolist() if found.count > 1 else None,
        "loss0": sum(float(np.sum(base["loss"])) for base, _ in found.batches) / found.count,
    }
    scores = found.scores(trim=trim, shrink=shrink)
    return run.scores(scores.unary, scores.pairwise, **notes)


def work(
    run: Run,
    *,
    engine: str = "frontier",
    pairs: str = "all",
    baseline: str = "float",
    trim: float = 0.0,
    shrink: str | None = None,
) -> Work:
    """As counted on the first batch; others are taken to call the same layers."""
    design = _design(run, engine, pairs, baseline)
    run = perturbed.fitted(run, design)
    replay = run.replay(0)
    bytes = design.bytes(replay) + replay.run_bytes()
    return Work(len(run.task.batches) * design.losses(replay.order), design.passes(replay), bytes)


def samples(scores: Scores, bank: str | Path) -> Samples:
    """What `scores` were made of, from the bank that they were measured into: for errors and bootstraps.

    >>> import tempfile, torch, mpqkern as mq
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     scores = mq.score(model, torch.randn(32, 8), method="clado", bits=(2, 4), bank=folder)
    ...     found = samples(scores, folder)
    >>> found.errors()[1].shape, found.resample(torch.Generator().manual_seed(0))
    ((2, 2, 2, 2), Scores(2 layers, w2, w4, pairwise))
    """
    notes = scores.provenance
    for name in ("batches", "fingerprint", "method"):
        if name not in notes:
            raise ValueError(f"scores.provenance has no {name!r}; wanted scores of method 'clado'")
    stored = Bank(Path(bank) / notes["method"], notes["fingerprint"])
    missing = [batch for batch in notes["batches"] if f"{batch}/base" not in stored]
    if missing:
        raise ValueError(
            f"bank={str(bank)!r} lacks {len(missing)} batches of these scores; wanted the one they came from"
        )
    return _samples(stored, notes["batches"], scores.layers, scores.schemes, notes)


def _samples(bank: Bank, batches: Sequence[str], layers: Any, schemes: Any, notes: Any = None) -> Samples:
    return Samples(layers, schemes, [perturbed.items(bank, batch) for batch in batches], notes)


def _design(run: Run, engine: str, pairs: str, baseline: str) -> Design:
    wanted = {"engine": (engine, perturbed.ENGINES), "pairs": (pairs, PAIRS), "baseline": (baseline, BASELINES)}
    for name, (value, known) in wanted.items():
        if value not in known:
            raise ValueError(f"{name}={value!r}; wanted {', '.join(map(repr, known[:-1]))} or {known[-1]!r}")
    widest = widest_first(run.schemes)[0]
    # what a layer has when it is not changed costs nothing and is not measured: a scheme, or float
    unchanged = run.schemes[widest] if baseline == "widest" else None
    base = {} if unchanged is None else dict.fromkeys(range(len(run.task.layers)), widest)
    tried = [b for b, scheme in enumerate(run.schemes) if scheme != unchanged]
    return Design(engine, tried, base, mates([layer.name for layer in run.task.layers], pairs))


def mates(names: Sequence[str], pairs: str) -> np.ndarray:
    """bool [layers, layers]: which layers are measured together.

    >>> mates(["stem", "block.conv1", "block.conv2", "head"], "block").sum(1)
    array([0, 1, 1, 0])
    """
    n = len(names)
    if pairs == "none":
        return np.zeros((n, n), dtype=bool)
    found = np.ones((n, n), dtype=bool)
    if pairs == "block":
        inside = [[_within(other, _block(name, names)) for other in names] for name in names]
        found = np.array(inside, dtype=bool)
        found |= found.T
    np.fill_diagonal(found, False)
    return found


def _block(name: str, names: Sequence[str]) -> str:
    """The smallest module around a layer that holds another layer too; "" for the model itself."""
    block = name.rpartition(".")[0]
    while block and sum(_within(other, block) for other in names) < 2:
        block = block.rpartition(".")[0]
    return block


def _within(name: str, block: str) -> bool:
    return bool(block) and name.startswith(f"{block}.")
