"""What a run does again: only what depends on what has changed; no record vouches for files of another run."""

import gzip
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from stas_core import config, storage
from stas_core.errors import (
    ConfigError,
)
from stas_core.predict import geojson
from stas_core.predict.postprocess import PostprocessConfig
from tests.scoring.here import score_images_here
from tests.workflows.chaos import result
from tests.workflows.made import settings
from workflows import score_images
from workflows.evaluation import pairing
from workflows.score_images import ScoreConfig
from workflows.scoring import tasks
from workflows.scoring.settling import read_standings, split_todo
from workflows.scoring.tasks import PREDICTED, Item, LimitsConfig, SaveConfig, ScoreTask

SETTINGS = settings("/data/images", "/data/run", "/data/out")
CPU: dict[str, Any] = {"use_gpu": False, "weights": "these"}


def keys(change: dict[str, Any], *, weights: str, use_gpu: bool) -> tuple[str, str]:
    """Return what a map depends on beside its image, and what the other files do."""
    changed = config.build(ScoreConfig, config.merge(SETTINGS.model_dump(mode="json"), change))
    models = score_images.choose_models(changed, "/data/out", ["a", "b"], weights, use_gpu=use_gpu)
    task = score_images.make_work(changed, "/data/out", models).task
    return task.predict_key, task.finish_key


@pytest.mark.parametrize(
    ("change", "models", "predicts_anew", "finishes_anew"),
    [
        ({"inference": {"flips": ["identity"]}}, {}, True, True),
        ({"inference": {"turns": True}}, {}, True, True),
        ({"inference": {"amp": "bf16"}}, {}, True, True),
        ({"inference": {"adaptive_px": 9}}, {}, True, True),
        ({"inference": {"batch_size": 2}}, {}, True, True),
        ({"resources": {"threads_per_actor": 2}}, {}, True, True),
        ({}, {"weights": "others"}, True, True),
        ({}, {"use_gpu": True}, True, True),
        ({"postprocess": {"min_target_px": 300}}, {}, False, True),
        ({"postprocess": {"border_fill": "none"}}, {}, False, True),
        ({"inference": {"batch_size": 1}}, {}, False, False),  # what none stands for
        ({"resources": {"actors": 2, "cpus_per_task": 0.5, "object_store_mb": 99}}, {}, False, False),
        ({"save": {"overlays": False, "disagreement": False}}, {}, False, False),
        ({"limits": {"max_pixels": 5, "timeout_s": 1.0}}, {}, False, False),
        ({"data": {"images": "/elsewhere"}, "out": "/elsewhere", "max_failed_fraction": 0.5}, {}, False, False),
    ],
)
def test_what_outputs_depend_on(
    change: dict[str, Any], models: dict[str, Any], predicts_anew: bool, finishes_anew: bool
) -> None:
    before, after = keys({}, **CPU), keys(change, **CPU | models)
    assert (before[0] != after[0], before[1] != after[1]) == (predicts_anew, finishes_anew)


class Run:
    """A run of three images in plain Python, and what is left to do of it for another task."""

    def __init__(self, folder: Path, **save: bool):
        self.task = ScoreTask(str(folder), "weights 1", PostprocessConfig(), SaveConfig(**save), LimitsConfig())
        self.items = [Item(id=name, image_uri=f"{name}.png", stamp="1") for name in "abc"]
        tasks.finish(self.task, pa.Table.from_pylist([predicted(item) for item in self.items], PREDICTED))

    def todo(self, **changes: Any) -> tuple[str, str]:
        """Return the ids of the images to predict, and of those to finish from their saved maps."""
        task = replace(self.task, **changes)
        standings = read_standings(task.run, self.items)
        fresh, from_maps = split_todo(self.items, standings, task)
        return "".join(item["id"] for item in fresh), "".join(item["id"] for item in from_maps)


def predicted(item: Item) -> dict[str, Any]:
    prob = np.zeros((20, 30), np.uint8)
    prob[5:15, 5:20] = 200
    values = {"height": 20, "width": 30, "prob": prob.tobytes(), "mean_disagreement": 0.0, "num_passes": 4}
    values |= {"part": tasks.LOOSE, "image": bytes(20 * 30 * 3), "decode_s": 0.0}
    return dict.fromkeys(PREDICTED.names) | values | dict(item)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.mark.parametrize(
    ("changes", "todo"),
    [
        ({}, ("", "")),
        ({"postprocess": PostprocessConfig(min_target_px=7)}, ("", "abc")),  # from the maps, which stay
        ({"predict_key": "weights 2"}, ("abc", "")),
        ({"save": SaveConfig(geojson=False)}, ("", "")),  # a kind of file less
        ({"save": SaveConfig(maps=False, overlays=False)}, ("", "")),
        ({"save": SaveConfig(disagreement=True)}, ("abc", "")),  # one more, which no map holds
        ({"save": SaveConfig(geojson_gz=True)}, ("", "abc")),  # one that it does
        ({"limits": LimitsConfig(max_pixels=599)}, ("abc", "")),  # too large now: to be reported
        ({"limits": LimitsConfig(max_pixels=600, timeout_s=1)}, ("", "")),
    ],
)
def test_changed_settings(run: Run, changes: dict[str, Any], todo: tuple[str, str]) -> None:
    assert run.todo(**changes) == todo


def test_files_of_an_older_format_are_written_anew_without_inference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, overlays=False)
    monkeypatch.setattr(geojson, "FORMAT", "a later one")
    assert run.todo() == ("", "abc")
    tasks.refinish(run.task, pa.Table.from_pylist(run.items))
    assert run.todo() == ("", "")


