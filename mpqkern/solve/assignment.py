"""Assignment: a scheme for every layer, with the proof of how good it is; a table to read, a file to edit."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..files import written
from ..ledger import table
from ..scheme import Scheme
from ..scores.table import FLOAT_BITS, cost
from .budget import is_finite
from .problem import Problem

FORMAT, VERSION = "mpqkern-assignment", 1
NUMBERS, TABLES = ("objective", "bound", "seconds"), ("costs", "slack", "prices", "relaxed")
STATES = ("optimal", "feasible", "heuristic", "limit", "interrupted", "over budget", "edited")


@dataclass(frozen=True)
class Assignment:
    """`swap_(model, assignment)` puts it to work.

    `objective` is its cost by the scores and no assignment that fits costs less than `bound`; `status` is
    "optimal" (the two are equal; with pairwise scores, which are floats throughout, they may be apart by 1e-9 of
    the objective and 1e-11 of the largest cost), "feasible" (within the gap that was asked for), "heuristic" (fits;
    found by a search that proves nothing, so `bound` is there only if scores gave one), "limit" (out of time),
    "interrupted", "over budget" (only after a rounding other than "exact") or "edited" (changed by hand since it was
    solved, so that nothing is claimed). `costs` and `slack` hold what each budget has spent and left; `prices`, how
    much the objective would fall for one unit more of it, by the LP. Pairwise scores have no such LP: there, prices
    are local, those of the LP in which every layer sees the others as they are, and good for small changes only.
    `relaxed` has the LP's continuous widths.
    """

    schemes: Mapping[str, Scheme | None]
    objective: float | None = None
    bound: float | None = None
    status: str = "edited"
    costs: Mapping[str, float] = field(default_factory=dict)
    slack: Mapping[str, float] = field(default_factory=dict)
    prices: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    relaxed: Mapping[str, float] | None = None
    path: Any = field(default=None, repr=False, compare=False)  # the `Trajectory` of a search that walked one
    _problem: Problem | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, scheme in self.schemes.items():
            if not isinstance(name, str) or not (scheme is None or isinstance(scheme, Scheme)):
                raise ValueError(f"schemes[{name!r}]={scheme!r}; wanted a layer's name and a Scheme or None")
        if self.status not in STATES:
            raise ValueError(f"status={self.status!r}; wanted one of {', '.join(STATES)}")

    @property
    def bits(self) -> dict[str, int]:
        """Weight width of each layer; 32 for float."""
        return {name: FLOAT_BITS if s is None else s.bits for name, s in self.schemes.items()}

    @property
    def gap(self) -> float | None:
        """(objective - bound) / |objective|; 0 is a proof of optimality."""
        if self.objective is None or self.bound is None:
            return None
        off = self.objective - self.bound
        return 0.0 if off <= 0 else off / max(abs(self.objective), 1e-300)

    def explain(self, layer: str) -> str:
        """What every other scheme in `layer` would change: the objective, and each budget."""
        if self._problem is None:
            raise ValueError(
                "an assignment that was read or built by hand has no scores to explain; wanted one from solve"
            )
        self._require(layer)
        problem, scores = self._problem, self._problem.scores
        choice = np.array([scores.schemes.index(s) for s in self.schemes.values()])
        tied = next(group for group in problem.groups if scores.names.index(layer) in group)
        unit = problem.groups.index(tied)
        lines = [("scheme", "objective", *(row.label for row in problem.labels), "")]
        for b, scheme in enumerate(scores.schemes):
            other = choice.copy()
            other[tied] = b
            change = cost(scores.unary, scores.pairwise, other) - cost(scores.unary, scores.pairwise, choice)
            spends, over = [], []
            for k, row in enumerate(problem.labels):
                more = int(problem.rows[k, unit, b] - problem.rows[k, unit, choice[tied[0]]])
                spends.append(_signed(row.amount(more)))
                total = sum(int(row.values[i, c]) for i, c in enumerate(other))
                over += [row.label] if row.cap is not None and total > row.cap else []
            note = "chosen" if b == choice[tied[0]] else "ruled out" if not problem.allowed[unit, b] else ""
            note = note or (f"over {', '.join(over)}" if over else "fits")
            lines.append((_text(scheme), _signed(change), *spends, note))
        also = f" (and {', '.join(scores.names[i] for i in tied if scores.names[i] != layer)})" if len(tied) > 1 else ""
        return f"{layer}{also}\n{table(lines, left=(0, len(lines[0]) - 1))}"

    def diff(self, other: Assignment) -> dict[str, tuple[Scheme | None, Scheme | None]]:
        """Layers with different schemes: {name: (here, there)}; both must be about the same layers."""
        for name in other.schemes:
            self._require(name)
        for name in self.schemes:
            other._require(name)
        return {n: (s, other.schemes[n]) for n, s in self.schemes.items() if s != other.schemes[n]}

    def to_json(self) -> str:
        """One JSON object, a layer a line, only what differs from a default Scheme; null is float.

        A number that is not finite, as the bound of a search that had no time for one, is left out.
        """
        head = {
            "format": FORMAT,
            "version": VERSION,
            "status": self.status,
            **{key: _finite(getattr(self, key)) for key in NUMBERS},
            **{key: None if getattr(self, key) is None else _all_finite(getattr(self, key)) for key in TABLES},
            "digest": _digest(self.schemes),
        }
        layers = [f"    {json.dumps(name)}: {json.dumps(_brief(s))}" for name, s in self.schemes.items()]
        top = "".join(f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items())
        return f'{{\n{top}  "layers": {{\n' + ",\n".join(layers) + "\n  }\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Assignment:
        """Also after an edit by hand: then status is "edited" and objective, bound and costs are gone."""
        try:
            values = json.loads(text, object_pairs_hook=_once)
        except json.JSONDecodeError as error:
            raise ValueError(f"text is no JSON ({error}); wanted what to_json wrote") from None
        except RecursionError:
            raise ValueError("text is nested too deeply; wanted what to_json wrote") from None
        if not isinstance(values, dict) or values.get("format") != FORMAT or values.get("version") != VERSION:
            raise ValueError(f"text={text[:40]!r}...; wanted an object with format {FORMAT!r} and version {VERSION}")
        layers = values.get("layers")
        if not isinstance(layers, dict):
            raise ValueError(f"layers={layers!r}; wanted an object of names and schemes")
        schemes = {name: _scheme(name, value) for name, value in layers.items()}
        if values.get("digest") != _digest(schemes):
            return cls(schemes)
        kept = {key: values[key] for key in ("status", *NUMBERS, *TABLES) if key in values}
        for key, value in kept.items():
            _check_kept(key, value)
        return cls(schemes, **kept)

    def save(self, path: str | Path) -> None:
        with written(Path(path)) as file:
            file.write(self.to_json().encode())

    @classmethod
    def load(cls, path: str | Path) -> Assignment:
        try:
            return cls.from_json(Path(path).read_text())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def __str__(self) -> str:
        lines = [("layer", "scheme", "bits"), *((n, _text(s), str(self.bits[n])) for n, s in self.schemes.items())]
        value = "" if self.objective is None else f": objective {self.objective:.6g}"
        proof = "" if self.gap is None else f", bound {self.bound:.6g}, gap {100 * self.gap:.3g} %"
        notes = [f"{self.status}{value}{proof}"]
        for name, used in self.costs.items():
            price = f", price {self.prices[name]:.3g}" if name in self.prices else ""
            left = f", {_plain(self.slack[name])} left" if name in self.slack else ""
            notes.append(f"{name}: {_plain(used)} spent{left}{price}")
        return "\n".join([table(lines, left=(0, 1)), *notes])

    def _require(self, layer: str) -> None:
        if layer not in self.schemes:
            close = difflib.get_close_matches(layer, list(self.schemes), n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(map(repr, close))}?" if close else f"there are {len(self.schemes)} layers"
            raise ValueError(f"layer={layer!r} is not in the assignment; {hint}")


def _brief(scheme: Scheme | None) -> dict[str, Any] | None:
    if scheme is None:
        return None
    usual = Scheme(scheme.bits).to_dict()
    return {key: value for key, value in scheme.to_dict().items() if key == "bits" or value != usual[key]}


def _scheme(name: str, value: Any) -> Scheme | None:
    try:
        if value is None or isinstance(value, dict):
            return None if value is None else Scheme.from_dict(value)
        return Scheme(value)
    except ValueError as error:
        raise ValueError(f"layers[{name!r}]: {error}") from None


def _check_kept(key: str, value: Any) -> None:
    if key in NUMBERS and not (is_finite(value) or (value is None and key != "seconds")):
        raise ValueError(f"{key}={value!r}; wanted a finite number")
    none = value is None and key == "relaxed"
    if key in TABLES and not none and not (isinstance(value, dict) and all(map(is_finite, value.values()))):
        raise ValueError(f"{key}={value!r}; wanted an object of finite numbers")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _all_finite(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} comes twice; wanted each name once")
    return dict(pairs)


def _digest(schemes: Mapping[str, Scheme | None]) -> str:
    text = json.dumps([[name, _brief(scheme)] for name, scheme in schemes.items()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _text(scheme: Scheme | None) -> str:
    return "float" if scheme is None else str(scheme)


def _plain(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _signed(value: float) -> str:
    return f"{value:+,}" if isinstance(value, int) else f"{value:+.4g}"
