"""Hook of MkDocs: pages that lie elsewhere in the repository, and what is made from the code.

Documents are read on a forge as well as in the built pages, so links lead from file to file of the repository. Here
they are turned to where the file lies among the pages; files that are no pages travel along.
"""

import json
import os
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = "docs/"
MOUNTED = (
    *("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SCORES.md"),
    *("cluster/*.md", "tests/README.md", "tests/bench/README.md"),
)
"""Pages that lie outside docs/."""
NOTEBOOK = "field_to_targets"
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#|//)([^)#\s]+)")
_FENCED = re.compile(r"^```.*?^```$", re.M | re.S)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Let what is made from the code be imported."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere, and the files that pages link to."""
    files.append(File.generated(config, f"{NOTEBOOK}.md", content=_notebook()))
    for path in _mounted():
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for file in list(files.documentation_pages()):
        for target in _targets(file.content_string, _in_repository(file.src_uri)):
            if files.get_file_from_path(_among_pages(target)) is None and (ROOT / target).is_file():
                files.append(File.generated(config, _among_pages(target), abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links from file to file of the repository into links from page to page."""
    here = page.file.src_uri

    def turned(match: re.Match[str]) -> str:
        target = _resolved(match[1], _in_repository(here))
        if not (ROOT / target).is_file():
            raise PluginError(f"{_in_repository(here)} links to {match[1]}, which is not there")
        return posixpath.relpath(_among_pages(target), posixpath.dirname(here) or ".")

    folder, _, name = here.rpartition("/")
    generated = _generated(name.removesuffix(".md")) if folder == "stages" and name != "index.md" else ""
    return _LINK.sub(turned, markdown + generated)


def _generated(stage: str) -> str:
    """Return the columns and settings of a stage."""
    from docs.generate.dictionary import tables_of
    from docs.generate.settings import settings_markdown

    tables = [table.markdown() for table in tables_of(stage)]
    parts = ["## Columns", *tables] if tables else []
    return "\n\n".join(["", *parts, "## Settings", settings_markdown(stage), ""])


def _notebook() -> str:
    """Return the notebook as a page."""
    cells = json.loads((ROOT / DOCS / f"{NOTEBOOK}.ipynb").read_text(encoding="utf-8"))["cells"]
    texts = [("".join(cell["source"]), cell["cell_type"] == "code") for cell in cells]
    link = f"[This page as a notebook]({NOTEBOOK}.ipynb)"
    return "\n\n".join([*(f"```python\n{text}\n```" if is_code else text for text, is_code in texts), link, ""])


def _mounted() -> Iterator[str]:
    for pattern in MOUNTED:
        yield from sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))


def _in_repository(src_uri: str) -> str:
    """Return where the source of a page lies."""
    return src_uri if (ROOT / src_uri).is_file() and src_uri in _mounted() else DOCS + src_uri


def _among_pages(path: str) -> str:
    """Return where a file of the repository lies among the pages."""
    return path.removeprefix(DOCS)


def _resolved(link: str, page: str) -> str:
    return os.path.normpath(posixpath.join(posixpath.dirname(page), link)).replace(os.sep, "/")


def _targets(markdown: str, page: str) -> Iterator[str]:
    for match in _LINK.finditer(_FENCED.sub("", markdown)):
        yield _resolved(match[1], page)
