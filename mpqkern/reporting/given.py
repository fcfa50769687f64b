"""What a report is about: its inputs, and what they say together of each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..compare import Comparison
from ..latency import Latency
from ..ledger import Ledger
from ..scheme import PACKABLE_BITS, Scheme
from ..scores.table import FLOAT_BITS
from ..solve import Assignment, Frontier, Scores


@dataclass(frozen=True)
class Fact:
    """One layer. None where nothing that was given tells."""

    name: str
    kind: str | None = None
    shape: tuple[int, ...] = ()
    params: int | None = None
    chosen: bool = False  # whether `scheme` is known
    scheme: Scheme | None = None  # None: float
    float_bytes: int | None = None
    bytes: int | None = None  # as packed, or as it will be; None for widths that do not pack
    cost: float | None = None  # of the chosen scheme, by the scores, alone
    reason: str | None = None  # why it stayed in float

    @property
    def bits(self) -> int:
        return FLOAT_BITS if self.scheme is None else self.scheme.bits

    @property
    def about(self) -> str:
        """`conv2d 64x3x3x3`."""
        return " ".join(part for part in (self.kind, "x".join(map(str, self.shape))) if part)


@dataclass(frozen=True)
class Given:
    title: str
    environment: Mapping[str, Any]
    assignment: Assignment | None = None
    scores: Scores | None = None
    frontier: Frontier | None = None
    comparison: Comparison | None = None
    ledger: Ledger | None = None
    latency: Latency | None = None

    @cached_property
    def facts(self) -> list[Fact]:
        """Every layer that any input names, in the model's order as far as one is known."""
        named = [self.ledger and [r.name for r in self.ledger.rows], self.scores and self.scores.names]
        named += [self.assignment and self.assignment.schemes, self.latency]
        return [self._fact(name) for name in dict.fromkeys(name for names in named for name in names or ())]

    @cached_property
    def chosen(self) -> dict[str, str]:
        """Schemes of the layers whose scheme is known, as text."""
        return {fact.name: text(fact.scheme) for fact in self.facts if fact.chosen}

    def _fact(self, name: str) -> Fact:
        layer, row, plan = self._layers.get(name), self._rows.get(name), self.assignment and self.assignment.schemes
        found = row or layer
        planned = plan is not None and name in plan
        chosen = planned or row is not None
        scheme = plan[name] if planned else row.scheme if row else None
        shape = tuple(found.weight_shape) if found else ()
        float_bytes = row.float_bytes if row else 4 * layer.params if layer else None
        return Fact(
            name,
            found.kind if found else None,
            shape,
            layer.params if layer else math.prod(shape) if shape else None,
            chosen,
            scheme,
            float_bytes,
            row.bytes if row and row.scheme == scheme else _bytes(scheme, shape, float_bytes) if chosen else None,
            self.cost(name, scheme) if chosen else None,
            row.reason if row else None,
        )

    @property
    def repacked(self) -> list[str]:
        """Layers that the ledger has under another scheme than the assignment."""
        plan = self.assignment.schemes if self.assignment is not None else {}
        return [name for name, row in self._rows.items() if name in plan and plan[name] != row.scheme]

    def cost(self, name: str, scheme: Scheme | None) -> float | None:
        if self.scores is None or name not in self._places or scheme not in self.scores.schemes:
            return None
        return float(self.scores.unary[self._places[name], self.scores.schemes.index(scheme)])

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.scores.names)} if self.scores else {}

    @cached_property
    def _layers(self) -> dict[str, Any]:
        return {layer.name: layer for layer in self.scores.layers} if self.scores else {}

    @cached_property
    def _rows(self) -> dict[str, Any]:
        return {row.name: row for row in self.ledger.rows} if self.ledger is not None else {}


def _bytes(scheme: Scheme | None, shape: tuple[int, ...], float_bytes: int | None) -> int | None:
    """Of a layer that nobody has packed yet; None for what does not pack, or has no known shape."""
    if scheme is None or not shape:
        return float_bytes if scheme is None else None
    return scheme.bytes(shape) if scheme.bits in PACKABLE_BITS and scheme.act_bits in (None, 8) else None


def text(scheme: Scheme | None) -> str:
    return "float" if scheme is None else str(scheme)
