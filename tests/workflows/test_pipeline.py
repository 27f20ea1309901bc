from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pytest

from stas_core import config, storage, tables
from stas_core.data import cohort
from stas_core.data.annotations import AnnotationConfig
from stas_core.errors import ConfigError, ForeignOutputError, StaleOutputError
from stas_core.predict.postprocess import PostprocessConfig
from stas_core.scores import bootstrap
from tests.conftest import ROOT
from workflows import evaluate, pipeline, prepare_data, score_images, score_slides, train_folds, tune_postprocess
from workflows.evaluate import EvaluateConfig
from workflows.folds.training import TrainFoldsConfig
from workflows.forecast import Forecast
from workflows.pipeline import PipelineConfig
from workflows.prepare_data import PrepareConfig
from workflows.score_images import ScoreConfig
from workflows.score_slides import ScoreSlidesConfig
from workflows.tune_postprocess import TunePostprocessConfig

MODULES = (prepare_data, train_folds, tune_postprocess, score_images, evaluate)
STAGES = {module.__name__.removeprefix("workflows."): module for module in MODULES}
INPUTS = {"data": {"images": "/data/images", "annotations": "/data/annotations"}}
NEST: dict[str, Literal["target", "ignore"]] = {"nest": "target"}
FIRST = {"prepare_data": "cohort", "train_folds": "folds"}
SEARCHED = {"space": {"min_target_px": {"low": 0, "high": 40}}}


