"""Make the page of a finished run again: report.html, which every stage writes at its end.

    python workflows/report.py out=/data/stas/scores

Writes <out>/report.html, and report_2.html and so on where the run has many images, from what lies in <out> and from
the images that it names; nothing else there is touched. For runs of earlier versions, and where images were away.
"""

import sys

if __name__ == "__main__" and not (__package__ or getattr(sys.flags, "safe_path", False)):  # a script
    import environment  # noqa: F401 - ends where this Python lacks what follows

from typing import Any

from stas_core import storage
from stas_core.config import Config, Uri
from stas_core.errors import ConfigError
from workflows import lease
from workflows.cli import main
from workflows.forecast import Forecast
from workflows.out_folder import MANIFEST, require_out
from workflows.report_pages import settings_of

STAGE = "report"


class ReportConfig(Config):
    """Settings of report."""

    out: Uri | None = None
    """Folder of the run, of any stage; path or URI."""


def run(config: ReportConfig, force: bool) -> int:
    """Make the page; return the exit status."""
    from stas_core.pages import write

    out, record, settings = _opened(config)
    with lease.hold(out, STAGE):
        names = write.write_pages(out, record, settings, lambda line: print(line, flush=True))
        known = {key: value for key, value in record.items() if key != "report_error"}
        storage.write_json(storage.join(out, MANIFEST), known | {"report": names})
    print(f"look at {storage.join(out, names[0])}{f' and {len(names) - 1} more' if len(names) > 1 else ''}")
    return 0


def plan(config: ReportConfig, force: bool) -> list[Forecast]:
    """Say of which run the page would be made."""
    out, record, _ = _opened(config)
    return [Forecast(STAGE, out, f"the page of a run of {record['stage']}", "this machine", basis="seconds as a rule")]


def _opened(config: ReportConfig) -> tuple[str, dict[str, Any], type[Config]]:
    """Return the folder, its manifest, and the settings of its stage.

    Raises:
        ConfigError: there is no finished run of a stage of this version.
    """
    out = require_out(config.out, "/data/scores")
    uri = storage.join(out, MANIFEST)
    if not storage.exists(uri):
        raise ConfigError(f"out = {out} holds no {MANIFEST}; give the folder of a stage whose run has ended")
    record = storage.read_record(uri, "stage")
    settings = settings_of(str(record["stage"]))
    if settings is None:
        raise ConfigError(f"{uri}: stage = {record['stage']!r}, which this version does not have")
    return out, record, settings


if __name__ == "__main__":
    main(STAGE, ReportConfig, run, __doc__ or "", plan=plan)
