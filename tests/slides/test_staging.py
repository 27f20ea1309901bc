"""Slides of object stores are copied once, whole, and within the limit, by any number of processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stas_core import storage
from stas_core.errors import IncompleteSlide, StorageError, WriteError
from stas_core.slides.staging import SlideCache
from tests.conftest import BUCKET

KB = 1000


def put(s3: Any, name: str, num_bytes: int = 10 * KB) -> str:
    s3.pipe(f"{BUCKET}/{name}", name.encode().ljust(num_bytes, b"."))
    return f"{BUCKET}/{name}"


def held(cache: SlideCache) -> list[int]:
    """Return the bytes of what the cache shows, and check that nothing else lies there but locks."""
    entries = [path for path in cache.folder.iterdir() if path.is_dir()]
    assert not [path.name for path in entries if path.name.startswith(".")]
    return sorted(sum(file.stat().st_size for file in entry.rglob("*") if file.is_file()) for entry in entries)


def test_a_slide_is_copied_once_until_it_changes(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[str] = []
    fetch_file = storage.fetch_file

    def counted(uri: str, path: Path) -> None:
        copied.append(uri)
        fetch_file(uri, path)

    monkeypatch.setattr(storage, "fetch_file", counted)
    cache, uri = SlideCache(tmp_path / "cache", 100 * KB), put(s3, "a.svs")
    first = cache.fetch(uri)
    assert first.name == "a.svs" and first.read_bytes() == s3.cat(uri)
    assert cache.fetch(uri) == first and copied == [uri]
    s3.pipe(uri, b"other".ljust(10 * KB))
    assert cache.fetch(uri).read_bytes().startswith(b"other") and len(copied) == 2
    assert cache.fetch(put(s3, "folder/a.svs")) != cache.fetch(uri)


def test_local_slides_stay_where_they_are(tmp_path: Path) -> None:
    cache = SlideCache(tmp_path / "cache", 1)
    assert cache.fetch("/data/a.svs") == Path("/data/a.svs") == cache.fetch("file:///data/a.svs")
    assert not cache.folder.exists()


def test_slides_of_several_files_come_whole(s3: Any, tmp_path: Path) -> None:
    cache, uri = SlideCache(tmp_path / "cache", 100 * KB), put(s3, "a.mrxs", 100)
    for name in ("a/Slidedat.ini", "a/Data0001.dat", "a/deep/Data0002.dat"):
        put(s3, name, KB)
    put(s3, "b.svs")
    path = cache.fetch(uri)
    names = sorted(str(file.relative_to(path.parent)) for file in path.parent.rglob("*") if file.is_file())
    assert names == ["a.mrxs", "a/Data0001.dat", "a/Slidedat.ini", "a/deep/Data0002.dat"]
    put(s3, "a/deep/Data0002.dat", 2 * KB)  # the slide is another one when any of its files is
    assert (cache.fetch(uri).parent / "a/deep/Data0002.dat").stat().st_size == 2 * KB


def test_the_files_of_a_dicom_series_come_together(s3: Any, tmp_path: Path) -> None:
    series = {
        name: b"DICM".rjust(132, b"\0") + b"\x20\x00\x0e\x00UI\x04\x001.2" + end
        for name, end in (("0", b"3"), ("1", b"3"), ("other", b"4"))
    }
    for name, data in series.items():
        s3.pipe(f"{BUCKET}/dicom/{name}.dcm", data)
    path = SlideCache(tmp_path / "cache", 100 * KB).fetch(f"{BUCKET}/dicom/0.dcm")
    assert sorted(file.name for file in path.parent.iterdir()) == ["0.dcm", "1.dcm"]


def test_the_least_recently_used_go_first_and_never_more_than_fits(s3: Any, tmp_path: Path) -> None:
    cache = SlideCache(tmp_path / "cache", 35 * KB)
    paths = {name: cache.fetch(put(s3, f"{name}.svs")) for name in "abc"}
    assert held(cache) == [10 * KB] * 3
    cache.fetch(f"{BUCKET}/a.svs")
    cache.fetch(put(s3, "d.svs"))
    assert [name for name in "abc" if paths[name].exists()] == ["a", "c"]
    cache.fetch(put(s3, "large.svs", 30 * KB))
    assert held(cache) == [30 * KB]


def test_what_others_keep_in_the_folder_is_left_alone(s3: Any, tmp_path: Path) -> None:
    cache, key = SlideCache(tmp_path, 15 * KB), "0" * 32
    names = [
        "backup-2024",
        "my-data",
        f"{key}-10.old",
        f"{key}-",
        f"{key[1:]}-10",
        f".{key}-10",
        f"{key}-10.tmp",
        ".x-1.tmp",
    ]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"." * 100 * KB)
    (tmp_path / f".{key}-10.tmp").mkdir()  # of a copy that was killed
    for name in "ab":
        assert cache.fetch(put(s3, f"{name}.svs")).stat().st_size == 10 * KB
    left = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert len(left) == len(names) + 1 and left > set(names)
    assert all((tmp_path / name / "file").is_file() for name in names)


def test_what_is_used_stays_and_others_wait_for_room(s3: Any, tmp_path: Path) -> None:
    cache = SlideCache(tmp_path / "cache", 25 * KB, wait_s=0.5)
    uris = [put(s3, f"{name}.svs") for name in "abc"]
    with cache.use(uris[0]) as first, cache.use(uris[0]) as again:
        cache.fetch(uris[1])
        cache.fetch(uris[2])  # takes the place of the second
        assert first == again and first.exists() and held(cache) == [10 * KB] * 2
        with (
            cache.use(uris[2]),
            pytest.raises(StorageError, match=r"b\.svs found no room .* in use, or"),
        ):
            cache.fetch(uris[1])
    patient = SlideCache(cache.folder, cache.max_bytes, wait_s=60)
    with cache.use(uris[0]):
        inner = threading.Event()

        def hold() -> None:
            with cache.use(uris[2]):
                inner.set()
                time.sleep(0.5)

        other = threading.Thread(target=hold)
        other.start()
        inner.wait(60)
        assert patient.fetch(uris[1]).exists()
        other.join()


@pytest.mark.parametrize(("free_kb", "left"), [(100, ["a", "b", "c"]), (25, ["b", "c"]), (15, ["c"]), (12, ["c"])])
def test_copies_leave_some_of_the_disk_free(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_kb: int, left: list[str]
) -> None:
    """Of a disk of 20 KB, so that 3 KB are to stay free; with 12 KB one copy can be had, but not left free."""
    cache = SlideCache(tmp_path / "cache", 100 * KB)
    uris = {name: put(s3, f"{name}.svs") for name in "abc"}

    def usage(_: Path) -> SimpleNamespace:
        return SimpleNamespace(total=20 * KB, free=free_kb * KB - sum(held(cache)))

    monkeypatch.setattr("stas_core.slides.staging.shutil.disk_usage", usage)
    paths = {name: cache.fetch(uri) for name, uri in uris.items()}
    assert [name for name, path in paths.items() if path.exists()] == left


def test_what_is_in_use_keeps_no_slide_from_what_the_disk_has(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = SlideCache(tmp_path / "cache", 100 * KB, wait_s=0)
    used = SimpleNamespace(total=20 * KB, free=12 * KB)  # of which 3 KB should stay free
    monkeypatch.setattr("stas_core.slides.staging.shutil.disk_usage", lambda _: used)
    with cache.use(put(s3, "a.svs")) as first:
        assert cache.fetch(put(s3, "b.svs")).exists() and first.exists()
        used.free = 9 * KB
        with pytest.raises(StorageError, match=r"c\.svs found no room .* disk \(9e-06 GB free\)"):
            cache.fetch(put(s3, "c.svs"))


def test_a_disk_that_others_fill_is_said_at_once(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = SlideCache(tmp_path / "cache", 100 * KB)
    used = SimpleNamespace(total=20 * KB, free=5 * KB)
    monkeypatch.setattr("stas_core.slides.staging.shutil.disk_usage", lambda _: used)
    with pytest.raises(WriteError, match=r"cannot write .*cache: No space left on device \(ENOSPC\); free some space"):
        cache.fetch(put(s3, "a.svs"))


def test_an_open_file_outlives_its_eviction(s3: Any, tmp_path: Path) -> None:
    cache = SlideCache(tmp_path / "cache", 15 * KB)
    with cache.fetch(put(s3, "a.svs")).open("rb") as file:
        cache.fetch(put(s3, "b.svs"))
        assert held(cache) == [10 * KB] and file.read().startswith(b"a.svs")


@pytest.mark.parametrize(
    ("name", "put_it", "error", "message"),
    [
        (
            "large.svs",
            True,
            StorageError,
            "large.svs holds 4e-05 GB, and the cache of slides at most 3.5e-05 GB; g",
        ),
        ("absent.svs", False, StorageError, "absent.svs does not exist"),
        ("a.vms", True, IncompleteSlide, "a.vms is of several files"),
    ],
)
def test_what_cannot_be_fetched_is_said(
    s3: Any, tmp_path: Path, name: str, put_it: bool, error: type[Exception], message: str
) -> None:
    uri = put(s3, name, 40 * KB) if put_it else f"{BUCKET}/{name}"
    cache = SlideCache(tmp_path / "cache", 35 * KB)
    with pytest.raises(error, match=message):
        cache.fetch(uri)
    assert held(cache) == []


def test_names_that_lead_out_of_the_cache_are_refused(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = put(s3, "a.mrxs")
    monkeypatch.setattr("stas_core.slides.slide_files.parts_of", lambda uri: [uri, f"{BUCKET}/a/../../evil"])
    with pytest.raises(StorageError, match="does not lie below"):
        SlideCache(tmp_path / "cache", 100 * KB).fetch(uri)


def test_a_slide_that_changes_while_it_is_copied_is_never_mixed(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, fetch_file, versions = put(s3, "a.svs"), storage.fetch_file, iter(range(2))

    def changing(source: str, path: Path) -> None:
        fetch_file(source, path)
        if (number := next(versions, None)) is not None:
            s3.pipe(uri, f"version {number}".encode().ljust(10 * KB))

    monkeypatch.setattr(storage, "fetch_file", changing)
    cache = SlideCache(tmp_path / "cache", 100 * KB)
    assert cache.fetch(uri).read_bytes().startswith(b"version 1")
    assert held(cache) == [10 * KB]
    versions = iter(range(10, 100))
    s3.pipe(uri, b"new")
    with pytest.raises(StorageError, match="changed while it was copied, 3 times"):
        cache.fetch(uri)
    assert held(cache) == [10 * KB]


READER = """
import fcntl, random, sys
from pathlib import Path
from stas_core.slides.staging import SlideCache
from tests.conftest import BUCKET
folder, seed, *uris = sys.argv[1:]
cache, chance = SlideCache(Path(folder), 45_000), random.Random(int(seed))
for _ in range(8):
    uri = chance.choice(uris)
    with cache.use(uri) as path:
        data = path.read_bytes()
        assert len(data) == 10_000 and data.startswith(path.name.encode()), (uri, len(data))
    with (Path(folder) / ".lock").open("w") as lock:  # nobody evicts, or begins a copy, while it is held
        fcntl.flock(lock, fcntl.LOCK_EX)
        entries = {entry.name.strip(".").removesuffix(".tmp") for entry in Path(folder).iterdir() if entry.is_dir()}
    held = sum(int(name.split("-")[1]) for name in entries)
    assert held <= 45_000, held
