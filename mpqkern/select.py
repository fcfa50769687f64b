"""Choosing layers by exact name, glob, "re:..." or type name; a pattern that matches nothing is an error."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


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
        types = {t for names in kinds.values() for t in names}
        close = difflib.get_close_matches(pattern, [*kinds, *types], n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(map(repr, close))}?" if close else ""
        some = ", ".join(map(repr, list(kinds)[:5])) + (", ..." if len(kinds) > 5 else "")
        raise ValueError(f"pattern={pattern!r} matches no layer{hint or f'; there are {some}'}")
    return found


def rank(pattern: str, name: str) -> int:
    """How specific a match is: an exact name, then a glob or regular expression, a type, and last "*"."""
    if pattern in (name, "*"):
        return 3 if pattern == name else 0
    return 2 if pattern.startswith("re:") or fnmatch.fnmatchcase(name, pattern) else 1


def assign(plan: Mapping[str, T], kinds: Mapping[str, Sequence[str]]) -> dict[str, T]:
    """One value for each selected name: the most specific pattern, the later of equals.

    >>> assign({"Linear": 4, "head": 8}, {"block.0": ["Linear"], "head": ["Linear"]})
    {'block.0': 4, 'head': 8}
    """
    chosen: dict[str, tuple[int, T]] = {}
    for pattern, value in plan.items():
        for name in matches(pattern, kinds):
            level = rank(pattern, name)
            if name not in chosen or level >= chosen[name][0]:
                chosen[name] = (level, value)
    return {name: chosen[name][1] for name in kinds if name in chosen}
