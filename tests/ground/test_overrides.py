"""`key=value`: a value is read as its key's type asks, and what it does not name stays as it was."""

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import Field

from stas_core import config
from stas_core.config import Config, SettingsOf, Uri
from stas_core.data.annotations import AnnotationConfig, unknown_labels
from stas_core.errors import ConfigError
from stas_core.predict.inference import InferenceConfig
from stas_core.train.recipe import OptimConfig
from workflows.choose_ensemble import ChooseEnsembleConfig
from workflows.evaluate import EvaluateConfig
from workflows.export import ExportConfig
from workflows.folds.training import TrainFoldsConfig
from workflows.pipeline import PipelineConfig
from workflows.prepare_data import PrepareConfig
from workflows.score_images import ScoreConfig
from workflows.tune_training import TuneTrainingConfig


class Range(Config):
    low: float | None = None
    high: float | None = None


class Inner(Config):
    name: str | None = None
    seed: int = 0
    rate: float = 1.0
    place: Uri | None = None
    kind: Literal["yes", "no", "null"] = "yes"


class Outer(Config):
    inner: Inner = Inner(seed=7, rate=0.5)
    labels: dict[str, Literal["on", "off"]] = Field({"STAS": "on"})
    notes: dict[str, str] = Field({})
    names: tuple[str, ...] = ()
    later: Annotated[dict[str, Any], SettingsOf(Inner)] = Field({})
    space: dict[str, Range] = Field({})
    maybe: Inner | None = None


text = st.text(st.characters(exclude_categories=["Cs"]))


@given(text)
@example("/x/precious #2")
@example("no")
@example("'a'")
@example("{a: b}")
@example("1e3")
@example("a: b")
@example("[x]")
def test_any_text_survives_as_the_value_of_a_text_key(value: str) -> None:
    overrides = [f"inner.name={value}", f"notes.a={value}", f"later.name={value}", f"maybe.name={value}"]
    built = config.load_config(Outer, None, overrides)
    expected = None if value == "null" else value
    assert built.inner.name == expected and built.later == {"name": expected}
    assert built.notes == {"a": value}
    assert config.build(Outer, config.parse_yaml(config.dump(built))) == built
    assert config.build(Outer, config.parse_yaml(config.describe(built))) == built


@given(text.filter(lambda value: not value.startswith("[")))
def test_a_list_of_texts_takes_one_as_it_stands(value: str) -> None:
    assert config.load_config(Outer, None, [f"names={value}"]).names == (value,)


def test_folders_with_blanks_and_hashes_are_not_cut() -> None:
    prepare = config.load_config(PrepareConfig, None, ["out=/x/precious #2", "data.images=/x/Slides #3: a"])
    assert (prepare.out, prepare.data.images) == ("/x/precious #2", "/x/Slides #3: a")
    assert config.load_config(ChooseEnsembleConfig, None, ["runs=/x/a #2"]).runs == ("/x/a #2",)
    assert config.load_config(ChooseEnsembleConfig, None, ["runs=[/x/a, /x/b]"]).runs == ("/x/a", "/x/b")
    tune = config.load_config(TuneTrainingConfig, None, ["train.data.cohort=/x/c #1", "train.optim.lr=5e-4"])
    assert tune.train == {"data": {"cohort": "/x/c #1"}, "optim": {"lr": 5e-4}}
    with pytest.raises(ConfigError, match=r"cannot read config file /none/a #2\.yaml"):
        config.load_config(ScoreConfig, None, ["postprocess=/none/a #2.yaml"])


def test_other_keys_are_yaml() -> None:
    built = config.load_config(
        Outer, None, ["inner.seed=3 # three", "inner.rate=5e-4", "maybe={seed: 2}", "names=null"]
    )
    assert (built.inner.seed, built.inner.rate, built.names) == (3, 5e-4, ("null",))
    assert built.maybe == Inner(seed=2)
    assert config.load_config(Outer, None, ["maybe={seed: 2}", "maybe=null"]).maybe is None
    assert config.load_config(Outer, None, ["inner.kind=no"]).inner.kind == "no"
    assert config.load_config(Outer, None, ["inner.kind=null"]).inner.kind == "null"


def test_home_is_expanded_in_paths_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    built = config.load_config(Outer, None, ["inner.place=~/a #1", "inner.name=~/a"])
    assert (built.inner.place, built.inner.name) == ("/home/me/a #1", "~/a")
    (tmp_path / "c.yaml").write_text("inner: {place: ~/b}\n")
    assert config.load_config(Outer, tmp_path / "c.yaml").inner.place == "/home/me/b"
    assert config.load_config(Outer, None, ["inner.place=s3://b/~x"]).inner.place == "s3://b/~x"
    assert config.load_config(Outer, None, ["inner.place=./null"]).inner.place == "./null"


