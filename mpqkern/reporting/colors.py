"""Colours for both modes. Ramps of one hue for amounts, blue to red for signs, orange to blue for widths.

All pairs that mean different things differ in lightness too, so that they stay apart for the color-blind and in print.
Marks ask for them by class: q0..q11 for amounts, d0..d14 for signs (d7 is none), b1..b8 and bf for widths.
"""

from __future__ import annotations

from collections.abc import Sequence

AMOUNTS, SIGNS = 12, 15
NONE = SIGNS // 2

_LIGHT = {
    "q": ("#e3f3ec", "#a5dcc0", "#54bdb1", "#3592a6", "#375f99", "#3d3670"),
    "d": ("#1d5fa8", "#77aedb", "#eceef0", "#f0a184", "#b2232f"),
    "b": ("#bf6a00", "#d98200", "#6f9a54", "#1c9082", "#1d83a3", "#1f6fb5", "#265ba8", "#2d4796"),
}
_DARK = {
    "q": ("#242a3a", "#35406b", "#3a68a0", "#379aa9", "#5cc6ae", "#d5f2df"),
    "d": ("#7fc0ff", "#3f76ad", "#262b30", "#a8563c", "#ff9a7a"),
    "b": ("#ffc46b", "#f5ab45", "#9fc07a", "#45bfae", "#4db4d1", "#66aef2", "#7c9ff0", "#9a96ee"),
}
_FLOAT = {"light": "#8b929a", "dark": "#7d858e"}


def css() -> str:
    """Variables for each mode, and the classes that use them; paper is light."""
    counts = {"q": range(AMOUNTS), "d": range(SIGNS), "b": (*range(1, 9), "f")}
    names = [f"{kind}{i}" for kind, indices in counts.items() for i in indices]
    classes = "".join(f".{n}{{fill:var(--{n});stroke:var(--{n})}}" for n in names)
    dark = f"@media screen and (prefers-color-scheme:dark){{:root{{{_variables(_DARK, _FLOAT['dark'])}}}}}"
    return f":root{{{_variables(_LIGHT, _FLOAT['light'])}}}\n{dark}\n{classes}\n"


def amount_class(share: float) -> str:
    """Of 0..1."""
    return f"q{min(int(share * AMOUNTS), AMOUNTS - 1)}"


def sign_class(share: float) -> str:
    """Of -1..1; what is nearest to nothing is d7."""
    return f"d{NONE + round(share * NONE)}"


def width_class(bits: int | None) -> str:
    return "bf" if bits is None or bits > 8 else f"b{bits}"


def is_deep(name: str) -> bool:
    """Whether text on this class has to have the page's colour."""
    kind, index = name[0], int(name[1:])
    return index >= AMOUNTS // 2 if kind == "q" else abs(index - NONE) > 4


def _variables(ramps: dict[str, tuple[str, ...]], plain: str) -> str:
    found = {f"q{i}": c for i, c in enumerate(_ramp(ramps["q"], AMOUNTS))}
    found |= {f"d{i}": c for i, c in enumerate(_ramp(ramps["d"], SIGNS))}
    found |= {f"b{i + 1}": c for i, c in enumerate(ramps["b"])} | {"bf": plain}
    return "".join(f"--{name}:{color};" for name, color in found.items())


def _ramp(anchors: Sequence[str], count: int) -> list[str]:
    colors = []
    for i in range(count):
        at = i * (len(anchors) - 1) / (count - 1)
        k = min(int(at), len(anchors) - 2)
        low, high = (_rgb(anchors[j]) for j in (k, k + 1))
        colors.append("#" + "".join(f"{round(a + (b - a) * (at - k)):02x}" for a, b in zip(low, high, strict=True)))
    return colors


def _rgb(color: str) -> list[int]:
    return [int(color[i : i + 2], 16) for i in (1, 3, 5)]
