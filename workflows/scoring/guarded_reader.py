"""Read, decode and measure images in a child process that is ended when one takes too long, or too much memory.

A blocked read (a dead network mount, a pipe) or a decoder that runs wild cannot be interrupted from within its own
process, and a library may crash on what it reads.
The child lives as long as its owner and is replaced after it had to be ended.

    python -m workflows.scoring.guarded_reader FD     the child: JSON lines on stdin and stdout, pixels in the file FD
"""

import contextlib
import ctypes
import functools
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import cv2
import numpy as np
from pydantic import Field

from stas_core import errors, storage
from stas_core.arrays import RgbImage
from stas_core.config import Config, build
from stas_core.data import annotations, cohort, images, truth
from stas_core.data.annotations import AnnotationConfig, Description
from stas_core.data.cohort import Measurement
from stas_core.errors import (
    CrashedReader,
    InputError,
    OutOfMemory,
    OversizedImage,
    SlowInput,
    as_input_error,
)
from stas_core.slides.tiling import Box

if TYPE_CHECKING:  # what reads slides is loaded where there are slides
    from stas_core.slides.resolution import Mpp
    from stas_core.slides.slide import BlockSlide
    from stas_core.slides.survey import TissueShades

START_TIMEOUT_S = 120.0
"""How long the child may take to start: importing its libraries from a cold disk."""
_SURVEY_KEY = "limits.survey_timeout_s"
"""Key of the time limit for what looks at a whole slide."""
_SHM, _SHM_BYTES = "/dev/shm", 2**30
_PR_SET_PDEATHSIG = 1
_MAX_PIXEL_BYTES, _MAX_METADATA_BYTES = 4, 2**26
_POLL_S = 5.0
"""How often the child, while it has nothing to do, looks whether its slide is still there."""
_WORKING_BYTES, _SPARE_BYTES = 48, 2**29
"""Memory that an input may take: for each pixel of the largest image allowed, and beside these."""


class LimitsConfig(Config):
    """Limits beyond which an input is given up."""

    max_pixels: int = Field(50_000_000, ge=1)
    """Images with more pixels are not decoded; they are slides."""
    timeout_s: float = Field(60.0, gt=0)
    """Seconds an image may take to be read and decoded; then the process that works on it is ended."""
    retries: int = Field(1, ge=0)
    """How often a failed image is tried again before it is recorded as failed."""

    @property
    def key(self) -> str:
        """What a failure depends on beside its input."""
        return storage.fingerprint(self.model_dump_json())


class MeasureLimits(LimitsConfig):
    """Limits beyond which an image with its annotation is given up."""

    max_annotation_bytes: int = Field(100_000_000, ge=1)
    """Larger annotation files are not read."""


