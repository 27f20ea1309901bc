"""Tiled TIFF of any size, OME-TIFF among it: only the segments that are asked for are read and decoded."""

import logging
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from stas_core.arrays import RgbImage
from stas_core.data.images import MAX_PIXELS
from stas_core.errors import (
    MissingReader,
    OversizedImage,
    UnreadableSlide,
    WrongBitDepth,
    WrongChannels,
    without_addresses,
)
from stas_core.slides.slide import BLANK, SlideInfo, levels_of, on_white

_UM_PER_RESOLUTION_UNIT = {2: 25_400.0, 3: 10_000.0}
"""By the values of TIFF's ResolutionUnit: inch, centimetre."""
_UM_PER_OME_UNIT = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "in": 25_400.0}
_VENDORS = ("is_svs", "is_ndpi", "is_scn", "is_bif", "is_philips")
"""Kinds of TIFF with rules of their own, which OpenSlide knows."""
_ASSOCIATED_ALPHA, _UNASSOCIATED_ALPHA = 1, 2
"""Values of TIFF's ExtraSamples."""
_SAME_SHAPE = 0.02
"""Smaller pages are levels where their sides' ratio differs by no more than this share."""


_LOG = logging.getLogger("tifffile")
_LOG.addHandler(logging.NullHandler())  # what it has to say of a file our errors say
_LOG.propagate = False


class Kind(Enum):
    """Whose rules a TIFF follows."""

    OME = "ome"
    VENDOR = "vendor"
    PLAIN = "plain"


