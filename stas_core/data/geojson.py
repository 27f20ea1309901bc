"""GeoJSON as QuPath writes and reads it: polygons with holes and classes, in px from the image's upper left corner.

A file is a FeatureCollection, a single feature, a bare geometry, or a list of features. A MultiPolygon is a shape per
polygon. It does not say how large its image is, so whether it fits is seen only where points lie outside.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from stas_core.data.file_limits import shown
from stas_core.data.shapes import CORNER_PX, UNCLASSIFIED, Annotation, Polygon, Shape
from stas_core.errors import UnreadableAnnotation

_COLLECTIONS = {"FeatureCollection": "features", "GeometryCollection": "geometries"}
_AREAS = ("Polygon", "MultiPolygon")
_NO_AREAS = ("Point", "MultiPoint", "LineString", "MultiLineString")
_TYPES = (*_COLLECTIONS, "Feature", *_AREAS, *_NO_AREAS)
_COLOURS = ([255, 200, 0], [0, 200, 255], [0, 158, 115], [204, 121, 167])
"""Of the classes that are written, in their order."""
_MAX_DEPTH = 20
"""Of collections in collections."""


def is_geojson(values: Any) -> bool:
    """Tell whether parsed JSON is GeoJSON; an empty list is a list of no features."""
    items = values if isinstance(values, list) else [values]
    return all(isinstance(item, dict) and item.get("type") in _TYPES for item in items)


def from_json(values: Any, name: str) -> Annotation:
    """Return the annotation that parsed JSON holds.

    Raises:
        UnreadableAnnotation: naming the file, and what is no GeoJSON.
    """
    return Annotation(tuple(shapes_in(values, name)), None, None, format="geojson")


def shapes_in(values: Any, name: str) -> Iterator[Shape]:
    """Yield the shapes that parsed JSON holds.

    Raises:
        UnreadableAnnotation: naming the file, and what is no GeoJSON.
    """
    for item in values if isinstance(values, list) else [values]:
        yield from _of_member(item, UNCLASSIFIED, name, 0)


def _of_member(item: Any, label: str, name: str, depth: int) -> Iterator[Shape]:
    """Yield the shapes of a member of a collection of features: at least one, but of such a collection."""
    is_collection = isinstance(item, dict) and item.get("type") == "FeatureCollection"
    yield from (_shapes if is_collection else _shapes_of_target)(item, label, name, depth)


def _shapes_of_target(geometry: Any, label: str, name: str, depth: int) -> Iterator[Shape]:
    """Yield the shapes of a geometry; of an empty one a shape without area, which is told: someone meant a target."""
    found = list(_shapes(geometry, label, name, depth))
    yield from found or [Shape(label, f"empty {geometry['type']}", np.zeros((0, 2)))]


def _shapes(item: Any, label: str, name: str, depth: int) -> Iterator[Shape]:
    kind = item.get("type") if isinstance(item, dict) else None
    if depth > _MAX_DEPTH:
        raise UnreadableAnnotation(f"{name} has collections within collections; export its features one by one")
    if isinstance(kind, str) and kind in _COLLECTIONS:
        inner_shapes = _of_member if kind == "FeatureCollection" else _shapes
        for inner in _list(item.get(_COLLECTIONS[kind]), _COLLECTIONS[kind], name):
            yield from inner_shapes(inner, label, name, depth + 1)
    elif kind == "Feature":
        label, geometry = _label(item.get("properties"), name), item.get("geometry")
        if geometry is None:
            yield Shape(label, "feature without geometry", np.zeros((0, 2)))
        else:
            yield from _shapes_of_target(geometry, label, name, depth + 1)
    elif kind == "Polygon":
        yield _polygon(item.get("coordinates"), label, name)
    elif kind == "MultiPolygon":
        for rings in _list(item.get("coordinates"), "coordinates", name):
            yield _polygon(rings, label, name)
    elif kind in _NO_AREAS:
        yield Shape(label, kind, np.zeros((0, 2)))
    else:
        raise UnreadableAnnotation(
            f"{name} has an item of type {shown(kind)}, expected those of GeoJSON; export it again"
        )


def _label(properties: Any, name: str) -> str:
    """Return the class of a feature: QuPath writes its name, or the names of its parts, or nothing."""
    found = properties.get("classification") if isinstance(properties, dict) else None
    if isinstance(found, dict):
        found = found.get("names", found.get("name"))
    if isinstance(found, list) and all(isinstance(part, str) for part in found):
        found = ": ".join(found)
    if not isinstance(found, (str, type(None))):
        raise UnreadableAnnotation(f"{name} has the classification {shown(found)}, expected a name; export it again")
    return found or UNCLASSIFIED


def _polygon(value: Any, label: str, name: str) -> Shape:
    rings = [_ring(ring, name) for ring in _list(value, "coordinates", name)]
    if not rings:
        raise UnreadableAnnotation(f"{name} has a polygon without an outline; export it again")
    return Shape(label, "polygon", rings[0], holes=tuple(rings[1:]), shift_px=CORNER_PX)


def _ring(value: Any, name: str) -> Polygon:
    """Return a ring's points, without the first one again at the end."""
    try:
        points = np.array([[_number(point[0]), _number(point[1])] for point in _list(value, "ring", name)])
    except (TypeError, IndexError, KeyError, OverflowError) as error:
        raise UnreadableAnnotation(f"{name} has a ring that is no list of points: {error}; export it again") from error
    points = points.reshape(-1, 2)
    return points[:-1] if len(points) > 1 and (points[0] == points[-1]).all() else points


def _number(value: Any) -> float:
    if isinstance(value, (int, float)):
        return float(value)
    raise TypeError(f"{shown(value)} is not a number")


def _list(value: Any, key: str, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise UnreadableAnnotation(f"{name}: {key} is a {type(value).__name__}, expected a list; export it again")
    return value


def to_geojson(classes: Mapping[str, Sequence[tuple[str, Sequence[Sequence[Polygon]]]]]) -> bytes:
    """Write the targets of each class, each an id and its polygons (outside, then holes), as QuPath reads them.

    Points count from the corner of the first pixel.
    """
    features = [
        {
            "type": "Feature",
            "id": target_id,
            "geometry": _geometry([[_closed(ring) for ring in rings] for rings in polygons]),
            "properties": {"objectType": "annotation", "classification": {"name": label, "color": color}},
        }
        for (label, targets), color in zip(classes.items(), itertools.cycle(_COLOURS), strict=False)
        for target_id, polygons in targets
    ]
    return json.dumps({"type": "FeatureCollection", "features": features}, separators=(",", ":")).encode()


def _geometry(polygons: list[list[list[list[float]]]]) -> dict[str, Any]:
    if len(polygons) == 1:
        return {"type": "Polygon", "coordinates": polygons[0]}
    return {"type": "MultiPolygon", "coordinates": polygons}


def _closed(ring: Polygon) -> list[list[float]]:
    points: list[list[float]] = ring.tolist()
    return points if points[0] == points[-1] else [*points, points[0]]
