"""Read and decode images in a child process that is ended when an image takes too long.

A blocked read (a dead network mount, a pipe) or a decoder that runs wild cannot be interrupted from within its own
process. The child lives as long as its owner and is replaced after it had to be ended.

    python -m workflows.deadline FD     the child: JSON lines on stdin and stdout, pixels in the file FD
"""

import contextlib
import ctypes
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from stas_core import errors, images, storage
from stas_core.arrays import RgbImage
from stas_core.errors import (
    CrashedReader,
    InputError,
    OutOfMemory,
    OversizedImage,
    SlowInput,
    StorageError,
    UnreadableFile,
)

START_TIMEOUT_S = 120.0
"""How long the child may take to start: importing its libraries from a cold disk."""
_SHM, _SHM_BYTES = "/dev/shm", 2**30
_PR_SET_PDEATHSIG = 1
_MAX_PIXEL_BYTES, _MAX_METADATA_BYTES = 4, 2**26


class GuardedReader:
    """Owns the child process."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        # Pixels go through a nameless file, in memory where there is room: through a pipe they would take longer than
        # decoding does.
        self._pixels = tempfile.TemporaryFile(dir=_SHM if _has_room(_SHM) else None)  # noqa: SIM115

    def read(self, uri: str, *, max_pixels: int, timeout_s: float) -> RgbImage:
        """Return the decoded image.

        Raises:
            InputError: the image cannot be read (`UnreadableFile`), decoded, or not within the deadline (`SlowInput`).
        """
        child = self._running_child(uri)
        request = json.dumps({"uri": uri, "max_pixels": max_pixels}).encode() + b"\n"
        deadline = time.monotonic() + timeout_s
        try:
            assert child.stdin is not None
            child.stdin.write(request)
            child.stdin.flush()
            answer = json.loads(self._receive_line(child, deadline))
        except TimeoutError:
            self.close()
            raise SlowInput(
                f"{uri} took longer than {timeout_s:g} s to read and decode; its reader was ended; raise "
                "limits.timeout_s, or look at the file and its storage"
            ) from None
        except (EOFError, BrokenPipeError):
            status = child.wait()
            self.close()
            raise CrashedReader(f"{uri}: the process decoding it died (status {status}); look at the file") from None
        if "reason" in answer:
            raise _error(answer["reason"], answer["message"])
        return np.array(np.memmap(self._pixels, np.uint8, "r", shape=(answer["height"], answer["width"], 3)))

    def close(self) -> None:
        """End the child process, if there is one."""
        if self._child is None:
            return
        self._child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel, on a dead mount: it ends with it
            self._child.wait(5)
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            pipe.close()
        self._child = None

    def _running_child(self, uri: str) -> "subprocess.Popen[bytes]":
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "workflows.deadline", str(self._pixels.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                pass_fds=[self._pixels.fileno()],
                cwd=Path(__file__).parents[1],
            )
            try:
                self._receive_line(self._child, time.monotonic() + START_TIMEOUT_S)
            except (TimeoutError, EOFError):
                self.close()  # or its late "ready" would be taken for an answer
                raise CrashedReader(
                    f"{uri}: the process to decode it did not start within {START_TIMEOUT_S:g} s; its stderr is in "
                    "Ray's worker logs"
                ) from None
        return self._child

    def _receive_line(self, child: "subprocess.Popen[bytes]", deadline: float) -> bytes:
        assert child.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            if not select.select([child.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            part = child.stdout.read(1 << 16)
            if not part:
                raise EOFError
            line += part
        return line


@functools.cache
def reader() -> GuardedReader:
    """Return this process's reader."""
    return GuardedReader()


def _error(reason: str, message: str) -> InputError:
    by_reason: dict[str, type[InputError]] = {
        cls.reason: cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, InputError)
    }
    return by_reason.get(reason, InputError)(message)


def serve() -> None:
    """Answer requests until stdin ends."""
    if sys.platform == "linux":  # a child blocked in a read would outlive its owner unnoticed
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    pixels, answers = int(sys.argv[1]), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers
    answers.write(b"ready\n")
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(_answer(json.loads(line), pixels)).encode() + b"\n")
        answers.flush()


def _answer(request: dict[str, Any], pixels: int) -> dict[str, Any]:
    uri, max_pixels = request["uri"], request["max_pixels"]
    try:
        _refuse_slide(uri, max_pixels)
        image = images.decode_image(storage.read_bytes(uri), uri, max_pixels=max_pixels)
    except InputError as error:
        return {"reason": error.reason, "message": str(error)}
    except StorageError as error:
        return {"reason": UnreadableFile.reason, "message": str(error)}
    try:
        _write_all(pixels, np.ascontiguousarray(image).data.cast("B"))
    except OSError as error:
        message = f"{uri}: no room for its {image.nbytes} bytes in shared memory: {error.strerror}; give {_SHM} more"
        return {"reason": OutOfMemory.reason, "message": message}
    return {"height": image.shape[0], "width": image.shape[1]}


def _refuse_slide(uri: str, max_pixels: int) -> None:
    """Refuse a file by its size alone where no image within the limit can be so large: a slide of many GB, say.

    Raises:
        OversizedImage: naming both sizes.
    """
    most = _MAX_PIXEL_BYTES * max_pixels + _MAX_METADATA_BYTES
    if (num_bytes := storage.size(uri)) > most:
        raise OversizedImage(
            f"{uri} has {num_bytes} bytes, an image of limits.max_pixels = {max_pixels} at most {most}; cut it into "
            "fields, or raise limits.max_pixels"
        )


def _write_all(file: int, data: memoryview) -> None:
    """Write from the file's start; where it is full, the system writes a part without a word, and only then fails."""
    written = 0
    while written < len(data):
        written += os.pwrite(file, data[written:], written)


def _has_room(folder: str) -> bool:
    """Tell whether a memory file system has room for images; containers often have 64 MB, for all processes."""
    try:
        system = os.statvfs(folder)
    except OSError:
        return False
    return system.f_bavail * system.f_frsize >= _SHM_BYTES


if __name__ == "__main__":
    serve()
