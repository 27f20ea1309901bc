"""A disk that takes no more while a stage runs: it ends at once, blames no image, and goes on when run again."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from stas_core import config, storage
from stas_core.errors import StorageError
from tests.scoring.here import score_images_here
from tests.workflows.chaos import result
from tests.workflows.made import settings
from workflows import prepare_data, score_images
from workflows.cluster import Node
from workflows.prepare_data import PrepareConfig
from workflows.scoring import restarts


def in_the_way(folder: Path) -> None:
    """Put a file where a folder of outputs was: whatever is written below it is refused."""
    shutil.rmtree(folder)
    folder.touch()


def refused(run: Any) -> str:
    with pytest.raises(StorageError) as found:
        run()
    assert type(found.value).__name__ == "WriteError"
    return str(found.value)


def test_scoring_ends_at_once_blames_no_image_and_goes_on(
    scored: Path, many_images: Path, ensemble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Any] = []

    def follow(*arguments: Any) -> Any:
        begun.append(arguments)
        return follow_on(*arguments)

    follow_on = restarts.follow
    monkeypatch.setattr(restarts, "follow", follow)
    out = tmp_path / "out"
    shutil.copytree(scored, out)
    run = settings(f"{many_images}/field_0000[01].jpg", ensemble, out)
    assert score_images.run(run, False) == 0  # the others of that run are tidied away
    whole = result(out)
    in_the_way(out / "overlays")
    for anew in ((), ("records", "maps")):  # finished from saved maps, through Ray; predicted, in this process
        for folder in anew:
            shutil.rmtree(out / folder)
            score_images_here(monkeypatch)
        storage.remove(str(out / "manifest.json"))
        assert f"cannot write {out}/overlays/" in refused(lambda: score_images.run(run, False))
        assert len(begun) == 1  # no pipeline is begun anew
        records = [storage.read_json(str(path)) for path in (out / "records").glob("*.json")]
        assert not [record for record in records if "reason" in record]
        assert not (out / "failures.parquet").exists()
    (out / "overlays").unlink()
    assert score_images.run(run, False) == 0
    assert result(out) == whole


def test_preparing_ends_at_once_and_goes_on(ray_nodes: list[Node], phantom_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cohort"
    data = {"images": str(phantom_folder / "images"), "annotations": str(phantom_folder / "annotations")}
    run = config.build(PrepareConfig, {"out": str(out), "data": data, "split": {"num_folds": 2}})
    assert prepare_data.run(run, False) == 0
    whole = storage.read_bytes(str(out / "cohort.parquet"))
    in_the_way(out / "masks")
    message = refused(lambda: prepare_data.run(run, False))
    assert message.startswith(f"cannot write {out}/masks/") and "UserCodeException" not in message
    (out / "masks").unlink()
    assert prepare_data.run(run, False) == 0
    assert storage.read_bytes(str(out / "cohort.parquet")) == whole
