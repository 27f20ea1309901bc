"""XML of ASAP (and of CAMELYON): polygons in groups, in px of the full image from its upper left corner.

The label is the name of the group. There are no holes: one is joined to its outline by a bridge of no width, or drawn
in a group that `annotation.labels` ignores, which takes nothing away. A spline is drawn straight from point to point,
and told. It does not say how large its image is.

The XML is read by expat event by event; a document type, and with it any entity, is refused.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.parsers import expat
from xml.sax.saxutils import quoteattr

import numpy as np

from stas_core.data.file_limits import MAX_VALUES, shown
from stas_core.data.shapes import CORNER_PX, UNCLASSIFIED, Annotation, Polygon, Shape
from stas_core.errors import OversizedAnnotation, UnreadableAnnotation

_ROOT = "ASAP_Annotations"
_KINDS = {"polygon": "polygon", "rectangle": "polygon", "spline": "spline"}
"""ASAP's types that have an area; a rectangle has its four corners."""


def is_xml(data: bytes) -> bool:
    """Tell whether a file is XML, or HTML."""
    return re.match(rb"(?:\xef\xbb\xbf|\xff\xfe|\xfe\xff|[\s\0])*<", data) is not None


def parse_asap(data: bytes, name: str) -> Annotation:
    """Parse an XML file of ASAP.

    Raises:
        UnreadableAnnotation, OversizedAnnotation: naming the file.
    """
    reader = _Reader(name)
    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = reader.start, reader.end
    parser.StartDoctypeDeclHandler = reader.refuse_doctype
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, ValueError) as error:
        raise UnreadableAnnotation(f"annotation of {name} is damaged XML: {error}; save it again") from error
    return Annotation(tuple(reader.shapes), None, None, format="asap")


class _Reader:
    """Collects shapes from the events of a parser."""

    def __init__(self, name: str) -> None:
        self.shapes: list[Shape] = []
        self._name = name
        self._is_begun = False
        self._label = self._kind = ""
        self._points: list[tuple[float, float, float]] = []
        self._num_points = 0

    def refuse_doctype(self, *_: Any) -> None:
        raise UnreadableAnnotation(
            f"annotation of {self._name} declares a document type, which could hold entities; ASAP writes none: take "
            "it out"
        )

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        if not self._is_begun:
            if tag != _ROOT:
                raise UnreadableAnnotation(
                    f"annotation of {self._name} is XML of <{tag[:60]}>, expected <{_ROOT}> of ASAP; export its "
                    "outlines as GeoJSON (QuPath reads many formats)"
                )
            self._is_begun = True
        elif tag == "Annotation":
            group = attributes.get("PartOfGroup", "")
            self._label = group if group and group != "None" else UNCLASSIFIED
            self._kind, self._points = attributes.get("Type", "").lower(), []
        elif tag == "Coordinate":
            self._points.append(self._point(attributes))
            self._num_points += 1
            if 2 * self._num_points > MAX_VALUES:
                raise OversizedAnnotation(
                    f"annotation of {self._name} holds more than {MAX_VALUES // 2:,} points; outline its targets with "
                    "fewer"
                )

    def end(self, tag: str) -> None:
        if tag == "Annotation":
            ordered = sorted(self._points, key=lambda point: point[0])
            points = np.array(ordered, np.float64).reshape(-1, 3)[:, 1:]
            kind = _KINDS.get(self._kind, self._kind or "annotation without a type")
            self.shapes.append(Shape(self._label, kind, points, shift_px=CORNER_PX))

    def _point(self, attributes: dict[str, str]) -> tuple[float, float, float]:
        """Return order, x and y; some exports have commas for points."""
        try:
            order = float(attributes.get("Order", len(self._points)))
            x, y = (float(attributes[key].replace(",", ".")) for key in ("X", "Y"))
            return order, x, y
        except (KeyError, ValueError) as error:
            raise UnreadableAnnotation(
                f"annotation of {self._name} has a Coordinate {shown(attributes)} without numbers X and Y ({error}); "
                "save it again"
            ) from error


def to_asap(classes: Mapping[str, Sequence[Polygon]]) -> bytes:
    """Write the polygons of each class, whose points count from the corner of the first pixel, as XML of ASAP."""
    groups = {quoteattr(label): polygons for label, polygons in classes.items()}
    lines = ['<?xml version="1.0"?>', f"<{_ROOT}>", "<Annotations>"]
    listed = [(group, polygon) for group, polygons in groups.items() for polygon in polygons]
    for number, (group, polygon) in enumerate(listed):
        lines.append(f'<Annotation Name="Annotation {number}" Type="Polygon" PartOfGroup={group} Color="#F4FA58">')
        points = (f'<Coordinate Order="{i}" X="{x!r}" Y="{y!r}" />' for i, (x, y) in enumerate(polygon.tolist()))
        lines += ["<Coordinates>", *points, "</Coordinates>", "</Annotation>"]
    lines += ["</Annotations>", "<AnnotationGroups>"]
    lines += [f'<Group Name={group} PartOfGroup="None" Color="#ffc800"><Attributes /></Group>' for group in groups]
    return "\n".join([*lines, "</AnnotationGroups>", f"</{_ROOT}>", ""]).encode()
