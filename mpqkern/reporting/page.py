"""report: everything that was given, as one file."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any

from ..capabilities import capabilities
from ..compare import Comparison
from ..files import require_place, written
from ..latency import Latency
from ..ledger import Ledger
from ..solve import Assignment, Frontier, Scores
from . import colors, comparison, environment, frontier, packed, pairs, sensitivity, speed, summary, widths
from . import pictures as drawn
from .given import Given
from .markup import el, esc

# In the order in which they are read; each has a TITLE and a section(given) -> markup, or None where it has no input.
SECTIONS = (summary, widths, sensitivity, pairs, frontier, comparison, packed, speed, environment)


def report(
    path: str | os.PathLike[str],
    *,
    title: str = "mpqkern",
    assignment: Assignment | None = None,
    scores: Scores | None = None,
    frontier: Frontier | None = None,
    comparison: Comparison | None = None,
    ledger: Ledger | None = None,
    latency: Latency | None = None,
    pictures: str | os.PathLike[str] | None = None,
) -> Path:
    """Writes one HTML file about all that is given, and returns where.

    Plots are SVG inside of it; nothing is loaded and nothing runs, it follows the reader's light or dark mode, fits a
    phone and prints. Pointing at a mark shows its figures, and each plot has them as a table too. What is not given is
    left out; the environment is always there. The same inputs on the same machine give the same bytes.

    With `pictures`, a folder, the plots are written there as PNG files too, each of its section's name. This needs
    matplotlib. What the folder holds under these names is replaced, all of it or nothing.

    >>> import tempfile
    >>> from mpqkern import Layer
    >>> layers = [Layer("stem", "conv2d", (8, 3, 3, 3), 216), Layer("head", "linear", (10, 8), 80)]
    >>> scores = Scores(layers, [2, 4, 8], [[0.9, 0.2, 0.0], [0.5, 0.1, 0.0]])
    >>> folder = Path(tempfile.mkdtemp())
    >>> report(folder / "report.html", title="two layers", scores=scores).name
    'report.html'
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path={path!r}; wanted a file's name")
    if not isinstance(title, str):
        raise TypeError(f"title={title!r}; wanted text")
    for name, value, kind in (
        ("assignment", assignment, Assignment),
        ("scores", scores, Scores),
        ("frontier", frontier, Frontier),
        ("comparison", comparison, Comparison),
        ("ledger", ledger, Ledger),
        ("latency", latency, Latency),
    ):
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"{name} is of type {type(value).__name__}; wanted {kind.__name__} or None")
    path = Path(path)
    require_place(path)
    folder = None if pictures is None else drawn.wanted(pictures)
    given = Given(title, capabilities(), assignment, scores, frontier, comparison, ledger, latency)
    text = page(given)
    if folder is not None:
        drawn.write(folder, drawn.pictures(given))
    with written(path) as file:
        file.write(text.encode())
    return path


def page(given: Given) -> str:
    found: list[tuple[Any, str]] = [(part, body) for part in SECTIONS if (body := part.section(given)) is not None]
    anchors = {part: part.__name__.rpartition(".")[2] for part, _ in found}
    links = [el("a", esc(part.TITLE), href=f"#{anchors[part]}") for part, _ in found]
    sections = [el("section", el("h2", esc(part.TITLE)), body, id=anchors[part]) for part, body in found]
    style = resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", esc(given.title)),
        el("style", style + colors.css()),
    )
    body = el("body", el("header", el("h1", esc(given.title)), el("nav", *links)), el("main", *sections))
    return f'<!DOCTYPE html>\n<html lang="en">{head}\n{body}</html>\n'
