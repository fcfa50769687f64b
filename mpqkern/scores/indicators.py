"""Indicators: learned steps of weights and activations as costs, with the steps that learning got wrong set right."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..numbers import check_number
from ..scheme import Layer, Scheme
from .table import FLOAT_BITS, Scores

WIRED = ("repair", "forbid")
FORBIDDEN = 1e8  # as a step: more than any sum of real ones

Indicators = Mapping[str, Mapping[Any, float]]  # steps by layer and bits; the bits may be text, as in JSON


def from_indicators(
    layers: Sequence[Layer],
    w: Indicators,
    a: Indicators | None = None,
    *,
    alpha: float = 2.0,
    schemes: Sequence[Scheme | None] | None = None,
    wired: str = "repair",
) -> Scores:
    """Costs from learned steps {layer: {bits: step}} of weights and, for pairs of widths, of activations.

    `schemes` are all widths or pairs of widths that come up, by default. Layers without steps are narrowed last.

    >>> layers = [Layer("a", "linear", (4, 4), 16, 16), Layer("b", "linear", (4, 4), 16, 16)]
    >>> found = from_indicators(layers, {"a": {2: 0.5, 4: 0.1}, "b": {2: 0.3, 4: 0.1}})
    >>> found, found.unary.tolist()
    (Scores(2 layers, w2, w4, unary), [[1.0, 0.2], [0.6, 0.2]])
    """
    check_costs(alpha, wired)
    given = {"w": _by_width("w", w), "a": _by_width("a", a or {})}
    if schemes is None:
        weights, acts = (sorted({b for steps in given[kind].values() for b in steps}) for kind in "wa")
        schemes = [Scheme(b, act_bits=c) for b in weights for c in (acts or [None])]
    measured = [layer.name for layer in layers if layer.name in given["w"]]
    costs, repaired = {}, []
    for kind in "wa":
        costs[kind], changed = monotone({name: given[kind][name] for name in measured if name in given[kind]}, wired)
        repaired += [[name, kind, bits] for name, bits in changed]

    def cost(name: str, scheme: Scheme | None) -> float:
        if scheme is None:
            return 0.0
        try:
            found = alpha * costs["w"][name][scheme.bits]
            return found if scheme.act_bits is None else found + costs["a"][name][scheme.act_bits]
        except KeyError as error:
            raise ValueError(f"layer {name!r} has no step for {scheme}: {error} is missing") from None

    known = {name: [cost(name, scheme) for scheme in schemes] for name in measured}
    all_others = sum(max((c for c in line if c < FORBIDDEN), default=0.0) for line in known.values())
    apart = [all_others] * len(schemes)
    apart[max(range(len(schemes)), key=lambda b: _width(schemes[b]))] = 0.0
    unary = [known.get(layer.name, apart) for layer in layers]
    indicators = {
        name: {kind: {str(b): s for b, s in given[kind].get(name, {}).items()} for kind in "wa"} for name in measured
    }
    without = [layer.name for layer in layers if layer.name not in known]
    notes = {"indicators": indicators, "alpha": alpha, "without_steps": without, "wired": repaired}
    return Scores(layers, schemes, unary, provenance=notes)


def monotone(steps: Mapping[str, Mapping[int, float]], wired: str = "repair") -> tuple[dict, list[tuple[str, int]]]:
    """The same steps where no width costs less than a wider one, and where there was one that did.

    >>> monotone({"a": {8: 1.0, 4: 2.0, 2: 4.0}, "b": {8: 1.0, 4: 2.0, 2: 1.5}, "c": {8: 1.0, 4: 1.5, 2: 6.0}})[0]["b"]
    {8: 1.0, 4: 2.0, 2: 4.0}
    """
    widths = sorted({bits for line in steps.values() for bits in line}, reverse=True)
    found: dict[str, dict[int, float]] = {name: {} for name in steps}
    changed = []
    for i, bits in enumerate(widths):
        wider = widths[i - 1] if i else bits
        typical = max(1.0, float(np.median([line[bits] / line[wider] for line in steps.values()])))
        for name, line in steps.items():
            most = max((step for step in found[name].values() if step < FORBIDDEN), default=0.0)
            found[name][bits] = line[bits]
            if line[bits] < most:
                changed.append((name, bits))
                found[name][bits] = FORBIDDEN if wired == "forbid" else most * typical
    return found, changed


def _by_width(argument: str, indicators: Indicators) -> dict[str, dict[int, float]]:
    """Widest first."""
    found = {
        name: dict(sorted(((int(b), float(s)) for b, s in line.items()), reverse=True))
        for name, line in indicators.items()
    }
    for name, line in found.items():
        for bits, step in line.items():
            if not (math.isfinite(step) and step > 0):
                raise ValueError(f"{argument}[{name!r}][{bits}]={step}; wanted a step above 0")
        if line.keys() != next(iter(found.values())).keys():
            raise ValueError(f"{argument}[{name!r}] has the widths {list(line)}; wanted the same for all layers")
    return found


def _width(scheme: Scheme | None) -> tuple[int, int]:
    return (FLOAT_BITS, FLOAT_BITS) if scheme is None else (scheme.bits, scheme.act_bits or FLOAT_BITS)


def check_costs(alpha: float, wired: str) -> None:
    check_number("alpha", alpha, "0 or more", lambda v: v >= 0)
    if wired not in WIRED:
        raise ValueError(f"wired={wired!r}; wanted 'repair' or 'forbid'")
