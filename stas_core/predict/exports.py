"""Write what runs leave for people and other tools.

Metrics as Parquet; targets as QuPath GeoJSON; masks and boxes as the competition's archives.
Nothing holds the time it was written, so equal results give equal bytes.
"""

import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any

import pyarrow as pa

from stas_core.predict.postprocess import Target

IMAGES_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("image_uri", pa.string(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("foreground_share", pa.float64(), nullable=False),
        pa.field("num_targets", pa.int32(), nullable=False),
        pa.field("stage", pa.int32(), nullable=False),
        pa.field("mean_disagreement", pa.float64(), nullable=False),
        pa.field("num_passes", pa.int32(), nullable=False),
    ]
)
"""One row per scored image. `stage`: of the threshold cascade, from 1; 0: emptied, as the selection was too large.
`mean_disagreement`: standard deviation of the members' probabilities, mean over pixels. `num_passes`: forward passes
through each member."""

TARGETS_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("target", pa.int32(), nullable=False),
        pa.field("area_px", pa.int64(), nullable=False),
        pa.field("centroid_x", pa.float64(), nullable=False),
        pa.field("centroid_y", pa.float64(), nullable=False),
        pa.field("x0", pa.int32(), nullable=False),
        pa.field("y0", pa.int32(), nullable=False),
        pa.field("x1", pa.int32(), nullable=False),
        pa.field("y1", pa.int32(), nullable=False),
        pa.field("mean_prob", pa.float64(), nullable=False),
        pa.field("peak_prob", pa.float64(), nullable=False),
        pa.field("touches_border", pa.bool_(), nullable=False),
    ]
)
"""One row per target, numbered from 1 within its image; px at native size, x1 and y1 the first outside."""

FAILURES_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
    ]
)
"""One row per input that could not be used: the reason code is the one of `errors.py`, or a stage's own."""


def target_row(image_id: str, number: int, target: Target) -> dict[str, Any]:
    """Return a target's row of the targets table."""
    x0, y0, x1, y1 = target.bbox
    return {
        "id": image_id,
        "target": number,
        "area_px": target.area_px,
        "centroid_x": target.centroid_x,
        "centroid_y": target.centroid_y,
        "x0": x0,
        "y0": y0,
        "x1": x1,
        "y1": y1,
        "mean_prob": target.mean_prob,
        "peak_prob": target.peak_prob,
        "touches_border": target.touches_border,
    }


def to_geojson(image_id: str, targets: Sequence[Target]) -> bytes:
    """Write targets as GeoJSON that QuPath imports as annotations, in px of the image, origin at its corner."""
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


def to_detections(ids: Sequence[str], targets: Iterable[Mapping[str, Any]]) -> bytes:
    """Write `[x1, y1, x2, y2, score]` of every target by image id, as the detection track wants it.

    The corners lie in the box; the score is the mean probability.
    """
    boxes: dict[str, list[list[float]]] = {image_id: [] for image_id in ids}
    for row in targets:
        boxes[row["id"]].append([row["x0"], row["y0"], row["x1"] - 1, row["y1"] - 1, round(row["mean_prob"], 6)])
    return json.dumps(boxes, indent=0).encode()
