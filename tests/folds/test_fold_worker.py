"""A worker returns the errors that no retry mends; what it raises, Ray Train tries again."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from stas_core.errors import ConfigError, DivergedError, StorageError
from workflows.folds import worker


@contextmanager
def fold_that_raises(error: Exception, world_size: int) -> Iterator[Mapping[str, Any]]:
    def fail(*_: object) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "RayContext", lambda *_: SimpleNamespace(world_size=world_size, rank=0))
        patch.setattr(worker, "train_fold", fail)
        patch.setattr(worker, "join_group", lambda _: None)
        yield {"recipe": None, "task": SimpleNamespace(fold=0), "num_threads": 1, "board": None, "backend": "gloo"}


@pytest.mark.parametrize("error", [DivergedError("lower optim.lr"), ConfigError("one value under BatchNorm")])
def test_a_setting_that_failed_is_not_tried_again(error: Exception) -> None:
    with fold_that_raises(error, world_size=1) as config:
        assert worker.run_worker(config) == f"{type(error).__name__}: {error}"


def test_what_a_retry_may_mend_is_raised() -> None:
    with fold_that_raises(StorageError("a bucket that is away"), world_size=1) as config, pytest.raises(StorageError):
        worker.run_worker(config)


def test_a_worker_that_others_wait_for_raises() -> None:
    with fold_that_raises(DivergedError("lower optim.lr"), world_size=2) as config, pytest.raises(DivergedError):
        worker.run_worker(config)
