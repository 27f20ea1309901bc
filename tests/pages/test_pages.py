"""Pages are made from files alone, hold all that they show, and believe nothing that is in these files."""

import io
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from stas_core import storage, tables
from stas_core.data import images
from stas_core.errors import WriteError
from stas_core.pages import page, pictures, write
from stas_core.pages.contents import Item, PictureSource
from tests.pages.made import HOSTILE, SomeConfig, pages_of, read, scored_run


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


def test_a_cohort_that_is_gone_is_named_above_the_images(tmp_path: Path) -> None:
    record = scored_run(tmp_path, 2)
    record["config"]["data"]["images"] = f"{tmp_path}/gone/cohort.parquet"
    (html,) = pages_of(tmp_path / "scores", record)
    assert re.search(r'<p class="warn">No truth can be shown: there is no cohort table [^<]*gone/cohort\.parquet', html)


def test_a_list_of_images_has_no_truth_to_miss(tmp_path: Path) -> None:
    record = scored_run(tmp_path, 2)
    record["config"]["data"]["images"] = f"{tmp_path}/list.parquet"
    tables.write_table(f"{tmp_path}/list.parquet", pa.table({"image_uri": ["a.png"]}))
    (html,) = pages_of(tmp_path / "scores", record)
    assert "No truth can be shown" not in html


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
    assert {"image", "map"} <= set(made.layers) and (made.height, made.width) == (700, 900)
    assert ["targets are not drawn" in note for note in made.notes] == [True]


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


def test_a_page_shows_no_password() -> None:
    out = "memory://me:s3cret@host/run"
    steps = [{"why": "go on", "command": f"stas report out={out}"}]
    record = {"stage": "report", "command": f"stas x out={out}", "next": steps, "config": {"images": out}}
    (name,) = write.write_pages(out, record, SomeConfig, print)
    html = storage.read_bytes(f"{out}/{name}").decode()
    assert "s3cret" not in html and html.count("me:***@host/run") == 6  # title, where, next, command, again, images
    assert page._embedded({"notes": [f"{out} is gone"]}) == '{"notes":["memory://me:***@host/run is gone"]}'


def test_every_stage_has_its_builder() -> None:
    assert all(callable(write.builder_of(stage)) for stage in (*write.BUILDERS, "export"))
