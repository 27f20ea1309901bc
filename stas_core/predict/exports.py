"""Outputs for people and other tools.

Metrics as Parquet; targets as QuPath GeoJSON; masks and boxes as the competition's archives.
Nothing holds the time it was written, so equal results give equal bytes.
"""

import json
import uuid
import zipfile
from collections.abc import Iterable, Sequence
from typing import IO

from stas_core.predict.postprocess import Target
from stas_core.runs import ScoredTarget

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "stas-on-ray")


def target_id(image_id: str, number: int) -> str:
    """Return the id of a target in GeoJSON: a UUID, as QuPath wants it, that follows from its image and number."""
    return str(uuid.uuid5(_NAMESPACE, f"{image_id} {number}"))


def target_row(image_id: str, number: int, target: Target) -> ScoredTarget:
    """Return a target's row of the targets table."""
    return ScoredTarget(
        image_id,
        number,
        target.area_px,
        target.centroid_x,
        target.centroid_y,
        *target.bbox,
        target.mean_prob,
        target.peak_prob,
        target.touches_border,
    )


def to_geojson(image_id: str, targets: Sequence[Target]) -> bytes:
    """Write targets as GeoJSON that QuPath imports as annotations, in px of the image, origin at its corner.

    Example:
        >>> to_geojson("0007", [])
        b'{"type": "FeatureCollection", "features": []}'
    """
    features = [
        {
            "type": "Feature",
            "id": f"{image_id}-{number}",
            "geometry": {
                "type": "Polygon",
                # labelme and we put whole coordinates at pixel centres, QuPath at pixel corners.
                "coordinates": [[*(ring + 0.5).tolist(), (ring[0] + 0.5).tolist()] for ring in target.rings],
            },
            "properties": {
                "objectType": "annotation",
                "name": f"STAS {number}",
                "classification": {"name": "STAS", "color": [255, 200, 0]},
                "measurements": {
                    "Area px": target.area_px,
                    "Mean probability": target.mean_prob,
                    "Peak probability": target.peak_prob,
                },
            },
        }
        for number, target in enumerate(targets, start=1)
    ]
    return json.dumps({"type": "FeatureCollection", "features": features}).encode()


def write_archive(sink: IO[bytes], files: Iterable[tuple[str, bytes]]) -> None:
    """Write named files into a zip, stored as they are, under one fixed date."""
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files:
            archive.writestr(zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0)), data)


def to_detections(ids: Sequence[str], targets: Iterable[ScoredTarget]) -> bytes:
    """Write `[x1, y1, x2, y2, score]` of every target by image id, as the detection track wants it.

    The corners lie in the box; the score is the mean probability.
    """
    boxes: dict[str, list[list[float]]] = {image_id: [] for image_id in ids}
    for row in targets:
        boxes[row.id].append([row.x0, row.y0, row.x1 - 1, row.y1 - 1, round(row.mean_prob, 6)])
    return json.dumps(boxes, indent=0).encode()
