"""Reading images for scoring: what fails, blocks, is too large, and the process that can be ended."""

import errno
import os
import re
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest

from stas_core import storage, tables
from stas_core.data import images
from stas_core.errors import (
    CrashedReader,
    SlowInput,
    UnreadableFile,
)
from stas_core.predict.postprocess import PostprocessConfig
from tests.slides.made import stained, write_pyramid
from workflows import score_images
from workflows.scoring import guarded_reader, tasks
from workflows.scoring.guarded_reader import GuardedReader, TissueSettings
from workflows.scoring.tasks import LimitsConfig, SaveConfig, ScoreTask


def open_files() -> set[str]:
    """Return the files that this process has open; deleted ones are told by their names."""
    return {str(path.readlink()) for path in list(Path("/proc/self/fd").iterdir()) if path.is_symlink()}


def test_one_slide_is_open_at_a_time_and_none_that_was_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(write_pyramid(tmp_path / f"{name}.tif", stained(300, 300, seed))) for seed, name in enumerate("abc")]
    slide = guarded_reader.OpenSlide()
    monkeypatch.setattr(guarded_reader, "_SLIDE", slide)
    monkeypatch.setattr(guarded_reader, "_POLL_S", 0.01)
    first = slide.at(paths[0])
    assert slide.at(paths[0]) is first
    before = first.read(0, 0, 0, 9, 9)
    Path(paths[2]).replace(paths[0])
    assert (slide.at(paths[0]).read(0, 0, 0, 9, 9) != before).any()
    slide.at(paths[1])
    assert not [name for name in open_files() if name.startswith(paths[0])]
    Path(paths[1]).unlink()
    reading, writing = os.pipe()

    def ask() -> None:
        while [name for name in open_files() if name.startswith(paths[1])]:
            time.sleep(0.01)
        os.write(writing, b"request\n")

    asking = threading.Thread(target=ask)
    asking.start()
    with os.fdopen(reading) as lines:
        assert guarded_reader._next_line(lines) == "request\n"
        asking.join()
        os.close(writing)
        assert guarded_reader._next_line(lines) == ""


def test_a_survey_that_took_too_long_names_its_limit(tmp_path: Path) -> None:
    path = str(write_pyramid(tmp_path / "a.tif", stained(300, 300)))
    limits, reader = LimitsConfig(timeout_s=1e-6), GuardedReader()
    with closing(reader):
        for look in (
            lambda: reader.survey(path, mpp=None, frame_mpp=0.5, tissue=TissueSettings({}), limits=limits),
            lambda: reader.read_thumbnail(path, 100, limits),
        ):
            with pytest.raises(SlowInput, match=r"raise limits\.survey_timeout_s, or"):
                look()


def test_a_failed_read_is_tried_again(phantom_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(sorted((phantom_folder / "images").iterdir())[0])
    row = {"id": "a", "image_uri": path, "stamp": ""}
    read = GuardedReader.read

    def attempts(num_failing: int) -> tuple[int, str | None]:
        uris: list[str] = []

        def flaky(self: GuardedReader, uri: str, **limits: Any) -> Any:
            uris.append(uri)
            if len(uris) <= num_failing:
                raise UnreadableFile(f"{uri}: connection reset")
            return read(self, uri, **limits)

        monkeypatch.setattr(GuardedReader, "read", flaky)
        task = ScoreTask("", "", PostprocessConfig(), SaveConfig(), LimitsConfig())
        (found,) = tasks.decode(task, pa.Table.from_pylist([row])).to_pylist()
        assert (found["image"] is None) is (found["reason"] is not None)
        return len(uris), found["reason"]

    assert attempts(0) == (1, None)
    assert attempts(1) == (2, None)
    assert attempts(2) == (2, "unreadable_file")


def test_a_slide_is_refused_by_its_size_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = tmp_path / "slide.tif"
    slide.touch()
    os.truncate(slide, 2**36)
    monkeypatch.setattr(storage, "read_bytes", lambda uri: pytest.fail(f"{uri} was read"))
    answer = guarded_reader.respond({"do": "decode", "uri": str(slide), "max_pixels": 10**6}, -1)
    assert answer["reason"] == "oversized_image"
    assert re.search(r"slide.tif has 68719476736 bytes, an image of limits.max_pixels = 1000000 at", answer["message"])


def test_full_shared_memory_is_an_error_not_grey_pixels(
    phantom_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = str(sorted((phantom_folder / "images").iterdir())[0])
    image = images.decode_image(Path(good).read_bytes(), good)
    request = {"do": "decode", "uri": good, "max_pixels": 10**6}
    pwrite = os.pwrite
    with (tmp_path / "pixels").open("w+b") as file:
        monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:1000], offset))
        assert guarded_reader.respond(request, file.fileno()) == {"height": 96, "width": 128}
        assert (tmp_path / "pixels").read_bytes() == image.tobytes()

        def full(fd: int, data: memoryview, offset: int) -> int:
            if offset >= 2000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return pwrite(fd, data[:1000], offset)

        monkeypatch.setattr(os, "pwrite", full)
        answer = guarded_reader.respond(request, file.fileno())
    assert answer["reason"] == "out_of_memory" and "no room for its 36864 bytes" in answer["message"]


def test_the_reader_outlives_what_it_has_to_end(
    phantom_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = str(sorted((phantom_folder / "images").iterdir())[0])
    others = reader_children()
    reader = GuardedReader()
    try:
        assert reader.read(good, max_pixels=10**6, timeout_s=30).shape == (96, 128, 3)
        (child,) = reader_children() - others
        child.suspend()  # as on a dead mount
        with pytest.raises(SlowInput, match=r"longer than 0\.2 s.*raise limits\.timeout_s"):
            reader.read(good, max_pixels=10**6, timeout_s=0.2)
        assert not child.is_running()
        assert reader.read(good, max_pixels=10**6, timeout_s=30).shape == (96, 128, 3)
        (reader_children() - others).pop().kill()
        with pytest.raises(CrashedReader, match="died"):
            reader.read(good, max_pixels=10**6, timeout_s=30)
        monkeypatch.setattr(guarded_reader, "START_TIMEOUT_S", 0.0)
        with pytest.raises(CrashedReader, match=r"jpg: the process to decode it did not start within 0 s"):
            reader.read(good, max_pixels=10**6, timeout_s=30)
        assert reader_children() == others
    finally:
        reader.close()
    assert reader_children() == others


def reader_children() -> set[psutil.Process]:
    return {one for one in psutil.Process().children() if "workflows.scoring.guarded_reader" in one.cmdline()}


def test_a_list_may_name_files_that_are_gone(tmp_path: Path) -> None:
    rows = [{"id": 7, "image_uri": "there.png"}, {"id": 8, "image_uri": "gone.png"}]
    storage.write_bytes(str(tmp_path / "there.png"), b"")
    tables.write_table(str(tmp_path / "list.parquet"), pa.Table.from_pylist(rows))
    items, _, _ = score_images.find_images(str(tmp_path / "list.parquet"))
    assert [item["id"] for item in items] == ["7", "8"]
    assert items[1]["stamp"].endswith("gone.png unreadable")
    task = ScoreTask(str(tmp_path), "", PostprocessConfig(), SaveConfig(), LimitsConfig())
    decoded = tasks.decode(task, pa.Table.from_pylist(items))
    assert decoded["reason"].to_pylist() == ["empty_file", "unreadable_file"]
