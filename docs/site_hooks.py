"""Hooks of mkdocs: pages outside docs/, and whatever pages link to.

The site has the folders of the repository, with those of docs/ at its root.
So a link that leads somewhere in the repository leads there on the site.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"\[([^]]*)\]\((?!https?:|#)([^)#\s]+)([^)]*)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages outside docs/ and, from there on, what is linked."""
    pending = [ROOT / name for name in PAGES]
    pending += [Path(file.abs_src_path) for file in files.documentation_pages()]
    seen = set()
    while pending:
        path = pending.pop()
        if path in seen:
            continue
        seen.add(path)
        uri = _site_uri(path)
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(path)))
        if path.suffix == ".md":
            links = LINK.findall(path.read_text(encoding="utf-8"))
            targets = (_target(path, link) for _, link, _ in links)
            pending += [target for target in targets if target.is_file()]
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Turns links between files of the repository into those of the site."""
    path = Path(page.file.abs_src_path)
    folder = os.path.dirname(page.file.src_uri) or "."

    def replace(match: re.Match[str]) -> str:
        text, link, rest = match.groups()
        target = _target(path, link)
        if target.is_dir():  # which a site does not show
            return text
        if not target.is_file():
            return match[0]
        link = Path(os.path.relpath(_site_uri(target), folder)).as_posix()
        return f"[{text}]({link}{rest})"

    return LINK.sub(replace, markdown)


def _target(path: Path, link: str) -> Path:
    return Path(os.path.normpath(path.parent / link))


def _site_uri(path: Path) -> str:
    uri = path.relative_to(ROOT).as_posix()
    return "index.md" if uri == "README.md" else uri.removeprefix("docs/")
