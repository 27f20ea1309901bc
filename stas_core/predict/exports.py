"""Outputs for people and other tools.

Rows of the targets table; masks and boxes as the competition's archives.
Nothing holds the time it was written, so equal results give equal bytes.
"""

import hashlib
import json
import uuid
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import IO

from stas_core.predict.postprocess import Targets
from stas_core.scored_runs import ScoredTarget

Box = tuple[int, int, int, int, float]

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "stas-on-ray")


def target_id(image_id: str, number: int) -> str:
    """Return the id of a target in GeoJSON: a UUID, as QuPath wants it, that follows from its image and number.

    Example:
        >>> target_id("0007", 1) == target_id("0007", 1) != target_id("0007", 2)
        True
    """
    # A quarter of the time of `uuid.uuid5`, of which it is the value.
    name = f"{image_id} {number}".encode()
    digits = hashlib.sha1(_NAMESPACE.bytes + name, usedforsecurity=False).hexdigest()
    variant = "89ab"[int(digits[16], 16) & 3]
    return f"{digits[:8]}-{digits[8:12]}-5{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:32]}"


def target_rows(image_id: str, targets: Targets) -> list[ScoredTarget]:
    """Return the rows of an image's targets in the targets table."""
    columns = (
        targets.area_px,
        targets.centroid_x,
        targets.centroid_y,
        *targets.bbox.T,
        targets.mean_prob,
        targets.peak_prob,
        targets.touches_border,
    )
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [ScoredTarget(image_id, number, *row) for number, row in enumerate(rows, start=1)]


def write_archive(sink: IO[bytes], files: Iterable[tuple[str, bytes]]) -> None:
    """Write named files into a zip, stored as they are, under one fixed date."""
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files:
            archive.writestr(zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0)), data)


def to_detections(ids: Sequence[str], targets: Iterable[ScoredTarget]) -> bytes:
    """Write `[x1, y1, x2, y2, score]` of every target by image id, as the detection track wants it.

    The corners lie in the box; the score is the mean probability.
    """
    boxes: dict[str, list[Box]] = {image_id: [] for image_id in ids}
    for row in targets:
        boxes[row.id].append((row.x0, row.y0, row.x1, row.y1, row.mean_prob))
    return "".join(detection_lines(boxes.items())).encode()


def detection_lines(boxes: Iterable[tuple[str, Iterable[Box]]]) -> Iterator[str]:
    """Yield that file in pieces, of images with the `x0, y0, x1, y1, mean_prob` of their targets.

    Example:
        >>> "".join(detection_lines([("0007", [(1, 2, 5, 6, 0.5)])])).replace("\\n", " ")
        '{ "0007": [ [ 1, 2, 4, 5, 0.5 ] ] }'
    """
    before = "{\n"
    for image_id, found in boxes:
        rows = [f"[\n{x0},\n{y0},\n{x1 - 1},\n{y1 - 1},\n{round(prob, 6)!r}\n]" for x0, y0, x1, y1, prob in found]
        inner = ",\n".join(rows)
        yield f"{before}{json.dumps(image_id)}: " + (f"[\n{inner}\n]" if rows else "[]")
        before = ",\n"
    yield "{}" if before == "{\n" else "\n}"
