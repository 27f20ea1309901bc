"""The pages of a slide that was finished: its overview, its gallery, and the layers that a page of all slides shows."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from stas_core.arrays import RgbImage
from stas_core.data import images
from stas_core.errors import InputError, StorageError, WriteError, as_input_error
from stas_core.figures.slides import MOST_PX, GalleryItem, GalleryRow, Layers, draw_gallery, draw_overview
from stas_core.predict.exports import target_id
from stas_core.slides.finish import FoundTargets, SlideToFinish
from stas_core.slides.gallery import blank_crop, crop_target, describe_target
from stas_core.slides.layers import small_size
from stas_core.slides.run import GALLERIES, OVERVIEWS, SMALL_MAPS, SMALL_MASKS, SMALL_STDS, THUMBNAILS
from stas_core.slides.survey import Survey

_JPEG_QUALITY = 85


def write_pages(given: SlideToFinish, found: FoundTargets, kinds: Sequence[str], folder: Path) -> dict[str, Path]:
    """Draw the pages that `kinds` asks for; return their files. Without targets there is no gallery."""
    files = {}
    if OVERVIEWS in kinds:
        thumbnail = given.pixels.thumbnail(MOST_PX)
        files[OVERVIEWS] = folder / "overview.png"
        files[OVERVIEWS].write_bytes(_overview(given, found, thumbnail))
        for kind, data in _layers(given, found, thumbnail).items():
            if kind in kinds:
                files[kind] = folder / f"layer {kind}"
                files[kind].write_bytes(data)
    if GALLERIES in kinds and found.outlines:
        files[GALLERIES] = folder / "gallery.png"
        files[GALLERIES].write_bytes(_gallery(given, found))
    return files


def _layers(given: SlideToFinish, found: FoundTargets, thumbnail: RgbImage) -> dict[str, bytes]:
    """Return the files of the layers, all of one size."""
    files = {THUMBNAILS: small_picture(thumbnail, given.survey)}
    if found.small_mask is not None:
        files[SMALL_MASKS] = images.encode_mask(found.small_mask)
    for kind, plane in ((SMALL_MAPS, found.heat), (SMALL_STDS, found.small_std)):
        if plane is not None:
            files[kind] = images.encode_map(_resized(plane, given.survey))
    return files


def small_picture(thumbnail: RgbImage, survey: Survey) -> bytes:
    """Return the picture of a slide that lies below its layers, as JPEG."""
    return images.encode_jpeg(_resized(thumbnail, survey), quality=_JPEG_QUALITY)


def _resized(pixels: npt.NDArray[np.uint8], survey: Survey) -> npt.NDArray[np.uint8]:
    height, width = small_size((survey.height_px, survey.width_px))
    return np.asarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def _overview(given: SlideToFinish, found: FoundTargets, thumbnail: RgbImage) -> bytes:
    assert found.heat is not None
    survey = given.survey
    layers = Layers(
        heat=found.heat,
        section=given.tissue.mask,
        targets_um=found.placed.points_um,
        tumour=None if given.tumour is None else given.tumour.area_um,
    )
    um_per_px = survey.width_px * survey.mpp / thumbnail.shape[1]
    return draw_overview(thumbnail, um_per_px=um_per_px, layers=layers, scores=found.scores)


def _gallery(given: SlideToFinish, found: FoundTargets) -> bytes:
    rows = [GalleryRow(group.why, [_item(given, found, row) for row in group.rows]) for group in found.chosen]
    return draw_gallery(rows, title=f"{given.id}: {len(found.placed):,} targets")


def _item(given: SlideToFinish, found: FoundTargets, row: int) -> GalleryItem:
    """Return a target with its pixels; a picture that cannot be had is left blank, and its cell says why."""
    bbox, outline = found.placed.targets.bbox[row].tolist(), found.outlines[row]
    lines = describe_target(found.placed, row, found.disagreement)
    try:
        crop = crop_target(given.pixels, bbox, outline)
    except WriteError:
        raise  # what lies in the surroundings is no picture's fault
    except (InputError, StorageError) as error:
        crop = blank_crop(given.pixels.mpp, bbox, outline)
        lines.append(f"not read: {as_input_error(error, given.uri).reason}")
    return GalleryItem(crop, number=row + 1, id=target_id(given.id, row + 1), lines=lines)
