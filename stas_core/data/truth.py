"""What the target of an image is, from an annotation or a mask file, and what of it cannot be trusted.

Both `prepare_data` and `evaluate` read their truth here. No target is dropped silently: a shape that cannot
be drawn makes the image unusable, or is a finding that both stages count and print.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from stas_core import storage
from stas_core.arrays import Mask
from stas_core.data import annotations, file_limits, ids, shapes
from stas_core.data.annotations import AnnotationConfig, Finding
from stas_core.data.shapes import Annotation, Polygon
from stas_core.errors import OversizedAnnotation, TargetWithoutArea, WrongCoordinates

READ_AS = "no tolerance empties a mask, no empty geometry is dropped"
"""Changes where the same annotations become other masks: what was made of them before is made anew."""
CLICKS = ("too_few_points", "zero_area")
"""Findings that a stray click leaves behind."""
UNDRAWABLE = ("no_area", "not_finite", "too_many_points")
"""Findings of shapes that someone meant to be a target."""

_SHARE_MARGIN = 0.05
_CHANCE = 1e-5
"""How improbable it must be that coordinates are whole pixels in percent by accident."""
_FAR_OUTSIDE = 0.05
"""Share of the longer side: labelme lets nobody draw so far outside an image."""


def read_annotation_file(uri: str, most: int = file_limits.MAX_BYTES) -> bytes:
    """Read an annotation file of at most `most` bytes; a larger one is not read at all.

    Raises:
        OversizedAnnotation: it has more, or more than any may have.
    """
    num_bytes = storage.size(uri)
    file_limits.check_num_bytes(num_bytes, uri)
    if num_bytes > most:
        raise OversizedAnnotation(
            f"{uri} has {num_bytes} bytes, more than limits.max_annotation_bytes = {most}; is it an annotation? raise "
            "the limit, or save it without the image's data"
        )
    return storage.read_bytes(uri)


def read_annotation(
    data: bytes,
    name: str,
    size: tuple[int, int],
    config: AnnotationConfig,
    image_id: str | None = None,
    key: str = "annotation",
) -> tuple[Mask, list[Finding], Annotation]:
    """Read the target of an image of `size` (height, width) from an annotation of any format called `name`.

    `image_id` selects the image in a file that covers several; None: the one that the file is named by. `key` is what
    the stage calls the settings of labels.

    Raises:
        InputError: it is unreadable, for another image, in other coordinates, or a target of it covers nothing.

    Example:
        >>> from stas_core.data.labelme import to_labelme
        >>> square = np.array([[2.0, 2.0], [6.0, 2.0], [6.0, 6.0], [2.0, 6.0]])
        >>> data = to_labelme([square], (10, 10), "0007.jpg")
        >>> mask, findings, _ = read_annotation(data, "0007.json", (10, 10), AnnotationConfig())
        >>> int(mask.sum()), findings
        (16, [])
    """
    if image_id is None:
        image_id = storage.stem_of(name) if name.lower().endswith(".json") else storage.name_of(name)
    annotation = annotations.parse(data, name, image_id=image_id, size=size, config=config)
    targets = [shape for _, shape in annotations.target_shapes(annotation, config, key)]
    points = [shape.points for shape in targets if shapes.has_area(shape) and np.isfinite(shape.points).all()]
    findings: list[Finding] = []
    if any(len(np.unique(some, axis=0)) > 1 for some in points):
        at = np.concatenate(points)
        if config.coordinates == "check":
            _require_pixels(at, size)
        if min(size) >= 4 * 100 and at.min() >= 0 and at.max() <= 100:
            message = "all targets lie within 100 px of the upper left corner; are the coordinates percent?"
            findings.append(Finding(None, "near_corner", message))
    mask, odd = annotations.rasterise(annotation, size, config)
    if targets and config.on_degenerate != "ignore":
        _require_area(mask, odd, config)
    return mask, [*_of_file(annotation, image_id), *findings, *odd], annotation


def _require_pixels(points: Polygon, size: tuple[int, int]) -> None:
    """Refuse coordinates that are not pixels of the image; `points` are those of all its targets."""
    height, width = size
    low, high = points.min(axis=0), points.max(axis=0)
    remedy = "convert them to pixels, or set annotation.coordinates=pixels if they are"
    box = f"x {low[0]:g}..{high[0]:g}, y {low[1]:g}..{high[1]:g} in an image of {width}x{height} px"
    if max(size) > 10 and low.min() >= -_SHARE_MARGIN and high.max() <= 1 + _SHARE_MARGIN:
        raise WrongCoordinates(f"the targets span {box}: these look like shares of its sides; {remedy}")
    if low.min() >= 0 and high.max() <= 100 and _are_percent(points, size):
        raise WrongCoordinates(f"the targets span {box}: in percent of its sides they are whole pixels; {remedy}")
    margin = _FAR_OUTSIDE * max(size)
    is_outside = high[0] > width + margin or high[1] > height + margin
    if is_outside and low.min() >= -1 and high[0] <= height and high[1] <= width:
        raise WrongCoordinates(f"the targets span {box}: they fit with x and y swapped; {remedy}")


def _are_percent(points: Polygon, size: tuple[int, int]) -> bool:
    """Tell whether coordinates, taken for percent, are whole pixels more often than by chance.

    Numbers of at least two decimals say so: rounded to d decimals, each other one has a chance of 2 * tolerance.
    """
    chance = 1.0
    for values, side in ((points[:, 0], size[1]), (points[:, 1], size[0])):
        for value in np.unique(values).tolist():
            digits = format(value, ".15g").partition(".")[2]
            tolerance = max(0.5 * 10.0 ** -len(digits) * side / 100, 1e-6)
            if abs(value * side / 100 - round(value * side / 100)) > tolerance:
                return False
            if len(digits) >= 2 and "e" not in digits:
                chance *= min(1.0, 2 * tolerance)
    return chance < _CHANCE


def _require_area(mask: Mask, findings: Sequence[Finding], config: AnnotationConfig) -> None:
    """Refuse a target that covers nothing, unless the config allows it."""
    kinds = UNDRAWABLE if config.on_degenerate == "keep_rest" else UNDRAWABLE + CLICKS
    fatal = [finding for finding in findings if finding.kind in kinds]
    if not fatal and not mask.any():
        fatal = list(findings)
    if fatal:
        more = f" (and {len(fatal) - 1} more)" if len(fatal) > 1 else ""
        raise TargetWithoutArea(
            f"a target covers nothing: {in_words(fatal[0])}{more}; draw it again, give it a label that "
            "annotation.labels ignores, or leave it out by annotation.on_degenerate=ignore"
        )


def _of_file(annotation: Annotation, image_id: str) -> list[Finding]:
    """Return the findings about the file as a whole."""
    found: list[Finding] = []
    if annotation.image_path is not None:
        other_id = storage.stem_of(annotation.image_path.replace("\\", "/"))
        if ids.as_file(other_id) != ids.as_file(image_id):
            message = f"imagePath names {annotation.image_path!r}; is it the annotation of another image?"
            found.append(Finding(None, "other_image", message))
    if annotation.format == "labelme" and (annotation.height is None or annotation.width is None):
        message = "imageHeight and imageWidth are not stated; whether it fits the image is not checked"
        found.append(Finding(None, "size_not_stated", message))
    if annotation.flags:
        message = f"flags {list(annotation.flags)} of the image are set; they change nothing here"
        found.append(Finding(None, "flagged", message))
    return found


def in_words(finding: Finding) -> str:
    """Format a finding as one line for the tables."""
    where = "file" if finding.shape_index is None else f"shape {finding.shape_index}"
    return f"{where}: {finding.kind}: {finding.message}"


def count_findings(findings: Mapping[str, Iterable[str]]) -> dict[str, int]:
    """Count findings by kind, the most frequent first; `findings` are lines by image id."""
    counts = Counter(line.split(": ")[1] for lines in findings.values() for line in lines)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def findings_lines(findings: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a line for each kind of finding: how many, in how many images, and the first."""
    lines = []
    for kind, count in count_findings(findings).items():
        having = {name: line for name, some in findings.items() for line in some if line.split(": ")[1] == kind}
        first = min(having)
        lines.append(f"finding: {kind}: {count} in {len(having)} image(s), such as {first}: {having[first]}")
    return lines
