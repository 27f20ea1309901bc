"""Mask images as annotations: what each value or colour of a picture stands for.

A mask is read by its values, never by brightness. Where `annotation.labels` lists no value, 0 (black) and one other,
1, the largest of its depth, or a colour, say what is target, as `images.decode_mask` has it. Where it lists values
(`2`: a level of 8 or 16 bits, or the index of a palette) or colours (`#c80000`), each value but 0 is a label. A
tolerance is for what cannot be read so: it changes nothing that can, and empties no mask. A mask cannot tell apart
targets that touch, nor outlines finer than its pixels.
"""

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from stas_core.data import images
from stas_core.data.shapes import Annotation, LevelPixels, Shape
from stas_core.errors import UnclearMask

SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".jpg", ".jpeg")
"""Suffixes of files that are listed as masks. A JPEG is refused, unless a tolerance is given."""
MAX_LABELS = 256
"""Most values of a mask; a photograph has more."""
FOREGROUND = "foreground"
"""Label of what a mask of one class marks."""
_VALUE, _COLOUR = re.compile(r"\d{1,5}"), re.compile(r"#[0-9a-fA-F]{6}")
_JPEG = b"\xff\xd8"
MAX_TOLERANCE, _EXAMPLE_TOLERANCE = 127, 30
_BLACK = ("0", "#000000")


@dataclass(frozen=True)
class _Levels:
    """A mask's values, or its colours as 0xrrggbb."""

    codes: npt.NDArray[np.integer]
    is_coloured: bool
    largest: int = 255
    are_indices: bool = False
    """Of a palette: one is as far from another as from any."""

    def label(self, code: int) -> str:
        return f"#{code:06x}" if self.is_coloured else str(code)

    def code(self, label: str) -> int | None:
        if self.is_coloured:
            return int(label[1:], 16) if label.startswith("#") else None
        return None if label.startswith("#") else int(label)

    def distances(self, codes: npt.NDArray[np.int64], to: int) -> npt.NDArray[np.float64]:
        """Return how far codes are from another: the largest difference in a channel, in grey levels of 255."""
        if not self.is_coloured:
            return np.abs(codes - to) * (255 / self.largest)
        off = [np.abs((codes >> bits & 255) - (to >> bits & 255)) for bits in (16, 8, 0)]
        return np.asarray(np.max(off, axis=0), np.float64)


def is_value(label: str) -> bool:
    """Tell whether a label is a value (`2`) or a colour (`#c80000`) of a mask."""
    return bool(_VALUE.fullmatch(label) or _COLOUR.fullmatch(label))


def parse_mask(data: bytes, name: str, size: tuple[int, int], *, listed: Collection[str], tolerance: int) -> Annotation:
    """Read a mask image for an image of `size` (height, width; (0, 0): of any).

    Args:
        data: the file.
        name: the file's, for errors.
        size: of the image.
        listed: labels that are known; those that are values or colours say how it is read.
        tolerance: grey levels, of 255, by which pixels may be off what is listed, or off black and white.

    Raises:
        UnclearMask: it does not say what is target.
        InputError: it cannot be decoded, or is of another size.

    Example:
        >>> data = images.encode_mask(np.eye(4, dtype=bool))
        >>> [shape.label for shape in parse_mask(data, "0007.png", (4, 4), listed=[], tolerance=0).shapes]
        ['foreground']
    """
    expected = size if any(size) else None
    known = {label.lower(): label for label in listed if is_value(label)}
    try:
        if not known:
            return _of_one_class(data, name, expected)
        image, depth = images.load_mask(data, name, expected, lossy=tolerance > 0)
    except UnclearMask as error:
        if not tolerance:
            blurred = f"set annotation.mask_tolerance={_EXAMPLE_TOLERANCE}, which lets values count as the nearest"
            raise UnclearMask(f"{error}; or {blurred if data.startswith(_JPEG) else _remedy(('<value>',))}") from error
        image, depth = images.load_mask(data, name, expected, lossy=True)
    levels = _levels(image, depth, name, known)
    if tolerance and not levels.are_indices:
        levels = _snap(levels, {*_BLACK, *(known or (str(levels.largest),))}, tolerance, name)
    codes, counts = np.unique(levels.codes, return_counts=True)
    if len(codes) > MAX_LABELS:
        raise UnclearMask(f"{name} holds {len(codes)} values; is it a picture? give a mask of few classes")
    if not known:
        if levels.is_coloured or not {0, levels.largest} >= set(codes.tolist()):
            raise UnclearMask(
                f"{name} is more than annotation.mask_tolerance = {tolerance} off black and white: "
                f"{_some(levels, codes)}; {_nearer(levels, codes)}{_remedy(_labels(levels, codes, counts))}"
            )
        white = [levels.largest] if levels.codes.any() else []
        return _annotation([_shape(FOREGROUND, levels, code, is_target=True) for code in white], levels)
    labels = {code: levels.label(code) for code in codes.tolist() if code or levels.label(code) in known}
    return _annotation([_shape(known.get(label, label), levels, code) for code, label in labels.items()], levels)


