"""The pages of searches: tune_postprocess, tune_training and choose_ensemble."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from stas_core import config as configs
from stas_core import storage, tables
from stas_core.data.cohort import CohortRow
from stas_core.errors import ConfigError, StorageError
from stas_core.pages.contents import Chart, Column, Contents, Figure, Item, PictureSource, Series, Table
from stas_core.pages.curves import cut_figure
from stas_core.pages.finished import FinishedRun, cohort_of, mpp_of, setting_of
from stas_core.pages.settings import flat
from stas_core.predict.postprocess import PostprocessConfig, postprocess
from stas_core.runs import OofScore, TrainingRun

_ALL = "all"
"""Name of the study over all folds."""
_TUNED = "postprocess.tuned.yaml"
_NAMES = {
    "raw": "plain cut at 0.5",
    "cut": "map cut at the best level",
    "default": "default",
    "reference": "the published one",
    "best": "best found",
    "simplest": "simplest within one standard error of the best",
}
_MOST_VALUES = 16
"""Of a key; more are gathered."""
_POSTPROCESS_FIGURES = (
    (
        "importance",
        "What decides",
        "Share of the differences between settings that a key explains; short bars hardly matter.",
    ),
    (
        "optimism",
        "Gain where it was chosen, and on the fold left out",
        "The second is what to expect of new images; a gap between them is luck, not gain.",
    ),
    ("dice_by_size", "Dice by target area, before and after", "Which images gain: points above the line do."),
    (
        "partial_dependence",
        "Every setting that was tried",
        "A point is a setting; where the upper edge of a cloud is flat, the value does not matter.",
    ),
)
_TRAINING_FIGURES = (
    ("score_over_time", "Dice over time", "A step is a better trial; a long flat end says that the search is done."),
    (
        "parallel_coordinates",
        "Settings and what they reach",
        "A line is a trial; look where the good ones run together.",
    ),
    ("importance", "What decides", "Share of the differences between trials that a key explains."),
)
_COLUMNS = (
    Column("chosen", "Dice", "by the recommended kind of setting, chosen without the fold of the image"),
    Column("default", "default", "Dice by the default"),
    Column("raw", "at 0.5", "Dice of the map cut at 0.5"),
    Column("gain", "gain", "Dice less that of the better of default and plain cut"),
    Column("fold", "fold", kind="whole"),
    Column("target_px", "target px", "area that is annotated", kind="whole"),
)


def build_postprocess(run: FinishedRun) -> Contents:
    """Return the contents of the page of tune_postprocess."""
    nested = _numbers(run.record.get("nested_dice"))
    images = tables.read_table(run.path("images.parquet")).to_pylist()
    recommended = str(run.record.get("recommended", ""))
    chosen = {"tuned": "nested_simplest", "default": "default", "plain cut": "raw"}.get(recommended, "nested_simplest")
    rival = "default" if nested.get("default", 0) > nested.get("raw", 0) else "raw"
    for row in images:
        row |= {"chosen": row[chosen], "gain": row[chosen] - row[rival]}
    images.sort(key=lambda row: (row["gain"], row["id"]))
    (maps, no_maps), (cohort, no_cohort) = _maps(run), _cohort(run)
    missing = {"map and no prediction": no_maps, "image and no annotation": no_cohort}
    cut = cut_figure([(uri, cohort[name].mask_uri) for name, uri in sorted(maps.items()) if name in cohort])
    setting, given_mpp = _recommended(run), setting_of(run.setting("run"), "data.mpp")
    advice = str(run.record.get("recommendation", ""))
    return Contents(
        title="Thresholds tuned on out-of-fold maps",
        lead=f"{advice[:1].upper()}{advice[1:]}." if advice else "",
        facts=_postprocess_facts(nested, recommended, rival, len(images)),
        figures=[*([] if cut is None else [cut]), *_value_curves(run, setting), *run.figures(_POSTPROCESS_FIGURES)],
        tables=[_nested_table(nested), _settings_table(run, setting)],
        items=[
            _item(row, cohort.get(row["id"]), map_uri=maps.get(row["id"], ""), setting=setting, given_mpp=given_mpp)
            for row in images
        ],
        item_notes=[f"No {what} can be shown: {why}" for what, why in missing.items() if why],
        item_order="what they gain, the losers first",
        columns=_COLUMNS,
        files=run.files(
            (
                (_TUNED, "the recommended setting, for postprocess= of score_images"),
                ("candidates/", "the other settings, as files of the same kind"),
                ("report.md", "the same figures as text, with intervals"),
                ("trials.parquet", "every setting that was tried"),
                ("images.parquet", "Dice of each image by each setting"),
            )
        ),
        layer_names={"truth": "annotation", "found": "by the recommended setting"},
    )


def _numbers(values: Any) -> dict[str, float]:
    known = values if isinstance(values, Mapping) else {}
    return {str(name): float(value) for name, value in known.items() if isinstance(value, int | float)}


def _maps(run: FinishedRun) -> tuple[dict[str, str], str]:
    """Return the out-of-fold maps by id, and ""; or none, and why, where the training is gone."""
    try:
        trained = TrainingRun.open("run", str(run.setting("run")))
        scores = [score for row in trained.folds() for score in trained.fold(row.fold).oof()]
        return {score.id: _map_uri(trained, score) for score in scores}, ""
    except (ConfigError, StorageError) as error:
        return {}, str(error)


def _map_uri(trained: TrainingRun, score: OofScore) -> str:
    fold = trained.fold(score.fold)
    return storage.resolve(score.map_uri, fold.uri, where=fold.path(fold.OOF))


def _cohort(run: FinishedRun) -> tuple[dict[str, CohortRow], str]:
    """Return the cohort that the search was given, or else that of the training, as `cohort_of`."""
    given, no_given = cohort_of(run.setting("cohort"))
    if given:
        return given, ""
    try:
        found, why = cohort_of(TrainingRun(str(run.setting("run"))).trained_on())
    except (ConfigError, StorageError) as error:
        return {}, no_given or str(error)
    return found, "" if found else no_given or why


def _recommended(run: FinishedRun) -> PostprocessConfig | None:
    uri = run.path(_TUNED)
    if not storage.exists(uri):
        return None
    return configs.build(PostprocessConfig, configs.parse_yaml(storage.read_bytes(uri).decode(), uri))


def _item(
    row: Mapping[str, Any],
    known: CohortRow | None,
    *,
    map_uri: str,
    setting: PostprocessConfig | None,
    given_mpp: object,
) -> Item:
    mpp, mpp_note = mpp_of(known, given_mpp)
    tags = [f"fold {row['fold']}", "loses" if row["gain"] < 0 else "gains" if row["gain"] > 0 else "the same"]
    source = PictureSource(
        "" if known is None else known.image_uri,
        map_uri=map_uri,
        truth_uri="" if known is None else known.mask_uri,
        found_by=None if setting is None else functools.partial(postprocess, config=setting),
        mpp=mpp,
        mpp_note=mpp_note,
    )
    return Item(row["id"], row, source, tags=tuple(tags))


def _postprocess_facts(nested: Mapping[str, float], recommended: str, rival: str, num: int) -> list[tuple[str, str]]:
    chosen = {"tuned": "simplest", "default": "default", "plain cut": "raw"}.get(recommended, "simplest")
    facts = [("images", f"{num:,}"), ("recommended", recommended or "-")]
    if chosen in nested:
        facts.append(("Dice, chosen without the fold", f"{nested[chosen]:.3f}"))
        facts.append(
            (
                f"against the {'default' if rival == 'default' else 'plain cut'}",
                f"{nested[chosen] - nested[rival]:+.3f}",
            )
        )
    return facts


def _nested_table(nested: Mapping[str, float]) -> Table:
    columns = (Column("name", "setting", kind="text"), Column("dice", "Dice", "mean over images"))
    rows = [{"name": _NAMES.get(name, name), "dice": dice} for name, dice in nested.items()]
    reading = "Each image is scored by a setting that was chosen without its fold: what to expect of new images."
    return Table("What each setting is worth", reading, columns, rows)


def _settings_table(run: FinishedRun, setting: PostprocessConfig | None) -> Table:
    columns = (
        Column("key", "key", kind="text"),
        Column("value", "recommended", kind="text"),
        Column("default", "default", kind="text"),
    )
    if setting is None:
        return Table("The recommended setting", "", columns, [])
    default = PostprocessConfig.model_validate(run.setting("default") or {})
    before = flat(_by_number(default.model_dump(mode="json")))
    now = flat(_by_number(setting.model_dump(mode="json")))
    rows = [
        {"key": key, "value": str(value), "default": str(before.get(key, "-"))}
        for key, value in now.items()
        if before.get(key) != value
    ]
    return Table(
        "The recommended setting", "Values that differ from the default; none: it is the default.", columns, rows
    )


def _by_number(values: Any) -> Any:
    """Return nested values with lists as mappings from numbers, so that each has a key of its own."""
    if isinstance(values, list):
        return {str(index): _by_number(one) for index, one in enumerate(values)}
    return {key: _by_number(one) for key, one in values.items()} if isinstance(values, dict) else values


def _value_curves(run: FinishedRun, setting: PostprocessConfig | None) -> list[Figure]:
    """Return what each value of each key costs: the best Dice of the settings that have it."""
    uri = run.path("trials.parquet")
    if not storage.exists(uri):
        return []
    trials = [row for row in tables.read_table(uri).to_pylist() if row["study"] == _ALL]
    chosen = {} if setting is None else flat(_by_number(setting.model_dump(mode="json")))
    default = flat(_by_number(run.setting("default") or {}))
    figures = []
    for key in [name for name in (trials[0] if trials else {}) if name not in ("study", "dice")]:
        numbers = [(row[key], row["dice"]) for row in trials if isinstance(row[key], int | float)]
        points = best_by_value(numbers)
        if len(points) < 3:
            continue
        marks = [
            (float(v[key]), name)
            for v, name in ((default, "default"), (chosen, "recommended"))
            if _is_number(v.get(key))
        ]
        chart = Chart(
            key,
            "best Dice",
            [Series("best setting with this value", points)],
            marks=marks,
            start=marks[-1][0] if marks else None,
        )
        reading = "The best mean Dice of all settings that were tried with this value: what holding it there costs."
        figures.append(Figure(f"What a value of {key} costs", reading, chart=chart))
    return figures


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def best_by_value(trials: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the best score at each value, sorted; of many values, in bins of as many trials each.

    >>> best_by_value([(1, 0.5), (2, 0.7), (1, 0.6)])
    [(1.0, 0.6), (2.0, 0.7)]
    """
    best: dict[float, float] = {}
    for value, score in trials:
        best[float(value)] = max(score, best.get(float(value), score))
    points = sorted(best.items())
    if len(points) <= _MOST_VALUES:
        return points
    size = -(-len(points) // _MOST_VALUES)
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    return [max(some, key=lambda point: point[1]) for some in bins]


def build_training(run: FinishedRun) -> Contents:
    """Return the contents of the page of tune_training."""
    trials = tables.read_table(run.path("trials.parquet")).to_pylist()
    trials.sort(key=lambda row: (row["dice"] is None, -(row["dice"] or 0), row["trial"]))
    fixed = ("trial", "state", "epoch", "dice", "seconds", "error")
    keys = [name for name in (trials[0] if trials else {}) if name not in fixed]
    columns = [
        Column("trial", "trial", kind="text"),
        Column("dice", "Dice", "mean validation Dice of its folds"),
        Column("state", "state", "done, stopped, failed or open", kind="text"),
        Column("epoch", "epochs", kind="whole"),
        Column("seconds", "seconds", kind="whole"),
        *(Column(key, key, kind="text") for key in keys),
        Column("error", "error", kind="text"),
    ]
    best = trials[0]["dice"] if trials else None
    done = sum(row["state"] == "done" for row in trials)
    facts = [("trials", f"{len(trials):,}"), ("trained to the end", f"{done:,}")]
    facts += [] if best is None else [("best Dice", f"{best:.3f}")]
    history = _history(run, [row["trial"] for row in trials[:7]])
    return Contents(
        title="Training settings searched",
        lead="The best was chosen by the very score that is shown, which therefore flatters it: train it on all folds, "
        "and score a hold-out.",
        facts=facts,
        figures=[*history, *run.figures(_TRAINING_FIGURES)],
        tables=[Table("Trials", "Weak ones may have been stopped early; a click on a heading sorts.", columns, trials)],
        files=run.files(
            (
                ("train_folds.best.yaml", "the best setting, for --config of train_folds"),
                ("trials.parquet", "a row per trial"),
                ("history.parquet", "a row per epoch of each trial"),
                ("trials/", "each trial, like a run of train_folds"),
                ("report.md", "the same as text"),
            )
        ),
    )


def _history(run: FinishedRun, shown: Sequence[str]) -> list[Figure]:
    uri = run.path("history.parquet")
    if not storage.exists(uri):
        return []
    rows = tables.read_table(uri).to_pylist()
    series = [
        Series(name, sorted((float(row["epoch"]), float(row["dice"])) for row in rows if row["trial"] == name))
        for name in shown
    ]
    chart = Chart("epoch", "validation Dice", [one for one in series if one.points], whole_x=True, start=1e9)
    return [Figure(f"The best {len(chart.series)} trials", "Mean validation Dice over their folds.", chart=chart)]


def build_ensemble(run: FinishedRun) -> Contents:
    """Return the contents of the page of choose_ensemble."""
    rows = tables.read_table(run.path("sizes.parquet")).to_pylist()
    for row in rows:
        row |= {"members": len(row["members"]), "flips": len(row["flips"]), "names": ", ".join(row["members"])}
        row["interval"] = f"{row['nested_low']:.3f} to {row['nested_high']:.3f}"
    columns = (
        Column("members", "members", kind="whole"),
        Column("flips", "flips", kind="whole"),
        Column("relative_seconds", "cost", "seconds per image, relative to one pass of the cheapest member", digits=1),
        Column("nested_dice", "Dice", "chosen without the fold of an image"),
        Column("interval", "95 % interval", kind="text"),
        Column("tuned_dice", "where chosen", "chosen on these same images"),
        Column("is_knee", "recommended", kind="flag"),
        Column("names", "which", kind="text"),
    )
    knee = next((row for row in rows if row["is_knee"]), None)
    facts = [("sizes tried", str(len(rows)))]
    if knee is not None:
        facts += [
            ("members", str(knee["members"])),
            ("Dice", f"{knee['nested_dice']:.3f}"),
            ("cost", f"{knee['relative_seconds']:.1f} x"),
        ]
    return Contents(
        title="How many members and flips an ensemble is worth",
        lead="More members cost time for each image; the recommended size is where more of them gain little.",
        facts=facts,
        figures=run.figures(
            (("cost", "Dice against cost", "The upper left is good and cheap; the diamond is recommended."),)
        ),
        tables=[Table("Sizes", "Cheapest first.", columns, rows)],
        files=run.files(
            (
                ("ensemble.json", "the recommended members, for score_images and score_slides"),
                ("sizes.parquet", "a row per size"),
                ("report.md", "the same as text"),
            )
        ),
    )
