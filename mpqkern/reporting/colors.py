"""Colours for both modes. Ramps of one hue for amounts, blue to red for signs, orange to blue for widths.

All pairs that mean different things differ in lightness too, so that they stay apart for the color-blind and in print.
Marks ask for them by class: q0..q11 for amounts, d0..d14 for signs (d7 is none), b1..b8 and bf for widths; text on a
mark by the mark's with on- before it. LOOKS are the other classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

AMOUNTS, SIGNS = 12, 15
NONE = SIGNS // 2

_LIGHT = {
    "page": "#fcfcfb",
    "text": "#1a1e23",
    "muted": "#5a636d",
    "line": "#d9dde1",
    "faint": "#edf0f2",
    "accent": "#b8400e",
    "mark": "#1f5f99",
    "q": ("#e3f3ec", "#a5dcc0", "#54bdb1", "#3592a6", "#375f99", "#3d3670"),
    "d": ("#1d5fa8", "#77aedb", "#eceef0", "#f0a184", "#b2232f"),
    "b": ("#bf6a00", "#d27e00", "#6b964f", "#1c9082", "#1d83a3", "#1f6fb5", "#265ba8", "#2d4796"),
    "bf": "#868d95",
}
_DARK = {
    "page": "#14171b",
    "text": "#e7eaed",
    "muted": "#a2abb4",
    "line": "#343b43",
    "faint": "#21262b",
    "accent": "#ff9e66",
    "mark": "#7fb8ee",
    "q": ("#242a3a", "#35406b", "#3a68a0", "#379aa9", "#5cc6ae", "#d5f2df"),
    "d": ("#7fc0ff", "#3f76ad", "#262b30", "#a8563c", "#ff9a7a"),
    "b": ("#ffc46b", "#f5ab45", "#9fc07a", "#45bfae", "#4db4d1", "#66aef2", "#7c9ff0", "#9a96ee"),
    "bf": "#7d858e",
}
MODES = (_LIGHT, _DARK)
PRINT = _LIGHT | {"page": "#ffffff"}
PLAIN = ("page", "text", "muted", "line", "faint", "accent", "mark", "bf")

# As CSS has it, with names of colours, pixels, and weights of letters.
TAGS: dict[str, dict[str, Any]] = {"rect": {"stroke-width": 0}, "text": {"fill": "muted", "font-size": 11}}
LOOKS: dict[str, dict[str, Any]] = {
    "strong": {"fill": "text", "font-weight": 600, "font-size": 12},
    "grid": {"stroke": "line", "stroke-width": 1},
    "axis": {"stroke": "muted", "stroke-width": 1},
    "ghost": {"fill": "line"},
    "hit": {"fill": "text", "fill-opacity": 0},  # what only the pointer finds
    "frame": {"fill": "none", "stroke": "text", "stroke-width": 2},
    "under": {"stroke": "page", "stroke-width": 4},
    "bar": {"fill": "text", "stroke": "page", "stroke-width": 0.8},
    "outline": {"fill": "none", "stroke": "line"},
    "stairs": {"fill": "none", "stroke": "mark", "stroke-width": 1.5, "stroke-opacity": 0.55},
    "whisker": {"stroke": "mark", "stroke-width": 1.5},
    "point": {"fill": "mark", "stroke": "mark", "stroke-width": 1.5},
    "open": {"fill": "page"},
    "ring": {"fill": "accent", "fill-opacity": 0.15, "stroke": "accent", "stroke-width": 2.5},
    "float": {"stroke": "accent", "stroke-width": 1.5},
}


def look(tag: str, classes: str | None) -> dict[str, Any]:
    """Properties of a mark with these classes.

    >>> look("text", None), look("rect", "q3"), look("circle", "point open")["fill"]
    ({'fill': 'muted', 'font-size': 11}, {'stroke-width': 0, 'fill': 'q3', 'stroke': 'q3'}, 'page')
    """
    found = dict(TAGS.get(tag, {}))
    for name in (classes or "").split():
        found |= LOOKS.get(name) or _ramp_look(name)
    return found


def _ramp_look(name: str) -> dict[str, Any]:
    return {"fill": name} if name.startswith("on-") else {"fill": name, "stroke": name}


def css() -> str:
    """Variables for each mode, and the classes that use them; paper is light."""
    light, dark = ("".join(f"--{name}:{color};" for name, color in variables(mode).items()) for mode in MODES)
    ramps = [name for name in variables(_LIGHT) if name not in PLAIN or name == "bf"]
    rules = [f"svg {tag}{{{_declared(looks)}}}" for tag, looks in TAGS.items()]
    rules += [f".{name}{{{_declared(looks)}}}" for name, looks in LOOKS.items()]
    rules += [f".{name}{{{_declared(_ramp_look(name))}}}" for name in ramps]
    return f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n{''.join(rules)}\n"


def _declared(looks: dict[str, Any]) -> str:
    return ";".join(f"{key}:{_value(key, value)}" for key, value in looks.items())


def _value(key: str, value: Any) -> str:
    if isinstance(value, str):
        return value if value == "none" else f"var(--{value})"
    return f"{value}px" if key == "font-size" else str(value)


def amount_class(share: float) -> str:
    """Of 0..1."""
    return f"q{min(int(share * AMOUNTS), AMOUNTS - 1)}"


def sign_class(share: float) -> str:
    """Of -1..1; what is nearest to nothing is d7."""
    return f"d{NONE + round(share * NONE)}"


def width_class(bits: int | None) -> str:
    return "bf" if bits is None or bits > 8 else f"b{bits}"


def variables(mode: dict[str, Any]) -> dict[str, str]:
    """Names of CSS variables with their colours."""
    found = {name: mode[name] for name in PLAIN}
    found |= {f"b{i + 1}": color for i, color in enumerate(mode["b"])}
    for kind, count in (("q", AMOUNTS), ("d", SIGNS)):
        ramp = {f"{kind}{i}": color for i, color in enumerate(_ramp(mode[kind], count))}
        texts = (mode["text"], mode["page"])
        found |= ramp | {
            f"on-{name}": max(texts, key=lambda t, c=color: contrast(t, c)) for name, color in ramp.items()
        }
    return found


def contrast(a: str, b: str) -> float:
    """From 1 to 21, as WCAG 2 has it.

    >>> round(contrast("#000000", "#ffffff"), 1)
    21.0
    """
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


def _luminance(color: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in _rgb(color))]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


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