@dataclass(frozen=True)
class TissueSettings:
    """Where a slide's tissue is looked for."""

    config: dict[str, Any]
    """A `TissueConfig` as JSON has it."""
    tissue_uri: str | None = None
    """GeoJSON or mask image that says where tissue is."""
    roi_uri: str | None = None
    """GeoJSON outside of which nothing is scored."""


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
        answer = self._ask({"do": "decode", "uri": uri, "max_pixels": max_pixels}, timeout_s)
        return np.array(np.memmap(self._pixels, np.uint8, "r", shape=(answer["height"], answer["width"], 3)))

    def measure(self, item: Mapping[str, Any], *, config: AnnotationConfig, limits: MeasureLimits) -> Measurement:
        """Return what `cohort.measure` says of an image and its annotation (`id`, `image_uri`, `annotation_uri`).

        Raises:
            InputError: as `read`, or the annotation cannot be used.
        """
        request = {
            "do": "measure",
            "id": item["id"],
            "uri": item["image_uri"],
            "annotation_uri": item["annotation_uri"],
            "annotation": config.model_dump(mode="json"),
            "max_pixels": limits.max_pixels,
            "max_annotation_bytes": limits.max_annotation_bytes,
        }
        values = self._ask(request, limits.timeout_s)
        mask = np.array(np.memmap(self._pixels, np.uint8, "r", shape=(values["height"], values["width"])))
        return Measurement(mask.view(bool), values)

    def describe(
        self, uri: str, image_id: str | None, *, config: AnnotationConfig, limits: MeasureLimits
    ) -> Description:
        """Return what an annotation file holds, or what it says of one image, as `annotations.describe`.

        Raises:
            InputError: as `read`, or the annotation cannot be parsed.
        """
        request = {
            "do": "describe",
            "uri": uri,
            "id": image_id,
            "annotation": config.model_dump(mode="json"),
            "max_pixels": limits.max_pixels,
            "max_annotation_bytes": limits.max_annotation_bytes,
        }
        answer = self._ask(request, limits.timeout_s)
        return Description(answer["format"], answer["labels"], tuple(answer["images"]))

    def survey(
        self, path: str, *, mpp: float | None, frame_mpp: float, tissue: TissueSettings, limits: LimitsConfig
    ) -> "tuple[dict[str, Any], TissueShades]":
        """Return what `survey.survey_slide` says of a local slide: its survey's values, and its tissue.

        Raises:
            InputError: why the slide cannot be scored, as `read`.
        """
        request = {"do": "survey", "uri": path, "mpp": mpp, "frame_mpp": frame_mpp, "tissue": asdict(tissue)}
        answer = self._ask(request | {"max_pixels": limits.max_pixels}, limits.timeout_s, _SURVEY_KEY)
        size = answer["height"], answer["width"]
        return answer["survey"], np.array(np.memmap(self._pixels, np.uint8, "r", shape=size))

    def read_region(self, path: str, mpp: "Mpp", frame_mpp: float, box: Box, limits: LimitsConfig) -> RgbImage:
        """Return a box of a local slide's frame, as `RegionReader.read`.

        Raises:
            InputError: as `read`.
        """
        where = {"mpp": mpp.value, "mpp_source": mpp.source.value, "frame_mpp": frame_mpp, "box": list(box)}
        request = {"do": "region", "uri": path, "max_pixels": limits.max_pixels}
        answer = self._ask(request | where, limits.timeout_s)
        return np.array(np.memmap(self._pixels, np.uint8, "r", shape=(answer["height"], answer["width"], 3)))

    def read_thumbnail(self, path: str, max_px: int, limits: LimitsConfig) -> RgbImage:
        """Return a local slide as a whole, its longer side at most `max_px`.

        Raises:
            InputError: as `read`.
        """
        request = {"do": "thumbnail", "uri": path, "max_px": max_px, "max_pixels": limits.max_pixels}
        answer = self._ask(request, limits.timeout_s, _SURVEY_KEY)
        return np.array(np.memmap(self._pixels, np.uint8, "r", shape=(answer["height"], answer["width"], 3)))

    def _ask(self, request: Mapping[str, Any], timeout_s: float, key: str = "limits.timeout_s") -> dict[str, Any]:
        uri = request["uri"]
        child = self._running_child(uri)
        deadline = time.monotonic() + timeout_s
        try:
            assert child.stdin is not None
            child.stdin.write(json.dumps(request).encode() + b"\n")
            child.stdin.flush()
            answer: dict[str, Any] = json.loads(self._receive_line(child, deadline))
        except TimeoutError:
            self.close()
            raise SlowInput(
                f"{uri} took longer than {timeout_s:g} s to read and decode; its reader was ended; raise "
                f"{key}, or look at the file and its storage"
            ) from None
        except (EOFError, BrokenPipeError):
            status = child.wait()
            self.close()
            raise CrashedReader(f"{uri}: the process decoding it died (status {status}); look at the file") from None
        if "reason" in answer:
            raise _error(answer["reason"], answer["message"])
        return answer

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
                [sys.executable, "-m", "workflows.scoring.guarded_reader", str(self._pixels.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                pass_fds=[self._pixels.fileno()],
                cwd=Path(__file__).parents[1],
            )
            try:
                self._receive_line(self._child, time.monotonic() + START_TIMEOUT_S)
            except (TimeoutError, EOFError):
                self.close()  # else its late "ready" would be taken for an answer
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
    if sys.platform == "linux":
        Path("/proc/self/oom_score_adj").write_text(
            "1000"
        )  # if memory runs out, the kernel should kill this process first
    spent = _data_bytes()
    while line := _next_line(sys.stdin):
        request = json.loads(line)
        _limit_memory(spent + _SPARE_BYTES + _WORKING_BYTES * request["max_pixels"])
        answer = json.dumps(respond(request, pixels), ensure_ascii=False)
        answers.write(answer.encode(errors="replace") + b"\n")  # names in files may hold what UTF-8 has no bytes for
        answers.flush()


def _next_line(lines: TextIO) -> str:
    """Return the next request, "" at the end; meanwhile let go of a slide that was deleted, so that its room is free.

    No request is sent before the last one is answered: none waits in a buffer that `select` does not see.
    """
    while not select.select([lines], [], [], _POLL_S)[0]:
        _SLIDE.close_if_gone()
    return lines.readline()


def _data_bytes() -> int:
    """Return the memory for data that this process has now, in bytes."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:")), 0)


def _limit_memory(num_bytes: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard == resource.RLIM_INFINITY or num_bytes < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, hard))


def respond(request: dict[str, Any], pixels: int) -> dict[str, Any]:
    """Serve one request: write the resulting pixels to a file, and return the rest, or the failure."""
    uri = request["uri"]
    try:
        values, plane = _OPERATIONS[request["do"]](request)
    # Whatever one input raises is that input's failure.
    except Exception as error:  # noqa: BLE001
        failure = as_input_error(error, uri)
        return {"reason": failure.reason, "message": str(failure)}
    try:
        _write_all(pixels, np.ascontiguousarray(plane).data.cast("B"))
    except OSError as error:
        message = f"{uri}: no room for its {plane.nbytes} bytes in shared memory: {error.strerror}; give {_SHM} more"
        return {"reason": OutOfMemory.reason, "message": message}
    return values


def _decode(request: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    uri, max_pixels = request["uri"], request["max_pixels"]
    _refuse_slide(uri, max_pixels)
    image = images.read_image(uri, max_pixels=max_pixels)
    return {"height": image.shape[0], "width": image.shape[1]}, image


def _measure(request: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    cv2.setNumThreads(0)
    uri, annotation_uri, most = request["uri"], request["annotation_uri"], request["max_annotation_bytes"]
    _refuse_slide(uri, request["max_pixels"])
    measured = cohort.measure(
        storage.read_bytes(uri),
        truth.read_annotation_file(annotation_uri, most),
        request["id"],
        config=build(AnnotationConfig, request["annotation"]),
        max_pixels=request["max_pixels"],
    )
    return measured.values, measured.mask.view(np.uint8)


def _describe(request: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    uri = request["uri"]
    data = truth.read_annotation_file(uri, request["max_annotation_bytes"])
    found = annotations.describe(data, uri, request["id"], build(AnnotationConfig, request["annotation"]))
    return asdict(found), np.zeros(1, np.uint8)


def _survey(request: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    from stas_core.slides.survey import survey_slide
    from stas_core.slides.tissue import TissueConfig

    tissue = TissueSettings(**request["tissue"])
    survey, shades = survey_slide(
        _SLIDE.at(request["uri"]),
        mpp=request["mpp"],
        frame_mpp=request["frame_mpp"],
        config=build(TissueConfig, tissue.config),
        tissue=_named(tissue.tissue_uri),
        roi=_named(tissue.roi_uri),
    )
    return {"survey": survey.to_json(), "height": shades.shape[0], "width": shades.shape[1]}, shades


def _named(uri: str | None) -> tuple[bytes, str] | None:
    return None if uri is None else (storage.read_bytes(uri), uri)


def _region(request: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    from stas_core.slides.regions import RegionReader
    from stas_core.slides.resolution import Mpp, MppSource

    mpp = Mpp(request["mpp"], MppSource(request["mpp_source"]))
    pixels = RegionReader(_SLIDE.at(request["uri"]), mpp, request["frame_mpp"]).read(Box(*request["box"]))
    return {"height": pixels.shape[0], "width": pixels.shape[1]}, pixels


def _thumbnail(request: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    from stas_core.slides.slide import thumbnail

    pixels = thumbnail(_SLIDE.at(request["uri"]), request["max_px"])
    return {"height": pixels.shape[0], "width": pixels.shape[1]}, pixels


class OpenSlide:
    """The slide that was read last, open for the next region; one at a time, as it may be a copy that others delete."""

    def __init__(self) -> None:
        self._slide: BlockSlide | None = None
        self._version: tuple[str, int, int, int] | None = None

    def at(self, path: str) -> "BlockSlide":
        """Return the slide of a path, opened anew if its file is another one by now.

        Raises:
            InputError: as `source.open_slide`.
        """
        from stas_core.slides.source import open_slide

        version = _version_of(path)
        if self._slide is None or version is None or version != self._version:
            self.close()
            self._slide, self._version = open_slide(path), version
        return self._slide

    def close_if_gone(self) -> None:
        """Close a slide whose file was deleted: the disk keeps its bytes as long as it is open."""
        if self._version is not None and _version_of(self._version[0]) != self._version:
            self.close()

    def close(self) -> None:
        """Let go of the slide, if there is one."""
        if self._slide is not None:
            self._slide.close()
        self._slide = self._version = None


def _version_of(path: str) -> tuple[str, int, int, int] | None:
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return path, status.st_ino, status.st_size, status.st_mtime_ns


_SLIDE = OpenSlide()


_OPERATIONS = {
    "decode": _decode,
    "measure": _measure,
    "describe": _describe,
    "survey": _survey,
    "region": _region,
    "thumbnail": _thumbnail,
}


def _refuse_slide(uri: str, max_pixels: int) -> None:
    """Refuse a file that is larger than any image within the limit can be, such as a slide of many GB.

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
    """Write from the file's start; on a full file system the first write is silently short, and the next fails."""
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
