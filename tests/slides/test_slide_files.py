"""Which files are slides: one entry for each slide, whatever number of files it has."""

from pathlib import Path

import pydicom
import pytest

from stas_core import storage
from stas_core.slides import slide_files


def touch(folder: Path, *names: str) -> None:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")


def write_dicom(file: Path, series: str) -> None:
    """Write what pydicom reads: a file that refers to another series before it names its own."""
    file.parent.mkdir(parents=True, exist_ok=True)
    referred, own = pydicom.Dataset(), pydicom.Dataset()
    referred.SeriesInstanceUID = "1.2.999"
    own.ReferencedSeriesSequence = [referred]
    own.SeriesInstanceUID = series
    own.file_meta = pydicom.dataset.FileMetaDataset()
    own.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    own.file_meta.MediaStorageSOPClassUID = own.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.UID("1.2.3")
    own.save_as(file, enforce_file_format=True)


def test_slides_are_found_by_suffix_and_the_rest_is_counted(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs", "deeper/b.NDPI", "c.ome.tif", "notes.txt", ".hidden.svs")
    found = slide_files.find_slides(str(tmp_path))
    assert {slide_id: Path(uri).name for slide_id, uri in found.uris.items()} == {
        "a": "a.svs",
        "b": "b.NDPI",
        "c": "c.ome.tif",
    }
    assert found.passed_over == {".txt": 1} and not found.refused


def test_the_files_of_a_mirax_slide_are_one_slide(tmp_path: Path) -> None:
    touch(tmp_path, "a.mrxs", "a/Slidedat.ini", "a/Data0000.dat", "a/thumbnail.jpg", "b.svs")
    found = slide_files.find_slides(str(tmp_path))
    assert sorted(found.uris) == ["a", "b"] and not found.passed_over
    assert len(slide_files.parts_of(found.uris["a"])) == 4 and slide_files.parts_of(found.uris["b"]) == [
        found.uris["b"]
    ]
    (before,) = slide_files.stamps([found.uris["a"]])
    (tmp_path / "a" / "Data0000.dat").write_bytes(b"other")
    assert slide_files.stamps([found.uris["a"]]) != [before]


def test_the_files_of_a_dicom_series_are_one_slide(tmp_path: Path) -> None:
    for number in range(3):
        write_dicom(tmp_path / "case_1" / f"level_{number}.dcm", "1.2.3")
    write_dicom(tmp_path / "mixed" / "one.dcm", "1.2.4")
    write_dicom(tmp_path / "mixed" / "two.dcm", "1.2.55")
    found = slide_files.find_slides(str(tmp_path))
    assert sorted(found.uris) == ["case_1", "one", "two"]
    assert len(slide_files.parts_of(found.uris["case_1"])) == 3 and len(slide_files.parts_of(found.uris["one"])) == 1


def test_the_heads_of_dicom_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        write_dicom(tmp_path / f"case_{number}.dcm", f"1.2.{number // 2}")
    read: list[str] = []
    read_bytes = storage.read_bytes

    def counted(uri: str, end: int | None = None) -> bytes:
        read.append(uri)
        return read_bytes(uri, end)

    found = slide_files.find_slides(str(tmp_path))
    monkeypatch.setattr(storage, "read_bytes", counted)
    marks = slide_files.stamps(list(found.uris.values()))
    assert len(set(marks)) == 6 and len(read) == len(set(read)) == 12
    assert slide_files.stamps([str(tmp_path / "gone" / "a.dcm")]) == ["unreadable"]


def test_two_slides_of_one_name_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.svs", "y/a.ndpi", "b.svs")
    found = slide_files.find_slides(str(tmp_path))
    assert sorted(found.uris) == ["b"]
    ((slide_id, error),) = found.refused
    assert slide_id == "a" and "rename one" in str(error)


@pytest.mark.parametrize("data", [b"", b"\0" * 200, b"\x20\x00\x0e\x00UI", b"\x20\x00\x0e\x00UI\xff\xff"])
def test_a_dicom_file_without_a_series_is_its_own_slide(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "odd.dcm").write_bytes(data)
    assert list(slide_files.find_slides(str(tmp_path)).uris) == ["odd"]
