"""Rounding: what every way to round has in common, and how one is named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..scheme import Scheme
from .grid import Codes

if TYPE_CHECKING:
    from .statistics import Statistics


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """One way to round, with its options; frozen, so that its `repr` says all there is to know.

    `needs` is what it looks at besides the weight: "nothing", its layer's "inputs", or the "outputs" of a part of the
    model.
    `mismatch` is whether the aim is the float layer's output on the float model's inputs, which makes up for what
    the layers before have done, or its output on the inputs that it will meet.
    """

    name: ClassVar[str] = ""
    needs: ClassVar[str] = "nothing"
    mismatch: ClassVar[bool] = False

    def round(self, rows: Tensor, scheme: Scheme, statistics: Statistics | None = None) -> Codes:
        """Codes for a weight [N, K]. `statistics` are of its layer's inputs, where the method needs them."""
        raise TypeError(f"{type(self).__name__} is abstract; wanted one of {', '.join(known())}")

    def alone(self) -> Rounding:
        """The same idea for one layer by itself, as scores of single layers need it."""
        return self


def known() -> dict[str, type[Rounding]]:
    """All that have a name, by it."""
    found: dict[str, type[Rounding]] = {}
    kinds = [Rounding]
    while kinds:
        kind = kinds.pop(0)
        kinds += kind.__subclasses__()
        if kind.name:
            found[kind.name] = kind
    return found


def as_rounding(rounding: str | Rounding, option: str = "rounding") -> Rounding:
    """By name with its defaults, or as it is. `option` is what the caller calls it.

    >>> as_rounding("minmax")
    MinMax()
    """
    if isinstance(rounding, Rounding) and rounding.name:
        return rounding
    if not isinstance(rounding, str) or rounding not in known():
        names = ", ".join(repr(name) for name in known())
        raise ValueError(
            f"{option}={rounding!r}; wanted {names}, or one of the classes of mpqkern.rounding with options, "
            "as in GPTQ(damp=0.1)"
        )
    return known()[rounding]()
