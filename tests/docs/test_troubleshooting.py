"""What the page of troubleshooting explains is what the code says."""

import re

import pytest

from stas_core import errors
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
MESSAGES = re.findall(r"^\| `([^`]+)`", PAGE.partition("## A verdict")[0], re.M)
SOURCES = "".join(
    re.sub(r'"\n\s+f?"', "", path.read_text())  # texts that go on in the next line
    for folder in ("workflows", "stas_core")
    for path in (ROOT / folder).rglob("*.py")
)


@pytest.mark.parametrize("message", sorted(set(MESSAGES)))
def test_messages_that_are_explained_are_said(message: str) -> None:
    assert message in SOURCES


def test_every_reason_is_explained_and_marked_where_it_is_tried_again() -> None:
    table = PAGE.partition("## Reasons in failures.parquet")[2]
    rows = re.findall(r"^\| (`.+?) \|", table, re.M)
    explained = {reason: row.endswith("*") for row in rows for reason in re.findall(r"`(\w+)`", row)}
    classes = [errors.InputError]
    for cls in classes:
        classes += cls.__subclasses__()
    assert explained == {cls.reason: cls.reason in errors.TRY_AGAIN for cls in classes if cls is not errors.InputError}
