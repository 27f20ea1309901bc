"""Layers of images for a page: small WebP pictures as data URIs, outlines as SVG paths in px of the image."""

import base64
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
from PIL import Image

from stas_core import storage
from stas_core.arrays import Mask, ProbMapU8, ResizedMapU8
from stas_core.data import images
from stas_core.errors import InputError, StorageError
from stas_core.pages.contents import PictureSource
from stas_core.scores import metrics

PAGE_BYTES = 12_500_000
"""What the pictures of a page may take together, as text."""
MAX_PICTURE_BYTES = 200_000
"""What those of one image take at most, however few there are."""
_IMAGE_SHARE, _MAP_SHARE, _PATH_SHARE = 0.68, 0.1, 0.06
"""Of these, what the image, each of two maps and each of two outlines may take."""
_BYTES_PER_PX = 0.28
"""Of H&E as WebP of the first quality; measured on fields of 20x."""
_QUALITIES = (65, 50, 35, 20)
_MAX_PIXELS = 400_000_000
_MAX_THREADS = 8


@dataclass
class Picture:
    """The layers of an image, and what is not right about them."""

    height: int = 0
    """In px of the image, like `width`."""
    width: int = 0
    layers: dict[str, str] = field(default_factory=dict)
    """`image`, `map` and `disagreement` as data URIs, `found` and `truth` as SVG paths."""
    dice: float | None = None
    """Of the mask against the truth, where both are there."""
    notes: list[str] = field(default_factory=list)
    """Why a layer is missing."""

    def to_json(self) -> dict[str, Any]:
        """Return it as the page's script takes it."""
        return {"w": self.width, "h": self.height, **self.layers, "notes": self.notes}