class TiffDecoder:
    """Tiles, or strips, of a TIFF's largest image and of its smaller copies."""

    def __init__(self, path: Path) -> None:
        with ExitStack() as opening:
            with _complaints_are_errors(str(path)):
                self._file = opening.enter_context(tifffile.TiffFile(path))
                self._pages = _pyramid(self._file, str(path))
            for page in self._pages:
                self._refuse(page, str(path))
            mpp_x, mpp_y = _ome_mpp(self._file, self._pages[0]) if self._file.is_ome else _tag_mpp(self._pages[0])
            self.info = SlideInfo(
                name=str(path),
                vendor="ome" if self._file.is_ome else "generic-tiff",
                levels=levels_of([(page.imagewidth, page.imagelength) for page in self._pages]),
                mpp_x=mpp_x,
                mpp_y=mpp_y,
            )
            opening.pop_all()  # stays open

    def _refuse(self, page: Any, name: str) -> None:
        """Refuse a page that is no 8-bit RGB, or whose segments cannot be read one by one."""
        if page.bitspersample != 8 or page.dtype != np.uint8:
            raise WrongBitDepth(f"{name} has {page.bitspersample} bits per channel, expected 8; convert it")
        if page.samplesperpixel not in (3, 4) or page.photometric not in (2, 6) or page.imagedepth != 1:
            raise WrongChannels(
                f"{name} has {page.samplesperpixel} channel(s) of kind {page.photometric.name}, expected RGB; a slide "
                "of separate stains or of fluorescence is none that is scored here"
            )
        if page.photometric == 6 and page.compression not in (6, 7):
            raise UnreadableSlide(f"{name} holds YCbCr without JPEG; save it as RGB, or as JPEG tiles")
        width, height = _segment_size(page)
        if min(width, height, page.imagewidth, page.imagelength) < 1:
            raise UnreadableSlide(f"{name} says that it is stored in pieces of {width}x{height} px; copy it again")
        if width * height > MAX_PIXELS:
            raise OversizedImage(
                f"{name} is stored in pieces of {width}x{height} px, expected at most {MAX_PIXELS} px each, as a piece "
                "is decoded whole; save it as tiled TIFF"
            )
        num_segments = -(-page.imagewidth // width) * -(-page.imagelength // height)
        num_segments *= page.samplesperpixel if page.planarconfig == 2 else 1
        if {len(page.dataoffsets), len(page.databytecounts)} != {num_segments}:
            raise UnreadableSlide(f"{name} does not say where all of its {num_segments} pieces are; copy it again")
        ends = [at + num for at, num in zip(page.dataoffsets, page.databytecounts, strict=True) if num]
        ends += [tag.valueoffset + tag.valuebytecount for tag in page.tags]
        num_bytes = self._file.filehandle.size
        if max(ends, default=0) > num_bytes:
            raise UnreadableSlide(
                f"{name} is truncated: it has {num_bytes} bytes, and names some up to {max(ends)}; copy it again"
            )

    def block_size(self, level: int) -> tuple[int, int]:
        """Return (width, height) of what is decoded at once."""
        return _segment_size(self._pages[level])

    def decode(self, level: int, col: int, row: int) -> RgbImage:
        """Return a tile or strip."""
        page = self._pages[level]
        width, height = _segment_size(page)
        num_cols, num_rows = -(-page.imagewidth // width), -(-page.imagelength // height)
        extent = min(height, page.imagelength - row * height), min(width, page.imagewidth - col * width)
        first = row * num_cols + col
        if page.planarconfig == 1:
            pixels = self._segment(page, first, extent)
        else:
            planes = range(page.samplesperpixel)
            parts = [self._segment(page, first + plane * num_rows * num_cols, extent)[..., 0] for plane in planes]
            pixels = np.stack(parts, axis=-1)
        rgb = np.ascontiguousarray(pixels[..., :3])
        extra = page.extrasamples[0] if page.samplesperpixel == 4 and page.extrasamples else 0
        if extra == _ASSOCIATED_ALPHA:  # colours are multiplied by it already
            return np.asarray(np.minimum(rgb.astype(np.uint16) + BLANK - pixels[..., 3:], 255), np.uint8)
        return on_white(rgb, pixels[..., 3]) if extra == _UNASSOCIATED_ALPHA else rgb

    def _segment(self, page: Any, index: int, extent: tuple[int, int]) -> np.ndarray:
        channels = page.samplesperpixel if page.planarconfig == 1 else 1
        blank = np.full((*extent, channels), BLANK, np.uint8)
        if not page.databytecounts[index]:
            return blank  # a tile that was never written
        self._file.filehandle.seek(page.dataoffsets[index])
        data = self._file.filehandle.read(page.databytecounts[index])
        tables = {"jpegtables": page.jpegtables} if page.jpegtables is not None else {}
        try:
            decoded = page.decode(data, index, **tables)[0]
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            raise MissingReader(
                f"{page.compression.name} needs imagecodecs: {error}; pip install imagecodecs"
            ) from error
        if decoded is None:
            return blank
        pixels: np.ndarray = np.asarray(decoded)[0, : extent[0], : extent[1]]
        if pixels.shape != blank.shape:
            raise ValueError(f"segment {index} holds {pixels.shape}, expected {blank.shape}")
        return pixels

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def kind_of(path: Path) -> Kind | None:
    """Tell by its content whether a file is a TIFF, and whose rules it follows; None: it is no TIFF."""
    with open(path, "rb") as file:
        if file.read(4) not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return None
    with tifffile.TiffFile(path) as tiff:
        if tiff.is_ome:
            return Kind.OME
        return Kind.VENDOR if any(getattr(tiff, kind) for kind in _VENDORS) else Kind.PLAIN


@contextmanager
def _complaints_are_errors(name: str) -> Iterator[None]:
    """Refuse a file whose tags tifffile only logs as broken, and goes on without: a resolution, or half of the pages.

    Raises:
        UnreadableSlide: with the first complaint.
    """
    found: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    _LOG.addHandler(handler)
    try:
        yield
    finally:
        _LOG.removeHandler(handler)
    if found:
        raise UnreadableSlide(f"{name} is damaged, or was cut short: {without_addresses(found[0])}; copy it again")


def _pyramid(file: tifffile.TiffFile, name: str) -> list[Any]:
    """Return the page of full size and those of its smaller copies, largest first.

    Writers mark copies as sub-files, or do not mark them at all, so all pages of the same shape count.
    """
    # To mypy a page may be a frame, which is its name for pages that share the tags of another.
    series: list[Any] = [level.keyframe for one in file.series for level in one.levels]
    if not series:
        raise UnreadableSlide(f"{name} holds no image; copy it again")
    full = max(series, key=lambda page: page.imagewidth * page.imagelength)
    pages = [full]
    for page in sorted(series, key=lambda page: -page.imagewidth):
        ratio = full.imagewidth / page.imagewidth
        slack = max(_SAME_SHAPE, 1 / page.imagelength + 1 / page.imagewidth)
        alike = abs(full.imagelength / page.imagelength / ratio - 1) <= slack
        same_kind = (page.samplesperpixel, page.photometric, page.is_tiled) == (
            *(full.samplesperpixel, full.photometric),
            full.is_tiled,
        )
        if page.imagewidth < pages[-1].imagewidth and alike and same_kind:
            pages.append(page)
    return pages


def _segment_size(page: Any) -> tuple[int, int]:
    if page.is_tiled:
        return page.tilewidth, page.tilelength
    return page.imagewidth, min(page.rowsperstrip, page.imagelength)


def _tag_mpp(page: Any) -> tuple[float | None, float | None]:
    """Return um per pixel by the resolution tags."""
    unit = page.tags.valueof("ResolutionUnit", 2)
    if int(unit) not in _UM_PER_RESOLUTION_UNIT:
        return None, None
    per_unit = (page.tags.valueof("XResolution"), page.tags.valueof("YResolution"))
    sides = [_UM_PER_RESOLUTION_UNIT[int(unit)] * one[1] / one[0] if one and one[0] else None for one in per_unit]
    return sides[0], sides[1]


def _ome_mpp(file: tifffile.TiffFile, page: Any) -> tuple[float | None, float | None]:
    """Return um per pixel by the OME description of the image that has the page's size."""
    size = {"SizeX": str(page.imagewidth), "SizeY": str(page.imagelength)}
    for element in ElementTree.fromstring(file.ome_metadata or "<none/>").iter():
        values = element.attrib
        if element.tag.endswith("Pixels") and all(values.get(name) == value for name, value in size.items()):
            sides = [_ome_um(values, axis) for axis in "XY"]
            return sides[0], sides[1]
    return None, None


def _ome_um(values: dict[str, str], axis: str) -> float | None:
    size, unit = values.get(f"PhysicalSize{axis}"), values.get(f"PhysicalSize{axis}Unit", "µm")
    if size is None or unit not in _UM_PER_OME_UNIT:
        return None
    try:
        return float(size) * _UM_PER_OME_UNIT[unit]
    except ValueError:
        return None
