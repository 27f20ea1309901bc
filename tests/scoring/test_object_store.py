"""Inputs, weights and outputs on an S3-compatible server on loopback."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from stas_core import storage
from stas_core.errors import OccupiedOutputError
from tests.scoring.here import score_images_here
from tests.workflows.chaos import result
from tests.workflows.made import settings
from workflows import score_images
from workflows.out_folder import Outputs, claim_for_stage
from workflows.scoring.guarded_reader import reader

BUCKET = "s3://slides"


pytestmark = pytest.mark.usefixtures("endpoint")


def test_what_other_processes_wrote_is_seen(endpoint: dict[str, str]) -> None:
    """A backend remembers listings; a driver that listed a folder before its workers wrote there must look again."""
    s3, folder = fsspec.filesystem("s3", skip_instance_cache=True), "s3://others/masks"
    s3.mkdir("s3://others")
    s3.pipe(f"{folder}/a.png", b"old")
    assert storage.list_files(folder, (".png",)) == [f"{folder}/a.png"]
    old = storage.stamp(f"{folder}/a.png")
    write = "import sys, fsspec; [fsspec.filesystem('s3').pipe(uri, b'new') for uri in sys.argv[1:]]"
    uris = [f"{folder}/a.png", f"{folder}/b.png"]
    subprocess.run([sys.executable, "-c", write, *uris], env=os.environ | endpoint, check=True)
    assert storage.exists(uris[1])
    assert storage.list_files(folder, (".png",)) == uris
    assert old not in storage.stamps(uris)
    storage.remove(folder)
    assert not storage.exists(uris[0])


def test_scoring_from_and_to_a_bucket_equals_scoring_of_files(
    scored: Path,
    many_images: Path,
    ensemble: str,
    tmp_path: Path,
    endpoint: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, local = tmp_path / "images", tmp_path / "local"
    source.mkdir()
    for path in many_images.glob("field_0000[0-5].jpg"):
        shutil.copy(path, source)
    shutil.copytree(scored, local)
    for name, value in endpoint.items():
        monkeypatch.setenv(name, value)
    reader().close()  # which may have begun without them
    score_images_here(monkeypatch)  # what it is compared with came through Ray
    assert score_images.run(settings(f"{many_images}/field_0000[0-5].jpg", ensemble, local), False) == 0  # of six alone
    s3 = fsspec.filesystem("s3", skip_instance_cache=True)
    s3.mkdir(BUCKET)
    s3.put(f"{source}/", f"{BUCKET}/images/", recursive=True)
    s3.put(f"{ensemble}/", f"{BUCKET}/run/", recursive=True)
    there = settings(f"{BUCKET}/images", f"{BUCKET}/run", f"{BUCKET}/scores")
    assert score_images.run(there, False) == 0
    s3.get(f"{BUCKET}/scores/", f"{tmp_path}/fetched/", recursive=True)
    expected, found = result(tmp_path / "local"), result(tmp_path / "fetched")
    # The images table names where each image lies.
    assert found.pop("images.parquet") != expected.pop("images.parquet")
    assert found == expected
    # A changed object is noticed; the rest is left alone.
    before = {name: s3.info(name)["LastModified"] for name in s3.find(f"{BUCKET}/scores/records")}
    s3.pipe(f"{BUCKET}/images/field_00000.jpg", (source / "field_00003.jpg").read_bytes())
    assert score_images.run(there, False) == 0
    after = {name: s3.info(name, refresh=True)["LastModified"] for name in s3.find(f"{BUCKET}/scores/records")}
    assert [Path(name).stem for name in after if after[name] != before[name]] == ["field_00000"]


def test_a_bucket_lets_one_run_into_a_folder() -> None:
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir("s3://leases")
    out, outputs = "s3://leases/out", Outputs("score", ("masks/{id}.png",))
    assert [storage.create(f"{out}2/x", data) for data in (b"1", b"2")] == [True, False]
    with claim_for_stage(out, outputs, force=False, ids=["a"]):
        storage.write_bytes(f"{out}/masks/a.png", b"")
        storage.write_bytes(f"{out}/masks/mine.png", b"")
        with (
            pytest.raises(OccupiedOutputError, match="in use by another run"),
            claim_for_stage(out, outputs, force=True),
        ):
            pass
    with claim_for_stage(out, outputs, force=True):
        pass
    assert storage.walk(out) == ["claim.json", "masks/mine.png"]
