import errno
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import ray.data
import torch
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from PIL import Image

from stas_core import config, images, inference, outputs, postprocess, storage
from stas_core.errors import (
    CheckpointError,
    ConfigError,
    CrashedReader,
    ResourceError,
    SlowInput,
    StaleOutputError,
    StasError,
    UnreadableFile,
)
from stas_core.inference import InferenceConfig, Predictor
from stas_core.postprocess import PostprocessConfig
from tests.conftest import ROOT
from tests.workflows.chaos import Chaos, result
from tests.workflows.made import make_ensemble, make_images, settings, write_config
from tests.workflows.test_train_folds import wait_for
from workflows import deadline, evaluate, score_cluster, score_images, score_worker
from workflows.deadline import GuardedReader
from workflows.runtime import Node
from workflows.score_actor import Ensemble, GpuWatch, ScoreActor
from workflows.score_cluster import Calibration, Interrupted, NodeLost, ScorePlan, ScoreResources, Work, plan_scoring
from workflows.score_images import ScoreConfig
from workflows.score_worker import DECODED, PREDICTED, LimitsConfig, SaveConfig, ScoreTask
from workflows.suspects import Blame


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a run of two untrained folds of different scale."""
    return make_ensemble(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def many_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of forty images, twenty of them distinct."""
    return make_images(tmp_path_factory.mktemp("many") / "images", 40)


def records(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "records").glob("*.json")}


