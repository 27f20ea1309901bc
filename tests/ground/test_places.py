"""Where paths lead to, however they are spelled."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stas_core import places, storage

PARTS = st.lists(st.sampled_from(["a", "b", "run 2", "c#1", "ä"]), min_size=1, max_size=4)
DETOURS = st.lists(st.sampled_from(["", ".", "a/..", "./b/../."]), min_size=1, max_size=4)


def spelled(draw: st.DrawFn, parts: list[str], folder: Path) -> str:
    """Write the same place in another way."""
    for part in ("a", "b"):
        (folder / part).mkdir(exist_ok=True)
    words = [draw(st.sampled_from(["", "./", "//", "a/../"])) + part for part in parts]
    start = draw(st.sampled_from(["", "file://", "/", f"{folder}/../{folder.name}/a/../../"]))
    path = f"{start.removesuffix(f'{folder.name}/a/../../')}{folder}" if start in ("", "file://", "/") else None
    path = path or f"{folder}/a/../../{folder.name}"
    return f"{path}/{'/'.join(words)}{draw(st.sampled_from(['', '/', '/.', '//', '/x/..']))}"


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), PARTS, PARTS)
def test_a_place_is_one_place_however_it_is_spelled(
    tmp_path: Path, data: st.DataObject, one: list[str], other: list[str]
) -> None:
    draw = data.draw
    first, second = spelled(draw, one, tmp_path), spelled(draw, [*one, *other], tmp_path)  # type: ignore[arg-type]
    assert places.place(first) == str(tmp_path.resolve().joinpath(*one))
    assert places.is_within(second, first) and places.is_within(first, first)
    assert not places.is_within(first, second)
    assert not places.is_within(f"{first.rstrip('/.')}2", first) or "x/.." in first
    assert places.place(places.absolute(first)) == places.place(first)


@given(st.sampled_from(["s3", "S3", "s3a"]), PARTS, st.sampled_from(["", "/", "//", "/.", "/x/.."]))
def test_objects_too(scheme: str, parts: list[str], tail: str) -> None:
    uri = f"{scheme}://bucket//{'/./'.join(parts)}{tail}"
    assert places.place(uri) == f"s3://bucket/{'/'.join(parts)}"
    assert places.is_within(uri, "s3://bucket") and places.is_within(f"{uri}/more", uri)
    assert not places.is_within(uri, f"/bucket/{'/'.join(parts)}") and not places.is_within(uri, "gs://bucket")


def test_links_lead_to_where_they_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real" / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "deep").symlink_to(tmp_path / "real" / "sub")
    assert places.is_within(f"{tmp_path}/link/new/out", f"{tmp_path}/real")
    assert places.is_within(f"{tmp_path}/deep/../x", f"{tmp_path}/real")  # not tmp_path/x
    assert places.absolute(f"{tmp_path}/deep/../x") == f"{tmp_path}/real/x"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert places.is_within("real/x", f"//{tmp_path}/link") and places.is_within("~/real", str(tmp_path))
    assert places.absolute("~/out//") == places.absolute("file://~/out") == f"{tmp_path}/out"
    assert places.absolute("s3://b/a/../x") == "s3://b/a/../x"  # a name of its own


def test_a_glob_stands_for_the_folder_it_searches(tmp_path: Path) -> None:
    (tmp_path / "run[2]").mkdir()
    assert places.fixed_root(f"{tmp_path}/*.jpg") == str(tmp_path)
    assert places.fixed_root(f"{tmp_path}/a/f?eld*/x.jpg") == f"{tmp_path}/a"
    assert places.fixed_root(f"{tmp_path}/run[2]") == f"{tmp_path}/run[2]"  # it is there by this name
    assert places.fixed_root("/*.jpg") == "/" and places.fixed_root("*.jpg") == "."


def test_only_the_named_files_are_removed_and_what_they_leave_empty(tmp_path: Path) -> None:
    names = ["a/b/1.png", "a/b/2.png", "a/mine.txt", ".hidden", "c/3.png"]
    for name in names:
        storage.write_bytes(f"{tmp_path}/{name}", b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a" / "elsewhere").symlink_to("/etc")
    assert storage.walk(str(tmp_path)) == sorted([*names, "a/elsewhere"])  # links are not followed
    assert storage.entries(str(tmp_path)) == [".hidden", "a", "c", "empty"]
    storage.remove_files(str(tmp_path), ["a/b/1.png", "a/b/2.png", "c/3.png", "not/there"])
    assert storage.walk(str(tmp_path)) == [".hidden", "a/elsewhere", "a/mine.txt"]
    assert storage.entries(str(tmp_path)) == [".hidden", "a", "empty"] and storage.entries(f"{tmp_path}/c") == []


@pytest.mark.parametrize("links", [True, False])
def test_a_file_is_created_by_one_of_many(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    for root in (str(tmp_path), f"memory://{tmp_path}"):
        assert [storage.create(f"{root}/new/x", data) for data in (b"1", b"2", b"1")] == [True, False, False]
        assert storage.read_bytes(f"{root}/new/x") == b"1" and storage.walk(f"{root}/new") == ["x"]
