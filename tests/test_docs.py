"""The pages of docs/: their code runs, their links lead somewhere, and what they quote is in the sources."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import fields
from importlib import import_module
from inspect import signature
from pathlib import Path

import pytest
import torch

import mpqkern
from mpqkern.rounding.method import known
from mpqkern.scores.entry import METHODS

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
    if page.stem == "ecosystem":
        for package in ("transformers", "onnxruntime", "onnxscript"):
            pytest.importorskip(package)
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


def test_every_option_of_a_method_is_on_its_page() -> None:
    for name, (file, suffix, _) in METHODS.items():
        page = DOCS / "methods" / f"{'limpq' if name == 'limpq_lite' else name}.md"
        text = (page if page.is_file() else DOCS / "methods" / "baselines.md").read_text()
        assert name in text
        if file is not None:
            score = getattr(import_module(f"mpqkern.scores.{file}"), f"score{suffix}")
            options = [p.name for p in signature(score).parameters.values() if p.kind is p.KEYWORD_ONLY]
            assert [o for o in options if not re.search(rf"`{o}[`=]", text)] == [], name


def test_every_option_of_a_rounding_is_on_its_page() -> None:
    text = (DOCS / "rounding.md").read_text()
    for name, kind in known().items():
        assert f"\n## {name}\n" in text
        assert [f.name for f in fields(kind) if not re.search(rf"[`, ]{f.name}[`=]", text)] == [], name


def test_quoted_messages_are_in_the_sources() -> None:
    files = [*(ROOT / "mpqkern").rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.h")]
    # literals that stand next to each other are one text, and braces hold what differs
    joined = [re.sub(r'"\s*\n?\s*f?"', "", file.read_text()) for file in [*files, ROOT / "setup.py"]]
    text = "\n".join(re.sub(r"\{[^{}\"]*(\"[^\"]*\"[^{}\"]*)*\}", "...", source) for source in joined)
    quoted = re.findall(r"^- `([^`]+)`\\$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) > 40
    missing = [message for message in quoted if message not in text]
    assert not missing, missing


def test_commands_run_in_the_order_of_the_page(cli) -> None:  # type: ignore[no-untyped-def]
    lines = [line for block in blocks(DOCS / "command-line.md", "sh") for line in block.splitlines()]
    for line in lines:
        assert line.startswith("mpqkern "), line
        code, out, err = cli(line.removeprefix("mpqkern "))
        assert code == 0 and out.strip(), (line, err)
    assert "<svg" in Path("mpqkern-run/report.html").read_text()


def test_the_citation_names_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {mpqkern.__version__}\n" in text and "\nlicense: Apache-2.0\n" in text
