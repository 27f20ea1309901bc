"""Pages are made from files alone, hold all that they show, and believe nothing that is in these files."""

import io
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from stas_core.data import images
from stas_core.errors import WriteError
from stas_core.pages import pictures, write
from stas_core.pages.contents import Item, PictureSource
from tests.pages.made import HOSTILE, SomeConfig, blob, pages_of, read, scored_run


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("scored")
    record = scored_run(folder)
    (html,) = pages_of(folder / "scores", record)
    return folder / "scores", html


def test_a_page_says_what_matters_first(scored: tuple[Path, str]) -> None:
    text = re.sub(r"<(style|script)[^>]*>.*?</\1>", "", scored[1], flags=re.S)
    text = re.sub(r"<[^>]+>", " ", text)
    order = [
        "look at this",
        "expected at most 10 %",
        "Look at them.",
        "To see how good they are:",
        "stas evaluate run=x",
    ]
    order += ["6 images", "unreadable_image", "field_0000", "stas score_images out=x", "12.5 s", "abc"]
    places = [text.find(words, 0) for words in order]
    assert -1 not in places and places[:5] == sorted(places[:5])
    assert re.search(r"seed\s+3\s+0", text)  # set to 3, not the default 0


def test_nothing_in_a_file_becomes_markup(scored: tuple[Path, str]) -> None:
    tags, links, data = read(scored[1])
    assert tags.count("script") == 2 and "img" not in tags
    assert tags.count("style") == 1 and HOSTILE[:12] not in scored[1].replace("</script>\n", "")
    assert all(link.startswith(("data:", "#")) or "/" not in link.rstrip("/") for link in links)
    rest = re.sub(r"<script>.*?</script>|http-equiv", "", scored[1], flags=re.S)
    assert "http" not in rest and "url(" not in rest
    assert len(data["items"]) == 7


def test_only_the_script_of_the_page_may_run(scored: tuple[Path, str]) -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', scored[1])
    assert policy is not None
    assert "default-src 'none'" in policy[1] and "script-src 'sha256-" in policy[1].replace("&#39;", "'")


def test_the_same_run_gives_the_same_bytes(scored: tuple[Path, str], tmp_path: Path) -> None:
    record = scored_run(tmp_path)
    first = pages_of(tmp_path / "scores", record)
    assert pages_of(tmp_path / "scores", record) == first


def test_images_that_are_gone_leave_their_rows(tmp_path: Path) -> None:
    record = scored_run(tmp_path, 3)
    (tmp_path / "images" / "field_0000.jpg").unlink()
    (tmp_path / "images" / "field_0001.jpg").write_bytes(b"")
    (tmp_path / "scores" / "masks" / "field_0002.png").write_bytes(b"no mask")
    (html,) = pages_of(tmp_path / "scores", record)
    items = read(html)[2]["items"]
    assert [sorted({"image", "found"} & set(item)) for item in items] == [[], ["found"], ["found"], ["image"]]
    notes = [" ".join(item.get("notes", [])) for item in items]
    assert "field_0000.jpg" in notes[1] and "holds 0 bytes" in notes[2] and "field_0002.png" in notes[3]
    assert html.count('scope="row" data-v="field_') == 3


def test_many_images_fit_their_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "PER_PAGE", 5)
    record = scored_run(tmp_path, 12, failed=0)
    (tmp_path / "scores" / "report_4.html").write_text("of an earlier run, with more images")
    htmls = pages_of(tmp_path / "scores", record)
    assert [len(read(html)[2]["items"]) for html in htmls] == [5, 5, 2]
    assert sorted(path.name for path in (tmp_path / "scores").glob("*.html")) == [
        *("report.html", "report_2.html", "report_3.html")
    ]
    assert all('href="report_2.html"' in html for html in (htmls[0], htmls[2]))


def test_of_very_many_images_only_the_first_have_pictures() -> None:
    items = [Item(str(number), {}, PictureSource("a.jpg")) for number in range(13_001)]
    assert [(len(some), has) for some, has in write.split_items(items)] == [
        (300, True),
        (10_000, False),
        (2_701, False),
    ]
    assert [len(some) for some, _ in write.split_items(items[:601])] == [300, 300, 1]
    assert write.split_items([]) == [([], True)]


