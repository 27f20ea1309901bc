"""Masks as an annotation file, to be corrected in the tool that reads it; read again, it gives the mask to the pixel.

A target is a polygon with its holes, or several where its parts meet at corners alone. labelme and ASAP know no holes:
theirs are joined to the outline by a bridge of no width. COCO has targets with holes as RLE.
"""

from collections.abc import Iterable, Mapping, Sequence
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


def write_annotation(classes: Mapping[str, Mask], form: Exported, *, image_id: str, image_path: str) -> bytes:
    """Write the targets of an image's masks in one of the formats.

    Args:
        classes: a mask for each class of targets; a mask image, which has no classes, takes them together.
        form: the format.
        image_id: from which GeoJSON ids follow.
        image_path: where the image is, as labelme and COCO name it.

    Example:
        >>> mask = np.zeros((4, 5), bool)
        >>> mask[1:3, 1:4] = True
        >>> b"[[[1.0,1.0],[1.0,3.0]" in write_annotation(
        ...     {"STAS": mask}, "geojson", image_id="0007", image_path="0007.png"
        ... )
        True
    """
    if form == "geojson":
        names = [image_id, *(f"{image_id} {label}" for label in list(classes)[1:])]
        masks = zip(classes.items(), names, strict=True)
        return geojson.to_geojson({label: _numbered(mask, name) for (label, mask), name in masks})
    first, *others = classes.values()
    size = first.shape[0], first.shape[1]
    if form == "mask":
        return images.encode_mask(np.logical_or.reduce([first, *others]))
    if form == "coco":
        return coco.to_coco([(image_path, size, coco_annotations(classes.values()))], *classes)
    rings = {label: [bridged(rings) for rings in outlines(mask)] for label, mask in classes.items()}
    if form == "labelme":
        return labelme.write_labelme(rings, size, image_path)
    return asap.to_asap({label: [ring + 0.5 for ring in found] for label, found in rings.items()})


def _numbered(mask: Mask, name: str) -> list[tuple[str, list[list[Polygon]]]]:
    _, labels = label_components(mask)
    return [(target_id(name, number), polygons) for number, polygons in enumerate(polygons_of(labels), start=1)]


def coco_annotations(masks: Iterable[Mask]) -> list[dict[str, Any]]:
    """Return what a COCO file says of an image's targets, a mask for each class, but for ids; see `coco.to_coco`."""
    by_class = [_coco_annotations(mask) for mask in masks]
    return [{"category_id": number, **one} for number, found in enumerate(by_class, start=1) for one in found]


def _coco_annotations(mask: Mask) -> list[dict[str, Any]]:
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
