"""Sphinx: `make docs` builds docs/*.md, plain Markdown, into build/docs; any warning is an error.

What Markdown cannot say is added here as pages are read: the tree of contents, which is the links of index.md, below
api.md the docstrings of the names that it lists, and the README, which lies outside of this folder, as introduction.md.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mpqkern  # noqa: E402

project = "mpqkern"
author = "The mpqkern developers"
version = release = mpqkern.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = f"mpqkern {version}"
html_show_copyright = False
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # as GitHub makes them, so that one link serves both
default_role = "literal"  # docstrings write `name` as Markdown does
autodoc_typehints = "signature"
autodoc_member_order = "bysource"


def contents(index: str) -> str:
    """A hidden tree of contents for each section of index.md, from the links in it."""
    found = []
    for section in index.split("\n## ")[1:]:
        pages = re.findall(r"\]\(([\w/-]+)\.md\)", section)
        caption = section.splitlines()[0]
        found.append("\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"]))
    return "\n\n".join(found)


def reference(page: str) -> str:
    """What autodoc says of each name that stands in a list of api.md as `mpqkern.name`."""
    lines = ["## Docstrings", "", "```{eval-rst}"]
    for path in re.findall(r"^- `(mpqkern\.[\w.]+)`", page, re.MULTILINE):
        found: Any = mpqkern
        for part in path.split(".")[1:]:
            found = getattr(found, part)
        if inspect.isclass(found):
            lines += [f".. autoclass:: {path}", "   :members:", ""]
        elif inspect.isfunction(found):
            lines += [f".. autofunction:: {path}", ""]
        elif inspect.ismodule(found):
            lines += [f".. automodule:: {path}", ""]
    return "\n".join([*lines, "```"])


def readme() -> str:
    """The README as a page of this folder; of a link to another folder only the text is left."""

    def rebased(link: re.Match[str]) -> str:
        text, target = link.groups()
        if "://" in target or target.startswith("#"):
            return link[0]
        if (ROOT / target).is_dir():
            return text
        return f"[{text}]({target.removeprefix('docs/') if target.startswith('docs/') else f'../{target}'})"

    text = re.sub(r"\[([^]]*)\]\(([^)\s]+)\)", rebased, (ROOT / "README.md").read_text())
    return text.replace(f"# {project}\n", "# Introduction\n", 1)


def add_what_markdown_cannot_say(app: Any, page: str, source: list[str]) -> None:
    if page == "introduction":
        source[0] = readme()
        return
    up = "../" * page.count("/")
    source[0] = source[0].replace(f"]({up}../README.md", f"]({up}introduction.md")
    if page == "index":
        source[0] += "\n" + contents(source[0])
    if page == "api":
        source[0] += "\n" + reference(source[0])


def show_as_it_stands(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text whose columns are aligned: all below the first paragraph keeps its spaces."""
    end = lines.index("") if "" in lines else len(lines)
    lines[:end] = [line.replace("|", r"\|").replace("*", r"\*") for line in lines[:end]]
    rest = [f"   {line}" for line in lines[end:]]
    lines[end:] = ["", "::", "", *rest, ""] if any(line.strip() for line in rest) else [""]


def setup(app: Any) -> None:
    app.connect("source-read", add_what_markdown_cannot_say)
    app.connect("autodoc-process-docstring", show_as_it_stands)
