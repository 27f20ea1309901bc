"""A mask as an annotation file, to be corrected in the tool that reads it; read again, it gives the mask to the pixel.

A target is a polygon with its holes, or several where its parts meet at corners alone. labelme and ASAP know no holes:
theirs are joined to the outline by a bridge of no width. COCO has targets with holes as RLE.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from stas_core.arrays import Labels, Mask, label_components
from stas_core.data import asap, coco, geojson, images, labelme
from stas_core.data.edges import bridged, outlines
from stas_core.data.shapes import Polygon
from stas_core.predict.exports import target_id
from stas_core.predict.polygons import trace_shapes

Exported = Literal["geojson", "labelme", "coco", "asap", "mask"]
EXPORTED: Mapping[Exported, str] = {
    "geojson": ".geojson",
    "labelme": ".json",
    "coco": ".json",
    "asap": ".xml",
    "mask": ".png",
}
"""The formats that are written, with their suffixes."""


def write_annotation(mask: Mask, form: Exported, *, image_id: str, image_path: str, label: str) -> bytes:
    """Write the targets of an image's mask in one of the formats.

    Args:
        mask: the image's.
        form: the format.
        image_id: from which GeoJSON ids follow.
        image_path: where the image is, as labelme and COCO name it.
        label: of the targets; a mask image has none.

    Example:
        >>> mask = np.zeros((4, 5), bool)
        >>> mask[1:3, 1:4] = True
        >>> b"[[[1.0,1.0],[1.0,3.0]" in write_annotation(
        ...     mask, "geojson", image_id="0007", image_path="0007.png", label="STAS"
        ... )
        True
    """
    size = mask.shape[0], mask.shape[1]
    if form == "geojson":
        _, labels = label_components(mask)
        targets = [(target_id(image_id, number), polygons) for number, polygons in enumerate(polygons_of(labels), 1)]
        return geojson.to_geojson(targets, label)
    if form == "labelme":
        return labelme.to_labelme([bridged(rings) for rings in outlines(mask)], size, image_path, label)
    if form == "asap":
        return asap.to_asap([bridged(rings) + 0.5 for rings in outlines(mask)], label)
    if form == "coco":
        return coco.to_coco([(image_path, size, coco_annotations(mask))], label)
    return images.encode_mask(mask)


def coco_annotations(mask: Mask) -> list[dict[str, Any]]:
    """Return what a COCO file says of a mask's targets, but for the ids; see `coco.to_coco`."""
    _, labels = label_components(mask)
    targets: list[Sequence[Polygon] | Mask] = []
    for number, polygons in enumerate(polygons_of(labels), start=1):
        has_holes = any(len(rings) > 1 for rings in polygons)
        targets.append(labels == number if has_holes else [rings[0] for rings in polygons])
    return coco.annotations_of(targets)


def polygons_of(labels: Labels) -> list[list[list[Polygon]]]:
    """Return the polygons of each labelled target: its outside, then its holes, from the corner of the first pixel.

    Polygons are valid and 4-connected; a target, 8-connected, may have several.
    """
    shapes = trace_shapes(labels)
    corners = shapes.corners.astype(np.float64)
    rings = [corners[begin : end - 1] for begin, end in zip(shapes.rings[:-1], shapes.rings[1:], strict=True)]
    polygons = [rings[begin:end] for begin, end in zip(shapes.polygons[:-1], shapes.polygons[1:], strict=True)]
    return [polygons[begin:end] for begin, end in zip(shapes.targets[:-1], shapes.targets[1:], strict=True)]
