"""A worker returns the errors that no retry mends; what it raises, Ray Train tries again."""

import errno
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import ray
import torch
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow.fs import FSSpecHandler, LocalFileSystem, PyFileSystem
from ray.train import Checkpoint

from stas_core.errors import ConfigError, DivergedError, LocalDiskError, ResourceError, StorageError, WriteError
from stas_core.train.recipe import FoldRecipe, FoldTask
from workflows.cluster import Demand, Node, plan_groups
from workflows.folds import fitting, worker
from workflows.folds.board import BadNode, Board
from workflows.folds.fitting import ResourcesConfig, SharedCluster


@contextmanager
def fold_that_raises(error: Exception, world_size: int) -> Iterator[Mapping[str, Any]]:
    def fail(*_: object) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "RayContext", lambda *_, on_gpu: SimpleNamespace(world_size=world_size, rank=0))
        patch.setattr(worker, "train_fold", fail)
        patch.setattr(worker, "join_group", lambda _: None)
        context = SimpleNamespace(get_world_size=lambda: world_size)
        patch.setattr(ray.train, "get_context", lambda: context)
        patch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "n1"))
        patch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.1")
        patch.setattr(ray, "get", lambda answer: answer)
        board = Board()
        methods = {
            name: SimpleNamespace(remote=getattr(board, name)) for name in ("fail", "failure", "blame", "take_blamed")
        }
        handle = SimpleNamespace(**methods)
        of_run = {"num_threads": 1, "board": handle, "backend": "gloo", "on_gpu": False}
        yield {"recipe": None, "task": SimpleNamespace(fold=0), **of_run}


FOR_GOOD = [DivergedError("lower optim.lr"), ConfigError("one value under BatchNorm"), WriteError("the disk is full")]


@pytest.mark.parametrize("error", FOR_GOOD)
def test_a_setting_that_failed_is_not_tried_again(error: Exception) -> None:
    with fold_that_raises(error, world_size=1) as config:
        assert worker.run_worker(config) == f"{type(error).__name__}: {error}"


MENDED = [StorageError("a bucket that is away"), ConnectionResetError(errno.ECONNRESET, "reset"), OSError("of a store")]


@pytest.mark.parametrize("error", MENDED)
def test_what_a_retry_may_mend_is_raised(error: Exception) -> None:
    with fold_that_raises(error, world_size=1) as config, pytest.raises(type(error)):
        worker.run_worker(config)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG])
def test_a_saved_state_that_a_disk_does_not_take_ends_the_fold(number: int) -> None:
    with fold_that_raises(OSError(number, "Error writing bytes to file"), world_size=1) as config:
        why = str(worker.run_worker(config))
    assert why.startswith("WriteError: cannot write the saved state of fold 0, which Ray Train copies to the run: ")
    assert errno.errorcode[number] in why


@pytest.mark.parametrize("error", FOR_GOOD)
def test_a_worker_that_others_wait_for_raises_and_no_further_attempt_is_made(error: Exception) -> None:
    with fold_that_raises(error, world_size=2) as config:
        with pytest.raises(type(error)):
            worker.run_worker(config)
        # Ray Train starts all workers again: each ends at once, with the reason.
        assert [worker.run_worker(config) for _ in range(2)] == [f"{type(error).__name__}: {error}"] * 2


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_nodes_own_fault_is_laid_on_it(world_size: int) -> None:
    """Then the fold is free to try another."""
    for error in (LocalDiskError("the disk is full"), ResourceError("no GPU")):
        with fold_that_raises(error, world_size) as config:
            with pytest.raises(type(error)) if world_size > 1 else nullcontext():
                worker.run_worker(config)
            board = config["board"]
            assert board.take_blamed.remote(0) == BadNode("n1", "10.0.0.1")
            assert board.take_blamed.remote(0) is None and board.failure.remote(0) is None
    with fold_that_raises(WriteError("the bucket is full"), 1) as config:
        worker.run_worker(config)
        assert config["board"].take_blamed.remote(0) is None


