"""prepare_data measures in a process of its own: what would end it, or take all memory, is that image's failure."""

import os
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from stas_core.data import coco, cohort
from stas_core.data.annotations import AnnotationConfig
from stas_core.errors import InputError
from workflows.scoring.guarded_reader import GuardedReader, MeasureLimits

CONFIG = AnnotationConfig()


@pytest.fixture(scope="module")
def reader() -> Iterator[GuardedReader]:
    with closing(GuardedReader()) as guarded:
        yield guarded


@pytest.fixture
def item(phantom_folder: Path) -> dict[str, str]:
    image = sorted((phantom_folder / "images").iterdir())[0]
    annotation = phantom_folder / "annotations" / f"{image.stem}.json"
    return {"id": image.stem, "image_uri": str(image), "annotation_uri": str(annotation)}


def test_the_child_measures_what_this_process_would(reader: GuardedReader, item: dict[str, str]) -> None:
    found = reader.measure(item, config=CONFIG, limits=MeasureLimits())
    data = [Path(item[key]).read_bytes() for key in ("image_uri", "annotation_uri")]
    expected = cohort.measure(data[0], data[1], item["id"], config=CONFIG)
    assert found.values == expected.values and (found.mask == expected.mask).all()


def test_what_cannot_be_measured_has_its_reason(reader: GuardedReader, item: dict[str, str], tmp_path: Path) -> None:
    size = (14_000).to_bytes(4, "big") * 2
    header = b"IHDR" + size + bytes([8, 2, 0, 0, 0])
    png = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(png + bytes(4) + b"IDAT" + zlib.crc32(b"IDAT").to_bytes(4, "big"))
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    wrong = {
        ("image_uri", "bomb.png"): "oversized_image",
        ("image_uri", "pipe.jpg"): "not_a_file",
        ("image_uri", "gone.jpg"): "unreadable_file",
        ("annotation_uri", "pipe.jpg"): "not_a_file",
    }
    for (key, name), reason in wrong.items():
        with pytest.raises(InputError) as caught:
            reader.measure(item | {key: str(tmp_path / name)}, config=CONFIG, limits=MeasureLimits())
        assert caught.value.reason == reason
    with pytest.raises(InputError, match=r"more than limits\.max_annotation_bytes = 10") as caught:
        reader.measure(item, config=CONFIG, limits=MeasureLimits(max_annotation_bytes=10))
    assert caught.value.reason == "oversized_annotation"


def test_the_child_says_what_an_annotation_holds(reader: GuardedReader, item: dict[str, str], tmp_path: Path) -> None:
    shapes = [{"segmentation": [[1, 1, 9, 1, 9, 9]]}, {"segmentation": [[20, 20, 30, 20, 30, 30]]}]
    (tmp_path / "all.json").write_bytes(
        coco.to_coco([("x/0007.jpg", (90, 120), shapes), ("b.png", (9, 9), [])], "nest")
    )
    found = reader.describe(f"{tmp_path}/all.json", None, config=CONFIG, limits=MeasureLimits())
    assert (found.format, found.images, found.labels) == ("coco", ("0007", "b"), {"nest": 2})
    found = reader.describe(item["annotation_uri"], item["id"], config=CONFIG, limits=MeasureLimits())
    assert (found.format, found.images) == ("labelme", ()) and found.labels.keys() == {"STAS"}
    os.mkfifo(tmp_path / "pipe.json")
    for name, limits in (("pipe.json", MeasureLimits()), ("all.json", MeasureLimits(max_annotation_bytes=10))):
        with pytest.raises(InputError):
            reader.describe(f"{tmp_path}/{name}", None, config=CONFIG, limits=limits)
