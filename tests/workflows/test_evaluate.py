from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from stas_core import config, storage, tables
from stas_core.arrays import Mask, ProbMapU8
from stas_core.data import cohort, images
from stas_core.data.edges import mask_to_polygons
from stas_core.data.labelme import to_labelme
from stas_core.errors import ConfigError, StaleOutputError
from stas_core.failures import Failure
from stas_core.figures import contact_sheet
from stas_core.scores import evaluation, metrics
from stas_core.scores.evaluation import Comparison, ImageScore, SubsetScore
from tests.docs.documented import assert_documented
from workflows import evaluate
from workflows.evaluate import EvaluateConfig
from workflows.evaluation import pairing

pytestmark = pytest.mark.usefixtures("ray_nodes")

SIZE = (40, 60)
IDS = [f"{index:04d}" for index in range(12)]
FIGURES = {"dice_histogram.png", "dice_by_area.png", "examples.png"}


def truth_of(index: int) -> Mask:
    mask = np.zeros(SIZE, bool)
    mask[5:15, 5 : 10 + index] = True
    mask[25:30, 40:50] = index % 2 == 0
    return mask


def mask_of(index: int) -> Mask:
    """Return the truth moved by a pixel, and one invented target."""
    mask = np.roll(truth_of(index), 1, axis=1)
    mask[35:38, 2:6] = index % 3 == 0
    return mask


def map_of(index: int) -> ProbMapU8:
    noise = np.random.default_rng(index).integers(0, 150, SIZE)
    return np.where(mask_of(index), 250, noise).astype(np.uint8)


def write_run(folder: Path, masks: dict[str, Mask], maps: dict[str, ProbMapU8] | None = None) -> str:
    for name, mask in masks.items():
        storage.write_bytes(f"{folder}/masks/{name}.png", images.encode_mask(mask))
        pixels = np.full((*mask.shape, 3), (230, 180, 210), np.uint8)
        storage.write_bytes(f"{folder}/inputs/{name}.png", images.encode_png(pixels))
    for name, prob_map in (maps or {}).items():
        storage.write_bytes(f"{folder}/maps/{name}.png", images.encode_map(prob_map))
    rows = [{"id": name, "image_uri": f"{folder}/inputs/{name}.png"} for name in masks]
    tables.write_table(f"{folder}/images.parquet", pa.Table.from_pylist(rows))
    tables.write_table(f"{folder}/failures.parquet", pa.Table.from_pylist([], schema=tables.schema_of(Failure)))
    return str(folder)


@pytest.fixture
def run_folder(tmp_path: Path) -> str:
    masks = {name: mask_of(index) for index, name in enumerate(IDS)}
    return write_run(tmp_path / "run", masks, {name: map_of(index) for index, name in enumerate(IDS)})


@pytest.fixture
def truth_uri(tmp_path: Path) -> str:
    """Return a cohort of the twelve images: four groups, the last of them held out, two folds."""
    rows = []
    for index, name in enumerate(IDS):
        mask = truth_of(index)
        storage.write_bytes(f"{tmp_path}/cohort/masks/{name}.png", images.encode_mask(mask))
        share = float(mask.mean())
        group = index // 3
        rows.append(
            {"id": name, "image_uri": "-", "annotation_uri": "-", "mask_uri": f"masks/{name}.png"}
            | {"height": SIZE[0], "width": SIZE[1], "num_polygons": 1, "num_targets": 1, "target_areas_px": [1]}
            | {"foreground_share": share, "stratum": cohort.stratum_of(share), "group": f"slide {group}"}
            | {"split": "hold-out" if group == 3 else "train", "fold": None if group == 3 else group % 2}
            | {"stain_matrix": None, "stain_max_c": None, "findings": [], "fingerprint": f"f{index}"}
            | {"image_fingerprint": "-", "mask_fingerprint": cohort.mask_fingerprint(mask)}
        )
    cohort.write_cohort(f"{tmp_path}/cohort/cohort.parquet", rows)
    return f"{tmp_path}/cohort/cohort.parquet"


def settings(out: Path, run: str, **values: Any) -> EvaluateConfig:
    fast = {"bootstrap": {"num_resamples": 200}}
    return config.build(EvaluateConfig, config.merge(fast, {"out": str(out), "run": run, **values}))


