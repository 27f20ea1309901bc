"""Vendors' slide formats, by OpenSlide: svs, ndpi, mrxs, scn, bif, DICOM."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stas_core.arrays import RgbImage
from stas_core.errors import IncompleteSlide, MissingReader
from stas_core.slides.slide import Bounds, SlideInfo, levels_of, on_white

if TYPE_CHECKING:
    import openslide

BLOCK_PX = 1024
_GONE = ("no such file", "couldn't open", "can't open")
"""What OpenSlide says of a part of a slide that is not there."""


def detect(path: Path) -> str | None:
    """Return the vendor that OpenSlide knows a file by; None: it knows none, or is not installed."""
    try:
        found: str | None = _library().OpenSlide.detect_format(str(path))
    except MissingReader:
        return None
    return found


class OpenSlideDecoder:
    """Blocks of a slide that OpenSlide reads."""

    def __init__(self, path: Path) -> None:
        library = _library()
        self._path = path
        with self._whole():
            self._slide: openslide.OpenSlide = library.OpenSlide(str(path))
        values = self._slide.properties
        self._downsamples = self._slide.level_downsamples
        self.info = SlideInfo(
            name=str(path),
            vendor=values.get("openslide.vendor", "unknown"),
            levels=levels_of(list(self._slide.level_dimensions)),
            mpp_x=_number(values.get("openslide.mpp-x")),
            mpp_y=_number(values.get("openslide.mpp-y")),
            objective=_number(values.get("openslide.objective-power")),
            bounds=_bounds(values),
        )

    def block_size(self, level: int) -> tuple[int, int]:
        """Return (width, height) of what is decoded at once."""
        return BLOCK_PX, BLOCK_PX

    def decode(self, level: int, col: int, row: int) -> RgbImage:
        """Return a block, transparent pixels white."""
        size, downsample = self.info.levels[level], self._downsamples[level]
        x, y = col * BLOCK_PX, row * BLOCK_PX
        extent = min(BLOCK_PX, size.width - x), min(BLOCK_PX, size.height - y)
        with self._whole():
            pixels = np.asarray(self._slide.read_region((round(x * downsample), round(y * downsample)), level, extent))
        rgb, alpha = pixels[..., :3], pixels[..., 3]
        return np.ascontiguousarray(rgb) if alpha.min() == 255 else on_white(rgb, alpha)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Tell apart what is damaged from what is not there.

        Raises:
            IncompleteSlide: another of the slide's files cannot be opened.
        """
        try:
            yield
        except Exception as error:
            if not any(word in str(error).lower() for word in _GONE):
                raise
            raise IncompleteSlide(
                f"{self._path} is one of several files of its slide, and another cannot be opened: {error}; copy the "
                "whole folder of the slide"
            ) from error

    def close(self) -> None:
        """Let go of the file."""
        self._slide.close()


def _library() -> Any:
    try:
        import openslide
    except (ImportError, OSError) as error:  # OSError: the C library is not there
        raise MissingReader(
            f"OpenSlide is not installed on this machine ({error}); pip install openslide-python openslide-bin"
        ) from error
    return openslide


def require() -> None:
    """Refuse to go on without OpenSlide.

    Raises:
        MissingReader: how to install it.
    """
    _library()


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _bounds(values: Any) -> Bounds | None:
    names = ("x", "y", "width", "height")
    found = [values.get(f"openslide.bounds-{name}") for name in names]
    return None if any(one is None for one in found) else Bounds(*(int(one) for one in found))
