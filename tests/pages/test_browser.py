"""Pages in a real browser: no error, no request, tables that sort and filter, images by keyboard."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from stas_core import storage
from stas_core.data import images
from stas_core.pages import pictures
from stas_core.pages.write import write_pages
from tests.conftest import troubles_of
from tests.pages.made import SomeConfig, scored_run, slides_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module")
def scored_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run #1 & %41")  # a name that has to be escaped in an address
    record = scored_run(folder, 9, failed=2)
    write_pages(str(folder / "scores"), record, SomeConfig, lambda line: None)
    return folder / "scores" / "report.html"


@pytest.fixture
def page(browser: "Browser", scored_page: Path) -> "Iterator[Page]":
    with browser.new_context(viewport={"width": 1400, "height": 900}) as context:
        context.set_default_timeout(20_000)  # milliseconds: machines may be busy
        opened = context.new_page()
        troubles = troubles_of(opened)
        opened.goto(scored_page.as_uri())
        yield opened
        assert troubles == [] and "Scores of 9 images" in opened.title()


def rows(page: "Page") -> list[str]:
    """Return the ids of the rows that are shown, in their order."""
    return page.locator("#list tbody tr:visible th").all_inner_texts()


def shown(page: "Page") -> str:
    return page.locator(".viewer .name").inner_text()


def test_the_table_sorts_both_ways_and_keeps_failures_last(page: "Page") -> None:
    failed = ["lost_0", "lost_1"]
    assert rows(page)[:2] == failed
    share = page.get_by_role("button", name="target", exact=True)
    column = page.locator("#list tbody tr:not(.failed) td:nth-child(3)")
    share.click()
    down = [float(text.split()[0]) for text in column.all_inner_texts()]
    assert down == sorted(down, reverse=True) and down[0] == 100 and rows(page)[-2:] == failed
    share.click()
    assert [float(text.split()[0]) for text in column.all_inner_texts()] == down[::-1] and rows(page)[-2:] == failed
    assert page.locator('#list th[aria-sort="ascending"]').count() == 1


def test_the_table_is_filtered_by_words_and_by_kind(page: "Page") -> None:
    page.get_by_label("Find").fill("unreadable")
    assert rows(page) == ["lost_0", "lost_1"] and "unreadable_image" in page.locator(".warn").first.inner_text()
    page.get_by_label("Find").fill("field_000")
    page.get_by_label("Show").select_option("without target")
    assert rows(page) == ["field_0003", "field_0007"] and shown(page) == "field_0003"
    assert page.locator("#shown").inner_text() == "2 of 11"


def test_the_viewer_goes_through_images_by_keyboard(page: "Page") -> None:
    order = rows(page)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert shown(page) == order[2] == "field_0000"
    picture = page.locator(".canvas svg g[data-layer=image] image")
    assert (picture.get_attribute("href") or "").startswith("data:image/webp")
    assert page.locator(".canvas svg path.rim").count() == 1
    assert page.locator(".scale").inner_text() == "10 \u00b5m"
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    assert shown(page) == order[-1]
    page.keyboard.press("ArrowLeft")
    assert shown(page) == order[-2]
    whole = page.locator(".canvas svg").get_attribute("viewBox")
    page.keyboard.press("+")
    assert page.locator(".canvas svg").get_attribute("viewBox") != whole
    page.keyboard.press("0")
    assert page.locator(".canvas svg").get_attribute("viewBox") == whole


def test_layers_have_an_opacity_and_can_be_switched(page: "Page") -> None:
    page.locator("#list tbody tr:not(.failed)").first.click()
    layer = page.locator(".canvas g[data-layer=map]")
    assert layer.get_attribute("opacity") == "0"
    page.keyboard.press("2")
    assert layer.get_attribute("opacity") == "0.7"
    slider = page.get_by_label("opacity of probability")
    slider.focus()
    slider.press("ArrowLeft")  # moves the slider, not the image
    assert layer.get_attribute("opacity") == "0.65" and shown(page) == "field_0000"
    page.keyboard.press("3")
    assert page.locator(".canvas g[data-layer=found]").get_attribute("opacity") == "0"


def test_a_target_is_shown_at_its_place(page: "Page") -> None:
    page.locator("#list tbody tr:not(.failed)").first.click()
    target = page.locator(".targets tbody tr").first
    assert re.match(r"1\s+\d+\s+\d+\s+0\.90\s+0\.98\s+no", target.inner_text())
    target.click()
    x, y, width, height = (float(text) for text in str(page.locator(".canvas svg").get_attribute("viewBox")).split())
    box = page.locator(".canvas rect.box")
    assert x <= float(box.get_attribute("x") or -1) < x + width < 97 and height < 60 and y >= 0


def test_all_images_are_seen_at_once(page: "Page") -> None:
    page.get_by_role("button", name="Contact sheet").click()
    cards = page.locator(".gallery button")
    assert cards.count() == 11 and not page.locator(".split").is_visible()
    page.wait_for_function("document.querySelectorAll('.gallery svg image').length === 9")
    cards.nth(4).click()
    assert page.locator(".split").is_visible() and shown(page) == rows(page)[4]


def test_layers_of_slides_have_a_scale_and_their_figures_below(browser: "Browser", tmp_path: Path) -> None:
    write_pages(str(tmp_path / "scores"), slides_run(tmp_path), SomeConfig, lambda line: None)
    with browser.new_context(viewport={"width": 1400, "height": 600}) as context:
        opened = context.new_page()
        troubles = troubles_of(opened)
        opened.goto((tmp_path / "scores" / "report.html").as_uri())
        opened.locator("#list tbody tr:not(.failed)").first.click()
        assert opened.locator(".scale").inner_text() == "5 mm"  # of 24
        assert opened.locator(".beside h3").all_inner_texts() == ["Overview", "Targets one by one"]
        layer, svg = opened.locator(".canvas g[data-layer=disagreement]"), opened.locator(".canvas svg")
        assert layer.get_attribute("opacity") == "0"
        opened.keyboard.press("3")
        assert layer.get_attribute("opacity") == "0.7" and opened.locator(".canvas path.rim").count() == 1
        box = opened.locator(".canvas").bounding_box()
        assert box is not None and box["height"] < 600  # all of it is seen at once
        opened.locator(".targets tbody tr").click()
        left, top, width, height = (float(x) for x in str(svg.get_attribute("viewBox")).split())
        assert left < 70 < 71 < left + width < left + 10 and top < 40 < 41 < top + height
        assert opened.locator(".scale").inner_text() == "200 \u00b5m"
        assert troubles == []


def test_a_mask_too_fine_for_outlines_is_a_picture_in_their_colour(
    browser: "Browser", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, mask = slides_run(tmp_path, num=1), np.zeros((100, 160), bool)
    for row in range(3):
        for column in range(3):
            mask[20 + row : 80 : 6, 30 + column : 130 : 6] = True
    storage.write_bytes(f"{tmp_path}/scores/thumbnails/slide_0.mask.png", images.encode_mask(mask))
    monkeypatch.setattr(pictures, "MAX_SLIDE_BYTES", 20_000)
    write_pages(str(tmp_path / "scores"), record, SomeConfig, lambda line: None)
    with browser.new_context(viewport={"width": 1400, "height": 600}) as context:
        opened = context.new_page()
        troubles = troubles_of(opened)
        opened.goto((tmp_path / "scores" / "report.html").as_uri())
        opened.locator("#list tbody tr:not(.failed)").first.click()
        opened.locator(".canvas g[data-layer=found] image").wait_for()
        assert opened.locator(".canvas path").count() == 0 and troubles == []

        def yellow() -> np.ndarray:
            seen = np.asarray(Image.open(io.BytesIO(opened.locator(".canvas svg").screenshot())).convert("RGB"), int)
            return np.asarray(seen[..., :2].mean(axis=-1) - seen[..., 2])

        with_it = yellow()
        opened.get_by_label("opacity of prediction").press("Home")
        added = with_it - yellow()
        height, width = added.shape
        inside = added[int(0.25 * height) : int(0.75 * height), int(0.25 * width) : int(0.75 * width)]
        assert inside.mean() > 8 and abs(added[:, : int(0.15 * width)].mean()) < 1


def test_without_scripts_all_but_the_pictures_can_be_read(browser: "Browser", scored_page: Path) -> None:
    with browser.new_context(java_script_enabled=False) as context:
        opened = context.new_page()
        opened.goto(scored_page.as_uri())
        assert len(rows(opened)) == 11 and opened.locator("noscript p").is_visible()
        assert opened.locator(".verdict").is_visible() and not opened.locator(".tools").is_visible()


def test_it_prints(browser: "Browser", scored_page: Path) -> None:
    with browser.new_context() as context:
        opened = context.new_page()
        opened.goto(scored_page.as_uri())
        printed = opened.pdf(format="A4")
        assert printed.startswith(b"%PDF") and 1 <= printed.count(b"/Type /Page\n") <= 5