def table(out: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = tables.read_table(f"{out}/{name}.parquet").to_pylist()
    return rows


def written(out: Path) -> dict[str, bytes]:
    names = ["scores.parquet", "summary.parquet", "comparisons.parquet", "failures.parquet", "report.md"]
    return {name: (out / name).read_bytes() for name in [*names, *(f"figures/{figure}" for figure in FIGURES)]}


def test_through_ray_equals_plain_python(run_folder: str, truth_uri: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = settings(out, run_folder, truth={"cohort": truth_uri})
    assert evaluate.run(made, False) == 0
    items, missing = pairing.pair(
        pairing.find_truth(made.truth, {}, pytest.fail)[0], pairing.read_run("run", run_folder)
    )
    plain = [evaluation.score_files(item, made.truth.annotation) for item in items]
    assert not missing
    assert sorted(evaluate.stream(items, made.truth.annotation), key=lambda one: one.id) == plain
    assert tables.read_rows(f"{out}/scores.parquet", ImageScore) == [one.score for one in plain]
    for name, schema in (
        ("scores", tables.schema_of(ImageScore)),
        ("summary", tables.schema_of(SubsetScore)),
        ("comparisons", tables.schema_of(Comparison)),
        ("failures", tables.schema_of(Failure)),
    ):
        assert tables.read_table(f"{out}/{name}.parquet").schema.equals(schema)
    assert {path.name for path in (out / "figures").iterdir()} == FIGURES | {"calibration.png"}
    assert storage.read_json(f"{out}/manifest.json")["report"] == ["report.html"]
    assert_documented("evaluate", out)


def test_level_counts_are_those_of_all_maps(run_folder: str, truth_uri: str) -> None:
    made = settings(Path("unused"), run_folder, truth={"cohort": truth_uri})
    items, _ = pairing.pair(pairing.find_truth(made.truth, {}, pytest.fail)[0], pairing.read_run("run", run_folder))
    results, levels = evaluate._score(items, made.truth.annotation)
    expected = sum(metrics.count_grey_levels(map_of(index), truth_of(index)) for index in range(len(IDS)))
    np.testing.assert_array_equal(levels, expected)
    assert all(one.levels is None for one in results)


def test_scores_are_those_of_the_arrays(run_folder: str, truth_uri: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert evaluate.run(settings(out, run_folder, truth={"cohort": truth_uri}), False) == 0
    rows = table(out, "scores")
    assert [row["id"] for row in rows] == IDS
    for index, row in enumerate(rows):
        counts = metrics.count(mask_of(index), truth_of(index))
        assert (row["dice"], row["tp"], row["fp"], row["fn"]) == (counts.dice, counts.tp, counts.fp, counts.fn)
        assert row["raw_dice"] == metrics.count(map_of(index) >= 128, truth_of(index)).dice
        assert row["num_truth"] == 1 + (index % 2 == 0)
        assert row["num_pred"] == row["num_truth"] + (index % 3 == 0)
        assert row["num_matched"] == row["num_truth"] and row["group"] == f"slide {index // 3}"
    overall = table(out, "summary")[0]
    assert (overall["num_images"], overall["num_groups"]) == (12, 4)
    assert overall["dice_mean"] == pytest.approx(np.mean([row["dice"] for row in rows]))
    assert (overall["num_matched"], overall["num_pred"], overall["num_truth"]) == (18, 22, 18)
    (compared,) = table(out, "comparisons")
    assert compared["difference"] == pytest.approx(np.mean([row["dice"] - row["raw_dice"] for row in rows]))
    assert compared["share_better"] == 1
    text = (out / "report.md").read_text()
    assert f"- Run: {run_folder}" in text and truth_uri in text and "scored 12; **without a score 0**" in text
    assert "### Post-processed: by group" in text and "| slide 0 | 3 |" in text


@pytest.mark.no_cover
def test_equal_work_gives_equal_bytes_and_a_second_run_does_nothing(
    run_folder: str, truth_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    made = settings(out, run_folder, truth={"cohort": truth_uri})
    assert evaluate.run(made, False) == 0
    before = written(out)
    assert evaluate.run(made, True) == 0
    assert written(out) == before

    def refuse(*_: Any) -> Any:
        raise AssertionError("nothing should be scored")

    monkeypatch.setattr(evaluate, "stream", refuse)
    assert evaluate.run(made, False) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert evaluate.plan(made, False)[0].work == "nothing: it is up to date"
    assert evaluate.plan(made, True)[0].work.startswith("12 images of the truth")
    monkeypatch.undo()
    assert evaluate.run(settings(out, run_folder, truth={"cohort": truth_uri}, bootstrap={"seed": 1}), False) == 0
    assert "(seed 1)" in (out / "report.md").read_text()  # other settings: done anew, for no partial work would be lost
    (Path(run_folder) / "masks" / "0003.png").write_bytes(images.encode_mask(truth_of(3)))
    assert evaluate.run(made, False) == 0
    assert table(out, "scores")[3]["dice"] == 1


def test_an_evaluation_is_made_anew_where_its_truth_is_another_or_read_otherwise(
    run_folder: str, truth_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(f"{tmp_path}/masks/{IDS[0]}.png", images.encode_mask(truth_of(0)))
    storage.write_bytes(f"{tmp_path}/labelme/{IDS[0]}.json", to_labelme([], SIZE, f"{IDS[0]}.jpg"))
    truths: dict[str, dict[str, Any]] = {
        "cohort": {"cohort": truth_uri},
        "masks": {"masks": f"{tmp_path}/masks"},
        "masks by nearness": {"masks": f"{tmp_path}/masks", "annotation": {"mask_tolerance": 9}},
        "annotations": {"annotations": f"{tmp_path}/labelme"},
    }

    def changed(before: dict[str, str]) -> set[str]:
        return {name for name, mark in marks().items() if mark != before.get(name)}

    def marks() -> dict[str, str]:
        made = {name: settings(Path("unused"), run_folder, truth=truth).truth for name, truth in truths.items()}
        return {
            name: pairing.find_pairs(run_folder, one, None, pytest.fail).fingerprint() for name, one in made.items()
        }

    before = marks()
    assert len(set(before.values())) == 4 and changed(before) == set()
    with monkeypatch.context() as otherwise:
        otherwise.setattr(pairing, "READ_AS", "another way")
        assert changed(before) == {"masks by nearness", "annotations"}
    rows = tables.read_table(truth_uri).to_pylist()
    rows[0]["mask_fingerprint"] = "of what other labels make of the same annotation"
    cohort.write_cohort(truth_uri, rows)
    assert changed(before) == {"cohort"}


def test_a_failed_evaluation_leaves_nothing_that_speaks_of_other_inputs(
    run_folder: str, truth_uri: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    made = settings(out, run_folder, truth={"cohort": truth_uri})
    assert evaluate.run(made, False) == 0
    for name in IDS:
        (Path(run_folder) / "masks" / f"{name}.png").write_bytes(b"no PNG")
    with pytest.raises(ConfigError, match="none of the 12 images of the truth has a score"):
        evaluate.run(made, False)
    left = {path.name for path in out.iterdir()}
    assert left == {"claim.json", "config.resolved.yaml", "failures.parquet"}  # why each image has none


def test_inputs_and_other_stages_outputs_are_never_written_over(
    run_folder: str, truth_uri: str, tmp_path: Path
) -> None:
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    truth = {"cohort": truth_uri}
    for out, values, message in (
        (Path(run_folder), {"truth": truth}, f"out = {run_folder} holds run = {run_folder}, which is read"),
        (Path(truth_uri).parent, {"truth": truth}, "holds truth.cohort = .*cohort.parquet, which is read"),
        (tmp_path / "other", {"truth": truth, "against": f"{tmp_path}/other"}, "holds against = "),
        (tmp_path, {"truth": {"masks": f"{tmp_path}/cohort/masks"}}, "holds "),
    ):
        for force in (False, True):
            with pytest.raises(ConfigError, match=message):
                evaluate.run(settings(out, run_folder, **values), force)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before
    storage.write_json(f"{tmp_path}/scores/claim.json", {"stage": "score_images"})
    with pytest.raises(StaleOutputError, match="holds what score_images made, not evaluate"):
        evaluate.run(settings(tmp_path / "scores", run_folder, truth=truth), True)


@pytest.mark.no_cover
def test_only_the_chosen_part_of_the_cohort_counts(run_folder: str, truth_uri: str, tmp_path: Path) -> None:
    def ids(name: str, **truth: Any) -> list[str]:
        made = settings(tmp_path / name, run_folder, truth={"cohort": truth_uri, **truth})
        assert evaluate.run(made, False) == 0
        return [row["id"] for row in table(tmp_path / name, "scores")]

    assert ids("a", split="hold-out") == IDS[9:]
    text = (tmp_path / "a" / "report.md").read_text()
    assert "that are not in this truth: 9, left out" in text
    assert "- Scored images by split: 3 hold-out, 0 of the training split" in text and "Warning" not in text
    assert ids("b", split="train", folds=[0]) == IDS[:3] + IDS[6:9]
    assert "**Warning: 6 of the scored images are of the training split.**" in (tmp_path / "b/report.md").read_text()
    assert ids("all") == IDS
    text = (tmp_path / "all" / "report.md").read_text()
    assert "3 hold-out, 9 of the training split" in text and "**Warning: 9 of the scored images" in text
    with pytest.raises(ConfigError, match=r"truth.folds = \[7\]: the cohort has folds \[0, 1\]"):
        ids("c", folds=[7])
    with pytest.raises(ConfigError, match="leaves none of the 12 images"):
        ids("d", split="hold-out", folds=[0])


@pytest.mark.no_cover
def test_masks_and_annotations_are_truth_as_well(run_folder: str, tmp_path: Path) -> None:
    for index, name in enumerate(IDS):
        mask = truth_of(index)
        storage.write_bytes(f"{tmp_path}/truth/{name}.png", images.encode_mask(mask))
        outline = to_labelme(mask_to_polygons(mask), SIZE, f"{name}.jpg")
        storage.write_bytes(f"{tmp_path}/labelme/{name}.json", outline)
    assert evaluate.run(settings(tmp_path / "a", run_folder, truth={"masks": f"{tmp_path}/truth"}), False) == 0
    assert evaluate.run(settings(tmp_path / "b", run_folder, truth={"annotations": f"{tmp_path}/labelme"}), False) == 0
    assert table(tmp_path / "a", "scores") == table(tmp_path / "b", "scores")
    beside = storage.list_files(f"{run_folder}/inputs")[0]  # an image is no mask of itself, wherever it lies
    Path(f"{tmp_path}/labelme/{IDS[0]}.json").unlink()
    for name in IDS[1:]:
        storage.write_bytes(f"{run_folder}/inputs/{name}.json", storage.read_bytes(f"{tmp_path}/labelme/{name}.json"))
    given = {"annotations": f"{run_folder}/inputs"}
    assert evaluate.run(settings(tmp_path / "c", run_folder, truth=given), False) == 0
    assert beside.endswith(f"{IDS[0]}.png") and len(table(tmp_path / "c", "scores")) == len(IDS) - 1
    assert "by split" not in (tmp_path / "a" / "report.md").read_text()  # files have none


def test_each_kind_of_example_has_a_row_of_its_own(
    run_folder: str, truth_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[list[str]] = []
    draw = contact_sheet.contact_sheet

    def watch(tiles: Any, *, columns: int, title: str) -> bytes:
        kinds = [tile.caption.split(":")[0] for tile in tiles]
        rows.extend(kinds[start : start + columns] for start in range(0, len(kinds), columns))
        return draw(tiles, columns=columns, title=title)

    monkeypatch.setattr(contact_sheet, "contact_sheet", watch)
    truth = {"cohort": truth_uri, "split": "train", "folds": [0]}  # six images
    assert evaluate.run(settings(tmp_path / "out", run_folder, truth=truth), False) == 0
    assert rows == [["best"] * 2, ["median"] * 2, ["worst"] * 2]


def test_every_image_without_a_score_is_reported_and_sets_the_exit_status(
    run_folder: str, truth_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = Path(run_folder), tmp_path / "out"
    rows = [row for row in tables.read_table(f"{run}/images.parquet").to_pylist() if row["id"] not in IDS[:2]]
    tables.write_table(f"{run}/images.parquet", pa.Table.from_pylist(rows))
    failed = {"id": IDS[0], "stage": "score_images", "reason": "unreadable_image", "message": "is damaged"}
    tables.write_table(f"{run}/failures.parquet", pa.Table.from_pylist([failed], schema=tables.schema_of(Failure)))
    (run / "masks" / f"{IDS[2]}.png").unlink()
    (run / "masks" / f"{IDS[3]}.png").write_bytes(images.encode_mask(truth_of(3)[:-1]))
    (run / "maps" / f"{IDS[4]}.png").write_bytes(images.encode_map(map_of(4)[:, :-2]))
    (run / "masks" / f"{IDS[5]}.png").write_bytes(b"no PNG")

    assert evaluate.run(settings(out, run_folder, truth={"cohort": truth_uri}), False) == 1
    found = {row["id"]: (row["stage"], row["reason"]) for row in table(out, "failures")}
    assert found == {
        IDS[0]: ("score_images", "unreadable_image"),
        IDS[1]: ("evaluate", "not_scored"),
        IDS[2]: ("evaluate", "not_scored"),
        IDS[3]: ("evaluate", "size_mismatch"),
        IDS[4]: ("evaluate", "size_mismatch"),
        IDS[5]: ("evaluate", "unreadable_image"),
    }
    messages = {row["id"]: row["message"] for row in table(out, "failures")}
    assert "has 60x39 px, the truth 60x40" in messages[IDS[3]] and f"no masks/{IDS[2]}.png" in messages[IDS[2]]
    assert [row["id"] for row in table(out, "scores")] == IDS[6:]
    text = (out / "report.md").read_text()
    assert "**without a score 6**" in text and "## Missing: 6" in text and "is damaged" in text
    assert f"missing: {IDS[1]}: not_scored" in capsys.readouterr().out

    assert evaluate.run(settings(out, run_folder, truth={"cohort": truth_uri}), False) == 1  # up to date, and still so
    assert evaluate.run(settings(out, run_folder, truth={"cohort": truth_uri}, max_missing_fraction=0.5), False) == 0
    assert evaluate.run(settings(out, run_folder, truth={"cohort": truth_uri}, max_missing_fraction=0.4), False) == 1


def test_two_runs_are_compared_on_their_common_images(
    run_folder: str, truth_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    perfect = {name: truth_of(index) for index, name in enumerate(IDS) if index not in (2, 3, 11)}
    other = write_run(tmp_path / "other", perfect)
    (tmp_path / "other" / "masks" / f"{IDS[0]}.png").write_bytes(images.encode_mask(truth_of(0)[1:]))
    (tmp_path / "other" / "masks" / f"{IDS[1]}.png").unlink()
    failed = {"id": IDS[2], "stage": "score_images", "reason": "slow", "message": "took too long"}
    tables.write_table(f"{other}/failures.parquet", pa.Table.from_pylist([failed], schema=tables.schema_of(Failure)))
    made = settings(tmp_path / "a", run_folder, truth={"cohort": truth_uri}, against=other)
    assert evaluate.run(made, False) == 0
    rows = table(tmp_path / "a", "scores")
    assert [row["against_dice"] for row in rows] == [None] * 4 + [1.0] * 7 + [None]
    compared = next(row for row in table(tmp_path / "a", "comparisons") if row["second"] == "against")
    assert (compared["num_images"], compared["second_mean"], compared["share_worse"]) == (7, 1, 1)
    assert compared["difference"] == pytest.approx(np.mean([row["dice"] for row in rows[4:11]]) - 1)
    found = {row["id"]: (row["stage"], row["reason"], row["message"]) for row in table(tmp_path / "a", "failures")}
    assert {name: reason for name, (_, reason, _) in found.items()} == {
        IDS[0]: "size_mismatch",
        IDS[1]: "not_scored",
        IDS[2]: "slow",
        IDS[3]: "not_scored",
        IDS[11]: "not_scored",
    }
    assert {stage for stage, _, _ in found.values()} == {"evaluate against"}
    assert found[IDS[2]][2] == "took too long" and found[IDS[3]][2].startswith(f"the other run has no image {IDS[3]}")
    text = (tmp_path / "a" / "report.md").read_text()
    assert "; 7 images in both runs and the truth are compared" in text and "## Not compared: 5" in text
    assert f"not compared: {IDS[2]}: slow: took too long" in capsys.readouterr().out

    # What the other run failed of is part of what is reported: it is done anew when that changes.
    changed = pa.Table.from_pylist([failed | {"reason": "crashed_prediction"}], schema=tables.schema_of(Failure))
    tables.write_table(f"{other}/failures.parquet", changed)
    assert evaluate.run(made, False) == 0
    assert "crashed_prediction" in (tmp_path / "a" / "report.md").read_text()

    made = settings(tmp_path / "b", run_folder, truth={"cohort": truth_uri}, against=run_folder)
    assert evaluate.run(made, False) == 0
    itself = [row for row in table(tmp_path / "b", "comparisons") if row["first"].startswith("run")]
    assert [row["second"] for row in itself] == ["against", "against, raw 0.5"]
    assert all((row["difference"], row["low"], row["high"], row["share_equal"]) == (0, 0, 0, 1) for row in itself)


@pytest.mark.no_cover
def test_maps_of_two_runs_are_compared_cut_at_half(run_folder: str, truth_uri: str, tmp_path: Path) -> None:
    masks = {name: mask_of(index) for index, name in enumerate(IDS)}
    maps = {name: np.where(truth_of(index), 130, 127).astype(np.uint8) for index, name in enumerate(IDS)}
    other = write_run(tmp_path / "other", masks, maps)
    (tmp_path / "other" / "maps" / f"{IDS[5]}.png").write_bytes(images.encode_map(map_of(5)[:-1]))
    made = settings(tmp_path / "a", run_folder, truth={"cohort": truth_uri}, against=other)
    assert evaluate.run(made, False) == 0
    rows = table(tmp_path / "a", "scores")
    assert [row["against_raw_dice"] for row in rows] == [1.0] * 5 + [None] + [1.0] * 6
    compared = next(row for row in table(tmp_path / "a", "comparisons") if row["second"] == "against, raw 0.5")
    assert (compared["first"], compared["num_images"], compared["second_mean"]) == ("run, raw 0.5", 11, 1)
    ours = [row["raw_dice"] for row in rows if row["id"] != IDS[5]]
    assert compared["difference"] == pytest.approx(np.mean(ours) - 1)
    (failure,) = table(tmp_path / "a", "failures")
    assert (failure["id"], failure["stage"], failure["reason"]) == (IDS[5], "evaluate against", "size_mismatch")

    without = write_run(tmp_path / "without", masks)
    assert evaluate.run(settings(tmp_path / "b", without, truth={"cohort": truth_uri}, against=other), False) == 0
    assert all(row["against_raw_dice"] is None for row in table(tmp_path / "b", "scores"))
    assert [row["second"] for row in table(tmp_path / "b", "comparisons")] == ["against"]


def test_a_run_without_maps_or_images_at_hand_is_scored_by_its_masks(
    truth_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", {name: mask_of(index) for index, name in enumerate(IDS)})
    for path in (tmp_path / "run" / "inputs").iterdir():
        path.unlink()
    out = tmp_path / "out"
    grouped = settings(out, run, truth={"cohort": truth_uri}, bootstrap={"by": "group"})
    assert evaluate.run(grouped, False) == 0
    assert {path.name for path in (out / "figures").iterdir()} == FIGURES
    assert table(out, "comparisons") == []
    assert {row["prediction"] for row in table(out, "summary")} == {"post-processed"}
    assert "example drawn on white: cannot read" in capsys.readouterr().out
    assert all(row["dice_low"] is None for row in table(out, "summary") if row["subset"] == "group")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"give one of truth.cohort, truth.masks, truth.annotations, truth.slides; now: none of them is set"),
        ({"truth": {"masks": "/m", "annotations": "/a"}}, "now: truth.masks = /m, truth.annotations = /a"),
        ({"truth": {"masks": "/m", "split": "train"}}, "truth.split = train needs truth.cohort"),
        ({"truth": {"masks": "/m"}, "bootstrap": {"by": "group"}}, "bootstrap.by = group needs truth.cohort"),
        ({"truth": {"masks": "{tmp}/empty"}}, "empty holds no .png, .* files"),
        ({"truth": {"masks": "{tmp}/twice"}}, "have the same name; ids must be unique, rename one"),
        ({"truth": {"masks": "{tmp}/other"}}, "none of the 1 images of the truth has a score"),
        ({"run": "{tmp}/empty", "truth": {"masks": "{tmp}/other"}}, "run = .*/empty holds no images.parquet; give the"),
        ({"against": "{tmp}/empty", "truth": {"masks": "{tmp}/other"}}, "against = .*/empty holds no images.parquet"),
    ],
)
def test_wrong_settings_say_what_to_do(run_folder: str, tmp_path: Path, values: Any, message: str) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("twice/a/1", "twice/b/1", "other/unknown"):
        storage.write_bytes(f"{tmp_path}/{name}.png", images.encode_mask(truth_of(0)))

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(inner) for key, inner in value.items()}
        return value.format(tmp=tmp_path)

    with pytest.raises(ConfigError, match=message):
        evaluate.run(settings(tmp_path / "out", **{"run": run_folder, **filled(values)}), False)
