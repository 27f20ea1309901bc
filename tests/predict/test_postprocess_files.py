"""Thresholds from a file: wherever tune_postprocess may have left it."""

from pathlib import Path

import pytest

from stas_core import config, storage
from stas_core.config import Config
from stas_core.errors import ConfigError, StorageError
from stas_core.predict.postprocess import PostprocessChoice, PostprocessConfig


class Settings(Config):
    postprocess: PostprocessChoice = PostprocessConfig()


@pytest.mark.parametrize("root", ["{}", "file://{}", "memory://bucket{}"])
def test_thresholds_lie_on_a_disk_or_in_a_bucket(root: str, tmp_path: Path) -> None:
    uri = storage.join(root.format(tmp_path), "postprocess.tuned.yaml")
    storage.write_bytes(uri, b"closing_px: 7\n")
    read = config.build(Settings, {"postprocess": uri})
    assert read.postprocess == PostprocessConfig(closing_px=7)


@pytest.mark.parametrize(
    ("uri", "data"),
    [
        ("memory://bucket/none.yaml", None),
        ("memory://bucket/list.yaml", b"[1]"),
        ("memory://bucket/latin.yaml", b"closing_px: \xff"),
        ("memory://bucket/even.yaml", b"closing_px: 4"),
        ("/nowhere/none.yaml", None),
    ],
)
def test_what_holds_no_thresholds_is_named(uri: str, data: bytes | None) -> None:
    if data is not None:
        storage.write_bytes(uri, data)
    with pytest.raises((ConfigError, StorageError), match=r"postprocess|none\.yaml"):
        config.build(Settings, {"postprocess": uri})
