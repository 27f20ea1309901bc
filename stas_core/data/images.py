"""Decode and encode images with one library everywhere.

Pillow is that library: it raises on a truncated JPEG, where OpenCV fills the rest with grey and goes on, and its
pixels differ from OpenCV's by up to a grey level, so mixing the two would make results depend on the path taken.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from stas_core import storage
from stas_core.arrays import Mask, ProbMapU8, ResizedImage, ResizedMask, RgbImage
from stas_core.errors import (
    EmptyFile,
    InputError,
    MultiplePages,
    OutOfMemory,
    OversizedImage,
    SizeMismatch,
    UnclearMask,
    UnreadableImage,
    WrongBitDepth,
    WrongChannels,
    without_addresses,
)

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "JPEG2000")
"""What is decoded, by Pillow's names. Its other decoders stay out of reach: one of them starts Ghostscript."""
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".tif", ".tiff", ".bmp", ".dib", ".webp"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpx", ".jpf"),
)
"""Suffixes of files that are listed as images. A file's content, not its name, says which format it is in."""
MAX_PIXELS = 200_000_000
"""Largest whole image that is decoded at once; larger ones are slides and are read in tiles."""

Image.MAX_IMAGE_PIXELS = None  # each call has its own limit, which Pillow's global one would hide

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_J2K_START, _J2K_COMPONENTS = b"\xff\x4f\xff\x51", 40
"""How a JPEG 2000 codestream begins, and where in it the number of components and their depths stand."""
_TIFF_SUBFILE_TYPE, _TIFF_BITS_PER_SAMPLE = 254, 258
_REDUCED_OR_MASK = 1 | 4
"""Bits of a TIFF page's NewSubfileType: a smaller copy of another page, or the transparency mask of one."""
_FOREIGN = {
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with git lfs pull",
    b"%!PS": "PostScript",
    b"%PDF": "a PDF",
    b"GIF8": "a GIF",
    b"PK\3\4": "a ZIP archive",
    b"\x1f\x8b": "a gzip archive",
    b"<": "HTML or XML, such as the error page of a failed download",
}


FINEST_MPP, COARSEST_MPP = 0.05, 5.0
"""What is believed of a microscope's image, in um per pixel."""
_UM_PER_INCH, _DESCRIPTION_TAG, _ORIENTATION_TAG = 25_400, 270, 274
_OTHER_UNITS = ("nm", "mm", "cm", "dm", "m", "pm", "in", "pixel", "reference frame")
"""Of OME; what is left is um, in spellings that depend on the encoding."""


def read_image(uri: str, *, max_pixels: int = MAX_PIXELS) -> RgbImage:
    """Read an 8-bit RGB image: (height, width, 3), uint8, upright.

    Args:
        uri: path or URI.
        max_pixels: what is larger is refused.

    Raises:
        StorageError: it cannot be read.
        InputError: as `decode_image`.
    """
    return decode_image(storage.read_bytes(uri), uri, max_pixels=max_pixels)


