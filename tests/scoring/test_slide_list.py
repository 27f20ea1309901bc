"""What is given with slides is matched by their ids: never in silence, and never one of two."""

import unicodedata
from pathlib import Path

import pytest

from stas_core.errors import ConfigError
from stas_core.failures import Failure
from workflows.scoring.slide_list import GivenConfig, SlideSource, find_slides
from workflows.scoring.slide_plan import SlideItem


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def find(
    slides: Path, *, mpp_csv: str | None = None, given: GivenConfig | None = None
) -> tuple[list[SlideItem], list[Failure]]:
    source = SlideSource(str(slides), mpp=None, mpp_csv=mpp_csv, given=given or GivenConfig())
    items, refused, _ = find_slides(source)
    return items, refused


@pytest.mark.parametrize(
    ("one", "other"), [("a.geojson", "a.json"), ("a.json", "x/a.geojson"), ("a.geojson", "a.ome.geojson")]
)
def test_two_files_for_one_slide_are_refused(tmp_path: Path, one: str, other: str) -> None:
    slides, given = touch(tmp_path / "slides", "a.svs"), touch(tmp_path / "given", one, other, "z.geojson", "x/z.json")
    with pytest.raises(ConfigError, match=r"given\.roi: \S+ and \S+ are both for the slide a; leave one") as error:
        find(slides, given=GivenConfig(roi=str(given)))
    assert str(given / one) in str(error.value) and str(given / other) in str(error.value)


def test_slides_without_a_file_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slides = touch(tmp_path / "slides", *(f"{name}.svs" for name in "abcdefghij"))
    given = touch(tmp_path / "given", "a.geojson", "z.geojson")
    items, _ = find(slides, given=GivenConfig(roi=str(given)))
    assert [item["id"] for item in items if item["roi_uri"] is not None] == ["a"]
    printed = capsys.readouterr().out
    assert "given.roi: 9 of 10 slides have none, first b\n" in printed
    assert f"given.roi: 1 file(s) of {given} name none of the slides, first z\n" in printed


@pytest.mark.parametrize("decomposed", [True, False])
def test_accents_are_the_same_composed_or_not(tmp_path: Path, decomposed: bool) -> None:
    names = [unicodedata.normalize("NFC", "Müller"), unicodedata.normalize("NFD", "Müller")]
    name, other = reversed(names) if decomposed else names
    slides, given = touch(tmp_path / "slides", f"{name}.svs"), touch(tmp_path / "given", f"{other}.geojson")
    ((item,), _) = find(slides, given=GivenConfig(tumour=str(given)))
    assert item["tumour_uri"] == str(given / f"{other}.geojson") and item["id"] == name


def test_what_is_named_like_an_ome_tiff_is_found(tmp_path: Path) -> None:
    slides, given = touch(tmp_path / "slides", "a.ome.tif", "b.svs"), touch(tmp_path / "given", "a.ome.geojson")
    (tmp_path / "mpp.csv").write_text("image_id,mpp\na.ome.tif,0.25\nb.svs,0.5\n")
    items, _ = find(slides, mpp_csv=str(tmp_path / "mpp.csv"), given=GivenConfig(roi=str(given)))
    assert [(item["id"], item["mpp"]) for item in items] == [("a", 0.25), ("b", 0.5)]
    assert items[0]["roi_uri"] == str(given / "a.ome.geojson")


def test_slides_that_are_all_refused_are_reported(tmp_path: Path) -> None:
    slides, given = touch(tmp_path / "slides", "x/a.svs", "y/a.svs"), touch(tmp_path / "given", "a.geojson")
    (tmp_path / "mpp.csv").write_text("image_id,mpp\nb,0.25\n")
    for extra in ({"mpp_csv": str(tmp_path / "mpp.csv")}, {"given": GivenConfig(roi=str(given))}):
        items, refused = find(slides, **extra)
        assert items == [] and [failure.id for failure in refused] == ["a"]
