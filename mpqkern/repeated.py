"""Repeated: comparisons of one model with several sets of samples or seeds, as one table with its spread."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from .compare import CONTROLS, Comparison
from .ledger import table


@dataclass(frozen=True)
class Repeated:
    """Printed, means over the runs, +- half the range between the least and the greatest; `runs` has each.

    >>> import torch, mpqkern as mq
    >>> model = torch.nn.Sequential(torch.nn.Linear(32, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))
    >>> data = torch.randn(3, 8, 32)
    >>> judge, budgets = lambda m: float(m(data[2]).square().mean()), [mq.Budget(avg_bits=4)]
    >>> runs = [mq.compare(model, data[i], judge, budgets, methods=["kl"], seed=i) for i in range(2)]
    >>> len(mq.Repeated(runs).runs)
    2
    """

    runs: Sequence[Comparison]

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs is empty; wanted at least one Comparison")
        answers = [[(o.method, o.budget) for o in run.outcomes] for run in self.runs]
        if any(other != answers[0] for other in answers):
            raise ValueError("runs differ in their methods or budgets; wanted the same in all")

    def to_json(self) -> str:
        return json.dumps([json.loads(run.to_json()) for run in self.runs], indent=1)

    def __str__(self) -> str:
        first = self.runs[0]
        names = [first.metric, *(name for name in first.metrics if name != first.metric)]
        lines = [("budget", "method", "bytes", *names, "seconds", "tau", *(f"> {c}" for c in CONTROLS))]
        lines.append(("", "float", "", *(_spread([r.metrics[n] for r in self.runs], ".4f") for n in names), *[""] * 4))
        rows = zip(*(run.outcomes for run in self.runs), strict=True)
        for same in sorted(rows, key=lambda same: same[0].budget):
            method = same[0].method
            taus = [tau for run in self.runs if (tau := run.tau.get(method)) is not None]
            wins = [[w for run in self.runs if (w := run.wins(method, c)) is not None] for c in CONTROLS]
            lines.append((
                same[0].budget, method, f"{_mean([o.bytes for o in same]):,.0f}",
                *(_spread([o.metrics[n] for o in same], ".4f") for n in names),
                f"{_mean([o.seconds for o in same]):.2f}", _spread(taus, ".2f") if taus else "",
                *(f"{_mean(w):.0%}" if w else "" for w in wins),
            ))  # fmt: skip
        return table(lines, left=(0, 1))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _spread(values: Sequence[float], form: str) -> str:
    half = (max(values) - min(values)) / 2
    return f"{_mean(values):{form}}" + (f" +-{half:{form}}" if len(values) > 1 else "")