def test_pictures_of_a_page_stay_within_their_share(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (700, 900, 3), np.uint8)  # nothing takes more bytes
    (tmp_path / "noise.jpg").write_bytes(images.encode_jpeg(noise))
    (tmp_path / "map.png").write_bytes(images.encode_map(noise[..., 0]))
    (tmp_path / "mask.png").write_bytes(images.encode_mask(noise[..., 0] > 120))
    source = PictureSource(f"{tmp_path}/noise.jpg", f"{tmp_path}/mask.png", f"{tmp_path}/map.png")
    share = pictures.PAGE_BYTES // 300
    made = pictures.make_picture(source, share)
    assert sum(len(text) for text in made.layers.values()) < share * 1.02
    assert set(made.layers) == {"image", "found", "map"} and (made.height, made.width) == (700, 900)


@pytest.mark.parametrize("index", range(6))
def test_outlines_enclose_their_masks(index: int) -> None:
    mask = blob(60, 96, index)
    path = pictures.outline_path(mask)
    assert bool(path) == mask.any()
    drawn = _fill(path, mask.shape)
    assert (drawn ^ mask).sum() <= 0.05 * max(1, mask.sum())


@pytest.mark.parametrize("num_characters", [10_000, 2_500])
def test_no_target_vanishes_from_outlines_that_must_be_short(num_characters: int) -> None:
    mask = np.zeros((201, 303), bool)
    rng = np.random.default_rng(0)
    for y, x in rng.integers(0, mask.shape, (150, 2)):
        mask[y, x] = True  # a pixel each
    path = pictures.outline_path(mask, num_characters)
    drawn = _fill(path, mask.shape)
    away_px = cv2.distanceTransform((~drawn).astype(np.uint8), cv2.DIST_L2, 5)[mask]
    assert len(path) <= num_characters and away_px.max() < 5 and (away_px == 0).mean() > 0.9
    assert num_characters < 10_000 or drawn.sum() < 1.05 * mask.sum()


@pytest.mark.parametrize("num_characters", [500, 3_750, 12_000])
def test_outlines_without_room_are_left_out_and_show_no_false_target(tmp_path: Path, num_characters: int) -> None:
    mask = np.zeros((400, 600), bool)
    rng = np.random.default_rng(0)
    for y, x in rng.normal((200, 300), 60, (300, 2)).astype(int).clip(0, (390, 590)):
        mask[y : y + 3, x : x + 4] = True
    drawn = _fill(pictures.outline_path(mask, num_characters), mask.shape)
    near = cv2.dilate(mask.astype(np.uint8), np.ones((7, 7), np.uint8)) > 0
    assert (drawn & ~near).sum() <= 0.03 * mask.sum()
    assert drawn.any() or num_characters < 12_000
    (tmp_path / "mask.png").write_bytes(images.encode_mask(mask))
    made = pictures.make_picture(PictureSource("", mask_uri=f"{tmp_path}/mask.png"), int(num_characters / 0.06))
    if drawn.any():
        assert made.layers["found"] and not made.notes
    else:
        assert "found" not in made.layers and made.notes == [f"found: {pictures._TOO_MANY}"]


def _fill(path: str, shape: tuple[int, int]) -> np.ndarray:
    """Draw a path of straight lines in px by the even-odd rule, at pixel centres."""
    import matplotlib.path

    inside = np.zeros(shape, bool)
    centres = np.stack(np.meshgrid(np.arange(shape[1]) + 0.5, np.arange(shape[0]) + 0.5), axis=-1).reshape(-1, 2)
    for ring in filter(None, path.split("M")):
        at, points = np.zeros(2), []
        for kind, numbers in re.findall(r"(^|[lhv])([-\d ]+)", ring):
            values = [float(number) for number in numbers.split()]
            at = at + {"h": [values[0], 0], "v": [0, values[0]]}.get(kind, values)
            points.append(at)
        inside ^= matplotlib.path.Path(np.array([*points, points[0]])).contains_points(centres).reshape(shape)
    return inside


def test_a_turned_photograph_is_shown_upright() -> None:
    sink = io.BytesIO()
    tag = Image.Exif()
    tag[274] = 6
    Image.new("RGB", (40, 20), "pink").save(sink, "JPEG", exif=tag)
    size, small = images.decode_small(sink.getvalue(), "a.jpg", area_px=200)
    assert size == (40, 20) == images.decode_image(sink.getvalue(), "a.jpg").shape[:2]
    assert small.shape[0] == 2 * small.shape[1] == 20


def test_a_page_that_cannot_be_written_is_the_disks_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = scored_run(tmp_path, 1)
    (tmp_path / "scores" / "report.html").mkdir()
    with pytest.raises(WriteError, match=r"cannot write .*report\.html"):
        write.write_pages(str(tmp_path / "scores"), record, SomeConfig, print)


def test_every_stage_has_its_builder() -> None:
    assert all(callable(write.builder_of(stage)) for stage in (*write.BUILDERS, "export"))
