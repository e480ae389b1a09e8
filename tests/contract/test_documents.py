"""What documents and comments point to is there: paths, documents, the site's menu. The site's links: `make docs`."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.engines import ROOT

PACKAGE = ROOT / "monitor/latentwatch"
ARCHITECTURE = ROOT / "docs/architecture.md"
SITE = ROOT / "docs/site/mkdocs.yml"
OF_OTHERS = {"docs/gguf.md", "cards.md"}
"""Documents of other projects that a comment cites, and one that `watchlist start` writes."""
SOURCES = (".py", ".pyi", ".proto", ".js", ".html", ".css", ".yaml", ".yml", ".toml", ".tpl", ".in", ".sh", "Makefile")

_FILE = re.compile(r"(?<![\w./-])(?:[\w-]+/)*[\w-]+\.(?:py|js|ts|html|css|proto|ya?ml|json|toml|md|tpl)\b(?![\w/])")
_FOLDER = re.compile(r"`((?:[\w-]+/)+)`")
_DOCUMENT = re.compile(r"[\w./-]*[A-Za-z_]\.md\b")
_NO_SOURCE = re.compile(r"\b(?:DESIGN|KERNELS|ENGINE|OPERATIONS|STYLE)(?:'s)? ?[A-Z]?\d|\bDESIGN's\b|design notes")
"""Notes that were never in the repository."""


def tracked(*endings: str) -> list[Path]:
    """Files of the repository, new ones that git does not ignore among them."""
    listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True)
    return [path for name in listed.splitlines() if (path := ROOT / name).is_file() and name.endswith(endings)]


def paths(text: str) -> list[str]:
    return sorted({*_FILE.findall(text), *_FOLDER.findall(text)} - {"watchlist.yaml"})


def menu(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for part in entry.values() if isinstance(entry, dict) else entry:
            yield from menu(part)


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_every_path_that_a_page_about_the_code_names_exists(page: str) -> None:
    named = paths(re.sub(r"\]\([^)]*\)", "]", (ROOT / page).read_text()))
    assert len(named) > 15, "the page was read"
    assert [path for path in named if not any((root / path).exists() for root in (PACKAGE, ROOT))] == []


def test_a_newcomer_finds_many_kinds_of_change_in_the_architecture() -> None:
    """Each row names at least one file or folder to open."""
    table = ARCHITECTURE.read_text().partition("## I want to change")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (?!I want|---|-)(.+?) \|$", table, re.MULTILINE)
    assert len(rows) >= 25
    assert [row for row in rows if not paths(row)] == []


def test_every_package_of_ours_stands_in_the_architecture() -> None:
    text = ARCHITECTURE.read_text()
    packages = {path.parent.relative_to(PACKAGE).parts[0] for path in PACKAGE.glob("*/__init__.py")}
    assert {name for name in packages if not re.search(rf"\b{name}/", text)} == set()


def test_every_document_that_a_source_cites_is_in_the_repository() -> None:
    there = {path.relative_to(ROOT).as_posix() for path in tracked(".md")}
    cited = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in tracked(*SOURCES)
        for name in _DOCUMENT.findall(path.read_text())
    }
    assert len(cited) > 20, "the sources were read"
    missing = {
        (path, name)
        for path, name in cited
        if name not in OF_OTHERS and not any(f"/{one}".endswith(f"/{name.removeprefix('../')}") for one in there)
    }
    assert missing == set()


def test_no_source_cites_notes_that_nobody_else_has() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in tracked(*SOURCES)
        if path != Path(__file__)
        for match in _NO_SOURCE.finditer(path.read_text())
    }
    assert found == set()


def test_every_document_is_on_the_site_and_in_the_list_of_documents() -> None:
    on_site = list(menu(yaml.safe_load(SITE.read_text())["nav"]))
    assert len(on_site) == len(set(on_site))
    theirs = {path.relative_to(ROOT).as_posix() for path in tracked(".md")}
    # The template of the demo's card becomes that card.
    assert set(on_site) == {name for name in theirs if not name.endswith("card_template.md")}
    index = ROOT / "docs/index.md"
    linked = {(index.parent / target).resolve() for target in re.findall(r"\]\(([^)#]+)", index.read_text())}
    assert {(ROOT / name).resolve() for name in on_site} - {index} == linked


@pytest.mark.parametrize("page", sorted(path.relative_to(ROOT).as_posix() for path in tracked(".md")))
def test_every_link_and_picture_of_a_document_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    targets = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text) + re.findall(r"^\[\w+\]: (?!\w+:)([^#\s]+)", text, re.M)
    assert [target for target in targets if not (ROOT / page).parent.joinpath(target).exists()] == []


@pytest.mark.parametrize("page", sorted(path.relative_to(ROOT).as_posix() for path in tracked(".md")))
def test_lists_are_read_alike_by_a_git_host_and_by_the_site(page: str) -> None:
    """The site's Markdown wants an empty line before a list, and four spaces before what stands in an item."""
    text = re.sub(r"^```.*?^```", "```", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    item = r"(?:\d+\.|[-*]) "
    assert re.findall(rf"^(?!{item}|[ |#<]).*\S.*\n(?={item})", text, re.MULTILINE) == []
    assert re.findall(r"^ {1,3}```.*|^ {5,}```.*", text, re.MULTILINE) == []
