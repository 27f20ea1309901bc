"""Stages write their pages just before their manifest, and lose nothing when a page cannot be made."""

import json
from pathlib import Path
from typing import Any

import pytest

from stas_core import storage
from stas_core.errors import ConfigError, WriteError
from tests.pages.made import read, scored_run
from workflows import report
from workflows.out_folder import Outputs, claim_for_stage
from workflows.report import ReportConfig
from workflows.score_images import OUTPUTS, ScoreConfig


def finish(folder: Path, *, with_results: bool = True, within: str | None = None, num: int = 3) -> dict[str, Any]:
    """End a run of score_images in <folder>/scores; return its manifest."""
    out = folder / "scores"
    with claim_for_stage(str(out), OUTPUTS, force=False, within=within) as claimed:
        facts = scored_run(folder, num) if with_results else {}
        kept: dict[str, Any] = {key: facts[key] for key in facts if key in ("verdict", "next", "seconds")}
        claimed.write_manifest(ScoreConfig(out=str(out)), "inputs", kept)
    manifest: dict[str, Any] = json.loads((out / "manifest.json").read_text())
    return manifest


def test_a_stage_writes_its_page_and_report_makes_it_again(tmp_path: Path) -> None:
    manifest = finish(tmp_path)
    assert manifest["report"] == ["report.html"] and "command" in manifest and "machine" in manifest
    page = tmp_path / "scores" / "report.html"
    first = page.read_bytes()
    assert len(read(first.decode())[2]["items"]) == 4
    page.unlink()
    assert report.run(ReportConfig(out=str(tmp_path / "scores")), False) == 0
    assert page.read_bytes() == first


def test_pages_are_the_stages_own_and_no_others(tmp_path: Path) -> None:
    outputs = Outputs("score_images", ())
    assert all(outputs.owns(name, frozenset()) for name in ("report.html", "report_2.html", "report_12.html"))
    assert not any(outputs.owns(name, frozenset()) for name in ("report_final.html", "a/report.html", "report_.html"))


def test_a_page_that_cannot_be_made_costs_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "claim.json").write_text('{"stage": "score_images", "ids": []}')
    (tmp_path / "scores" / "report.html").write_text("of an earlier run")
    manifest = finish(tmp_path, with_results=False)
    assert not (tmp_path / "scores" / "report.html").exists()
    assert manifest["report"] == [] and "images.parquet" in manifest["report_error"]
    assert f"to try again: stas report out={tmp_path}/scores" in capsys.readouterr().out


def test_a_full_disk_ends_the_run_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes = storage.write_bytes

    def refuse_pages(uri: str, data: bytes) -> None:
        if uri.endswith(".html"):
            raise WriteError(f"cannot write {uri}: No space left on device (ENOSPC)")
        write_bytes(uri, data)

    monkeypatch.setattr(storage, "write_bytes", refuse_pages)
    with pytest.raises(WriteError, match=r"report\.html: No space left"):
        finish(tmp_path)
    assert not (tmp_path / "scores" / "manifest.json").exists()


def test_trials_of_a_search_have_no_page(tmp_path: Path) -> None:
    assert "report" not in finish(tmp_path, within=str(tmp_path))


@pytest.mark.parametrize(("content", "message"), [(None, r"holds no manifest\.json"), ("os", "stage = 'os'")])
def test_what_is_no_run_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        storage.write_json(f"{tmp_path}/out/manifest.json", {"stage": content})
    with pytest.raises(ConfigError, match=message):
        report.run(ReportConfig(out=f"{tmp_path}/out"), False)