def test_the_compressed_geojson_is_the_plain_one(tmp_path: Path) -> None:
    run = Run(tmp_path, geojson_gz=True)
    assert run.todo() == ("", "")
    plain = Path(run.task.file("geojson", "a")).read_bytes()
    assert gzip.decompress(Path(run.task.file("geojson_gz", "a")).read_bytes()) == plain
    assert sorted(path.name for path in (tmp_path / "geojson").iterdir())[:2] == ["a.geojson", "a.geojson.gz"]
    (tmp_path / "geojson" / "b.geojson.gz").unlink()
    assert run.todo() == ("", "b")


def test_changed_images_and_lost_files(run: Run, tmp_path: Path) -> None:
    run.items[0]["stamp"] = "2"
    run.items.append({"id": "d", "image_uri": "d.png", "stamp": "1"})
    (tmp_path / "masks" / "b.png").unlink()
    (tmp_path / "maps" / "c.png").unlink()
    assert run.todo() == ("acd", "b")
    assert run.todo(save=SaveConfig(maps=False)) == ("ad", "b")  # the lost map is not wanted
    (tmp_path / "records" / "b.json").unlink()
    assert run.todo() == ("abcd", "")


@pytest.mark.parametrize(("reason", "again"), [("grey", ""), ("unreadable_file", "b"), ("slow", "b")])
def test_failures_are_tried_again_where_that_may_help(run: Run, reason: str, again: str) -> None:
    failed = predicted(run.items[1]) | {"reason": reason, "message": "", "prob": None}
    tasks.finish(run.task, pa.Table.from_pylist([failed], PREDICTED))
    assert run.todo() == (again, "")
    assert run.todo(limits=LimitsConfig(timeout_s=1)) == ("b", "")


def test_a_damaged_map_is_told_and_its_image_predicted_anew(run: Run, tmp_path: Path) -> None:
    task = replace(run.task, save=SaveConfig(overlays=False))
    damaged = tmp_path / "maps" / "a.png"
    damaged.write_bytes(damaged.read_bytes()[:50])
    (tmp_path / "geojson" / "a.geojson").unlink()
    assert run.todo(save=task.save) == ("", "a")
    (row,) = tasks.refinish(task, pa.Table.from_pylist(run.items[:1])).to_pylist()
    assert row["reason"] == "unreadable_file"
    record = task.run.record("a")
    assert record is not None and "the map that was saved is damaged, run again" in record.message
    assert run.todo(save=task.save) == ("a", "")


def test_a_stop_while_files_are_overwritten_leaves_no_false_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prob = np.zeros((20, 30), np.uint8)
    prob[5:15, 5:20] = 200
    item = Item(id="a", image_uri="a.png", stamp="1", part=tasks.LOOSE)
    empty = dict.fromkeys(PREDICTED.names) | item | {"decode_s": 0.0}
    row = empty | {"height": 20, "width": 30, "prob": prob.tobytes(), "mean_disagreement": 0.0, "num_passes": 4}
    save = SaveConfig(overlays=False)
    first = ScoreTask(str(tmp_path), "weights 1", PostprocessConfig(), save, LimitsConfig())

    def todo(task: ScoreTask) -> tuple[list[Any], list[Any]]:
        return split_todo([item], read_standings(task.run, [item]), task)

    def finish(task: ScoreTask) -> None:
        tasks.finish(task, pa.Table.from_pylist([row], schema=PREDICTED))

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


def test_a_run_that_goes_on_equals_one_from_the_start(
    phantom_folder: Path,
    ensemble: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    score_images_here(monkeypatch)
    source, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(phantom_folder / "images", source)
    first = settings(source, ensemble, out)
    assert score_images.run(first, False) == 0
    assert score_images.run(first, False) == 0
    assert "nothing to do" in capsys.readouterr().out
    # Other thresholds, and a kind of file less; a changed, a new and a removed image; a lost map.
    changed = settings(source, ensemble, out, save={"geojson": False, "disagreement": True})
    changed = changed.model_copy(update={"postprocess": first.postprocess.model_copy(update={"min_target_px": 300})})
    names = sorted(source.iterdir())
    Image.fromarray(np.full((50, 60, 3), 200, np.uint8)).save(names[0])
    shutil.copy(names[1], source / "new.jpg")
    names[2].unlink()
    (out / "maps" / f"{names[3].stem}.png").unlink()
    # Stopped while it gathers: nothing speaks of the run before.
    write = storage.copy_file

    def interrupt(path: str, uri: str) -> None:
        if uri.endswith("images.parquet"):
            raise KeyboardInterrupt
        write(path, uri)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(storage, "copy_file", interrupt)
        score_images.run(changed, False)
    assert "8 images: 3 to predict, 5 to finish from saved maps" in capsys.readouterr().out
    assert not (out / "manifest.json").exists()
    with pytest.raises(ConfigError, match=r"holds no images\.parquet"):
        pairing.read_run("run", str(out))
    # The same again has but to gather.
    again = config.load_config(ScoreConfig, out / "config.resolved.yaml")
    assert score_images.run(again, False) == 0
    assert "0 to predict, 0 to finish" in capsys.readouterr().out
    assert score_images.run(changed.model_copy(update={"out": str(tmp_path / "anew")}), False) == 0
    assert result(out) == result(tmp_path / "anew")
    assert not list((out / "geojson").glob("*")) and not (out / "masks" / f"{names[2].stem}.png").exists()
