"""Folders for temporary files: empty, gone at the end, and what a killed process leaves is gone soon."""

import errno
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stas_core import local_files, storage
from stas_core.errors import LocalDiskError, WriteError

_HOLDS_ONE = """
import sys
from pathlib import Path
from stas_core.local_files import temporary_folder
with temporary_folder() as folder:
    Path(folder, "data").write_bytes(b"half")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, of this process and of those that it starts."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    local_files._remove_abandoned.cache_clear()  # as in a process that was just started
    return tmp_path


@contextmanager
def holder() -> Iterator[tuple["subprocess.Popen[str]", Path]]:
    """A process that holds a temporary folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDS_ONE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        try:
            assert process.stdout is not None
            folder = process.stdout.readline().strip()
            assert folder, "it has ended"
            yield process, Path(folder)
        finally:
            process.kill()


def test_it_is_empty_and_gone_at_the_end(root: Path) -> None:
    with local_files.temporary_folder("stas-tune-") as folder:
        assert not [*Path(folder).iterdir()]
        Path(folder, "data").write_bytes(b"data")
    assert not [*root.iterdir()]


def test_it_is_gone_where_its_body_fails(root: Path) -> None:
    with pytest.raises(ZeroDivisionError), local_files.temporary_folder():
        raise ZeroDivisionError
    assert not [*root.iterdir()]


def test_that_of_a_killed_process_goes_with_the_next_and_that_of_a_living_one_stays(root: Path) -> None:
    (root / "stas-slides-0").mkdir()  # of other kind
    with holder() as (killed, left), holder() as (_, held):
        killed.kill()
        killed.wait()
        assert left.is_dir()
        with local_files.temporary_folder() as own:
            assert {*root.iterdir()} == {root / "stas-slides-0", held.parent, Path(own).parent}
            assert (held / "data").read_bytes() == b"half"


def test_that_of_another_machine_on_a_shared_disk_stays(root: Path) -> None:
    with holder() as (killed, left):
        killed.kill()
        killed.wait()
        (left.parent / ".held").write_text("another machine")
        with local_files.temporary_folder():
            assert left.is_dir()


def test_it_needs_no_locks_and_no_leave_to_list_where_it_lies(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr("os.scandir", refuse)
    with local_files.temporary_folder() as folder:
        Path(folder, "data").write_bytes(b"data")
        monkeypatch.undo()
        assert not Path(folder).parent.joinpath(".held").exists()
    assert not [*root.iterdir()]


def test_where_there_is_no_place_it_says_what_was_tried(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(root / "nowhere"))
    wanted = r"cannot make a temporary folder: .*nowhere.*set TMPDIR"
    with pytest.raises(WriteError, match=wanted), local_files.temporary_folder():
        pass


def test_what_cannot_be_written_there_is_a_fault_of_this_machine(tmp_path: Path) -> None:
    """Another machine may do: its disk is another one."""
    (tmp_path / "file").touch()
    with local_files.temporary_folder() as folder:
        Path(folder, "file").touch()
        for uri in (f"{folder}/file/a", f"file://{folder}/file/a"):
            with pytest.raises(LocalDiskError, match="cannot write"):
                storage.write_bytes(uri, b"")
        with pytest.raises(WriteError, match="cannot write") as elsewhere:
            storage.write_bytes(f"{tmp_path}/file/a", b"")
    with pytest.raises(WriteError, match="cannot write") as later:
        storage.write_bytes(f"{tmp_path}/file/{folder}", b"")
    assert type(elsewhere.value) is type(later.value) is WriteError