def test_one_key_of_a_mapping_leaves_the_others(tmp_path: Path) -> None:
    one = config.load_config(PrepareConfig, None, ["annotation.labels.Vessel no. 2=ignore"])
    assert one.annotation.labels == {"STAS": "target", "Vessel no. 2": "ignore"}
    whole = config.load_config(PrepareConfig, None, ["annotation.labels={X: target}"])
    assert whole.annotation.labels == {"X": "target"}
    assert config.build(PrepareConfig, config.parse_yaml(config.dump(whole))) == whole
    (tmp_path / "c.yaml").write_text("labels: {A: off}\n".replace("off", "'off'"))
    assert config.load_config(Outer, tmp_path / "c.yaml", ["labels.B=on"]).labels == {"A": "off", "B": "on"}
    assert config.load_config(Outer, tmp_path / "c.yaml", ["labels={B: 'on'}"]).labels == {"B": "on"}


def test_keys_of_a_search_space_may_have_dots() -> None:
    overrides = ["space.steps.0.low.low=3", "space.steps.0.low.high=4", "space.optim.lr={low: 1e-4, high: 1e-2}"]
    built = config.load_config(Outer, None, overrides)
    assert built.space == {"steps.0.low": Range(low=3, high=4), "optim.lr": Range(low=1e-4, high=1e-2)}


def test_one_key_of_a_section_leaves_what_its_default_states(tmp_path: Path) -> None:
    assert config.load_config(Outer, None, ["inner.name=a"]).inner == Inner(seed=7, rate=0.5, name="a")
    (tmp_path / "c.yaml").write_text("inner: {rate: 2}\n")
    assert config.load_config(Outer, tmp_path / "c.yaml").inner == Inner(seed=7, rate=2)
    assert config.load_config(TuneTrainingConfig, None, ["search.seed=3"]).search.num_settings == 20


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inner=x", r"inner = 'x': this is a section, not a value; set inner\.name=\.\.\."),
        ("=x", "'=x' is not of the form key=value"),
        ("inner..name=x", "is not of the form key=value"),
        ("inner.nam=x", r"unknown key inner\.nam = 'x': did you mean inner\.name\?"),
        ("maybe.sead=1", r"unknown key maybe\.sead = 1: did you mean maybe\.seed\?"),
        ("space.a.low=x", r"space\.a\.low = 'x': .*valid number"),
        ("inner.seed=0-3", r"inner\.seed = '0-3': 0-3 is no integer"),  # which pydantic reads as -3
        ("inner.rate=nan", r"inner\.rate = 'nan'.*finite"),
        ("inner.rate=.inf", r"inner\.rate = inf: .*finite"),
        ("inner.rate=1e400", r"inner\.rate = inf: .*finite"),
        ("inner.seed=" + "9" * 5000, r"override inner\.seed.* is no int"),
        ("inner.place=", r"inner\.place = '': a path needs at least one character"),
        ("inner.place=a\0b", r"inner\.place = .*no NUL"),
        ("inner.name=\udcb2\udcd5", r"is not UTF-8; give the file or folder a name that is"),
        ("inner.seed=[" * 400, r"override inner\.seed"),
    ],
)
def test_what_cannot_be_meant_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load_config(Outer, None, [override])


@pytest.mark.parametrize(
    ("text", "expected"), [("0,1", (0, 1)), ("3", (3,)), ("[0, 1]", (0, 1)), ("null", None), ("- 0\n- 1", (0, 1))]
)
def test_a_list_of_numbers_goes_without_brackets(text: str, expected: tuple[int, ...] | None) -> None:
    assert config.load_config(TrainFoldsConfig, None, [f"folds={text}"]).folds == expected


@pytest.mark.parametrize("text", ["0-3", "[0-3]", "[5, 00-3]", "1-3", "' 0-3'"])
def test_a_range_is_no_integer(text: str) -> None:
    with pytest.raises(ConfigError, match=r"folds = .* is no integer, and ranges are not read; give each, such as 0,1"):
        config.load_config(TrainFoldsConfig, None, [f"folds={text}"])
    assert config.load_config(Outer, None, ["labels.0-3=on", "inner.name=0-3", "names=0-3"]).names == ("0-3",)


