"""HTML and SVG as text. All that comes from outside passes through `esc`: names of layers are anybody's."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

TALL = 24  # rows from which on a table scrolls in its box


def esc(text: Any) -> str:
    """Text for between tags and in attributes.

    >>> esc('<b> & "c"' + chr(0))
    '&lt;b&gt; &amp; &quot;c&quot;\ufffd'
    """
    return html.escape(printable(text))


def printable(text: Any) -> str:
    """What does not print (controls, changes of direction) is a U+FFFD."""
    return "".join(c if c.isprintable() else "\ufffd" for c in str(text))


def el(tag: str, *content: str, **attributes: Any) -> str:
    """One element around markup; attributes are escaped, None is left out, `class_` and `text_anchor` lose underscores.

    >>> el("text", esc("a<b"), x=1.50, text_anchor="end")
    '<text x="1.5" text-anchor="end">a&lt;b</text>'
    """
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{coordinate(v) if isinstance(v, float) else esc(v)}"'
        for name, v in attributes.items()
        if v is not None
    )
    return f"<{tag}{given}>{''.join(content)}</{tag}>" if content else f"<{tag}{given}/>"


def coordinate(value: float) -> str:
    """Tenths of a pixel are enough.

    >>> coordinate(3.0), coordinate(2.26), coordinate(-0.01)
    ('3', '2.3', '0')
    """
    return f"{round(value, 1) + 0.0:.1f}".removesuffix(".0")


def hover(*lines: str) -> str:
    """What a browser shows under the pointer, and a screen reader reads."""
    return f"<title>{chr(10).join(map(esc, lines))}</title>"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], *, left: Sequence[int] = (0,), foot: bool = False) -> str:
    """A table that scrolls in a box of its own; columns in `left` are text, and with `foot` the last row is a total."""
    lines = [list(row) for row in rows]

    def line(cells: Sequence[Any], tag: str) -> str:
        drawn = [el(tag, esc(c) or "&#160;", class_="l" if i in left else None) for i, c in enumerate(cells)]
        return el("tr", *drawn)

    body, last = (lines[:-1], lines[-1:]) if foot else (lines, [])
    parts = [el("thead", line(head, "th"))] if head else []
    parts += [el("tbody", *(line(row, "td") for row in body), "")]
    parts += [el("tfoot", line(row, "td")) for row in last]
    return el("div", el("table", *parts), class_="scroll tall" if len(lines) > TALL else "scroll", tabindex=0)


def details(summary: str, *content: str) -> str:
    return el("details", el("summary", esc(summary)), *content)


def paragraph(*sentences: str) -> str:
    """Nothing where there are none."""
    words = " ".join(s for s in sentences if s)
    return el("p", esc(words)) if words else ""


def number(value: float | None) -> str:
    """Four digits; nothing for None.

    >>> number(0.00123456), number(12), number(None)
    ('0.001235', '12', '')
    """
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def size(count: float) -> str:
    """
    >>> size(155_112), size(999), size(2_500_000)
    ('155 kB', '999 B', '2.50 MB')
    """
    for unit, per in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= 0.9995 * per:
            digits = 0 if count >= 99.95 * per else 1 if count >= 9.995 * per else 2
            return f"{count / per:.{digits}f} {unit}"
    return f"{count:,.0f} B"


def listed(names: Sequence[str], most: int = 8) -> str:
    """
    >>> listed(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