@pytest.fixture(scope="module")
def undisturbed(
    ray_nodes: list[Node], many_images: Path, ensemble: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("scores") / "a"
    assert score_images.run(settings(many_images, ensemble, out), False) == 0
    return out


def test_scoring_through_ray_equals_plain_python(undisturbed: Path, many_images: Path, ensemble: str) -> None:
    run = settings(many_images, ensemble, undisturbed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    members = inference.load_members(inference.find_checkpoints(ensemble), cpu)
    predictor = Predictor(members, device=cpu, config=run.inference)
    rows = storage.read_table(str(undisturbed / "images.parquet")).to_pylist()
    assert [row["id"] for row in rows] == sorted(path.stem for path in many_images.iterdir())
    for row in rows[:8]:
        image = images.decode_image(Path(row["image_uri"]).read_bytes(), row["id"])
        (prediction,) = predictor.predict([image])
        prob = prediction.prob_u8()
        cascade = postprocess.run_cascade(prob, run.postprocess)
        targets = postprocess.find_targets(cascade.mask, prob)
        stored = {
            folder: np.asarray(Image.open(undisturbed / folder / f"{row['id']}.png"))
            for folder in ("masks", "maps", "disagreement")
        }
        assert np.array_equal(stored["masks"], cascade.mask * np.uint8(255))
        assert np.array_equal(stored["maps"], prob)
        assert np.array_equal(stored["disagreement"], prediction.std_u8())
        assert row["foreground_share"] == cascade.mask.mean()
        assert (row["num_targets"], row["stage"], row["num_passes"]) == (len(targets), cascade.stage, 4)
        assert row["mean_disagreement"] == float(prediction.std.mean(dtype=torch.float64))
        assert (undisturbed / "geojson" / f"{row['id']}.geojson").read_bytes() == outputs.to_geojson(row["id"], targets)
    torch.set_num_threads(threads)


def test_archives_and_tables_hold_every_image(undisturbed: Path) -> None:
    rows = storage.read_table(str(undisturbed / "images.parquet"))
    targets = storage.read_table(str(undisturbed / "targets.parquet"))
    assert rows.schema.equals(outputs.IMAGES_SCHEMA) and targets.schema.equals(outputs.TARGETS_SCHEMA)
    assert targets.num_rows == sum(rows["num_targets"].to_pylist()) > 0
    with zipfile.ZipFile(undisturbed / "segmentation.zip") as archive:
        assert archive.namelist() == [f"{image_id}.png" for image_id in rows["id"].to_pylist()]
        for name in archive.namelist():
            assert archive.read(name) == (undisturbed / "masks" / name).read_bytes()
    boxes = json.loads((undisturbed / "detection.json").read_text())
    assert list(boxes) == rows["id"].to_pylist()
    first = targets.to_pylist()[0]
    expected = [first["x0"], first["y0"], first["x1"] - 1, first["y1"] - 1, round(first["mean_prob"], 6)]
    assert boxes[first["id"]][0] == expected
    assert storage.read_table(str(undisturbed / "timings.parquet")).num_rows == rows.num_rows
    assert (undisturbed / "contact_sheet.png").exists() and (undisturbed / "manifest.json").exists()


def test_only_what_depends_on_a_change_is_done_again(
    ray_nodes: list[Node],
    phantom_folder: Path,
    ensemble: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    source, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(phantom_folder / "images", source)
    first = settings(source, ensemble, out)
    assert score_images.run(first, False) == 0
    assert score_images.run(first, False) == 0
    assert "nothing to do" in capsys.readouterr().out
    # Other thresholds: from the maps, which stay.
    maps = {path.name: path.stat().st_mtime_ns for path in (out / "maps").iterdir()}
    higher = first.model_copy(update={"postprocess": first.postprocess.model_copy(update={"min_target_px": 300})})
    assert score_images.run(higher, False) == 0
    assert "0 to predict, 8 to finish from saved maps" in capsys.readouterr().out
    score_images.run(higher.model_copy(update={"out": str(tmp_path / "anew")}), False)
    assert result(out) == result(tmp_path / "anew")
    capsys.readouterr()
    # Stopped on the way to other thresholds, and back to the first: nothing of the others is left.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(score_images, "_write_results", interrupt)
        score_images.run(first, False)
    assert not (out / "manifest.json").exists()
    with pytest.raises(ConfigError, match=r"holds no images\.parquet"):
        evaluate.read_run("run", str(out))
    assert score_images.run(higher, False) == 0
    assert "0 to predict, 8 to finish from saved maps" in capsys.readouterr().out
    assert result(out) == result(tmp_path / "anew")
    again = config.load_config(ScoreConfig, out / "config.resolved.yaml")
    assert score_images.run(again, False) == 0
    assert "nothing to do" in capsys.readouterr().out
    # One kind of file less: it goes, and that is all. One more: it is made.
    fewer = higher.model_copy(update={"save": higher.save.model_copy(update={"geojson": False})})
    assert score_images.run(fewer, False) == 0
    assert "0 to predict, 0 to finish" in capsys.readouterr().out and not list((out / "geojson").glob("*"))
    assert score_images.run(higher, False) == 0
    assert "0 to predict, 8 to finish from saved maps" in capsys.readouterr().out
    assert result(out) == result(tmp_path / "anew")
    # A changed, a new and a removed image; a lost mask.
    names = sorted(source.iterdir())
    Image.fromarray(np.full((50, 60, 3), 200, np.uint8)).save(names[0])
    shutil.copy(names[1], source / "new.jpg")
    names[2].unlink()
    (out / "masks" / f"{names[3].stem}.png").unlink()
    assert score_images.run(higher, False) == 0
    assert "8 images: 2 to predict, 1 to finish from saved maps" in capsys.readouterr().out
    assert not (out / "masks" / f"{names[2].stem}.png").exists()
    # A lower limit: what is larger now is reported; with the old one it is scored again.
    lower = higher.model_copy(update={"limits": higher.limits.model_copy(update={"max_pixels": 5000})})
    assert score_images.run(lower, False) == 1
    assert "8 images: 7 to predict" in capsys.readouterr().out
    reasons = storage.read_table(str(out / "failures.parquet"))["reason"].to_pylist()
    assert reasons == ["oversized_image"] * 7
    assert score_images.run(higher, False) == 0
    # Other flips: all anew. No maps wanted: they go.
    one_flip = first.inference.model_copy(update={"flips": ("identity",)})
    bare = first.save.model_copy(update={"maps": False, "disagreement": False})
    assert score_images.run(higher.model_copy(update={"inference": one_flip, "save": bare}), False) == 0
    assert "8 to predict" in capsys.readouterr().out
    assert not list((out / "maps").glob("*")) and len(maps) == 8


def test_bad_inputs_are_quarantined_and_the_rest_goes_on(
    ray_nodes: list[Node], phantom_folder: Path, ensemble: str, tmp_path: Path
) -> None:
    source, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(phantom_folder / "images", source)
    good = sorted(source.iterdir())[0]
    expected = {
        "truncated": "unreadable_image",
        "grey": "wrong_channels",
        "deep": "wrong_bit_depth",
        "empty": "empty_file",
        "large": "oversized_image",
        "blocking": "not_a_file",
        good.stem: "duplicate_id",
    }
    (source / "truncated.jpg").write_bytes(good.read_bytes()[:900])
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(source / "grey.png")
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(source / "deep.png")
    (source / "empty.jpg").touch()
    Image.fromarray(np.zeros((200, 200, 3), np.uint8)).save(source / "large.png")
    os.mkfifo(source / "blocking.png")
    shutil.copy(good, source / f"{good.stem}.jpeg")
    limits = {"max_pixels": 30_000, "timeout_s": 1.5}
    run = settings(source, ensemble, out, limits=limits)
    assert score_images.run(run, False) == 1
    table = storage.read_table(str(out / "failures.parquet"))
    assert table.schema.equals(outputs.FAILURES_SCHEMA)
    assert {row["id"]: row["reason"] for row in table.to_pylist()} == expected
    assert all(row["id"] in row["message"] for row in table.to_pylist())
    assert storage.read_table(str(out / "images.parquet")).num_rows == 7
    allowed = run.model_copy(update={"max_failed_fraction": 0.6})
    assert score_images.run(allowed, False) == 0


def test_a_stop_while_files_are_overwritten_leaves_no_false_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prob = np.zeros((20, 30), np.uint8)
    prob[5:15, 5:20] = 200
    empty = dict.fromkeys(PREDICTED.names) | {"id": "a", "image_uri": "a.png", "stamp": "1", "decode_s": 0.0}
    row = empty | {"height": 20, "width": 30, "prob": prob.tobytes(), "mean_disagreement": 0.0, "num_passes": 4}
    item = {"id": "a", "image_uri": "a.png", "stamp": "1"}
    save = SaveConfig(overlays=False)
    first = ScoreTask(str(tmp_path), "weights 1", PostprocessConfig(), save, LimitsConfig())

    def todo(task: ScoreTask) -> tuple[list[Any], list[Any]]:
        records = {record["id"]: record for record in score_images._read_records(str(tmp_path))}
        return score_images._split_todo([item], records, task)

    def finish(task: ScoreTask) -> None:
        score_worker.finish(task, pa.Table.from_pylist([row], schema=PREDICTED))

    def finish_but_for_the_record(task: ScoreTask) -> None:
        write = storage.write_json

        def write_json(uri: str, value: Any) -> None:
            if value.get("finish_key") == task.finish_key:
                raise KeyboardInterrupt
            write(uri, value)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(storage, "write_json", write_json)
            finish(task)

    finish(first)
    assert todo(first) == ([], [])
    # Other thresholds: the map still holds.
    finish_but_for_the_record(replace(first, postprocess=PostprocessConfig(min_target_px=7)))
    assert todo(first) == ([], [item])
    finish(first)
    # Other weights: nothing does.
    finish_but_for_the_record(replace(first, predict_key="weights 2"))
    assert todo(first) == ([item], [])
    finish(first)
    # The same again, killed: what stands is right.
    finish_but_for_the_record(first)
    assert todo(first) == ([], [])
    # Other weights, without maps, stopped before the old maps were tidied away: these are nobody's any more.
    without = replace(first, predict_key="weights 2", save=SaveConfig(overlays=False, maps=False))
    finish(without)
    assert (tmp_path / "maps" / "a.png").exists() and todo(without) == ([], [])
    assert todo(replace(first, predict_key="weights 2")) == ([item], [])


def test_a_damaged_map_is_told_and_its_image_predicted_anew(
    ray_nodes: list[Node], phantom_folder: Path, ensemble: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run = settings(phantom_folder / "images", ensemble, out)
    assert score_images.run(run, False) == 0
    expected = result(out)
    damaged = sorted((out / "maps").iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:50])
    (out / "overlays" / f"{damaged.stem}.jpg").unlink()
    storage.remove(str(out / "manifest.json"))
    assert score_images.run(run, False) == 1
    (failed,) = storage.read_table(str(out / "failures.parquet")).to_pylist()
    assert (failed["id"], failed["reason"]) == (damaged.stem, "unreadable_file")
    assert "the map that was saved is damaged, run again" in failed["message"]
    capsys.readouterr()
    assert score_images.run(run, False) == 0
    assert "8 images: 1 to predict" in capsys.readouterr().out and result(out) == expected


def test_one_image_that_cannot_be_predicted_does_not_end_the_others(
    ensemble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = Ensemble(tuple(inference.find_checkpoints(ensemble)), "", inference.InferenceConfig(), False, 1)
    actor = ScoreActor(models, SaveConfig(overlays=False))
    sizes = [(40, 50), (60, 70), (40, 50)]
    rows = [
        {"id": str(index), "height": height, "width": width, "image": bytes(height * width * 3), "decode_s": 0.0}
        for index, (height, width) in enumerate(sizes)
    ]
    table = pa.Table.from_pylist(rows, schema=DECODED)
    undisturbed = actor(table).drop_columns(["predict_s"]).to_pylist()
    forward = Predictor._predict_same_size

    def predict(error: Exception | None) -> None:
        def failing(self: Predictor, batch: list[np.ndarray]) -> Any:
            if batch[0].shape[0] == 60:
                if error is None:
                    nan = torch.full((60, 70), float("nan"))
                    return [inference.Prediction(nan, nan, 4)]
                raise error
            return forward(self, batch)

        monkeypatch.setattr(Predictor, "_predict_same_size", failing)

    for error, reason, message in (
        (ValueError("odd"), "internal_error", "ValueError: odd"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory", "70x60 px does not fit into memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out_of_memory", "70x60 px"),
        (None, "internal_error", "probabilities are not finite"),
    ):
        predict(error)
        found = actor(table).drop_columns(["predict_s"]).to_pylist()
        assert [found[0], found[2]] == [undisturbed[0], undisturbed[2]]
        assert found[1]["reason"] == reason and message in found[1]["message"]
    predict(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(torch.AcceleratorError):  # the device is lost for all images: Ray starts another actor
        actor(table)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a node without a GPU")
def test_an_actor_never_takes_a_cpu_for_a_gpu(ensemble: str) -> None:
    models = Ensemble(tuple(inference.find_checkpoints(ensemble)), "", inference.InferenceConfig(), True, 1)
    with pytest.raises(ResourceError, match=r"promises a GPU, but torch finds none .*gpus_per_actor=0"):
        ScoreActor(models, SaveConfig())


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
        (found,) = score_worker.decode(task, pa.Table.from_pylist([row])).to_pylist()
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
    answer = deadline._answer({"do": "decode", "uri": str(slide), "max_pixels": 10**6}, -1)
    assert answer["reason"] == "oversized_image"
    assert re.search(r"slide.tif has 68719476736 bytes, an image of limits.max_pixels = 1000000 at", answer["message"])


def test_the_gpu_is_watched_from_the_first_batch_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 75)
    monkeypatch.setattr(GpuWatch, "INTERVAL_S", 0.01)
    watch = GpuWatch(torch.device("cuda"))
    time.sleep(0.05)
    assert watch.take() == {"gpu_watched_s": 0, "gpu_busy_s": 0}
    time.sleep(0.1)
    seen = watch.take()
    assert 0 < seen["gpu_watched_s"] <= 0.11 and seen["gpu_busy_s"] == pytest.approx(0.75 * seen["gpu_watched_s"])
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 1 / 0)  # no such counter
    time.sleep(0.05)
    watch.take()
    time.sleep(0.05)
    assert watch.take() == {"gpu_watched_s": 0, "gpu_busy_s": 0}


def test_full_shared_memory_is_an_error_not_grey_pixels(
    phantom_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = str(sorted((phantom_folder / "images").iterdir())[0])
    image = images.decode_image(Path(good).read_bytes(), good)
    request = {"do": "decode", "uri": good, "max_pixels": 10**6}
    pwrite = os.pwrite
    with (tmp_path / "pixels").open("w+b") as file:
        monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:1000], offset))
        assert deadline._answer(request, file.fileno()) == {"height": 96, "width": 128}
        assert (tmp_path / "pixels").read_bytes() == image.tobytes()

        def full(fd: int, data: memoryview, offset: int) -> int:
            if offset >= 2000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return pwrite(fd, data[:1000], offset)

        monkeypatch.setattr(os, "pwrite", full)
        answer = deadline._answer(request, file.fileno())
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
        monkeypatch.setattr(deadline, "START_TIMEOUT_S", 0.0)
        with pytest.raises(CrashedReader, match=r"jpg: the process to decode it did not start within 0 s"):
            reader.read(good, max_pixels=10**6, timeout_s=30)
        assert reader_children() == others
    finally:
        reader.close()
    assert reader_children() == others


def reader_children() -> set[psutil.Process]:
    return {one for one in psutil.Process().children() if "workflows.deadline" in one.cmdline()}


@pytest.mark.timeout(600)
def test_a_killed_run_goes_on_where_it_stopped(
    undisturbed: Path, many_images: Path, ensemble: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    path = write_config(tmp_path / "score.yaml", many_images, ensemble, out)
    line = [sys.executable, str(ROOT / "workflows" / "score_images.py"), "--config", str(path)]
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    driver = subprocess.Popen(line, env=env, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: len(records(out)) >= 5)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    before = records(out)
    assert len(before) < 40 and not (out / "manifest.json").exists()
    again = subprocess.run(line, env=env, check=False, capture_output=True, text=True, timeout=280)
    assert again.returncode == 0, again.stdout + again.stderr
    assert before.items() <= records(out).items()  # what was done was not done again
    assert result(out) == result(undisturbed)
    assert not list(out.rglob("*.tmp"))


@pytest.mark.timeout(600)
def test_lost_actors_nodes_and_drivers_leave_no_trace(
    undisturbed: Path, many_images: Path, ensemble: str, tmp_path: Path
) -> None:
    chaos = Chaos(write_config(tmp_path / "score.yaml", many_images, ensemble, tmp_path / "out"), random.Random(0))
    try:
        chaos.run(tmp_path / "out", max_kills=3, num_images=40, timeout_s=400)
    finally:
        chaos.close()
    assert chaos.killed["node"] and chaos.killed["driver"], chaos.killed
    assert result(tmp_path / "out") == result(undisturbed)


def test_an_image_that_kills_its_actor_is_found_and_the_others_go_on(
    undisturbed: Path, many_images: Path, ensemble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items, _, _ = score_images.find_images(str(many_images))
    poison, other = items[:2]

    class Poisoned(ScoreActor):
        def __call__(self, table: pa.Table) -> pa.Table:
            if poison["id"] in table["id"].to_pylist():
                os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory runs out
            return super().__call__(table)

    def pipeline(found: ray.data.Dataset, work: Work, plan: ScorePlan, ledger: Any) -> ray.data.Dataset:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(score_cluster, "ScoreActor", Poisoned)
            patch.setattr(score_cluster, "MAX_TASK_RETRIES", 0)
            return score_cluster._predict_and_finish(found, work, plan, ledger)

    out, chosen = str(tmp_path / "out"), settings(many_images, ensemble, tmp_path / "out")
    members = Ensemble(tuple(inference.find_checkpoints(ensemble)), "", chosen.inference, use_gpu=False, threads=1)
    work = score_images._work(chosen, out, members)
    plan, wanted = ScorePlan(1, 0, 0.75, 0.25, None, ""), ScoreResources()
    rows = list(score_cluster._restarting(pipeline, work, [poison, other], wanted, plan))
    assert {row["id"]: row["reason"] for row in rows} == {poison["id"]: "crashed_prediction", other["id"]: None}
    record = storage.read_json(work.task.file("records", poison["id"]))
    assert re.search(r"failed over it alone, twice \(.*Actor.*Error.*if memory ran out", record["message"])
    name = f"maps/{other['id']}.png"
    assert (tmp_path / "out" / name).read_bytes() == (undisturbed / name).read_bytes()

    monkeypatch.setattr(score_cluster, "MAX_FRUITLESS", 1)
    with pytest.raises(StasError, match=r"pipelines failed one after the other .* at last over 1 image.*: .*Error"):
        list(score_cluster._restarting(pipeline, work, [poison], wanted, plan))


POOL = 40


def record_crashes(task: Any, blame: Blame[Any]) -> Iterator[dict[str, Any]]:
    return ({"id": item["id"], "reason": "blamed"} for item, _ in blame.settle())


@settings_of_hypothesis(max_examples=60, deadline=None)
@given(
    poison=st.sets(st.integers(0, POOL - 1), max_size=14),
    ahead=st.integers(0, 6),
    lost=st.sets(st.integers(0, 8), max_size=3),
)
def test_whatever_images_end_their_process_the_others_are_finished_once(
    poison: set[int], ahead: int, lost: set[int]
) -> None:
    """Who is to blame, on a pretended pipeline: `ahead` further images come before it fails, and others are suspect."""
    runs: list[int] = []
    rng = random.Random(ahead)

    def follow(_pipeline: Any, _work: Any, items: list[Any], *_: Any) -> Iterator[dict[str, Any]]:
        runs.append(len(items))
        for index, item in enumerate(items):
            if len(runs) in lost and index == 3:
                raise NodeLost("a node was lost")
            if int(item["id"]) in poison:
                rest = (one for one in items[index:] if int(one["id"]) not in poison)
                yield from ({"id": one["id"], "reason": None} for one in itertools.islice(rest, ahead))
                begun = rng.sample(items, min(len(items), 3))  # by other actors, or before the last was finished
                raise Interrupted("RayActorError", {item["id"], *(one["id"] for one in begun)})
            yield {"id": item["id"], "reason": None}

    items = [{"id": str(index)} for index in range(POOL)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_cluster, "_follow", follow)
        patch.setattr(score_cluster, "fit_to_cluster", lambda plan, wanted: plan)
        patch.setattr(score_cluster, "_record_crashes", record_crashes)
        plan = ScorePlan(1, 0, 0.75, 0.25, None, "", images_per_block=1)
        work: Any = SimpleNamespace(task=None)
        rows = list(score_cluster._restarting(None, work, items, ScoreResources(), plan))  # type: ignore[arg-type]
    assert sorted(int(row["id"]) for row in rows) == list(range(POOL))
    assert {int(row["id"]) for row in rows if row["reason"] == "blamed"} == poison
    assert len(runs) <= 12 + 8 * len(poison)


@pytest.mark.parametrize(("num_poison", "finished"), [(1, None), (7, None), (30, {"id": "done"})])
def test_images_that_all_end_their_process_are_all_recorded(
    num_poison: int, finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a run is repeated that ended with just these: an image that was finished then tells that all is well."""

    def follow(_pipeline: Any, _work: Any, items: list[Any], *_: Any) -> Iterator[dict[str, Any]]:
        if items != [finished]:
            raise Interrupted("RayActorError", {items[0]["id"]})
        yield {"id": "done", "reason": None}

    monkeypatch.setattr(score_cluster, "_follow", follow)
    monkeypatch.setattr(score_cluster, "fit_to_cluster", lambda plan, wanted: plan)
    monkeypatch.setattr(score_cluster, "_record_crashes", record_crashes)
    items, plan = [{"id": str(index)} for index in range(num_poison)], ScorePlan(1, 0, 0.75, 0.25, None, "")
    work: Any = SimpleNamespace(task=None)
    found = score_cluster._restarting(None, work, items, ScoreResources(), plan, finished)  # type: ignore[arg-type]
    assert sorted(int(row["id"]) for row in found) == list(range(num_poison))


@pytest.mark.parametrize("suspected", [0, 1, 3])
@pytest.mark.parametrize("known_good", [False, True])
def test_a_fault_that_no_image_causes_ends_the_run_and_blames_none(
    suspected: int, known_good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []

    def follow(_pipeline: Any, _work: Any, items: list[Any], *_: Any) -> Iterator[dict[str, Any]]:
        runs.append(len(items))
        if len(runs) == 1 and known_good:
            yield from ({"id": item["id"], "reason": None} for item in items[:5])
        raise Interrupted("RayActorError", {item["id"] for item in items[-suspected:]} if suspected else ())

    monkeypatch.setattr(score_cluster, "_follow", follow)
    monkeypatch.setattr(score_cluster, "fit_to_cluster", lambda plan, wanted: plan)
    items = [{"id": str(index)} for index in range(1000)]
    plan = ScorePlan(1, 0, 0.75, 0.25, None, "")
    work: Any = SimpleNamespace(task=None)
    found = score_cluster._restarting(None, work, items, ScoreResources(), plan)  # type: ignore[arg-type]
    if known_good:
        assert [row["id"] for row in itertools.islice(found, 5)] == ["0", "1", "2", "3", "4"]
    with pytest.raises(
        StasError, match=r"failed one after the other without an image to blame, .*RayActorError.*again"
    ):
        next(found)
    # The last asked whether an image that was finished still can be, where one was and any was suspect.
    assert len(runs) == 8 + (known_good and suspected > 0)


def test_an_unexplained_failure_ends_the_run_though_a_known_image_can_be_finished(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def follow(_pipeline: Any, _work: Any, items: list[Any], *_: Any) -> Iterator[dict[str, Any]]:
        if len(items) > 1:
            raise Interrupted("RayError")
        yield {"id": items[0]["id"], "reason": None}

    monkeypatch.setattr(score_cluster, "_follow", follow)
    monkeypatch.setattr(score_cluster, "fit_to_cluster", lambda plan, wanted: plan)
    work: Any = SimpleNamespace(task=None)
    items, plan = [{"id": "0"}, {"id": "1"}], ScorePlan(1, 0, 0.75, 0.25, None, "")
    with pytest.raises(StasError, match="without an image to blame"):
        list(score_cluster._restarting(None, work, items, ScoreResources(), plan, {"id": "done"}))  # type: ignore[arg-type]


def test_a_calibration_that_never_comes_is_given_up(
    ray_nodes: list[Node], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(score_cluster, "_calibrate", lambda *_: time.sleep(60))
    plan, wanted = ScorePlan(1, 0, 0.75, 0.25, None, ""), ScoreResources(stall_timeout_s=1.0)
    work = Work(Ensemble((), "", inference.InferenceConfig(), False, 1), None)  # type: ignore[arg-type]
    assert score_cluster.calibrate(work, [], wanted, plan) is None
    assert "no calibration: nothing was timed within 1 s" in capsys.readouterr().out


def test_blocked_readers_are_no_stall(ray_nodes: list[Node], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A block of images whose readers all block takes longer than the stall's own time, and is waited for."""

    def pipeline(found: ray.data.Dataset, work: Work, plan: ScorePlan, ledger: Any) -> ray.data.Dataset:
        def wait(row: dict[str, Any]) -> dict[str, Any]:
            time.sleep(6)
            return row

        return found.map(wait)

    task = ScoreTask(str(tmp_path), "", PostprocessConfig(), SaveConfig(), LimitsConfig(timeout_s=30))
    work = Work(Ensemble((), "", inference.InferenceConfig(), False, 1), task)
    plan = ScorePlan(1, 0, 0.75, 0.25, None, "", images_per_block=1)
    rows = score_cluster._follow(pipeline, work, [{"id": "a"}], plan, stall_s=1)
    assert [row["id"] for row in rows] == ["a"]
    impatient = replace(task, limits=LimitsConfig(timeout_s=0.1, retries=0))
    with pytest.raises(Interrupted, match="no image was finished for"):
        list(score_cluster._follow(pipeline, replace(work, task=impatient), [{"id": "a"}], plan, stall_s=1))


LOGICAL_GPUS = """
import sys
from pathlib import Path
from stas_core import config
from workflows import score_images
from workflows.runtime import ray_session
with ray_session(num_cpus=2, num_gpus=1):
    sys.exit(score_images.run(config.load_config(score_images.ScoreConfig, Path(sys.argv[1])), False))
"""


def test_actors_share_a_logical_gpu_after_a_calibration(
    undisturbed: Path, many_images: Path, ensemble: str, tmp_path: Path
) -> None:
    path, out = tmp_path / "run.yaml", tmp_path / "out"
    wanted = {"gpus_per_actor": 1, "cpus_per_actor": 0.5, "cpus_per_task": 0.5, "logical_gpus": True}
    write_config(path, many_images, ensemble, out, resources=wanted)
    line = [sys.executable, "-c", LOGICAL_GPUS, str(path)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=240, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "calibrated: per image: decode" in done.stdout
    assert "1 actor(s) of 0.5 CPU and 1 GPU fit beside tasks of 0.5 CPU" in done.stdout
    assert "GPU busy n/a" in done.stdout and "bottleneck: " in done.stdout
    settled = storage.read_json(str(out / "plan.json"))
    assert (settled["batch_size"], settled["batch_px"]) == (1, None)
    assert result(out) == result(undisturbed)


def test_reading_rests_while_enough_images_wait(ray_nodes: list[Node], tmp_path: Path) -> None:
    note = tmp_path / "read"

    def read(table: pa.Table) -> pa.Table:
        with note.open("a") as file:
            file.write(".")
        return pa.table({"image": [bytes(4 * 2**20)]})

    class Slow:
        def __init__(self) -> None:
            time.sleep(2)

        def __call__(self, table: pa.Table) -> pa.Table:
            time.sleep(0.1)
            return pa.table({"num_read": [note.stat().st_size]})

    def pipeline(found: ray.data.Dataset, work: Any, plan: ScorePlan, ledger: Any) -> ray.data.Dataset:
        rows = {"batch_format": "pyarrow", "batch_size": 1}
        pool = ray.data.ActorPoolStrategy(size=1)
        return found.map_batches(read, num_cpus=0.25, **rows).map_batches(Slow, num_cpus=0.5, compute=pool, **rows)

    plan = ScorePlan(1, 0, 0.5, 0.25, 64, "", images_per_block=1)
    assert plan.run_ahead_bytes == 32 * 2**20
    items = [{"id": str(number)} for number in range(80)]
    done = [row for rows in score_cluster._conduct(pipeline, None, items, plan, None) for row in rows]  # type: ignore[arg-type]
    assert len(done) == 80
    ahead = [row["num_read"] - number for number, row in enumerate(done)]
    assert max(ahead) < 30  # 8 images wait, a few are on their way; without a limit nearly all 80 would be read at once


@pytest.mark.parametrize(
    ("nodes", "wanted", "expected"),
    [
        ([Node(1)], {}, (1, 0, 0.75, 0.25)),
        ([Node(2)], {}, (2, 0, 0.75, 0.25)),
        ([Node(2), Node(2), Node(0)], {}, (4, 0, 0.75, 0.25)),
        ([Node(16)], {"threads_per_actor": 4}, (4, 0, 3.0, 0.25)),
        ([Node(16, 8)], {}, (8, 1.0, 1.0, 1.0)),
        ([Node(8, 8)], {}, (8, 1.0, 0.5, 0.25)),
        ([Node(16, 1), Node(16)], {"gpus_per_actor": 0.25}, (4, 0.25, 1.0, 1.0)),
        ([Node(16, 2)], {"actors": 1}, (1, 1.0, 1.0, 1.0)),
    ],
)
def test_the_plan_leaves_room_for_the_tasks(
    nodes: list[Node], wanted: dict[str, Any], expected: tuple[float, ...]
) -> None:
    plan = plan_scoring(nodes, ScoreResources(**wanted))
    assert (plan.actors, plan.gpus_per_actor, plan.cpus_per_actor, plan.cpus_per_task) == expected
    assert plan.actors * plan.cpus_per_actor + plan.cpus_per_task <= sum(node.num_cpus for node in nodes)


@pytest.mark.parametrize(
    ("nodes", "wanted", "message"),
    [
        ([Node(2)], {"actors": 3}, r"2 actor\(s\) of 0.75 CPU.* asked for: resources.actors = 3"),
        ([Node(2)], {"gpus_per_actor": 1}, r"1 node\(s\) with 2 CPU and 0 GPU: 0 actor\(s\)"),
        ([Node(0)], {}, r"0 actor\(s\).*add nodes"),
        ([Node(1)], {"cpus_per_actor": 1}, r"0 actor\(s\) of 1 CPU.*beside tasks of 0.25 CPU"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_arithmetic(
    nodes: list[Node], wanted: dict[str, Any], message: str
) -> None:
    with pytest.raises(ResourceError, match=message):
        plan_scoring(nodes, ScoreResources(**wanted))


def test_calibration_leaves_cores_to_the_slowest_step() -> None:
    plan = plan_scoring([Node(4)], ScoreResources())
    assert Calibration(0.02, 1.0, 0.02, 1).fit(plan).actors == 4
    assert Calibration(0.02, 0.02, 0.02, 1).fit(plan).actors == 2
    assert Calibration(1.0, 0.01, 0.02, 1).fit(plan).actors == 1


def test_calibration_stops_at_the_batch_that_does_not_fit(
    phantom_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Actor:
        def __init__(self, ensemble: Ensemble, save: SaveConfig):
            self._batch_size = ensemble.inference.batch_size or 1

        def __call__(self, table: pa.Table) -> pa.Table:
            time.sleep(0.05)
            fits = {"prob": bytes(96 * 128), "mean_disagreement": 0.0, "num_passes": 4, "predict_s": 0.05}
            done = fits if self._batch_size < 4 else {"reason": "out_of_memory", "message": "too large"}
            empty = dict.fromkeys(PREDICTED.names)
            return pa.Table.from_pylist([empty | row | done for row in table.to_pylist()], schema=PREDICTED)

    monkeypatch.setattr(score_cluster, "ScoreActor", Actor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    task = ScoreTask(str(tmp_path), "", PostprocessConfig(), SaveConfig(), LimitsConfig())
    work = score_cluster.Work(Ensemble((), "", inference.InferenceConfig(), True, 1), task)
    items = [{"id": path.stem, "image_uri": str(path), "stamp": ""} for path in (phantom_folder / "images").iterdir()]
    found = score_cluster._calibrate(work, items[:1])
    assert found is not None and (found.batch_size, found.batch_px) == (2, 2 * 96 * 128)
    too_large = replace(work, ensemble=work.ensemble.with_batches(8, None))
    assert score_cluster._calibrate(too_large, items[:1]) is None
    assert score_cluster._calibrate(too_large, items[:1], work) is not None


def test_what_is_left_of_a_cluster_is_used_or_refused_with_the_arithmetic(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ScoreResources()
    on_gpus = plan_scoring([Node(8, 2), Node(8)], wanted)
    monkeypatch.setattr(score_cluster, "cluster_nodes", lambda: [Node(8, 2), Node(8)])
    assert score_cluster.fit_to_cluster(on_gpus, wanted) is on_gpus
    monkeypatch.setattr(score_cluster, "cluster_nodes", lambda: [Node(8, 1), Node(8)])
    assert score_cluster.fit_to_cluster(on_gpus, wanted).actors == 1
    assert "going on with 1 of 2 actor(s): 2 node(s) with 16 CPU and 1 GPU" in capsys.readouterr().out
    monkeypatch.setattr(score_cluster, "cluster_nodes", lambda: [Node(8)])
    with pytest.raises(ResourceError, match=r"8 CPU and 0 GPU: 0 actor\(s\) of 1 CPU and 1 GPU fit"):
        score_cluster.fit_to_cluster(on_gpus, wanted)


def test_a_plan_belongs_to_what_it_was_calibrated_for(tmp_path: Path) -> None:
    run = settings(tmp_path / "images", "", tmp_path)

    def settled(weights: str, *, use_gpu: bool = True, run: ScoreConfig = run) -> InferenceConfig:
        return score_images._ensemble(run, str(tmp_path), [], weights, use_gpu=use_gpu).inference

    key = Ensemble((), "these", run.inference, use_gpu=True, threads=1).key
    storage.write_json(str(tmp_path / "plan.json"), {"batch_size": 4, "batch_px": 900, "calibrated_for": key})
    assert (settled("these").batch_size, settled("these").batch_px) == (4, 900)
    assert settled("others").batch_size is None and settled("these", use_gpu=False).batch_size is None
    more_work = run.model_copy(update={"inference": run.inference.model_copy(update={"turns": True})})
    assert settled("these", run=more_work).batch_size is None


def test_a_plan_whose_batch_no_longer_fits_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = settings(tmp_path / "images", "", tmp_path, resources={"calibrate": True})
    models = Ensemble((), "", run.inference, use_gpu=True, threads=1)
    tried: list[int | None] = []

    def calibrate(work: Work, *_: Any, otherwise: Work) -> Calibration | None:
        tried.extend(one.ensemble.inference.batch_size for one in (work, otherwise))
        return Calibration(0.01, 1.0, 0.01, 2, 900)

    monkeypatch.setattr(score_cluster, "calibrate", calibrate)
    items = [{"id": str(index), "image_uri": "", "stamp": ""} for index in range(100)]
    work = score_images._work(run, str(tmp_path), models.with_batches(8, 7200))
    plan = plan_scoring([Node(8, 1)], run.resources)
    work, _ = score_images._settle(run, work, items, plan)
    assert tried == [8, None] and work.ensemble.inference.batch_size == 2
    settled = {"batch_size": 2, "batch_px": 900, "calibrated_for": models.key}
    assert storage.read_json(str(tmp_path / "plan.json")) == settled


def test_images_and_outputs_must_not_lie_within_each_other(phantom_folder: Path, ensemble: str, tmp_path: Path) -> None:
    source = tmp_path / "images"
    shutil.copytree(phantom_folder / "images", source)
    for out in (source, source / "scores", tmp_path):
        with pytest.raises(ConfigError, match="lie within each other"):
            score_images.run(settings(source, ensemble, out), True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match=r"other, which holds none of this stage's outputs, .* has thesis\.txt"):
        score_images.run(settings(source, ensemble, tmp_path / "other"), True)
    assert len(list(source.iterdir())) == 8 and (tmp_path / "other" / "thesis.txt").exists()


def test_the_folder_of_another_stage_is_left_alone(
    ray_nodes: list[Node], phantom_folder: Path, ensemble: str, tmp_path: Path
) -> None:
    """A slip in out= must not cost a cohort its masks, nor a stranger's folder its own."""
    cohort, strange = tmp_path / "cohort", tmp_path / "strange"
    for folder in (cohort, strange):
        storage.write_bytes(f"{folder}/masks/truth.png", b"drawn by hand")
    storage.write_json(f"{cohort}/manifest.json", {"stage": "prepare_data"})
    source = phantom_folder / "images"
    for force in (False, True):
        with pytest.raises(StaleOutputError, match="cohort holds what prepare_data made, not score_images"):
            score_images.run(settings(source, ensemble, cohort), force)
        with pytest.raises(
            ConfigError, match=r"strange(, which holds none of this stage| has masks/, which score_images)"
        ):
            score_images.run(settings(source, ensemble, strange), force)
    within = make_ensemble(tmp_path / "models" / "run")
    with pytest.raises(ConfigError, match=r"out = .*models holds ensemble.uri = .*, which is read"):
        score_images.run(settings(source, within, tmp_path / "models"), False)
    for folder in (cohort, strange):
        assert [path.name for path in (folder / "masks").iterdir()] == ["truth.png"]


def test_ids_that_name_no_file_are_refused_and_the_rest_goes_on(tmp_path: Path) -> None:
    bad = ["", ".hidden", "slide/field", "../field", "a\\b", "ä" * 101]
    rows = [{"id": name, "image_uri": f"{number}.png"} for number, name in enumerate([*bad, "good", "ä" * 100])]
    source = str(tmp_path / "list.parquet")
    storage.write_table(source, pa.Table.from_pylist(rows))
    items, refused, _ = score_images.find_images(source)
    assert [item["id"] for item in items] == ["good", "ä" * 100]
    assert {row["id"]: row["reason"] for row in refused} == dict.fromkeys(bad, "unusable_id")
    assert all("names no file; give 1 to 200 bytes without" in row["message"] for row in refused)
    storage.write_table(source, pa.Table.from_pylist([*rows, {"id": "x", "image_uri": None}]))
    with pytest.raises(ConfigError, match="row 8 has no image_uri"):
        score_images.find_images(source)


def test_weights_that_do_not_load_are_told_before_anything_starts(phantom_folder: Path, tmp_path: Path) -> None:
    run = Path(make_ensemble(tmp_path / "run"))
    weights = run / "fold_1" / "checkpoints" / "last" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="fold_1/checkpoints/last"):
        score_images.run(settings(phantom_folder / "images", str(run), tmp_path / "out"), False)


def test_a_list_may_name_files_that_are_gone(tmp_path: Path) -> None:
    rows = [{"id": 7, "image_uri": "there.png"}, {"id": 8, "image_uri": "gone.png"}]
    storage.write_bytes(str(tmp_path / "there.png"), b"")
    storage.write_table(str(tmp_path / "list.parquet"), pa.Table.from_pylist(rows))
    items, _, _ = score_images.find_images(str(tmp_path / "list.parquet"))
    assert [item["id"] for item in items] == ["7", "8"]
    assert items[1]["stamp"].endswith("gone.png unreadable")
    task = ScoreTask(str(tmp_path), "", PostprocessConfig(), SaveConfig(), LimitsConfig())
    decoded = score_worker.decode(task, pa.Table.from_pylist(items))
    assert decoded["reason"].to_pylist() == ["empty_file", "unreadable_file"]


def test_the_contact_sheet_needs_no_image(
    undisturbed: Path, many_images: Path, ensemble: str, capsys: pytest.CaptureFixture[str]
) -> None:
    task = ScoreTask(str(undisturbed), "", PostprocessConfig(), SaveConfig(), LimitsConfig())
    record = next(one for one in score_images._read_records(str(undisturbed)) if one["num_targets"])
    whole = score_images._contact_sheet(task, [record])
    assert whole != score_images._contact_sheet(task, [record | {"image_uri": "/gone.jpg"}])
    assert f"{record['id']} is drawn on white: cannot read /gone.jpg" in capsys.readouterr().out


def test_wrong_sources_are_named(tmp_path: Path, phantom_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no images"):
        (tmp_path / "empty").mkdir()
        score_images.find_images(str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match=r"needs a cohort\.parquet"):
        score_images.find_images(str(phantom_folder / "images"), "hold-out")


def test_a_cohort_is_a_list_of_images(cohort_uri: str) -> None:
    items, twice, _ = score_images.find_images(cohort_uri, "train")
    assert len(items) == 8 and not twice
    with pytest.raises(ConfigError, match="holds no images"):
        score_images.find_images(cohort_uri, "hold-out")
