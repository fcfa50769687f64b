"""Attributes: what a model's modules are set to beside their tensors, as far as it can be told in plain values."""

from __future__ import annotations

from typing import Any

from torch import nn

PLAIN = (int, float, str, bool, type(None))
OWN = frozenset(vars(nn.Module()))  # torch's bookkeeping, and `training`


def attributes(model: nn.Module) -> dict[str, str]:
    """By "module.attribute", in order: numbers, texts, None, and tuples and lists of these.

    >>> attributes(nn.Sequential(nn.Dropout(0.25)))
    {'0.inplace': 'False', '0.p': '0.25'}
    """
    return {
        f"{name}.{key}" if name else key: repr(value)
        for name, module in sorted(model.named_modules(), key=lambda pair: pair[0])
        for key, value in sorted(vars(module).items())
        if key not in OWN and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    return type(value) in PLAIN
