"""The site's pages are the repository's documents, each at its own path; what they link to comes along."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
_LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")
_LOADED = re.compile(r"""<(?:(?:script|img|iframe|source)\b[^>]*\bsrc|link\b[^>]*\bhref)=["']?(?:https?:)?//""")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every page of the menu, and every file that one links to. A link to anything else is left to be refused."""
    pages = [ROOT / uri for uri in _pages(config.nav)]
    linked = {(page.parent / target).resolve() for page in pages for target in _LINK.findall(page.read_text("utf-8"))}
    for path in sorted({*pages, *(path for path in linked if path.is_file())}):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_post_page(output: str, page: Page, **_: object) -> str:
    """Raises PluginError where a page would load something from another address: readers may have no network."""
    if found := _LOADED.search(output):
        raise PluginError(f"{page.file.src_uri} loads {found[0]!r}; put the file into the repository and link to that.")
    return output


def _pages(nav: list[object] | dict[str, object] | str) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [uri for entry in entries for uri in _pages(entry)]
