"""Whose an output folder is, and which of its files may be deleted."""

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stas_core import storage
from stas_core.config import Config
from stas_core.errors import (
    ConfigError,
    DeletedOutputError,
    ForeignOutputError,
    OccupiedOutputError,
    StaleOutputError,
    StorageError,
)
from workflows import lease, out_folder
from workflows.address import JOB_VARIABLE
from workflows.out_folder import Outputs, claim_for_stage

TRAIN = Outputs("train", ("old.txt",))
SCORE = Outputs("score", ("images.parquet", "masks/{id}.png", "fold_*/maps/{id}.png", "state/**"))


class Settings(Config):
    lr: float = 1.0
    """A number."""


class LaterSettings(Settings):
    momentum: float = 0.9
    """An option that a later version has."""


def claim(out: str, outputs: Outputs, config: Config, inputs: str, *, force: bool = False) -> None:
    with claim_for_stage(out, outputs, force=force, work=(config, inputs)):
        pass


def write(out: Path, *names: str) -> None:
    for name in names:
        storage.write_bytes(f"{out}/{name}", name.encode())


def left(out: Path) -> list[str]:
    return storage.walk(str(out))


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    for _ in range(2):
        claim(out, TRAIN, Settings(), "input")
    with pytest.raises(StaleOutputError, match=r"differs in: lr \(was 1\.0, now 2\.0\); use another out=, or --force"):
        claim(out, TRAIN, Settings(lr=2.0), "input")
    with pytest.raises(StaleOutputError, match="differs in: the input data"):
        claim(out, TRAIN, Settings(), "other input")
    claim(out, TRAIN, LaterSettings(), "input")
    with pytest.raises(StaleOutputError, match=r"differs in: momentum \(was 0\.9, now 0\.5\)"):
        claim(out, TRAIN, LaterSettings(momentum=0.5), "input")
    write(tmp_path / "run", "old.txt")
    claim(out, TRAIN, Settings(lr=2.0), "input", force=True)
    assert left(tmp_path / "run") == ["claim.json"]
    with pytest.raises(ForeignOutputError, match="run holds what train made, not score; use another out="):
        claim(out, SCORE, Settings(lr=2.0), "input", force=True)


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_no_stage_has_claimed_is_left_alone(tmp_path: Path, force: bool) -> None:
    write(tmp_path, "thesis.txt", "masks/mine.png")
    with (
        pytest.raises(ConfigError, match=r"which holds none of .* is not empty: it has masks, thesis\.txt;"),
        claim_for_stage(str(tmp_path), SCORE, force=force),
    ):
        pass
    (tmp_path / "manifest.json").write_text("[]")
    with (
        pytest.raises(ForeignOutputError, match="holds what another program made, not score"),
        claim_for_stage(str(tmp_path), SCORE, force=force),
    ):
        pass
    assert left(tmp_path) == ["manifest.json", "masks/mine.png", "thesis.txt"]


def test_a_new_an_empty_and_a_just_begun_folder_are_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "begun", f".claim.json.{'0' * 32}.tmp")  # a run that was killed at once
    for name in ("new/deep", "empty", "begun"):
        with claim_for_stage(f"{tmp_path}/{name}", SCORE, force=True) as folder:
            assert storage.exists(f"{folder.uri}/lease.json")
        assert "claim.json" in left(tmp_path / name) and "lease.json" not in left(tmp_path / name)


def test_force_deletes_what_the_stage_wrote_and_names_what_it_keeps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    with claim_for_stage(str(out), SCORE, force=False, ids=["0007"]) as folder:
        folder.name_ids(["0008"])
    own = ["images.parquet", "masks/0007.png", "masks/0008.png", "fold_1/maps/0007.png", "state/a/b", "manifest.json"]
    own += [f"masks/.0007.png.{'a' * 32}.tmp", "config.resolved.yaml"]
    mine = ["masks/0009.png", "masks/0007.txt", "masks/deep/0007.png", "notes #2.txt", ".profile", "fold_1/0007.png"]
    history = ["tracking/mlflow.db", "tracking/artifacts/1/a/report.html"]
    write(out, *own, *mine, *history, "tracking/runs.json")
    write(elsewhere, "0007.png")
    (out / "fold_2").mkdir()
    (out / "fold_2" / "maps").symlink_to(elsewhere)
    (out / "kept").mkdir()
    with claim_for_stage(str(out), SCORE, force=True):
        pass
    assert left(out) == sorted([*mine, *history, "claim.json", "fold_2/maps"])
    assert (out / "kept").is_dir() and not (out / "state").exists() and (elsewhere / "0007.png").exists()
    said = capsys.readouterr().out
    assert "--force: kept .profile, fold_1/0007.png, fold_2/maps and 4 more, which score did not write" in said
    assert storage.read_json(f"{out}/claim.json")["ids"] == []


