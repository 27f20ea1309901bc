"""Which files a stage finds below a folder, under which ids, and what it says of the rest."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stas_core import storage
from stas_core.data import listing
from stas_core.errors import InputError, NotAFile, StorageError

JPG = (".jpg", ".jfif")
NAMES = st.text(st.characters(), max_size=6)  # lone surrogates, too


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def names(folder: Path, source: str = "") -> list[str]:
    found = storage.list_files(f"{folder}{source}", JPG)
    return [path.removeprefix(f"{folder}/") for path in found]


def test_a_glob_that_matches_folders_alone_is_refused(tmp_path: Path) -> None:
    touch(tmp_path / "case1" / "images" / "a.jpg", tmp_path / "case2" / "images" / "b.jpg")
    with pytest.raises(StorageError, match=r"images matches folders alone, such as .*case1/images; append /\* or"):
        names(tmp_path, "/*/images")
    assert names(tmp_path, "/*/images/*") == ["case1/images/a.jpg", "case2/images/b.jpg"]
    assert names(tmp_path, "/*/nothing") == []
    (tmp_path / "empty" / ".cache").mkdir(parents=True)
    assert names(tmp_path, "/empty/*") == names(tmp_path, "/empty/**") == []  # these ask for what lies in folders


def test_a_glob_of_an_object_store_gives_files_alone() -> None:
    for name in ("b/a.jpg", "b/case1/images/a.jpg", "b/case2/images/b.jpg"):
        storage.write_bytes(f"memory://globs/{name}", b"x")
    assert storage.list_files("memory://globs/b/*") == ["memory:///globs/b/a.jpg"]
    with pytest.raises(StorageError, match="folders alone"):
        storage.list_files("memory://globs/b/*/images")


def test_what_is_passed_over_is_counted_by_suffix(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("a.jpg", "b.JFIF", "c.svs", "d.SVS", "sub/e.jpg.part", "README", ".hidden")))
    found = listing.find(str(tmp_path), JPG)
    assert list(found.uris) == ["a", "b"]
    assert found.passed_over == {"": 1, ".part": 1, ".svs": 2}
    expected = "data.images: passed over 1 without a suffix, 1 .part, 2 .svs (whole slides)"
    assert found.describe("data.images") == expected
    assert listing.find(str(tmp_path / "a.jpg"), JPG).describe("x") == ""
    fields = found.with_slides_refused()
    assert fields.passed_over == {"": 1, ".part": 1}
    assert [name for name, _ in fields.refused] == ["c.svs", "d.SVS"]
    assert str(fields.refused[0][1]).endswith(
        "c.svs is a whole slide, not a field: cut it into fields, or score it by score_slides"
    )


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    folder, outside = tmp_path / "in", tmp_path / "outside"
    touch(folder / "real" / "a.jpg", outside / "deep" / "b.jpg")
    (folder / "loop").symlink_to(folder)
    (folder / "0_again").symlink_to(folder / "real")
    (folder / "linked").symlink_to(outside)
    (outside / "back").symlink_to(folder)
    (folder / "self").symlink_to(folder / "self")
    assert names(folder) == ["linked/deep/b.jpg", "real/a.jpg"]
    assert names(folder, "/**/*.jpg") == ["linked/deep/b.jpg", "real/a.jpg"]
    assert names(folder, "/*/*.jpg") == ["real/a.jpg"]
    (tmp_path / "whole").symlink_to(folder)
    assert names(tmp_path / "whole") == ["linked/deep/b.jpg", "real/a.jpg"]


def test_a_broken_link_and_a_pipe_among_images_are_found_and_told(tmp_path: Path) -> None:
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert list(listing.find(str(tmp_path), JPG).uris) == ["gone", "pipe"]
    assert storage.stamps([str(tmp_path / "gone.jpg")]) == ["unreadable"]
    with pytest.raises(StorageError, match=r"gone\.jpg: it is a link to .*nowhere\.jpg, which is not there"):
        storage.read_bytes(str(tmp_path / "gone.jpg"))
    with pytest.raises(NotAFile, match=r"pipe\.jpg is a named pipe, not a file"):
        storage.read_bytes(str(tmp_path / "pipe.jpg"))
    with pytest.raises(NotAFile, match="is a folder, not a file"):
        storage.read_bytes(str(tmp_path))
    with pytest.raises(NotAFile, match="is a device, not a file"):
        storage.read_bytes("/dev/zero")


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "a.jpg", tmp_path / "locked" / "b.jpg")
    scandir = os.scandir

    def deny(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(StorageError, match=r"cannot list .*/locked: Permission denied; check its permissions"):
        storage.list_files(str(tmp_path), JPG)
    assert names(tmp_path, "/*.jpg") == ["a.jpg"]  # the glob never looks there


def test_a_mark_is_of_what_a_link_leads_to(tmp_path: Path) -> None:
    touch(tmp_path / "a.jpg")
    link = tmp_path / "link.jpg"
    link.symlink_to(tmp_path / "a.jpg")
    before = storage.stamp(str(link))
    os.utime(tmp_path / "a.jpg", (1, 1))
    assert storage.stamp(str(link)) != before


def test_names_that_are_not_utf_8_are_refused_in_print(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/\xb2\xd5.jpg"
    Path(os.fsdecode(raw)).write_bytes(b"x")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xb2")).mkdir()
    touch(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xb2/good.jpg")), tmp_path / "two\nlines.jpg", tmp_path / "c.jpg")
    found = listing.find(str(tmp_path), JPG)
    assert list(found.uris) == ["c"]
    refused = {image_id: str(error) for image_id, error in found.refused}
    assert refused.keys() == {r"\xb2\xd5", "good", r"two\nlines"}
    for image_id, message in refused.items():
        assert (image_id + message).isprintable() and (image_id + message).encode()
    assert r"\xb2/good.jpg has control characters or is not UTF-8; rename its folder" in refused["good"]


@pytest.mark.parametrize(
    "name", ["a::b.jpg", "s3::x.jpg", "memory::b.jpg", "[a]*?.jpg", "50 % #2.jpg", "ä" * 100 + ".jpg"]
)
def test_unusual_names_are_read_and_written(tmp_path: Path, name: str) -> None:
    uri = str(tmp_path / name)
    storage.write_bytes(uri, b"data")
    assert storage.list_files(str(tmp_path), JPG) == [uri]
    assert storage.read_bytes(uri) == b"data" and storage.size(uri) == 4


@pytest.mark.parametrize("num_bytes", [240, 251, 255])
def test_names_as_long_as_the_disk_allows_are_written(tmp_path: Path, num_bytes: int) -> None:
    uri = str(tmp_path / ("x" * (num_bytes - 4) + ".png"))
    storage.write_bytes(uri, b"data")
    assert storage.read_bytes(uri) == b"data" and len(list(tmp_path.iterdir())) == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NAMES, NAMES), max_size=5))
def test_every_file_is_used_or_refused_in_words_that_can_be_stored(found: list[tuple[str, str]]) -> None:
    uris, refused = listing.by_id(found)
    assert len(uris) + len(refused) == len({image_id for image_id, _ in found})
    for image_id, error in refused:
        assert isinstance(error, InputError)
        (image_id + str(error)).encode()  # no lone surrogates
        assert "\n" not in image_id + str(error)


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    touch(tmp_path / "a.jpg", tmp_path / "sub" / "a.jfif", tmp_path / "b.jpg")
    found = listing.find(str(tmp_path), JPG)
    assert list(found.uris) == ["b"]
    assert found.refused[0][0] == "a" and "ids must be unique, rename one" in str(found.refused[0][1])


@pytest.mark.parametrize(("one", "other"), [("a7", "A7"), ("straße", "STRASSE"), ("M\u00fcller", "mu\u0308ller")])
def test_names_that_are_one_to_some_disks_are_refused(one: str, other: str) -> None:
    found = [(one, f"/x/{one}.svs"), (other, f"/y/{other}.svs"), ("b", "/x/b.svs")]
    uris, refused = listing.by_id(found)
    assert list(uris) == ["b"] and {name for name, _ in refused} == {one, other}
    for _, error in refused:
        assert error.reason == "duplicate_id" and "differ only in case or in how accents are written" in str(error)
        assert f"/x/{one}.svs" in str(error) and f"/y/{other}.svs" in str(error)


def test_files_take_the_ids_that_they_are_named_alike(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("mu\u0308ller.jpg", "A1.jpg", "c.jpg", "D.jpg", "D.jfif", ".hidden")))
    found = listing.find(str(tmp_path), JPG).with_ids_of(["a1", "M\u00fcller", "d"])
    assert {one: storage.name_of(uri) for one, uri in found.uris.items()} == {
        "M\u00fcller": "mu\u0308ller.jpg",
        "a1": "A1.jpg",
        "c": "c.jpg",
    }
    assert list(found.uris) == sorted(found.uris) and [image_id for image_id, _ in found.refused] == ["d"]
