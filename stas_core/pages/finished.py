"""A finished run as pages read it: its folder, the record of its manifest, its settings."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stas_core import config as configs
from stas_core import storage, tables
from stas_core.data import cohort as cohorts
from stas_core.data.cohort import CohortRow
from stas_core.errors import ConfigError, InputError, StorageError, WrongColumns
from stas_core.failures import Failure
from stas_core.pages import settings
from stas_core.pages.contents import Column, Figure, Item
from stas_core.pages.pictures import figure_uri
from stas_core.review import ReviewField

RESOLVED = "config.resolved.yaml"
FAILED = "failed"
"""Tag of what could not be used."""
RANK = Column("rank", "look again", "place in the queue of review.parquet: 1 pays most for a second look", kind="whole")
"""Of `FinishedRun.review_queue`."""


@dataclass(frozen=True)
class FinishedRun:
    """A run whose results are whole."""

    uri: str
    record: Mapping[str, Any]
    """Of its manifest."""
    config: Mapping[str, Any]
    """All settings, nested; with paths, where the run wrote them down."""

    @classmethod
    def of(cls, uri: str, record: Mapping[str, Any]) -> "FinishedRun":
        """Return the run in a folder, whose manifest says `record`."""
        known = record.get("config")
        config = dict(known) if isinstance(known, Mapping) else {}
        resolved = storage.join(uri, RESOLVED)
        if storage.exists(resolved):  # a manifest leaves out what does not change the results
            values = configs.parse_yaml(storage.read_bytes(resolved).decode(), resolved)
            config = configs.merge(config, values) if isinstance(values, dict) else config
        return cls(uri, record, config)

    @property
    def stage(self) -> str:
        """The stage that made it."""
        return str(self.record.get("stage", ""))

    def path(self, name: str) -> str:
        """Return the path of a file or folder in it."""
        return storage.join(self.uri, name)

    def has(self, name: str) -> bool:
        """Tell whether a file or folder is in it."""
        return storage.exists(self.path(name))

    def setting(self, key: str) -> Any:
        """Return a setting by its dotted key; None: it is not set."""
        value: Any = self.config
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def count(self, key: str) -> int | None:
        """Return a count of the record."""
        value = self.record.get(key)
        return value if isinstance(value, int) else None

    def failures(self) -> list[Failure]:
        """Return what could not be used."""
        uri = self.path("failures.parquet")
        return tables.read_rows(uri, Failure) if storage.exists(uri) else []

    def review_queue(self) -> dict[str, ReviewField]:
        """Return the queue of images for a second look, by id; empty: an earlier version made the run."""
        uri = self.path("review.parquet")
        return {field.id: field for field in tables.read_rows(uri, ReviewField)} if storage.exists(uri) else {}

    def figures(self, wanted: Iterable[tuple[str, str, str]], *, folder: str = "figures") -> list[Figure]:
        """Return those figures that the run has: name, title and how to read it."""
        found = []
        for name, title, reading in wanted:
            uri = self.path(f"{folder}/{name}.png" if folder else f"{name}.png")
            if storage.exists(uri):
                image, is_wide = figure_uri(storage.read_bytes(uri), uri)
                found.append(Figure(title, reading, image, is_wide=is_wide))
        return found

    def files(self, wanted: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Return those files that the run has: path and what it holds."""
        there = set(storage.entries(self.uri))
        return [(path, text) for path, text in wanted if path.rstrip("/").partition("/")[0] in there]

    def provenance(self) -> list[tuple[str, str]]:
        """Return what was run: what, and its value."""
        record = self.record
        found: list[tuple[str, Any]] = [("command", record.get("command")), ("ended", _when(record))]
        seconds = record.get("seconds")
        found.append(("took", duration(seconds) if isinstance(seconds, int | float) else None))
        forecast = record.get("forecast")
        found.append(("plan -> run", forecast.get("says") if isinstance(forecast, Mapping) else None))
        found += [("commit", record.get("commit")), ("machine", record.get("machine"))]
        plan = record.get("plan")
        found.append(("workers", plan.get("reason") if isinstance(plan, Mapping) else None))
        seeds = {key: value for key, value in settings.flat(self.config).items() if key.split(".")[-1] == "seed"}
        found.append(("seeds", ", ".join(f"{key} = {value}" for key, value in sorted(seeds.items()))))
        found += [("inputs", record.get("inputs")), ("again", f"stas report out={self.uri}")]
        return [(name, str(value)) for name, value in found if value]


def _when(record: Mapping[str, Any]) -> str | None:
    at = record.get("finished_unix_time_s")
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at)) if isinstance(at, int | float) else None


def duration(seconds: float) -> str:
    """Return a time as people say it.

    >>> [duration(s) for s in (4.26, 75, 7500)]
    ['4.3 s', '1 min 15 s', '2 h 5 min']
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def failed_items(failures: Sequence[Failure]) -> list[Item]:
    """Return what could not be used, as rows that say why."""
    return [Item(one.id, {}, tags=(FAILED,), problem=f"{one.reason}: {one.message}") for one in failures]


def cohort_of(uri: Any, *, or_list: bool = False) -> tuple[dict[str, CohortRow], str]:
    """Return the images of a cohort by id, and ""; or none, and why there is no such cohort (any more).

    Args:
        uri: what the run was given.
        or_list: a list of images may stand there, too, which has no truth to miss.
    """
    if not isinstance(uri, str) or not uri.endswith(".parquet"):
        return {}, ""
    try:
        return {row.id: row for row in cohorts.read_cohort(uri)}, ""
    except (ConfigError, StorageError, InputError) as error:
        return {}, "" if or_list and isinstance(error, WrongColumns) else str(error)


def setting_of(uri: Any, key: str) -> Any:
    """Return a setting of another run, such as the one that was evaluated; None: it does not say."""
    try:
        return FinishedRun.of(str(uri), {}).setting(key)
    except (ConfigError, StorageError):
        return None


def mpp_of(row: CohortRow | None, given: Any) -> tuple[float | None, str]:
    """Return the um per pixel of an image, and whose word that is."""
    if isinstance(given, int | float):
        return float(given), f"scale: {given:g} \u00b5m per px, as it was given"
    if row is None or row.mpp is None:
        return None, ""
    whose = "as it was given" if row.mpp_source == "given" else "as the file states"
    return row.mpp, f"scale: {row.mpp:g} \u00b5m per px, {whose}"
