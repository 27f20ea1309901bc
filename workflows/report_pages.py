"""The pages of a run, `report.html` and its like, as stages write them at their end."""

import importlib
import os
import platform
import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, get_type_hints

from stas_core import storage
from stas_core.config import Config
from stas_core.errors import WriteError

REPORT = "report.html"
PAGES = (REPORT, "report_{number}.html")
"""Patterns of their names, as `Outputs` has them."""


def machine() -> str:
    """Return what this process runs on, in words."""
    system = f"{platform.system()} {platform.machine()}"
    return f"{system}, {os.cpu_count()} CPUs (of the driver), Python {platform.python_version()}"


def settings_of(stage: str) -> type[Config] | None:
    """Return the class of a stage's settings; None: this version has no such stage."""
    if not stage.isidentifier() or find_spec(f"workflows.{stage}") is None:
        return None
    run = getattr(importlib.import_module(f"workflows.{stage}"), "run", None)
    found = get_type_hints(run).get("config") if run is not None else None
    return found if isinstance(found, type) and issubclass(found, Config) else None


def write_pages(out: str, record: Mapping[str, Any], cls: type[Config]) -> dict[str, Any]:
    """Write the pages of a finished run, whatever may be wrong with them; return what its manifest says of them.

    Args:
        out: its folder.
        record: of its manifest.
        cls: its settings, for a stage that this version does not have.

    Raises:
        WriteError: the disk takes no more, or the folder cannot be written.
    """
    from stas_core.pages import write  # templates and pictures, which only the end of a stage needs

    try:
        known = settings_of(str(record.get("stage")))
        names = write.write_pages(out, record, known or cls, lambda line: print(line, flush=True))
    except WriteError:
        raise
    except Exception as error:  # noqa: BLE001 - the results are whole, and a page can be made again
        reason = f"{type(error).__name__}: {error}"
        remove_pages(out)  # what they say of an earlier run is no longer so
        print(f"{REPORT} could not be made: {reason}. The results are whole; to try again: stas report out={out}")
        return {"report": [], "report_error": reason}
    print(f"look at {storage.join(out, REPORT)}", flush=True)
    return {"report": names}


def remove_pages(out: str) -> None:
    """Delete the pages of a run."""
    names = [name for name in storage.entries(out) if re.fullmatch(r"report(_[0-9]+)?\.html", name)]
    storage.remove_files(out, names)
