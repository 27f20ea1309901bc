"""Writing the pages of a run: `report.html`, and report_2.html and so on where it has many images."""

import importlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from stas_core import storage
from stas_core.config import Config
from stas_core.pages import page
from stas_core.pages.contents import MOST_LISTED, MOST_WITH_PICTURES, Contents, Item
from stas_core.pages.finished import FinishedRun
from stas_core.pages.pictures import Picture, make_pictures
from stas_core.pages.settings import changed_settings
from stas_core.verdicts import DO_NOT_USE

REPORT = "report.html"
PATTERNS = (REPORT, "report_*.html")
"""All pages of a run."""
PER_PAGE = 300
"""Images with pictures."""
ROWS_PER_PAGE = 10_000
"""Of images without pictures."""
_QUIET_S = 10.0

Build = Callable[[FinishedRun], Contents]
BUILDERS = {
    "pipeline": "index:build",
    "prepare_data": "cohort:build",
    "train_folds": "training:build",
    "tune_postprocess": "search:build_postprocess",
    "tune_training": "search:build_training",
    "choose_ensemble": "search:build_ensemble",
    "score_images": "scores:build",
    "score_slides": "slides:build",
    "evaluate": "evaluation:build",
}
"""What makes the contents of the page of a stage: module and function; the others get a plain one."""


def builder_of(stage: str) -> Build:
    """Return what makes the contents of the page of a stage; loads that alone."""
    module, _, name = BUILDERS.get(stage, "plain:build").partition(":")
    found: Build = getattr(importlib.import_module(f"stas_core.pages.{module}"), name)
    return found


def write_pages(uri: str, record: Mapping[str, Any], cls: type[Config], tell: Callable[[str], None]) -> list[str]:
    """Write the pages of a finished run; return their names.

    Args:
        uri: the folder of the run.
        record: of its manifest, which need not be written yet.
        cls: the settings of its stage, whose defaults the page compares with.
        tell: told how far it is, where it takes more than some seconds.

    Raises:
        WriteError: a page cannot be written.
        StasError: a file of the run cannot be read.
    """
    run = FinishedRun.of(uri, record)
    contents = builder_of(run.stage)(run)
    about = page.Run(
        stage=run.stage,
        where=run.uri,
        verdict=record.get("verdict"),
        next=[] if _is_worthless(record) else _steps(record.get("next")),
        provenance=run.provenance(),
        settings=changed_settings(run.config, cls),
    )
    num_items = len(contents.items) if contents.num_items is None else contents.num_items
    contents = replace(contents, items=contents.items[:MOST_LISTED], num_items=num_items)
    parts = split_items(contents.items)
    names = [REPORT if number == 1 else f"report_{number}.html" for number in range(1, len(parts) + 1)]
    count = _Count(sum(has_pictures for _, has_pictures in parts), len(contents.items), tell)
    paging = _paging(parts, num_items)
    for number, (items, has_pictures) in enumerate(parts, 1):
        pictures = count.follow(items) if has_pictures else [Picture() for _ in items]
        shown = items if has_pictures else [_without_picture(item) for item in items]
        html = page.render(contents, about, page.Sheet(number, names, shown, pictures, paging))
        storage.write_bytes(storage.join(uri, names[number - 1]), html.encode())
    stale = [name for name in storage.entries(uri) if re.fullmatch(r"report_\d+\.html", name) and name not in names]
    storage.remove_files(uri, stale)
    return names


def _is_worthless(record: Mapping[str, Any]) -> bool:
    verdict = record.get("verdict")
    return isinstance(verdict, Mapping) and verdict.get("level") == DO_NOT_USE


def _steps(values: Any) -> list[dict[str, str]]:
    """Return the commands that come next, and what they are for, as sentences."""
    known = [step for step in values or () if isinstance(step, Mapping) and {"why", "command"} <= step.keys()]
    words = [(str(step["why"]), str(step["command"])) for step in known]
    return [{"why": f"{why[:1].upper()}{why[1:]}:", "command": command} for why, command in words]


def split_items(items: Sequence[Item]) -> list[tuple[Sequence[Item], bool]]:
    """Return the items of each page, and whether they have pictures there; the first page is there without items."""
    if len(items) <= MOST_WITH_PICTURES:
        return [(items[start : start + PER_PAGE], True) for start in range(0, max(1, len(items)), PER_PAGE)]
    rest = range(PER_PAGE, len(items), ROWS_PER_PAGE)
    return [(items[:PER_PAGE], True), *((items[start : start + ROWS_PER_PAGE], False) for start in rest)]


def _paging(parts: Sequence[tuple[Sequence[Item], bool]], num_items: int) -> str:
    if len(parts) == 1:
        return ""
    if parts[-1][1]:
        return f"{PER_PAGE} on each of {len(parts)} pages."
    most = f" Only the first {MOST_LISTED:,} are listed at all." if num_items > MOST_LISTED else ""
    return (
        f"Of so many only the first {PER_PAGE} have pictures; further pages ({len(parts) - 1}) list the others.{most}"
    )


def _without_picture(item: Item) -> Item:
    return Item(item.id, item.values, None, (), item.tags, item.problem)


class _Count:
    """Says how far the pictures are, where they take long."""

    def __init__(self, num_sheets: int, num_items: int, tell: Callable[[str], None]):
        self._todo = min(num_items, num_sheets * PER_PAGE)
        self._done, self._tell, self._told = 0, tell, time.monotonic()

    def follow(self, items: Sequence[Item]) -> list[Picture]:
        """Make the pictures of a page."""
        made = []
        for picture in make_pictures([item.source for item in items]):
            made.append(picture)
            self._done += 1
            if time.monotonic() - self._told > _QUIET_S:
                self._tell(f"{REPORT}: {self._done} of {self._todo} images")
                self._told = time.monotonic()
        return made