def fitted(
    monkeypatch: pytest.MonkeyPatch, bad: Collection[str], nodes: Sequence[str] = "abc"
) -> tuple[str | None, list[list[str]]]:
    """Return how a fold ends on nodes of which some cannot train, and what each attempt avoided."""
    board, avoided = Board(), list[list[str]]()

    def fit(*given: Any) -> str | None:
        avoided.append(sorted(given[-1]))
        node = next(name for name in nodes if name not in given[-1])
        if node in bad:
            board.blame(3, BadNode(node, f"at {node}"))
        return "LocalDiskError: the disk is full" if node in bad else None

    handle = SimpleNamespace(take_blamed=SimpleNamespace(remote=board.take_blamed))
    host = SharedCluster(plan_groups([Node(1)], Demand(1)), handle, 1.0, ends_together=False)
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    monkeypatch.setattr(fitting, "_fit", fit)
    monkeypatch.setattr(fitting, "cluster_nodes", lambda: [Node(1, 0, name) for name in nodes])
    task = FoldTask(3, [], "", {})
    return fitting.fit_where_it_can(FoldRecipe(), ResourcesConfig(), host, task, "", set()), avoided


def test_a_fold_goes_on_beside_nodes_that_cannot_train(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fitted(monkeypatch, "ab") == (None, [[], ["a"], ["a", "b"]])
    told = "fold 3 goes on elsewhere, and that node is left out: LocalDiskError: node at b: the disk is full"
    assert told in capsys.readouterr().out.splitlines()
    assert fitted(monkeypatch, "") == (None, [[]])
    assert fitted(monkeypatch, "abc") == ("LocalDiskError: node at c: the disk is full", [[], ["a"], ["a", "b"]])
    assert fitted(monkeypatch, "a", ["a"]) == ("LocalDiskError: node at a: the disk is full", [[]])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a node without a GPU")
def test_a_worker_never_takes_a_cpu_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised, so that Ray Train tries another node."""
    monkeypatch.setattr(ray.train, "get_context", MagicMock())
    assert worker.RayContext(0, 1, None, on_gpu=False).device.type == "cpu"
    with pytest.raises(ResourceError, match=r"promises a GPU, but torch finds none .*gpus_per_worker=0 to train"):
        worker.RayContext(0, 1, None, on_gpu=True)


class _Away(MemoryFileSystem):  # type: ignore[misc]
    """A store that goes away in the middle of a state."""

    protocol = "away"

    def _open(self, path: str, *args: Any, **options: Any) -> Any:
        if path.endswith("optimizer"):
            raise OSError("Slow Down")
        return super()._open(path, *args, **options)


def in_store(files: MemoryFileSystem) -> PyFileSystem:
    return PyFileSystem(FSSpecHandler(files))  # type: ignore[abstract]


@pytest.fixture
def stored() -> Iterator[str]:
    """A saved state in a store."""
    store = MemoryFileSystem()
    store.pipe({"/states/epoch_0001/model": b"weights", "/states/epoch_0001/optimizer": b"moments"})
    yield "/states/epoch_0001"
    store.rm("/states", recursive=True)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_saved_state_is_at_hand_while_it_is_needed(stored: str, temporary: Path) -> None:
    with worker.downloaded(Checkpoint(stored, in_store(MemoryFileSystem()))) as folder:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
            "model": b"weights",
            "optimizer": b"moments",
        }
    assert not [*temporary.glob("stas-*"), *temporary.glob("checkpoint*")]


def test_nothing_is_left_of_a_saved_state_that_cannot_be_had(stored: str, temporary: Path) -> None:
    gone = Checkpoint(stored, in_store(_Away()))
    with pytest.raises(OSError, match="Slow Down"), worker.downloaded(gone):
        pass
    assert not [*temporary.glob("stas-*"), *temporary.glob("checkpoint*")]


def test_a_saved_state_of_this_machine_is_read_where_it_lies(tmp_path: Path) -> None:
    with worker.downloaded(Checkpoint(str(tmp_path), LocalFileSystem())) as folder:
        assert folder == tmp_path
