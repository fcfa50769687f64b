"""What a plan of patterns means for the layers of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import select
from .catalog import Candidate
from .scheme import Scheme


def planned(plan: Any, found: list[Candidate]) -> dict[str, Scheme | None]:
    """The scheme for each candidate by its first name: None for float; what nothing names is not in it.

    `plan` maps names, patterns or types to a `Scheme`, a width or None, or has a `schemes` that does; one `Scheme` or
    width is for all layers. A layer that nothing names follows the one whose weight it shares.
    """
    wanted = _resolve(plan, found)
    by_weight = {id(c.module.weight): wanted[c.name] for c in found if c.name in wanted and not c.reason}
    others = {c.name: id(c.module.weight) for c in found if c.name not in wanted and not c.reason}
    return wanted | {name: by_weight[weight] for name, weight in others.items() if weight in by_weight}


def pairs_of(plan: Any) -> Mapping[str | type, Any]:
    """A plan as a mapping, its values unread."""
    plan = getattr(plan, "schemes", plan)
    if isinstance(plan, Scheme) or (isinstance(plan, int) and not isinstance(plan, bool)):
        return {"*": plan}
    if not isinstance(plan, Mapping):
        wanted = "a mapping of names, patterns or types to Scheme, an Assignment, or one Scheme for all layers"
        raise TypeError(f"plan={plan!r}; wanted {wanted}")
    return plan


def _resolve(plan: Any, found: list[Candidate]) -> dict[str, Scheme | None]:
    plan = pairs_of(plan)
    asked: dict[str, Scheme | None] = {}
    for pattern, value in plan.items():
        scheme = Scheme(value) if isinstance(value, int) and not isinstance(value, bool) else value
        if scheme is not None and not isinstance(scheme, Scheme):
            raise TypeError(f"plan[{pattern!r}]={value!r}; wanted a Scheme, 2, 4, 8 or None")
        if not isinstance(pattern, (str, type)):
            raise TypeError(f"plan has the key {pattern!r}; wanted a name, a pattern or a type")
        asked[select.type_pattern(pattern) if isinstance(pattern, type) else pattern] = scheme
    kinds = {name: c.kinds for c in found for name in c.names}
    if not asked:
        return {}
    chosen = select.choose(asked, kinds)
    wanted: dict[str, Scheme | None] = {}
    for c in found:
        ranked = {name: chosen[name] for name in c.names if name in chosen}
        top = max((level for level, _ in ranked.values()), default=None)
        values = {name: scheme for name, (level, scheme) in ranked.items() if level == top}
        if len(set(values.values())) > 1:
            raise ValueError(f"one module goes by the names {values}, with different schemes; wanted the same")
        if values:
            wanted[c.name] = next(iter(values.values()))
    return wanted