def decode_image(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> RgbImage:
    """Decode an 8-bit RGB image of one of `FORMATS`, turned upright by its EXIF tag as labelme does.

    From a TIFF its only full-size page is taken; from a JPEG with embedded previews (MPO), the photograph.

    Raises:
        EmptyFile, UnreadableImage, OversizedImage, WrongChannels, WrongBitDepth, MultiplePages, OutOfMemory: naming
            the file and the value.

    Example:
        >>> decode_image(encode_jpeg(np.zeros((8, 16, 3), np.uint8)), "0007.jpg").shape
        (8, 16, 3)
    """
    with _decoding(name):
        image = _open(data, name)
        _refuse_size(image, name, max_pixels)
        if _choose_page(image, name):
            _refuse_size(image, name, max_pixels)
        depth = _bit_depth(image, data)
        if depth != 8:
            raise WrongBitDepth(f"{name} has {depth} bits per channel, expected 8; convert it with its display range")
        if image.mode != "RGB":
            raise WrongChannels(
                f"{name} has mode {image.mode} with {len(image.getbands())} channel(s), expected RGB with 3; convert it"
            )
        image.load()
        return np.array(ImageOps.exif_transpose(image))


def decode_small(
    data: bytes, name: str, *, area_px: int, max_pixels: int = MAX_PIXELS
) -> tuple[tuple[int, int], ResizedImage]:
    """Return the size (height, width) of an image as `decode_image` has it, and the image shrunk to an area.

    A JPEG is decoded small at once, which takes a fraction of the time. A smaller image stays as it is.

    Raises:
        InputError: as `decode_image`.
    """
    with _decoding(name):
        image = _open(data, name)
        if image.format == "JPEG" and image.mode == "RGB" and image.width * image.height <= max_pixels:
            size = image.size
            scale = min(1.0, (area_px / (size[0] * size[1])) ** 0.5)
            image.draft("RGB", (max(1, round(size[0] * scale)), max(1, round(size[1] * scale))))
            is_turned = image.getexif().get(_ORIENTATION_TAG, 1) > 4
            small = _shrunk(np.array(ImageOps.exif_transpose(image)), area_px)
            return (size if is_turned else size[::-1]), small
    image_px = decode_image(data, name, max_pixels=max_pixels)
    return image_px.shape[:2], _shrunk(image_px, area_px)


def _shrunk(image: RgbImage | ResizedImage, area_px: int) -> ResizedImage:
    height, width = image.shape[:2]
    scale = (area_px / (height * width)) ** 0.5
    if scale >= 1:
        return np.asarray(image)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA))


def decode_figure(data: bytes, name: str) -> Image.Image:
    """Decode a figure on white.

    Raises:
        EmptyFile, UnreadableImage: naming the file.
    """
    with _decoding(name):
        image = _open(data, name).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def read_mpp(data: bytes, name: str) -> float | None:
    """Return the um per pixel that an image's file states; None: it states none, or none that a microscope has.

    Of OME-TIFF the physical size, of others the resolution: 72 or 300 dots per inch are not believed.

    Raises:
        EmptyFile, UnreadableImage: naming the file.
    """
    with _decoding(name):
        image = _open(data, name)
        text = str(getattr(image, "tag_v2", {}).get(_DESCRIPTION_TAG, ""))
        stated, unit = re.search(r'PhysicalSizeX="([0-9.]+)"', text), re.search(r'PhysicalSizeXUnit="([^"]*)"', text)
        if stated is not None:
            is_um = unit is None or unit.group(1) not in _OTHER_UNITS
            found = float(stated.group(1)) if is_um else 0.0
        else:
            across, down = (float(side) for side in image.info.get("dpi", (0, 0)))
            found = _UM_PER_INCH / across if across and abs(across - down) <= 0.03 * across else 0.0
    return found if FINEST_MPP <= found <= COARSEST_MPP else None


