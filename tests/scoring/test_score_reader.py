"""Reading images for scoring: what fails, blocks, is too large, and the process that can be ended."""

import errno
import os
import re
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
from workflows import score_images
from workflows.scoring import guarded_reader, tasks
from workflows.scoring.guarded_reader import GuardedReader
from workflows.scoring.tasks import LimitsConfig, SaveConfig, ScoreTask


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