class StubStages:
    """Stands in for the stages: notes what each is given, and writes what the pipeline itself reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cohort_uri: str):
        self.given: dict[str, Any] = {}
        self.ran: list[tuple[str, str]] = []
        """Each stage, and its folder."""
        self.ends: dict[str, int | Exception] = {}
        """Status of a stage, or what it raises; 0 where nothing is said."""
        self.hold_out = True
        self._cohort_uri = cohort_uri
        monkeypatch.setattr(pipeline, "ray_session", nullcontext)
        for name, module in STAGES.items():
            monkeypatch.setattr(module, "run", self._stub(name))

    def _stub(self, name: str) -> Any:
        def run(given: Any, force: bool) -> int:
            self.given[name] = given
            self.ran.append((name, given.out))
            if name == "prepare_data":
                rows = tables.read_table(self._cohort_uri).to_pylist()
                if self.hold_out:
                    rows[0] |= {"split": cohort.HOLD_OUT, "fold": None}
                tables.write_table(f"{given.out}/cohort.parquet", pa.Table.from_pylist(rows, schema=cohort.SCHEMA))
            if name == "tune_postprocess":
                storage.write_bytes(f"{given.out}/postprocess.tuned.yaml", b"min_target_px: 37\n")
            end = self.ends.get(name, 0)
            if isinstance(end, Exception):
                raise end
            return end

        return run


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch, cohort_uri: str) -> StubStages:
    return StubStages(monkeypatch, cohort_uri)


def settings(out: Path | str, **values: Any) -> PipelineConfig:
    return config.build(PipelineConfig, {"out": str(out), "prepare": INPUTS, **values})


@pytest.mark.parametrize("failing", STAGES)
def test_a_stage_that_fails_ends_the_pipeline_with_its_status(failing: str, stubs: StubStages, tmp_path: Path) -> None:
    stubs.ends = {failing: 7}
    assert pipeline.run(settings(tmp_path, tune=SEARCHED), False) == 7
    names = list(STAGES)
    assert list(stubs.given) == names[: names.index(failing) + 1]


@pytest.mark.parametrize("tune", [{}, SEARCHED])
def test_without_a_hold_out_it_ends_after_training_and_tuning(tune: Any, stubs: StubStages, tmp_path: Path) -> None:
    stubs.hold_out = False
    assert pipeline.run(settings(tmp_path, tune=tune), False) == 0
    assert list(stubs.given) == ["prepare_data", "train_folds", *(["tune_postprocess"] if tune else [])]


@pytest.mark.parametrize("hold_out", [True, False])
@pytest.mark.parametrize("slides", [None, {"phantom": {}}, {"slides": "/data/slides"}])
def test_a_plan_names_the_stages_that_are_run(
    hold_out: bool, slides: Any, stubs: StubStages, tmp_path: Path, cohort_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_slides, "run", stubs._stub("score_slides"))
    rows = cohort.read_cohort(cohort_uri)
    expected = [replace(rows[0], fold=None), *rows] if hold_out else rows
    monkeypatch.setattr(prepare_data, "open_cohort", lambda _: None)
    monkeypatch.setattr(prepare_data, "expected_rows", lambda *_: expected)
    known = {name: [Forecast(name, f"{tmp_path}/{out}", "", "a node", seconds=9.0)] for name, out in FIRST.items()}
    monkeypatch.setattr(prepare_data, "plan_opened", lambda *_: known["prepare_data"])
    monkeypatch.setattr(pipeline, "_plan_training", lambda *_: known["train_folds"][0])
    given = settings(tmp_path, tune=SEARCHED, slides=slides)
    *stages, together = pipeline.plan(given, False)
    stubs.hold_out = hold_out
    assert pipeline.run(given, False) == 0
    assert [(one.stage, one.out) for one in stages] == stubs.ran
    without = [name for name, _ in stubs.ran[2:]]
    if slides and hold_out and "phantom" in slides:
        assert without == ["tune_postprocess", "score_images", "evaluate", "score_slides", "evaluate"]
        assert together.basis.endswith("evaluate (evaluation), score_slides, evaluate (slides_evaluation)")
    else:
        assert together.basis == f"without {', '.join(without)}"


def test_stages_are_linked_and_the_rest_of_their_settings_kept(stubs: StubStages, tmp_path: Path) -> None:
    score = {"postprocess": {"min_target_px": 5}, "max_failed_fraction": 0.1}
    given = settings(tmp_path, tune=SEARCHED, score=score, evaluate={"bootstrap": {"seed": 3}, "against": "/other"})
    assert pipeline.run(given, False) == 0
    table = f"{tmp_path}/cohort/cohort.parquet"
    tuned, scored, judged = (stubs.given[name] for name in ("tune_postprocess", "score_images", "evaluate"))
    assert stubs.given["train_folds"].data.cohort == tuned.cohort == scored.data.images == judged.truth.cohort == table
    assert (tuned.run, tuned.default.min_target_px) == (f"{tmp_path}/folds", 5)
    assert (scored.ensemble.uri, scored.ensemble.top_k) == (f"{tmp_path}/folds/ensemble.json", None)
    assert (scored.data.split, scored.postprocess.min_target_px, scored.max_failed_fraction) == ("hold-out", 37, 0.1)
    assert (judged.run, judged.truth.split) == (f"{tmp_path}/scores", "hold-out")
    assert (judged.bootstrap.seed, judged.against) == (3, "/other")
    assert storage.read_json(f"{tmp_path}/manifest.json")["report"] == ["report.html"]

    # The best epochs are found in the run's folder: an ensemble.json names its members itself.
    assert pipeline.run(settings(tmp_path, score={"ensemble": {"top_k": 2}}), False) == 0
    ensemble = stubs.given["score_images"].ensemble
    assert (ensemble.uri, ensemble.top_k) == (f"{tmp_path}/folds", 2)
    assert stubs.given["score_images"].postprocess == PostprocessConfig()


@pytest.mark.parametrize("own", [None, "/outlines"])
def test_slides_are_scored_and_held_to_their_truth(
    own: str | None, stubs: StubStages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[ScoreSlidesConfig] = []

    def score(given: ScoreSlidesConfig, force: bool) -> int:
        scored.append(given)
        return 0

    monkeypatch.setattr(score_slides, "run", score)
    stubs.hold_out = False
    slides = {"phantom": {"num_slides": 1}, "max_failed_fraction": 0.5}
    given = settings(tmp_path, slides=slides, slides_truth=own, evaluate={"bootstrap": {"seed": 3, "by": "group"}})
    annotation = AnnotationConfig(labels=NEST)
    given = given.model_copy(update={"prepare": given.prepare.model_copy(update={"annotation": annotation})})
    assert pipeline.run(given, False) == 0
    assert (scored[0].out, scored[0].ensemble.uri) == (f"{tmp_path}/slides", f"{tmp_path}/folds/ensemble.json")
    judged = stubs.given["evaluate"]
    assert (judged.run, judged.out) == (f"{tmp_path}/slides", f"{tmp_path}/slides_evaluation")
    assert (judged.bootstrap.seed, judged.bootstrap.by) == (3, "image")
    truth = judged.truth.slides
    assert judged.truth.annotation.labels == (NEST if own else {"STAS": "target"})  # phantoms have their own
    assert truth == own or (truth.startswith(f"{tmp_path}/slides/phantom/") and truth.endswith("/targets"))

    del stubs.given["evaluate"]
    given = settings(tmp_path, slides={"slides": "/data/slides"})
    assert pipeline.run(given, False) == 0 and len(scored) == 2
    assert "evaluate" not in stubs.given  # nothing says what is right
    with pytest.raises(ConfigError, match=r"slides_truth = /outlines needs a section `slides`"):
        pipeline.run(settings(tmp_path, slides_truth="/outlines"), False)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((f"{stage}.out", "/elsewhere") for stage in ("prepare", "train", "tune", "score", "evaluate")),
        ("train.data.cohort", "/c.parquet"),
        ("tune.run", "/folds"),
        ("tune.cohort", "/c.parquet"),
        ("tune.default.min_target_px", 3),
        ("score.data.images", "/images"),
        ("score.data.split", "train"),
        ("score.ensemble.uri", "/folds"),
        ("evaluate.run", "/scores"),
        ("evaluate.truth.masks", "/masks"),
        ("evaluate.truth.split", "train"),
    ],
)
def test_what_the_pipeline_derives_cannot_be_given(key: str, value: Any, stubs: StubStages, tmp_path: Path) -> None:
    values = config.merge({"prepare": INPUTS, "out": f"{tmp_path}/out"}, config.parse_overrides([f"{key}={value}"]))
    with pytest.raises(ConfigError, match=f"^{key} = {value}: in a pipeline this follows from the other stages; "):
        pipeline.run(config.build(PipelineConfig, values), False)
    assert not stubs.given and not (tmp_path / "out").exists()


def test_inputs_are_named_by_their_key_in_the_pipeline(stubs: StubStages, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^prepare\.data\.images is not set; .* prepare\.data\.images=/data/images"):
        pipeline.run(settings(tmp_path / "out", prepare={}), False)
    with pytest.raises(ConfigError, match=r"^prepare\.data\.annotations is not set"):
        pipeline.run(settings(tmp_path / "out", prepare={"data": {"images": "/images"}}), False)
    assert not (tmp_path / "out").exists()
    assert pipeline.run(settings(tmp_path / "out", prepare={"phantom": {}}), False) == 0


def test_stale_outputs_of_one_stage_say_how_to_redo_it_alone(stubs: StubStages, tmp_path: Path) -> None:
    stubs.ends = {"train_folds": StaleOutputError("folds differ; use another out=, or --force to start over")}
    with pytest.raises(StaleOutputError) as caught:
        pipeline.run(settings(tmp_path), False)
    assert str(caught.value) == (
        "folds differ; use another out=, or --force to start over. In a pipeline --force starts every stage over; "
        f"to redo this one alone, delete {tmp_path}/folds"
    )


def test_nobody_is_told_to_delete_what_another_stage_made(stubs: StubStages, tmp_path: Path) -> None:
    stubs.ends = {"train_folds": ForeignOutputError("folds holds what another program made, not train_folds")}
    with pytest.raises(ForeignOutputError) as caught:
        pipeline.run(settings(tmp_path), False)
    assert "delete" not in str(caught.value)


def test_another_stages_folder_is_left_alone(stubs: StubStages, tmp_path: Path) -> None:
    storage.write_json(f"{tmp_path}/claim.json", {"stage": "train_folds"})
    storage.write_bytes(f"{tmp_path}/config.resolved.yaml", b"theirs")
    with pytest.raises(StaleOutputError, match="holds what train_folds made, not pipeline"):
        pipeline.run(settings(tmp_path), True)
    assert (tmp_path / "config.resolved.yaml").read_text() == "theirs" and not stubs.given


def test_the_shipped_pipeline_repeats_the_files_it_says_it_does() -> None:
    folder = ROOT / "configs"
    shipped = config.load_config(PipelineConfig, folder / "pipeline.yaml")
    assert shipped.prepare == config.load_config(PrepareConfig, folder / "prepare_data.yaml")
    assert shipped.train == config.load_config(TrainFoldsConfig, folder / "stas_cpu.yaml")
    assert shipped.tune == config.load_config(TunePostprocessConfig, folder / "tune_postprocess.yaml")
    assert shipped.score == config.load_config(ScoreConfig, folder / "score_images.yaml")
    assert shipped.evaluate == config.load_config(EvaluateConfig, folder / "evaluate.yaml")


def test_the_demo_holds_out_enough_images_for_an_interval() -> None:
    demo = config.load_config(PipelineConfig, ROOT / "configs" / "demo.yaml").prepare
    assert demo.phantom is not None
    assert round(demo.phantom.num_images * demo.split.hold_out_fraction) >= bootstrap.MIN_RESAMPLED
    groups = [f"{index % demo.phantom.num_groups}" for index in range(demo.phantom.num_images)]
    folds = cohort.draw_split([0] * len(groups), groups, demo.split).folds
    held_out = {group for group, fold in zip(groups, folds, strict=True) if fold is None}
    assert (folds.count(None), len(held_out)) == (8, 2)
