"""compare: several methods on one model under the same budgets, judged on data that none of them has seen."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from .assign import SEARCHES, assign, check_options
from .held import held
from .ledger import table
from .measuring.task import Task
from .numbers import check_number
from .rounding import Rounding, calibrate
from .scores.entry import methods as known_methods
from .scores.entry import name_of, score
from .scores.run import as_schemes
from .scores.variants import Variants
from .solve import Assignment, Budget, Scores, solve
from .solve.budget import make_row

DRAWS = 5  # random assignments a budget, of which the mean is reported
CONTROLS = ("uniform", "random")
Metrics = dict[str, float]


@dataclass(frozen=True)
class Outcome:
    """What one method reached under one budget."""

    method: str
    budget: str
    bytes: float  # of the weights that were scored; nominal where a width does not pack
    metrics: Metrics
    seconds: float  # of measuring (for all budgets together) and solving, or of searching
    bits: list[dict[str, int]]  # of each layer; several for random draws


@dataclass(frozen=True)
class Comparison:
    """Printed, a table; `outcomes` for programs, `to_json` for files.

    `metrics` are the float model's. `tau` has Kendall's rank correlation of each table of scores with measured
    damage: over layers, each alone at the narrowest scheme; None for what has no scores, or where all are equal.
    """

    metric: str
    metrics: Metrics
    outcomes: list[Outcome]
    tau: dict[str, float | None]

    def of(self, method: str) -> list[Outcome]:
        return [o for o in self.outcomes if o.method == method]

    def wins(self, method: str, against: str) -> float | None:
        """The share of budgets under which `method` is better by the metric, an equal answer counting half."""
        theirs = {o.budget: o.metrics[self.metric] for o in self.of(against)}
        pairs = [(o.metrics[self.metric], theirs[o.budget]) for o in self.of(method) if o.budget in theirs]
        return sum((a < b) + (a == b) / 2 for a, b in pairs) / len(pairs) if pairs and method != against else None

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "wins": self._wins()}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """What `to_json` wrote.

        >>> found = Comparison("loss", {"loss": 0.1}, [Outcome("size", "4 bits", 80.0, {"loss": 0.2}, 0.5, [])], {})
        >>> Comparison.from_json(found.to_json()) == found
        True
        """
        try:
            values = json.loads(text)
            outcomes = [Outcome(**outcome) for outcome in values["outcomes"]]
            return cls(values["metric"], values["metrics"], outcomes, values["tau"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"text={text[:40]!r}... is no comparison ({error}); wanted what to_json wrote") from None

    def __str__(self) -> str:
        others = [name for name in self.metrics if name != self.metric]
        lines = [("budget", "method", "bytes", self.metric, *others, "seconds", "tau", *(f"> {c}" for c in CONTROLS))]
        lines.append(("", "float", "", *(f"{self.metrics[n]:.4f}" for n in (self.metric, *others)), *[""] * 4))
        wins = self._wins()
        for o in sorted(self.outcomes, key=lambda o: (o.budget, o.metrics[self.metric])):
            values = (f"{o.metrics[n]:.4f}" for n in (self.metric, *others))
            tau = self.tau.get(o.method)
            shares = (wins[o.method].get(c) for c in CONTROLS)
            last = ["" if tau is None else f"{tau:.2f}", *("" if s is None else f"{s:.0%}" for s in shares)]
            lines.append((o.budget, o.method, f"{o.bytes:,.0f}", *values, f"{o.seconds:.2f}", *last))
        return table(lines, left=(0, 1))

    def _wins(self) -> dict[str, dict[str, float | None]]:
        names = dict.fromkeys(o.method for o in self.outcomes)
        return {name: {c: self.wins(name, c) for c in CONTROLS} for name in names}


def compare(
    model: nn.Module,
    batches: Any,
    evaluate: Callable[[nn.Module], float | Metrics],
    budgets: Sequence[Budget],
    *,
    methods: Sequence[str | Callable[..., Any]] | Mapping[str, Mapping[str, Any]] | None = None,
    metric: str = "loss",
    bits: Sequence[Any] = (2, 4, 8),
    layers: Sequence[str] | None = None,
    rounding: str | Rounding = "minmax",
    seed: int = 0,
    solver: Mapping[str, Any] | None = None,
    **frame: Any,
) -> Comparison:
    """Each method's answer to each budget, and what `evaluate` says of the model with it.

    evaluate  evaluate(model) -> a number or several by name, best of data that is not in `batches`; `metric` is the
              one that decides, and lower is better
    budgets   each a limit of its own
    methods   names from `methods()` and callables of your own, or {label: {"method": either, **options}}; all names, by
              default. The controls "uniform" and "random" (the mean of 5 draws) are always there
    solver    further options of `solve`; and `frame`, of `score`: forward, loss, memory, bank, ... In the bank what has
              options of its own has a folder of its own, by its label

    A budget that nothing can meet raises `Infeasible`, and an option that a method does not have is named, before
    anything is measured.

    All share the budgets, not the bytes: what cannot spend a budget, as "uniform" seldom can, is also smaller.

    The model computes with rounded float weights while it is judged, the same that `swap_` would pack, and is left as
    it was found. Every layer that can be packed takes part unless `layers` says which.

    >>> import torch
    >>> model, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(8, 32)
    >>> found = compare(model, x, lambda m: float(m(x).square().mean()), [Budget(avg_bits=4)], methods=["roundoff"])
    >>> [outcome.method for outcome in found.outcomes]
    ['roundoff', 'uniform', 'random']
    """
    if isinstance(budgets, Budget) or not len(budgets):
        raise ValueError(f"budgets={budgets!r}; wanted a sequence of at least one Budget")
    if not isinstance(batches, (Tensor, tuple, list, Mapping)):
        batches = list(batches)  # it is read more than once
    check_number("seed", seed, "a whole number of 0 or more", lambda v: v >= 0, whole=True)
    wanted = _wanted(methods)
    for options in wanted.values():
        check_options(options["method"], _extra(options) | frame)
    asked = {"bits": bits, "layers": layers, "rounding": rounding, "seed": seed, **frame}
    judge = _Judge(model, batches, evaluate, metric, asked)
    for budget in budgets:
        solve(judge.sizes, budget)  # says at once if nothing fits
    outcomes, tau, base = [], {}, judge({})
    for label, options in wanted.items():
        name = options["method"]
        own = asked | _extra(options)
        if _extra(options) and own.get("bank") is not None:
            own["bank"] = Path(own["bank"]) / label
        scores, start = None, time.perf_counter()
        if callable(name) or name not in SEARCHES:
            scores = score(model, batches, method=name, **own)
        measured = time.perf_counter() - start
        tau[label] = None if scores is None else kendall(scores.unary[:, judge.narrowest], judge.damage())
        for budget in budgets:
            start, answers = time.perf_counter(), []
            # other seeds draw others
            for seed_ in range(own["seed"] * DRAWS, (own["seed"] + 1) * DRAWS) if name == "random" else [own["seed"]]:
                if scores is not None:
                    answers.append(solve(scores, budget, **(solver or {})))
                else:
                    answers.append(assign(model, batches, budget, method=name, **own | {"seed": seed_}))
            seconds = measured + (time.perf_counter() - start) / len(answers)
            outcomes.append(judge.outcome(label, budget, answers, seconds))
    return Comparison(metric, base, outcomes, tau)


def kendall(a: np.ndarray, b: np.ndarray) -> float | None:
    """Kendall's tau-b: 1 where both order alike, -1 where one is the reverse; None where one has no order.

    >>> kendall(np.array([1, 2, 3, 3]), np.array([10, 20, 40, 30]))
    0.9128709291752769
    """
    i, j = np.triu_indices(len(a), 1)
    left, right = np.sign(np.subtract(a[i], a[j])), np.sign(np.subtract(b[i], b[j]))
    ordered = np.count_nonzero(left) * np.count_nonzero(right)
    return float(left @ right / ordered**0.5) if ordered else None


class _Judge:
    """Evaluates a model under assignments, each one once."""

    def __init__(
        self, model: nn.Module, batches: Any, evaluate: Callable[..., Any], metric: str, asked: Mapping[str, Any]
    ) -> None:
        self.evaluate, self.metric = evaluate, metric
        how = {name: asked[name] for name in ("layers", "forward", "loss") if name in asked}
        self.task = Task(model, batches, **how)
        self.schemes = as_schemes(asked["bits"])
        self.variants = Variants(self.task, self.schemes, asked["rounding"])
        self.how = {name: asked[name] for name in ("forward", "seed", "memory") if name in asked}
        # the layers and schemes, with costs that mean nothing
        self.sizes = Scores(self.task.layers, self.schemes, np.zeros((len(self.task.layers), len(self.schemes))))
        self.narrowest = int(np.argmin(self.sizes.bits))
        try:
            self.bytes = make_row("bytes", self.task.layers, self.schemes).values
        except ValueError:  # a width that does not pack
            self.bytes = make_row("bytes", self.task.layers, self.schemes, count="nominal").values / 8
        self._known: dict[tuple, Metrics] = {}

    def __call__(self, choice: Mapping[int, int]) -> Metrics:
        key = tuple(sorted(choice.items()))
        if key not in self._known:
            with held(self.task.model), self._as(choice):
                found = self.evaluate(self.task.model)
            found = found if isinstance(found, Mapping) else {self.metric: found}
            if self.metric not in found:
                raise ValueError(f"evaluate(model) returned {', '.join(found)}; wanted {self.metric!r} among them")
            self._known[key] = {name: float(value) for name, value in found.items()}
        return self._known[key]

    def _as(self, choice: Mapping[int, int]) -> AbstractContextManager[None]:
        """The model with these schemes, rounded as `swap_` would round it."""
        if self.variants.rounding.needs == "nothing":
            return self.variants.applied(choice)
        names = {self.task.layers[layer].name: self.schemes[scheme] for layer, scheme in choice.items()}
        return calibrate(self.task.model, names, self.task.batches, rounding=self.variants.rounding, **self.how).twin(
            self.task.model
        )

    def damage(self) -> np.ndarray:
        """By how much the metric rises with each layer alone at the narrowest scheme."""
        alone = [self({layer: self.narrowest})[self.metric] for layer in range(len(self.task.layers))]
        return np.array(alone) - self({})[self.metric]

    def outcome(self, label: str, budget: Budget, answers: Sequence[Assignment], seconds: float) -> Outcome:
        choices = [
            {i: self.schemes.index(answer.schemes[layer.name]) for i, layer in enumerate(self.task.layers)}
            for answer in answers
        ]
        found = [self(choice) for choice in choices]
        size = np.mean([sum(self.bytes[i, b] for i, b in choice.items()) for choice in choices])
        means = {name: float(np.mean([metrics[name] for metrics in found])) for name in found[0]}
        return Outcome(label, repr(budget), float(size), means, seconds, [answer.bits for answer in answers])


def _wanted(
    methods: Sequence[str | Callable[..., Any]] | Mapping[str, Mapping[str, Any]] | None,
) -> dict[str, Mapping[str, Any]]:
    if isinstance(methods, str) or callable(methods):
        raise ValueError(f"methods={methods!r}; wanted a sequence of names or callables")
    if isinstance(methods, Mapping):
        found = {label: {"method": label, **options} for label, options in methods.items()}
    else:
        found = {name_of(method): {"method": method} for method in (known_methods() if methods is None else methods)}
    for label, options in found.items():
        method = options["method"]
        if not callable(method) and method not in known_methods():
            names = ", ".join(known_methods())
            raise ValueError(f"methods[{label!r}]={method!r}; wanted one of {names}, or a callable")
    return found | {name: {"method": name} for name in CONTROLS if name not in found}


def _extra(options: Mapping[str, Any]) -> dict[str, Any]:
    """What is given to one method alone."""
    return {name: value for name, value in options.items() if name != "method"}