def _of_one_class(data: bytes, name: str, size: tuple[int, int] | None) -> Annotation:
    mask = images.decode_mask(data, name, size)
    levels = _Levels(mask.astype(np.uint8), False)
    return _annotation([_shape(FOREGROUND, levels, 1, is_target=True)] if mask.any() else [], levels)


def _remedy(labels: Iterable[str]) -> str:
    examples = [f"annotation.labels.{label}=target" for label in labels if label not in _BLACK]
    return f"say what a value means, such as {' '.join(examples[:2])}"


def _nearer(levels: _Levels, codes: npt.NDArray[np.integer]) -> str:
    """Return the tolerance that lets all grey levels count as black or white, as words to go before another remedy."""
    if levels.is_coloured or levels.are_indices:
        return ""
    off = [levels.distances(codes.astype(np.int64), end) for end in (0, levels.largest)]
    needed = math.ceil(np.min(off, axis=0).max())
    return f"set annotation.mask_tolerance={needed} if its edges are blurred, or " if needed <= MAX_TOLERANCE else ""


def _labels(levels: _Levels, codes: npt.NDArray[np.integer], counts: npt.NDArray[np.integer]) -> list[str]:
    """Return values as labels, those of most pixels first."""
    return [levels.label(code) for code in codes[np.argsort(-counts, kind="stable")].tolist()]


def _some(levels: _Levels, codes: npt.NDArray[np.integer]) -> str:
    return ", ".join(map(levels.label, codes[:6].tolist())) + ("..." if len(codes) > 6 else "")


def _levels(image: Image.Image, depth: int, name: str, known: Collection[str]) -> _Levels:
    """Return a mask's values; its colours, if these are listed, or if it has nothing else."""
    wants_colours = any(label.startswith("#") for label in known)
    if image.mode == "P" and wants_colours and not any(label.isdigit() for label in known):
        image, depth = image.convert("RGBA"), 8
    if image.mode not in ("RGB", "RGBA") or depth != 8:
        values, largest = images.mask_levels(image, depth, name)
        largest_px = 65535 if values.max() > 255 else largest[0]
        return _Levels(np.asarray(values, np.int32), False, largest_px, are_indices=image.mode == "P")
    pixels = np.asarray(image)
    red, green, blue = (pixels[..., channel].astype(np.int32) for channel in range(3))
    codes = red << 16 | green << 8 | blue
    if image.mode == "RGBA":
        codes[pixels[..., 3] == 0] = 0  # transparent counts as black
    if not wants_colours and (codes == (codes & 255) * 0x010101).all():
        return _Levels(codes & 255, False)  # grey, stored as RGB
    return _Levels(codes, True)


def _snap(levels: _Levels, meant: Collection[str], tolerance: int, name: str) -> _Levels:
    """Let values within the tolerance of one that is meant count as the nearest of these.

    Raises:
        UnclearMask: nothing but black would be left of a mask that is not black.
    """
    targets = sorted(code for label in meant if (code := levels.code(label)) is not None)
    found, places, counts = np.unique(levels.codes, return_inverse=True, return_counts=True)
    distances = np.stack([levels.distances(found.astype(np.int64), target) for target in targets])
    nearest = np.array(targets)[distances.argmin(axis=0)]
    snapped = np.where(distances.min(axis=0) <= tolerance, nearest, found)
    if found.any() and not snapped.any():
        raise UnclearMask(
            f"{name} holds {len(found)} values ({_some(levels, found)}), all of which annotation.mask_tolerance = "
            f"{tolerance} takes for black; {_remedy(_labels(levels, found, counts))} (or ignore)"
        )
    codes = snapped[places].reshape(levels.codes.shape)
    return _Levels(codes.astype(np.int32), levels.is_coloured, levels.largest)


def _shape(label: str, levels: _Levels, code: int, *, is_target: bool = False) -> Shape:
    height, width = levels.codes.shape
    box = np.array([[0, 0], [width - 1, height - 1]], np.float64)
    return Shape(label, "mask", box, LevelPixels(levels.codes, code), is_target=is_target)


def _annotation(found: list[Shape], levels: _Levels) -> Annotation:
    height, width = levels.codes.shape
    return Annotation(tuple(found), height, width, format="mask")
