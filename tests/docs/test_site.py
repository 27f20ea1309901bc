"""The documentation as `make docs` builds it: strictly, and asking for nothing from anywhere."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from tests.conftest import ROOT, troubles_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser

LOADS = {
    "script": "src",
    "img": "src",
    "link": "href",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "object": "data",
}


class Loaded(HTMLParser):
    """Collects what a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.without_text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.found += [value for key in (LOADS.get(tag),) if key is not None and (value := values.get(key))]
        if tag == "img" and not values.get("alt"):
            self.without_text.append(str(values.get("src")))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the folder of the pages; a link that leads nowhere, or a page in no menu, would have failed its build."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        patch.chdir(ROOT)
        build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder)))
        yield folder


def test_pages_load_nothing_from_elsewhere_and_pictures_have_a_text(site: Path) -> None:
    pages = sorted(path for path in site.rglob("*.html") if path.name != "404.html")
    assert len(pages) > 30
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text())
        assert [uri for uri in loaded.found if re.match(r"\w+:|//", uri)] == [], page.name
        assert loaded.without_text == [], page.name
        for uri in loaded.found:
            assert (page.parent / uri.partition("?")[0]).is_file(), f"{page.name} loads {uri}"
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//", styles) == []


def test_the_search_works_from_disk_and_asks_nobody(site: Path, browser: "Browser") -> None:
    with browser.new_context(viewport={"width": 390, "height": 844}) as context:
        context.set_default_timeout(20_000)  # milliseconds: machines may be busy
        page = context.new_page()
        troubles = troubles_of(page)
        page.goto((site / "stages" / "evaluate.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == 390  # a phone shows it without scrolling aside
        page.locator("label[for=__search]").first.click()
        page.get_by_role("textbox", name="Search").fill("lease")
        page.get_by_role("link", name="Troubleshooting").first.wait_for()
        assert troubles == []


def test_every_picture_is_shown_and_small() -> None:
    text = "".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    for path in (ROOT / "docs" / "pictures").iterdir():
        assert f"pictures/{path.name})" in text and path.stat().st_size < 250_000, path.name


def test_every_document_is_in_the_menu() -> None:
    listed = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]))
    here = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert here <= listed
    for path in listed - here:
        assert (ROOT / path).is_file() or (ROOT / "docs" / path).with_suffix(".ipynb").is_file(), path


def test_the_search_finds_in_pages_that_lie_elsewhere(site: Path) -> None:
    index = yaml.safe_load((site / "search" / "search_index.json").read_text())
    found = {entry["location"] for entry in index["docs"]}
    assert {"cluster/slurm.html", "tests/bench/index.html", "stages/evaluate.html"} <= found
