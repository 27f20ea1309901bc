"""Decode and encode images with one library everywhere.

Pillow is that library: it raises on a truncated JPEG, where OpenCV fills the rest with grey and goes on, and its
pixels differ from OpenCV's by up to a grey level, so mixing the two would make results depend on the path taken.
"""

import io

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from stas_core.arrays import Mask, ProbMapU8, ResizedImage, ResizedMask, RgbImage
from stas_core.errors import EmptyFile, OversizedImage, UnreadableImage, WrongBitDepth, WrongChannels

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
MAX_PIXELS = 200_000_000
"""Largest whole image that is decoded at once; larger ones are slides and are read in tiles."""

Image.MAX_IMAGE_PIXELS = None  # each call has its own limit, which Pillow's own would hide

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TIFF_BITS_PER_SAMPLE = 258


def decode_image(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> RgbImage:
    """Decode an 8-bit RGB JPEG, PNG or TIFF, turned upright by its EXIF tag as labelme does.

    Raises:
        EmptyFile, UnreadableImage, OversizedImage, WrongChannels, WrongBitDepth: naming the file and the value.
    """
    if not data:
        raise EmptyFile(f"{name} holds 0 bytes; copy the image again")
    try:
        image = Image.open(io.BytesIO(data))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UnreadableImage(f"{name} is not an image Pillow can open: {error}") from error
    if image.width * image.height > max_pixels:
        raise OversizedImage(
            f"{name} is {image.width}x{image.height} = {image.width * image.height} px, more than the limit of "
            f"{max_pixels}; cut it into fields, or score it as a slide"
        )
    depth = _bit_depth(image, data)
    if depth != 8:
        raise WrongBitDepth(f"{name} has {depth} bits per channel, expected 8; convert it with its display range")
    if image.mode != "RGB":
        raise WrongChannels(
            f"{name} has mode {image.mode} with {len(image.getbands())} channel(s), expected RGB with 3; convert it"
        )
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UnreadableImage(f"{name} is damaged: {error}; copy the image again") from error
    return np.array(upright)


def _bit_depth(image: Image.Image, data: bytes) -> int:
    # Pillow opens a 16-bit RGB PNG as 8-bit "RGB" without a word, so the header is asked.
    if data.startswith(_PNG_SIGNATURE):
        return max(data[24], 8)  # palettes and 1-bit images fail on their mode, not on their depth
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        return max(*map(int, tags.get(_TIFF_BITS_PER_SAMPLE, (8,))), 8)
    return 16 if image.mode.startswith("I") else 32 if image.mode == "F" else 8


def resize(image: RgbImage, scale: float) -> ResizedImage:
    """Shrink an image by `scale` (0 < scale <= 1) by area averaging; sides round to at least 1 px."""
    if scale == 1:
        return image
    height, width = scaled_size(image.shape[:2], scale)
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA))


def resize_mask(mask: Mask, scale: float) -> ResizedMask:
    """Shrink a mask like `resize`; a pixel stays target when at least half of its area was."""
    if scale == 1:
        return mask
    height, width = scaled_size(mask.shape, scale)
    share = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(share >= 0.5)


def scaled_size(size: tuple[int, ...], scale: float) -> tuple[int, int]:
    """Return (height, width) in px at `scale`, at least 1 each."""
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def encode_mask(mask: Mask) -> bytes:
    """Encode a mask as a 1-bit PNG."""
    return _encode(Image.fromarray(mask), "PNG", optimize=False, compress_level=6)


def decode_mask(data: bytes, name: str) -> Mask:
    """Decode a mask PNG of any depth; pixels above half of the range are target."""
    grey = _decode_grey(data, name)
    return np.asarray(grey > 127)


def encode_map(prob: ProbMapU8) -> bytes:
    """Encode an 8-bit probability map as a PNG."""
    return _encode(Image.fromarray(prob), "PNG", optimize=False, compress_level=3)


def decode_map(data: bytes, name: str) -> ProbMapU8:
    """Decode an 8-bit probability map."""
    return _decode_grey(data, name)


def _decode_grey(data: bytes, name: str) -> ProbMapU8:
    try:
        return np.array(Image.open(io.BytesIO(data)).convert("L"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UnreadableImage(f"{name} is not a grey PNG: {error}; make it again") from error


def encode_jpeg(image: RgbImage, *, quality: int = 92) -> bytes:
    """Encode an RGB image as JPEG (4:4:4 chroma, so that stain colours stay put)."""
    return _encode(Image.fromarray(image), "JPEG", quality=quality, subsampling=0)


def encode_png(image: RgbImage) -> bytes:
    """Encode an RGB image as PNG."""
    return _encode(Image.fromarray(image), "PNG", compress_level=6)


def _encode(image: Image.Image, format_name: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, format_name, **options)
    return sink.getvalue()
