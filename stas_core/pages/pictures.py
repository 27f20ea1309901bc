"""Layers of images for a page: small WebP pictures as data URIs, and masks drawn over them."""

import base64
import functools
import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import cv2
import numpy as np
from PIL import Image

from stas_core import storage
from stas_core.arrays import Mask, ProbMapU8, ResizedMapU8
from stas_core.data import images
from stas_core.errors import InputError, StorageError
from stas_core.pages.contents import PictureSource
from stas_core.pages.drawn_masks import draw_mask
from stas_core.scores import metrics

PAGE_BYTES = 12_500_000
"""What the pictures of a page may take together, as text."""
MAX_PICTURE_BYTES = 200_000
"""What those of one image take at most, however few there are."""
MAX_FIGURE_BYTES = 700_000
"""The same, of figures, whose text is to be read."""
MAX_SLIDE_BYTES = 1_400_000
"""The same, of an image with layers and of the figures beside it."""
_MAP_SHARE, _PATH_SHARE = 0.1, 0.06
"""Of these, what each map and each outline may take; the image takes the rest."""
_BESIDE_SHARE = 0.5
"""Of all, what the figures beside an image may take."""
_BYTES_PER_PX = 0.28
"""Of H&E as WebP of the first quality; measured on fields of 20x."""
_QUALITIES, _MAP_QUALITIES = (65, 50, 35, 20), (88, 70, 45, 20)
"""Of WebP, the best first; in smooth maps blocks show sooner."""
_MAX_PIXELS = 400_000_000
_WIDE = 2.1
"""Figures that are wider than this by their height are cramped in half a page."""
_THREADS = 8
"""However few CPUs there are: disks and object stores take their time."""
T = TypeVar("T")


@dataclass
class Picture:
    """The layers of an image, and what is not right about them."""

    height: int = 0
    """In px of the image, like `width`."""
    width: int = 0
    layers: dict[str, str] = field(default_factory=dict)
    """`image`, `map` and `disagreement` as data URIs, `found`, `truth`, `missed` and `false` as `draw_mask` draws
    them."""
    beside: list[tuple[str, str]] = field(default_factory=list)
    """Figures that are shown below: title, data URI."""
    dice: float | None = None
    """Of the mask against the truth, where both are there."""
    notes: list[str] = field(default_factory=list)
    """Why a layer is missing, or what it lacks."""

    def to_json(self) -> dict[str, Any]:
        """Return it as the page's script takes it."""
        return {"w": self.width, "h": self.height, **self.layers, "beside": self.beside, "notes": self.notes}


