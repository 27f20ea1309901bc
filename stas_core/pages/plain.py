"""The page of a stage that has none of its own: its facts, its failures, its files."""

from collections.abc import Mapping

from stas_core import storage
from stas_core.pages.contents import Contents
from stas_core.pages.finished import FinishedRun, failed_items

_SHOWN = (str, int, float)
_ELSEWHERE = ("stage", "commit", "command", "machine", "run_id", "inputs", "seconds", "finished_unix_time_s")

_OF_EVERY_RUN = ("claim.json", "lease.json", "manifest.json", "report.html")


def build(run: FinishedRun) -> Contents:
    """Return the contents of the page."""
    facts = [
        (name.removeprefix("num_").replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
        for name, value in run.record.items()
        if isinstance(value, _SHOWN) and not isinstance(value, bool) and name not in _ELSEWHERE
    ]
    there = [name for name in storage.entries(run.uri) if name not in _OF_EVERY_RUN and not name.startswith(".")]
    written = run.record.get("files")
    count = f"{len(written):,} files" if isinstance(written, Mapping) else "results"
    return Contents(
        title=f"{run.stage}: {count}",
        lead="What this run wrote.",
        facts=facts,
        items=failed_items(run.failures()),
        item_order="name",
        files=[(name if "." in name else f"{name}/", "") for name in there],
    )
