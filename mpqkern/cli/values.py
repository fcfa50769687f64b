"""Values as they are written on a command line: schemes, pins, sizes, options of a method."""

from __future__ import annotations

import ast
import re
from argparse import ArgumentTypeError
from typing import Any

from ..scheme import Scheme

SCHEME = re.compile(r"w?(\d+)(?:a(\d+))?(?:g(\d+))?(-asym)?")
UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def scheme(text: str) -> Scheme | None:
    """A `Scheme` as it is printed, a width, or "float".

    >>> scheme("w4a8g32-asym") == Scheme(4, act_bits=8, group_size=32, symmetric=False), scheme("float")
    (True, None)
    """
    if text == "float":
        return None
    found = SCHEME.fullmatch(text)
    if not found:
        raise ArgumentTypeError(f"{text!r} is no scheme; wanted a width, w4, w4g32, w4a8, w4-asym, ... or float")
    bits, act_bits, group = (None if part is None else int(part) for part in found.groups()[:3])
    try:
        return Scheme(bits, act_bits=act_bits, group_size=group, symmetric=not found[4])
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def choice(text: str) -> Scheme | int | None:
    """A scheme, or a plain width for whatever schemes have it."""
    return int(text) if text.isdecimal() else scheme(text)


def pin(text: str) -> tuple[str, Scheme | int | None]:
    """NAME=4; the name may hold any character, also "="."""
    return _split(text, "NAME=4")[0], choice(_split(text, "NAME=4")[1])


def ban(text: str) -> tuple[str, list[Scheme | int | None]]:
    """NAME=2,4"""
    name, values = _split(text, "NAME=2,4")
    return name, [choice(value) for value in values.split(",")]


def most(text: str) -> tuple[Scheme | int | None, int]:
    """2=3: at most three layers of two bits."""
    which, count = _split(text, "2=3")
    if not count.isdecimal():
        raise ArgumentTypeError(f"{text!r}; wanted a number of layers, as in 2=3")
    return choice(which), int(count)


def option(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as Python has it, or else as text."""
    name, sign, value = text.partition("=")
    if not (sign and name.isidentifier()):
        raise ArgumentTypeError(f"{text!r}; wanted NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def size(text: str) -> int:
    """Bytes.

    >>> size("512MiB"), size("1e6")
    (536870912, 1000000)
    """
    found = re.fullmatch(r"([0-9.e]+) *([A-Za-z]*)", text)
    try:
        return int(float(found[1]) * UNITS[found[2].upper()])
    except (TypeError, KeyError, ValueError, OverflowError):
        raise ArgumentTypeError(f"{text!r}; wanted bytes, as 512MiB, 2GB or 1000000") from None


def shape(text: str) -> tuple[int, int]:
    """NxK"""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise ArgumentTypeError(f"{text!r}; wanted NxK, as 4096x11008")
    return int(found[1]), int(found[2])


def _split(text: str, form: str) -> tuple[str, str]:
    name, sign, value = text.rpartition("=")
    if not (sign and name and value):
        raise ArgumentTypeError(f"{text!r}; wanted {form}")
    return name, value
