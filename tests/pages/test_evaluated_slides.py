"""The page of an evaluation of slides shows truth and prediction, and tells missed and false targets apart."""

import shutil
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stas_core import storage, tables
from stas_core.data import images
from stas_core.failures import Failure
from stas_core.scores.bootstrap import BootstrapConfig
from stas_core.scores.detection import DetectionScore
from stas_core.slides.evaluated import EvaluatedSlide, FrocRow, SlideOutcome, SlideSummary, summarise_slides
from stas_core.slides.layers import COMPARED, compared_uri
from tests.conftest import troubles_of
from tests.pages.made import pages_of, read, slides_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NUM = 2
PLACES = {"truth": [(40, 70), (60, 20)], "missed": [(60, 20)], "false": [(80, 90)]}


def score_of(slide_id: str, **values: Any) -> EvaluatedSlide:
    """Return a row of counts of 1 and scores of a half."""
    usual: dict[str, Any] = {"int": 1, "float": 0.5, "str": "", "bool": False}
    kinds = {one.name: str(getattr(one.type, "__name__", one.type)) for one in fields(EvaluatedSlide)}
    rest = {name: usual.get(kind, 0.5 if "float" in kind else 1) for name, kind in kinds.items()}
    return EvaluatedSlide(**rest | {"id": slide_id, "tissue_mm2": 2.0} | values)


@pytest.fixture
def evaluated(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder of an evaluation of a run of slides, and the record of its manifest."""
    slides_run(tmp_path, num=NUM)
    out = str(tmp_path / "out")
    rows = [score_of(f"slide_{index}", dice=0.5 + 0.1 * index) for index in range(NUM)]
    tables.write_rows(f"{out}/scores.parquet", EvaluatedSlide, rows)
    summary = summarise_slides([SlideOutcome(row.id, row, None, [0.9], [0.5]) for row in rows], BootstrapConfig())
    tables.write_rows(f"{out}/summary.parquet", SlideSummary, summary)
    tables.write_rows(f"{out}/detection.parquet", DetectionScore, [])
    tables.write_rows(f"{out}/froc.parquet", FrocRow, [FrocRow(None, 0.5, 0.5, 1.0)])
    tables.write_rows(f"{out}/failures.parquet", Failure, [Failure("lost", "evaluate", "no_truth", "no outline")])
    for row in rows:
        for kind in COMPARED:
            mask = np.zeros((100, 160), bool)
            mask[tuple(np.array(PLACES[kind]).T)] = True
            storage.write_bytes(compared_uri(out, row.id, kind), images.encode_mask(mask))
    return tmp_path / "out", {"stage": "evaluate", "config": {"out": out, "run": f"{tmp_path}/scores"}}


def items_of(evaluated: tuple[Path, dict[str, Any]]) -> tuple[str, list[Any]]:
    (html,) = pages_of(*evaluated)
    return html, read(html)[2]["items"]


def test_missed_and_false_targets_are_layers_of_their_own(evaluated: tuple[Path, dict[str, Any]]) -> None:
    html, (lost, first, second) = items_of(evaluated)
    assert lost == {} and "no_truth: no outline" in html
    shown = {kind: "".join(f"M{x} {y}v1h1v-1z" for y, x in reversed(places)) for kind, places in PLACES.items()}
    for item in (first, second):
        assert {kind: item[kind] for kind in COMPARED} == shown and item["found"] == "M70 40v1h1v-1z"
        assert item["map"].startswith("data:image/webp") and item["mpp"] == pytest.approx(150) and item["notes"] == []
        assert [title for title, _ in item["beside"]] == ["Overview", "Targets one by one"]
    assert "Red are missed targets" in html


def test_layers_that_are_not_there_are_named_with_the_reason(evaluated: tuple[Path, dict[str, Any]]) -> None:
    out, record = evaluated
    (out / "layers" / "slide_0.missed.png").unlink()
    thumbnails = out.parent / "scores" / "thumbnails"
    (thumbnails / "slide_1.map.png").unlink()
    _, (_, first, second) = items_of(evaluated)
    assert first["notes"] == ["truth: the evaluation keeps no layers of it (any more); evaluate again with --force"]
    assert second["notes"] == ["map: the run that was evaluated has none (any more)"] and "map" not in second
    shutil.rmtree(thumbnails)
    _, (_, first, _) = items_of(evaluated)  # as a run of before
    assert first["image"] and not {"truth", "found"} & set(first)
    assert first["notes"] == ["image: the run that was evaluated keeps no layers of it (any more); score it again"]
    shutil.rmtree(out.parent / "scores")
    html, (_, first, _) = items_of(evaluated)
    assert "image" not in first and "slides.parquet" in html.partition('class="tools"')[0]
    assert record["stage"] == "evaluate"


def test_a_run_of_slides_without_widths_has_no_scale(evaluated: tuple[Path, dict[str, Any]]) -> None:
    path = evaluated[0].parent / "scores" / "slides.parquet"
    pq.write_table(pa.table({"id": ["slide_0", "slide_1"]}), path)
    html, (_, first, _) = items_of(evaluated)
    assert "mpp" not in first and "missed" in first and "no scale can be shown" in html


def test_colours_tell_them_apart(evaluated: tuple[Path, dict[str, Any]], browser: "Browser") -> None:
    items_of(evaluated)
    with browser.new_context(viewport={"width": 1400, "height": 900}) as context:
        opened = context.new_page()
        troubles = troubles_of(opened)
        opened.goto((evaluated[0] / "report.html").as_uri())
        opened.locator("#list tbody tr:not(.failed)").first.click()
        strokes = {
            kind: opened.locator(f".canvas g.{kind} .edge").evaluate("edge => getComputedStyle(edge).stroke")
            for kind in (*COMPARED, "found")
        }
        assert len(set(strokes.values())) == 4 and strokes["missed"] == "rgb(255, 42, 26)"
        opened.keyboard.press("6")
        assert opened.locator(".canvas g[data-layer=missed]").get_attribute("opacity") == "0"
        assert troubles == []