@pytest.mark.parametrize("text", ["coco,asap", "coco, asap", "'coco','asap'", "[coco, asap]", "['coco', \"asap\"]"])
def test_a_list_of_chosen_words_goes_without_brackets(text: str) -> None:
    assert config.load_config(ExportConfig, None, [f"formats={text}"]).formats == ("coco", "asap")


def test_a_wrong_word_of_a_list_is_told_once() -> None:
    with pytest.raises(ConfigError) as told:
        config.load_config(ExportConfig, None, ["formats=yolo"])
    assert str(told.value).startswith("formats.0 = 'yolo': Input should be 'geojson'") and "\n" not in str(told.value)
    with pytest.raises(ConfigError, match="at least 1 item"):
        config.load_config(ExportConfig, None, ["formats=[]"])
    with pytest.raises(ConfigError, match="at least 1 item"):
        config.load_config(ExportConfig, None, ["formats="])


def test_an_unknown_key_is_named_as_it_was_given() -> None:
    with pytest.raises(ConfigError, match=r"^unknown key data\.images = 'x': did you mean prepare\.data\.images\?$"):
        config.load_config(PipelineConfig, None, ["data.images=x"])


@pytest.mark.parametrize(
    ("cls", "name", "words"),
    [
        (TrainFoldsConfig, "out", "path or URI or null"),
        (TrainFoldsConfig, "folds", "list of integers or null"),
        (InferenceConfig, "flips", "list of identity, lr, ud or both"),
        (OptimConfig, "lr", "number > 0"),
        (EvaluateConfig, "truth.split", "all, train or hold-out"),
        (ScoreConfig, "postprocess", "section or YAML file of one"),
    ],
)
def test_what_a_value_may_be_is_said_in_words(cls: type[config.Config], name: str, words: str) -> None:
    assert {key.name: key.kind for key in config.fields(cls)}[name] == words


def test_every_key_is_listed() -> None:
    listed = set(config.keys(PrepareConfig))
    assert {"phantom", "phantom.num_images", "annotation.labels", "split.seed"} <= listed
    assert {"space", "space.<key>.low", "train", "train.optim.lr", "search.seed"} <= set(
        config.keys(TuneTrainingConfig)
    )
    assert {"postprocess", "postprocess.closing_px", "postprocess.steps.<n>.drop"} <= set(config.keys(ScoreConfig))
    defaults = {key.name: key.default for key in config.fields(TuneTrainingConfig)}
    assert defaults["search.num_settings"] == 20


def test_a_locale_without_the_characters_of_a_name_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "ascii")  # LC_ALL=POSIX, PYTHONCOERCECLOCALE=0
    with pytest.raises(ConfigError, match=r"is not ASCII; set PYTHONUTF8=1"):
        config.parse_overrides(["inner.name=\udcc3\udcbc"])


LABELS = st.text(min_size=0, max_size=12) | st.text("ab=. :{}\"'#,\n<\u00e9", max_size=6)


@given(st.lists(LABELS, min_size=1, max_size=4, unique=True), st.lists(LABELS, max_size=3), st.booleans())
@example(["a=b", ""], ["c=d"], True)
@example(["a.b", ".", "a b", "..", "{", "x"], [], True)
@example(["<<", "null", "yes", "5e-4", "\x85", "\n"], [], False)
def test_labels_are_listed_by_the_words_that_messages_suggest(names: list[str], held: list[str], stated: bool) -> None:
    labels = {"STAS": "target"} | (dict.fromkeys(held, "ignore") if stated else {})
    given = config.build(AnnotationConfig, {"labels": labels})
    words = shlex.split(config.additions("annotation.labels", names, "target", given.labels))
    values = {"annotation": {"labels": labels}} if stated else {}
    loaded = config.build(PrepareConfig, config.parse_overrides(words, PrepareConfig, values))
    assert loaded.annotation.labels == labels | dict.fromkeys(names, "target")


@given(st.dictionaries(LABELS, st.integers(1, 3), min_size=1, max_size=3))
@example({"a=b": 1})
@example({"": 1, "a": 2})
@example({"STAS, tumor: old": 1})
@example({"x" * 400: 1})
def test_the_remedy_for_an_unknown_label_is_a_setting(counts: dict[str, int]) -> None:
    message = unknown_labels(counts, AnnotationConfig())
    if max(map(len, counts)) > 100:
        assert "say what each means: in a YAML file, under annotation.labels, as target" in message
        return
    example_of = message.rpartition("say what each means: ")[2].partition(" (or ignore)")[0]
    words = shlex.split(example_of)
    loaded = config.load_config(PrepareConfig, None, words)
    assert loaded.annotation.labels == {"STAS": "target", min(counts): "target"}