def make_pictures(sources: Sequence[PictureSource | None]) -> Iterator[Picture]:
    """Yield the layers of each image in turn, made side by side; they fit a page together."""
    num_shown = max(1, sum(source is not None for source in sources))
    budget = min(MAX_PICTURE_BYTES, PAGE_BYTES // num_shown)

    def make(source: PictureSource | None) -> Picture:
        return Picture() if source is None else make_picture(source, budget)

    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        yield from pool.map(make, sources)


def make_picture(source: PictureSource, num_characters: int) -> Picture:
    """Make the layers of an image; one that cannot be read is left out and noted, whatever is wrong with it.

    Args:
        source: where its layers are.
        num_characters: what they may take together.
    """
    picture = Picture()
    num_bytes = num_characters * 3 // 4  # of which base64 makes four characters
    image_bytes = int(num_bytes * _IMAGE_SHARE)
    size = _try(picture, "image", lambda: _add_image(picture, source.image_uri, image_bytes))
    masks = {}
    for layer, uri in (("found", source.mask_uri), ("truth", source.truth_uri)):
        mask = _try(picture, layer, lambda uri=uri: _read_mask(uri)) if uri else None  # type: ignore[misc]
        if mask is not None:
            masks[layer] = mask
    if size is None and masks:
        picture.height, picture.width = next(iter(masks.values())).shape
    for layer, mask in masks.items():
        if mask.shape != (picture.height, picture.width):
            shape = f"{mask.shape[1]}x{mask.shape[0]}"
            picture.notes.append(f"{layer}: {shape} px, the image {picture.width}x{picture.height} px")
        else:
            picture.layers[layer] = outline_path(mask, int(num_characters * _PATH_SHARE))
    if len(masks) == 2 and masks["found"].shape == masks["truth"].shape and masks["truth"].any():
        picture.dice = metrics.count(masks["found"], masks["truth"]).dice
    for layer, uri in (("map", source.map_uri), ("disagreement", source.disagreement_uri)):
        if uri:
            _try(picture, layer, lambda layer=layer, uri=uri: _add_map(picture, layer, uri, num_bytes))  # type: ignore[misc]
    return picture


def _try(picture: Picture, layer: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (InputError, StorageError) as error:
        picture.notes.append(f"{layer}: {error}")
        return None


def _add_image(picture: Picture, uri: str, num_bytes: int) -> tuple[int, int]:
    size, image = images.decode_small(storage.read_bytes(uri), uri, area_px=_area_px(num_bytes), max_pixels=_MAX_PIXELS)
    picture.height, picture.width = size
    picture.layers["image"] = data_uri(encode_webp(Image.fromarray(image), num_bytes))
    return size


def _area_px(num_bytes: int) -> int:
    return int(num_bytes / _BYTES_PER_PX)


def _read_mask(uri: str) -> Mask:
    return images.decode_mask(storage.read_bytes(uri), uri)


def _add_map(picture: Picture, layer: str, uri: str, num_bytes: int) -> None:
    plane = images.decode_map(storage.read_bytes(uri), uri)
    if not picture.width:
        picture.height, picture.width = plane.shape
    small = _shrunk(plane, _area_px(int(num_bytes * _IMAGE_SHARE)) // 2)  # a map is smooth
    picture.layers[layer] = data_uri(encode_webp(Image.fromarray(small), int(num_bytes * _MAP_SHARE)))


def _shrunk(plane: ProbMapU8, area_px: int) -> ResizedMapU8:
    """Shrink a map to an area by averaging; a smaller one stays as it is."""
    height, width = plane.shape
    scale = (area_px / (height * width)) ** 0.5
    if scale >= 1:
        return plane
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(plane, size, interpolation=cv2.INTER_AREA))


def outline_path(mask: Mask, max_characters: int = 10_000) -> str:
    """Return the outlines of a mask as one SVG path for even-odd filling, in px, simplified until it is short.

    Targets that the border cuts are closed along it.

    >>> mask = np.zeros((8, 8), bool)
    >>> mask[2:5, 2:6] = True
    >>> outline_path(mask)
    'M2 2v3h4v-3z'
    """
    # Corners of pixels have whole coordinates, and a pixel's corner belongs to it: repeated pixels give both sides.
    contours, _ = cv2.findContours(_on_corners(mask), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    tolerance_px = max(mask.shape) / 1600
    while True:
        path = "".join(_ring(contour, tolerance_px) for contour in contours)
        if len(path) <= max_characters or tolerance_px > max(mask.shape) / 30:
            return path
        tolerance_px *= 1.6


def _on_corners(mask: Mask) -> np.ndarray:
    """Return which corners of pixels, one more than pixels each way, touch the mask."""
    grown = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.uint8)
    pixels = mask.view(np.uint8)
    for dy in (0, 1):
        for dx in (0, 1):
            grown[dy : dy + mask.shape[0], dx : dx + mask.shape[1]] |= pixels
    return grown


def _ring(contour: np.ndarray, tolerance_px: float) -> str:
    points = cv2.approxPolyDP(contour, tolerance_px, True)[:, 0].tolist()
    if len(points) < 3:
        return ""
    parts = [f"M{points[0][0]} {points[0][1]}"]
    for (x0, y0), (x1, y1) in pairwise(points):
        dx, dy = x1 - x0, y1 - y0
        parts.append(f"h{dx}" if dy == 0 else f"v{dy}" if dx == 0 else f"l{dx} {dy}")
    return "".join([*parts, "z"])


def encode_webp(image: Image.Image, num_bytes: int) -> bytes:
    """Encode a picture as WebP of at most so many bytes: coarser, then smaller."""
    while True:
        for quality in _QUALITIES:
            data = _webp(image, quality)
            if len(data) <= num_bytes:
                return data
        if min(image.size) < 32:
            return data
        image = image.resize((image.width * 3 // 4, image.height * 3 // 4), Image.Resampling.BOX)


def _webp(image: Image.Image, quality: int) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "WEBP", quality=quality, method=4)
    return sink.getvalue()


def data_uri(data: bytes, kind: str = "image/webp") -> str:
    """Return a picture as a URI that holds it."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def figure_uri(data: bytes, name: str, *, width_px: int = 1280) -> str:
    """Return a figure of a run as a data URI, no wider than a page shows it.

    Raises:
        UnreadableImage: it is no picture.
    """
    image = images.decode_figure(data, name)
    if image.width > width_px:
        image = image.resize((width_px, round(image.height * width_px / image.width)), Image.Resampling.LANCZOS)
    return data_uri(_webp(image, 80))
