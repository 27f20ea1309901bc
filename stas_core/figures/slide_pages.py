"""The pages of a slide that was finished: its overview and its gallery."""

from collections.abc import Sequence
from pathlib import Path

from stas_core.errors import InputError, StorageError, WriteError, as_input_error
from stas_core.figures.slides import MOST_PX, GalleryItem, GalleryRow, Layers, draw_gallery, draw_overview
from stas_core.predict.exports import target_id
from stas_core.slides.finish import FoundTargets, SlideToFinish
from stas_core.slides.gallery import blank_crop, crop_target, describe_target
from stas_core.slides.run import GALLERIES, OVERVIEWS


def write_pages(given: SlideToFinish, found: FoundTargets, kinds: Sequence[str], folder: Path) -> dict[str, Path]:
    """Draw the pages that `kinds` asks for; return their files. Without targets there is no gallery."""
    files = {}
    if OVERVIEWS in kinds:
        files[OVERVIEWS] = folder / "overview.png"
        files[OVERVIEWS].write_bytes(_overview(given, found))
    if GALLERIES in kinds and found.outlines:
        files[GALLERIES] = folder / "gallery.png"
        files[GALLERIES].write_bytes(_gallery(given, found))
    return files


def _overview(given: SlideToFinish, found: FoundTargets) -> bytes:
    assert found.heat is not None
    thumbnail, survey = given.pixels.thumbnail(MOST_PX), given.survey
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
