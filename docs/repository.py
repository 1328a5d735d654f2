"""A hook of MkDocs: pages and records that live elsewhere in the repository, with links that work here and there.

All pages link relative to where they are in the repository. A file that the site holds somewhere else is listed in
``PAGES``, or is a record or figure of ``benchmarks/results``; links to it are turned, and a link to what the site
does not hold is a warning, which ``--strict`` makes an error.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
#: path in the repository -> page of the site
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/RESULTS.md": "results/experiments.md",
    "benchmarks/NOTES.md": "results/notes.md",
}
RECORDS, SITE_RECORDS = "benchmarks/results", "results/records"
_CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_ELSEWHERE = re.compile(r"[a-z]+:")

logger = logging.getLogger("mkdocs.hooks.repository")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and records to the site."""
    for path in sorted((ROOT / RECORDS).iterdir()):
        files.append(
            File.generated(
                config, f"{SITE_RECORDS}/{path.name}", abs_src_path=str(path)
            )
        )
    for path, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Turn a page's links, but for those in code."""
    here = next(
        (path for path, site in PAGES.items() if site == page.file.src_uri),
        f"docs/{page.file.src_uri}",
    )

    def turned(found: re.Match[str]) -> str:
        begin, target, end = found.groups()
        if _ELSEWHERE.match(target):
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        site = site_path(path)
        if site is None or files.get_file_from_path(site) is None:
            logger.warning("%s links to %s, which the site does not hold", here, path)
            return found[0]
        return (
            begin
            + posixpath.relpath(site, posixpath.dirname(page.file.src_uri) or ".")
            + end
        )

    parts = _CODE.split(markdown)
    parts[::2] = (_LINK.sub(turned, part) for part in parts[::2])
    return "".join(parts)


def site_path(path: str) -> str | None:
    """Return where the site holds a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith(f"{RECORDS}/"):
        return f"{SITE_RECORDS}/{posixpath.basename(path)}"
    return PAGES.get(path)