def _open(data: bytes, name: str) -> Image.Image:
    """Read an image's header.

    Raises:
        EmptyFile, UnreadableImage: naming the file.
    """
    if not data:
        raise EmptyFile(f"{name} holds 0 bytes; copy the image again")
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        kind = next((f"it is {text}" for start, text in _FOREIGN.items() if data.startswith(start)), "")
        raise UnreadableImage(
            f"{name} is not an image that is read here: {kind or 'its content is of no known format'}; give JPEG, PNG, "
            "TIFF, BMP, WebP or JPEG 2000"
        ) from error


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turn whatever a decoder raises, which is almost anything on damaged headers, into an error naming the file."""
    try:
        yield
    except InputError:
        raise
    except MemoryError as error:
        raise OutOfMemory(f"{name} does not fit into memory when it is decoded; make it smaller") from error
    except Exception as error:
        cause = error if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise UnreadableImage(f"{name} is damaged: {without_addresses(str(cause))}; copy the image again") from error


def _refuse_size(image: Image.Image, name: str, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise OversizedImage(
            f"{name} is {image.width}x{image.height} = {image.width * image.height} px, more than the limit of "
            f"{max_pixels}; cut it into fields, or score it as a slide"
        )


def _choose_page(image: Image.Image, name: str) -> bool:
    """Select the only full-size page; return whether the file had several pages.

    Raises:
        MultiplePages: several could be meant, or it is an animation.
    """
    if image.format == "MPO" or getattr(image, "n_frames", 1) == 1:
        return False
    num_pages: int = getattr(image, "n_frames")  # noqa: B009 - only formats with pages have it
    sizes, full = [], []
    for page in range(num_pages):
        image.seek(page)
        sizes.append(f"{image.width}x{image.height}")
        if not _tiff_tag(image, _TIFF_SUBFILE_TYPE, 0) & _REDUCED_OR_MASK:
            full.append(page)
    if image.format != "TIFF" or len(full) != 1:
        listed = ", ".join(sizes[:5]) + (", ..." if num_pages > 5 else "")
        raise MultiplePages(
            f"{name} holds {num_pages} pages or frames ({listed} px), expected one image; save the one that is "
            "meant as a file of its own"
        )
    image.seek(full[0])
    return True


def _tiff_tag(image: Image.Image, tag: int, default: int) -> int:
    return int(getattr(image, "tag_v2", {}).get(tag, default))


def _bit_depth(image: Image.Image, data: bytes) -> int:
    # Pillow opens 16-bit RGB in PNG or JPEG 2000 as 8-bit "RGB" without a word, so the header is read.
    if image.format == "PNG":
        return max(data[24], 8)  # palettes and 1-bit images fail on their mode, not on their depth
    if image.format == "JPEG2000":
        return max(_j2k_depth(data), 8)
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        return max(*map(int, tags.get(_TIFF_BITS_PER_SAMPLE, (8,))), 8)
    return 16 if image.mode.startswith("I") else 32 if image.mode == "F" else 8


def _j2k_depth(data: bytes) -> int:
    """Return the bits of the deepest component of a JPEG 2000 image."""
    start = data.index(_J2K_START) + _J2K_COMPONENTS
    num_components = int.from_bytes(data[start : start + 2], "big")
    depths = data[start + 2 : start + 2 + 3 * num_components : 3]  # each with the component's subsampling
    return max((depth & 0x7F) + 1 for depth in depths)


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


def decode_mask(data: bytes, name: str, size: tuple[int, int] | None = None) -> Mask:
    """Decode a mask by its values: 0 and one other, which is target: 1, or the largest of its depth.

    A palette image is read by its indices. In colour masks black is background, and one other colour is target.

    Raises:
        UnclearMask: other values, which do not say what is target, or a JPEG, which blurs them.
        InputError: it cannot be decoded, or its size differs from `size` (height, width).
    """
    image, depth = load_mask(data, name, size)
    if image.mode == "1":
        return np.array(image)
    if image.mode in ("RGB", "RGBA") and depth == 8:
        return _coloured(np.asarray(image), name)
    values, largest = mask_levels(image, depth, name)
    for target in (1, *largest):
        mask = values == target
        if np.all(mask | (values == 0)):
            return np.asarray(mask)
    found = np.unique(values)
    some = ", ".join(map(str, found[:6].tolist())) + ("..." if len(found) > 6 else "")
    raise UnclearMask(
        f"{name} holds {len(found)} values ({some}), expected 0 and 1, or 0 and {largest[-1]}; "
        "save it as a mask of target against the rest"
    )


def load_mask(
    data: bytes, name: str, size: tuple[int, int] | None = None, *, lossy: bool = False
) -> tuple[Image.Image, int]:
    """Open a mask with Pillow; return it and its bits per channel.

    Raises:
        SizeMismatch: its size differs from `size` (height, width); it is not decoded then.
        UnclearMask: it is a JPEG, whose values are blurred, and not known to be so (`lossy`).
        InputError: it cannot be decoded.
    """
    with _decoding(name):
        image = _open(data, name)
        if size is not None and (image.height, image.width) != size:
            raise SizeMismatch(
                f"{name} is a mask of {image.width}x{image.height} px, the image has {size[1]}x{size[0]}; pair it with "
                "its own image, or make it again at its size"
            )
        _refuse_size(image, name, MAX_PIXELS)
        if image.format == "JPEG" and not lossy:
            raise UnclearMask(f"{name} is a JPEG, which blurs the values of a mask; save it as PNG")
        image.load()
        depth = data[24] if data.startswith(_PNG_SIGNATURE) else _bit_depth(image, data)
        return image, depth


def mask_levels(image: Image.Image, depth: int, name: str) -> tuple[np.ndarray, list[int]]:
    """Return the values of a grey mask, or the indices of a palette image, and the largest that they may be.

    Raises:
        UnclearMask: it has other channels.
    """
    if image.mode not in ("1", "L", "P", "I", "F") and not image.mode.startswith("I;16"):
        raise UnclearMask(f"{name} has mode {image.mode} of {depth} bits; save the mask as 8-bit grey PNG, 0 and 255")
    values = np.asarray(image)
    if image.mode == "L" and depth in (2, 4):
        return values // (255 // (2**depth - 1)), [2**depth - 1]  # Pillow spreads them over 0 to 255
    return values, [255] if image.mode in ("L", "P") else [255, 65535]


def _coloured(pixels: np.ndarray, name: str) -> Mask:
    """Return the coloured pixels of a mask of black and one other colour; transparent counts as black."""
    colours = pixels[..., :3]
    if pixels.shape[2] == 4:
        colours = colours * (pixels[..., 3:] > 0)
    codes = colours.astype(np.uint32) @ np.array([1, 256, 65536], np.uint32)
    found = np.unique(codes)
    if len(found[found > 0]) > 1:
        raise UnclearMask(f"{name} holds {len(found)} colours, expected black and one other; save it as grey")
    return np.asarray(codes > 0)


def encode_map(prob: ProbMapU8) -> bytes:
    """Encode an 8-bit probability map as a PNG."""
    return _encode(Image.fromarray(prob), "PNG", optimize=False, compress_level=3)


def decode_map(data: bytes, name: str) -> ProbMapU8:
    """Decode an 8-bit probability map."""
    return _decode_grey(data, name)


def _decode_grey(data: bytes, name: str) -> ProbMapU8:
    with _decoding(name):
        image = _open(data, name)
        _refuse_size(image, name, MAX_PIXELS)
        return np.array(image.convert("L"))


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


def padded_size(size: tuple[int, int], *, multiple: int) -> tuple[int, int]:
    """Round height and width up to a multiple."""
    height, width = size
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def pad(image: RgbImage, mask: Mask, *, height: int, width: int) -> tuple[ResizedImage, ResizedMask, ResizedMask]:
    """Reflect-pad an image at the right and bottom; return image, mask and the mask of real pixels.

    The padded mask is False on the rim, and no rim pixel may enter loss or score: the third array is False there.

    Raises:
        SizeMismatch: the image is larger than asked for.
    """
    below, right = height - mask.shape[0], width - mask.shape[1]
    if below < 0 or right < 0:
        raise SizeMismatch(
            f"cannot pad an image of {mask.shape[0]}x{mask.shape[1]} px (height x width) to {height}x{width} px: "
            "give at least its own size, or crop it first"
        )
    padded = cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_REFLECT_101)
    rim = ((0, below), (0, right))
    return np.asarray(padded), np.pad(mask, rim), np.pad(np.ones_like(mask), rim)
