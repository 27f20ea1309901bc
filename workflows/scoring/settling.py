"""What is left to do of images: how far the record of each still holds, in a few bytes an image."""

from collections.abc import Sequence
from dataclasses import dataclass

from stas_core import record_parts
from stas_core.errors import TRY_AGAIN
from stas_core.scored_runs import MAPS, RECORDS, STDS, ScoredRun
from workflows.scoring.tasks import LOOSE, Item, LimitsConfig, ScoreTask

_COLUMNS = (
    "id",
    "stamp",
    "reason",
    "predict_key",
    "finish_key",
    "limits_key",
    "folders",
    "found.height",
    "found.width",
)


@dataclass(frozen=True)
class Standing:
    """What a record says of an image that tells whether it is done; images mostly share one."""

    same_input: bool
    """Whether the image is the version that was scored."""
    predict_key: str
    finish_key: str
    limits_key: str
    reason: str | None
    """Why it failed; None: it did not."""
    num_px: int
    folders: tuple[str, ...]
    part: str | None
    """The part that has the record; None: it is a loose one."""


Standings = dict[str, Standing]
"""By id, of images that have a record."""


def read_standings(run: ScoredRun, items: Sequence[Item]) -> Standings:
    """Return how the records of these images stand.

    Raises:
        StorageError: a file among them is no record, or no part.
    """
    by_id = {item["id"]: item for item in items}
    shared: dict[Standing, Standing] = {}
    standings: Standings = {}
    with record_parts.opened(run) as records:
        parts = iter(records.part_names)
        for table in records.chunks(*_COLUMNS):
            for row, part in zip(table.to_pylist(), parts, strict=False):
                if (item := by_id.get(row["id"])) is None:
                    continue
                found = row["found"]
                standing = Standing(
                    row["stamp"] == item["stamp"],
                    row["predict_key"],
                    row["finish_key"],
                    row["limits_key"],
                    row["reason"],
                    0 if found is None or found["height"] is None else found["height"] * found["width"],
                    tuple(row["folders"]),
                    part,
                )
                standings[item["id"]] = shared.setdefault(standing, standing)
    return standings


def must_predict(standing: Standing | None, predict_key: str, limits: LimitsConfig) -> bool:
    """Tell whether an image must be predicted: no record holds for this input, these models and these limits."""
    if standing is None or not standing.same_input or standing.predict_key != predict_key:
        return True
    if standing.reason is not None:
        return standing.reason in TRY_AGAIN or standing.limits_key != limits.key
    return standing.num_px > limits.max_pixels  # the limit is lower now: to be reported


def split_todo(items: Sequence[Item], standings: Standings, task: ScoreTask) -> tuple[list[Item], list[Item]]:
    """Return the images to predict, and those whose saved map still holds but whose outputs do not."""
    kinds = [kind for kind in task.run.KINDS if kind != RECORDS]
    bits = {kind: 1 << number for number, kind in enumerate(kinds)}
    written = dict.fromkeys(standings, 0)
    for kind in kinds:
        for item_id in task.run.ids_of(kind):
            if item_id in written:
                written[item_id] |= bits[kind]
    fresh: list[Item] = []
    from_maps: list[Item] = []
    wanted, reused = task.save.folders(), [MAPS, STDS] if task.save.disagreement else [MAPS]
    finish_key, limits = task.finish_key, task.limits
    for item in items:
        standing = standings.get(item["id"])
        if standing is None:
            fresh.append(item if "part" in item else {**item, "part": None})
            continue
        todo: Item = {**item, "part": LOOSE if standing.part is None else standing.part}  # it must be taken back first
        if must_predict(standing, task.predict_key, limits):
            fresh.append(todo)
        elif standing.reason is None:
            # A file of a folder that the record does not name may be of other weights: it was never overwritten.
            held = {kind for kind in standing.folders if written[item["id"]] & bits.get(kind, 0)}
            if standing.finish_key != finish_key or not held.issuperset(wanted):
                (from_maps if held.issuperset(reused) else fresh).append(todo)
    return fresh, from_maps


def any_finished(items: Sequence[Item], standings: Standings, todo: Sequence[Item]) -> Item | None:
    """Return an image that was finished and whose record holds; None: there is none."""
    open_ids = {item["id"] for item in todo}
    good = (item for item in items if item["id"] not in open_ids and standings[item["id"]].reason is None)
    return next(good, None)
