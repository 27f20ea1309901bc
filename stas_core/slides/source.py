"""Open a slide of any format that is read here.

    with open_slide("/data/0007.svs") as slide:
        pixels = slide.read(0, x=1024, y=2048, width=512, height=512)

OpenSlide reads vendors' formats, tifffile OME-TIFF and plain tiled TIFF, the project's decoder small images.
"""

from pathlib import Path

from stas_core import local_files
from stas_core.arrays import RgbImage
from stas_core.data import images
from stas_core.errors import EmptyFile, IncompleteSlide, UnreadableFile, UnreadableSlide
from stas_core.slides import openslide_decoder, tiff_decoder
from stas_core.slides.openslide_decoder import OpenSlideDecoder
from stas_core.slides.slide import BlockSlide, Decoder, SlideInfo, levels_of, reading
from stas_core.slides.tiff_decoder import Kind, TiffDecoder

_VENDOR_SUFFIXES = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".dcm", ".czi", ".svslide")
"""Names of files that only OpenSlide may know."""
_REMEDY = "copy the slide again, or convert it to tiled TIFF"


class ImageDecoder:
    """A plain image, decoded whole: one level, one block."""

    def __init__(self, path: Path) -> None:
        self._pixels = images.decode_image(path.read_bytes(), str(path))
        height, width = self._pixels.shape[:2]
        self.info = SlideInfo(name=str(path), vendor="image", levels=levels_of([(width, height)]))

    def block_size(self, level: int) -> tuple[int, int]:
        """Return (width, height) of the image."""
        return self.info.width, self.info.height

    def decode(self, level: int, col: int, row: int) -> RgbImage:
        """Return the image."""
        return self._pixels

    def close(self) -> None:
        """Nothing is open."""


def open_slide(path: str | Path) -> BlockSlide:
    """Open a local slide, and read a tile of it: some files open, and fail at the first read.

    Raises:
        InputError: `UnreadableSlide`, `IncompleteSlide`, `MissingReader`, or what `images.decode_image` raises; naming
            the file, the cause and the remedy.
    """
    path = Path(path)
    try:
        local_files.require_file(str(path), path.stat().st_mode)
        empty = not path.stat().st_size
    except OSError as error:
        raise UnreadableFile(f"{path}: {error.strerror or error}; check the path and its permissions") from error
    if empty:
        raise EmptyFile(f"{path} holds 0 bytes; copy the slide again")
    with reading(str(path), _REMEDY):
        slide = BlockSlide(_decoder(path))
    try:
        _probe(slide)
    except BaseException:
        slide.close()
        raise
    return slide


def _decoder(path: Path) -> Decoder:
    _refuse_lone_mrxs(path)
    kind = tiff_decoder.kind_of(path)
    if kind is Kind.OME:
        return TiffDecoder(path)
    vendor = openslide_decoder.detect(path)
    if vendor not in (None, "generic-tiff"):
        return OpenSlideDecoder(path)
    if kind is Kind.VENDOR and vendor is None:
        openslide_decoder.require()
        raise UnreadableSlide(
            f"{path} is a scanner's TIFF that OpenSlide does not know: it is damaged, or was cut short; {_REMEDY}"
        )
    if kind is not None:
        return TiffDecoder(path)
    if path.suffix.lower() in _VENDOR_SUFFIXES:
        openslide_decoder.require()
        raise UnreadableSlide(
            f"{path} holds no slide that OpenSlide knows, such as an annotation; give the slide itself"
        )
    return ImageDecoder(path)


def _refuse_lone_mrxs(path: Path) -> None:
    """Refuse a MIRAX index without its folder: OpenSlide would not even know it."""
    index = path.with_suffix("") / "Slidedat.ini"
    if path.suffix.lower() == ".mrxs" and not index.is_file():
        raise IncompleteSlide(f"{path} needs the folder {index.parent} beside it, and {index} is not there; copy both")


def _probe(slide: BlockSlide) -> None:
    """Read the middle and the last pixel of level 0, where a file that was cut short ends, and the smallest level."""
    info = slide.info
    smallest = len(info.levels) - 1
    for level, x, y in ((0, info.width // 2, info.height // 2), (0, info.width - 1, info.height - 1), (smallest, 0, 0)):
        slide.read(level, x, y, 1, 1)
