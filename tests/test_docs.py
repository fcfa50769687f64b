"""The pages of docs/: their code runs, their links lead somewhere, and what they quote is in the sources."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch

import mpqkern

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
LINKED = [ROOT / "README.md", ROOT / "CHANGELOG.md", *PAGES]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What GitHub, and Sphinx with it, calls the headings of a page."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=named)
def test_code_runs_from_top_to_bottom(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPQKERN_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, named(page), "exec"), names)


@pytest.mark.parametrize("page", LINKED, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{named(page)} links to {target}, which is not there"
        assert not anchor or anchor in anchors(file), f"{named(page)} links to {target}; there is {anchors(file)}"


def test_every_page_is_in_the_index() -> None:
    listed = re.findall(r"\]\(([\w/-]+\.md)\)", (DOCS / "index.md").read_text())
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in PAGES if page.name != "index.md" or
        page.parent != DOCS)  # fmt: skip


def test_every_public_name_is_on_the_api_page() -> None:
    listed = re.findall(r"^- `mpqkern\.([\w.]+)`", (DOCS / "api.md").read_text(), re.MULTILINE)
    rounding = [f"rounding.{name}" for name in mpqkern.rounding.__all__ if name not in mpqkern.__all__]
    public = [name for name in mpqkern.__all__ if name != "__version__"]
    assert sorted(listed) == sorted([*public, *rounding])


def test_every_method_and_option_is_on_its_page() -> None:
    text = "".join(page.read_text() for page in (DOCS / "methods").glob("*.md"))
    assert all(f"`{name}`" in text or f"## {name}\n" in text for name in mpqkern.methods())
