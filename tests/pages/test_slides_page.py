"""The page of score_slides: layers of slides where the run has them, its figures below."""

import re
from pathlib import Path

import numpy as np
import pytest

from stas_core.data import images
from stas_core.pages import pictures
from stas_core.pages.contents import PictureSource
from tests.pages.made import pages_of, read, slides_run


def test_slides_are_shown_as_layers_with_their_figures_below(tmp_path: Path) -> None:
    (html,) = pages_of(tmp_path / "scores", slides_run(tmp_path))
    tags, links, data = read(html)
    lost, first, second = data["items"]
    layers = {"image", "found", "map", "disagreement"}
    assert [layers & set(item) for item in (lost, first, second)] == [set(), layers, layers - {"disagreement"}]
    assert (first["w"], first["h"]) == (160, 100) and first["mpp"] == pytest.approx(96_000 * 0.25 / 160)
    assert first["found"] == "M70 40v1h1v-1z" and first["notes"] == []
    assert [title for title, _ in first["beside"]] == ["Overview", "Targets one by one"]
    (target,) = first["targets"]
    assert target == {"texts": ["1", "22,500", "212", "0.50", "0.50", "10.57", "6.08"], "box": [70, 40, 71, 41]}
    assert [title for title, _ in data["targets"]][-2:] == ["x mm", "y mm"] and "targets_note" not in first
    assert data["names"] == {} and tags.count("script") == 2 and all(not link.startswith("http") for link in links)


def test_a_run_of_before_shows_its_overviews(tmp_path: Path) -> None:
    (html,) = pages_of(tmp_path / "scores", slides_run(tmp_path, thumbnails=False))
    data = read(html)[2]
    item = data["items"][1]
    assert item["image"].startswith("data:image/webp") and not {"found", "map", "disagreement", "mpp"} & set(item)
    assert [title for title, _ in item["beside"]] == ["Targets one by one"] and data["names"] == {"image": "overview"}
    assert [target["box"] for target in item["targets"]] == [None]  # an overview has margins of its own


def test_layers_that_are_gone_are_noted(tmp_path: Path) -> None:
    record = slides_run(tmp_path, num=1)
    (tmp_path / "scores" / "thumbnails" / "slide_0.jpg").write_bytes(b"")
    (tmp_path / "scores" / "thumbnails" / "slide_0.mask.png").unlink()
    item = read(pages_of(tmp_path / "scores", record)[0])[2]["items"][1]
    assert "map" in item and not {"image", "found"} & set(item) and item["mpp"] == pytest.approx(150)
    assert ["holds 0 bytes" in note for note in item["notes"]] == [True]


def test_without_a_file_of_targets_the_page_says_why_it_lists_none(tmp_path: Path) -> None:
    record = slides_run(tmp_path)
    (tmp_path / "scores" / "targets" / "slide_0.parquet").unlink()
    (tmp_path / "scores" / "targets" / "slide_1.parquet").write_bytes(b"PAR1 and no more")
    items = read(pages_of(tmp_path / "scores", record)[0])[2]["items"][1:]
    (absent,), (damaged,) = (item["notes"] for item in items)
    assert absent == "targets: no table of them was kept: score with save.targets=true"
    assert re.match(r"targets: .*slide_1\.parquet is cut short", damaged)
    assert all("targets" not in item for item in items)


@pytest.mark.parametrize("num_characters", [pictures.MAX_SLIDE_BYTES // 4, pictures.PAGE_BYTES // 300])
def test_layers_and_figures_fit_their_share_together(tmp_path: Path, num_characters: int) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (500, 900, 3), np.uint8)  # nothing takes more bytes
    (tmp_path / "a.jpg").write_bytes(images.encode_jpeg(noise))
    (tmp_path / "a.png").write_bytes(images.encode_map(noise[..., 0]))
    (tmp_path / "mask.png").write_bytes(images.encode_mask(noise[..., 0] > 250))
    a, small = f"{tmp_path}/a.jpg", f"{tmp_path}/a.png"
    mask = f"{tmp_path}/mask.png"
    source = PictureSource(a, mask, small, small, beside=[("Overview", a), ("Targets one by one", a)])
    made = pictures.make_picture(source, num_characters)
    # Thousands of outlines have no room: a picture has, of all or of the largest, which is told.
    assert set(made.layers) == {"image", "map", "disagreement", "found"} and len(made.beside) == 2
    assert made.layers["found"].startswith("data:image/webp")
    assert ["targets are not drawn" in note for note in made.notes] == [True] * (num_characters < 100_000)
    num_layers, num_beside = sum(map(len, made.layers.values())), sum(len(uri) for _, uri in made.beside)
    assert num_layers + num_beside < num_characters * 1.02 and num_beside > num_characters / 10
