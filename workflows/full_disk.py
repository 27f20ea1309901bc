"""What ends a search of Ray Tune at once: an output that cannot be written, which every retry would only meet again."""

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray import tune

from stas_core import local_files
from stas_core.errors import WriteError

UNWRITABLE = "unwritable"
"""In a trial's last result: the `WriteError` that it met. Raised instead, Tune would try the trial again."""


class UntilFullDisk(tune.Stopper):  # type: ignore[misc]
    """Ends the search when a trial, or the search's own records, cannot be written."""

    def __init__(self) -> None:
        self._error: WriteError | None = None

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Take note of what a trial could not write; return whether that trial ends."""
        if UNWRITABLE in result:
            self._error = self._error or WriteError(result[UNWRITABLE])
        return UNWRITABLE in result

    def stop_all(self) -> bool:
        """Return whether the search ends."""
        return self._error is not None

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Take note of what cannot be written within: Tune would only log it, or wrap it in a text."""
        try:
            yield
        except WriteError as error:
            self._error = self._error or error

    def raise_noted(self) -> None:
        """Raise what ended the search, if something did.

        Raises:
            WriteError: naming what could not be written, and why.
        """
        if self._error is not None:
            raise self._error


@contextmanager
def tune_state() -> Iterator[str]:
    """Give the folder where Ray Tune keeps its state, of this user alone: it reads pickles back from there.

    Raises:
        WriteError: the folder cannot be made, or its disk takes no more, which Tune tells in a traceback only.
    """
    with local_files.temporary_folder("stas-tune-") as folder:
        try:
            yield folder
        except (OSError, tune.TuneError) as error:
            met = [reason for number in (errno.ENOSPC, errno.EDQUOT) if (reason := os.strerror(number)) in str(error)]
            if not met:
                raise
            raise WriteError(
                f"Ray Tune cannot write temporary files, in {folder} or Ray's own folder: {met[0]}; free some space "
                "there, or set TMPDIR to a folder that has room, and run the same command again"
            ) from error