def test_force_deletes_objects_the_same_way() -> None:
    out = "memory://bucket/out"
    with claim_for_stage(out, SCORE, force=False, ids=["a"]):
        for name in ("masks/a.png", "masks/mine.png", "state/x"):
            storage.write_bytes(f"{out}/{name}", b"")
    with claim_for_stage(out, SCORE, force=True):
        pass
    assert storage.walk(out) == ["claim.json", "masks/mine.png"]
    with pytest.raises(ConfigError, match="is not empty: it has mine"):
        storage.write_bytes("memory://bucket/other/mine", b"")
        with claim_for_stage("memory://bucket/other", SCORE, force=True):
            pass


@given(st.text(min_size=1, max_size=12), st.frozensets(st.text(min_size=1, max_size=4), max_size=3))
def test_no_name_is_owned_by_accident(name: str, ids: frozenset[str]) -> None:
    outputs = Outputs("score", ("masks/{id}.png",))
    assert outputs.owns(f"masks/{name}.png", ids) == (name in ids and "/" not in name)
    assert not outputs.owns(f"masks/{name}", ids) or name.removesuffix(".png") in ids


@pytest.mark.parametrize(
    ("claimed", "message"),
    [
        (b"{", r"claim\.json is not valid JSON"),
        (b"\xff\xfe", r"claim\.json is not valid JSON"),
        (b"[]", "holds what another program made"),
        (b"{}", "holds what another program made"),
        (b'{"stage": 3}', "holds what another program made"),
        (b'{"stage": "train"}', r"claim\.json (has no key 'config'|does not name the files)"),
        (b'{"stage": "train", "ids": [], "config": {}}', "has no key 'inputs'"),
        (b'{"stage": "train", "ids": 3, "config": {}, "inputs": ""}', "does not name the files"),
        (b'{"stage": "train", "ids": [], "config": [], "inputs": ""}', "differs in"),
    ],
)
def test_a_damaged_claim_is_one_sentence(tmp_path: Path, claimed: bytes, message: str) -> None:
    (tmp_path / "claim.json").write_bytes(claimed)
    (tmp_path / "mine.txt").touch()
    with pytest.raises(StaleOutputError, match=message) as caught:
        claim(str(tmp_path), TRAIN, Settings(), "input")
    assert "\n" not in str(caught.value) and left(tmp_path) == ["claim.json", "mine.txt"]


@pytest.mark.parametrize("manifest", [b"", b"{", b"[]", b'{"stage": "train"}', b'{"config": {}}'])
def test_a_damaged_manifest_is_one_sentence_and_force_starts_over(tmp_path: Path, manifest: bytes) -> None:
    with claim_for_stage(str(tmp_path), TRAIN, force=False) as folder:
        (tmp_path / "manifest.json").write_bytes(manifest)
        with pytest.raises(
            StaleOutputError, match=r"manifest\.json (is not valid JSON|holds 0 bytes|has no key '(config|inputs))"
        ):
            folder.is_finished(Settings(), "input")
    with claim_for_stage(str(tmp_path), TRAIN, force=True) as folder:
        assert not folder.is_finished(Settings(), "input")


def test_a_manifest_stands_for_exactly_its_work(tmp_path: Path) -> None:
    with claim_for_stage(str(tmp_path), TRAIN, force=False) as folder:
        assert not folder.is_finished(Settings(), "input")
        folder.write_manifest(Settings(), "input", {"num_images": 1})
        assert folder.is_finished(Settings(), "input")
        assert not folder.is_finished(Settings(lr=3.0), "input")
        assert not folder.is_finished(Settings(), "other input")


def test_outputs_never_hold_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"holds data.images = cohort/images, which is read"):
        out_folder.require_apart(str(tmp_path / "cohort"), {"data.images": "cohort/images"})
    out_folder.require_apart("/data/out", {"run": "/data/runs/a", "cohort": None, "other": "/data/out2/cohort.parquet"})
    for inside in ("/data/out", "/data/out/", "/data/out/cohort/cohort.parquet"):
        with pytest.raises(ConfigError, match=f"out = /data/out holds run = {inside}, which is read"):
            out_folder.require_apart("/data/out", {"run": inside})


@pytest.mark.parametrize("out", ["X", "X/.", "X//", "file://X", "/X", "X/a/..", "link", "X/new", "link/new/out"])
@pytest.mark.parametrize("images", ["X", "X/*.jpg", "file://X/", "link/f*", "X/a/../."])
def test_outputs_never_lie_where_inputs_are_listed(tmp_path: Path, out: str, images: str) -> None:
    source, link = tmp_path / "X", tmp_path / "link"
    (source / "a").mkdir(parents=True)
    link.symlink_to(source)
    out, images = (text.replace("X", str(source)).replace("link", str(link)) for text in (out, images))
    with pytest.raises(ConfigError, match=r"(holds|and) data\.images = "):
        out_folder.require_apart(out, {"data.images": images}, listed=["data.images"])
    out_folder.require_apart(f"{tmp_path}/beside", {"data.images": images}, listed=["data.images"])


