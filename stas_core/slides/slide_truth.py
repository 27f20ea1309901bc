"""The truth of a slide from a file, in the frame of the run's maps: outlines (GeoJSON), or a mask (TIFF, PNG).

Of outlines those count whose class is a target, as in fields; those without a class are targets unless
`annotation.labels` says what `Unclassified` means. A mask has the frame's size, or level 0's. Its values are 0 and 255,
or 0 and 1. What may be a truth of another slide, has unknown classes, or marks targets without area, is refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from stas_core.arrays import ProbMapU8
from stas_core.data import images
from stas_core.data.annotations import AnnotationConfig, target_shapes
from stas_core.data.shapes import UNCLASSIFIED, Annotation
from stas_core.errors import SizeMismatch, TargetWithoutArea, UnclearMask, UnknownLabel, WrongCoordinates
from stas_core.slides.outlines import rings_of, shapes_of
from stas_core.slides.stitching import ArraySource, MapSource
from stas_core.slides.survey import Survey
from stas_core.slides.truth_sources import OutlineSource, TiffMask

OUTLINES, TIFFS, IMAGES = (".geojson", ".json"), (".tif", ".tiff"), (".png",)
SUFFIXES = (*OUTLINES, *TIFFS, *IMAGES)
"""Of the files that can be the truth of a slide, in lower case."""
KEY = "truth.annotation"
"""What errors call the settings of classes."""


@contextmanager
def open_truth(path: Path, name: str, survey: Survey, annotation: AnnotationConfig) -> Iterator[MapSource]:
    """Open the truth of a slide as a map of 0 and 255 of the frame's size.

    Args:
        path: a local file.
        name: what errors call it.
        survey: of the slide.
        annotation: what the classes of outlines mean.

    Raises:
        InputError: why it is not the truth of this slide.
    """
    suffix = path.suffix.lower()
    if suffix in OUTLINES:
        yield _outlines(path.read_bytes(), name, survey, annotation)
        return
    if suffix in IMAGES:
        yield _image(path, name, survey)
        return
    try:
        mask = TiffMask(path)
    except UnclearMask:  # small masks often have no tiles, or a palette
        yield _image(path, name, survey)
        return
    try:
        yield _Mask(mask, name, survey)
    finally:
        mask.close()


def _outlines(data: bytes, name: str, survey: Survey, annotation: AnnotationConfig) -> OutlineSource:
    """Return the targets that a GeoJSON outlines; none are an empty truth.

    Raises:
        UnknownLabel: nothing says what a class means.
        TargetWithoutArea: a target is a point, a line or empty.
        WrongCoordinates: targets lie outside of the slide.
        UnreadableAnnotation: it is no GeoJSON.
    """
    height, width = size = survey.frame_height, survey.frame_width
    drawn = Annotation(tuple(shapes_of(data, name)), None, None, format="geojson")
    labels = {UNCLASSIFIED: "target", **annotation.labels}
    try:
        chosen = target_shapes(drawn, annotation.model_copy(update={"labels": labels}), KEY)
    except UnknownLabel as error:
        raise UnknownLabel(f"{name}: {error}") from error
    targets = [shape for _, shape in chosen]
    if num_others := sum(shape.kind != "polygon" for shape in targets):
        raise TargetWithoutArea(
            f"{name} has {num_others} point(s), line(s) or empty geometries, which have no area; outline these "
            "targets, or delete them"
        )
    rings = (rings_of(shape, name) for shape in targets)
    found = OutlineSource.of_polygons(rings, size=size, level0_px=survey.level0_px, corner=survey.corner)
    left, right, top, bottom = found.boxes.T
    outside = (right < -0.5) | (left > width - 0.5) | (bottom < -0.5) | (top > height - 0.5)
    if outside.any():
        raise WrongCoordinates(
            f"{name}: {np.count_nonzero(outside)} of its {len(outside)} outlines lie outside of the slide, which is "
            f"{survey.width_px}x{survey.height_px} px at level 0; export the outlines of this slide, in pixels"
        )
    return found


def _image(path: Path, name: str, survey: Survey) -> "_Mask":
    mask = images.decode_mask(path.read_bytes(), name)
    return _Mask(ArraySource(mask.view(np.uint8)), name, survey)


class _Mask:
    """A mask of the frame's size, or of level 0's: then a pixel of the frame is that under its middle.

    Labels are taken as they are, never averaged, and by where they lie on the slide, whatever box is read.
    """

    def __init__(self, mask: MapSource, name: str, survey: Survey) -> None:
        """Take a mask of 0 and 1, or 0 and 255.

        Raises:
            SizeMismatch: it has another size.
        """
        self.size = survey.frame_height, survey.frame_width
        self._mask, self._name, self._step = mask, name, _step(mask.size, name, survey)
        self._target: int | None = None

    def read(self, y0: int, x0: int, height: int, width: int) -> ProbMapU8:
        """Read a box.

        Raises:
            UnclearMask: its values do not say what is target.
            UnreadableSlide: the file does not give these pixels.
        """
        rows, cols = (
            np.minimum(((first + np.arange(num) + 0.5) * self._step).astype(np.int64), end - 1)
            for first, num, end in zip((y0, x0), (height, width), self._mask.size, strict=True)
        )
        top, left = int(rows[0]), int(cols[0])
        finer = self._mask.read(top, left, int(rows[-1]) + 1 - top, int(cols[-1]) + 1 - left)
        levels = finer[np.ix_(rows - top, cols - left)]
        for target in np.flatnonzero(np.bincount(levels.ravel(), minlength=256)).tolist():
            if target and (target not in (1, 255) or self._target not in (None, target)):
                values = sorted({target, self._target or target})
                raise UnclearMask(
                    f"{self._name} holds {' and '.join(map(str, values))}, expected 0 and 255, or 0 and 1; save it as "
                    "a mask of target against the rest"
                )
            self._target = target or self._target
        return np.asarray(np.where(levels > 0, 255, 0), np.uint8)

    def is_blank(self, y0: int, x0: int, height: int, width: int) -> bool:
        """Not known."""
        return False


def _step(size: tuple[int, int], name: str, survey: Survey) -> float:
    """Return how many pixels of a mask, along a side, are one of the frame.

    Raises:
        SizeMismatch: the mask is neither of the frame's size nor of level 0's.
    """
    frame, level0 = (survey.frame_height, survey.frame_width), (survey.height_px, survey.width_px)
    if size == frame:
        return 1.0
    if size == level0:
        return survey.level0_px
    raise SizeMismatch(
        f"{name} has {size[1]}x{size[0]} px, expected those of the run's maps, {frame[1]}x{frame[0]}, or level 0's "
        f"{level0[1]}x{level0[0]}; give a mask of the whole slide"
    )
