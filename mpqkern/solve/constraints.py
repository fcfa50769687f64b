"""Constraints other than budgets: pins, forbidden choices, ties, and at most k of something."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .. import select
from ..scheme import Scheme
from ..scores.table import Scores
from .budget import Row

Choice = Scheme | int | None


@dataclass(frozen=True)
class Constraints:
    """As given by the caller; patterns are exact names, globs, "re:..." or type names.

    pins        {pattern: scheme or bits}: the most specific pattern wins
    forbid      {pattern: schemes or bits}, all of them hold
    ties        [[pattern, ...], ...]: the layers of one list share one scheme
    at_most     {scheme or bits: k}: at most k layers have it
    first_last  scheme or bits for the first and the last layer, unless these are pinned by name
    """

    pins: Mapping[str, Choice] = field(default_factory=dict)
    forbid: Mapping[str, Choice | Sequence[Choice]] = field(default_factory=dict)
    ties: Sequence[Sequence[str]] = ()
    at_most: Mapping[Choice, int] = field(default_factory=dict)
    first_last: Choice = None

    def __post_init__(self) -> None:
        for argument in ("pins", "forbid", "at_most"):
            value = getattr(self, argument)
            if not isinstance(value, Mapping):
                raise ValueError(f"{argument}={value!r}; wanted a mapping")
        lists = (list, tuple, set, frozenset)
        if not isinstance(self.ties, lists) or not all(isinstance(tie, lists) for tie in self.ties):
            raise ValueError(f"ties={self.ties!r}; wanted a list of lists of patterns")

    def parts(self) -> list[tuple[str, Any]]:
        """The single demands, for finding out which of them clash."""
        named = [(argument, key) for argument in ("pins", "forbid", "at_most") for key in getattr(self, argument)]
        ties = [("ties", i) for i in range(len(self.ties))]
        return named + ties + ([("first_last", None)] if self.first_last is not None else [])

    def keep(self, parts: Iterable[tuple[str, Any]]) -> Constraints:
        """Only these of the single demands."""
        parts = list(parts)
        kept = {
            argument: {key: value for key, value in getattr(self, argument).items() if (argument, key) in parts}
            for argument in ("pins", "forbid", "at_most")
        }
        ties = [tie for i, tie in enumerate(self.ties) if ("ties", i) in parts]
        return replace(self, ties=ties, first_last=self.first_last if ("first_last", None) in parts else None, **kept)

    def text(self, part: tuple[str, Any]) -> str:
        argument, key = part
        if argument == "first_last":
            return f"first_last={_name(self.first_last)}"
        if argument == "ties":
            return f"ties={list(self.ties[key])!r}"
        value = getattr(self, argument)[key]
        shown = _name(value) if argument != "forbid" else ", ".join(map(_name, _several(value)))
        return f"{argument}[{key if argument == 'at_most' else repr(key)}]={shown}"

    def allowed(self, scores: Scores) -> np.ndarray:
        """bool [layers, schemes]: what pins and forbidden choices leave."""
        kinds, names = _kinds(scores), scores.names
        allowed = np.ones(scores.unary.shape, dtype=bool)
        ends = {} if self.first_last is None else {names[0]: self.first_last, names[-1]: self.first_last}
        pins = {**ends, **{_pattern(key): value for key, value in self.pins.items()}}
        pinned = select.assign(pins, kinds)
        for name, value in pinned.items():
            argument = "first_last" if name in ends and name not in self.pins else "pins"
            allowed[names.index(name)] &= chosen(argument, value, scores)
        for pattern, values in self.forbid.items():
            for value in _several(values):
                mask = chosen("forbid", value, scores)
                for name in select.matches(_pattern(pattern), kinds):
                    allowed[names.index(name)] &= ~mask
        return allowed

    def groups(self, scores: Scores) -> list[list[int]]:
        """Layers that share a choice, by index, each layer in exactly one group; overlapping ties join."""
        kinds, names = _kinds(scores), scores.names
        head = list(range(len(names)))
        for tie in self.ties:
            tied = {names.index(n) for pattern in tie for n in select.matches(_pattern(pattern), kinds)}
            heads = {head[i] for i in tied}
            head = [min(heads) if h in heads else h for h in head]
        return [[i for i, h in enumerate(head) if h == first] for first in sorted(set(head))]

    def rows(self, scores: Scores) -> list[Row]:
        """Each `at_most` as a row that counts layers."""
        rows = []
        for value, most in self.at_most.items():
            if not isinstance(most, (int, np.integer)) or isinstance(most, bool) or most < 0:
                raise ValueError(f"at_most[{value}]={most!r}; wanted a whole number of layers, not negative")
            counted = np.tile(chosen("at_most", value, scores), (len(scores.layers), 1)).astype(np.int64)
            rows.append(Row(f"at_most {_name(value)}", counted, int(most)))
        return rows


def chosen(argument: str, value: Choice, scores: Scores) -> np.ndarray:
    """bool [schemes]: which of the scored schemes a scheme, a bit width or None means."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        mask = [s is not None and s.bits == value for s in scores.schemes]
    else:
        mask = [s == value for s in scores.schemes]
    if not any(mask):
        there = ", ".join(map(_name, scores.schemes))
        raise ValueError(f"{argument}: {_name(value)} was not scored; wanted one of {there}")
    return np.array(mask)


def _kinds(scores: Scores) -> dict[str, list[str]]:
    types = {"linear": "Linear", "conv2d": "Conv2d"}
    return {layer.name: [layer.kind, types.get(layer.kind, layer.kind)] for layer in scores.layers}


def _pattern(pattern: str | type) -> str:
    if isinstance(pattern, type):
        return pattern.__name__
    if not isinstance(pattern, str):
        raise ValueError(f"pattern={pattern!r}; wanted a layer's name, a pattern or a type")
    return pattern


def _several(value: Choice | Sequence[Choice]) -> list[Choice]:
    return list(value) if isinstance(value, (list, tuple, set, frozenset)) else [value]


def _name(value: Choice) -> str:
    return "float" if value is None else str(value)
