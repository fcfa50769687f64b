"""Latency: milliseconds by layer and scheme, and what they say of a whole model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..ledger import table
from ..scheme import Scheme
from ..solve.budget import Budget

FLOAT = "float"  # the name of a layer that is not packed; its column is always there


@dataclass(frozen=True, repr=False)
class Latency(Mapping[str, Mapping[str, float]]):
    """A mapping {layer: {scheme: ms}}, as `Budget(ms=..., table=...)` takes it. Schemes go by their text ("w4",
    "float"); a layer that is called several times counts all of its calls.

    >>> found = Latency({"head": {"float": 2.0, "w4": 0.5}}, total=3.0)
    >>> found.predict({"head": Scheme(4)}), found.rest, found.budget(2.0).ms
    (1.5, 1.0, 1.0)
    """

    ms: Mapping[str, Mapping[str, float]]
    total: float  # of the whole float model
    whole: Mapping[str, float] = field(default_factory=dict)  # measured with one scheme for all layers, by its text

    def __getitem__(self, name: str) -> Mapping[str, float]:
        return self.ms[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.ms)

    def __len__(self) -> int:
        return len(self.ms)

    def __repr__(self) -> str:
        return f"Latency({len(self)} layers, {self.total:.3g} ms in float)"

    @property
    def rest(self) -> float:
        """What the model takes outside of these layers; never less than nothing."""
        return max(0.0, self._outside)

    @property
    def _outside(self) -> float:
        """Below nothing where the layers, each timed by itself, came to more than the whole model. What `predict` says
        of an assignment is this and its layers, and so has to be what a budget is less."""
        return self.total - sum(row[FLOAT] for row in self.ms.values())

    def predict(self, plan: Mapping[str, Scheme | None] | Any) -> float:
        """Milliseconds of the whole model under an assignment, or a mapping of layers to schemes; the others are in
        float."""
        schemes = getattr(plan, "schemes", plan)
        for name in schemes:
            if name not in self.ms:
                raise ValueError(f"plan names the layer {name!r}, which was not timed; there are {list(self.ms)}")
        return self.total + sum(self.cost(name, scheme) - self.ms[name][FLOAT] for name, scheme in schemes.items())

    def cost(self, name: str, scheme: Scheme | None) -> float:
        """Of one layer."""
        text, row = FLOAT if scheme is None else str(scheme), self.ms[name]
        if text not in row:
            raise ValueError(f"layer {name!r} was not timed as {text!r}; wanted one of {', '.join(row)}")
        return row[text]

    def budget(self, ms: float) -> Budget:
        """A budget of so many milliseconds for the whole model."""
        left = ms - self._outside
        if ms < self.rest:
            raise ValueError(f"ms={ms!r}; wanted at least {self.rest:.4g}, which is spent outside of the layers")
        return Budget(ms=left, table=self.ms)

    def fastest(self, name: str) -> str:
        return min(self.ms[name], key=self.ms[name].__getitem__)

    def to_json(self) -> str:
        """{layer: {scheme: ms}}, a layer a line, the whole model under ""; a budget reads it from a file."""
        rows = {**self.ms, "": {**self.whole, FLOAT: self.total}}  # no layer that can be packed has that name
        return "{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(dict(v))}" for k, v in rows.items()) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Latency:
        """What `to_json` wrote.

        >>> found = Latency({"head": {"float": 2.0, "w4": 0.5}}, 3.0, {"float": 3.0, "w4": 1.5})
        >>> Latency.from_json(found.to_json()) == found
        True
        """
        try:
            ms = {str(name): {str(s): float(v) for s, v in row.items()} for name, row in json.loads(text).items()}
            whole = ms.pop("")
            good = all(FLOAT in row and all(0 <= v < math.inf for v in row.values()) for row in (whole, *ms.values()))
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            good = False
        if not good:
            raise ValueError(f"text={text[:40]!r}...; wanted what to_json wrote: milliseconds by layer and scheme")
        return cls(ms, whole[FLOAT], whole)

    def __str__(self) -> str:
        texts = [FLOAT, *(t for t in next(iter(self.ms.values()), {}) if t != FLOAT)]
        lines = [("layer", *texts, "fastest")]
        lines += [(name, *(f"{row[t]:.4f}" for t in texts), self.fastest(name)) for name, row in self.ms.items()]
        summed = {t: self.rest + sum(row[t] for row in self.ms.values()) for t in texts}
        lines.append(("the rest", *(f"{self.rest:.4f}" for _ in texts), ""))
        lines.append(("predicted", *(f"{summed[t]:.4f}" for t in texts), ""))
        lines.append(("measured", *(f"{self.whole[t]:.4f}" if t in self.whole else "" for t in texts), ""))
        return table(lines, left=(0, len(texts) + 1))
