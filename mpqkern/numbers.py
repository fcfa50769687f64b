"""Numbers among options: what is none, or out of range, is named together with what was wanted."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import numpy as np


def check_flag(name: str, value: Any) -> None:
    """Numbers are no flags: 0.1 for an option that is on or off has been meant for another one."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}; wanted True or False")


def check_number(
    name: str,
    value: Any,
    wanted: str,
    good: Callable[[Any], bool] = lambda value: True,
    *,
    whole: bool = False,
    optional: bool = False,
) -> None:
    """Booleans and texts are no numbers; `optional` lets None pass. `wanted` completes "wanted ...".

    >>> check_number("beta", 0.5, "a number of 0 or more", lambda v: v >= 0)
    >>> check_number("steps", "5", "a whole number", whole=True)
    Traceback (most recent call last):
    TypeError: steps='5'; wanted a whole number
    """
    if value is None and optional:
        return
    kind = Integral if whole else Real
    if not isinstance(value, kind) or isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}={value!r}; wanted {wanted}")
    if not good(value):
        raise ValueError(f"{name}={value!r}; wanted {wanted}")