def make_pictures(sources: Sequence[PictureSource | None]) -> Iterator[Picture]:
    """Yield the layers of each image in turn, made side by side; they fit a page together."""
    shown = [source for source in sources if source is not None]
    budget = min(max(map(_most_bytes, shown), default=0), PAGE_BYTES // max(1, len(shown)))

    def make(source: PictureSource | None) -> Picture:
        return Picture() if source is None else make_picture(source, budget)

    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(make, sources)


def _most_bytes(source: PictureSource) -> int:
    if source.is_figure:
        return MAX_FIGURE_BYTES
    return MAX_SLIDE_BYTES if source.beside else MAX_PICTURE_BYTES


def make_picture(source: PictureSource, num_characters: int) -> Picture:
    """Make the layers of an image; one that cannot be read is left out and noted, whatever is wrong with it.

    Args:
        source: where its layers are.
        num_characters: what they may take together.
    """
    return _Maker(source, num_characters).make()


class _Maker:
    """Makes the layers of one image."""

    def __init__(self, source: PictureSource, num_characters: int):
        self._source, self._made = source, Picture(notes=list(source.notes))
        self._beside_bytes = int(_BESIDE_SHARE * num_characters * 3 // 4) if source.beside else 0
        num_characters = int((1 - _BESIDE_SHARE) * num_characters) if source.beside else num_characters
        self._num_characters, self._num_bytes = num_characters, num_characters * 3 // 4  # base64: four of three

    def make(self) -> Picture:
        """Make all that can be made."""
        source, made = self._source, self._made
        if source.image_uri:
            self._try("image", self._add_image)
        planes = {
            layer: plane
            for layer, uri in (("map", source.map_uri), ("disagreement", source.disagreement_uri))
            if uri and (plane := self._try(layer, functools.partial(_read_map, uri))) is not None
        }
        found = self._try("found", functools.partial(self._read_found, planes.get("map")))
        truth = self._try("truth", functools.partial(self._read_truth, found))
        for plane in (*planes.values(), found, truth):
            if plane is not None and not made.width:
                made.height, made.width = plane.shape
        apart = {
            layer: self._try(layer, functools.partial(_read_mask, uri))
            for layer, uri in (("missed", source.missed_uri), ("false", source.false_uri))
            if uri
        }
        for layer, mask in (("found", found), ("truth", truth), *apart.items()):
            if mask is not None and self._fits(layer, mask.shape):
                self._draw(layer, mask)
        if found is not None and truth is not None and found.shape == truth.shape and truth.any():
            made.dice = metrics.count(found, truth).dice
        for layer, plane in planes.items():
            small = _shrunk(plane, self._area_px // 2)  # a map is smooth
            made.layers[layer] = data_uri(
                encode_webp(Image.fromarray(small), int(self._num_bytes * _MAP_SHARE), _MAP_QUALITIES)
            )
        for title, uri in source.beside:
            figure = self._try(title, functools.partial(self._read_figure, uri, 1 / len(source.beside)))
            made.beside += [] if figure is None else [(title, figure)]
        return made

    def _draw(self, layer: str, mask: Mask) -> None:
        drawn = draw_mask(mask, int(self._num_characters * _PATH_SHARE))
        shown = data_uri(drawn.picture) if drawn.picture else drawn.path
        self._made.layers |= {layer: shown} if shown or not drawn.note else {}
        self._made.notes += [f"{layer}: {drawn.note}"] if drawn.note else []

    @property
    def _image_bytes(self) -> int:
        source = self._source
        num_maps = sum(bool(uri) for uri in (source.map_uri, source.disagreement_uri))
        num_masks = 2 + sum(bool(uri) for uri in (source.missed_uri, source.false_uri))
        rest = 1.0 if source.is_figure else 1 - num_masks * _PATH_SHARE - num_maps * _MAP_SHARE
        return int(self._num_bytes * rest)

    @property
    def _area_px(self) -> int:
        return int(self._image_bytes / _BYTES_PER_PX)

    def _try(self, layer: str, make: Callable[[], T]) -> T | None:
        try:
            return make()
        except (InputError, StorageError) as error:
            self._made.notes.append(f"{layer}: {error}")
            return None

    def _add_image(self) -> None:
        uri, made = self._source.image_uri, self._made
        data = storage.read_bytes(uri)
        if self._source.is_figure:
            figure = images.decode_figure(data, uri)
            made.height, made.width = figure.height, figure.width
            made.layers["image"] = data_uri(encode_webp(_within(figure, self._area_px), self._image_bytes))
            return
        size, image = images.decode_small(data, uri, area_px=self._area_px, max_pixels=_MAX_PIXELS)
        made.height, made.width = size
        made.layers["image"] = data_uri(encode_webp(Image.fromarray(image), self._image_bytes))

    def _read_figure(self, uri: str, share: float) -> str:
        num_bytes = int(self._beside_bytes * share)
        figure = images.decode_figure(storage.read_bytes(uri), uri)
        return data_uri(encode_webp(_within(figure, int(num_bytes / _BYTES_PER_PX)), num_bytes))

    def _read_found(self, prob_map: ProbMapU8 | None) -> Mask | None:
        if self._source.mask_uri:
            return _read_mask(self._source.mask_uri)
        make = self._source.found_by
        return None if make is None or prob_map is None else make(prob_map)

    def _read_truth(self, found: Mask | None) -> Mask | None:
        if self._source.truth_uri:
            return _read_mask(self._source.truth_uri)
        make = self._source.truth_by
        return None if make is None or found is None else make(found)

    def _fits(self, layer: str, shape: tuple[int, ...]) -> bool:
        is_fit = shape == (self._made.height, self._made.width)
        if not is_fit:
            size = f"{self._made.width}x{self._made.height}"
            self._made.notes.append(f"{layer}: {shape[1]}x{shape[0]} px, the image {size} px")
        return is_fit


def _read_mask(uri: str) -> Mask:
    return images.decode_mask(storage.read_bytes(uri), uri)


def _read_map(uri: str) -> ProbMapU8:
    return images.decode_map(storage.read_bytes(uri), uri)


def _within(figure: Image.Image, area_px: int) -> Image.Image:
    """Shrink a figure to an area; a smaller one stays as it is."""
    scale = (area_px / (figure.width * figure.height)) ** 0.5
    if scale >= 1:
        return figure
    size = max(1, round(figure.width * scale)), max(1, round(figure.height * scale))
    return figure.resize(size, Image.Resampling.LANCZOS)


def _shrunk(plane: ProbMapU8, area_px: int) -> ResizedMapU8:
    """Shrink a map to an area by averaging; a smaller one stays as it is."""
    height, width = plane.shape
    scale = (area_px / (height * width)) ** 0.5
    if scale >= 1:
        return plane
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(plane, size, interpolation=cv2.INTER_AREA))


def encode_webp(image: Image.Image, num_bytes: int, qualities: Sequence[int] = _QUALITIES) -> bytes:
    """Encode a picture as WebP of at most so many bytes: coarser, then smaller."""
    while True:
        for quality in qualities:
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


def figure_uri(data: bytes, name: str, *, width_px: int = 1280) -> tuple[str, bool]:
    """Return a figure of a run as a data URI, no wider than a page shows it, and whether it needs that width.

    Raises:
        UnreadableImage: it is no picture.
    """
    image = images.decode_figure(data, name)
    is_wide = image.width > _WIDE * image.height
    if image.width > width_px:
        image = image.resize((width_px, round(image.height * width_px / image.width)), Image.Resampling.LANCZOS)
    return data_uri(_webp(image, 80)), is_wide
