"""Choosing layers by exact name, glob, "re:..." or type name; a pattern that matches nothing is an error."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def type_pattern(kind: type) -> str:
    """The pattern that selects instances of this very class, whatever else is named like it."""
    return f"type:{kind.__module__}.{kind.__qualname__}"


def type_names(kinds: Iterable[type]) -> list[str]:
    """What a layer of these classes (most specific first) can be selected by."""
    return [name for kind in kinds for name in (type_pattern(kind), kind.__name__)]


def matches(pattern: str, kinds: Mapping[str, Sequence[str]]) -> list[str]:
    """The names that `pattern` selects; `kinds` maps each layer's name to the names of its types.

    >>> matches("block.*", {"block.0": ["Linear"], "head": ["Linear"]})
    ['block.0']
    >>> matches("re:(head|stem)", {"block.0": ["Linear"], "head": ["Linear"]})
    ['head']
    """
    if pattern.startswith("re:"):
        try:
            regex = re.compile(pattern[3:])
        except re.error as error:
            raise ValueError(f"pattern={pattern!r} is no regular expression ({error})") from None
        found = [name for name in kinds if regex.fullmatch(name)]
    elif pattern in kinds:
        found = [pattern]
    else:
        found = [name for name in kinds if fnmatch.fnmatchcase(name, pattern)]
        found = found or [name for name, types in kinds.items() if pattern in types]
    if not found:
        raise ValueError(f"pattern={pattern!r} matches no layer{_hint(pattern, kinds)}")
    return found


def _hint(pattern: str, kinds: Mapping[str, Sequence[str]]) -> str:
    if not kinds:
        return "; there is none to choose from"
    types = {t for names in kinds.values() for t in names if not t.startswith("type:")}
    close = difflib.get_close_matches(pattern, [*kinds, *types], n=3, cutoff=0.5)
    if close:
        return f"; did you mean {', '.join(map(repr, close))}?"
    return f"; there are {', '.join(map(repr, list(kinds)[:5]))}{', ...' if len(kinds) > 5 else ''}"


def rank(pattern: str, name: str, types: Sequence[str]) -> float:
    """How specific a match is: an exact name, then a glob or regular expression, then a type (a subclass
    before its bases), and last "*"."""
    if pattern in (name, "*"):
        return 3 if pattern == name else 0
    if pattern.startswith("re:") or fnmatch.fnmatchcase(name, pattern):
        return 2
    return 1 + 1 / (2 + types.index(pattern))


def choose(plan: Mapping[str, T], kinds: Mapping[str, Sequence[str]]) -> dict[str, tuple[float, T]]:
    """The rank and value of the most specific pattern for each selected name; the later of equals."""
    chosen: dict[str, tuple[float, T]] = {}
    for pattern, value in plan.items():
        for name in matches(pattern, kinds):
            level = rank(pattern, name, kinds[name])
            if name not in chosen or level >= chosen[name][0]:
                chosen[name] = (level, value)
    return chosen


def assign(plan: Mapping[str, T], kinds: Mapping[str, Sequence[str]]) -> dict[str, T]:
    """One value for each selected name.

    >>> assign({"Linear": 4, "head": 8}, {"block.0": ["Linear"], "head": ["Linear"]})
    {'block.0': 4, 'head': 8}
    """
    chosen = choose(plan, kinds)
    return {name: chosen[name][1] for name in kinds if name in chosen}
