"""Rows of small maps of the same images over the epochs of a training."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from stas_core import storage
from stas_core.arrays import Mask, ProbMapU8, RgbImage
from stas_core.data import images, overlay
from stas_core.data.cohort import CohortRow
from stas_core.data.fields import load_image, load_mask
from stas_core.errors import InputError, StorageError
from stas_core.pages.contents import Figure, Strip
from stas_core.pages.pictures import data_uri, encode_webp
from stas_core.runs import TrainingRun

MOST_FOLDS = 6
ALL_BYTES = 700_000
"""What all tiles may take together; a third more as text."""
_TILE_BYTES = 10_000
_THREADS = 4
_STOPS = (0, 64, 128, 191, 255)
_TINT = (
    (0.17, 0.2, 0.23, 0.5, 0.85),
    (0.06, 0.25, 0.49, 0.85, 1),
    (0.33, 0.7, 0.87, 0.6, 0.36),
    (0, 0.25, 0.65, 0.85, 1),
)
"""Red, green, blue and opacity at these grey levels of a map: as the viewer tints it (page.js)."""
_READING = (
    "Images that the fold does not see, after some of its epochs: the map from clear (0) over blue and green to yellow "
    "(1), the annotation outlined. Targets should show early and sharpen; what comes up elsewhere and stays is learned."
)


@dataclass(frozen=True)
class _Field:
    """A validation image with its maps over epochs."""

    id: str
    maps: Mapping[int, str]
    row: CohortRow | None


def over_epochs(trained: TrainingRun, folds: Sequence[int], cohort: Mapping[str, CohortRow]) -> list[Figure]:
    """Return a figure for each of the first folds that kept small maps; images that are gone are left white.

    Raises:
        StasError: a map cannot be read.
    """
    found = {fold: trained.fold(fold).examples() for fold in folds}
    kept = {
        fold: [_Field(name, maps, cohort.get(name)) for name, maps in by_image.items()]
        for fold, by_image in [one for one in found.items() if one[1]][:MOST_FOLDS]
    }
    listed = [field for fields in kept.values() for field in fields]
    num_tiles = sum(1 + len(field.maps) for field in listed)
    most = min(_TILE_BYTES, ALL_BYTES // max(1, num_tiles))
    with ThreadPoolExecutor(_THREADS) as pool:
        strips = iter(list(pool.map(lambda field: _strip(field, most), listed)))
    of_all = f" Of the first {MOST_FOLDS} of {len(folds)} folds." if len(folds) > MOST_FOLDS else ""
    return [
        Figure(
            f"Examples over epochs, fold {fold}", _READING + of_all, is_wide=True, strips=[next(strips) for _ in fields]
        )
        for fold, fields in kept.items()
    ]


def _strip(field: _Field, most_bytes: int) -> Strip:
    maps = {epoch: images.decode_map(storage.read_bytes(uri), uri) for epoch, uri in field.maps.items()}
    size = next(iter(maps.values())).shape
    read = _read(field.row, (size[0], size[1]))
    image, truth = read or (np.full((*size, 3), 255, np.uint8), np.zeros(size, bool))
    tiles = [] if read is None else [("the image", outlined(image, truth))]
    for epoch, prob_u8 in maps.items():
        tiles.append((f"epoch {epoch}", outlined(tinted(image, prob_u8), truth)))
    encoded = [(caption, data_uri(encode_webp(Image.fromarray(tile), most_bytes))) for caption, tile in tiles]
    return Strip(field.id, encoded)


def _read(row: CohortRow | None, size: tuple[int, int]) -> tuple[RgbImage, Mask] | None:
    """Return an image and its annotation at a size (height, width); None: it is gone, or has changed."""
    try:
        if row is None:
            return None
        image, mask = load_image(row, 1.0), load_mask(row)
    except (InputError, StorageError):
        return None
    shape = size[1], size[0]
    small = cv2.resize(mask.astype(np.float32), shape, interpolation=cv2.INTER_AREA) >= 0.5
    return np.asarray(cv2.resize(image, shape, interpolation=cv2.INTER_AREA)), np.asarray(small)


def outlined(image: RgbImage, truth: Mask) -> RgbImage:
    """Outline the annotation by lines that are still seen where the picture is shown at half its size."""
    contours, _ = cv2.findContours(truth.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    drawn = image.copy()
    for rgb, width_px in ((overlay.RIM_RGB, 4), (overlay.TRUTH_RGB, 2)):
        cv2.drawContours(drawn, contours, -1, rgb, width_px)
    return np.asarray(drawn)


def tinted(image: RgbImage, prob_u8: ProbMapU8) -> RgbImage:
    """Lay a map over its image: from clear over blue and green to yellow.

    Example:
        >>> tinted(np.full((1, 2, 3), 200, np.uint8), np.array([[0, 255]], np.uint8)).tolist()
        [[[200, 200, 200], [217, 255, 92]]]
    """
    red, green, blue, opacity = (np.interp(np.arange(256), _STOPS, stops)[prob_u8] for stops in _TINT)
    colour = 255 * np.stack([red, green, blue], axis=2)
    blended = image + opacity[:, :, None] * (colour - image)
    return np.asarray(np.rint(blended), np.uint8)
