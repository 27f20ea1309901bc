"""Small run folders, as stages leave them, made without running one."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from stas_core import storage, tables
from stas_core.arrays import Mask
from stas_core.config import Config
from stas_core.data import images
from stas_core.failures import Failure
from stas_core.pages.write import write_pages
from stas_core.predict.geoparquet import write_geoparquet
from stas_core.predict.placement import Placement, TargetFacts
from stas_core.predict.polygons import trace_shapes
from stas_core.predict.postprocess import find_targets
from stas_core.scored_runs import ScoredImage, ScoredRun, ScoredTarget
from stas_core.slides.finish import slides_schema
from stas_core.slides.run import (
    GALLERIES,
    OVERVIEWS,
    SMALL_MAPS,
    SMALL_MASKS,
    SMALL_STDS,
    TARGETS,
    THUMBNAILS,
    SlideRun,
)

HOSTILE = "</script><script>document.title='broken in'</script><img src=x onerror=alert(1)> & \"quoted\" \u2028"
VERDICT = {
    "level": "look at this",
    "reasons": [
        {
            "level": "look at this",
            "check": "drift",
            "figure": f"2 of 6 images are unlike {HOSTILE}",
            "limit": "at most 10 %",
            "remedy": "Look at them",
        }
    ],
    "unchecked": ["pixel size: it is not known"],
}


class SomeConfig(Config):
    """Settings of no stage in particular."""

    out: str | None = None
    seed: int = 0
    data: dict[str, Any] = {}  # noqa: RUF012 - pydantic copies it


def blob(height: int, width: int, index: int) -> Mask:
    """Return a mask of one target; of every fourth image none, of every fifth all of it."""
    mask = np.zeros((height, width), np.uint8)
    if index % 5 == 4:
        return np.ones((height, width), bool)
    if index % 4 != 3:
        cv2.circle(mask, (20 + 7 * (index % 8), 30), 9 + index % 5, 1, -1)
    return mask.astype(bool)


def scored_run(
    folder: Path, num: int = 6, size: tuple[int, int] = (60, 96), *, prefix: str = "field_", failed: int = 1
) -> dict[str, Any]:
    """Write what score_images leaves of some images; return the record of its manifest."""
    rng = np.random.default_rng(1)
    (folder / "images").mkdir(parents=True)
    run = ScoredRun(str(folder / "scores"))
    rows, targets = [], []
    for index in range(num):
        name = f"{prefix}{index:04d}"
        mask, noise = blob(*size, index), rng.integers(120, 230, (*size, 3), np.uint8)
        noise[mask] //= 2
        (folder / "images" / f"{name}.jpg").write_bytes(images.encode_jpeg(noise, quality=80))
        storage.write_bytes(run.file("masks", name), images.encode_mask(mask))
        prob = cv2.GaussianBlur(mask.astype(np.uint8) * 250, (9, 9), 3)
        storage.write_bytes(run.file("maps", name), images.encode_map(prob))
        share, drift = float(mask.mean()), 2.0 - 0.3 * index
        uri = str(folder / "images" / f"{name}.jpg")
        rows.append(ScoredImage(name, uri, *size, share, int(share > 0), 1, 0.01 * index, 4, None, drift, "sharpness"))
        if share:
            ys, xs = np.nonzero(mask)
            box = int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1
            centre = float(xs.mean()), float(ys.mean())
            targets.append(ScoredTarget(name, 1, int(mask.sum()), *centre, *box, 0.9, 0.98, False))
    tables.write_rows(run.path(run.TABLE), ScoredImage, rows)
    tables.write_rows(run.path(run.TARGETS), ScoredTarget, targets)
    lost = [Failure(f"lost_{index}", "score_images", "unreadable_image", HOSTILE) for index in range(failed)]
    tables.write_rows(run.path(run.FAILURES), Failure, lost)
    return {
        "stage": "score_images",
        "commit": "abc",
        "command": "stas score_images out=x",
        "finished_unix_time_s": 1_700_000_000,
        "seconds": 12.5,
        "verdict": VERDICT,
        "next": [{"why": "to see how good they are", "command": "stas evaluate run=x"}],
        "config": {"out": str(folder), "seed": 3, "data": {"mpp": 0.5, "images": HOSTILE}},
        "inputs": "f00",
    }


def slides_run(folder: Path, *, thumbnails: bool = True, num: int = 2) -> dict[str, Any]:
    """Write what score_slides leaves of some slides, with or without layers; return the record of its manifest."""
    run, schema, rng = SlideRun(str(folder / "scores")), slides_schema(), np.random.default_rng(2)
    known = {"width_px": 96_000, "height_px": 60_000, "mpp": 0.25, "warnings": [HOSTILE], "mpp_source": HOSTILE}
    rows = []
    for index in range(num):
        name = f"slide_{index}"
        zeros = {field.name: "" if pa.types.is_string(field.type) else 0 for field in schema if not field.nullable}
        rows.append({field.name: None for field in schema} | zeros | known | {"id": name, "num_targets": 1})
        image, mask = rng.integers(120, 230, (100, 160, 3), np.uint8), np.zeros((100, 160), bool)
        mask[40, 70] = True  # one pixel is a small target
        (folder / "scores" / "targets").mkdir(parents=True, exist_ok=True)
        write_targets(run.file(TARGETS, name), mask, Placement(600.0, mpp=150.0))
        for kind in (OVERVIEWS, GALLERIES):
            storage.write_bytes(run.file(kind, name), images.encode_png(image))
        if thumbnails:
            storage.write_bytes(run.file(THUMBNAILS, name), images.encode_jpeg(image))
            storage.write_bytes(run.file(SMALL_MASKS, name), images.encode_mask(mask))
            storage.write_bytes(run.file(SMALL_MAPS, name), images.encode_map(image[..., 0]))
            if index == 0:  # of the others no member's map was kept
                storage.write_bytes(run.file(SMALL_STDS, name), images.encode_map(image[..., 1]))
    tables.write_table(run.path(run.TABLE), pa.Table.from_pylist(rows, schema))
    tables.write_rows(run.path(run.FAILURES), Failure, [Failure("lost", "score_slides", "no_tissue", HOSTILE)])
    return {"stage": "score_slides", "config": {"out": str(folder)}, "verdict": VERDICT}


def write_targets(path: str, mask: Mask, placement: Placement, **columns: Any) -> None:
    """Write the file of a slide's targets, as score_slides does; their probability is 0.5 everywhere."""
    labels, targets = find_targets(mask, np.full(mask.shape, 128, np.uint8))
    known = {"edge_um": None, "tumour_um": None, "disagreement": None} | columns
    write_geoparquet(path, [trace_shapes(labels)], TargetFacts("slide", targets, placement, known))


def pages_of(folder: Path, record: dict[str, Any]) -> list[str]:
    """Write the pages of a run; return them."""
    names = write_pages(str(folder), record, SomeConfig, lambda line: None)
    return [(folder / name).read_text() for name in names]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.data = ""
        self._is_data = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        known = dict(attrs)
        self._is_data = known.get("id") == "data"
        self.links += [str(known[name]) for name in ("src", "href") if known.get(name)]

    def handle_data(self, data: str) -> None:
        if self._is_data:
            self.data += data

    def handle_endtag(self, tag: str) -> None:
        self._is_data = False


def read(html: str) -> tuple[list[str], list[str], Any]:
    """Return the elements of a page, what it refers to, and the data of its script."""
    reader = _Reader()
    reader.feed(html)
    return reader.tags, reader.links, json.loads(reader.data)