def test_paths_that_would_be_lost_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["workflows/x.py", "--config", "a.yaml"])
    with pytest.raises(
        ConfigError, match=r"out is not set; .*run: python workflows/x\.py --config a\.yaml out=/data/o"
    ):
        out_folder.require_uri("out", None, "/data/o")
    monkeypatch.delenv(JOB_VARIABLE, raising=False)
    assert out_folder.require_uri("out", "here", "/data/o") == str(Path("here").absolute())
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    with pytest.raises(ConfigError, match=r"out = here is relative, but a Ray job works in a temporary copy"):
        out_folder.require_uri("out", "here", "/data/o")
    assert out_folder.require_uri("out", "s3://b/o", "/data/o") == "s3://b/o"


@pytest.mark.parametrize("out", ["", " ", ".", "./", "/", "//", "~", "file://.", "a/..", "s3://", "/usr/.."])
def test_places_that_hold_more_than_outputs_are_refused(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(JOB_VARIABLE, raising=False)
    with pytest.raises(
        ConfigError, match=r"^out (is empty|= .* is (the root|your home|the working|no bucket)).*/data/o$"
    ):
        out_folder.require_out(out, "/data/o")


@pytest.mark.parametrize("place", ["local", "memory"])
@pytest.mark.parametrize("noticed", ["by the lease", "where files are vouched for", "by a file that is gone"])
def test_a_folder_that_is_deleted_ends_its_run_with_the_reason_and_the_same_command_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, noticed: str
) -> None:
    out = f"{tmp_path}/out" if place == "local" else f"memory://{tmp_path}/out"
    if noticed == "by the lease":
        monkeypatch.setattr(lease, "RENEW_S", 0.5)
    with (
        pytest.raises(DeletedOutputError, match=r"out or its claim\.json was deleted while .*; now run the same"),
        claim_for_stage(out, SCORE, force=False, ids=["a"]) as folder,
    ):
        storage.remove(out)
        time.sleep(0.05)  # clocks of file systems are coarse
        storage.write_bytes(f"{out}/masks/a.png", b"by a worker that still runs")
        if noticed == "by the lease":
            time.sleep(20)  # it is interrupted
        elif noticed == "where files are vouched for":
            folder.write_manifest(Config(), "", {})
        else:
            storage.read_bytes(f"{out}/masks/a-moment-ago.png")
    assert storage.walk(out) == []
    with claim_for_stage(out, SCORE, force=False, ids=["a"]):
        pass


@pytest.mark.parametrize("place", ["local", "memory"])
@pytest.mark.parametrize("gone", [["claim.json"], ["claim.json", "lease.json"]])
def test_results_outlive_a_deleted_claim(tmp_path: Path, place: str, gone: list[str]) -> None:
    out = f"{tmp_path}/out" if place == "local" else f"memory://{tmp_path}/out"
    with claim_for_stage(out, SCORE, force=False, ids=["a", "b"]) as folder:
        storage.write_bytes(f"{out}/masks/a.png", b"of an hour ago")
        time.sleep(0.05)
        folder._lease.renew()
    with (
        pytest.raises(DeletedOutputError, match=r"masks/a\.png.* is still there and was left alone: move it away"),
        claim_for_stage(out, SCORE, force=False, ids=["a", "b"]) as folder,
    ):
        storage.remove_files(out, gone)
        time.sleep(0.05)
        storage.write_bytes(f"{out}/masks/b.png", b"of now")
        folder.verify()
    assert storage.walk(out) == ["masks/a.png", "masks/b.png"]


def test_a_folder_that_cannot_be_seen_is_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, stat = str(tmp_path / "out"), os.stat

    def stale(path: str, **values: Any) -> os.stat_result:
        if str(path).endswith("claim.json"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return stat(path, **values)

    with (
        monkeypatch.context() as away,
        pytest.raises(StorageError, match=r"cannot read .*claim\.json: Stale file handle; check"),
        claim_for_stage(out, SCORE, force=False, ids=["a"]) as folder,
    ):
        storage.write_bytes(f"{out}/masks/a.png", b"")
        away.setattr(os, "stat", stale)
        folder.verify()
    assert storage.walk(out) == ["claim.json", "masks/a.png"]


def test_a_run_whose_folder_was_deleted_leaves_the_next_run_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(OccupiedOutputError, match="held by train"),
        claim_for_stage(str(out), SCORE, force=False) as old,
    ):
        storage.remove(str(out))
        with claim_for_stage(str(out), TRAIN, force=False):
            write(out, "old.txt")
            old.verify()
    assert left(out) == ["claim.json", "old.txt"]