"""


def test_processes_share_a_cache(s3: Any, s3_env: dict[str, str], tmp_path: Path) -> None:
    uris = [put(s3, f"{name}.svs") for name in "abcdefg"]
    readers = [
        subprocess.Popen([sys.executable, "-c", READER, str(tmp_path), str(seed), *uris], env=os.environ | s3_env)
        for seed in range(3)
    ]
    assert [reader.wait(120) for reader in readers] == [0] * 3
    assert sum(held(SlideCache(tmp_path, 45 * KB))) <= 45 * KB


SLOW = """
import sys, time
from pathlib import Path
from stas_core import storage
from stas_core.slides.staging import SlideCache
from tests.conftest import BUCKET
def stuck(uri, path):
    path.write_bytes(b"half")
    print("copying", flush=True)
    time.sleep(600)
storage.fetch_file = stuck
SlideCache(Path(sys.argv[1]), 15_000).fetch(sys.argv[2])
"""


@pytest.mark.parametrize("next_one", ["a.svs", "b.svs"])
def test_a_copy_that_was_killed_is_never_used_and_makes_room(
    s3: Any, s3_env: dict[str, str], tmp_path: Path, next_one: str
) -> None:
    uris = {name: put(s3, name) for name in ("a.svs", "b.svs")}
    command = [sys.executable, "-c", SLOW, str(tmp_path), uris["a.svs"]]
    with subprocess.Popen(command, env=os.environ | s3_env, stdout=subprocess.PIPE) as copier:
        assert copier.stdout is not None and copier.stdout.readline() == b"copying\n"
        copier.send_signal(signal.SIGKILL)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
    cache = SlideCache(tmp_path, 15 * KB, wait_s=5)
    assert cache.fetch(uris[next_one]).read_bytes().startswith(next_one.encode())
    assert held(cache) == [10 * KB]
